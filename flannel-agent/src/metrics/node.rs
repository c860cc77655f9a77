//! What the node has at the moment of a scrape: readiness, choices, counters of the programs.

use std::fmt;

use flannel_common::Counter;
use flannel_core::{
    features::{Findings, Rung},
    plan::GateMode,
    xdp::Standing,
};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet},
    metrics::MetricType,
};

use super::{Known, Metrics, PREFIX, XDP};
use crate::{
    dataplane::bpf::{self, Instance, Totals},
    health::{Board, Part},
    state::{Mode, State},
};

/// Reads the node at every scrape.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) metrics: Metrics,
    pub(super) board: Board,
}

type Label<'a> = [(&'a str, &'a str)];

impl Collector for Node {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        let to = &mut encoder;
        let known = self.metrics.known();
        info(to)?;
        self.readiness(to)?;
        choices(to, &known)?;
        let totals = known
            .state
            .as_ref()
            .and_then(|state| Instance::of(state.vni).ok())
            .and_then(|instance| instance.totals().ok());
        if let Some(state) = &known.state {
            let strips = totals.as_ref().is_some_and(|totals| totals.xdp.packets > 0);
            let attached = known.attached.iter().any(|(_, hook)| *hook == XDP);
            rung(to, state, strips && attached)?;
        }
        if let Some(totals) = totals {
            let dropped = known
                .state
                .as_ref()
                .is_some_and(|state| state.datapath.device == "veth");
            packets(to, &totals, dropped)?;
        }
        programs(to, &known)
    }
}

impl Node {
    fn readiness(&self, to: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let lacking = self.board.watch();
        let lacking = lacking.borrow();
        let ready = if lacking.is_empty() { 1.0 } else { 0.0 };
        gauge(to, &named("ready"), "Whether pods can talk", ready)?;
        let name = named("readiness_pending");
        let help = "Parts of the agent that are not in place";
        let mut family = to.encode_descriptor(&name, help, None, MetricType::Gauge)?;
        for part in Part::ALL {
            let pending = u32::from(lacking.contains_key(&part));
            family
                .encode_family(&[("part", part.as_str())])?
                .encode_gauge(&pending)?;
        }
        Ok(())
    }
}

fn named(name: &str) -> String {
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

fn choices(to: &mut DescriptorEncoder<'_>, known: &Known) -> fmt::Result {
    gauge(
        to,
        &named("peers"),
        "Nodes that this one sends to",
        known.peers as f64,
    )?;
    let Some(state) = &known.state else {
        return Ok(());
    };
    let connected = f64::from(u8::from(state.store_connected));
    gauge(
        to,
        &named("store_connected"),
        "Whether changes in the lease store are being seen",
        connected,
    )?;
    gauge(
        to,
        &named("problems"),
        "Troubles that `flannel-agent status` names",
        state.problems.len() as f64,
    )?;
    let name = named("datapath_mode");
    let help = "What carries the traffic: 1 for the mode in force";
    let mut family = to.encode_descriptor(&name, help, None, MetricType::Gauge)?;
    for mode in [Mode::Bpf, Mode::Kernel] {
        let value = u32::from(state.datapath.mode == mode);
        family
            .encode_family(&[("mode", mode.as_str())])?
            .encode_gauge(&value)?;
    }
    let name = named("fast_path_mode");
    let help = "The fast path's mode: 1 for the mode in force";
    let mut family = to.encode_descriptor(&name, help, None, MetricType::Gauge)?;
    let now = state
        .fast_path
        .as_ref()
        .map_or(GateMode::Off, |fast| fast.mode);
    for mode in [GateMode::Off, GateMode::Established, GateMode::Syn] {
        let value = u32::from(now == mode);
        family
            .encode_family(&[("mode", mode.as_str())])?
            .encode_gauge(&value)?;
    }
    let name = named("xdp_state");
    let help = "Native XDP on the uplink: 1 for how it stands";
    let mut family = to.encode_descriptor(&name, help, None, MetricType::Gauge)?;
    let now = state.datapath.xdp.as_ref().map(|xdp| xdp.standing);
    for standing in Standing::ALL {
        let value = u32::from(now.unwrap_or_default() == standing);
        family
            .encode_family(&[("state", standing.as_str())])?
            .encode_gauge(&value)?;
    }
    Ok(())
}

/// From what came of it alone: what the kernel could do besides does not change in between.
fn rung(to: &mut DescriptorEncoder<'_>, state: &State, strips: bool) -> fmt::Result {
    let name = named("datapath_rung");
    let help = "How packets are carried: 1 for the rung in force";
    let mut family = to.encode_descriptor(&name, help, None, MetricType::Gauge)?;
    let now = state.ladder(&Findings::default(), strips).rung;
    for rung in Rung::ALL {
        let value = u32::from(now == Some(rung));
        family
            .encode_family(&[("rung", rung.as_str())])?
            .encode_gauge(&value)?;
    }
    Ok(())
}

fn packets(to: &mut DescriptorEncoder<'_>, totals: &Totals, dropped: bool) -> fmt::Result {
    let carried: [(&str, &str, Counter); 5] = [
        ("encap", "stack", totals.encap),
        ("encap", "fast", totals.fast_encap),
        ("decap", "stack", totals.decap),
        ("decap", "fast", totals.fast_decap),
        ("local", "fast", totals.fast_local),
    ];
    let name = named("datapath_packets");
    let help = "Packets that eBPF carried; a super-packet counts once";
    let mut family = to.encode_descriptor(&name, help, None, MetricType::Counter)?;
    for (direction, path, counter) in carried {
        count(
            &mut family,
            &[("direction", direction), ("path", path)],
            counter.packets,
        )?;
    }
    let name = named("datapath_bytes");
    let help = "Bytes of inner frames that eBPF carried";
    let mut family = to.encode_descriptor(&name, help, None, MetricType::Counter)?;
    for (direction, path, counter) in carried {
        count(
            &mut family,
            &[("direction", direction), ("path", path)],
            counter.bytes,
        )?;
    }
    let (name, help) = if dropped {
        (
            "datapath_drops",
            "Packets that eBPF dropped because it could not carry them",
        )
    } else {
        (
            "datapath_passed",
            "Packets that eBPF left to the kernel's device",
        )
    };
    let name = named(name);
    let mut family = to.encode_descriptor(&name, help, None, MetricType::Counter)?;
    for (direction, reason, packets) in &totals.reasons {
        let labels: &Label<'_> = &[
            ("direction", direction.as_str()),
            ("reason", reason.as_str()),
        ];
        count(&mut family, labels, *packets)?;
    }
    let name = named("fast_path_packets");
    let help = "What the fast path's gate found of packets";
    let mut family = to.encode_descriptor(&name, help, None, MetricType::Counter)?;
    for (outcome, packets) in [
        ("tagged", totals.gate_tagged),
        ("confirmed", totals.gate_confirmed),
        ("refuted", totals.gate_refuted),
        ("admitted", totals.gate_admitted),
    ] {
        count(&mut family, &[("outcome", outcome)], packets)?;
    }
    Ok(())
}

fn count(family: &mut MetricEncoder<'_>, labels: &Label<'_>, value: u64) -> fmt::Result {
    family
        .encode_family(&labels)?
        .encode_counter::<NoLabelSet, u64, f64>(&value, None)
}

fn programs(to: &mut DescriptorEncoder<'_>, known: &Known) -> fmt::Result {
    let name = named("bpf_map_entries");
    let mut family = to.encode_descriptor(&name, "Entries in use", None, MetricType::Gauge)?;
    for map in &known.maps {
        family
            .encode_family(&[("map", map.name)])?
            .encode_gauge(&(map.entries as u64))?;
    }
    let name = named("bpf_map_capacity");
    let help = "Entries that there is room for";
    let mut family = to.encode_descriptor(&name, help, None, MetricType::Gauge)?;
    for map in &known.maps {
        if let Some(capacity) = map.capacity {
            family
                .encode_family(&[("map", map.name)])?
                .encode_gauge(&capacity)?;
        }
    }
    let name = named("bpf_program_attached");
    let help = "Programs of the agent that are attached";
    let mut family = to.encode_descriptor(&name, help, None, MetricType::Gauge)?;
    for (index, hook) in &known.attached {
        // An interface that is gone a moment after the look has nothing attached.
        let Some(interface) = flannel_core::addr::IfIndex::try_from(*index)
            .ok()
            .and_then(bpf::interface_name)
        else {
            continue;
        };
        let labels: &Label<'_> = &[("interface", &interface), ("hook", hook)];
        family.encode_family(&labels)?.encode_gauge(&1u32)?;
    }
    Ok(())
}
