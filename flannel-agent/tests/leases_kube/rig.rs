//! A cluster: an API server, and what a node needs to use it.

use std::{fs, net::Ipv4Addr, path::PathBuf, time::Duration};

use flannel_agent::leases::{KubeOptions, Offer, StoreConfig};
use flannel_core::{
    addr::Family,
    config::{BackendKind, NetConf},
};
use flannel_testkit::apiserver::{ApiServer, Asked, Kind, Rule, service_account, upstream_rules};
use serde_json::Value;
use tempfile::TempDir;
use tokio::time::{sleep, timeout};

use crate::lease_rig::{self, PATIENCE, attrs};

pub(crate) const CONF: &str = r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}"#;
pub(crate) const PREFIX: &str = "flannel.alpha.coreos.com/";

pub(crate) struct Cluster {
    pub(crate) api: ApiServer,
    pub(crate) dir: TempDir,
}

impl Cluster {
    /// Nodes `n<number>` with subnet 10.5.<number>.0/24.
    pub(crate) fn new(nodes: &[u8]) -> Self {
        let api = ApiServer::start(None, Ipv4Addr::LOCALHOST).expect("an API server");
        for number in nodes {
            let subnet = format!("10.5.{number}.0/24");
            api.create_node(&format!("n{number}"), &subnet)
                .expect("a node");
        }
        let dir = tempfile::tempdir().expect("a directory");
        fs::write(dir.path().join("net-conf.json"), CONF).expect("net-conf.json");
        fs::write(dir.path().join("kubeconfig"), api.kubeconfig()).expect("kubeconfig");
        Self { api, dir }
    }

    pub(crate) fn options(&self, node: u8) -> KubeOptions {
        KubeOptions {
            kubeconfig: Some(self.dir.path().join("kubeconfig")),
            net_config_path: self.dir.path().join("net-conf.json"),
            memory: Some(self.memory(node)),
            node_name: Some(format!("n{node}")),
            patience: Duration::from_millis(300),
            ..KubeOptions::default()
        }
    }

    pub(crate) fn memory(&self, node: u8) -> PathBuf {
        self.dir.path().join(format!("n{node}.env.kube.json"))
    }

    pub(crate) fn config(&self, node: u8) -> StoreConfig {
        store(self.options(node))
    }

    pub(crate) async fn agent(&self, node: u8) -> lease_rig::Agent {
        lease_rig::Agent::start(&self.config(node), offer(node)).await
    }

    /// Makes a node look as one with flannel.
    pub(crate) fn peer(&self, name: &str, host: u8) {
        let attrs = attrs(host);
        let mac = attrs.vxlan(Family::V4).expect("vxlan data").mac;
        let data = format!(r#"{{"VNI":1,"VtepMAC":"{mac}"}}"#);
        let ip = format!("192.168.77.{host}");
        let fields = [
            ("backend-data", data.as_str()),
            ("backend-type", "vxlan"),
            ("kube-subnet-manager", "true"),
            ("public-ip", ip.as_str()),
        ];
        for (field, value) in fields {
            self.set(name, field, Some(value));
        }
    }

    pub(crate) fn set(&self, node: &str, field: &str, value: Option<&str>) {
        let key = format!("{PREFIX}{field}");
        self.api.annotate(node, &[(&key, value)]).expect("annotate");
    }

    pub(crate) fn get(&self, node: &str, field: &str) -> Option<String> {
        let node = self.api.node(node)?;
        let value = &node["metadata"]["annotations"][format!("{PREFIX}{field}")];
        value.as_str().map(ToOwned::to_owned)
    }

    /// The service account may do this, too.
    pub(crate) fn allow(&self, more: &[(&str, &[&str])]) {
        let mut rules = upstream_rules();
        rules.extend(
            more.iter()
                .map(|(resource, verbs)| Rule::core(resource, verbs)),
        );
        self.api.set_rules(&service_account(), rules);
    }

    pub(crate) fn allow_events(&self) {
        self.allow(&[("events", &["create", "patch"])]);
    }

    /// Requests of a method whose path ends like this.
    pub(crate) fn asked(&self, method: &str, end: &str) -> Vec<Asked> {
        let asked = self.api.asked().into_iter();
        asked
            .filter(|one| one.method == method && one.path.ends_with(end))
            .collect()
    }

    pub(crate) fn event(&self, reason: &str) -> Option<Value> {
        let events = self.api.all(Kind::Event);
        events.into_iter().find(|event| event["reason"] == reason)
    }

    /// The node's condition NetworkUnavailable.
    pub(crate) fn condition(&self, node: &str) -> Value {
        let node = self.api.node(node).expect("the node");
        let conditions = node["status"]["conditions"].as_array().cloned();
        let mut conditions = conditions.unwrap_or_default().into_iter();
        conditions
            .find(|condition| condition["type"] == "NetworkUnavailable")
            .unwrap_or_default()
    }
}

pub(crate) fn store(options: KubeOptions) -> StoreConfig {
    StoreConfig::Kube(Box::new(options))
}

pub(crate) fn offer(node: u8) -> Offer {
    with_conf(node, CONF)
}

/// What a node of both families asks for.
pub(crate) fn dual(node: u8, kind: BackendKind) -> Offer {
    let conf = lease_rig::dual_conf(kind);
    Offer {
        conf: NetConf::parse_assigned(&conf).expect("network configuration"),
        ..lease_rig::dual(node, kind)
    }
}

pub(crate) fn with_conf(node: u8, conf: &str) -> Offer {
    Offer {
        conf: NetConf::parse_assigned(conf).expect("network configuration"),
        ..lease_rig::offer(node, lease_rig::CONF)
    }
}

/// Waits until something holds.
#[track_caller]
pub(crate) fn until(what: &str, holds: impl Fn() -> bool) -> impl Future<Output = ()> {
    let what = what.to_owned();
    async move {
        let seen = async {
            while !holds() {
                sleep(Duration::from_millis(10)).await;
            }
        };
        assert!(timeout(PATIENCE, seen).await.is_ok(), "not in time: {what}");
    }
}
