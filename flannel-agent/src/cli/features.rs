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
    /// For tables: the rung, and why no other.
    pub(super) fn rows(&self) -> Vec<Vec<String>> {
        let rung = match (self.rung, self.what) {
            (Some(rung), Some(what)) => format!("{rung}: {what}"),
            _ => "none: nothing can carry the overlay".into(),
        };
        let mut rows = vec![vec!["Rung".to_owned(), rung]];
        let why_not = self.why_not.iter();
        rows.extend(why_not.map(|(rung, why)| vec![format!("Not {rung}"), why.clone()]));
        rows
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

/// The table's lines, one per feature.
pub(super) fn lines(rows: &[Row]) -> Vec<Vec<String>> {
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
    let findings = features::look();
    let ladder = climb(&findings, &datapath::wishes(args, None), &Course::default());
    let is_fit = ladder.rung.is_some();
    let answer = Answer {
        features: rows(&findings),
        standing: ladder.into(),
    };
    match output {
        Output::Json => table::line(&serde_json::to_string_pretty(&answer)?),
        Output::Table => {
            table::rows(
                &["Feature", "Finding", "What it is", "Why, and what follows"],
                lines(&answer.features),
            );
            table::pairs(answer.standing.rows());
        }
    }
    Ok(is_fit)
}
