//! The eBPF half: loading, maps, attaching. Everything it makes is pinned, so it outlives the agent; the next agent adopts the maps and
//! replaces the programs in place.

mod attach;
mod error;
mod far_end;
mod link;
mod next;
mod pins;
mod pods;
mod probe;
mod scan;
mod stand_in;
pub(crate) mod syscall;
mod tables;
mod xdp;

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, HashMap, MapData},
    programs::SchedClassifier,
};
use flannel_common::{
    NodeId, PodRecord,
    flow::{self, Flow},
    map::TRUST,
};
use flannel_core::{
    addr::Family,
    plan::{Hook, Node, Settings},
};

use crate::telemetry::chain;

pub use attach::{AttachMode, delete_filter, interface_name};
pub use error::BpfError;
pub(crate) use error::{kept_logs, last_word};
pub use pins::{Instance, Totals, ensure_bpffs, mounted};
pub use pods::PodState;
pub use probe::{Room, room};
use tables::Tables;

/// The object that `cargo xtask build-ebpf` made. Public for the tests that run its programs on packets of their own.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("FLANNEL_EBPF_OBJECT"));

/// The same programs for IPv6.
pub static OBJECT_V6: &[u8] = aya::include_bytes_aligned!(env!("FLANNEL_EBPF_OBJECT_V6"));

/// Entries of the map `pods`: more than a node has pods.
pub(crate) const POD_ENTRIES: u32 = 4096;
/// Entries of the map `nattuples`.
const NAT_ENTRIES: u32 = 1 << 14;

/// How to load.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// Where to pin.
    pub instance: Instance,
    /// Number of subnets in the cluster network.
    pub subnet_count: u32,
    /// tcx or clsact.
    pub attach: AttachMode,
    /// Flows that the map `flows` has room for.
    pub flow_entries: u32,
    /// Whether this kernel's vxlan devices take the last source port of the range, too.
    pub last_port: bool,
}

/// The loaded programs and their maps.
pub struct Bpf {
    ebpf: Ebpf,
    instance: Instance,
    attach: AttachMode,
    room: Room,
    alive: Array<MapData, u64>,
    subnets: Array<MapData, NodeId>,
    tables: Box<dyn Tables>,
    /// Slots of `ring` for one CPU, as a power of two.
    ring_shift: u32,
    /// Source ports that the kernel takes beyond the span of the range: 0 or 1.
    extra_ports: u16,
    /// Why the flow gate cannot be used, if it cannot.
    gate_obstacle: Option<String>,
    /// Every map by its pin, to pin it again when somebody has removed that.
    pins: Vec<(PathBuf, MapData)>,
    subnet_count: u32,
    node_capacity: u32,
    /// Entries that a full scan or our own writes found in use: what a quick look needs to read.
    used_subnets: BTreeSet<u32>,
    used_nodes: BTreeSet<NodeId>,
    /// Those entries as they were last read, and whether they had been the same before.
    in_use: Option<Vec<(u32, NodeId)>>,
    unchanged: bool,
    /// The program of native XDP that was loaded, once one was wanted: its index in [`xdp::PROGRAMS`].
    xdp: Option<usize>,
    /// Whether a subnet was pointed elsewhere since the last grace period.
    moved: bool,
    /// Whether there was nothing of an earlier run.
    fresh: bool,
    /// Where the verifier's refusals are kept.
    logs: Option<PathBuf>,
}

impl std::fmt::Debug for Bpf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Bpf")
            .field("instance", &self.instance)
            .field("attach", &self.attach)
            .finish_non_exhaustive()
    }
}

impl Bpf {
    /// Loads the programs with the pinned maps of an earlier run, where they fit, and asks the kernel what it can do.
    /// If that fails where nothing was before, nothing is left behind.
    pub fn load(options: &LoadOptions) -> Result<Self, BpfError> {
        Self::load_with_logs(options, None)
    }

    /// The same, keeping what the verifier says of programs that it refuses in files of that directory.
    pub fn load_with_logs(options: &LoadOptions, logs: Option<&Path>) -> Result<Self, BpfError> {
        let fresh = !options.instance.dir().exists();
        if let Some(dir) = logs {
            error::forget_logs(dir);
        }
        let loaded = Self::load_pinned(options, fresh, logs);
        if loaded.is_err() && fresh {
            remove(&options.instance);
        }
        loaded
    }

    /// Gives it up before anything was attached: what this load has made goes, what an earlier run made stays.
    pub fn discard(self) {
        if self.fresh {
            remove(&self.instance);
        }
    }

    fn load_pinned(
        options: &LoadOptions,
        fresh: bool,
        logs: Option<&Path>,
    ) -> Result<Self, BpfError> {
        let LoadOptions {
            instance,
            subnet_count,
            attach,
            flow_entries,
            last_port,
        } = options;
        let cpus = aya::util::nr_cpus().map_or(1, |cpus| cpus as u32);
        let ring_shift = flow::ring_shift(cpus);
        let ring_entries = cpus << ring_shift;
        // Every subnet can have a node, and one that changes is written beside the old one first.
        let node_capacity = subnet_count
            .saturating_mul(2)
            .saturating_add(2)
            .min(1 << 20);
        let family = instance.overlay().family;
        let sizes = tables::sizes(family);
        let mut maps = instance.prepare(&[
            ("config", sizes.config, 1),
            ("alive", size_of::<u64>(), 1),
            ("subnets", size_of::<NodeId>(), *subnet_count),
            ("nodes", sizes.node, node_capacity),
            (
                "counters",
                size_of::<flannel_common::Counter>(),
                flannel_common::CounterId::COUNT,
            ),
            (
                "reasons",
                size_of::<u64>(),
                flannel_common::counter::REASON_ENTRIES,
            ),
            ("pods", size_of::<PodRecord>(), POD_ENTRIES),
            ("flows", size_of::<Flow>(), *flow_entries),
            ("nattuples", size_of::<u32>(), NAT_ENTRIES),
            ("ring", sizes.sighting, ring_entries),
            ("last", sizes.last, 1),
        ])?;
        maps.extend(instance.next_xdp());
        let helpers = probe::helpers();
        let mut loader = EbpfLoader::new();
        for (name, path) in &maps {
            loader.map_pin_path(name, path.clone());
        }
        loader
            .map_max_entries("subnets", *subnet_count)
            .map_max_entries("nodes", node_capacity)
            .map_max_entries("pods", POD_ENTRIES)
            .map_max_entries("flows", *flow_entries)
            .map_max_entries("nattuples", NAT_ENTRIES)
            .map_max_entries("ring", ring_entries)
            .override_global("KERNEL_HELPERS", &helpers, true);
        let mut ebpf = loader
            .load(object(family))
            .map_err(|source| BpfError::load("the eBPF object", source))?;
        let mut gate_obstacle = None;
        for hook in Hook::ALL {
            let loaded = program(&mut ebpf, hook.as_str())?
                .load()
                .map_err(|source| BpfError::program("load", hook.as_str(), source).kept_in(logs));
            match loaded {
                // Without the gate everything goes through the stack, as it would with the gate shut.
                Err(error) if !Hook::BASE.contains(&hook) => {
                    gate_obstacle.get_or_insert_with(|| chain(&error));
                }
                loaded => loaded?,
            }
        }
        let room = probe::room(&mut ebpf, family).map_err(|error| error.kept_in(logs))?;
        let mut pins = Vec::new();
        for (name, path) in maps {
            let map = MapData::from_pin(&path).map_err(|source| BpfError::read(name, 0, source))?;
            pins.push((path, map));
        }
        Ok(Self {
            alive: array(&mut ebpf, "alive")?,
            subnets: array(&mut ebpf, "subnets")?,
            tables: tables::take(&mut ebpf, family)?,
            ring_shift,
            extra_ports: u16::from(*last_port),
            gate_obstacle,
            ebpf,
            pins,
            instance: instance.clone(),
            attach: *attach,
            room,
            subnet_count: *subnet_count,
            node_capacity,
            used_subnets: BTreeSet::new(),
            used_nodes: BTreeSet::new(),
            in_use: None,
            unchanged: false,
            xdp: None,
            moved: false,
            fresh,
            logs: logs.map(Path::to_owned),
        })
    }

    /// What the programs carry.
    pub const fn family(&self) -> Family {
        self.instance.overlay().family
    }

    /// What `bpf_skb_adjust_room` can do here.
    pub const fn room(&self) -> Room {
        self.room
    }

    /// How programs are attached.
    pub const fn attach_mode(&self) -> AttachMode {
        self.attach
    }

    /// From how many ports packets come where the range of source ports ends so much above its beginning: as many as those of the kernel's
    /// own device.
    pub const fn port_span(&self, difference: u16) -> u16 {
        difference.saturating_add(self.extra_ports)
    }

    /// Slots of the map `ring` for one CPU, as a power of two.
    pub const fn ring_shift(&self) -> u32 {
        self.ring_shift
    }

    /// Leaves the flow gate alone: what it needs was found not to work here. What the verifier has said stands.
    pub(crate) fn forbid_gate(&mut self, reason: String) {
        self.gate_obstacle.get_or_insert(reason);
    }

    /// Why the flow gate cannot be used; `None` if it can, as far as the kernel takes its programs.
    pub fn gate_obstacle(&self) -> Option<&str> {
        self.gate_obstacle.as_deref()
    }

    /// The epoch of the configuration that is in place, whoever wrote it; zero before the first.
    pub fn epoch(&self) -> Result<u32, BpfError> {
        self.tables.epoch()
    }

    /// Writes an entry of `nodes`.
    pub fn put_node(&mut self, id: NodeId, node: &Node) -> Result<(), BpfError> {
        self.used_nodes.insert(id);
        self.tables.put_node(id, node)
    }

    /// Empties an entry of `nodes`.
    pub fn clear_node(&mut self, id: NodeId) -> Result<(), BpfError> {
        if std::mem::take(&mut self.moved) {
            wait_for_programs();
        }
        self.tables.clear_node(id)?;
        self.used_nodes.remove(&id);
        Ok(())
    }

    /// Points a subnet at a node.
    pub fn put_subnet(&mut self, index: u32, id: NodeId) -> Result<(), BpfError> {
        self.moved = true;
        self.used_subnets.insert(index);
        self.subnets
            .set(index, id, 0)
            .map_err(|source| BpfError::write("subnets", index, source))
    }

    /// Points a subnet at no node.
    pub fn clear_subnet(&mut self, index: u32) -> Result<(), BpfError> {
        self.moved = true;
        self.subnets
            .set(index, 0, 0)
            .map_err(|source| BpfError::write("subnets", index, source))?;
        self.used_subnets.remove(&index);
        Ok(())
    }

    /// Says that the maps are kept, for [`TRUST`] from now; for ever where eBPF is alone, because nobody else would carry a packet.
    pub fn keep(&mut self, alone: bool) -> Result<(), BpfError> {
        let until = if alone { 0 } else { since_boot() + TRUST };
        self.alive
            .set(0, until.saturating_mul(1_000_000_000), 0)
            .map_err(|source| BpfError::write("alive", 0, source))
    }

    /// Writes `config`.
    pub fn put_settings(&mut self, settings: &Settings) -> Result<(), BpfError> {
        self.tables.put_settings(settings)
    }
}

/// The programs of a family.
pub const fn object(family: Family) -> &'static [u8] {
    match family {
        Family::V4 => OBJECT,
        Family::V6 => OBJECT_V6,
    }
}

/// Seconds of the clock that `bpf_ktime_get_ns` reads, rounded up.
fn since_boot() -> u64 {
    use nix::time::{ClockId, clock_gettime};
    // A clock that cannot be read would let the maps age at once: then they do not age at all.
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(u64::MAX / 2_000_000_000, |now| {
        now.tv_sec().unsigned_abs() + 1
    })
}

fn remove(instance: &Instance) {
    if let Err(error) = instance.remove() {
        tracing::debug!(dir = %instance.dir().display(), %error, "remove what a failed start has pinned");
    }
}

/// Waits until no program runs any more that may have followed a subnet to its former node: a grace period of RCU, which
/// programs run under. Where it cannot be had, a packet that is under way at the very moment goes the slow path.
fn wait_for_programs() {
    // SAFETY: a system call without pointers.
    #[expect(unsafe_code, reason = "no safe wrapper knows this system call")]
    let answer = unsafe { libc::syscall(libc::SYS_membarrier, libc::MEMBARRIER_CMD_GLOBAL, 0, 0) };
    if answer != 0 {
        tracing::debug!(error = %std::io::Error::last_os_error(), "wait for running programs");
    }
}

/// A program of the object.
fn program<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut SchedClassifier, BpfError> {
    ebpf.program_mut(name)
        .ok_or_else(|| BpfError::Missing(name.to_owned()))?
        .try_into()
        .map_err(|source| BpfError::program("find", name, source))
}

fn array<V: aya::Pod>(ebpf: &mut Ebpf, name: &str) -> Result<Array<MapData, V>, BpfError> {
    let map = ebpf
        .take_map(name)
        .ok_or_else(|| BpfError::Missing(name.to_owned()))?;
    Array::try_from(map).map_err(|source| BpfError::read(name, 0, source))
}

fn hash<K: aya::Pod, V: aya::Pod>(
    ebpf: &mut Ebpf,
    name: &str,
) -> Result<HashMap<MapData, K, V>, BpfError> {
    let map = ebpf
        .take_map(name)
        .ok_or_else(|| BpfError::Missing(name.to_owned()))?;
    HashMap::try_from(map).map_err(|source| BpfError::read(name, 0, source))
}

/// A map pin's path.
pub(super) fn join(dir: &Path, name: &str) -> PathBuf {
    dir.join(name)
}
