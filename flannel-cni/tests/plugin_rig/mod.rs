//! A node with a `subnet.env` and a runtime, and what other programs say of it.

#![allow(dead_code, reason = "every test binary uses a part of it")]

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use flannel_testkit::{Lab, LabOptions, Node, cni::Runtime, json::ip_json, privileged};
use serde_json::{Value, json};

/// What upstream's agent writes, with the node's subnet of the lab.
pub(crate) const ENV: &str = "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n";

pub(crate) struct Host {
    pub(crate) runtime: Runtime,
    lab: Lab,
}

impl Host {
    /// A node without an agent. `None` without root.
    pub(crate) fn new(env: &str) -> Option<Host> {
        if !privileged() {
            return None;
        }
        let lab = Lab::new(LabOptions {
            nodes: 1,
            ..LabOptions::default()
        })
        .expect("a lab");
        let flannel = Path::new(env!("CARGO_BIN_EXE_flannel"));
        let runtime = Runtime::new(lab.node(0), flannel).expect("a runtime");
        let host = Host { runtime, lab };
        host.write_env(env);
        Some(host)
    }

    pub(crate) fn node(&self) -> &Node {
        self.lab.node(0)
    }

    pub(crate) fn subnet_file(&self) -> PathBuf {
        self.node().run_dir.join("subnet.env")
    }

    pub(crate) fn write_env(&self, env: &str) {
        fs::write(self.subnet_file(), env).expect("write subnet.env");
    }

    /// What the flannel plugin is called with.
    pub(crate) fn conf(&self) -> Value {
        self.runtime
            .conf(self.runtime.flannel(), None, &Value::Null)
    }

    /// The same in the newest version.
    pub(crate) fn new_conf(&self) -> Value {
        let mut conf = self.conf();
        conf["cniVersion"] = json!("1.1.0");
        conf
    }
}

/// The ports of cni0.
pub(crate) fn ports(host: &Host) -> BTreeSet<String> {
    let links = ip_json(&host.node().ns, &["link", "show", "master", "cni0"]).expect("list ports");
    links
        .as_array()
        .into_iter()
        .flatten()
        .map(|link| text(&link["ifname"]))
        .collect()
}

/// The IPv4 addresses of cni0.
pub(crate) fn bridge_addresses(host: &Host) -> Vec<String> {
    let links =
        ip_json(&host.node().ns, &["-4", "addr", "show", "dev", "cni0"]).expect("list addresses");
    let infos = links[0]["addr_info"].as_array().into_iter().flatten();
    infos
        .map(|info| format!("{}/{}", text(&info["local"]), info["prefixlen"]))
        .collect()
}

pub(crate) fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}
