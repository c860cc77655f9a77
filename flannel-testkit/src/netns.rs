//! A named network namespace: closures, programs and sockets inside it.

use crate::process::{self, OWNER_ENV};
use anyhow::Context as _;
use nix::mount::{MntFlags, umount2};
use nix::sched::{CloneFlags, setns};
use std::fs::File;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

/// Where named namespaces live, as `ip netns` keeps them.
pub(crate) const DIR: &str = "/run/netns";

/// The time a short administrative command gets.
pub(crate) const COMMAND_LIMIT: Duration = Duration::from_secs(30);

/// The first `ip netns add` on a machine mounts `/run/netns` on itself: one at a time, of all processes.
const ADDING: &str = "/run/flannel-testkit.lock";

/// A handle on a named network namespace. Cheap to clone; it holds the name, not the namespace, so it never
/// keeps a namespace of a dropped lab alive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Netns {
    name: Arc<str>,
}

impl Netns {
    /// Makes a namespace and brings its loopback up.
    pub(crate) fn add(name: &str) -> anyhow::Result<Netns> {
        let turn = File::create(ADDING).with_context(|| format!("create {ADDING}"))?;
        turn.lock()
            .with_context(|| format!("wait for our turn at {ADDING}"))?;
        process::succeed(
            Command::new("ip").args(["netns", "add", name]),
            COMMAND_LIMIT,
        )?;
        drop(turn);
        let ns = Netns { name: name.into() };
        ns.exec(["ip", "link", "set", "lo", "up"])?;
        Ok(ns)
    }

    /// A handle on a namespace that exists already, by its name under `/run/netns`.
    pub fn existing(name: &str) -> Netns {
        Netns { name: name.into() }
    }

    /// Removes the name; the namespace ends with its last process and socket. A missing one is no error.
    pub(crate) fn delete(&self) -> anyhow::Result<()> {
        use nix::errno::Errno;
        match umount2(&self.path(), MntFlags::MNT_DETACH) {
            // EINVAL: the file is there, but nothing is mounted on it.
            Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
            Err(err) => return Err(err).with_context(|| format!("unmount {}", self.name)),
        }
        match std::fs::remove_file(self.path()) {
            Err(err) if err.kind() != std::io::ErrorKind::NotFound => {
                Err(err).with_context(|| format!("remove {}", self.name))
            }
            _ => Ok(()),
        }
    }

    /// The name under `/run/netns`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file to enter the namespace by.
    pub fn path(&self) -> PathBuf {
        Path::new(DIR).join(&*self.name)
    }

    /// Runs `work` in a thread inside the namespace and gives its value; a panic inside is passed on. Calls nest.
    ///
    /// Sockets made inside stay in the namespace and may be used anywhere. In such a thread `/proc/net`
    /// still shows the main thread's namespace: read `/proc/thread-self/net` (`/proc/sys/net` is right).
    #[track_caller]
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        match self.try_run(work) {
            Ok(value) => value,
            Err(err) => panic!("{err:#}"),
        }
    }

    /// Like [`Netns::run`]; fails when the namespace cannot be entered.
    pub fn try_run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> anyhow::Result<T> {
        let inside = || {
            self.enter()?;
            Ok(work())
        };
        let outcome = std::thread::scope(|scope| {
            std::thread::Builder::new()
                .name(self.name.to_string())
                .spawn_scoped(scope, inside)
                .expect("a thread")
                .join()
        });
        outcome.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// Moves the calling thread, for good, into the namespace.
    pub fn enter(&self) -> anyhow::Result<()> {
        let file = self.open()?;
        setns(file, CloneFlags::CLONE_NEWNET).with_context(|| format!("enter netns {}", self.name))
    }

    /// A command that will run inside the namespace. Its mount namespace is the caller's, so `/sys/fs/bpf`
    /// stays visible (and `/sys/class/net` is the caller's too). The child carries the lab's
    /// mark in its environment (so do not clear that) and is killed when the lab is dropped.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut cmd = Command::new(program);
        let open = self.open();
        cmd.env(OWNER_ENV, crate::sweep::prefix_of(&self.name));
        let enter = move || {
            let Ok(file) = &open else {
                // Cannot allocate between fork and exec: the caller sees only the errno.
                return Err(std::io::Error::from_raw_os_error(libc::ENOENT));
            };
            setns(file, CloneFlags::CLONE_NEWNET).map_err(std::io::Error::from)
        };
        // SAFETY: the closure makes one system call on a descriptor opened before the fork, and allocates nothing.
        unsafe { cmd.pre_exec(enter) };
        cmd
    }

    /// Runs `argv` inside within 30 s and gives its stdout; fails, quoting stderr, on a non-zero exit.
    pub fn exec<S: AsRef<std::ffi::OsStr>>(
        &self,
        argv: impl IntoIterator<Item = S>,
    ) -> anyhow::Result<String> {
        self.exec_for(COMMAND_LIMIT, argv)
    }

    /// Like [`Netns::exec`] with a time limit of its own.
    pub fn exec_for<S: AsRef<std::ffi::OsStr>>(
        &self,
        limit: Duration,
        argv: impl IntoIterator<Item = S>,
    ) -> anyhow::Result<String> {
        let mut argv = argv.into_iter();
        let program = argv.next().context("no program to run")?;
        process::succeed(self.command(program).args(argv), limit)
            .with_context(|| format!("in netns {}", self.name))
    }

    /// Runs `ip` with the words of `line`, for set-up written as one would type it.
    pub fn ip(&self, line: &str) -> anyhow::Result<String> {
        self.exec(std::iter::once("ip").chain(line.split_whitespace()))
    }

    /// Reads a sysctl by its path below `/proc/sys`, without the trailing newline.
    pub fn sysctl(&self, key: &str) -> anyhow::Result<String> {
        let text = self.run(|| std::fs::read_to_string(sysctl_path(key)));
        let text = text.with_context(|| format!("read sysctl {key} in {}", self.name))?;
        Ok(text.trim_end().to_owned())
    }

    /// Prepares a namespace for IPv6 before it has any device: its addresses hold at once, and routers are not listened to.
    pub(crate) fn prepare_ipv6(&self, forwarding: bool) -> anyhow::Result<()> {
        for key in ["accept_dad", "accept_ra"] {
            for place in ["all", "default"] {
                self.set_sysctl(&format!("net/ipv6/conf/{place}/{key}"), "0")?;
            }
        }
        if forwarding {
            self.set_sysctl("net/ipv6/conf/all/forwarding", "1")?;
        }
        Ok(())
    }

    /// Whether [`Netns::prepare_ipv6`] has been there.
    pub(crate) fn is_prepared(&self) -> bool {
        self.sysctl("net/ipv6/conf/default/accept_dad")
            .is_ok_and(|value| value == "0")
    }

    /// Writes a sysctl by its path below `/proc/sys` (only `net/…` belongs to the namespace).
    pub fn set_sysctl(&self, key: &str, value: &str) -> anyhow::Result<()> {
        anyhow::ensure!(key.starts_with("net/"), "sysctl {key} is not per namespace");
        self.run(|| std::fs::write(sysctl_path(key), value))
            .with_context(|| format!("write sysctl {key}={value} in {}", self.name))
    }

    /// The interface index of `ifname` inside.
    pub fn ifindex(&self, ifname: &str) -> anyhow::Result<u32> {
        self.run(|| nix::net::if_::if_nametoindex(ifname))
            .with_context(|| format!("index of {ifname} in {}", self.name))
    }

    /// The number the kernel names the namespace by (`SO_NETNS_COOKIE`), unique since boot.
    pub fn cookie(&self) -> anyhow::Result<u64> {
        self.try_run(crate::socket::netns_cookie)?
            .with_context(|| format!("cookie of netns {}", self.name))
    }

    fn open(&self) -> anyhow::Result<File> {
        File::open(self.path()).with_context(|| format!("open netns {}", self.name))
    }
}

fn sysctl_path(key: &str) -> PathBuf {
    Path::new("/proc/sys").join(key)
}
