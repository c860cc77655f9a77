//! An etcd of our own on loopback: free ports, its own data directory, gone when dropped.

pub(crate) mod cluster;

use std::{
    fs::File,
    net::TcpListener,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use tempfile::TempDir;

const START_TIMEOUT: Duration = Duration::from_secs(30);
const PATIENCE: Duration = Duration::from_secs(40);

/// One etcd process.
pub(crate) struct EtcdServer {
    child: Option<Child>,
    dir: TempDir,
    port: u16,
    peer_port: u16,
    scheme: &'static str,
    args: Vec<String>,
}

fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind a free port");
    listener.local_addr().expect("local address").port()
}

impl EtcdServer {
    pub(crate) fn start() -> Self {
        Self::start_with("http", &[])
    }

    /// Starts with a scheme for clients and further arguments.
    pub(crate) fn start_with(scheme: &'static str, args: &[&str]) -> Self {
        let mut server = EtcdServer {
            child: None,
            dir: tempfile::tempdir().expect("temporary directory"),
            port: free_port(),
            peer_port: free_port(),
            scheme,
            args: args.iter().map(|&arg| arg.to_owned()).collect(),
        };
        server.spawn();
        server
    }

    pub(crate) fn url(&self) -> String {
        format!("{}://127.0.0.1:{}", self.scheme, self.port)
    }

    fn spawn(&mut self) {
        let log = File::create(self.dir.path().join("etcd.log")).expect("etcd.log");
        let peer = format!("http://127.0.0.1:{}", self.peer_port);
        let url = self.url();
        let mut command = Command::new(crate::ETCD.program());
        command
            .arg("--data-dir")
            .arg(self.dir.path().join("data"))
            .args(["--name", "test", "--listen-client-urls", &url])
            .args(["--advertise-client-urls", &url])
            .args(["--listen-peer-urls", &peer])
            .args(["--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("test={peer}")])
            .args(["--unsafe-no-fsync"])
            .args(&self.args)
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("log"))
            .stderr(log);
        self.child = Some(command.spawn().expect("etcd: is etcd-server installed?"));
        self.wait_ready();
    }

    /// Ready when the member says so in its log: a port that listens may belong to a member without a leader.
    fn wait_ready(&mut self) {
        let deadline = Instant::now() + START_TIMEOUT;
        loop {
            let log = std::fs::read_to_string(self.dir.path().join("etcd.log")).unwrap_or_default();
            if log.contains("ready to serve client requests") {
                return;
            }
            let ended = self.child.as_mut().and_then(|child| child.try_wait().ok());
            assert!(
                ended.flatten().is_none() && Instant::now() < deadline,
                "etcd does not start:\n{log}"
            );
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Kills the process and keeps the data.
    pub(crate) fn stop(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().expect("kill etcd");
            child.wait().expect("wait for etcd");
        }
    }

    pub(crate) fn restart(&mut self) {
        self.stop();
        self.spawn();
    }

    /// Runs `work` while the data is served on another port, out of sight of everybody else, and stops again.
    pub(crate) fn aside(&mut self, work: impl FnOnce(&Self)) {
        self.stop();
        let port = std::mem::replace(&mut self.port, free_port());
        self.spawn();
        work(self);
        self.stop();
        self.port = port;
    }

    /// Sends a signal to the process: `STOP`, `CONT`.
    pub(crate) fn signal(&self, name: &str) {
        let pid = self.child.as_ref().expect("etcd is running").id();
        let status = Command::new("kill")
            .args([format!("-{name}"), pid.to_string()])
            .status();
        assert!(status.is_ok_and(|status| status.success()), "kill -{name}");
    }

    /// Waits until `wanted` holds, without blocking the agents of the same test.
    pub(crate) async fn until(&self, what: &str, wanted: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !wanted(self) {
            assert!(
                Instant::now() < deadline,
                "{what}: not in time; keys {:?}",
                self.keys("")
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Throws the data away; to be called while stopped.
    pub(crate) fn wipe(&mut self) {
        assert!(self.child.is_none(), "etcd is running");
        std::fs::remove_dir_all(self.dir.path().join("data")).expect("remove the data");
    }

    /// Runs etcdctl and returns what it prints.
    pub(crate) fn ctl(&self, args: &[&str]) -> String {
        let output = Command::new("etcdctl")
            .env("ETCDCTL_API", "3")
            .arg(format!("--endpoints={}", self.url()))
            .args(args)
            .output()
            .expect("etcdctl: is etcd-client installed?");
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "etcdctl {args:?}: {stderr}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// The names of the keys with a prefix.
    pub(crate) fn keys(&self, prefix: &str) -> Vec<String> {
        let listed = self.ctl(&["get", "--prefix", "--keys-only", prefix]);
        let lines = listed.lines().filter(|line| !line.is_empty());
        lines.map(ToOwned::to_owned).collect()
    }

    /// The value of a key, without the end of line that etcdctl adds.
    pub(crate) fn value(&self, key: &str) -> String {
        let value = self.ctl(&["get", "--print-value-only", key]);
        value.strip_suffix('\n').unwrap_or(&value).to_owned()
    }

    /// One number of a key's meta data: `ModRevision`, `Version` or `Lease`.
    pub(crate) fn meta(&self, key: &str, field: &str) -> i64 {
        let fields = self.ctl(&["get", "-w", "fields", key]);
        let start = format!("\"{field}\" : ");
        let number = fields.lines().find_map(|line| line.strip_prefix(&start));
        number
            .unwrap_or_else(|| panic!("no {field} in:\n{fields}"))
            .parse()
            .expect("a number")
    }

    /// The ids of all etcd leases, in etcdctl's hexadecimal form.
    pub(crate) fn leases(&self) -> Vec<String> {
        let listed = self.ctl(&["lease", "list"]);
        listed.lines().skip(1).map(ToOwned::to_owned).collect()
    }
}

impl Drop for EtcdServer {
    fn drop(&mut self) {
        self.stop();
    }
}
