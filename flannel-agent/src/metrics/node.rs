//! What the node has at the moment of a scrape: readiness, choices, counters of the programs.

use std::fmt;

use flannel_common::Counter;
use flannel_core::{
    addr::Family,
    config::BackendKind,
    features::{Findings, Rung},
    plan::GateMode,
    xdp::Standing,
};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet},
    metrics::MetricType,
};

use super::{Known, Metrics, Overlay, PREFIX, XDP, peers};
use crate::{
    dataplane::bpf::{self, Instance, Totals},
    health::{Board, Part},
    state::{Bare, Mode, State},
};

/// Reads the node at every scrape.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) metrics: Metrics,
    pub(super) board: Board,
}

pub(super) type Label<'a> = [(&'a str, &'a str)];

/// An overlay at the moment of a scrape.
struct Shown {
    known: Overlay,
    totals: Option<Totals>,
    /// The label that tells it from the node's other overlay; none where it is the only one.
    family: Option<&'static str>,
}

impl Shown {
    fn read(known: Known) -> Vec<Self> {
        let both = known.overlays.len() > 1;
        let show = |known: Overlay| Self {
            totals: totals(&known.state),
            family: both.then_some(match known.state.family {
                Family::V4 => "ipv4",
                Family::V6 => "ipv6",
            }),
            known,
        };
        known.overlays.into_values().map(show).collect()
    }

    fn labels<'a>(&self, rest: &Label<'a>) -> Vec<(&'a str, &'a str)> {
        let family = self.family.map(|family| ("family", family));
        family.into_iter().chain(rest.iter().copied()).collect()
    }

    /// How it stands.
    fn rung(&self) -> Option<Rung> {
        let strips = self.totals.as_ref().is_some_and(|all| all.xdp.packets > 0);
        let attached = self.known.attached.iter().any(|(_, hook)| *hook == XDP);
        let state = &self.known.state;
        // From what came of it alone: what the kernel could do besides does not change in between.
        state.ladder(&Findings::default(), strips && attached).rung
    }
}

/// The counters of its programs; `None` where it has none.
fn totals(state: &State) -> Option<Totals> {
    if state.datapath.mode == Mode::Kernel {
        return None;
    }
    Instance::of(state.overlay()).ok()?.totals().ok()
}

impl Collector for Node {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        let to = &mut encoder;
        let known = self.metrics.known();
        let bare = known.bare.clone();
        let overlays = Shown::read(known);
        info(to)?;
        self.readiness(to, overlays.len() > 1)?;
        if let Some((peers, state)) = bare {
            without_bpf(to, peers, &state)?;
            if self.metrics.of_each_peer() {
                peers::encode(to, &peers::read(&state))?;
            }
        } else if overlays.is_empty() {
            gauge(to, &named("peers"), PEERS, 0.0)?;
        } else {
            choices(to, &overlays)?;
            packets(to, &overlays)?;
        }
        programs(to, &overlays)
    }
}

impl Node {
    fn readiness(&self, to: &mut DescriptorEncoder<'_>, both: bool) -> fmt::Result {
        let lacking = self.board.watch();
        let lacking = lacking.borrow();
        let ready = if lacking.is_empty() { 1.0 } else { 0.0 };
        gauge(to, &named("ready"), "Whether pods can talk", ready)?;
        let name = named("readiness_pending");
        let help = "Parts of the agent that are not in place";
        let mut family = to.encode_descriptor(&name, help, None, MetricType::Gauge)?;
        let second = both || lacking.contains_key(&Part::SecondDatapath);
        let second = second.then_some(Part::SecondDatapath);
        for part in Part::ALL.into_iter().chain(second) {
            let pending = u32::from(lacking.contains_key(&part));
            family
                .encode_family(&[("part", part.as_str())])?
                .encode_gauge(&pending)?;
        }
        Ok(())
    }
}

pub(super) fn named(name: &str) -> String {
    format!("{PREFIX}_{name}")
}

fn info(to: &mut DescriptorEncoder<'_>) -> fmt::Result {
    let name = named("build");
    let mut metric = to.encode_descriptor(&name, "The agent's build", None, MetricType::Info)?;
    let labels: &Label<'_> = &[("version", env!("CARGO_PKG_VERSION"))];
    metric.encode_info(&labels)
}

/// One gauge without labels.
pub(super) fn gauge(
    to: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    value: f64,
) -> fmt::Result {
    to.encode_descriptor(name, help, None, MetricType::Gauge)?
        .encode_gauge(&value)
}

/// One counter without labels; the encoder adds `_total`.
pub(super) fn counter(
    to: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    value: f64,
) -> fmt::Result {
    to.encode_descriptor(name, help, None, MetricType::Counter)?
        .encode_counter::<NoLabelSet, f64, f64>(&value, None)
}

/// One gauge for each overlay.
fn each(
    to: &mut DescriptorEncoder<'_>,
    (name, help): (&str, &str),
    overlays: &[Shown],
    value: impl Fn(&Shown) -> usize,
) -> fmt::Result {
    if let [only] = overlays {
        return gauge(to, &named(name), help, value(only) as f64);
    }
    let name = named(name);
    let mut family = to.encode_descriptor(&name, help, None, MetricType::Gauge)?;
    for overlay in overlays {
        family
            .encode_family(&overlay.labels(&[]))?
            .encode_gauge(&(value(overlay) as f64))?;
    }
    Ok(())
}

/// For each overlay one gauge for each of several values, which is 1 for the one in force.
fn one_of<T: PartialEq + Copy>(
    to: &mut DescriptorEncoder<'_>,
    (name, help): (&str, &str),
    overlays: &[Shown],
    label: &str,
    all: &[(T, &str)],
    now: impl Fn(&Shown) -> Option<T>,
) -> fmt::Result {
    let name = named(name);
    let mut family = to.encode_descriptor(&name, help, None, MetricType::Gauge)?;
    for overlay in overlays {
        let now = now(overlay);
        for (one, word) in all {
            let value = u32::from(now == Some(*one));
            family
                .encode_family(&overlay.labels(&[(label, word)]))?
                .encode_gauge(&value)?;
        }
    }
    Ok(())
}

const PEERS: &str = "Nodes that this one sends to";
const CONNECTED: &str = "Whether changes in the lease store are being seen";
const PROBLEMS: &str = "Troubles that `flannel-agent status` names";
const MODE: &str = "What carries the traffic: 1 for the mode in force";

/// A node whose kernel does everything there is to do.
fn without_bpf(to: &mut DescriptorEncoder<'_>, peers: usize, state: &Bare) -> fmt::Result {
    let connected = f64::from(u8::from(state.store_connected));
    gauge(to, &named("peers"), PEERS, peers as f64)?;
    gauge(to, &named("store_connected"), CONNECTED, connected)?;
    gauge(
        to,
        &named("problems"),
        PROBLEMS,
        state.problems.len() as f64,
    )?;
    let name = named("datapath_mode");
    let mut family = to.encode_descriptor(&name, MODE, None, MetricType::Gauge)?;
    for mode in [Mode::Bpf, Mode::Kernel] {
        // Of alloc it is neither: somebody else carries it.
        let carries = state.backend == BackendKind::Wireguard && mode == Mode::Kernel;
        family
            .encode_family(&[("mode", mode.as_str())])?
            .encode_gauge(&u32::from(carries))?;
    }
    Ok(())
}

fn choices(to: &mut DescriptorEncoder<'_>, overlays: &[Shown]) -> fmt::Result {
    each(to, ("peers", PEERS), overlays, |shown| shown.known.peers)?;
    let all = overlays
        .iter()
        .all(|shown| shown.known.state.store_connected);
    let connected = f64::from(u8::from(all));
    gauge(to, &named("store_connected"), CONNECTED, connected)?;
    each(to, ("problems", PROBLEMS), overlays, |shown| {
        shown.known.state.problems.len()
    })?;
    let modes = [Mode::Bpf, Mode::Kernel].map(|mode| (mode, mode.as_str()));
    one_of(
        to,
        ("datapath_mode", MODE),
        overlays,
        "mode",
        &modes,
        |shown| Some(shown.known.state.datapath.mode),
    )?;
    let about = (
        "fast_path_mode",
        "The fast path's mode: 1 for the mode in force",
    );
    let modes = [
        (GateMode::Off, "off"),
        (GateMode::Established, "established"),
        (GateMode::Syn, "syn"),
    ];
    one_of(to, about, overlays, "mode", &modes, |shown| {
        let fast = shown.known.state.fast_path.as_ref();
        Some(fast.map_or(GateMode::Off, |fast| fast.mode))
    })?;
    let about = ("xdp_state", "Native XDP on the uplink: 1 for how it stands");
    let states = Standing::ALL.map(|standing| (standing, standing.as_str()));
    one_of(to, about, overlays, "state", &states, |shown| {
        let xdp = shown.known.state.datapath.xdp.as_ref();
        Some(xdp.map(|xdp| xdp.standing).unwrap_or_default())
    })?;
    let about = (
        "datapath_rung",
        "How packets are carried: 1 for the rung in force",
    );
    let rungs = Rung::ALL.map(|rung| (rung, rung.as_str()));
    one_of(to, about, overlays, "rung", &rungs, Shown::rung)
}

/// Packets and bytes by direction and path.
fn carried(totals: &Totals) -> [(&'static str, &'static str, Counter); 7] {
    [
        ("encap", "stack", totals.encap),
        ("encap", "fast", totals.fast_encap),
        ("decap", "stack", totals.decap),
        ("decap", "fast", totals.fast_decap),
        ("local", "fast", totals.fast_local),
        ("encap", "routed", totals.routed_out),
        ("decap", "routed", totals.routed_in),
    ]
}

fn packets(to: &mut DescriptorEncoder<'_>, overlays: &[Shown]) -> fmt::Result {
    let all = || {
        let counted = overlays.iter();
        counted.filter_map(|shown| Some((shown, shown.totals.as_ref()?)))
    };
    if all().next().is_none() {
        return Ok(());
    }
    for (in_bytes, name, help) in [
        (
            false,
            "datapath_packets",
            "Packets that eBPF carried; a super-packet counts once",
        ),
        (
            true,
            "datapath_bytes",
            "Bytes of inner frames that eBPF carried",
        ),
    ] {
        let name = named(name);
        let mut family = to.encode_descriptor(&name, help, None, MetricType::Counter)?;
        for (shown, totals) in all() {
            for (direction, path, counter) in carried(totals) {
                let labels = shown.labels(&[("direction", direction), ("path", path)]);
                let value = if in_bytes {
                    counter.bytes
                } else {
                    counter.packets
                };
                count(&mut family, &labels, value)?;
            }
        }
    }
    let drops = [
        (
            true,
            "datapath_drops",
            "Packets that eBPF dropped because it could not carry them",
        ),
        (
            false,
            "datapath_passed",
            "Packets that eBPF left to the kernel's device",
        ),
    ];
    for (dropped, name, help) in drops {
        let is_alone = |shown: &Shown| shown.known.state.datapath.device == "veth";
        let these = || all().filter(|(shown, _)| is_alone(shown) == dropped);
        if these().next().is_none() {
            continue;
        }
        let name = named(name);
        let mut family = to.encode_descriptor(&name, help, None, MetricType::Counter)?;
        for (shown, totals) in these() {
            for (direction, reason, packets) in &totals.reasons {
                let labels = shown.labels(&[
                    ("direction", direction.as_str()),
                    ("reason", reason.as_str()),
                ]);
                count(&mut family, &labels, *packets)?;
            }
        }
    }
    let name = named("fast_path_packets");
    let help = "What the fast path's gate found of packets";
    let mut family = to.encode_descriptor(&name, help, None, MetricType::Counter)?;
    for (shown, totals) in all() {
        for (outcome, packets) in [
            ("tagged", totals.gate_tagged),
            ("confirmed", totals.gate_confirmed),
            ("refuted", totals.gate_refuted),
            ("admitted", totals.gate_admitted),
        ] {
            count(&mut family, &shown.labels(&[("outcome", outcome)]), packets)?;
        }
    }
    Ok(())
}

pub(super) fn count(family: &mut MetricEncoder<'_>, labels: &Label<'_>, value: u64) -> fmt::Result {
    family
        .encode_family(&labels)?
        .encode_counter::<NoLabelSet, u64, f64>(&value, None)
}

fn programs(to: &mut DescriptorEncoder<'_>, overlays: &[Shown]) -> fmt::Result {
    let name = named("bpf_map_entries");
    let mut family = to.encode_descriptor(&name, "Entries in use", None, MetricType::Gauge)?;
    for shown in overlays {
        for map in &shown.known.maps {
            family
                .encode_family(&shown.labels(&[("map", map.name)]))?
                .encode_gauge(&(map.entries as u64))?;
        }
    }
    let name = named("bpf_map_capacity");
    let help = "Entries that there is room for";
    let mut family = to.encode_descriptor(&name, help, None, MetricType::Gauge)?;
    for shown in overlays {
        for map in &shown.known.maps {
            if let Some(capacity) = map.capacity {
                family
                    .encode_family(&shown.labels(&[("map", map.name)]))?
                    .encode_gauge(&capacity)?;
            }
        }
    }
    let name = named("bpf_program_attached");
    let help = "Programs of the agent that are attached";
    let mut family = to.encode_descriptor(&name, help, None, MetricType::Gauge)?;
    for shown in overlays {
        for (index, hook) in &shown.known.attached {
            // An interface that is gone a moment after the look has nothing attached.
            let Some(interface) = flannel_core::addr::IfIndex::try_from(*index)
                .ok()
                .and_then(bpf::interface_name)
            else {
                continue;
            };
            family
                .encode_family(&shown.labels(&[("interface", &interface), ("hook", hook)]))?
                .encode_gauge(&1u32)?;
        }
    }
    Ok(())
}
