//! `flannel-agent cleanup`: the only thing that removes, and only what is marked ours (`flannel_core::mark`).

mod wireguard;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use anyhow::{Context as _, bail};
use flannel_core::{
    addr::{IfIndex, Vni},
    mark::{self, Overlay},
    plan::{Hook, ObservedKind},
};

use ipnet::IpNet;

use super::{Args, last_known_state, table};
use crate::{
    cni_socket,
    dataplane::{
        bpf::{self, Instance},
        netlink::Netlink,
    },
    features,
    masquerade::leftovers,
    state::{Bare, State},
};

/// What to remove.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scope {
    pub(super) dry_run: bool,
    /// A device that no trace of an agent names.
    pub(super) vni: Option<u32>,
    /// Programs and maps alone, so that the kernel's device carries the overlay from now on.
    pub(super) keep_device: bool,
    pub(super) force: bool,
}

/// Removes, or says what it would remove. False when something could not be removed.
pub(super) async fn run(args: &Args, scope: Scope) -> anyhow::Result<bool> {
    let Scope {
        dry_run,
        vni,
        keep_device,
        force,
    } = scope;
    let state = State::read(&args.subnet_file)
        .with_context(|| format!("read {}", State::path(&args.subnet_file).display()))?;
    let bare = Bare::read(&args.subnet_file).ok().flatten();
    let running = state.iter().filter(|state| state.is_running());
    let running = running.map(|state| state.pid).chain(
        bare.iter()
            .filter(|state| state.is_running())
            .map(|state| state.pid),
    );
    if let Some(pid) = running.into_iter().next()
        && !force
        && !dry_run
    {
        bail!(
            "an agent is running (pid {pid}) and would make it all again: stop it first, or give --force"
        );
    }
    let asked = vni
        .map(Vni::try_from)
        .transpose()
        .map_err(|error| anyhow::anyhow!("--vni: {error}"))?;
    let instances = if bpf::mounted() {
        Instance::all()?
    } else {
        Vec::new()
    };
    let second = State::read_second(&args.subnet_file).ok().flatten();
    let mut overlays: BTreeSet<Overlay> = instances.iter().map(Instance::overlay).collect();
    overlays.extend(state.iter().chain(&second).map(State::overlay));
    overlays.extend(
        asked
            .into_iter()
            .flat_map(|vni| [Overlay::v4(vni), Overlay::v6(vni)]),
    );
    let net = Netlink::open()?;
    let act = Act {
        dry_run,
        voice: Voice::Terminal,
    };
    let mut clean = true;
    let mut places = places(state.as_ref(), &instances);
    if keep_device {
        for overlay in &overlays {
            // Filters that are not on tcx links go with the device otherwise.
            let there = carries_alone(&net, *overlay).await?;
            places.extend(there.map(|index| (index, false)));
        }
        // With its qdisc a device loses what it sends at that moment.
        for ours in places.values_mut() {
            *ours = false;
        }
    }
    clean &= remove_programs(&net, &act, (&overlays, &instances), places).await?;
    for overlay in &overlays {
        clean &= remove_headroom(&net, &act, overlay.vni).await?;
        if !keep_device {
            clean &= remove_device(&net, &act, *overlay).await?;
        }
        clean &= remove_stand_in(&net, &act, *overlay).await?;
    }
    if !keep_device {
        let networks = state.iter().chain(&second).map(|state| state.network);
        clean &= remove_routes(&net, &act, networks.collect()).await?;
        clean &= wireguard::remove(&net, &act, args).await?;
    }
    if state.is_some() || bare.is_some() {
        clean &= remove_files(&act, &args.subnet_file, keep_device);
    }
    let socket = args.cni_socket();
    if !keep_device && cni_socket::is_stale(&socket) {
        clean &= act.on(&format!("file {}", socket.display()), || {
            cni_socket::remove(&socket)
        });
    }
    let nets: leftovers::Own = state
        .iter()
        .chain(&second)
        .map(|state| (state.family, (state.network, state.subnet)))
        .chain(bare.iter().flat_map(Bare::nets))
        .collect();
    // Where nothing says that we have been here, rules are those of another flannel.
    let rules = if (overlays.is_empty() && bare.is_none()) || keep_device {
        Vec::new()
    } else {
        let blackhole = state.as_ref().is_some_and(|state| state.blackhole)
            || bare.as_ref().is_some_and(|state| state.blackhole);
        leftovers::find(&nets, blackhole).await
    };
    for leftover in &rules {
        if act.announce(&leftover.what) {
            clean &= act.outcome(&leftover.what, leftover.remove(&nets).await);
        }
    }
    if overlays.is_empty() && bare.is_none() {
        table::line("nothing of ours found");
    }
    Ok(clean)
}

/// Removes what an earlier agent with a backend of its own on this node has left: it would go on taking packets out of the way that
/// they have now. `subnet.env` and the firewall's rules stay, which every backend has. False when something could not be removed.
pub(crate) async fn retire(net: &Netlink, subnet_file: &Path) -> anyhow::Result<bool> {
    let states = [
        (State::read(subnet_file), State::path(subnet_file)),
        (
            State::read_second(subnet_file),
            State::second_path(subnet_file),
        ),
    ];
    let instances = if bpf::mounted() {
        Instance::all()?
    } else {
        Vec::new()
    };
    let act = Act {
        dry_run: false,
        voice: Voice::Log,
    };
    let mut overlays: BTreeSet<Overlay> = instances.iter().map(Instance::overlay).collect();
    let mut places = places(None, &instances);
    let mut networks = BTreeSet::new();
    for (state, _) in &states {
        // One that cannot be read says nothing; the programs still say what is ours.
        if let Ok(Some(state)) = state {
            overlays.insert(state.overlay());
            places.entry(state.uplink_index).or_insert(false);
            networks.insert(state.network);
        }
    }
    let mut clean = remove_programs(net, &act, (&overlays, &instances), places).await?;
    for overlay in &overlays {
        clean &= remove_headroom(net, &act, overlay.vni).await?;
        clean &= remove_device(net, &act, *overlay).await?;
        clean &= remove_stand_in(net, &act, *overlay).await?;
    }
    clean &= remove_routes(net, &act, networks).await?;
    for (_, file) in states {
        if clean && file.exists() {
            clean &= act.on(&format!("file {}", file.display()), || {
                std::fs::remove_file(&file)
            });
        }
    }
    Ok(clean)
}

/// What the agents of this node have left beside `subnet.env`, and that unless the kernel's device is to go on.
fn remove_files(act: &Act, subnet_file: &Path, keep_device: bool) -> bool {
    let logs = subnet_file.parent().map(bpf::kept_logs).unwrap_or_default();
    let own = (!keep_device).then(|| subnet_file.to_owned());
    let beside = [
        State::path(subnet_file),
        State::second_path(subnet_file),
        last_known_state(subnet_file),
        features::cache_path(subnet_file),
    ];
    let files = own.into_iter().chain(logs).chain(beside);
    let mut clean = true;
    for file in files.chain(Bare::paths(subnet_file)) {
        if file.exists() {
            clean &= act.on(&format!("file {}", file.display()), || {
                std::fs::remove_file(&file)
            });
        }
    }
    clean
}

/// The routes to peers on the link: they bear our mark, and there is no device of ours with which they would go.
async fn remove_routes(
    net: &Netlink,
    act: &Act,
    networks: BTreeSet<IpNet>,
) -> anyhow::Result<bool> {
    let mut clean = true;
    for network in networks {
        let routes = net.link_routes(network, None).await?.into_iter();
        for (subnet, route) in routes.filter(|(_, route)| route.ours) {
            let what = format!("route {subnet} via {}", route.gateway);
            if act.announce(&what) {
                let gone = net.del_link_route(route.ifindex, subnet, route.gateway);
                clean &= act.outcome(&what, gone.await);
            }
        }
    }
    Ok(clean)
}

async fn remove_programs(
    net: &Netlink,
    act: &Act,
    (overlays, instances): (&BTreeSet<Overlay>, &[Instance]),
    places: BTreeMap<IfIndex, bool>,
) -> anyhow::Result<bool> {
    let mut clean = true;
    for instance in instances {
        clean &= act.on(
            &format!("eBPF programs and maps under {}", instance.dir().display()),
            || instance.remove(),
        );
    }
    for place in places {
        clean &= remove_filters(net, act, overlays, place).await?;
    }
    Ok(clean)
}

/// The interfaces on which filters of ours may be, but for the tunnel device, and whether we have made the qdisc that they hang on.
fn places(state: Option<&State>, instances: &[Instance]) -> BTreeMap<IfIndex, bool> {
    let mut places: BTreeMap<IfIndex, bool> = state
        .iter()
        .map(|state| (state.uplink_index, false))
        .collect();
    for instance in instances {
        let veths = instance.pod_hooks().into_iter();
        places.extend(veths.map(|(_, index)| (index, false)));
    }
    let noted = instances.iter().flat_map(Instance::noted_qdiscs);
    places.extend(noted.map(|index| (index, true)));
    places
}

async fn remove_filters(
    net: &Netlink,
    act: &Act,
    overlays: &BTreeSet<Overlay>,
    (index, qdisc_is_ours): (IfIndex, bool),
) -> anyhow::Result<bool> {
    let Some(name) = bpf::interface_name(index) else {
        // Gone, and everything on it.
        return Ok(true);
    };
    let mut clean = true;
    // What is ours bears the same mark whatever it runs.
    for overlay in overlays {
        for (side, hook) in [("ingress", Hook::FromWire), ("egress", Hook::ToPod)] {
            if net.filter_program(hook, index, *overlay).await?.is_some() {
                clean &= act.on(&format!("our tc filter at the {side} of {name}"), || {
                    bpf::delete_filter(hook, index, *overlay)
                });
            }
        }
    }
    if qdisc_is_ours && !net.has_other_filters(index).await? {
        let what = format!("clsact qdisc on {name}");
        clean &= !act.announce(&what) || act.outcome(&what, net.delete_clsact(index).await);
    }
    Ok(clean)
}

/// The tunnel device, which has to be able to carry the overlay without eBPF.
async fn carries_alone(net: &Netlink, overlay: Overlay) -> anyhow::Result<Option<IfIndex>> {
    let name = overlay.device();
    match net.device(&name, overlay.family).await? {
        Some(device) if matches!(device.kind, ObservedKind::Veth { .. }) => bail!(
            "--keep-device: {name} is not a vxlan device, only eBPF carries the overlay on this node: use cleanup without it"
        ),
        Some(device) => Ok(Some(device.index)),
        None => Ok(None),
    }
}

async fn remove_headroom(net: &Netlink, act: &Act, vni: Vni) -> anyhow::Result<bool> {
    let Some(there) = net.headroom(vni).await? else {
        return Ok(true);
    };
    let what = format!("device {}", mark::headroom_name(vni));
    Ok(!act.announce(&what) || act.outcome(&what, net.delete_device(there.index).await))
}

/// What an agent that ended in the midst of changing the device's kind has left.
async fn remove_stand_in(net: &Netlink, act: &Act, overlay: Overlay) -> anyhow::Result<bool> {
    let Some((name, far)) = mark::stand_in(&overlay.device()) else {
        return Ok(true);
    };
    let there = net.device(&name, overlay.family).await?;
    let ours = |kind: &ObservedKind| matches!(kind, ObservedKind::Veth { peer: Some(peer) } if *peer == far);
    let Some(device) = there.filter(|device| ours(&device.kind)) else {
        return Ok(true);
    };
    let what = format!("device {name} with its routes and neighbours");
    Ok(!act.announce(&what) || act.outcome(&what, net.delete_device(device.index).await))
}

async fn remove_device(net: &Netlink, act: &Act, overlay: Overlay) -> anyhow::Result<bool> {
    let name = overlay.device();
    let Some(device) = net.device(&name, overlay.family).await? else {
        return Ok(true);
    };
    let (kind, has_vni) = match &device.kind {
        ObservedKind::Vxlan { vni, .. } => (mark::KIND_VXLAN, Some(*vni)),
        ObservedKind::Veth { peer } if *peer == overlay.far_end().ok() => (mark::KIND_VETH, None),
        ObservedKind::Veth { .. } | ObservedKind::Other(_) => ("", None),
    };
    if !overlay.is_our_device(&name, kind, has_vni) {
        act.line(&format!("leave device {name}: it is not of our making"));
        return Ok(true);
    }
    let what = format!("device {name} with its routes, neighbours and forwarding entries");
    Ok(!act.announce(&what) || act.outcome(&what, net.delete_device(device.index).await))
}

struct Act {
    dry_run: bool,
    voice: Voice,
}

/// Who is told.
#[derive(Clone, Copy, Debug)]
enum Voice {
    /// Whoever called the subcommand.
    Terminal,
    /// Whoever reads the daemon's log.
    Log,
}

impl Act {
    /// Says what is about to happen. False if it must not.
    fn announce(&self, what: &str) -> bool {
        if self.dry_run {
            self.line(&format!("would remove {what}"));
        }
        !self.dry_run
    }

    fn outcome<E: std::error::Error>(&self, what: &str, outcome: Result<(), E>) -> bool {
        match outcome {
            Ok(()) => self.line(&format!("removed {what}")),
            Err(error) => {
                let text = format!("remove {what}: {}", crate::telemetry::chain(&error));
                match self.voice {
                    Voice::Terminal => table::complaint(&text),
                    Voice::Log => tracing::error!("{text}"),
                }
                return false;
            }
        }
        true
    }

    fn line(&self, text: &str) {
        match self.voice {
            Voice::Terminal => table::line(text),
            Voice::Log => tracing::info!("{text}"),
        }
    }

    fn on<E: std::error::Error>(&self, what: &str, work: impl FnOnce() -> Result<(), E>) -> bool {
        !self.announce(what) || self.outcome(what, work())
    }
}
