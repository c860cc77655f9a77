//! The pods: their map, and the programs on their veths.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use flannel_core::{addr::IfIndex, plan::Hook, pods::Pod};

use super::{AttachMode, Bpf, BpfError, link};

/// Entries of `pods` and what of ours is on pod veths, as [`flannel_core::plan::BpfState`] has them.
pub type PodState = (
    BTreeMap<IpAddr, Option<Pod>>,
    BTreeMap<IfIndex, BTreeMap<Hook, bool>>,
);

impl Bpf {
    /// Writes an entry of `pods`.
    pub fn put_pod(&mut self, address: IpAddr, pod: &Pod) -> Result<(), BpfError> {
        self.tables.put_pod(address, pod)
    }

    /// Removes an entry of `pods`.
    pub fn del_pod(&mut self, address: IpAddr) -> Result<(), BpfError> {
        self.tables.del_pod(address)
    }

    /// The hooks of pod veths at which something of ours may be.
    pub fn pod_hooks(&self) -> Vec<(Hook, IfIndex)> {
        self.instance.pod_hooks()
    }

    /// Reads the pods. `hooks` are those of [`Bpf::pod_hooks`], each with the program that our clsact filter runs there.
    pub fn observe_pods(
        &mut self,
        hooks: &[(Hook, IfIndex, Option<u32>)],
    ) -> Result<PodState, BpfError> {
        let mut own = BTreeMap::new();
        let used: BTreeSet<Hook> = hooks.iter().map(|(hook, ..)| *hook).collect();
        for hook in used {
            // One that this kernel would not load is on no veth either.
            own.insert(hook, self.program_id(hook).ok());
        }
        let adoptable = self.maps_are_pinned();
        let mut found: BTreeMap<IfIndex, BTreeMap<Hook, bool>> = BTreeMap::new();
        for (hook, ifindex, filter) in hooks {
            let runs = match self.attach {
                AttachMode::Tcx => link::pinned(&self.instance.link(*hook, *ifindex))
                    .filter(|link| link.ifindex == Some(*ifindex))
                    .map(|link| link.program),
                AttachMode::Clsact => *filter,
            };
            let current = adoptable && runs.is_some() && own.get(hook) == Some(&runs);
            found.entry(*ifindex).or_default().insert(*hook, current);
        }
        Ok((self.tables.pods()?, found))
    }
}
