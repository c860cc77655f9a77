//! `flannel-agent status`: what carries this node's traffic, read from the kernel and the pinned maps.

mod print;

use std::collections::BTreeMap;

use anyhow::Context as _;
use flannel_common::{Counter, map::TRUST};
use flannel_core::{
    fastpath::Choice,
    plan::{Device, GateMode, Hook, ObservedKind},
    xdp,
};
use serde::Serialize;

use super::{
    Args, Output,
    features::{self as findings, Row, Standing},
    table,
};
use crate::{
    dataplane::{
        bpf::{self, AttachMode, Instance, Totals},
        netlink::Netlink,
    },
    features,
    state::{Excluded, FastPath, Mode, State},
};

#[derive(Debug, Serialize)]
struct Status {
    /// Whether the data path is in place.
    ok: bool,
    agent: Agent,
    datapath: Option<Path>,
    /// The way that packets are carried, and why no other; `None` before an agent has run.
    standing: Option<Standing>,
    /// What the agent has found out about kernel and permissions; empty before an agent has.
    features: Vec<Row>,
    #[serde(skip_serializing_if = "Option::is_none")]
    lease: Option<LeaseInfo>,
    device: Option<DeviceInfo>,
    counters: Option<Counters>,
    fast_path: Option<FastPathInfo>,
    problems: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Agent {
    running: bool,
    pid: Option<u32>,
    version: Option<String>,
}

#[derive(Debug, Serialize)]
struct Path {
    mode: Mode,
    reason: String,
    attach: Option<String>,
    attached: Vec<&'static str>,
    xdp: Option<XdpInfo>,
}

/// How native XDP stands.
#[derive(Debug, Serialize)]
struct XdpInfo {
    wanted: xdp::Choice,
    standing: xdp::Standing,
    attached: bool,
    reason: String,
}

#[derive(Debug, Serialize)]
struct LeaseInfo {
    subnet: Option<String>,
    network: String,
    public_ip: String,
    uplink: String,
    mtu: u32,
    store: String,
    store_connected: bool,
}

#[derive(Debug, Serialize)]
struct DeviceInfo {
    name: String,
    kind: &'static str,
    index: u32,
    mac: String,
    mtu: u32,
    up: bool,
    peers: usize,
}

#[derive(Debug, Serialize)]
struct Counters {
    encap: Count,
    decap: Count,
    /// Those of `decap` that native XDP has stripped.
    xdp: Count,
    /// Packets left to the kernel's device, or dropped where there is none, by direction and reason.
    not_carried: Vec<NotCarried>,
}

#[derive(Debug, Serialize)]
struct Count {
    packets: u64,
    bytes: u64,
}

#[derive(Debug, Serialize)]
struct NotCarried {
    direction: &'static str,
    reason: &'static str,
    packets: u64,
}

/// How the flow gate stands.
#[derive(Debug, Serialize)]
struct FastPathInfo {
    wanted: Choice,
    mode: GateMode,
    reason: String,
    /// Pods that packets are handed to directly.
    pods: usize,
    excluded: Vec<Excluded>,
    counters: FastCounters,
    sysctls: BTreeMap<String, Option<u32>>,
}

/// Packets, those of the gate without bytes.
#[derive(Debug, Serialize)]
struct FastCounters {
    encap: Count,
    decap: Count,
    local: Count,
    tagged: u64,
    confirmed: u64,
    refuted: u64,
    admitted: u64,
}

impl From<Counter> for Count {
    fn from(counter: Counter) -> Self {
        Self {
            packets: counter.packets,
            bytes: counter.bytes,
        }
    }
}

/// Prints the status. False when there is no working data path.
pub(super) async fn run(args: &Args, output: Output, features: bool) -> anyhow::Result<bool> {
    let status = collect(args).await?;
    match output {
        Output::Json => table::line(&serde_json::to_string_pretty(&status)?),
        Output::Table => {
            print::status(&status);
            if features {
                findings::print(&status.features);
            }
        }
    }
    Ok(status.ok)
}

async fn collect(args: &Args) -> anyhow::Result<Status> {
    let state = State::read(&args.subnet_file)
        .with_context(|| format!("read {}", State::path(&args.subnet_file).display()))?;
    let net = Netlink::open()?;
    let instances = if bpf::mounted() {
        Instance::all()?
    } else {
        Vec::new()
    };
    let wanted = state.as_ref().map(|state| state.vni);
    let instance = instances
        .iter()
        .find(|(vni, _)| wanted.is_none_or(|wanted| wanted == *vni));
    let name = state
        .as_ref()
        .map(|state| state.device.clone())
        .or_else(|| instance.map(|(vni, _)| flannel_core::mark::device_name(*vni)));
    let device = match &name {
        Some(name) => net.device(name).await?.map(|device| (name.clone(), device)),
        None => None,
    };
    let totals = match instance {
        Some((_, instance)) => Some(instance.totals().context("read the counters")?),
        None => None,
    };
    let counters = totals.as_ref().map(counters);
    let pods = instance
        .and_then(|(_, instance)| instance.pods().ok())
        .map_or(0, |pods| pods.len());
    let fast_path = state
        .as_ref()
        .and_then(|state| state.fast_path.as_ref())
        .map(|fast| fast_path(fast, pods, totals.as_ref()));
    let running = state.as_ref().is_some_and(State::is_running);
    let mut problems = state
        .as_ref()
        .map(|state| state.problems.clone())
        .unwrap_or_default();
    let fast_problems = state.iter().filter_map(|state| state.fast_path.as_ref());
    problems.extend(fast_problems.flat_map(|fast| fast.problems.iter().cloned()));
    if state.is_none() {
        problems.push(format!(
            "no agent has run here: {} does not exist; start flannel-agent, or give --subnet-file",
            State::path(&args.subnet_file).display()
        ));
    } else if !running {
        problems.push(
            "the agent is not running: traffic goes on, changes in the cluster are not followed"
                .into(),
        );
        if instance.is_some_and(|(_, instance)| !instance.is_kept()) {
            problems.push(format!(
                "no agent has kept the eBPF maps for {TRUST} seconds: the kernel's device carries the traffic"
            ));
        }
    }
    let path = match (&state, instance) {
        (Some(state), instance) => {
            let attached = match instance {
                Some((_, instance)) => {
                    attached(state, instance, device.as_ref().map(|(_, d)| d), &net).await?
                }
                None => Vec::new(),
            };
            if state.datapath.mode == Mode::Bpf && attached.len() < Hook::BASE.len() {
                problems.push(
                    "an eBPF program is not attached: the kernel's device carries that direction"
                        .into(),
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
                        .is_some_and(|(_, instance)| instance.is_xdp_attached(state.uplink_index)),
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
    match &device {
        None => problems.push("there is no tunnel device".into()),
        Some((name, device)) if !device.up => problems.push(format!("{name} is down")),
        Some(_) => {}
    }
    Ok(Status {
        ok: device.as_ref().is_some_and(|(_, device)| device.up) && path.is_some(),
        agent: Agent {
            running,
            pid: state.as_ref().filter(|_| running).map(|state| state.pid),
            version: state.as_ref().map(|state| state.version.clone()),
        },
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
        counters,
        fast_path,
        problems,
    })
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
    ] {
        let Some(index) = index else { continue };
        let there = if state.datapath.attach.as_deref() == Some(AttachMode::Clsact.as_str()) {
            net.filter_program(hook, index).await?.is_some()
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
