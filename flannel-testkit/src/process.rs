//! Running programs with a time limit, and marking children so that leftovers can be found.

use crate::eventually::patience;
use anyhow::{Context as _, bail};
use std::fs::{File, Permissions};
use std::io::{self, Read as _, Seek as _};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

/// The environment variable that every child carries: the name prefix of the lab that started it.
pub const OWNER_ENV: &str = "FLANNEL_TESTKIT_OWNER";

/// What a finished program said.
#[derive(Clone, Debug)]
pub struct Finished {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

/// Writes a program that can be run at once. The kernel runs no file that somebody may still write to (`ETXTBSY`), such as a process
/// that another test has forked meanwhile: so it is another process that writes it.
///
/// # Panics
///
/// If it cannot be written.
#[track_caller]
pub fn put_program(path: &Path, contents: impl AsRef<[u8]>) {
    let draft = path.with_extension("draft");
    std::fs::write(&draft, contents)
        .unwrap_or_else(|err| panic!("write {}: {err}", draft.display()));
    std::fs::set_permissions(&draft, Permissions::from_mode(0o755))
        .unwrap_or_else(|err| panic!("make {} executable: {err}", draft.display()));
    let copied = Command::new("cp").args([&draft, path]).status();
    match copied {
        Ok(status) if status.success() => {}
        other => panic!("copy {} to {}: {other:?}", draft.display(), path.display()),
    }
    std::fs::remove_file(&draft).unwrap_or_else(|err| panic!("remove {}: {err}", draft.display()));
}

/// Runs `cmd` to its end, killing it after `limit`. A non-zero exit is not an error here.
pub fn finish(cmd: &mut Command, limit: Duration) -> anyhow::Result<Finished> {
    finish_reading(cmd, Stdio::null(), limit)
}

/// Like [`finish`] with something to read.
pub fn finish_reading(
    cmd: &mut Command,
    input: impl Into<Stdio>,
    limit: Duration,
) -> anyhow::Result<Finished> {
    // Files instead of pipes: a grandchild that keeps a pipe open cannot hang the reader.
    let mut out = tempfile::tempfile()?;
    let mut err = tempfile::tempfile()?;
    let mut child = cmd
        .stdin(input)
        .stdout(out.try_clone()?)
        .stderr(err.try_clone()?)
        .spawn()
        .with_context(|| format!("run {cmd:?}"))?;
    let Some(status) = wait_timeout(&mut child, limit)? else {
        kill_and_reap(&mut child);
        bail!(
            "{cmd:?}: still running after {limit:?}, killed; stderr: {}",
            text_of(&mut err)?
        );
    };
    Ok(Finished {
        status,
        stdout: text_of(&mut out)?,
        stderr: text_of(&mut err)?,
    })
}

/// Runs `cmd` within `limit` and gives its stdout; a non-zero exit is an error that quotes stderr.
pub fn succeed(cmd: &mut Command, limit: Duration) -> anyhow::Result<String> {
    let done = finish(cmd, limit)?;
    if !done.status.success() {
        bail!(
            "{cmd:?}: {}: {}{}",
            done.status,
            done.stderr.trim(),
            done.stdout.trim()
        );
    }
    Ok(done.stdout)
}

/// Waits for `child` without polling; `None` when `limit` passed first.
pub fn wait_timeout(child: &mut Child, limit: Duration) -> io::Result<Option<ExitStatus>> {
    if let Some(status) = child.try_wait()? {
        return Ok(Some(status));
    }
    let pidfd = pidfd_open(child.id())?;
    poll_in(&pidfd, patience(limit))?;
    child.try_wait()
}

/// Sends `signal` to a child that has not been reaped.
pub fn signal(child: &Child, signal: i32) -> io::Result<()> {
    // The pid cannot have been reused: the child stays a zombie until `child` is waited for.
    let pid = i32::try_from(child.id()).map_err(io::Error::other)?;
    // SAFETY: kill takes no pointers.
    check(unsafe { libc::kill(pid, signal) }).map(drop)
}

/// Asks `child` to end with SIGTERM, kills it after `grace`, and reaps it.
pub fn terminate(child: &mut Child, grace: Duration) -> io::Result<ExitStatus> {
    if let Some(status) = child.try_wait()? {
        return Ok(status);
    }
    signal(child, libc::SIGTERM)?;
    if let Some(status) = wait_timeout(child, grace)? {
        return Ok(status);
    }
    child.kill()?;
    child.wait()
}

/// Kills and reaps `child`, whatever its state.
pub fn kill_and_reap(child: &mut Child) {
    // Both fail only for a child that has already been reaped, which is what is wanted.
    drop(child.kill());
    drop(child.wait());
}

/// Opens a handle on a process that stays on that very process, even if its pid is reused.
pub(crate) fn pidfd_open(pid: u32) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open takes no pointers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, libc::c_ulong::from(pid), 0) };
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    check(fd)?;
    // SAFETY: the descriptor is new and owned by nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Kills the process behind `pidfd` and waits until it has ended (a zombie counts as ended).
pub(crate) fn pidfd_kill(pidfd: &OwnedFd, limit: Duration) -> io::Result<()> {
    // SAFETY: the null pointer means "no siginfo".
    let rc = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            libc::SIGKILL,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    check(i32::try_from(rc).map_err(io::Error::other)?)?;
    poll_in(pidfd, limit).map(drop)
}

/// Waits until `fd` is readable (true) or `limit` has passed (false).
pub(crate) fn poll_in(fd: &impl std::os::fd::AsRawFd, limit: Duration) -> io::Result<bool> {
    let end = std::time::Instant::now() + limit;
    loop {
        let left = end.saturating_duration_since(std::time::Instant::now());
        let timeout = libc::timespec {
            tv_sec: left.as_secs().try_into().map_err(io::Error::other)?,
            tv_nsec: left.subsec_nanos().into(),
        };
        let mut set = libc::pollfd {
            fd: fd.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: both pointers are to live locals, and the count is one.
        let rc = unsafe { libc::ppoll(&raw mut set, 1, &raw const timeout, std::ptr::null()) };
        match check(rc) {
            Ok(ready) => return Ok(ready > 0),
            Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
            Err(err) => return Err(err),
        }
    }
}

/// Turns the -1 of a system call into its `errno`.
pub(crate) fn check(rc: i32) -> io::Result<i32> {
    if rc < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(rc)
}

fn text_of(file: &mut File) -> io::Result<String> {
    file.rewind()?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
