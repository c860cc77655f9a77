//! Metrics in OpenMetrics text: what the agent does is counted as it happens, what the node has is read when somebody asks.
//!
//! The names are those of `docs/metrics.md`; a test holds the two together.

mod labels;
mod node;
mod peers;
mod process;
mod scrape;

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use flannel_core::plan::{Desired, Hook, Observed, Op};
use prometheus_client::{
    metrics::{
        counter::Counter,
        family::Family,
        histogram::{Histogram, exponential_buckets},
    },
    registry::Registry,
};

use crate::{
    dataplane::{Scope, bpf::POD_ENTRIES},
    health::Part,
    state::{Bare, State},
};

use labels::{Change, Look, Outcome};
pub(crate) use scrape::serve;

/// The prefix of every name.
const PREFIX: &str = "flannel";

/// Where the agent counts. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Metrics(Arc<Counted>);

#[derive(Debug)]
struct Counted {
    /// Whether figures of each peer are wanted.
    peers: bool,
    looks: Family<Look, Counter>,
    duration: Histogram,
    changes: Family<Change, Counter>,
    known: Mutex<Known>,
}

/// What was last known.
#[derive(Clone, Debug, Default)]
struct Known {
    /// By what an overlay is on the health board.
    overlays: BTreeMap<Part, Overlay>,
    /// The same of a backend without eBPF.
    bare: Option<(usize, Bare)>,
}

/// What the loop of an overlay last knew.
#[derive(Clone, Debug)]
struct Overlay {
    peers: usize,
    state: State,
    maps: Vec<MapUse>,
    /// Interface and hook of programs that are attached.
    attached: Vec<(u32, &'static str)>,
}

/// How full an eBPF map is.
#[derive(Clone, Copy, Debug)]
struct MapUse {
    name: &'static str,
    entries: usize,
    /// `None` while the map has not been written to.
    capacity: Option<u64>,
}

impl Metrics {
    /// Nothing counted yet; `peers` asks for figures of each peer.
    pub(crate) fn new(peers: bool) -> Self {
        Self(Arc::new(Counted {
            peers,
            looks: Family::default(),
            // From half a millisecond to sixteen seconds.
            duration: Histogram::new(exponential_buckets(0.0005, 2.0, 16)),
            changes: Family::default(),
            known: Mutex::default(),
        }))
    }

    /// The loop has looked at the node.
    pub(crate) fn looked(&self, scope: Scope, took: Duration) {
        self.0.looks.get_or_create(&Look { scope }).inc();
        self.0.duration.observe(took.as_secs_f64());
    }

    /// The loop has tried to change the node.
    pub(crate) fn changed(&self, op: &Op, done: bool) {
        let outcome = if done { Outcome::Done } else { Outcome::Failed };
        let change = Change {
            op: op.verb(),
            outcome,
        };
        self.0.changes.get_or_create(&change).inc();
    }

    /// An overlay as its loop has left it.
    pub(crate) fn know(&self, part: Part, seen: &Observed, desired: &Desired, state: &State) {
        let overlay = Overlay {
            peers: desired.peers.as_ref().map_or(0, BTreeMap::len),
            state: state.clone(),
            maps: maps(seen),
            attached: attached(seen),
        };
        self.lock().overlays.insert(part, overlay);
    }

    /// There is no such overlay any more.
    pub(crate) fn forget(&self, part: Part) {
        self.lock().overlays.remove(&part);
    }

    /// The node of a backend without eBPF.
    pub(crate) fn know_bare(&self, peers: usize, state: &Bare) {
        self.lock().bare = Some((peers, state.clone()));
    }

    fn of_each_peer(&self) -> bool {
        self.0.peers
    }

    fn known(&self) -> Known {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.0.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn register(&self, registry: &mut Registry) {
        registry.register(
            "reconcile_runs",
            "Looks at the node, by how much they took in",
            self.0.looks.clone(),
        );
        registry.register(
            "reconcile_duration_seconds",
            "Time a look took, changes included",
            self.0.duration.clone(),
        );
        registry.register(
            "reconcile_ops",
            "Changes made to the node, or tried",
            self.0.changes.clone(),
        );
    }
}

fn maps(seen: &Observed) -> Vec<MapUse> {
    let Some(bpf) = &seen.bpf else {
        return Vec::new();
    };
    let subnets = bpf
        .settings
        .as_ref()
        .map(flannel_core::plan::Settings::subnet_count);
    vec![
        MapUse {
            name: "nodes",
            entries: bpf.nodes.len(),
            // Entry 0 stands for no node.
            capacity: Some(u64::from(bpf.node_capacity.saturating_sub(1))),
        },
        MapUse {
            name: "pods",
            entries: bpf.pods.len(),
            capacity: Some(POD_ENTRIES.into()),
        },
        MapUse {
            name: "subnets",
            entries: bpf.subnets.len(),
            capacity: subnets.map(u64::from),
        },
    ]
}

/// What native XDP is called among the hooks.
const XDP: &str = "xdp";

fn attached(seen: &Observed) -> Vec<(u32, &'static str)> {
    let Some(bpf) = &seen.bpf else {
        return Vec::new();
    };
    let base = bpf
        .attached
        .iter()
        .map(|(hook, at)| (at.ifindex.get(), hook.as_str()));
    let xdp = bpf.xdp.iter().map(|at| (at.ifindex.get(), XDP));
    let pods = bpf.pod_hooks.iter().flat_map(|(ifindex, hooks)| {
        let there = hooks.iter().filter(|(_, current)| **current);
        there.map(|(hook, _): (&Hook, _)| (ifindex.get(), hook.as_str()))
    });
    base.chain(xdp).chain(pods).collect()
}
