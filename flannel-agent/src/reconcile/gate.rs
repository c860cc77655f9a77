//! How the gate is to stand, and which pods it serves: what the loop adds to the desired state from the decision and from what it
//! has learnt.

use std::{collections::BTreeSet, net::IpAddr, time::Duration};

use flannel_core::{
    addr::{IfIndex, VtepMac},
    plan::{Desired, Gate, GateMode, Hook, Observed},
    pods::{PodSources, PodTable},
};

use crate::{fastpath::FastPathWatch, state::FastPath};

/// How long a flow may bypass the stack on one look: well below the shortest timeout of connection tracking, which is 30 seconds.
const LEASE_MS: u32 = 5_000;
/// Generations begin at the time since boot in these units, so that they exceed those of every earlier run that did not make ten a second
/// all its life.
const GENERATION: Duration = Duration::from_millis(100);

/// What flows were judged under: when it changes they must prove themselves again.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Basis {
    is_off: bool,
    fingerprint: u64,
    uplink: IfIndex,
    tunnel: Option<(IfIndex, VtepMac)>,
    /// How often a hook was found missing that had been in place.
    losses: u32,
}

/// The decision that stands, and the pods.
#[derive(Debug)]
pub(crate) struct Gatekeeper {
    watch: FastPathWatch,
    epoch: u32,
    basis: Option<Basis>,
    table: Option<PodTable>,
    /// What was attached at the last look.
    attached: BTreeSet<(Hook, IfIndex)>,
    losses: u32,
}

impl Gatekeeper {
    /// `before` is the epoch of the configuration that is in place.
    pub(crate) const fn new(watch: FastPathWatch, before: u32) -> Self {
        Self {
            watch,
            epoch: before.wrapping_add(1),
            basis: None,
            table: None,
            attached: BTreeSet::new(),
            losses: 0,
        }
    }

    /// Until there is another decision; for ever if there will be none.
    pub(crate) async fn changed(&mut self) {
        if self.watch.decisions.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// How the gate stands, for `status`.
    pub(crate) fn report(&self) -> FastPath {
        self.watch.reports.borrow().clone()
    }

    /// Sets the gate as it was decided.
    pub(crate) fn set(&mut self, desired: &mut Desired, seen: &Observed) {
        self.count_losses(seen);
        let Some(settings) = &mut desired.bpf else {
            return;
        };
        let decision = self.watch.decisions.borrow_and_update();
        let mode = decision.mode;
        let basis = Basis {
            is_off: mode == GateMode::Off,
            fingerprint: decision.fingerprint,
            uplink: settings.uplink,
            tunnel: seen
                .device
                .as_ref()
                .map(|device| (device.index, device.mac)),
            losses: self.losses,
        };
        drop(decision);
        if self.basis.as_ref().is_some_and(|before| *before != basis) {
            self.epoch = self.epoch.wrapping_add(1);
        }
        self.basis = Some(basis);
        settings.gate = Gate {
            mode,
            epoch: self.epoch,
            lease_ms: LEASE_MS,
        };
    }

    /// A hook that was detached has missed packets: the end of a connection, or a translated packet with its ports. What is known
    /// must be proven again. A pod's hooks that went with the pod have missed nothing.
    fn count_losses(&mut self, seen: &Observed) {
        let Some(bpf) = &seen.bpf else { return };
        let base = bpf.attached.iter();
        let base = base.map(|(hook, there)| (*hook, there.ifindex, there.current));
        // A pin outlives what it held: such a hook is listed, and not current.
        let on_pods = bpf.pod_hooks.iter().flat_map(|(ifindex, hooks)| {
            hooks
                .iter()
                .map(|(hook, current)| (*hook, *ifindex, *current))
        });
        let now: BTreeSet<(Hook, IfIndex)> = base
            .chain(on_pods)
            .filter_map(|(hook, ifindex, current)| current.then_some((hook, ifindex)))
            .collect();
        let lost = |(hook, ifindex): &(Hook, IfIndex)| {
            !hook.is_per_pod()
                || self
                    .table
                    .as_ref()
                    .is_some_and(|table| table.pods().values().any(|pod| pod.ifindex == *ifindex))
        };
        if self.attached.difference(&now).any(lost) {
            self.losses = self.losses.wrapping_add(1);
        }
        self.attached = now;
    }

    /// Learns the pods from what was read; `None` while it was not. Those behind `leaving` are not learnt.
    pub(crate) fn learn(
        &mut self,
        desired: &mut Desired,
        seen: &Observed,
        sources: Option<&PodSources>,
        leaving: &BTreeSet<IfIndex>,
    ) {
        let Some(sources) = sources else {
            // Nobody reads them while the gate is off. One that comes back later may be another.
            if let Some(table) = &mut self.table {
                table.clear();
            }
            desired.pods = None;
            return;
        };
        let table = self.table.get_or_insert_with(|| {
            let there = seen.bpf.iter().flat_map(|bpf| &bpf.pods);
            PodTable::adopt(
                there.filter_map(|(address, pod)| Some((*address, (*pod)?))),
                since_boot(),
            )
        });
        let veths = sources.ports.iter().filter(|(_, port)| port.is_veth);
        let veths: BTreeSet<IfIndex> = veths.map(|(index, _)| *index).collect();
        self.watch.pods.send_if_modified(|told| {
            let changed = *told != veths;
            *told = veths;
            changed
        });
        let decision = self.watch.decisions.borrow();
        let excluded: BTreeSet<IfIndex> = sources
            .ports
            .keys()
            .filter(|port| decision.holds_back(**port) || leaving.contains(port))
            .copied()
            .collect();
        drop(decision);
        let pods = table.learn(sources, &excluded);
        if desired.pods.as_ref() != Some(pods) {
            desired.pods = Some(pods.clone());
        }
    }

    /// Why a pod veth stays with the stack for good, if it does.
    pub(crate) fn excludes(&self, veth: IfIndex) -> Option<String> {
        self.watch.decisions.borrow().excluded.get(&veth).cloned()
    }

    /// Forgets the pods behind an interface that is gone, and returns their addresses.
    pub(crate) fn forget(&mut self, desired: &mut Desired, ifindex: IfIndex) -> Vec<IpAddr> {
        let gone = self
            .table
            .as_mut()
            .map(|table| table.forget(ifindex))
            .unwrap_or_default();
        if let Some(pods) = &mut desired.pods {
            for address in &gone {
                pods.remove(address);
            }
        }
        gone
    }
}

/// Time since boot in units of [`GENERATION`]: pinned maps do not outlive it.
fn since_boot() -> u32 {
    let uptime = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME)
        .map_or(Duration::ZERO, Duration::from);
    (uptime.as_millis() / GENERATION.as_millis()) as u32
}
