//! `flannel-agent check`: is this node fit, and if not, why and what to do.

use std::{io::IsTerminal as _, time::Duration};

use flannel_core::check::{Finding, Report, Status};
use tracing::{instrument::WithSubscriber as _, subscriber::NoSubscriber};

use super::{Args, Output, table};
use crate::{
    check::{self, Reach},
    telemetry::one_line,
};

/// Looks, and prints what was found. False when a check failed.
pub(super) async fn run(
    args: &Args,
    output: Output,
    no_peers: bool,
    timeout: u32,
) -> anyhow::Result<bool> {
    let reach = Reach {
        peers: !no_peers,
        timeout: Duration::from_secs(u64::from(timeout)),
    };
    let look = check::run(args, reach);
    // What a daemon would say of its trials is in the findings.
    let report = if args.verbosity == 0 {
        look.with_subscriber(NoSubscriber::new()).await?
    } else {
        look.await?
    };
    match output {
        Output::Json => table::line(&serde_json::to_string_pretty(&report)?),
        Output::Table => print(&report, std::io::stdout().is_terminal()),
    }
    Ok(report.summary.fail == 0)
}

fn print(report: &Report, coloured: bool) {
    let names = report.checks.iter().map(|finding| finding.name.len());
    let width = names.max().unwrap_or(0);
    for finding in &report.checks {
        print_one(finding, width, coloured);
    }
    let summary = &report.summary;
    table::line(&format!(
        "{} checks: {} OK, {} WARN, {} FAIL, {} SKIP",
        report.checks.len(),
        summary.ok,
        summary.warn,
        summary.fail,
        summary.skip
    ));
}

fn print_one(finding: &Finding, width: usize, coloured: bool) {
    let status = format!("{:<4}", finding.status.as_str());
    let status = match finding.status {
        _ if !coloured => status,
        Status::Ok => paint(32, &status),
        Status::Warn => paint(33, &status),
        Status::Fail => paint(31, &status),
        Status::Skip => paint(90, &status),
    };
    table::line(&format!(
        "{status}  {:<width$}  {}",
        finding.name,
        one_line(&finding.found)
    ));
    if let Some(fix) = &finding.fix {
        table::line(&format!("{:6}{:<width$}  fix: {}", "", "", one_line(fix)));
    }
}

/// In a colour of ECMA-48.
fn paint(colour: u8, text: &str) -> String {
    format!("\x1b[{colour}m{text}\x1b[0m")
}
