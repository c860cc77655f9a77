//! `flannel-agent features`: what this kernel and this process on it can do, tried now.

use flannel_core::features::{Course, Feature, Finding, Findings, Ladder, Rung, climb};
use serde::Serialize;

use super::{Args, Output, table};
use crate::{datapath, features};

/// One feature and what came of trying it.
#[derive(Debug, Serialize)]
pub(super) struct Row {
    name: Feature,
    what: &'static str,
    #[serde(flatten)]
    finding: Finding,
    /// What a node does without it.
    without: &'static str,
}

/// The rung and the others.
#[derive(Debug, Serialize)]
pub(super) struct Standing {
    /// The highest in reach; `None` where nothing can carry the overlay.
    rung: Option<Rung>,
    /// What runs there.
    what: Option<&'static str>,
    /// Why no other.
    why_not: std::collections::BTreeMap<Rung, String>,
}

#[derive(Debug, Serialize)]
struct Answer {
    features: Vec<Row>,
    #[serde(flatten)]
    standing: Standing,
}

impl From<Ladder> for Standing {
    fn from(ladder: Ladder) -> Self {
        Self {
            rung: ladder.rung,
            what: ladder.rung.map(Rung::title),
            why_not: ladder.why_not,
        }
    }
}

impl Standing {
    /// For tables: the rung.
    pub(super) fn row(&self) -> (&'static str, String) {
        let rung = match (self.rung, self.what) {
            (Some(rung), Some(what)) => format!("{rung}: {what}"),
            _ => "none: nothing can carry the overlay".into(),
        };
        ("Rung", rung)
    }

    /// The rungs above, and why they are out of reach. Those that only lack one that is named are left out.
    pub(super) fn above(&self) -> impl Iterator<Item = (Rung, &str)> {
        self.why_not
            .iter()
            .map(|(rung, why)| (*rung, why.as_str()))
            .filter(|(rung, why)| {
                self.rung.is_none_or(|here| *rung > here) && !why.starts_with("needs L")
            })
    }
}

/// The findings as rows.
pub(super) fn rows(findings: &Findings) -> Vec<Row> {
    findings
        .iter()
        .map(|(name, finding)| Row {
            name,
            what: name.title(),
            finding: finding.clone(),
            without: name.without(),
        })
        .collect()
}

/// Prints the table, one line per feature.
pub(super) fn print(rows: &[Row]) {
    table::rows(
        &["Feature", "Finding", "What it is", "Why, and what follows"],
        lines(rows),
    );
}

fn lines(rows: &[Row]) -> Vec<Vec<String>> {
    rows.iter()
        .map(|row| {
            let mut note = row.finding.reason().unwrap_or_default().to_owned();
            if matches!(row.finding, Finding::Absent { .. }) {
                note = format!("{note}; so: {}", row.without);
            }
            vec![
                row.name.to_string(),
                row.finding.as_str().to_owned(),
                row.what.to_owned(),
                note,
            ]
        })
        .collect()
}

/// Tries everything and prints it. False where nothing can carry the overlay.
pub(super) fn run(args: &Args, output: Output) -> anyhow::Result<bool> {
    let findings = features::afresh();
    let ladder = climb(&findings, &datapath::wishes(args, None), &Course::default());
    let is_fit = ladder.rung.is_some();
    let answer = Answer {
        features: rows(&findings),
        standing: ladder.into(),
    };
    match output {
        Output::Json => table::line(&serde_json::to_string_pretty(&answer)?),
        Output::Table => {
            print(&answer.features);
            let (name, rung) = answer.standing.row();
            let why_not = answer.standing.why_not.iter();
            let rungs = why_not.map(|(rung, why)| vec![format!("Not {rung}"), why.clone()]);
            let first = std::iter::once(vec![name.to_owned(), rung]);
            table::pairs(first.chain(rungs).collect());
        }
    }
    Ok(is_fit)
}
