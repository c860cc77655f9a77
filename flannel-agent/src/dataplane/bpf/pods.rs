//! The pods: their map, and the programs on their veths.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
};

use aya::maps::{HashMap, MapData, MapError};
use flannel_common::PodRecord;
use flannel_core::{addr::IfIndex, plan::Hook, pods::Pod};

use super::{AttachMode, Bpf, BpfError, error::errno, link};

/// The map `pods`.
pub(super) type PodMap = HashMap<MapData, [u8; 4], PodRecord>;

/// Entries of `pods` and what of ours is on pod veths, as [`flannel_core::plan::BpfState`] has them.
pub type PodState = (
    BTreeMap<Ipv4Addr, Option<Pod>>,
    BTreeMap<IfIndex, BTreeMap<Hook, bool>>,
);

impl Bpf {
    /// Writes an entry of `pods`.
    pub fn put_pod(&mut self, address: Ipv4Addr, pod: &Pod) -> Result<(), BpfError> {
        self.pods
            .insert(address.octets(), pod.encode(), 0)
            .map_err(|source| BpfError::pod("write", address, source))
    }

    /// Removes an entry of `pods`.
    pub fn del_pod(&mut self, address: Ipv4Addr) -> Result<(), BpfError> {
        match self.pods.remove(&address.octets()) {
            Ok(()) | Err(MapError::KeyNotFound) => Ok(()),
            Err(source) if errno(&source) == Some(libc::ENOENT) => Ok(()),
            Err(source) => Err(BpfError::pod("delete", address, source)),
        }
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
        let mut pods = BTreeMap::new();
        for entry in &self.pods {
            let (address, record) = entry.map_err(|source| BpfError::read("pods", 0, source))?;
            pods.insert(Ipv4Addr::from(address), Pod::decode(&record));
        }
        Ok((pods, found))
    }
}
