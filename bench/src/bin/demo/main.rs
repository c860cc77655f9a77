//! Shows a working overlay on one machine: nodes in network namespaces, one agent process each, pods, and traffic between
//! every two of them, with the way it took as the eBPF counters prove it.

mod report;
mod traffic;

use std::{process::ExitCode, time::Instant};

use bench_lab::{
    INTERRUPTED, check_stop,
    cluster::{Cluster, Options, StoreChoice, plugin_binary},
    progress, say, stopped, wait_for_stop, watch_for_stop,
};
use clap::Parser;

use report::Report;

/// Shows a working overlay of several nodes on one machine.
#[derive(Clone, Debug, Parser)]
#[command(name = "demo", bin_name = "cargo xtask demo")]
struct Args {
    /// Where the agents keep their leases.
    #[arg(long, value_enum, default_value_t = StoreChoice::Dir)]
    store: StoreChoice,

    /// Number of nodes.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=32))]
    nodes: u8,

    /// Pods on each node.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=16))]
    pods: u8,

    /// Data path of the agents: auto, bpf or kernel.
    #[arg(long, default_value = "auto", value_name = "DATAPATH")]
    datapath: String,

    /// Print one JSON line at the end instead of the table.
    #[arg(long)]
    json: bool,

    /// Keep the lab until Ctrl-C, and say how to enter it.
    #[arg(long)]
    keep: bool,
}

fn main() -> ExitCode {
    let args = Args::parse();
    if let Err(error) = watch_for_stop() {
        progress(&format!("cannot watch for Ctrl-C: {error}"));
        return ExitCode::FAILURE;
    }
    match run(&args) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) if stopped() => {
            progress(&format!("stopped ({error:#}), nothing is left behind"));
            ExitCode::from(INTERRUPTED)
        }
        Err(error) => {
            progress(&format!("failed: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> anyhow::Result<bool> {
    let started = Instant::now();
    let mut cluster = Cluster::start(&Options {
        plugin: Some(plugin_binary()?),
        nodes: args.nodes,
        pods: args.pods,
        store: args.store,
        datapath: args.datapath.clone(),
        ..Options::default()
    })?;
    let mut pairs = Vec::new();
    let count = cluster.pods.len();
    progress(&format!(
        "trying {} pairs of pods: ping, UDP, TCP",
        count * count.saturating_sub(1)
    ));
    for from in 0..count {
        for to in (0..count).filter(|to| *to != from) {
            check_stop()?;
            let pair = traffic::measure(&cluster, from, to);
            pairs.push(pair);
        }
        check_stop()?;
        progress(&format!(
            "  {} done ({} of {count})",
            cluster.pods[from].label,
            from + 1
        ));
    }
    check_stop()?;
    let report = Report::new(usize::from(args.nodes), count, pairs);
    if args.json {
        // Whoever keeps the lab wants to look at the result meanwhile.
        say(&report.json()?);
    } else {
        say(&report.table());
        say(&report.summary(started.elapsed()));
    }
    if args.keep {
        say(&cluster.how_to_enter());
        wait_for_stop();
    }
    cluster.stop();
    Ok(report.ok)
}
