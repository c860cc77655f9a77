//! Whether this agent is slower than another, side by side in one run.

use std::{fmt::Write as _, path::Path, process::Command};

use anyhow::Context as _;

use crate::result::{Ratio, Samples};

/// How much slower it may be, by workload: costs repeat well, throughput over two CPUs does not.
pub const WORKLOADS: [(&str, f64); 5] = [
    ("tcp_rr", 0.03),
    ("tcp_crr", 0.05),
    ("udp_rr", 0.03),
    ("udp64", 0.03),
    ("tcp_stream_mtu", 0.10),
];

/// One comparison.
#[derive(Clone, Debug)]
pub struct Finding {
    /// Head divided by base.
    pub ratio: Ratio,
    /// How much slower it may be.
    pub margin: f64,
}

impl Finding {
    /// Whether head is slower by more than the margin, and so sure of it that the whole interval says so.
    pub fn slower(&self) -> bool {
        self.ratio.hi < 1.0 - self.margin
    }
}

/// Whether an agent knows `--bpf-fast-path`; those of earlier versions do not.
pub fn has_fast_path(agent: &Path) -> anyhow::Result<bool> {
    let help = Command::new(agent)
        .arg("--help")
        .output()
        .with_context(|| format!("run {} --help", agent.display()))?;
    Ok(String::from_utf8_lossy(&help.stdout).contains("--bpf-fast-path"))
}

/// Compares head with base in all that both did.
pub fn findings(samples: &Samples, pairs: &[(&str, &str)]) -> Vec<Finding> {
    pairs
        .iter()
        .flat_map(|(base, head)| {
            WORKLOADS.iter().filter_map(move |(workload, margin)| {
                Some(Finding {
                    ratio: samples.ratio(workload, head, base)?,
                    margin: *margin,
                })
            })
        })
        .collect()
}

/// A line for each.
pub fn table(findings: &[Finding]) -> String {
    let mut text = String::from("head divided by base, median and 95 % interval\n");
    for finding in findings {
        let Ratio {
            workload,
            of,
            median,
            lo,
            hi,
            ..
        } = &finding.ratio;
        // Writing to a string does not fail.
        let _ok = writeln!(
            text,
            "{workload:16} {of:20} {median:6.3}  [{lo:.3}, {hi:.3}]  {} (margin {:.0} %)",
            if finding.slower() { "SLOWER" } else { "ok" },
            finding.margin * 100.0
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finding(head: [f64; 5]) -> Finding {
        let mut samples = Samples::default();
        for (round, head) in head.into_iter().enumerate() {
            samples.add("tcp_rr", "1/s", "base", round, 100.0);
            samples.add("tcp_rr", "1/s", "head", round, head);
        }
        let mut found = findings(&samples, &[("base", "head")]);
        assert_eq!(found.len(), 1);
        found.remove(0)
    }

    #[test]
    fn slower_by_more_than_the_margin_is_found() {
        assert!(finding([94.0, 95.0, 94.5, 95.5, 94.0]).slower());
    }

    #[test]
    fn noise_and_gains_are_no_regression() {
        assert!(!finding([99.0, 98.5, 101.0, 99.5, 100.0]).slower());
        assert!(!finding([130.0, 131.0, 129.0, 130.0, 130.0]).slower());
        // Slower in the median, but one run of chance away from being equal.
        assert!(!finding([95.0, 94.0, 100.0, 101.0, 95.0]).slower());
    }
}
