//! What a run found, and the file it is kept in.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{footprint::Limit, mode::V6_SUFFIX, stats};

/// What every mode is compared with: flannel as it is today, and no overlay at all.
pub const BASES: [&str; 2] = ["kernel-vxlan-ct", "bpf-no-overlay"];

/// The same where agents route without a tunnel.
pub const BASES_HOST_GW: [&str; 2] = ["host-gw-ct", "bpf-no-overlay"];

/// What a mode is compared with instead of `base`: the base of its own family.
pub fn base_of(mode: &str, base: &str) -> String {
    let suffix = if mode.ends_with(V6_SUFFIX) {
        V6_SUFFIX
    } else {
        ""
    };
    format!("{base}{suffix}")
}

/// Values by workload and mode, one a round.
#[derive(Clone, Debug, Default)]
pub struct Samples {
    units: BTreeMap<String, String>,
    values: BTreeMap<(String, String), Vec<Option<f64>>>,
}

impl Samples {
    /// Takes note of what `mode` did in round `round` of `workload`.
    pub fn add(&mut self, workload: &str, unit: &str, mode: &str, round: usize, value: f64) {
        self.units.insert(workload.into(), unit.into());
        let values = self
            .values
            .entry((workload.into(), mode.into()))
            .or_default();
        if values.len() <= round {
            values.resize(round + 1, None);
        }
        values[round] = Some(value);
    }

    /// The values of all rounds.
    pub fn of(&self, workload: &str, mode: &str) -> &[Option<f64>] {
        self.values
            .get(&(workload.to_owned(), mode.to_owned()))
            .map_or(&[], Vec::as_slice)
    }

    /// Medians and ratios, workloads and modes in the given orders.
    pub fn results(&self, run: Run, workloads: &[String], modes: &[String]) -> Results {
        let mut results = Results {
            run,
            rows: Vec::new(),
            ratios: Vec::new(),
            families: Vec::new(),
            limits: Vec::new(),
        };
        for workload in workloads {
            for mode in modes {
                results.rows.extend(self.row(workload, mode));
            }
            for base in results.run.bases() {
                for of in modes {
                    let to = base_of(of, base);
                    if *of != to {
                        results.ratios.extend(self.ratio(workload, of, &to));
                    }
                }
            }
            let base = results.run.bases()[0];
            for mode in modes.iter().filter(|mode| mode.as_str() != base) {
                results.families.extend(self.families(workload, mode, base));
            }
            for (of, to) in PAIRS {
                results.ratios.extend(self.ratio(workload, of, to));
            }
        }
        results
    }

    fn row(&self, workload: &str, mode: &str) -> Option<Row> {
        let values: Vec<f64> = self.of(workload, mode).iter().flatten().copied().collect();
        (!values.is_empty()).then(|| Row {
            mode: mode.into(),
            workload: workload.into(),
            unit: self.units.get(workload).cloned().unwrap_or_default(),
            median: stats::median(&values),
            min: stats::quantile(&values, 0.0),
            max: stats::quantile(&values, 1.0),
            samples: values.len(),
        })
    }

    /// How a mode does over IPv6 compared with IPv4, each measured by its family's base, in rounds that had all four.
    fn families(&self, workload: &str, mode: &str, base: &str) -> Option<Families> {
        let over_v6 = |name: &str| format!("{name}{V6_SUFFIX}");
        let v4 = by_round(self.of(workload, mode), self.of(workload, base));
        let v6 = by_round(
            self.of(workload, &over_v6(mode)),
            self.of(workload, &over_v6(base)),
        );
        let ratios = stats::ratios(&v6, &v4);
        (!ratios.is_empty()).then(|| {
            let interval = stats::interval(&ratios);
            Families {
                workload: workload.into(),
                mode: mode.into(),
                base: base.into(),
                median: interval.median,
                lo: interval.lo,
                hi: interval.hi,
            }
        })
    }

    /// The median of the ratios round by round, if the two ever met in one round.
    pub fn ratio(&self, workload: &str, of: &str, to: &str) -> Option<Ratio> {
        let ratios = stats::ratios(self.of(workload, of), self.of(workload, to));
        (!ratios.is_empty()).then(|| {
            let interval = stats::interval(&ratios);
            Ratio {
                workload: workload.into(),
                of: of.into(),
                to: to.into(),
                median: interval.median,
                lo: interval.lo,
                hi: interval.hi,
            }
        })
    }
}

/// The ratios of the rounds that have both.
fn by_round(of: &[Option<f64>], to: &[Option<f64>]) -> Vec<Option<f64>> {
    of.iter()
        .zip(to)
        .map(|(of, to)| stats::ratios(&[*of], &[*to]).first().copied())
        .collect()
}

/// Further pairs that something is promised about.
const PAIRS: [(&str, &str); 7] = [
    ("agent-established", "agent-syn"),
    ("agent-established", "host-gw-ct"),
    ("agent-syn", "host-gw-ct"),
    ("kernel-vxlan-ct-2000", "kernel-vxlan-ct"),
    ("agent-established-2000", "kernel-vxlan-ct-2000"),
    ("agent-syn-2000", "kernel-vxlan-ct-2000"),
    ("agent-kernel", "flanneld"),
];

/// One run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Results {
    /// Where and how.
    pub run: Run,
    /// What each mode did.
    pub rows: Vec<Row>,
    /// How modes compare.
    pub ratios: Vec<Ratio>,
    /// How IPv6 compares with IPv4, in a run that has both.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub families: Vec<Families>,
    /// What is promised of the agent itself.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub limits: Vec<Limit>,
}

/// Where and how a run was made.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    /// Address family, 4 or 6.
    #[serde(default = "four")]
    pub family: u8,
    /// Whether the same modes were measured over IPv6 beside it, under names that end in `-v6`.
    #[serde(default)]
    pub beside_v6: bool,
    /// The agents' backend.
    #[serde(default = "vxlan")]
    pub backend: String,
    /// Kernel release.
    pub kernel: String,
    /// Processor, as it names itself.
    pub cpu: String,
    /// Number of CPUs.
    pub cpus: usize,
    /// Rounds.
    pub rounds: usize,
    /// Length of one measurement in milliseconds.
    pub millis: u64,
    /// Services that kube-proxy's rules are made for in the modes that have such rules.
    pub service_rules: u32,
    /// Seconds that it took.
    pub seconds: u64,
}

impl Run {
    /// What every mode is compared with.
    pub fn bases(&self) -> [&'static str; 2] {
        if self.backend == "host-gw" {
            BASES_HOST_GW
        } else {
            BASES
        }
    }
}

/// The family of files that do not say it.
const fn four() -> u8 {
    4
}

/// The backend of files that do not say it.
fn vxlan() -> String {
    "vxlan".into()
}

/// What a mode did in a workload, over all rounds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// Mode.
    pub mode: String,
    /// Workload.
    pub workload: String,
    /// Unit of the values.
    pub unit: String,
    /// Median.
    pub median: f64,
    /// Lowest.
    pub min: f64,
    /// Highest.
    pub max: f64,
    /// Number of rounds measured.
    pub samples: usize,
}

/// A mode over IPv6 compared with the same over IPv4, each as a ratio to its own family's base: 1 means that the agent is worth as much.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Families {
    /// Workload.
    pub workload: String,
    /// Mode, by its name over IPv4.
    pub mode: String,
    /// Base, by its name over IPv4.
    pub base: String,
    /// Median.
    pub median: f64,
    /// Lower end of the 95 % interval.
    pub lo: f64,
    /// Upper end.
    pub hi: f64,
}

/// The ratio of two modes, `of` divided by `to`: median of the ratios round by round, with its 95 % interval.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ratio {
    /// Workload.
    pub workload: String,
    /// Numerator.
    pub of: String,
    /// Denominator.
    pub to: String,
    /// Median.
    pub median: f64,
    /// Lower end.
    pub lo: f64,
    /// Upper end.
    pub hi: f64,
}

impl Results {
    /// Workloads in the order of the rows.
    pub fn workloads(&self) -> Vec<&str> {
        distinct(self.rows.iter().map(|row| row.workload.as_str()))
    }

    /// Modes in the order of the rows.
    pub fn modes(&self) -> Vec<&str> {
        distinct(self.rows.iter().map(|row| row.mode.as_str()))
    }

    /// The row of a mode in a workload.
    pub fn row(&self, workload: &str, mode: &str) -> Option<&Row> {
        self.rows
            .iter()
            .find(|row| row.workload == workload && row.mode == mode)
    }

    /// A ratio, if it was measured.
    pub fn ratio(&self, workload: &str, of: &str, to: &str) -> Option<&Ratio> {
        self.ratios
            .iter()
            .find(|ratio| ratio.workload == workload && ratio.of == of && ratio.to == to)
    }
}

/// Whether less is better, by unit: times and costs, not rates.
pub fn less_is_better(unit: &str) -> bool {
    matches!(
        unit,
        "us" | "ns" | "ms" | "s" | "MB" | "%" | "wakeups/s" | "threads"
    )
}

fn distinct<'a>(names: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let mut seen = Vec::new();
    for name in names {
        if !seen.contains(&name) {
            seen.push(name);
        }
    }
    seen
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples() -> Samples {
        let mut samples = Samples::default();
        // The machine is half as fast in the second round: the ratio does not care.
        for (round, speed) in [1.0, 0.5, 1.0].into_iter().enumerate() {
            samples.add("udp64", "1/s", "kernel-vxlan-ct", round, 100.0 * speed);
            samples.add("udp64", "1/s", "agent-established", round, 300.0 * speed);
        }
        samples
    }

    fn results() -> Results {
        let modes = ["kernel-vxlan-ct".to_owned(), "agent-established".to_owned()];
        samples().results(Run::default(), &["udp64".to_owned()], &modes)
    }

    #[test]
    fn rows_hold_median_and_range_and_ratios_are_by_round() {
        let results = results();
        let row = results.row("udp64", "kernel-vxlan-ct").expect("a row");
        assert_eq!(
            (row.median, row.min, row.max, row.samples),
            (100.0, 50.0, 100.0, 3)
        );
        let ratio = results.ratio("udp64", "agent-established", "kernel-vxlan-ct");
        let ratio = ratio.expect("a ratio");
        assert_eq!((ratio.median, ratio.lo, ratio.hi), (3.0, 3.0, 3.0));
        assert_eq!(results.ratios.len(), 1);
    }

    #[test]
    fn families_are_compared_by_what_each_gains_over_its_own_base() {
        let mut samples = samples();
        for (round, speed) in [0.4, 0.8, 0.6].into_iter().enumerate() {
            samples.add("udp64", "1/s", "kernel-vxlan-ct-v6", round, 100.0 * speed);
            samples.add("udp64", "1/s", "agent-established-v6", round, 285.0 * speed);
        }
        let modes = ["kernel-vxlan-ct", "agent-established"];
        let modes: Vec<String> = modes
            .iter()
            .flat_map(|mode| [(*mode).to_owned(), format!("{mode}-v6")])
            .collect();
        let results = samples.results(Run::default(), &["udp64".to_owned()], &modes);
        let [found] = results.families.as_slice() else {
            panic!("{:?}", results.families);
        };
        assert_eq!(
            (&*found.mode, &*found.base),
            ("agent-established", "kernel-vxlan-ct")
        );
        assert!((found.median - 0.95).abs() < 1e-9, "{found:?}");
        // Nothing is compared with the base of the other family.
        let ratio = results.ratio("udp64", "agent-established-v6", "kernel-vxlan-ct-v6");
        assert!(ratio.is_some_and(|ratio| (ratio.median - 2.85).abs() < 1e-9));
        assert!(
            results
                .ratio("udp64", "agent-established-v6", "kernel-vxlan-ct")
                .is_none()
        );
    }

    #[test]
    fn the_file_has_the_promised_names() {
        let json = serde_json::to_value(results()).expect("JSON");
        let keys = |value: &serde_json::Value| {
            let object = value.as_object().expect("an object");
            object.keys().cloned().collect::<Vec<_>>()
        };
        assert_eq!(
            keys(&json["rows"][0]),
            [
                "max", "median", "min", "mode", "samples", "unit", "workload"
            ]
        );
        assert_eq!(
            keys(&json["ratios"][0]),
            ["hi", "lo", "median", "of", "to", "workload"]
        );
        assert_eq!(json["rows"][0]["mode"], "kernel-vxlan-ct");
        assert_eq!(json["rows"][0]["samples"], 3);
        let back: Results = serde_json::from_value(json).expect("the same");
        assert_eq!(back, results());
    }

    #[test]
    fn what_was_not_measured_has_no_row_and_no_ratio() {
        let mut samples = samples();
        samples.add("tcp_rr", "1/s", "agent-established", 0, 1.0);
        let modes = ["kernel-vxlan-ct".to_owned(), "agent-established".to_owned()];
        let results = samples.results(Run::default(), &["tcp_rr".to_owned()], &modes);
        assert_eq!((results.rows.len(), results.ratios.len()), (1, 0));
    }
}
