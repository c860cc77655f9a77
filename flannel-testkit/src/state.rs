//! The directory in which a test process keeps what its labs write: run directories, logs, captures, etcd data.
//!
//! `/run/flannel-testkit/<pid>` exists while the process has a lab or a store. Its `owner` file tells a live
//! owner from a later process with the same pid.

use anyhow::Context as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, Once, PoisonError};

pub(crate) const ROOT: &str = "/run/flannel-testkit";

static LIVE: Mutex<u32> = Mutex::new(0);
static FIRST: Once = Once::new();

/// Keeps the process's directory in existence.
#[derive(Debug)]
pub(crate) struct State {
    dir: PathBuf,
}

impl State {
    /// Takes hold of the directory, making it if this is the first holder. The first call in a process
    /// sweeps what dead owners left, including an earlier process with our own pid.
    pub(crate) fn hold() -> anyhow::Result<State> {
        let pid = std::process::id();
        FIRST.call_once(|| {
            if owner_path(pid).exists() && !is_alive(pid) {
                crate::sweep::sweep_pid(pid);
            }
            crate::sweep::sweep_dead();
        });
        let mut live = LIVE.lock().unwrap_or_else(PoisonError::into_inner);
        let dir = dir_of(pid);
        fs::create_dir_all(&dir).with_context(|| format!("make {}", dir.display()))?;
        fs::write(owner_path(pid), identity(pid)?)?;
        *live += 1;
        Ok(State { dir })
    }

    /// A new directory for one lab or store.
    pub(crate) fn make_dir(&self, name: &str) -> anyhow::Result<PathBuf> {
        let dir = self.dir.join(name);
        fs::create_dir_all(&dir).with_context(|| format!("make {}", dir.display()))?;
        Ok(dir)
    }
}

impl Drop for State {
    fn drop(&mut self) {
        let mut live = LIVE.lock().unwrap_or_else(PoisonError::into_inner);
        *live -= 1;
        if *live == 0 {
            // What cannot be removed now is removed by the next run's sweep.
            drop(fs::remove_dir_all(&self.dir));
        }
    }
}

/// The pids that have a directory.
pub(crate) fn owners() -> Vec<u32> {
    let entries = fs::read_dir(ROOT).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect()
}

/// Whether the process that owns things named by `pid` still runs. When in doubt it does.
pub(crate) fn is_alive(pid: u32) -> bool {
    let Ok(recorded) = fs::read_to_string(owner_path(pid)) else {
        return Path::new("/proc").join(pid.to_string()).exists();
    };
    let ours = identity(std::process::id()).unwrap_or_default();
    if recorded.split(' ').next_back() != ours.split(' ').next_back() {
        // An owner in another pid namespace cannot be seen from here.
        return true;
    }
    identity(pid).is_ok_and(|now| now == recorded)
}

pub(crate) fn dir_of(pid: u32) -> PathBuf {
    Path::new(ROOT).join(pid.to_string())
}

fn owner_path(pid: u32) -> PathBuf {
    dir_of(pid).join("owner")
}

/// Start time of a process and the pid namespace we see it from.
fn identity(pid: u32) -> anyhow::Result<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // Field 22, counted behind the command name, which may hold spaces and parentheses.
    let (_, rest) = stat.rsplit_once(')').context("no name in stat")?;
    let start = rest
        .split_whitespace()
        .nth(19)
        .context("no start time in stat")?;
    let namespace = fs::read_link("/proc/self/ns/pid")?;
    Ok(format!("{start} {}", namespace.display()))
}
