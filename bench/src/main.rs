//! `cargo xtask bench`: the overlay side by side, on the kernel's device and in eBPF, in one run.
//!
//! The labs stand beside each other and take turns, so that what the machine does meanwhile hits all of them. Reported are
//! medians and, what matters, their ratio; a single number of a shared machine means nothing.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use bench_lab::{
    INTERRUPTED, check_stop,
    cluster::{Cluster, Options, StoreChoice},
    progress, say, stopped, watch_for_stop,
};
use bytes::Bytes;
use clap::Parser;
use flannel_testkit::{
    Netns, Offloads,
    traffic::{Amount, tcp_transfer},
};
use serde::Serialize;

/// Compares eBPF with the kernel's vxlan device, side by side in one run.
#[derive(Clone, Debug, Parser)]
#[command(name = "bench", bin_name = "cargo xtask bench")]
struct Args {
    /// Rounds; the median is reported.
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u16).range(1..=1000))]
    rounds: u16,

    /// Length of one measurement in milliseconds.
    #[arg(long, default_value_t = 500, value_parser = clap::value_parser!(u64).range(50..=60_000))]
    millis: u64,

    /// Print one JSON line at the end instead of the table.
    #[arg(long)]
    json: bool,
}

const MODES: [&str; 2] = ["kernel", "bpf"];
const ECHO_PORT: u16 = 7007;
const PATIENCE: Duration = Duration::from_secs(2);

/// One row: what was measured, its unit, and the median of each mode.
#[derive(Debug, Serialize)]
struct Row {
    what: &'static str,
    unit: &'static str,
    kernel: f64,
    bpf: f64,
    /// bpf divided by kernel: above 1 eBPF is ahead.
    ratio: f64,
    kernel_range: (f64, f64),
    bpf_range: (f64, f64),
}

/// What is measured.
#[derive(Clone, Copy)]
struct Workload {
    what: &'static str,
    unit: &'static str,
    wire: bool,
    run: fn(&Cluster, Duration) -> anyhow::Result<f64>,
}

const WORKLOADS: [Workload; 3] = [
    Workload {
        what: "TCP stream, super-packets",
        unit: "Mbit/s",
        wire: false,
        run: stream,
    },
    Workload {
        what: "TCP stream, MTU frames",
        unit: "Mbit/s",
        wire: true,
        run: stream,
    },
    Workload {
        what: "UDP request and response, 1 byte",
        unit: "1/s",
        wire: false,
        run: round_trips,
    },
];

fn main() -> ExitCode {
    let args = Args::parse();
    match watch_for_stop().and_then(|()| run(&args)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) if stopped() => ExitCode::from(INTERRUPTED),
        Err(error) => {
            progress(&format!("failed: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> anyhow::Result<()> {
    let length = Duration::from_millis(args.millis);
    let mut rows = Vec::new();
    for wire in [false, true] {
        let mut clusters = BTreeMap::new();
        for mode in MODES {
            progress(&format!(
                "starting the {mode} overlay{}",
                if wire { ", uplink offloads off" } else { "" }
            ));
            let offloads = if wire {
                Offloads::Off
            } else {
                Offloads::Default
            };
            let options = Options {
                nodes: 2,
                pods: 1,
                store: StoreChoice::Dir,
                datapath: mode.into(),
                offloads,
            };
            let cluster = Cluster::start(&options)?;
            for node in cluster.lab.nodes() {
                // Every network card merges what it receives; a veth has to be told to.
                node.set_features("eth0", &["gro"], true)?;
            }
            clusters.insert(mode, cluster);
        }
        for workload in WORKLOADS.iter().filter(|workload| workload.wire == wire) {
            rows.push(compare(workload, &clusters, args.rounds, length)?);
        }
        for cluster in clusters.values_mut() {
            cluster.stop();
        }
    }
    if args.json {
        say(&serde_json::to_string(&rows)?);
    } else {
        say(&format!(
            "\n{:34} {:>8} {:>10} {:>10} {:>7}",
            "", "unit", "kernel", "bpf", "ratio"
        ));
        for row in &rows {
            say(&format!(
                "{:34} {:>8} {:>10.0} {:>10.0} {:>6.2}x   (kernel {:.0}..{:.0}, bpf {:.0}..{:.0})",
                row.what,
                row.unit,
                row.kernel,
                row.bpf,
                row.ratio,
                row.kernel_range.0,
                row.kernel_range.1,
                row.bpf_range.0,
                row.bpf_range.1
            ));
        }
        say(&format!(
            "medians of {} rounds of {} ms, modes taking turns",
            args.rounds, args.millis
        ));
    }
    Ok(())
}

fn compare(
    workload: &Workload,
    clusters: &BTreeMap<&'static str, Cluster>,
    rounds: u16,
    length: Duration,
) -> anyhow::Result<Row> {
    progress(&format!("{}: {rounds} rounds", workload.what));
    let mut results: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    for round in 0..usize::from(rounds) {
        for turn in 0..MODES.len() {
            check_stop()?;
            // Who goes first changes from round to round.
            let mode = MODES[(round + turn) % MODES.len()];
            let cluster = clusters.get(mode).context("a mode without a cluster")?;
            // A thread of its own: what a workload does to its thread ends with it.
            let done =
                std::thread::scope(|scope| scope.spawn(|| (workload.run)(cluster, length)).join());
            let value = done
                .map_err(|_| anyhow::anyhow!("it panicked"))
                .flatten()
                .with_context(|| format!("{} on {mode}", workload.what))?;
            results.entry(mode).or_default().push(value);
        }
    }
    let (kernel, kernel_range) = summarize(results.remove("kernel").unwrap_or_default());
    let (bpf, bpf_range) = summarize(results.remove("bpf").unwrap_or_default());
    Ok(Row {
        what: workload.what,
        unit: workload.unit,
        kernel,
        bpf,
        ratio: bpf / kernel,
        kernel_range,
        bpf_range,
    })
}

/// Median, lowest and highest.
fn summarize(mut values: Vec<f64>) -> (f64, (f64, f64)) {
    values.sort_by(f64::total_cmp);
    let middle = values.get(values.len() / 2).copied().unwrap_or(f64::NAN);
    let lowest = values.first().copied().unwrap_or(f64::NAN);
    (middle, (lowest, values.last().copied().unwrap_or(f64::NAN)))
}

fn stream(cluster: &Cluster, length: Duration) -> anyhow::Result<f64> {
    let (client, server) = (&cluster.pods[0].pod, &cluster.pods[1].pod);
    Ok(tcp_transfer(&server.ns, server.ip, &client.ns, Amount::For(length))?.mbps)
}

fn round_trips(cluster: &Cluster, length: Duration) -> anyhow::Result<f64> {
    let (client, server) = (&cluster.pods[0].pod, &cluster.pods[1].pod);
    let echo = bind(&server.ns, server.ip, ECHO_PORT)?;
    let socket = bind(&client.ns, client.ip, 0)?;
    socket.connect(SocketAddr::from((server.ip, ECHO_PORT)))?;
    let payload = Bytes::from_static(b"x");
    pin()?;
    let count = std::thread::scope(|scope| -> anyhow::Result<u64> {
        let echoing = scope.spawn(move || -> std::io::Result<()> {
            pin()?;
            let mut buffer = [0; 16];
            loop {
                let (len, from) = echo.recv_from(&mut buffer)?;
                // An empty datagram ends it.
                if len == 0 {
                    return Ok(());
                }
                echo.send_to(&buffer[..len], from)?;
            }
        });
        let mut buffer = [0; 16];
        let mut count = 0;
        let end = Instant::now() + length;
        while Instant::now() < end {
            socket.send(&payload)?;
            socket.recv(&mut buffer).context("no answer")?;
            count += 1;
        }
        socket.send(&[])?;
        echoing
            .join()
            .map_err(|_| anyhow::anyhow!("the echo ended early"))??;
        Ok(count)
    })?;
    ensure!(count > 0, "no round trip");
    Ok(count as f64 / length.as_secs_f64())
}

/// Puts this thread on the first CPU: with everything on one, the rate is the inverse of the cost, and waking an idle core does not
/// drown it.
fn pin() -> std::io::Result<()> {
    let mut cpus = nix::sched::CpuSet::new();
    cpus.set(0)?;
    nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &cpus)?;
    Ok(())
}

fn bind(ns: &Netns, ip: Ipv4Addr, port: u16) -> anyhow::Result<UdpSocket> {
    let socket = ns
        .run(|| UdpSocket::bind(SocketAddr::from((ip, port))))
        .with_context(|| format!("bind {ip}:{port}"))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    Ok(socket)
}
