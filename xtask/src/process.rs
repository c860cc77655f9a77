//! Starting other programs, and living until they have ended.

use std::collections::BTreeSet;
use std::env;
use std::ffi::OsString;
use std::fmt;
use std::fs;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Context as _, Result, bail};

static INTERRUPTED: AtomicBool = AtomicBool::new(false);
/// The children to end when we are told to.
static CHILDREN: Mutex<BTreeSet<u32>> = Mutex::new(BTreeSet::new());

/// Where Debian keeps network tools; often missing from a user's `PATH`.
const SBIN: [&str; 3] = ["/usr/local/sbin", "/usr/sbin", "/sbin"];

/// A failure that has been printed already.
#[derive(Debug)]
pub(crate) struct Reported;

impl fmt::Display for Reported {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("failed, as reported above")
    }
}

impl std::error::Error for Reported {}

/// Makes SIGINT, SIGTERM and SIGHUP end the running children and not us, so that we can clean up after them.
///
/// A terminal's Ctrl-C reaches the children by itself; a signal sent to us alone is passed on as SIGTERM.
pub(crate) fn outlive_interrupts() -> Result<()> {
    ctrlc::set_handler(|| {
        // Under the lock: a child is either in the set, or its start sees that we were interrupted.
        let children = children();
        INTERRUPTED.store(true, Ordering::SeqCst);
        if !children.is_empty() {
            kill("TERM", &children.iter().copied().collect::<Vec<_>>());
        }
    })
    .context("install the signal handler")
}

fn children() -> MutexGuard<'static, BTreeSet<u32>> {
    CHILDREN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether somebody asked us to stop.
pub(crate) fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::SeqCst)
}

/// Sends a signal with the shell's builtin; processes that are gone are not an error.
pub(crate) fn kill(signal: &str, pids: &[u32]) {
    let mut command = Command::new("sh");
    command
        .args(["-c", "kill -s \"$@\"", "sh", signal])
        .args(pids.iter().map(u32::to_string));
    if let Err(error) = command.stderr(Stdio::null()).status() {
        eprintln!("xtask: start sh to send {signal}: {error}");
    }
}

/// A command that finds tools in the sbin directories too.
pub(crate) fn command(program: &str) -> Command {
    let mut command = Command::new(program);
    command.env("PATH", path());
    command
}

/// Whether a program is on [`path`].
pub(crate) fn on_path(program: &str) -> bool {
    find(program).is_some()
}

/// The first file of this name on [`path`].
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    env::split_paths(&path())
        .map(|dir| dir.join(program))
        .find(|path| path.is_file())
}

fn path() -> OsString {
    let path = env::var_os("PATH").unwrap_or_default();
    let mut dirs: Vec<PathBuf> = env::split_paths(&path).collect();
    let missing: Vec<_> = SBIN
        .iter()
        .map(PathBuf::from)
        .filter(|sbin| !dirs.contains(sbin))
        .collect();
    dirs.extend(missing);
    // Only directories that were split from a list, and constants: joining them cannot fail.
    env::join_paths(dirs).unwrap_or(path)
}

/// Starts a command; signals we get go to it until it is passed to [`wait`].
pub(crate) fn spawn(command: &mut Command) -> Result<Child> {
    let mut children = children();
    if interrupted() {
        bail!("interrupted");
    }
    let child = command
        .spawn()
        .with_context(|| format!("start {}", command.get_program().display()))?;
    children.insert(child.id());
    Ok(child)
}

/// Waits for a child of [`spawn`].
pub(crate) fn wait(child: &mut Child) -> Result<ExitStatus> {
    let status = child.wait().context("wait for a child")?;
    children().remove(&child.id());
    Ok(status)
}

/// Runs a command to its end.
pub(crate) fn status(command: &mut Command) -> Result<ExitStatus> {
    let mut child = spawn(command)?;
    wait(&mut child)
}

/// Runs a command to its end and wants it to succeed.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let status = status(command)?;
    if !status.success() {
        bail!("{} ended with {status}", line(command));
    }
    Ok(())
}

/// Runs a command that must not be cut off half-way by us, such as a package manager: it gets what the terminal
/// sends, and nothing from us.
pub(crate) fn run_undisturbed(command: &mut Command) -> Result<()> {
    let status = command
        .status()
        .with_context(|| format!("start {}", command.get_program().display()))?;
    if !status.success() {
        bail!("{} ended with {status}", line(command));
    }
    Ok(())
}

/// Becomes another program, which thereby gets signals and gives the exit code itself.
pub(crate) fn exec(command: &mut Command) -> anyhow::Error {
    let error = command.exec();
    anyhow::Error::new(error).context(format!("start {}", command.get_program().display()))
}

/// A command as one would type it.
pub(crate) fn line(command: &Command) -> String {
    let program = Path::new(command.get_program()).file_name();
    let words = program.into_iter().chain(command.get_args());
    words
        .map(|word| word.to_string_lossy())
        .collect::<Vec<_>>()
        .join(" ")
}

/// Whether we run as root.
pub(crate) fn is_root() -> bool {
    fs::read_to_string("/proc/self/status").is_ok_and(|status| effective_uid(&status) == Some(0))
}

/// Fails with what to type when we are not root.
pub(crate) fn require_root(what: &str, typed: &str) -> Result<()> {
    if !is_root() {
        bail!(
            "{what} makes network namespaces and loads eBPF programs, which needs root: \
             sudo -E env \"PATH=$PATH\" cargo xtask {typed}"
        );
    }
    Ok(())
}

/// The line reads `Uid: real effective saved filesystem`.
fn effective_uid(status: &str) -> Option<u32> {
    let ids = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
    ids.split_whitespace().nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_effective_uid_counts() {
        assert_eq!(
            effective_uid("Name:\tx\nUid:\t1000\t0\t0\t0\nGid:\t5\t5\t5\t5\n"),
            Some(0)
        );
        assert_eq!(effective_uid("Name:\tx\n"), None);
    }

    #[test]
    fn sbin_is_searched_last_and_once() {
        let dirs: Vec<_> = env::split_paths(&path()).collect();
        for sbin in SBIN {
            assert_eq!(
                dirs.iter().filter(|dir| dir.as_os_str() == sbin).count(),
                1,
                "{sbin} in {dirs:?}"
            );
        }
    }

    #[test]
    fn a_command_reads_as_typed() {
        assert_eq!(
            line(Command::new("/usr/sbin/ip").args(["netns", "list"])),
            "ip netns list"
        );
    }
}
