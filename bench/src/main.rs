//! `cargo xtask bench`: every way from pod to pod side by side, in one run.
//!
//! The labs stand beside each other and take turns, so that what the machine does meanwhile hits all of them. Reported are
//! medians and, what matters, their ratios; a single number of a shared machine means nothing.

use std::{
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use bench_lab::{
    INTERRUPTED,
    cluster::Backend,
    footprint, guard,
    meter::Meter,
    mode::{self, Mode},
    nodes, pin, plot, programs, progress, report,
    result::{Results, Run, Samples},
    rig::Plan,
    say,
    session::{Pace, Session},
    stopped, watch_for_stop,
    workload::{self, Workload},
};
use clap::{CommandFactory as _, Parser, error::ErrorKind};
use flannel_testkit::Family;

/// Compares the agent with the kernel's own ways and with no overlay at all, side by side in one run.
///
/// Costs (round trips, connections, packets) are taken with everything on one CPU under SCHED_FIFO, so that a rate is the
/// inverse of a cost; throughput with the sender on one CPU and the receiver on another.
#[derive(Clone, Debug, Parser)]
#[command(name = "bench", bin_name = "cargo xtask bench", max_term_width = 100)]
struct Args {
    /// Fewer workloads, rounds and milliseconds: under 3 minutes. Without it, under 25.
    #[arg(long)]
    quick: bool,

    /// Rounds; each takes one sample of every mode. Default: 7, quick 3.
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=1000))]
    rounds: Option<u16>,

    /// Length of one sample in milliseconds. Default: 300, quick 100.
    #[arg(long, value_parser = clap::value_parser!(u64).range(10..=2000))]
    millis: Option<u64>,

    /// Address family of everything. `both` measures every mode over either, side by side, and says how IPv6 compares.
    #[arg(long, value_enum, default_value_t = FamilyChoice::V4)]
    family: FamilyChoice,

    /// The agents' backend: vxlan, or host-gw, to be compared with the kernel's routes.
    #[arg(long, value_enum, default_value_t = Backend::Vxlan)]
    backend: Backend,

    /// Only these modes, separated by commas.
    #[arg(long, value_delimiter = ',', value_name = "MODE,...")]
    modes: Vec<String>,

    /// Only these workloads, separated by commas; `nodes`, `programs` and `footprint` are three of them.
    /// `footprint` (memory, start and idleness of the agent itself) runs only if it is named.
    #[arg(long, value_delimiter = ',', value_name = "WORKLOAD,...")]
    workloads: Vec<String>,

    /// Services that kube-proxy's rules are made for in the modes with rules (those whose name ends in -2000 have 2000).
    #[arg(long, default_value_t = 20, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=20_000))]
    service_rules: u32,

    /// Upstream's daemon, to be compared as mode `flanneld`.
    #[arg(long, value_name = "PATH")]
    flanneld: Option<PathBuf>,

    /// Another build of the agent: compare with it instead, and end with 1 if this one is slower.
    #[arg(long, value_name = "BASE_AGENT", conflicts_with_all = ["modes", "workloads", "flanneld"])]
    guard: Option<PathBuf>,

    /// File to write medians and ratios to.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,

    /// Directory to write a picture of every workload to, as SVG and PNG.
    #[arg(long, value_name = "DIR")]
    plot: Option<PathBuf>,

    /// Measure nothing: print the tables of a file that --json wrote, as Markdown (and plot it, with --plot).
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
}

/// Address family of everything.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum FamilyChoice {
    /// IPv4 alone.
    #[value(name = "4")]
    V4,
    /// IPv6 alone.
    #[value(name = "6")]
    V6,
    /// Both, side by side.
    #[value(name = "both")]
    Both,
}

/// What a row of nodes takes longer to build than it is worth in a run that was asked for by mode.
const NODES: &str = "nodes";
const PROGRAMS: &str = "programs";

fn main() -> ExitCode {
    let args = Args::parse();
    if let Some(contradiction) = contradiction(&args) {
        let error = Args::command().error(ErrorKind::ArgumentConflict, contradiction);
        error.exit();
    }
    match watch_for_stop().and_then(|()| run(&args)) {
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
    if let Some(file) = &args.report {
        let results = read(file)?;
        say(&report::markdown(&results));
        if let Some(dir) = &args.plot {
            plot::write(&results, dir)?;
        }
        return Ok(true);
    }
    pin::set_limits().context("set limits")?;
    match &args.guard {
        Some(base) => compare(args, base),
        None => measure(args),
    }
}

/// What a run consists of.
struct Scope {
    modes: Vec<Mode>,
    workloads: Vec<Workload>,
    nodes: bool,
    programs: bool,
    footprint: Option<footprint::Pace>,
    pace: Pace,
}

impl Scope {
    fn new(args: &Args) -> anyhow::Result<Self> {
        let named = |name: &str| args.workloads.iter().any(|workload| workload == name);
        let all = args.workloads.is_empty();
        let measured: Vec<String> = args
            .workloads
            .iter()
            .filter(|name| ![NODES, PROGRAMS, footprint::WORKLOAD].contains(&name.as_str()))
            .cloned()
            .collect();
        let workloads = if !all && measured.is_empty() {
            Vec::new()
        } else {
            workload::select(&measured, args.quick)?
        };
        let flanneld = args.flanneld.is_some();
        let mut modes = mode::select(&args.modes, args.backend, flanneld, !args.quick)?;
        if args.family == FamilyChoice::Both {
            modes = modes
                .into_iter()
                .flat_map(|mode| [mode, mode.over_v6()])
                .collect();
        }
        // Its strangers are tunnelled to over IPv4.
        let usual = args.family == FamilyChoice::V4 && args.backend == Backend::Vxlan;
        let established = usual && modes.iter().any(|mode| mode.name == "agent-established");
        Ok(Self {
            nodes: named(NODES) || (all && established && !args.quick),
            programs: named(PROGRAMS) || (all && !args.quick),
            footprint: named(footprint::WORKLOAD).then(|| footprint_pace(args)),
            modes,
            workloads,
            pace: pace(args),
        })
    }

    fn steps(&self) -> usize {
        let programs = if self.programs {
            self.programs_pace().rounds
                * self
                    .modes
                    .iter()
                    .filter(|mode| workload::has_programs(**mode))
                    .count()
        } else {
            0
        };
        let nodes = if self.nodes {
            self.pace.rounds * nodes::COUNTS.len()
        } else {
            0
        };
        samples_of(&self.modes, &self.workloads) * self.pace.rounds
            + programs
            + nodes
            + self.footprint.map_or(0, footprint::steps)
    }

    fn programs_pace(&self) -> Pace {
        Pace {
            rounds: self.pace.rounds.min(3),
            ..self.pace
        }
    }
}

fn family_of(args: &Args) -> Family {
    match args.family {
        FamilyChoice::V4 | FamilyChoice::Both => Family::V4,
        FamilyChoice::V6 => Family::V6,
    }
}

/// What of the arguments does not go together, with an advice.
fn contradiction(args: &Args) -> Option<&'static str> {
    let named = |name: &str| args.workloads.iter().any(|workload| workload == name);
    let usual = args.family == FamilyChoice::V4 && args.backend == Backend::Vxlan;
    if args.family == FamilyChoice::Both && args.guard.is_some() {
        return Some("--guard compares in one family: --family 4 or --family 6");
    }
    if args.backend == Backend::Wireguard {
        return Some("--backend wireguard has no rows: what it costs is the cipher");
    }
    if !usual && (named(NODES) || named(footprint::WORKLOAD)) {
        return Some(
            "nodes and footprint are measured with --family 4 and --backend vxlan alone: leave those two flags out",
        );
    }
    None
}

fn pace(args: &Args) -> Pace {
    let (rounds, millis) = if args.quick { (3, 100) } else { (7, 300) };
    Pace {
        rounds: usize::from(args.rounds.unwrap_or(rounds)),
        length: Duration::from_millis(args.millis.unwrap_or(millis)),
    }
}

fn footprint_pace(args: &Args) -> footprint::Pace {
    let (rounds, seconds) = if args.quick { (1, 20) } else { (3, 60) };
    footprint::Pace {
        rounds: args.rounds.map_or(rounds, usize::from),
        idle: Duration::from_secs(seconds),
    }
}

fn samples_of(modes: &[Mode], workloads: &[Workload]) -> usize {
    workloads
        .iter()
        .map(|workload| modes.iter().filter(|mode| workload.runs_on(**mode)).count())
        .sum()
}

fn measure(args: &Args) -> anyhow::Result<bool> {
    let started = Instant::now();
    let scope = Scope::new(args)?;
    let mut meter = Meter::new(scope.steps());
    let plan = Plan {
        flanneld: args.flanneld.clone(),
        backend: args.backend,
        service_rules: args.service_rules,
        ..Plan::of(family_of(args))
    };
    let mut names: Vec<String> = Vec::new();
    let (mut samples, mut failures) = (Samples::default(), Vec::new());
    if !scope.workloads.is_empty() || scope.programs {
        let mut session = Session::build(&scope.modes, &plan, &mut meter)?;
        for workload in &scope.workloads {
            session.run(workload, scope.pace, &mut meter)?;
            names.extend(workload.rows.iter().map(|(row, _)| (*row).to_owned()));
        }
        if scope.programs {
            names.extend(programs::run(
                &mut session,
                scope.programs_pace(),
                &mut meter,
            )?);
        }
        samples = std::mem::take(&mut session.samples);
        failures = std::mem::take(&mut session.failures);
    }
    let counts: &[u32] = if args.quick {
        &nodes::QUICK_COUNTS
    } else {
        &nodes::COUNTS
    };
    let scaling = if scope.nodes {
        names.extend(counts.iter().map(|count| nodes::row(*count)));
        nodes::run(counts, scope.pace, &mut samples, &mut meter)?
    } else {
        Vec::new()
    };
    if let Some(pace) = scope.footprint {
        names.extend(footprint::rows());
        footprint::run(pace, &mut samples, &mut meter)?;
    }
    meter.finish();
    let mut modes: Vec<String> = scope
        .modes
        .iter()
        .map(|mode| mode.name.to_owned())
        .collect();
    if scope.nodes && !modes.iter().any(|mode| mode == nodes::MODE) {
        modes.push(nodes::MODE.into());
    }
    if scope.footprint.is_some() {
        modes.extend(footprint::modes());
    }
    let mut results = samples.results(
        describe(args, scope.pace, started.elapsed()),
        &names,
        &modes,
    );
    results.ratios.extend(scaling);
    results.limits = footprint::limits(&results);
    finish(args, &results)?;
    for failure in &failures {
        progress(&format!("FAILED: {failure}"));
    }
    Ok(failures.is_empty())
}

fn finish(args: &Args, results: &Results) -> anyhow::Result<()> {
    say(&report::terminal(results));
    if let Some(file) = &args.json {
        let mut text = serde_json::to_string_pretty(results)?;
        text.push('\n');
        fs::write(file, text).with_context(|| format!("write {}", file.display()))?;
    }
    if let Some(dir) = &args.plot {
        let count = plot::write(results, dir)?;
        progress(&format!("{count} pictures in {}", dir.display()));
    }
    progress(&format!("{} s", results.run.seconds));
    Ok(())
}

fn read(file: &Path) -> anyhow::Result<Results> {
    let text = fs::read_to_string(file).with_context(|| format!("read {}", file.display()))?;
    serde_json::from_str(&text).with_context(|| format!("{} is no result", file.display()))
}

fn describe(args: &Args, pace: Pace, took: Duration) -> Run {
    let trimmed = |file: &str| {
        fs::read_to_string(file)
            .unwrap_or_default()
            .trim()
            .to_owned()
    };
    let cpu = trimmed("/proc/cpuinfo")
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
        .map_or_else(
            || std::env::consts::ARCH.to_owned(),
            |(_, name)| name.to_owned(),
        );
    Run {
        family: match family_of(args) {
            Family::V4 => 4,
            Family::V6 => 6,
        },
        beside_v6: args.family == FamilyChoice::Both,
        backend: args.backend.as_str().into(),
        kernel: trimmed("/proc/sys/kernel/osrelease"),
        cpu,
        cpus: std::thread::available_parallelism().map_or(1, usize::from),
        rounds: pace.rounds,
        millis: pace.length.as_millis() as u64,
        service_rules: args.service_rules,
        seconds: took.as_secs(),
    }
}

/// Head against base, side by side.
fn compare(args: &Args, base: &Path) -> anyhow::Result<bool> {
    if !base.exists() {
        bail!("no agent at {}", base.display());
    }
    let pairs: Vec<(Mode, Mode)> = if guard::has_fast_path(base)? {
        mode::GUARD.to_vec()
    } else {
        progress("the base has no fast path: only the stack's path can be compared");
        mode::GUARD.into_iter().take(1).collect()
    };
    let modes: Vec<Mode> = pairs
        .iter()
        .flat_map(|(base, head)| [*base, *head])
        .collect();
    let names: Vec<String> = guard::WORKLOADS
        .iter()
        .map(|(name, _)| (*name).to_owned())
        .collect();
    let workloads = workload::select(&names, false)?;
    let pace = pace(args);
    let mut meter = Meter::new(samples_of(&modes, &workloads) * pace.rounds);
    let plan = Plan {
        base_agent: Some(base.to_owned()),
        backend: args.backend,
        service_rules: args.service_rules,
        ..Plan::of(family_of(args))
    };
    let mut session = Session::build(&modes, &plan, &mut meter)?;
    for workload in &workloads {
        session.run(workload, pace, &mut meter)?;
    }
    meter.finish();
    let names: Vec<(&str, &str)> = pairs
        .iter()
        .map(|(base, head)| (base.name, head.name))
        .collect();
    let findings = guard::findings(&session.samples, &names);
    say(&guard::table(&findings));
    for failure in &session.failures {
        progress(&format!("FAILED: {failure}"));
    }
    Ok(session.failures.is_empty() && !findings.iter().any(guard::Finding::slower))
}
