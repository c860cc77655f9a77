//! The Kubernetes API that a test runs against: the lab's own server, or the cluster that `KUBECONFIG` names.
//!
//! A real cluster is driven with `kubectl`, and reached from inside the lab through a relay. Nodes that a test makes there are
//! removed with the [`Cluster`]. Faults are to be had from the lab's own server alone ([`Cluster::fake`]).

use crate::apiserver::{self, ApiServer, Kind};
use crate::netns::Netns;
use crate::process;
use crate::relay::Relay;
use anyhow::{Context as _, bail};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tempfile::TempDir;

/// How long `kubectl` may take.
const LIMIT: Duration = Duration::from_secs(30);

/// A Kubernetes API.
#[derive(Debug)]
pub enum Cluster {
    /// The lab's own server.
    Fake(Box<ApiServer>),
    /// A real cluster.
    Real(Real),
}

/// A real cluster, by its kubeconfig.
#[derive(Debug)]
pub struct Real {
    kubeconfig: PathBuf,
    /// What agents in the lab get.
    inside: String,
    made: Mutex<BTreeSet<String>>,
    dir: TempDir,
    _relay: Relay,
    /// One test at a time: the nodes of another one would be peers.
    _turn: File,
}

impl Cluster {
    /// The cluster of `KUBECONFIG`, else a server of the lab's own on `ip` in `ns`.
    pub fn start(ns: &Netns, ip: Ipv4Addr) -> anyhow::Result<Cluster> {
        match std::env::var_os("KUBECONFIG").filter(|path| !path.is_empty()) {
            Some(path) => Cluster::real(ns, ip, Path::new(&path)),
            None => Ok(Cluster::Fake(Box::new(ApiServer::start(Some(ns), ip)?))),
        }
    }

    /// A real cluster, relayed to `ip` in `ns`.
    pub fn real(ns: &Netns, ip: Ipv4Addr, kubeconfig: &Path) -> anyhow::Result<Cluster> {
        let turn = File::create(std::env::temp_dir().join("flannel-testkit-cluster.lock"))?;
        turn.lock().context("wait for our turn at the cluster")?;
        let words = [
            "config",
            "view",
            "--raw",
            "--minify",
            "--flatten",
            "-o",
            "json",
        ];
        let text = kubectl(kubeconfig, &words)?;
        let mut config: Value = serde_json::from_str(&text).context("kubectl config view")?;
        let cluster = &mut config["clusters"][0]["cluster"];
        let url = cluster["server"]
            .as_str()
            .context("a cluster without server")?;
        let (host, rest) = url
            .strip_prefix("https://")
            .map(|rest| rest.split_once('/').unwrap_or((rest, "")))
            .with_context(|| format!("{url}: only https is supported"))?;
        let (name, target) = match host.rsplit_once(':') {
            Some((name, _)) => (name.to_owned(), host.to_owned()),
            None => (host.to_owned(), format!("{host}:443")),
        };
        let relay = Relay::start(ns, ip, &target)?;
        let server = format!("https://{}/{rest}", relay.address());
        cluster["server"] = server.trim_end_matches('/').into();
        if cluster.get("tls-server-name").is_none() {
            cluster["tls-server-name"] = name.into();
        }
        Ok(Cluster::Real(Real {
            kubeconfig: kubeconfig.to_owned(),
            inside: config.to_string(),
            made: Mutex::new(BTreeSet::new()),
            dir: TempDir::new()?,
            _relay: relay,
            _turn: turn,
        }))
    }

    /// The lab's own server, with which everything can be done.
    #[track_caller]
    pub fn fake(&self) -> &ApiServer {
        match self {
            Cluster::Fake(server) => server,
            Cluster::Real(_) => panic!("a real cluster has no faults on demand"),
        }
    }

    /// The kubeconfig for agents in the lab.
    pub fn kubeconfig(&self) -> String {
        match self {
            Cluster::Fake(server) => server.kubeconfig(),
            Cluster::Real(real) => real.inside.clone(),
        }
    }

    /// Adds a node with this subnet.
    pub fn create_node(&self, name: &str, pod_cidr: &str) -> anyhow::Result<()> {
        let node = apiserver::node(name, &[pod_cidr]);
        match self {
            Cluster::Fake(server) => server.create(Kind::Node, node).map(drop),
            Cluster::Real(real) => real.create(name, node),
        }
    }

    /// A node as it is stored.
    pub fn node(&self, name: &str) -> anyhow::Result<Option<Value>> {
        match self {
            Cluster::Fake(server) => Ok(server.node(name)),
            Cluster::Real(real) => {
                let words = ["get", "node", name, "-o", "json", "--ignore-not-found"];
                let text = real.kubectl(&words)?;
                if text.trim().is_empty() {
                    return Ok(None);
                }
                Ok(Some(serde_json::from_str(&text)?))
            }
        }
    }

    /// All nodes.
    pub fn nodes(&self) -> anyhow::Result<Vec<Value>> {
        match self {
            Cluster::Fake(server) => Ok(server.all(Kind::Node)),
            Cluster::Real(real) => {
                let text = real.kubectl(&["get", "nodes", "-o", "json"])?;
                let mut list: Value = serde_json::from_str(&text)?;
                Ok(serde_json::from_value(list["items"].take())?)
            }
        }
    }

    /// The annotations of a node.
    pub fn annotations(&self, name: &str) -> anyhow::Result<BTreeMap<String, String>> {
        let node = self
            .node(name)?
            .with_context(|| format!("no node {name}"))?;
        let annotations = node["metadata"]["annotations"].as_object();
        let pairs = annotations.into_iter().flatten();
        Ok(pairs
            .map(|(name, value)| (name.clone(), value.as_str().unwrap_or_default().to_owned()))
            .collect())
    }

    /// Sets annotations of a node; `None` removes one.
    pub fn annotate(&self, name: &str, annotations: &[(&str, Option<&str>)]) -> anyhow::Result<()> {
        match self {
            Cluster::Fake(server) => server.annotate(name, annotations),
            Cluster::Real(real) => {
                let words = annotations.iter().map(|(key, value)| match value {
                    Some(value) => format!("{key}={value}"),
                    None => format!("{key}-"),
                });
                let words: Vec<String> = words.collect();
                let mut all = vec!["annotate", "node", name, "--overwrite"];
                all.extend(words.iter().map(String::as_str));
                real.kubectl(&all).map(drop)
            }
        }
    }

    /// Removes a node.
    pub fn delete_node(&self, name: &str) -> anyhow::Result<()> {
        match self {
            Cluster::Fake(server) => server.delete_node(name),
            Cluster::Real(real) => real.delete(name),
        }
    }

    /// The events about a node, as the core group shows them.
    pub fn events_about(&self, node: &str) -> anyhow::Result<Vec<Value>> {
        let events = match self {
            Cluster::Fake(server) => server.all(Kind::Event),
            Cluster::Real(real) => {
                let text = real.kubectl(&["get", "events", "-A", "-o", "json"])?;
                let mut list: Value = serde_json::from_str(&text)?;
                serde_json::from_value(list["items"].take())?
            }
        };
        let about = |event: &Value| {
            event["involvedObject"]["kind"] == "Node" && event["involvedObject"]["name"] == node
        };
        Ok(events.into_iter().filter(about).collect())
    }
}

impl Real {
    fn kubectl(&self, words: &[&str]) -> anyhow::Result<String> {
        kubectl(&self.kubeconfig, words)
    }

    fn create(&self, name: &str, mut node: Value) -> anyhow::Result<()> {
        node["kind"] = "Node".into();
        node["apiVersion"] = "v1".into();
        let file = self.dir.path().join("node.json");
        std::fs::write(&file, node.to_string())?;
        self.lock().insert(name.to_owned());
        let file = file.display().to_string();
        self.kubectl(&["create", "--validate=false", "-f", &file])
            .map(drop)
    }

    fn delete(&self, name: &str) -> anyhow::Result<()> {
        self.kubectl(&["delete", "node", name])?;
        self.lock().remove(name);
        Ok(())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeSet<String>> {
        self.made.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Real {
    fn drop(&mut self) {
        let made = std::mem::take(&mut *self.lock());
        for name in made {
            if let Err(error) = self.kubectl(&["delete", "node", &name, "--ignore-not-found"]) {
                eprintln!("node {name} stays in the cluster: {error:#}");
            }
        }
    }
}

fn kubectl(kubeconfig: &Path, words: &[&str]) -> anyhow::Result<String> {
    if !kubeconfig.exists() {
        bail!("KUBECONFIG: no file {}", kubeconfig.display());
    }
    let mut command = Command::new("kubectl");
    command.env("KUBECONFIG", kubeconfig);
    // What it caches of the server is of no use to anybody else.
    let cache = TempDir::new()?;
    command.arg(format!("--cache-dir={}", cache.path().display()));
    process::succeed(command.args(words), LIMIT)
}
