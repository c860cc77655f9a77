//! The maps, pinned by the agent under these names.

use aya_ebpf::{
    macros::map,
    maps::{Array, HashMap, LruHashMap, PerCpuArray},
};
use flannel_common::{
    Counter, CounterId, Direction, DropReason, NodeId, PodRecord,
    counter::REASON_ENTRIES,
    flow::{self, Flow},
    reason_index,
};

use crate::family::{Address, Config, NodeRecord};

pub(crate) type FlowKey = flow::FlowKey<Address>;
pub(crate) type NatKey = flow::NatKey<Address>;
pub(crate) type Sighting = flow::Sighting<Address>;
type LastSighting = flow::LastSighting<Address>;

/// One entry: how this node is set up.
#[map(name = "config")]
static CONFIG: Array<Config> = Array::with_max_entries(1, 0);

/// One entry: the time since boot, in nanoseconds, until which the other maps count as kept; 0 is for ever.
#[map(name = "alive")]
static ALIVE: Array<u64> = Array::with_max_entries(1, 0);

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
static PODS: HashMap<Address, PodRecord> = HashMap::with_max_entries(4096, 0);

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

/// Whether somebody keeps the maps at the time `now`. Otherwise what they say may be of the past, while the kernel's own tables may be kept
/// by another program: by flanneld, after a node was handed back.
#[inline(always)]
pub(crate) fn are_kept(now: u64) -> bool {
    ALIVE
        .get(0)
        .is_some_and(|until| *until == 0 || now <= *until)
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

#[inline(always)]
pub(crate) fn pod(address: Address) -> Option<&'static PodRecord> {
    // SAFETY: the record is only read. One that is replaced meanwhile stays whole until the program has ended (RCU).
    unsafe { PODS.get(address) }
}

#[inline(always)]
pub(crate) fn flow(key: &FlowKey) -> Option<&'static mut Flow> {
    // SAFETY: fields are single words that programs on other CPUs may store to as well; any order of stores is a valid history.
    FLOWS.get_ptr_mut(key).map(|flow| unsafe { &mut *flow })
}

#[inline(always)]
pub(crate) fn put_flow(key: &FlowKey, flow: &Flow) -> bool {
    FLOWS.insert(key, flow, 0).is_ok()
}

#[inline(always)]
pub(crate) fn remove_flow(key: &FlowKey) {
    // Not there is as good.
    let _absent = FLOWS.remove(key);
}

#[inline(always)]
pub(crate) fn is_translated(pair: &NatKey) -> bool {
    NAT_TUPLES.get_ptr(pair).is_some()
}

#[inline(always)]
pub(crate) fn put_translated(pair: &NatKey) {
    // A full table forgets the oldest; a failure means that the flow is judged without it.
    let _full = NAT_TUPLES.insert(pair, 1, 0);
}

#[inline(always)]
fn last() -> Option<&'static mut LastSighting> {
    // SAFETY: as in `count`.
    LAST.get_ptr_mut(0).map(|last| unsafe { &mut *last })
}

/// Keeps the latest sighting of this CPU and gives its number.
#[inline(always)]
pub(crate) fn remember(sighting: &Sighting) -> Option<u32> {
    let last = last()?;
    last.sighting = *sighting;
    last.count = last.count.wrapping_add(1);
    Some(last.count)
}

/// The latest packet of this CPU was none to be known again.
#[inline(always)]
pub(crate) fn forget() {
    if let Some(last) = last() {
        last.sighting.way = 0;
    }
}

/// Whether that is the latest sighting of this CPU; it counts once.
#[inline(always)]
pub(crate) fn last_is(wanted: &Sighting) -> bool {
    let Some(last) = last() else { return false };
    let same = last.sighting == *wanted;
    last.sighting.way = 0;
    same
}

#[inline(always)]
pub(crate) fn put_sighting(slot: u32, sighting: &Sighting) -> bool {
    match RING.get_ptr_mut(slot) {
        Some(place) => {
            // SAFETY: the slots of a CPU are written by programs on that CPU alone.
            unsafe { *place = *sighting };
            true
        }
        None => false,
    }
}

#[inline(always)]
pub(crate) fn sighting_is(slot: u32, wanted: &Sighting) -> bool {
    RING.get(slot).is_some_and(|there| there == wanted)
}
