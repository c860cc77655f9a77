//! `flannel-agent cleanup`: the only thing that removes, and only what is marked ours (`flannel_core::mark`).

use std::collections::BTreeMap;

use anyhow::{Context as _, bail};
use flannel_core::{
    addr::{IfIndex, Vni},
    mark,
    plan::{Hook, ObservedKind},
};

use super::{Args, last_known_state, table};
use crate::{
    cni_socket,
    dataplane::{
        bpf::{self, Instance},
        netlink::Netlink,
    },
    features,
    masquerade::leftovers,
    state::State,
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
    if let Some(state) = state
        .as_ref()
        .filter(|state| state.is_running() && !force && !dry_run)
    {
        bail!(
            "an agent is running (pid {}) and would make it all again: stop it first, or give --force",
            state.pid
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
    let mut vnis: Vec<Vni> = instances.iter().map(|(vni, _)| *vni).collect();
    vnis.extend(state.as_ref().map(|state| state.vni));
    vnis.extend(asked);
    vnis.sort_unstable();
    vnis.dedup();
    let net = Netlink::open()?;
    let act = Act { dry_run };
    let mut clean = true;
    let mut places = places(state.as_ref(), &instances);
    if keep_device {
        for vni in &vnis {
            // Filters that are not on tcx links go with the device otherwise.
            places.extend(carries_alone(&net, *vni).await?.map(|index| (index, false)));
        }
        // With its qdisc a device loses what it sends at that moment.
        for ours in places.values_mut() {
            *ours = false;
        }
    }
    for (_, instance) in &instances {
        clean &= act.on(
            &format!("eBPF programs and maps under {}", instance.dir().display()),
            || instance.remove(),
        );
    }
    for (index, qdisc_is_ours) in places {
        clean &= remove_filter(&net, &act, index, qdisc_is_ours).await?;
    }
    for vni in &vnis {
        clean &= remove_headroom(&net, &act, *vni).await?;
        if !keep_device {
            clean &= remove_device(&net, &act, *vni).await?;
        }
        clean &= remove_stand_in(&net, &act, *vni).await?;
    }
    if let Some(state) = &state {
        let subnet_file = (!keep_device).then_some(&state.subnet_file);
        let dir = args.subnet_file.parent();
        let logs = dir.map(bpf::kept_logs).unwrap_or_default();
        for file in subnet_file.into_iter().chain(&logs).chain([
            &State::path(&args.subnet_file),
            &last_known_state(&args.subnet_file),
            &features::cache_path(&args.subnet_file),
        ]) {
            if file.exists() {
                clean &= act.on(&format!("file {}", file.display()), || {
                    std::fs::remove_file(file)
                });
            }
        }
    }
    let socket = args.cni_socket();
    if !keep_device && cni_socket::is_stale(&socket) {
        clean &= act.on(&format!("file {}", socket.display()), || {
            cni_socket::remove(&socket)
        });
    }
    let nets = state.as_ref().map(|state| (state.network, state.subnet));
    // Where nothing says that we have been here, rules are those of another flannel.
    let rules = if vnis.is_empty() || keep_device {
        Vec::new()
    } else {
        let blackhole = state.as_ref().is_some_and(|state| state.blackhole);
        leftovers::find(nets, blackhole).await
    };
    for leftover in &rules {
        if act.announce(&leftover.what) {
            clean &= Act::outcome(&leftover.what, leftover.remove(nets).await);
        }
    }
    if vnis.is_empty() {
        table::line("nothing of ours found");
    }
    Ok(clean)
}

/// The interfaces on which filters of ours may be, but for the tunnel device, and whether we have made the qdisc that they hang on.
fn places(state: Option<&State>, instances: &[(Vni, Instance)]) -> BTreeMap<IfIndex, bool> {
    let mut places: BTreeMap<IfIndex, bool> = state
        .iter()
        .map(|state| (state.uplink_index, false))
        .collect();
    for (_, instance) in instances {
        let veths = instance.pod_hooks().into_iter();
        places.extend(veths.map(|(_, index)| (index, false)));
    }
    let noted = instances
        .iter()
        .flat_map(|(_, instance)| instance.noted_qdiscs());
    places.extend(noted.map(|index| (index, true)));
    places
}

async fn remove_filter(
    net: &Netlink,
    act: &Act,
    index: IfIndex,
    qdisc_is_ours: bool,
) -> anyhow::Result<bool> {
    let Some(name) = bpf::interface_name(index) else {
        // Gone, and everything on it.
        return Ok(true);
    };
    let mut clean = true;
    // What is ours bears the same mark whatever it runs.
    for (side, hook) in [("ingress", Hook::FromWire), ("egress", Hook::ToPod)] {
        if net.filter_program(hook, index).await?.is_some() {
            clean &= act.on(&format!("our tc filter at the {side} of {name}"), || {
                bpf::delete_filter(hook, index)
            });
        }
    }
    if qdisc_is_ours && !net.has_other_filters(index).await? {
        let what = format!("clsact qdisc on {name}");
        clean &= !act.announce(&what) || Act::outcome(&what, net.delete_clsact(index).await);
    }
    Ok(clean)
}

/// The tunnel device, which has to be able to carry the overlay without eBPF.
async fn carries_alone(net: &Netlink, vni: Vni) -> anyhow::Result<Option<IfIndex>> {
    let name = mark::device_name(vni);
    match net.device(&name).await? {
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
    Ok(!act.announce(&what) || Act::outcome(&what, net.delete_device(there.index).await))
}

/// What an agent that ended in the midst of changing the device's kind has left.
async fn remove_stand_in(net: &Netlink, act: &Act, vni: Vni) -> anyhow::Result<bool> {
    let Some((name, far)) = mark::stand_in(&mark::device_name(vni)) else {
        return Ok(true);
    };
    let there = net.device(&name).await?;
    let ours = |kind: &ObservedKind| matches!(kind, ObservedKind::Veth { peer: Some(peer) } if *peer == far);
    let Some(device) = there.filter(|device| ours(&device.kind)) else {
        return Ok(true);
    };
    let what = format!("device {name} with its routes and neighbours");
    Ok(!act.announce(&what) || Act::outcome(&what, net.delete_device(device.index).await))
}

async fn remove_device(net: &Netlink, act: &Act, vni: Vni) -> anyhow::Result<bool> {
    let name = mark::device_name(vni);
    let Some(device) = net.device(&name).await? else {
        return Ok(true);
    };
    let (kind, has_vni) = match &device.kind {
        ObservedKind::Vxlan { vni, .. } => (mark::KIND_VXLAN, Some(*vni)),
        ObservedKind::Veth { peer } if *peer == mark::peer_device_name(vni).ok() => {
            (mark::KIND_VETH, None)
        }
        ObservedKind::Veth { .. } | ObservedKind::Other(_) => ("", None),
    };
    if !mark::is_our_device(&name, kind, has_vni, vni) {
        table::line(&format!("leave device {name}: it is not of our making"));
        return Ok(true);
    }
    let what = format!("device {name} with its routes, neighbours and forwarding entries");
    Ok(!act.announce(&what) || Act::outcome(&what, net.delete_device(device.index).await))
}

struct Act {
    dry_run: bool,
}

impl Act {
    /// Says what is about to happen. False if it must not.
    fn announce(&self, what: &str) -> bool {
        if self.dry_run {
            table::line(&format!("would remove {what}"));
        }
        !self.dry_run
    }

    fn outcome<E: std::error::Error>(what: &str, outcome: Result<(), E>) -> bool {
        match outcome {
            Ok(()) => table::line(&format!("removed {what}")),
            Err(error) => {
                table::complaint(&format!(
                    "remove {what}: {}",
                    crate::telemetry::chain(&error)
                ));
                return false;
            }
        }
        true
    }

    fn on<E: std::error::Error>(&self, what: &str, work: impl FnOnce() -> Result<(), E>) -> bool {
        !self.announce(what) || Self::outcome(what, work())
    }
}
