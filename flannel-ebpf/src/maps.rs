//! The maps, pinned by the agent under these names.

use aya_ebpf::{
    macros::map,
    maps::{Array, HashMap, LruHashMap, PerCpuArray},
};
use flannel_common::{
    Config, Counter, CounterId, Direction, DropReason, NodeId, NodeRecord, PodRecord,
    counter::REASON_ENTRIES,
    flow::{Flow, FlowKey, LastSighting, NatKey, Sighting},
    reason_index,
};

/// One entry: how this node is set up.
#[map(name = "config")]
static CONFIG: Array<Config> = Array::with_max_entries(1, 0);

/// Subnet number inside the network to node id. The agent sizes it to the network.
#[map(name = "subnets")]
static SUBNETS: Array<NodeId> = Array::with_max_entries(256, 0);

/// Node id to prebuilt header. The agent sizes it; entry 0 is never used.
#[map(name = "nodes")]
static NODES: Array<NodeRecord> = Array::with_max_entries(256, 0);

/// Packets carried, by [`CounterId`].
#[map(name = "counters")]
static COUNTERS: PerCpuArray<Counter> = PerCpuArray::with_max_entries(CounterId::COUNT, 0);

/// Packets not carried, by [`reason_index`].
#[map(name = "reasons")]
static REASONS: PerCpuArray<u64> = PerCpuArray::with_max_entries(REASON_ENTRIES, 0);

/// Address to pod, for the pods of this node that packets may be handed to directly.
#[map(name = "pods")]
static PODS: HashMap<[u8; 4], PodRecord> = HashMap::with_max_entries(4096, 0);

/// What the stack itself was seen to pass. The agent sizes it.
#[map(name = "flows")]
static FLOWS: LruHashMap<FlowKey, Flow> = LruHashMap::with_max_entries(1 << 18, 0);

/// Pairs of pods between which the stack also translates.
#[map(name = "nattuples")]
static NAT_TUPLES: LruHashMap<NatKey, u32> = LruHashMap::with_max_entries(1 << 14, 0);

/// Packets seen before the stack, by the number that they carry. The agent sizes it: `1 << ring_shift` for every CPU.
#[map(name = "ring")]
static RING: Array<Sighting> = Array::with_max_entries(256, 0);

/// The latest packet seen before the stack.
#[map(name = "last")]
static LAST: PerCpuArray<LastSighting> = PerCpuArray::with_max_entries(1, 0);

#[inline(always)]
pub(crate) fn config() -> Option<&'static Config> {
    CONFIG.get(0)
}

#[inline(always)]
pub(crate) fn node_of(subnet: u32) -> Option<&'static NodeRecord> {
    match SUBNETS.get(subnet) {
        None | Some(0) => None,
        Some(id) => NODES.get(*id),
    }
}

#[inline(always)]
pub(crate) fn count(id: CounterId, bytes: u32) {
    if let Some(counter) = COUNTERS.get_ptr_mut(id as u32) {
        // SAFETY: a per-CPU entry, and programs on one CPU do not interrupt each other at this hook's level.
        unsafe {
            (*counter).packets += 1;
            (*counter).bytes += u64::from(bytes);
        }
    }
}

#[inline(always)]
pub(crate) fn count_reason(direction: Direction, reason: DropReason) {
    if let Some(counter) = REASONS.get_ptr_mut(reason_index(direction, reason)) {
        // SAFETY: as in `count`.
        unsafe { *counter += 1 };
    }
}

pub(crate) fn touch(_ctx: &aya_ebpf::programs::TcContext) {
    let key = FlowKey::default();
    unsafe {
        let _ = PODS.get(&[0; 4]);
        let _ = FLOWS.get(&key);
        let _ = NAT_TUPLES.get(&key.pair(flannel_common::flow::Way::Out));
    }
    let _ = RING.get(0);
    let _ = LAST.get_ptr(0);
}
