//! A real `etcd` with a data directory of its own.

use crate::agent::last_lines;
use crate::eventually::try_eventually;
use crate::netns::{COMMAND_LIMIT, Netns};
use crate::process::{self, OWNER_ENV};
use crate::state::State;
use crate::sweep;
use anyhow::Context as _;
use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;
use tempfile::TempDir;

/// How long a server may take to become healthy, or to stop.
const LIMIT: Duration = Duration::from_secs(20);

/// Which etcd to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EtcdVersion {
    /// That of this system: 3.4 on Debian 12.
    System,
    /// 3.5, of Debian 13, which `cargo xtask setup` fetches and does not install.
    V3_5,
}

impl EtcdVersion {
    /// The server's program. Panics if it is not there: a test must not pass without it.
    #[track_caller]
    pub fn program(self) -> PathBuf {
        match self {
            EtcdVersion::System => "etcd".into(),
            EtcdVersion::V3_5 => {
                let workspace = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
                let program = Path::new(workspace).join("target/etcd-3.5/usr/bin/etcd");
                assert!(
                    program.exists(),
                    "no etcd 3.5 at {}: run `cargo xtask setup`, or put one there",
                    program.display()
                );
                program
            }
        }
    }
}

/// A single-member `etcd`. Dropping it kills the server and removes its data.
#[derive(Debug)]
pub struct Etcd {
    ns: Option<Netns>,
    ip: Ipv4Addr,
    ports: [u16; 2],
    args: Vec<String>,
    version: EtcdVersion,
    child: Option<Child>,
    dir: TempDir,
    _state: State,
}

impl Etcd {
    /// Starts a server on free ports of `ip` in `ns` (the caller's namespace if `None`; give it a loopback address then)
    /// and returns when it is healthy.
    pub fn start(ns: Option<&Netns>, ip: Ipv4Addr) -> anyhow::Result<Etcd> {
        Etcd::start_with(ns, ip, &[])
    }

    /// Like [`Etcd::start`] with a version of the caller's choice.
    pub fn start_version(
        ns: Option<&Netns>,
        ip: Ipv4Addr,
        version: EtcdVersion,
    ) -> anyhow::Result<Etcd> {
        Etcd::begin(ns, ip, &[], version)
    }

    /// Like [`Etcd::start`] with more arguments for the server, such as `--auto-compaction-retention=1`.
    pub fn start_with(ns: Option<&Netns>, ip: Ipv4Addr, args: &[&str]) -> anyhow::Result<Etcd> {
        Etcd::begin(ns, ip, args, EtcdVersion::System)
    }

    fn begin(
        ns: Option<&Netns>,
        ip: Ipv4Addr,
        args: &[&str],
        version: EtcdVersion,
    ) -> anyhow::Result<Etcd> {
        let state = State::hold()?;
        let dir = tempfile::Builder::new()
            .prefix("etcd-")
            .tempdir_in(state.make_dir("stores")?)?;
        let mut etcd = Etcd {
            ns: ns.cloned(),
            ip,
            ports: free_ports(ns, ip)?,
            args: args.iter().map(|arg| (*arg).to_owned()).collect(),
            version,
            child: None,
            dir,
            _state: state,
        };
        // Another process may take a free port before etcd does.
        for _ in 0..2 {
            if etcd.restart().is_ok() {
                return Ok(etcd);
            }
            etcd.ports = free_ports(ns, ip)?;
        }
        etcd.restart()?;
        Ok(etcd)
    }

    /// The client URL.
    pub fn endpoint(&self) -> String {
        format!("http://{}:{}", self.ip, self.ports[0])
    }

    /// Starts the server on the data it has (ending it first if it runs) and waits until it is healthy.
    pub fn restart(&mut self) -> anyhow::Result<()> {
        self.stop()?;
        let [client, peer] = self.ports.map(|port| format!("http://{}:{port}", self.ip));
        let log = fs::File::options()
            .create(true)
            .append(true)
            .open(self.log_path())?;
        let child = self
            .command(self.version.program())
            .args(["--name", "lab", "--data-dir"])
            .arg(self.dir.path().join("data"))
            .args([
                "--listen-client-urls",
                &client,
                "--advertise-client-urls",
                &client,
            ])
            .args([
                "--listen-peer-urls",
                &peer,
                "--initial-advertise-peer-urls",
                &peer,
            ])
            .args(["--initial-cluster", &format!("lab={peer}")])
            // A member alone has nobody to wait for.
            .args(["--heartbeat-interval", "20", "--election-timeout", "200"])
            .args(&self.args)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("run etcd")?;
        self.child = Some(child);
        try_eventually(LIMIT, "etcd is healthy", || match self.ended() {
            Some(status) => Ok(Err(anyhow::anyhow!("etcd ended with {status}"))),
            None => self
                .etcdctl(&["--command-timeout=1s", "endpoint", "health"])
                .map(Ok),
        })
        .and_then(|outcome| outcome)
        .with_context(|| format!("its last lines:\n{}", last_lines(&self.log(), 10)))?;
        Ok(())
    }

    fn ended(&mut self) -> Option<ExitStatus> {
        let child = self.child.as_mut()?;
        child.try_wait().ok().flatten()
    }

    /// Stops the server with SIGTERM; its data stays.
    pub fn stop(&mut self) -> anyhow::Result<()> {
        if let Some(mut child) = self.child.take() {
            process::terminate(&mut child, LIMIT)?;
        }
        Ok(())
    }

    /// Stops the server and throws its data away: the next [`Etcd::restart`] begins with an empty store at the same address.
    pub fn wipe(&mut self) -> anyhow::Result<()> {
        self.stop()?;
        fs::remove_dir_all(self.dir.path().join("data")).context("remove the data of etcd")
    }

    /// Kills the server with SIGKILL; its data stays.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            process::kill_and_reap(&mut child);
        }
    }

    /// Freezes the server: connections stay, nothing answers.
    pub fn pause(&self) -> anyhow::Result<()> {
        let child = self.child.as_ref().context("etcd is not running")?;
        Ok(process::signal(child, libc::SIGSTOP)?)
    }

    /// Ends a [`Etcd::pause`].
    pub fn resume(&self) -> anyhow::Result<()> {
        let child = self.child.as_ref().context("etcd is not running")?;
        Ok(process::signal(child, libc::SIGCONT)?)
    }

    /// Runs `etcdctl` (API version 3) against the server and gives its stdout.
    pub fn etcdctl(&self, args: &[&str]) -> anyhow::Result<String> {
        let mut cmd = self.command("etcdctl");
        cmd.env("ETCDCTL_API", "3");
        process::succeed(
            cmd.args(["--endpoints", &self.endpoint()]).args(args),
            COMMAND_LIMIT,
        )
    }

    /// Writes a key without a lease.
    pub fn put(&self, key: &str, value: &str) -> anyhow::Result<()> {
        self.etcdctl(&["put", "--", key, value]).map(drop)
    }

    /// The value of a key, if there is one.
    pub fn get(&self, key: &str) -> anyhow::Result<Option<String>> {
        let lines = self.etcdctl(&["get", "--", key])?;
        let value = lines.split_once('\n').map(|(_, value)| value);
        Ok(value.map(|value| value.strip_suffix('\n').unwrap_or(value).to_owned()))
    }

    /// The keys that begin with `prefix`, in order.
    pub fn keys(&self, prefix: &str) -> anyhow::Result<Vec<String>> {
        let lines = self.etcdctl(&["get", "--prefix", "--keys-only", "--", prefix])?;
        let keys = lines.lines().filter(|line| !line.is_empty());
        Ok(keys.map(str::to_owned).collect())
    }

    /// Removes a key.
    pub fn delete(&self, key: &str) -> anyhow::Result<()> {
        self.etcdctl(&["del", "--", key]).map(drop)
    }

    /// All that the server logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    fn log_path(&self) -> PathBuf {
        self.dir.path().join("etcd.log")
    }

    fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        if let Some(ns) = &self.ns {
            return ns.command(program);
        }
        let mut cmd = Command::new(program);
        // Number 0 is no lab's: what runs under it belongs to the process alone.
        cmd.env(OWNER_ENV, sweep::prefix(std::process::id(), 0));
        cmd
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Two ports that nobody listens on.
fn free_ports(ns: Option<&Netns>, ip: Ipv4Addr) -> anyhow::Result<[u16; 2]> {
    let bind = || {
        let both = [TcpListener::bind((ip, 0))?, TcpListener::bind((ip, 0))?];
        Ok::<_, std::io::Error>([both[0].local_addr()?.port(), both[1].local_addr()?.port()])
    };
    let ports = match ns {
        Some(ns) => ns.try_run(bind)?,
        None => bind(),
    };
    ports.with_context(|| format!("find free ports on {ip}"))
}
