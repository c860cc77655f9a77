//! What the agent itself takes of a node: memory, the time until it is ready, CPU time and wakeups while nothing happens.

mod process;
mod subject;

use std::{fmt::Write as _, thread, time::Duration};

use serde::{Deserialize, Serialize};

use crate::{
    check_stop,
    cluster::StoreChoice,
    meter::Meter,
    result::{Results, Samples},
};

use process::Usage;
use subject::Subject;

/// The word for `--workloads`.
pub const WORKLOAD: &str = "footprint";
/// Numbers of peers.
pub const COUNTS: [u32; 2] = [10, 5000];
/// What all rows of this kind begin with.
const PREFIX: &str = "footprint_";
/// Before that, what a start has left to do is not idleness.
const SETTLE: Duration = Duration::from_secs(15);
const STEP: Duration = Duration::from_secs(1);

/// Stores, and what the rows of an agent with that store are named.
const STORES: [(StoreChoice, &str); 3] = [
    (StoreChoice::Dir, "agent-dir"),
    (StoreChoice::Etcd, "agent-etcd"),
    (StoreChoice::Kube, "agent-kube"),
];

/// What is measured, with its unit and, where something is promised, the most it may be with few and with many peers.
const QUANTITIES: [Quantity; 9] = [
    Quantity::new("rss", "MB", Some([20.0, 60.0])),
    Quantity::new("anon", "MB", None),
    Quantity::new("peak", "MB", None),
    Quantity::new("ready", "ms", Some([1000.0, 1000.0])),
    Quantity::new("restart", "ms", Some([1000.0, 1000.0])),
    Quantity::new("cpu", "%", Some([0.1, 0.1])),
    Quantity::new("children_cpu", "%", None),
    Quantity::new("wakeups", "wakeups/s", None),
    Quantity::new("threads", "threads", None),
];

#[derive(Clone, Copy, Debug)]
struct Quantity {
    name: &'static str,
    unit: &'static str,
    most: Option<[f64; 2]>,
}

impl Quantity {
    const fn new(name: &'static str, unit: &'static str, most: Option<[f64; 2]>) -> Self {
        Self { name, unit, most }
    }

    fn row(&self, peers: u32) -> String {
        format!("{PREFIX}{}_{peers}", self.name)
    }
}

/// How long and how often.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// Starts, of each kind.
    pub rounds: usize,
    /// For how long the agents are watched doing nothing.
    pub idle: Duration,
}

/// A promise, and what came of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Limit {
    /// Row.
    pub workload: String,
    /// Mode.
    pub mode: String,
    /// Unit.
    pub unit: String,
    /// The most it may be.
    pub most: f64,
    /// What it was: the median.
    pub measured: f64,
    /// Whether it was kept.
    pub kept: bool,
}

/// Names of the rows.
pub fn rows() -> Vec<String> {
    COUNTS
        .iter()
        .flat_map(|peers| QUANTITIES.iter().map(|quantity| quantity.row(*peers)))
        .collect()
}

/// Names of the modes.
pub fn modes() -> Vec<String> {
    STORES.iter().map(|(_, mode)| (*mode).to_owned()).collect()
}

/// Whether a row is one of these.
pub fn is_row(workload: &str) -> bool {
    workload.starts_with(PREFIX)
}

/// Steps that [`run`] takes.
pub fn steps(pace: Pace) -> usize {
    STORES.len() * COUNTS.len() * pace.rounds
}

/// Starts an agent with each store and number of peers, again and again, and watches all of them at rest at the end.
pub fn run(pace: Pace, samples: &mut Samples, meter: &mut Meter) -> anyhow::Result<()> {
    let mut subjects = Vec::new();
    for peers in COUNTS {
        for (store, mode) in STORES {
            check_stop()?;
            meter.stage(&format!("footprint: {mode}, {peers} peers"));
            let mut subject = Subject::new(store, peers)?;
            for round in 0..pace.rounds {
                check_stop()?;
                meter.step(&format!("start {} of {}", round + 1, pace.rounds));
                let mut add = |name: &str, took: Duration| {
                    add(
                        samples,
                        name,
                        (mode, peers),
                        round,
                        took.as_secs_f64() * 1e3,
                    );
                };
                subject.forget()?;
                add("ready", subject.start()?);
                subject.stop()?;
                add("restart", subject.start()?);
            }
            subject.add_pod()?;
            subjects.push((subject, mode, peers));
        }
    }
    meter.stage("footprint: doing nothing");
    rest(SETTLE)?;
    let before: Vec<Usage> = read(&subjects)?;
    rest(pace.idle)?;
    let after: Vec<Usage> = read(&subjects)?;
    for (((_, mode, peers), before), after) in subjects.iter().zip(before).zip(after) {
        let seconds = (after.at - before.at).as_secs_f64();
        let share = |now: Duration, then: Duration| {
            now.saturating_sub(then).as_secs_f64() / seconds * 100.0
        };
        let wakeups = after.wakeups.saturating_sub(before.wakeups) as f64;
        for (name, value) in [
            ("rss", after.rss),
            ("anon", after.anon),
            ("peak", after.peak),
            ("threads", after.threads as f64),
            ("cpu", share(after.cpu, before.cpu)),
            ("children_cpu", share(after.children, before.children)),
            ("wakeups", wakeups / seconds),
        ] {
            add(samples, name, (mode, *peers), 0, value);
        }
    }
    Ok(())
}

fn read(subjects: &[(Subject, &str, u32)]) -> anyhow::Result<Vec<Usage>> {
    subjects
        .iter()
        .map(|(subject, ..)| Usage::of(subject.pid()?))
        .collect()
}

fn add(samples: &mut Samples, name: &str, (mode, peers): (&str, u32), round: usize, value: f64) {
    if let Some(quantity) = QUANTITIES.iter().find(|quantity| quantity.name == name) {
        samples.add(&quantity.row(peers), quantity.unit, mode, round, value);
    }
}

/// Waits in short steps, so that Ctrl-C is heard.
fn rest(length: Duration) -> anyhow::Result<()> {
    let mut left = length;
    while !left.is_zero() {
        check_stop()?;
        let step = left.min(STEP);
        thread::sleep(step);
        left -= step;
    }
    Ok(())
}

/// What came of the promises.
pub fn limits(results: &Results) -> Vec<Limit> {
    let mut limits = Vec::new();
    for (at, peers) in COUNTS.into_iter().enumerate() {
        for quantity in QUANTITIES {
            let Some(most) = quantity.most.and_then(|most| most.get(at).copied()) else {
                continue;
            };
            for (_, mode) in STORES {
                let workload = quantity.row(peers);
                let Some(row) = results.row(&workload, mode) else {
                    continue;
                };
                limits.push(Limit {
                    mode: mode.to_owned(),
                    unit: row.unit.clone(),
                    most,
                    measured: row.median,
                    kept: row.median < most,
                    workload,
                });
            }
        }
    }
    limits
}

/// The rows as one Markdown table, a line for each quantity and number of peers; empty without them.
pub fn table(results: &Results) -> String {
    let mut text = String::new();
    for peers in COUNTS {
        for quantity in QUANTITIES {
            let workload = quantity.row(peers);
            let cells: Vec<String> = STORES
                .iter()
                .filter_map(|(_, mode)| results.row(&workload, mode))
                .map(|row| crate::report::number(row.median))
                .collect();
            if cells.len() != STORES.len() {
                continue;
            }
            let limit = results
                .limits
                .iter()
                .filter(|limit| limit.workload == workload);
            let (most, verdict) = limit.fold((String::new(), ""), |(_, verdict), limit| {
                let kept = if limit.kept && verdict != "missed" {
                    "reached"
                } else {
                    "missed"
                };
                (format!("below {}", crate::report::number(limit.most)), kept)
            });
            // Writing to a string does not fail.
            let _ok = writeln!(
                text,
                "| {} | {peers} | {} | {} | {most} | {verdict} |",
                quantity.name,
                quantity.unit,
                cells.join(" | ")
            );
        }
    }
    if text.is_empty() {
        return text;
    }
    let names: Vec<&str> = STORES.iter().map(|(_, mode)| *mode).collect();
    format!(
        "\n| what | peers | unit | {} | goal | |\n|---|--:|---|{}---|---|\n{text}",
        names.join(" | "),
        "--:|".repeat(names.len())
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::result::Run;

    fn results(rss: f64) -> Results {
        let mut samples = Samples::default();
        for (_, mode) in STORES {
            add(&mut samples, "rss", (mode, 10), 0, rss);
            add(&mut samples, "threads", (mode, 10), 0, 3.0);
        }
        let mut results = samples.results(Run::default(), &rows(), &modes());
        results.limits = limits(&results);
        results
    }

    #[test]
    fn promises_stand_beside_what_was_measured() {
        let kept = results(17.5);
        assert_eq!(kept.limits.len(), 3);
        assert!(
            kept.limits
                .iter()
                .all(|limit| limit.kept && limit.workload == "footprint_rss_10")
        );
        let text = table(&kept);
        assert!(
            text.contains("| rss | 10 | MB | 17.5 | 17.5 | 17.5 | below 20.0 | reached |"),
            "{text}"
        );
        assert!(
            text.contains("| threads | 10 | threads | 3.00 | 3.00 | 3.00 |  |  |"),
            "{text}"
        );
        let missed = results(20.5);
        assert!(missed.limits.iter().all(|limit| !limit.kept));
        assert!(table(&missed).contains("| below 20.0 | missed |"));
    }

    #[test]
    fn what_was_not_measured_is_not_judged() {
        let none = Samples::default().results(Run::default(), &rows(), &modes());
        assert!(limits(&none).is_empty());
        assert!(table(&none).is_empty());
        assert!(rows().iter().all(|row| is_row(row)));
    }
}
