//! One node with one agent, in a cluster of which nothing else is there but what the store says.

use std::{
    any::Any,
    fmt::Write as _,
    fs,
    io::Write as _,
    net::Ipv4Addr,
    os::unix::fs::MetadataExt as _,
    path::PathBuf,
    process::Stdio,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use flannel_testkit::{AgentProcess, ApiServer, Etcd, Lab, LabOptions};

use crate::{
    check_stop,
    cluster::{self, StoreChoice, read_env},
};

const PREFIX: &str = "/coreos.com/network";
/// Room for all peers, with subnets of 256 addresses.
const NETWORK: &str = r#"{"Network":"10.0.0.0/8","Backend":{"Type":"vxlan"}}"#;
const OWN: &str = "10.200.1.0/24";
const PATIENCE: Duration = Duration::from_mins(2);
/// How often is looked whether the agent is ready.
const LOOK: Duration = Duration::from_millis(1);
/// Keys that etcd takes in one request.
const BATCH: usize = 100;

/// Fields are dropped in order: the agent before its store, and that before the namespaces.
pub(super) struct Subject {
    agent: Option<AgentProcess>,
    flags: Vec<String>,
    peers: usize,
    binary: PathBuf,
    /// The store and the pod: nothing is asked of them, but that they are there.
    kept: Vec<Box<dyn Any>>,
    lab: Lab,
}

impl Subject {
    /// Makes the node and fills the store.
    pub(super) fn new(store: StoreChoice, peers: u32) -> anyhow::Result<Self> {
        let lab = Lab::new(LabOptions {
            nodes: 1,
            ..LabOptions::default()
        })?;
        let mut subject = Self {
            agent: None,
            flags: Vec::new(),
            peers: peers as usize,
            binary: cluster::agent_binary()?,
            kept: Vec::new(),
            lab,
        };
        let mut flags = match store {
            StoreChoice::Dir => subject.fill_dir(peers)?,
            StoreChoice::Etcd => subject.fill_etcd(peers)?,
            StoreChoice::Kube => subject.fill_kube(peers)?,
        };
        let run_dir = &subject.lab.node(0).run_dir;
        flags.extend([
            "--ip-masq".to_owned(),
            format!("--subnet-file={}", subject.subnet_file().display()),
            format!("--cni-cache-dir={}", run_dir.join("cni-cache").display()),
        ]);
        subject.flags = flags;
        Ok(subject)
    }

    fn fill_dir(&self, peers: u32) -> anyhow::Result<Vec<String>> {
        let dir = self.lab.node(0).run_dir.join("leases");
        let leases = dir.join("subnets");
        fs::create_dir_all(&leases).with_context(|| format!("create {}", leases.display()))?;
        fs::write(dir.join("config"), NETWORK)?;
        for (name, lease) in (1..=peers).map(lease) {
            fs::write(leases.join(&name), lease).with_context(|| format!("write {name}"))?;
        }
        Ok(vec![format!("--lease-dir={}", dir.display())])
    }

    fn fill_etcd(&mut self, peers: u32) -> anyhow::Result<Vec<String>> {
        let etcd = Etcd::start(Some(self.lab.underlay()), Lab::GATEWAY).context("start etcd")?;
        etcd.put(&format!("{PREFIX}/config"), NETWORK)?;
        let leases: Vec<(String, String)> = (1..=peers).map(lease).collect();
        for batch in leases.chunks(BATCH) {
            check_stop()?;
            // No conditions, these changes, nothing otherwise.
            let mut request = String::from("\n");
            for (name, lease) in batch {
                // Quoted as etcdctl reads it. Writing to a string does not fail.
                let _ok = writeln!(request, "put {PREFIX}/subnets/{name} {lease:?}");
            }
            request.push_str("\n\n");
            let mut etcdctl = self.lab.underlay().command("etcdctl");
            etcdctl
                .env("ETCDCTL_API", "3")
                .args(["--endpoints", &etcd.endpoint(), "txn"])
                .stdin(Stdio::piped())
                .stdout(Stdio::null());
            let mut child = etcdctl.spawn().context("run etcdctl")?;
            let mut stdin = child.stdin.take().context("its standard input")?;
            stdin.write_all(request.as_bytes())?;
            drop(stdin);
            if !child.wait()?.success() {
                bail!("etcdctl txn did not take {} leases", batch.len());
            }
        }
        let flags = vec![
            format!("--etcd-endpoints={}", etcd.endpoint()),
            format!("--etcd-prefix={PREFIX}"),
        ];
        self.kept.push(Box::new(etcd));
        Ok(flags)
    }

    fn fill_kube(&mut self, peers: u32) -> anyhow::Result<Vec<String>> {
        let api = ApiServer::start(Some(self.lab.underlay()), Lab::GATEWAY)?;
        let node = self.lab.node(0);
        api.create_node(&node.name, OWN)?;
        api.create_full_size_nodes(0..peers);
        let write = |name: &str, text: &str| {
            let path = node.run_dir.join(name);
            fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
            anyhow::Ok(path.display().to_string())
        };
        let flags = vec![
            "--kube-subnet-mgr".to_owned(),
            format!(
                "--kubeconfig-file={}",
                write("kubeconfig", &api.kubeconfig())?
            ),
            format!("--net-config-path={}", write("net-conf.json", NETWORK)?),
        ];
        self.kept.push(Box::new(api));
        Ok(flags)
    }

    fn subnet_file(&self) -> PathBuf {
        self.lab.node(0).run_dir.join("subnet.env")
    }

    /// Starts the agent and waits until it has written `subnet.env`; says how long that took, from before the process was made.
    pub(super) fn start(&mut self) -> anyhow::Result<Duration> {
        let file = self.subnet_file();
        let inode = || fs::metadata(&file).ok().map(|meta| meta.ino());
        let (before, node) = (inode(), self.lab.node(0));
        let flags: Vec<&str> = self.flags.iter().map(String::as_str).collect();
        let begun = Instant::now();
        let env = [("NODE_NAME", node.name.as_str())];
        let mut agent = AgentProcess::spawn(node, &self.binary, &flags, &env)?;
        loop {
            let now = inode();
            if now.is_some() && now != before {
                break;
            }
            check_stop()?;
            if !agent.is_running() || begun.elapsed() > PATIENCE {
                bail!("the agent is not ready: {}", agent.log());
            }
            thread::sleep(LOOK);
        }
        let took = begun.elapsed();
        self.agent = Some(agent);
        Ok(took)
    }

    /// Makes sure that the agent knows all peers: one without any needs little.
    pub(super) fn check(&self) -> anyhow::Result<()> {
        let routes = self.lab.node(0).ns.ip("route show dev flannel.1")?;
        let known = routes.lines().count();
        if known != self.peers {
            bail!("the agent has routes for {known} of {} peers", self.peers);
        }
        Ok(())
    }

    /// Ends the agent; what it has made stays.
    pub(super) fn stop(&mut self) -> anyhow::Result<()> {
        if let Some(mut agent) = self.agent.take() {
            agent.sigterm()?;
            agent.wait(PATIENCE)?;
        }
        Ok(())
    }

    /// Makes the node as it was before the first start.
    pub(super) fn forget(&mut self) -> anyhow::Result<()> {
        self.stop()?;
        let file = self.subnet_file();
        if !file.exists() {
            return Ok(());
        }
        let mut cleanup = self.lab.node(0).ns.command(&self.binary);
        let done = cleanup
            .arg("cleanup")
            .arg(format!("--subnet-file={}", file.display()))
            .output()
            .context("run the agent's cleanup")?;
        if !done.status.success() {
            bail!("cleanup: {}", String::from_utf8_lossy(&done.stderr).trim());
        }
        // Gone already is as good.
        drop(fs::remove_file(&file));
        Ok(())
    }

    /// Adds a pod, so that the fast path has something to look after.
    pub(super) fn add_pod(&mut self) -> anyhow::Result<()> {
        let env = read_env(&self.subnet_file())?;
        let pod = self.lab.node(0).add_pod_in(&env.subnets, 2, env.mtu)?;
        self.kept.push(Box::new(pod));
        Ok(())
    }

    pub(super) fn pid(&self) -> anyhow::Result<u32> {
        Ok(self.agent.as_ref().context("no agent")?.pid())
    }
}

/// A lease of a peer, by the name that it has in a directory as in etcd.
fn lease(number: u32) -> (String, String) {
    // From the far end: the agent takes the first free subnet or any.
    let subnet = Ipv4Addr::from((10 << 24) | ((65_536 - number) << 8));
    let ip = Ipv4Addr::from((172 << 24) | (16 << 16) | number);
    let [.., a, b] = number.to_be_bytes();
    let lease = format!(
        r#"{{"PublicIP":"{ip}","PublicIPv6":null,"BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"0e:00:00:00:{a:02x}:{b:02x}"}}}}"#
    );
    (format!("{subnet}-24"), lease)
}
