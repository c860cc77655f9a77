//! A `flannel-agent` in a node's namespace.

pub use crate::confine::Capability;
use crate::confine::{self, Confinement};
use crate::eventually::try_eventually;
use crate::node::Node;
use crate::process;
use anyhow::{Context as _, bail, ensure};
use std::fs;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// A started agent. Dropping it kills it.
#[derive(Debug)]
pub struct AgentProcess {
    child: Child,
    /// stdout and stderr of this and earlier agents of the node.
    pub log_path: PathBuf,
    /// Where the agent was told to write its subnet file.
    pub subnet_file: PathBuf,
    log_from: usize,
    /// Whether its kernel makes vxlan devices by now, where it began without.
    vxlan_known: Arc<AtomicBool>,
}

impl AgentProcess {
    /// Starts `binary` in the node's namespace. `FLANNELD_*` variables of the caller are not passed on; `env` is.
    ///
    /// The subnet file is taken from `args` (`--subnet-file=…`) or `env` (`FLANNELD_SUBNET_FILE`), else
    /// `subnet.env` in the node's run directory is expected.
    pub fn spawn(
        node: &Node,
        binary: &Path,
        args: &[&str],
        env: &[(&str, &str)],
    ) -> anyhow::Result<AgentProcess> {
        AgentProcess::spawn_confined(node, binary, args, env, &Confinement::default())
    }

    /// Like [`AgentProcess::spawn`], still as uid 0 but with `caps` alone in the bounding, permitted, effective and inheritable sets.
    pub fn spawn_with_caps(
        node: &Node,
        binary: &Path,
        args: &[&str],
        env: &[(&str, &str)],
        caps: &[Capability],
    ) -> anyhow::Result<AgentProcess> {
        let confinement = Confinement {
            caps: Some(caps),
            ..Confinement::default()
        };
        AgentProcess::spawn_confined(node, binary, args, env, &confinement)
    }

    /// Like [`AgentProcess::spawn`] on a machine that seems to lack something.
    pub fn spawn_confined(
        node: &Node,
        binary: &Path,
        args: &[&str],
        env: &[(&str, &str)],
        confinement: &Confinement<'_>,
    ) -> anyhow::Result<AgentProcess> {
        let log_path = node.run_dir.join("agent.log");
        let log = fs::File::options()
            .create(true)
            .append(true)
            .open(&log_path)?;
        let log_from = usize::try_from(log.metadata()?.len())?;
        let mut cmd = node.ns.command(binary);
        for (name, _) in std::env::vars_os() {
            if name.as_encoded_bytes().starts_with(b"FLANNELD_") {
                cmd.env_remove(name);
            }
        }
        cmd.args(args)
            .envs(env.iter().copied())
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        confine::apply(&mut cmd, confinement);
        let child = cmd
            .spawn()
            .with_context(|| format!("run {} in {}", binary.display(), node.ns.name()))?;
        let agent = AgentProcess {
            child,
            log_path,
            subnet_file: subnet_file(args, env).unwrap_or_else(|| node.run_dir.join("subnet.env")),
            log_from,
            vxlan_known: Arc::default(),
        };
        if confinement.no_vxlan {
            // Until then it waits at its first netlink request. On a failure the drop ends it.
            confine::watch(&agent.child, Arc::clone(&agent.vxlan_known))?;
        }
        Ok(agent)
    }

    /// Has the kernel of an agent that began without the vxlan device type learn it, as when its module is loaded, or forget it again.
    pub fn know_vxlan(&self, known: bool) {
        self.vxlan_known.store(known, Ordering::SeqCst);
    }

    /// Waits until the subnet file is there and not empty. An agent that ends first is an error; both
    /// errors quote its last lines. A file of an earlier agent counts: remove it first where that matters.
    pub fn wait_ready(&mut self, timeout: Duration) -> anyhow::Result<()> {
        let file = self.subnet_file.clone();
        self.wait_until(timeout, "the agent is ready", |_| {
            let len = fs::metadata(&file).map_or(0, |meta| meta.len());
            ensure!(len > 0, "{} is not there or empty", file.display());
            Ok(())
        })
    }

    /// Waits until this agent has logged `needle`.
    pub fn wait_log(&mut self, needle: &str, timeout: Duration) -> anyhow::Result<()> {
        self.wait_until(timeout, "the agent says so", |agent| {
            ensure!(agent.log().contains(needle), "it has not said {needle:?}");
            Ok(())
        })
    }

    /// Waits for a condition as long as the agent runs.
    pub fn wait_until<T>(
        &mut self,
        timeout: Duration,
        what: &str,
        mut look: impl FnMut(&AgentProcess) -> anyhow::Result<T>,
    ) -> anyhow::Result<T> {
        let mut ended = None;
        let outcome = try_eventually(timeout, what, || {
            if ended.is_none() {
                ended = self.child.try_wait()?;
            }
            match (look(self), ended) {
                // What it did before it ended counts, and nothing more will come.
                (outcome, Some(_)) => Ok(outcome),
                (Ok(value), None) => Ok(Ok(value)),
                (Err(err), None) => Err(err),
            }
        });
        let end = ended.map_or_else(String::new, |status| format!("; it ended with {status}"));
        outcome.and_then(|outcome| outcome).with_context(|| {
            format!(
                "{what}{end}; its last lines:\n{}",
                last_lines(&self.log(), 20)
            )
        })
    }

    /// What this agent has logged so far, stdout and stderr together.
    pub fn log(&self) -> String {
        let bytes = fs::read(&self.log_path).unwrap_or_default();
        String::from_utf8_lossy(bytes.get(self.log_from..).unwrap_or_default()).into_owned()
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Asks it to end; [`AgentProcess::wait`] sees it happen.
    pub fn sigterm(&self) -> anyhow::Result<()> {
        self.signal(libc::SIGTERM)
    }

    /// Kills it and waits for the end.
    pub fn sigkill(&mut self) {
        process::kill_and_reap(&mut self.child);
    }

    /// Sends any signal.
    pub fn signal(&self, signal: i32) -> anyhow::Result<()> {
        Ok(process::signal(&self.child, signal)?)
    }

    /// Waits for its end and gives the exit code (128 + n after signal n). Fails, and leaves it running, after `timeout`.
    pub fn wait(&mut self, timeout: Duration) -> anyhow::Result<i32> {
        match process::wait_timeout(&mut self.child, timeout)? {
            Some(status) => Ok(code_of(status)),
            None => bail!(
                "the agent still runs after {timeout:?}; its last lines:\n{}",
                last_lines(&self.log(), 20)
            ),
        }
    }
}

impl Drop for AgentProcess {
    fn drop(&mut self) {
        self.sigkill();
    }
}

/// The last `count` lines of `text`.
pub(crate) fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

fn code_of(status: ExitStatus) -> i32 {
    let signal = status.signal().map(|signal| 128 + signal);
    status.code().or(signal).unwrap_or(-1)
}

/// The subnet file that the arguments or the environment name.
fn subnet_file(args: &[&str], env: &[(&str, &str)]) -> Option<PathBuf> {
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        let Some(rest) = arg.trim_start_matches('-').strip_prefix("subnet-file") else {
            continue;
        };
        let value = rest.strip_prefix('=').or_else(|| args.next().copied());
        return value.map(PathBuf::from);
    }
    let mut env = env.iter();
    env.find(|(name, _)| *name == "FLANNELD_SUBNET_FILE")
        .map(|(_, value)| PathBuf::from(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_subnet_file_is_found_in_every_spelling() {
        for args in [
            &["--subnet-file=/x/s"][..],
            &["-subnet-file", "/x/s"],
            &["-v=1", "--subnet-file", "/x/s"],
        ] {
            assert_eq!(subnet_file(args, &[]), Some("/x/s".into()), "{args:?}");
        }
        let env = [("FLANNELD_SUBNET_FILE", "/y")];
        assert_eq!(subnet_file(&["--ip-masq"], &env), Some("/y".into()));
        assert_eq!(subnet_file(&["--ip-masq"], &[]), None);
    }
}
