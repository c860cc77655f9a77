//! Shows a working overlay on one machine: nodes in network namespaces, one agent process each, pods, and traffic between
//! every two of them, with the way it took as the eBPF counters prove it.

mod report;
mod traffic;

use std::{process::ExitCode, time::Instant};

use bench_lab::{
    INTERRUPTED, check_stop,
    cluster::{Backend, Cluster, NETWORKS, Options, StoreChoice, net_conf, plugin_binary},
    progress, say, stopped, wait_for_stop, watch_for_stop,
};
use clap::{CommandFactory as _, Parser, ValueEnum, error::ErrorKind};
use flannel_testkit::Families;

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

    /// Address family of nodes and pods.
    #[arg(long, value_enum, default_value_t = FamilyChoice::V4)]
    family: FamilyChoice,

    /// What carries packets between nodes. host-gw needs no tunnel, wireguard a kernel that has it.
    #[arg(long, value_enum, default_value_t = Backend::Vxlan)]
    backend: Backend,

    /// Route to nodes on the same link without a tunnel. The last of three or more nodes is behind a router.
    #[arg(long)]
    direct_routing: bool,

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

/// Address family of nodes and pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum FamilyChoice {
    /// IPv4.
    #[value(name = "4")]
    V4,
    /// IPv6 alone.
    #[value(name = "6")]
    V6,
    /// Both, side by side.
    Dual,
}

impl FamilyChoice {
    const fn as_str(self) -> &'static str {
        match self {
            Self::V4 => "4",
            Self::V6 => "6",
            Self::Dual => "dual",
        }
    }

    const fn families(self) -> Families {
        match self {
            Self::V4 => Families::V4,
            Self::V6 => Families::V6,
            Self::Dual => Families::Dual,
        }
    }
}

impl Args {
    /// What of it does not go together, with an advice.
    fn contradiction(&self) -> Option<&'static str> {
        match self.backend {
            Backend::HostGw if self.direct_routing => {
                Some("--backend host-gw routes to every node already: leave --direct-routing out")
            }
            Backend::Wireguard if self.direct_routing => Some(
                "--backend wireguard encrypts everything between nodes: leave --direct-routing out",
            ),
            Backend::Wireguard if self.datapath == "bpf" => Some(
                "--backend wireguard is the kernel's alone, without eBPF: leave --datapath bpf out",
            ),
            _ => None,
        }
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    if let Some(contradiction) = args.contradiction() {
        let error = Args::command().error(ErrorKind::ArgumentConflict, contradiction);
        error.exit();
    }
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
    let families = args.family.families();
    let mut cluster = Cluster::start(&Options {
        plugin: Some(plugin_binary()?),
        net_conf: net_conf(families, NETWORKS, args.backend, args.direct_routing),
        families,
        backend: args.backend,
        far_nodes: u8::from(args.direct_routing && args.nodes > 2),
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
        count * count.saturating_sub(1) * families.list().len()
    ));
    for from in 0..count {
        for (to, family) in (0..count)
            .filter(|to| *to != from)
            .flat_map(|to| families.list().into_iter().map(move |family| (to, family)))
        {
            check_stop()?;
            let pair = traffic::measure(&cluster, family, from, to);
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
    let report = Report::new(
        (args.family.as_str(), args.backend, args.direct_routing),
        usize::from(args.nodes),
        count,
        pairs,
    );
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
