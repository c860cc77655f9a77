//! A run as tables: for the terminal, and as Markdown for `docs/performance.md`.

use std::fmt::Write as _;

use crate::{
    footprint, nodes,
    result::{BASES, Families, Results, base_of, less_is_better},
};

/// Something promised: a workload's ratio of two modes.
#[derive(Clone, Copy, Debug)]
pub struct Goal {
    /// Numerator.
    pub of: &'static str,
    /// Workload.
    pub workload: &'static str,
    /// Denominator.
    pub to: &'static str,
    /// Least ratio; of times and costs, the most.
    pub ratio: f64,
}

const KERNEL: &str = BASES[0];
const LIMIT: &str = BASES[1];

const fn goal(of: &'static str, workload: &'static str, to: &'static str, ratio: f64) -> Goal {
    Goal {
        of,
        workload,
        to,
        ratio,
    }
}

/// What the fast path is to reach.
pub const GOALS: [Goal; 35] = [
    goal("agent-established", "udp64", KERNEL, 3.4),
    goal("agent-established", "udp64", LIMIT, 0.93),
    goal("agent-established", "tcp_rr", KERNEL, 1.95),
    goal("agent-established", "tcp_rr", LIMIT, 0.95),
    goal("agent-established", "udp_rr", KERNEL, 2.05),
    goal("agent-established", "udp_rr", LIMIT, 0.95),
    goal("agent-established", "tcp_crr", KERNEL, 1.5),
    goal("agent-syn", "tcp_crr", KERNEL, 2.3),
    goal("agent-syn", "tcp_crr", LIMIT, 0.93),
    goal("agent-established", "tcp_stream", KERNEL, 1.0),
    goal("agent-established", "tcp_stream", LIMIT, 0.95),
    goal("agent-established", "tcp_stream_mtu", KERNEL, 1.15),
    goal("agent-established", "tcp_stream_mtu", LIMIT, 0.95),
    goal("agent-syn", "tcp_stream", KERNEL, 1.0),
    goal("agent-syn", "tcp_stream", LIMIT, 0.95),
    goal("agent-syn", "tcp_stream_mtu", KERNEL, 1.15),
    goal("agent-syn", "tcp_stream_mtu", LIMIT, 0.95),
    goal("agent-stack", "udp64", KERNEL, 1.35),
    goal("agent-stack", "tcp_rr", KERNEL, 1.2),
    goal("agent-stack", "udp_rr", KERNEL, 1.2),
    goal("agent-stack", "tcp_crr", KERNEL, 1.3),
    goal("agent-stack", "tcp_stream", KERNEL, 1.0),
    goal("agent-stack", "tcp_stream_mtu", KERNEL, 1.0),
    goal("agent-established", "tcp_rr", "agent-syn", 0.97),
    goal("agent-established", "udp64", "agent-syn", 0.97),
    goal("agent-kernel", "tcp_rr", KERNEL, 0.98),
    goal("agent-kernel", "tcp_crr", KERNEL, 0.98),
    goal("agent-kernel", "udp64", KERNEL, 0.98),
    goal("agent-kernel", "tcp_stream", KERNEL, 0.98),
    goal("agent-established", "flows_100k", KERNEL, 1.0),
    goal("agent-syn", "flows_100k", KERNEL, 1.0),
    goal("agent-stack", "flows_100k", KERNEL, 1.0),
    goal("nodes_256", "nodes", "nodes_1", 0.97),
    goal("nodes_4096", "nodes", "nodes_1", 0.97),
    goal("nodes_65536", "nodes", "nodes_1", 0.97),
];

/// What became of a goal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The median is there.
    Reached,
    /// The median is short of it, the interval is not.
    Undecided,
    /// The whole interval is short of it.
    Missed,
    /// Nothing was measured.
    Unknown,
}

impl Outcome {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Reached => "reached",
            Self::Undecided => "missed, within the interval",
            Self::Missed => "missed",
            Self::Unknown => "not measured",
        }
    }
}

impl Goal {
    /// What a run says about it.
    pub fn outcome(&self, results: &Results) -> Outcome {
        match results.ratio(self.workload, self.of, self.to) {
            None => Outcome::Unknown,
            Some(ratio) if ratio.median >= self.ratio => Outcome::Reached,
            Some(ratio) if ratio.hi >= self.ratio => Outcome::Undecided,
            Some(_) => Outcome::Missed,
        }
    }
}

/// The whole run as Markdown.
pub fn markdown(results: &Results) -> String {
    let run = &results.run;
    let mut text = format!(
        "Linux {}, {} CPUs ({}), {} rounds of {} ms, kube-proxy rules for {} services in the modes with rules, {} min {} s.\n",
        run.kernel,
        run.cpus,
        run.cpu,
        run.rounds,
        run.millis,
        run.service_rules,
        run.seconds / 60,
        run.seconds % 60
    );
    push(&mut text, "\n### Goals\n");
    push(&mut text, &goals(results));
    if !results.families.is_empty() {
        push(&mut text, "\n### Families\n");
        push(&mut text, &families_table(results));
    }
    push(&mut text, "\n### Medians\n");
    let others = results.workloads().into_iter();
    for workload in others.filter(|workload| !footprint::is_row(workload)) {
        push(&mut text, &workload_table(results, workload));
    }
    let footprint = footprint::table(results);
    if !footprint.is_empty() {
        push(&mut text, "\n### Footprint\n");
        push(&mut text, &footprint);
    }
    text
}

fn goals(results: &Results) -> String {
    let mut text = String::from(
        "\n| mode | workload | compared with | goal | measured | 95 % interval | |\n|---|---|---|--:|--:|---|---|\n",
    );
    for goal in GOALS {
        let measured = results.ratio(goal.workload, goal.of, goal.to).map_or_else(
            || "| |".to_owned(),
            |ratio| format!("{:.2} | {:.2} to {:.2}", ratio.median, ratio.lo, ratio.hi),
        );
        let measured = if measured == "| |" {
            " | ".to_owned()
        } else {
            measured
        };
        push(
            &mut text,
            &format!(
                "| {} | {} | {} | {:.2} | {measured} | {} |\n",
                goal.of,
                goal.workload,
                goal.to,
                goal.ratio,
                goal.outcome(results).as_str()
            ),
        );
    }
    push(&mut text, &tail_goal(results));
    text
}

/// The tail of the fast path against the middle of the kernel's: two different rows, so no ratio by round.
fn tail_goal(results: &Results) -> String {
    let (Some(tail), Some(middle)) = (
        results.row("tcp_rr_p99", "agent-established"),
        results.row("tcp_rr_p50", KERNEL),
    ) else {
        return format!(
            "| agent-established p99 | latency at half load | {KERNEL} p50 | below | | | not measured |\n"
        );
    };
    let outcome = if tail.median < middle.median {
        Outcome::Reached
    } else {
        Outcome::Missed
    };
    format!(
        "| agent-established p99 | latency at half load | {KERNEL} p50 | below | {:.1} us, {:.1} us | | {} |\n",
        tail.median,
        middle.median,
        outcome.as_str()
    )
}

fn workload_table(results: &Results, workload: &str) -> String {
    let unit = results
        .rows
        .iter()
        .find(|row| row.workload == workload)
        .map_or("", |row| row.unit.as_str());
    let direction = if less_is_better(unit) {
        ", less is better"
    } else {
        ""
    };
    let [base, limit] = results.run.bases();
    let mut text = format!(
        "\n**{workload}** ({unit}{direction})\n\n| mode | median | lowest | highest | vs {base} | vs {limit} |\n|---|--:|--:|--:|--:|--:|\n"
    );
    for mode in results.modes() {
        let Some(row) = results.row(workload, mode) else {
            continue;
        };
        push(
            &mut text,
            &format!(
                "| {mode} | {} | {} | {} | {} | {} |\n",
                number(row.median),
                number(row.min),
                number(row.max),
                against(results, workload, mode, base),
                against(results, workload, mode, limit)
            ),
        );
    }
    text
}

fn against(results: &Results, workload: &str, of: &str, base: &str) -> String {
    let to = base_of(of, base);
    if of == to && results.row(workload, of).is_some() {
        return "1".into();
    }
    results
        .ratio(workload, of, &to)
        .map_or_else(String::new, |ratio| {
            format!("{:.2} ({:.2} to {:.2})", ratio.median, ratio.lo, ratio.hi)
        })
}

/// What IPv6's ratio may be short of IPv4's.
const FAMILIES: f64 = 0.95;

/// IPv6 against IPv4, in a run that has both; else nothing.
fn families_table(results: &Results) -> String {
    let mut text = String::new();
    if results.families.is_empty() {
        return text;
    }
    push(
        &mut text,
        "\n| mode | workload | IPv6 to IPv4, each against its own base | 95 % interval | |\n|---|---|--:|---|---|\n",
    );
    for found in &results.families {
        push(
            &mut text,
            &format!(
                "| {} | {} | {:.2} | {:.2} to {:.2} | {} |\n",
                found.mode,
                found.workload,
                found.median,
                found.lo,
                found.hi,
                verdict(results, found)
            ),
        );
    }
    text
}

/// What a family row says about the agent; of other modes it says what the kernel does.
fn verdict(results: &Results, found: &Families) -> &'static str {
    if !found.mode.starts_with("agent-") {
        return "";
    }
    let unit = results
        .row(&found.workload, &found.mode)
        .map_or("", |row| row.unit.as_str());
    let (median, best) = if less_is_better(unit) {
        (1.0 / found.median, 1.0 / found.lo)
    } else {
        (found.median, found.hi)
    };
    let outcome = if median >= FAMILIES {
        Outcome::Reached
    } else if best >= FAMILIES {
        Outcome::Undecided
    } else {
        Outcome::Missed
    };
    outcome.as_str()
}

/// The run for a terminal.
pub fn terminal(results: &Results) -> String {
    let [base, limit] = results.run.bases();
    let mut text = footprint::table(results);
    let others = results.workloads().into_iter();
    for workload in others.filter(|workload| !footprint::is_row(workload)) {
        let row = results.rows.iter().find(|row| row.workload == workload);
        let unit = row.map_or("", |row| row.unit.as_str());
        push(
            &mut text,
            &format!(
                "\n{:28} {:>12} {:>9}   {:>24} {:>24}\n",
                format!("{workload} [{unit}]"),
                "median",
                "spread",
                format!("vs {base}"),
                format!("vs {limit}")
            ),
        );
        for mode in results.modes() {
            let Some(row) = results.row(workload, mode) else {
                continue;
            };
            let spread = (row.max - row.min) / row.median * 50.0;
            push(
                &mut text,
                &format!(
                    "  {mode:26} {:>12} {:>7.1} %   {:>24} {:>24}\n",
                    number(row.median),
                    spread,
                    against(results, workload, mode, base),
                    against(results, workload, mode, limit)
                ),
            );
        }
    }
    let first = nodes::row(1);
    for ratio in results
        .ratios
        .iter()
        .filter(|ratio| ratio.workload == "nodes")
    {
        push(
            &mut text,
            &format!(
                "\n{} vs {first}: {:.3} ({:.3} to {:.3})",
                ratio.of, ratio.median, ratio.lo, ratio.hi
            ),
        );
    }
    push(&mut text, &families_table(results));
    push(
        &mut text,
        &format!(
            "\nMedians of {} rounds of {} ms, modes taking turns in each; spread is half of the range; ratios are medians of the ratios \
             round by round, with their 95 % interval.\n",
            results.run.rounds, results.run.millis
        ),
    );
    text
}

/// Four digits that matter, and no more than there are.
pub(crate) fn number(value: f64) -> String {
    let digits = if value.abs() >= 1000.0 {
        0
    } else if value.abs() >= 10.0 {
        1
    } else if value.abs() >= 1.0 {
        2
    } else {
        4
    };
    let text = format!("{value:.digits$}");
    if digits > 0 || text.len() <= 3 {
        return text;
    }
    let mut grouped = String::new();
    for (index, digit) in text.chars().enumerate() {
        if index > 0 && (text.len() - index).is_multiple_of(3) && digit != '-' {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

fn push(text: &mut String, more: &str) {
    // Writing to a string does not fail.
    let _ok = text.write_str(more);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::result::{Run, Samples};

    fn results(established: f64) -> Results {
        let mut samples = Samples::default();
        for round in 0..5 {
            let noise = f64::from(u8::try_from(round).unwrap_or(0)) * 0.2;
            samples.add("udp64", "1/s", KERNEL, round, 100.0);
            samples.add(
                "udp64",
                "1/s",
                "agent-established",
                round,
                established + noise,
            );
        }
        let modes = [KERNEL.to_owned(), "agent-established".to_owned()];
        samples.results(Run::default(), &["udp64".to_owned()], &modes)
    }

    #[test]
    fn goals_are_judged_by_the_median_and_its_interval() {
        let goal = GOALS[0];
        assert_eq!(goal.outcome(&results(350.0)), Outcome::Reached);
        assert_eq!(goal.outcome(&results(339.5)), Outcome::Undecided);
        assert_eq!(goal.outcome(&results(300.0)), Outcome::Missed);
        assert_eq!(GOALS[1].outcome(&results(300.0)), Outcome::Unknown);
    }

    #[test]
    fn every_table_row_has_the_columns_of_its_head() {
        let text = markdown(&results(350.0));
        let mut columns = 0;
        for line in text.lines() {
            let bars = line.matches('|').count();
            if !line.starts_with('|') {
                columns = 0;
            } else if columns == 0 {
                columns = bars;
            }
            assert!(!line.starts_with('|') || bars == columns, "{line}");
        }
        assert!(text.contains("| agent-established | udp64 | kernel-vxlan-ct | 3.40 | 3.50 | 3.50 to 3.51 | reached |"), "{text}");
    }

    #[test]
    fn numbers_are_short() {
        for (value, text) in [
            (0.0523, "0.0523"),
            (7.25, "7.25"),
            (117.46, "117.5"),
            (1_234_567.0, "1,234,567"),
            (143_866.4, "143,866"),
        ] {
            assert_eq!(number(value), text);
        }
    }
}
