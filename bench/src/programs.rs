//! What the programs themselves take, as the kernel counts it.
//!
//! Counting costs some 20 ns a run and is on only here, away from all other measurements.

use std::collections::BTreeMap;

use anyhow::Context as _;
use aya::sys::{Stats, enable_stats};
use flannel_testkit::{Netns, json};

use crate::{
    check_stop,
    meter::Meter,
    session::{Pace, Session},
    workload::{self, Load},
};

/// Fewer runs say nothing.
const FEWEST_RUNS: u64 = 1000;

/// Name, runs and nanoseconds, by number of the program.
type Account = BTreeMap<u64, (String, u64, u64)>;

/// Sends packets and exchanges bytes on every mode that has programs, and adds a row `prog_<name>` for each.
pub fn run(session: &mut Session, pace: Pace, meter: &mut Meter) -> anyhow::Result<Vec<String>> {
    let chosen = workload::select(&["udp64".to_owned(), "tcp_rr".to_owned()], false)?;
    let load = Load {
        length: pace.length,
        half_rate: 0.0,
    };
    let _on = enable_stats(Stats::RunTime).context("have the kernel count the programs' time")?;
    meter.stage("programs");
    let mut rows = Vec::new();
    let mut found = Vec::new();
    for round in 0..pace.rounds {
        for rig in session
            .rigs()
            .iter()
            .filter(|rig| workload::has_programs(rig.mode))
        {
            check_stop()?;
            meter.step(rig.mode.name);
            let before = account(&rig.client.ns)?;
            for workload in &chosen {
                workload.sample(rig, &load)?;
            }
            for (name, cost) in costs(&before, &account(&rig.client.ns)?) {
                found.push((format!("prog_{name}"), rig.mode.name, round, cost));
            }
        }
    }
    for (row, mode, round, cost) in found {
        session.samples.add(&row, "ns", mode, round, cost);
        if !rows.contains(&row) {
            rows.push(row);
        }
    }
    rows.sort();
    Ok(rows)
}

fn account(ns: &Netns) -> anyhow::Result<Account> {
    let programs = json::bpftool_json(ns, &["prog", "show"])?;
    let entry = |program: &serde_json::Value| {
        let name = program["name"].as_str()?.to_owned();
        // Absent until the program has run.
        let count = |key: &str| program[key].as_u64().unwrap_or(0);
        Some((
            program["id"].as_u64()?,
            (name, count("run_cnt"), count("run_time_ns")),
        ))
    };
    let programs = programs.as_array().into_iter().flatten();
    Ok(programs.filter_map(entry).collect())
}

/// Nanoseconds a run, by name: the programs of one name, on both nodes, together.
fn costs(before: &Account, after: &Account) -> BTreeMap<String, f64> {
    let mut sums: BTreeMap<String, (u64, u64)> = BTreeMap::new();
    for (id, (name, runs, time)) in after {
        let (runs_before, time_before) = before
            .get(id)
            .map_or((0, 0), |(_, runs, time)| (*runs, *time));
        let sum = sums.entry(name.clone()).or_default();
        sum.0 += runs.saturating_sub(runs_before);
        sum.1 += time.saturating_sub(time_before);
    }
    sums.into_iter()
        .filter(|(_, (runs, _))| *runs >= FEWEST_RUNS)
        .map(|(name, (runs, time))| (name, time as f64 / runs as f64))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_ran_meanwhile_counts() {
        let entry = |name: &str, runs, time| (name.to_owned(), runs, time);
        let before = Account::from([(1, entry("from_pod", 100, 1_000)), (3, entry("idle", 9, 9))]);
        let after = Account::from([
            (1, entry("from_pod", 2_100, 101_000)),
            (2, entry("from_pod", 2_000, 300_000)),
            (3, entry("idle", 10, 10)),
        ]);
        let costs = costs(&before, &after);
        assert_eq!(costs, BTreeMap::from([("from_pod".to_owned(), 100.0)]));
    }
}
