//! What is measured, one sample at a time.
//!
//! Costs are taken with everything on one CPU under SCHED_FIFO: the rate is then the inverse of the CPU time that one
//! operation takes at both ends and in between. Throughput is taken with the sender on one CPU and the receiver on another.

mod round_trips;
mod socket;
mod stream;
mod udp;

use std::time::Duration;

use anyhow::Context as _;

use crate::{
    mode::{Mode, Path},
    rig::{Rig, Wire},
};

/// What one sample does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Bulk TCP over some connections, sender and receiver on a CPU each.
    Stream {
        /// Number of connections.
        flows: usize,
    },
    /// Bulk TCP over one connection, all on one CPU: CPU time per amount.
    StreamCost,
    /// One byte there and one back, over and over.
    TcpRr {
        /// Through the service instead of to the pod.
        service: bool,
    },
    /// Connect, one byte there and one back, reset.
    TcpCrr {
        /// Through the service instead of to the pod.
        service: bool,
    },
    /// One byte there and one back.
    UdpRr,
    /// Datagrams of so many bytes to a socket that nobody reads.
    Udp {
        /// Payload in bytes.
        size: usize,
        /// Number of different pairs of ports that take turns.
        flows: usize,
    },
    /// Times of TCP_RR at half of the kernel's rate.
    Latency,
}

/// A workload: its name, what it does, and what it yields.
#[derive(Clone, Copy, Debug)]
pub struct Workload {
    /// The name that is chosen and reported; [`Workload::rows`] has more where one sample yields more.
    pub name: &'static str,
    /// What one sample does.
    pub kind: Kind,
    /// How packets cross the cable meanwhile.
    pub wire: Wire,
    /// Whether a quick run has it.
    pub quick: bool,
    /// Names and units of what a sample yields.
    pub rows: &'static [(&'static str, &'static str)],
}

const fn new(
    name: &'static str,
    kind: Kind,
    quick: bool,
    rows: &'static [(&'static str, &'static str)],
) -> Workload {
    Workload {
        name,
        kind,
        wire: Wire::SuperPackets,
        quick,
        rows,
    }
}

const fn framed(mut workload: Workload) -> Workload {
    workload.wire = Wire::MtuFrames;
    workload
}

const fn stream(flows: usize) -> Kind {
    Kind::Stream { flows }
}

const fn udp(size: usize) -> Kind {
    Kind::Udp { size, flows: 1 }
}

const fn flows(flows: usize) -> Kind {
    Kind::Udp { size: 64, flows }
}

/// All workloads, in the order of tables. Those with MTU frames stand together: switching takes a moment.
#[rustfmt::skip]
pub const ALL: [Workload; 20] = [
    new("tcp_rr", Kind::TcpRr { service: false }, true, &[("tcp_rr", "1/s")]),
    new("tcp_crr", Kind::TcpCrr { service: false }, true, &[("tcp_crr", "1/s")]),
    new("udp_rr", Kind::UdpRr, true, &[("udp_rr", "1/s")]),
    new("udp64", udp(64), true, &[("udp64", "1/s"), ("cpu_per_packet", "ns")]),
    new("udp512", udp(512), false, &[("udp512", "1/s")]),
    new("udp1400", udp(1400), false, &[("udp1400", "1/s")]),
    new("flows_10k", flows(10_000), true, &[("flows_10k", "1/s")]),
    new("flows_100k", flows(100_000), false, &[("flows_100k", "1/s")]),
    new("tcp_rr_latency", Kind::Latency, true, &[("tcp_rr_p50", "us"), ("tcp_rr_p99", "us"), ("tcp_rr_p999", "us")]),
    new("clusterip_rr", Kind::TcpRr { service: true }, false, &[("clusterip_rr", "1/s")]),
    new("clusterip_crr", Kind::TcpCrr { service: true }, true, &[("clusterip_crr", "1/s")]),
    new("tcp_stream", stream(1), true, &[("tcp_stream", "Mbit/s")]),
    new("tcp_stream_8", stream(8), false, &[("tcp_stream_8", "Mbit/s")]),
    new("tcp_stream_32", stream(32), false, &[("tcp_stream_32", "Mbit/s")]),
    new("cpu_per_gbit", Kind::StreamCost, false, &[("cpu_per_gbit", "s")]),
    framed(new("tcp_stream_mtu", stream(1), true, &[("tcp_stream_mtu", "Mbit/s")])),
    framed(new("tcp_stream_mtu_8", stream(8), false, &[("tcp_stream_mtu_8", "Mbit/s")])),
    framed(new("tcp_stream_mtu_32", stream(32), false, &[("tcp_stream_mtu_32", "Mbit/s")])),
    framed(new("cpu_per_gbit_mtu", Kind::StreamCost, false, &[("cpu_per_gbit_mtu", "s")])),
    framed(new("udp64_mtu", udp(64), false, &[("udp64_mtu", "1/s")])),
];

/// Least length of a sample of very many flows.
const LONG: Duration = Duration::from_millis(400);

/// How long a sample is, and what load it puts on.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Length of one measurement.
    pub length: Duration,
    /// Round trips a second that [`Kind::Latency`] asks for.
    pub half_rate: f64,
}

impl Workload {
    /// Whether `mode` can run it, and whether it says anything there: the number of services matters to what opens connections.
    pub fn runs_on(&self, mode: Mode) -> bool {
        let service = matches!(
            self.kind,
            Kind::TcpRr { service: true } | Kind::TcpCrr { service: true }
        );
        if service && !mode.has_services() {
            return false;
        }
        mode.rules != crate::mode::Rules::Many
            || matches!(
                self.name,
                "tcp_rr" | "tcp_crr" | "udp64" | "clusterip_rr" | "clusterip_crr"
            )
    }

    /// Whether it leaves connection tracking with many entries.
    fn leaves_entries(&self) -> bool {
        match self.kind {
            Kind::TcpCrr { .. } => true,
            Kind::Udp { flows, .. } => flows > 1,
            _ => false,
        }
    }

    /// Takes one sample: a value for each of [`Workload::rows`].
    pub fn sample(&self, rig: &Rig, load: &Load) -> anyhow::Result<Vec<f64>> {
        let mut length = load.length;
        if matches!(self.kind, Kind::Udp { flows, .. } if flows > 10_000) {
            // Every pair of ports takes its turn.
            length = length.max(LONG);
        }
        let values = match self.kind {
            Kind::Stream { flows } => stream::throughput(rig, flows, length).map(|rate| vec![rate]),
            Kind::StreamCost => stream::cost(rig, length).map(|cost| vec![cost]),
            Kind::TcpRr { service } => {
                round_trips::tcp(rig, service, length).map(|rate| vec![rate])
            }
            Kind::TcpCrr { service } => {
                round_trips::connections(rig, service, length).map(|rate| vec![rate])
            }
            Kind::UdpRr => udp::round_trips(rig, length).map(|rate| vec![rate]),
            Kind::Udp { size, flows } => udp::packets(rig, size, flows, length).map(|rate| {
                let cost = 1e9 / rate;
                vec![rate, cost]
            }),
            Kind::Latency => round_trips::latency(rig, load.half_rate, length),
        };
        if self.leaves_entries() {
            rig.forget_connections()?;
        }
        let mut values = values.with_context(|| format!("{} on {}", self.name, rig.mode.name))?;
        values.truncate(self.rows.len());
        Ok(values)
    }
}

/// The workloads to run: those named, or all, or the quick ones.
pub fn select(names: &[String], quick: bool) -> anyhow::Result<Vec<Workload>> {
    if names.is_empty() {
        return Ok(ALL
            .into_iter()
            .filter(|workload| !quick || workload.quick)
            .collect());
    }
    let named = |workload: &Workload, name: &str| {
        workload.name == name || workload.rows.iter().any(|(row, _)| *row == name)
    };
    for name in names {
        if !ALL.iter().any(|workload| named(workload, name)) {
            let all: Vec<_> = ALL.iter().map(|workload| workload.name).collect();
            anyhow::bail!(
                "no workload is named {name}; there are {}, nodes and programs",
                all.join(", ")
            );
        }
    }
    Ok(ALL
        .into_iter()
        .filter(|workload| names.iter().any(|name| named(workload, name)))
        .collect())
}

/// Whether this mode's packets pass programs of ours or of the benchmark.
pub fn has_programs(mode: Mode) -> bool {
    matches!(mode.path, Path::NoOverlay | Path::Agent { .. })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_names_its_workload() {
        let chosen = select(&["tcp_rr_p99".to_owned(), "udp64".to_owned()], false);
        let names: Vec<_> = chosen
            .expect("known")
            .iter()
            .map(|workload| workload.name)
            .collect();
        assert_eq!(names, ["udp64", "tcp_rr_latency"]);
        assert!(select(&["tcp".to_owned()], false).is_err());
    }

    #[test]
    fn the_promised_names_are_there_and_a_quick_run_has_them() {
        let quick = select(&[], true).expect("quick");
        for name in [
            "tcp_stream",
            "tcp_stream_mtu",
            "tcp_rr",
            "tcp_crr",
            "udp_rr",
            "udp64",
        ] {
            assert!(
                quick
                    .iter()
                    .any(|workload| workload.rows.iter().any(|(row, _)| *row == name)),
                "{name}"
            );
        }
    }
}
