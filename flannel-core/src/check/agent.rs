//! The daemon itself.

use super::{Finding, Observations};
use crate::config::BackendKind;

/// The daemon.
#[derive(Clone, Debug, Default)]
pub struct Agent {
    /// Whether it has ever been ready here.
    pub known: bool,
    /// The process, if it runs.
    pub pid: Option<u32>,
    /// Its version.
    pub version: Option<String>,
    /// Version of this program.
    pub ours: &'static str,
    /// Its backend.
    pub backend: Option<BackendKind>,
    /// `bpf` or `kernel`.
    pub mode: Option<&'static str>,
    /// Why that mode.
    pub reason: Option<String>,
    /// What it says is wrong.
    pub problems: Vec<String>,
    /// The state file.
    pub file: String,
}

pub(super) fn judge(seen: &Observations) -> Finding {
    const NAME: &str = "agent";
    let agent = &seen.agent;
    let Some(pid) = agent.pid else {
        return if agent.known {
            Finding::warn(
                NAME,
                "not running: traffic goes on, changes in the cluster are not followed",
                "systemctl start flannel-agent, or look why its container does not run",
            )
        } else {
            Finding::skip(
                NAME,
                format!("has never been ready here: {} does not exist", agent.file),
            )
        };
    };
    let version = agent.version.as_deref().unwrap_or("unknown");
    if let Some(problem) = agent.problems.first() {
        let more = match agent.problems.len() {
            1 => String::new(),
            count => format!(" (and {} more: flannel-agent status)", count - 1),
        };
        return Finding::warn(
            NAME,
            format!("running, version {version}, pid {pid}, and it says: {problem}{more}"),
            "flannel-agent status shows all of it",
        );
    }
    if version != agent.ours {
        return Finding::warn(
            NAME,
            format!(
                "running, version {version}, pid {pid}; this program is {}",
                agent.ours
            ),
            "restart the agent: that costs no packet",
        );
    }
    Finding::ok(NAME, format!("running, version {version}, pid {pid}"))
}
