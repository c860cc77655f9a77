//! The status of one overlay, and of its programs and maps.

use flannel_common::{Counter, map::TRUST};
use flannel_core::plan::{Device, Hook, ObservedKind};

use super::{
    Agent, Args, Counters, DeviceInfo, FastCounters, FastPathInfo, LeaseInfo, NOT_RUNNING,
    NotCarried, Path, RoutesInfo, Standing, Status, XdpInfo, findings,
};
use crate::{
    dataplane::{
        bpf::{self, AttachMode, Instance, Totals},
        netlink::Netlink,
    },
    features,
    state::{FastPath, Mode, State},
    telemetry::chain,
};

/// Reads it from the kernel; `state` is what the agent has left.
pub(super) async fn collect(args: &Args, state: Option<State>) -> anyhow::Result<Status> {
    let net = Netlink::open()?;
    let instances = if bpf::mounted() {
        Instance::all()?
    } else {
        Vec::new()
    };
    let wanted = state.as_ref().map(State::overlay);
    let instance = instances
        .iter()
        .find(|instance| wanted.is_none_or(|wanted| wanted == instance.overlay()));
    let overlay = wanted.or_else(|| instance.map(Instance::overlay));
    let tunnelled = state.as_ref().is_none_or(State::is_tunnelled);
    let device = match overlay.filter(|_| tunnelled) {
        Some(overlay) => {
            let name = overlay.device();
            let device = net.device(&name, overlay.family).await?;
            device.map(|device| (name, device))
        }
        None => None,
    };
    let mut problems = state
        .as_ref()
        .map(|state| state.problems.clone())
        .unwrap_or_default();
    let totals = match instance.map(Instance::totals) {
        Some(Ok(totals)) => Some(totals),
        // An overlay without eBPF has no maps: what is there of them is of a trial.
        Some(Err(error)) if uses_bpf(state.as_ref()) => {
            problems.push(format!("read the counters: {}", chain(&error)));
            None
        }
        Some(Err(_)) | None => None,
    };
    let counters = totals.as_ref().map(counters);
    let pods = instance
        .and_then(|instance| instance.pods().ok())
        .map_or(0, |pods| pods.len());
    let fast_path = state
        .as_ref()
        .and_then(|state| state.fast_path.as_ref())
        .map(|fast| fast_path(fast, pods, totals.as_ref()));
    let running = state.as_ref().is_some_and(State::is_running);
    let fast_problems = state.iter().filter_map(|state| state.fast_path.as_ref());
    problems.extend(fast_problems.flat_map(|fast| fast.problems.iter().cloned()));
    if state.is_none() {
        problems.push(format!(
            "no agent has run here: {} does not exist; start flannel-agent, or give --subnet-file",
            State::path(&args.subnet_file).display()
        ));
    } else if !running {
        problems.push(NOT_RUNNING.into());
        if uses_bpf(state.as_ref()) && instance.is_some_and(|instance| !instance.is_kept()) {
            problems.push(format!(
                "no agent has kept the eBPF maps for {TRUST} seconds: the kernel's device carries the traffic"
            ));
        }
    }
    let path = match (&state, instance) {
        (Some(state), instance) => {
            let attached = match instance {
                Some(instance) => {
                    attached(state, instance, device.as_ref().map(|(_, d)| d), &net).await?
                }
                None => Vec::new(),
            };
            let missing = |hook: &Hook| !attached.contains(&hook.as_str());
            if state.base_hooks().iter().any(missing) {
                problems.push(
                    "an eBPF program is not attached: the kernel carries that direction".into(),
                );
            }
            Some(Path {
                mode: state.datapath.mode,
                reason: state.datapath.reason.clone(),
                attach: state.datapath.attach.clone(),
                attached,
                xdp: state.datapath.xdp.as_ref().map(|xdp| XdpInfo {
                    wanted: xdp.wanted,
                    standing: xdp.standing,
                    attached: instance
                        .is_some_and(|instance| instance.is_xdp_attached(state.uplink_index)),
                    reason: xdp.reason.clone(),
                }),
            })
        }
        (None, _) => None,
    };
    let found = features::left(&args.subnet_file).unwrap_or_default();
    let strips = path
        .as_ref()
        .and_then(|path| path.xdp.as_ref())
        .is_some_and(|xdp| xdp.attached)
        && totals.as_ref().is_some_and(|totals| totals.xdp.packets > 0);
    let standing = state
        .as_ref()
        .map(|state| Standing::from(state.ladder(&found, strips)));
    let is_up = match (&device, &state) {
        (Some((name, device)), _) => {
            if !device.up {
                problems.push(format!("{name} is down"));
            }
            device.up
        }
        (None, Some(state)) if !tunnelled => {
            let there = net.plain_device(&state.uplink).await?;
            let up = there.is_some_and(|there| there.up);
            if !up {
                problems.push(format!("the uplink {} is down or gone", state.uplink));
            }
            up
        }
        (None, _) => {
            problems.push("there is no tunnel device".into());
            false
        }
    };
    let routes = match &state {
        Some(state) => routes(&net, state).await?,
        None => None,
    };
    Ok(Status {
        ok: is_up && path.is_some(),
        agent: Agent {
            running,
            pid: state.as_ref().filter(|_| running).map(|state| state.pid),
            version: state.as_ref().map(|state| state.version.clone()),
        },
        backend: state.as_ref().map(State::backend),
        datapath: path,
        standing,
        features: findings::rows(&found),
        lease: state.as_ref().map(|state| LeaseInfo {
            subnet: state.subnet.map(|subnet| subnet.to_string()),
            network: state.network.to_string(),
            public_ip: state.public_ip.to_string(),
            uplink: state.uplink.clone(),
            mtu: state.mtu,
            store: state.store.clone(),
            store_connected: running && state.store_connected,
        }),
        device: device.map(|(name, device)| describe(name, &device)),
        routes,
        wireguard: None,
        counters,
        fast_path,
        problems,
        ipv6: None,
    })
}

/// Whether eBPF is to carry packets; so it is taken to be where nobody says.
fn uses_bpf(state: Option<&State>) -> bool {
    state.is_none_or(|state| state.datapath.mode == Mode::Bpf)
}

/// The peers that are routed to; `None` where there is a tunnel and it is the way to all of them.
async fn routes(net: &Netlink, state: &State) -> anyhow::Result<Option<RoutesInfo>> {
    let found = net.link_routes(state.network, None).await?;
    let peers = found.values().filter(|route| route.ours).count();
    Ok((peers > 0 || !state.is_tunnelled()).then(|| RoutesInfo {
        interface: state.uplink.clone(),
        peers,
    }))
}

async fn attached(
    state: &State,
    instance: &Instance,
    device: Option<&Device>,
    net: &Netlink,
) -> anyhow::Result<Vec<&'static str>> {
    let mut names = Vec::new();
    for (hook, index) in [
        (Hook::ToOverlay, device.map(|d| d.index)),
        (Hook::FromWire, Some(state.uplink_index)),
        (Hook::ToLink, Some(state.uplink_index)),
    ] {
        let Some(index) = index else { continue };
        let there = if state.datapath.attach.as_deref() == Some(AttachMode::Clsact.as_str()) {
            net.filter_program(hook, index, state.overlay())
                .await?
                .is_some()
        } else {
            instance.is_attached(hook, index)
        };
        if there {
            names.push(hook.as_str());
        }
    }
    Ok(names)
}

fn describe(name: String, device: &Device) -> DeviceInfo {
    DeviceInfo {
        name,
        kind: match device.kind {
            ObservedKind::Vxlan { .. } => "vxlan",
            ObservedKind::Veth { .. } => "veth",
            ObservedKind::Other(_) => "other",
        },
        index: device.index.get(),
        mac: device.mac.to_string(),
        mtu: device.mtu,
        up: device.up,
        peers: device.routes.len(),
    }
}

fn fast_path(fast: &FastPath, pods: usize, totals: Option<&Totals>) -> FastPathInfo {
    let none = Totals::default();
    let totals = totals.unwrap_or(&none);
    FastPathInfo {
        wanted: fast.wanted,
        mode: fast.mode,
        reason: fast.reason.clone(),
        pods,
        excluded: fast.excluded.clone(),
        counters: FastCounters {
            encap: totals.fast_encap.into(),
            decap: totals.fast_decap.into(),
            local: totals.fast_local.into(),
            routed_out: totals.routed_out.into(),
            routed_in: totals.routed_in.into(),
            tagged: totals.gate_tagged,
            confirmed: totals.gate_confirmed,
            refuted: totals.gate_refuted,
            admitted: totals.gate_admitted,
        },
        sysctls: fast.sysctls.clone(),
    }
}

fn sum(one: Counter, other: Counter) -> Counter {
    Counter {
        packets: one.packets.wrapping_add(other.packets),
        bytes: one.bytes.wrapping_add(other.bytes),
    }
}

fn counters(totals: &Totals) -> Counters {
    Counters {
        encap: sum(totals.encap, totals.fast_encap).into(),
        decap: sum(totals.decap, totals.fast_decap).into(),
        xdp: totals.xdp.into(),
        not_carried: totals
            .reasons
            .iter()
            .map(|(direction, reason, packets)| NotCarried {
                direction: direction.as_str(),
                reason: reason.as_str(),
                packets: *packets,
            })
            .collect(),
    }
}
