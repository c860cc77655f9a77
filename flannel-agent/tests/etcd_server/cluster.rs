//! Three members of one etcd, each of which may go and come back.

use std::{
    fs::File,
    path::PathBuf,
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use tempfile::TempDir;

use super::{START_TIMEOUT, free_port};

const MEMBERS: usize = 3;

pub(crate) struct EtcdCluster {
    members: Vec<Option<Child>>,
    ports: Vec<[u16; 2]>,
    dir: TempDir,
}

impl EtcdCluster {
    pub(crate) fn start() -> Self {
        let mut cluster = EtcdCluster {
            members: (0..MEMBERS).map(|_| None).collect(),
            ports: (0..MEMBERS).map(|_| [free_port(), free_port()]).collect(),
            dir: tempfile::tempdir().expect("temporary directory"),
        };
        for member in 0..MEMBERS {
            cluster.spawn(member);
        }
        for member in 0..MEMBERS {
            cluster.wait_ready(member);
        }
        cluster
    }

    pub(crate) fn url(&self, member: usize) -> String {
        let [client, _] = self.ports[member];
        format!("http://127.0.0.1:{client}")
    }

    pub(crate) fn urls(&self) -> Vec<String> {
        (0..MEMBERS).map(|member| self.url(member)).collect()
    }

    /// Kills a member; its data stays.
    pub(crate) fn kill(&mut self, member: usize) {
        let mut child = self.members[member].take().expect("the member runs");
        child.kill().expect("kill etcd");
        child.wait().expect("wait for etcd");
    }

    /// Starts a member that was killed, and waits until it serves.
    pub(crate) fn restart(&mut self, member: usize) {
        self.spawn(member);
        self.wait_ready(member);
        self.ctl(member, &["get", "nothing"]);
    }

    /// Runs etcdctl against a member, once the cluster has a leader.
    pub(crate) fn ctl(&self, member: usize, args: &[&str]) -> String {
        let deadline = Instant::now() + START_TIMEOUT;
        while !self
            .etcdctl(member, &["endpoint", "health"])
            .status
            .success()
        {
            assert!(Instant::now() < deadline, "no leader");
        }
        let output = self.etcdctl(member, args);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "etcdctl {args:?}: {stderr}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    fn etcdctl(&self, member: usize, args: &[&str]) -> Output {
        Command::new("etcdctl")
            .env("ETCDCTL_API", "3")
            .arg(format!("--endpoints={}", self.url(member)))
            .args(args)
            .output()
            .expect("etcdctl: is etcd-client installed?")
    }

    fn log(&self, member: usize) -> PathBuf {
        self.dir.path().join(format!("m{member}.log"))
    }

    fn spawn(&mut self, member: usize) {
        let log = File::create(self.log(member)).expect("a log");
        let peer_url = |ports: &[u16; 2]| format!("http://127.0.0.1:{}", ports[1]);
        let all: Vec<String> = self
            .ports
            .iter()
            .enumerate()
            .map(|(index, ports)| format!("m{index}={}", peer_url(ports)))
            .collect();
        let (client, peer) = (self.url(member), peer_url(&self.ports[member]));
        let child = Command::new(crate::ETCD.program())
            .arg("--data-dir")
            .arg(self.dir.path().join(format!("m{member}")))
            .args(["--name", &format!("m{member}")])
            .args(["--listen-client-urls", &client])
            .args(["--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer])
            .args(["--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &all.join(",")])
            .args(["--heartbeat-interval=50", "--election-timeout=500"])
            .args(["--unsafe-no-fsync"])
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("log"))
            .stderr(log)
            .spawn();
        self.members[member] = Some(child.expect("run etcd"));
    }

    fn wait_ready(&self, member: usize) {
        let deadline = Instant::now() + START_TIMEOUT;
        loop {
            let log = std::fs::read_to_string(self.log(member)).unwrap_or_default();
            if log.contains("ready to serve client requests") {
                return;
            }
            assert!(
                Instant::now() < deadline,
                "m{member} does not start:\n{log}"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for EtcdCluster {
    fn drop(&mut self) {
        for child in self.members.iter_mut().flatten() {
            // Both fail only for one that has ended already.
            drop(child.kill());
            drop(child.wait());
        }
    }
}
