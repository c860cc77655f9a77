//! The last known state of the cluster: a file beside `subnet.env`, for a start while the API does not answer.

use std::{collections::BTreeMap, path::Path};

use flannel_core::{
    config::NetConf,
    kube::{Names, Node},
};
use serde::{Deserialize, Serialize};
use tracing::{debug, info};

use crate::files;

/// Version of the form of the file.
const VERSION: u32 = 1;

/// The file, while it is written.
#[derive(Debug, Serialize)]
struct Written<'a> {
    version: u32,
    node: &'a str,
    networks: String,
    nodes: Vec<&'a Node>,
}

/// The file.
#[derive(Debug, Deserialize)]
struct Memory {
    version: u32,
    /// This node's name.
    node: String,
    /// The networks that the subnets are of.
    networks: String,
    /// The nodes that take part, and this one.
    nodes: Vec<Node>,
}

fn networks(conf: &NetConf) -> String {
    let v4 = conf.ipv4.map(|family| family.network.to_string());
    let v6 = conf.ipv6.map(|family| family.network.to_string());
    v4.into_iter().chain(v6).collect::<Vec<_>>().join(" ")
}

/// The text of the file.
pub(super) fn text(
    nodes: &BTreeMap<String, Node>,
    own: &str,
    names: &Names,
    conf: &NetConf,
) -> Option<String> {
    let taking_part = nodes.values();
    let memory = Written {
        version: VERSION,
        node: own,
        networks: networks(conf),
        nodes: taking_part
            .filter(|node| node.name == own || node.takes_part(names))
            .collect(),
    };
    serde_json::to_string(&memory)
        .inspect_err(|error| debug!(%error, "write the last known state"))
        .ok()
}

/// Writes the file, if it says something else than before.
pub(super) async fn save(path: &Path, text: String) -> bool {
    let path = path.to_owned();
    let written = tokio::task::spawn_blocking(move || files::replace(&path, &text)).await;
    match written {
        Ok(Ok(())) => true,
        Ok(Err(error)) => {
            debug!(
                error = crate::telemetry::chain(&error),
                "write the last known state"
            );
            false
        }
        Err(_stopped) => false,
    }
}

/// Reads the file. `None` when it is not there, or is of another node or another network.
pub(super) fn load(
    path: &Path,
    node: Option<&str>,
    conf: &NetConf,
) -> Option<(String, BTreeMap<String, Node>)> {
    let text = std::fs::read_to_string(path).ok()?;
    let file = path.display();
    let memory: Memory = match serde_json::from_str(&text) {
        Ok(memory) => memory,
        Err(error) => {
            info!(%file, %error, "the last known state cannot be read and is not used");
            return None;
        }
    };
    let refused = if memory.version != VERSION {
        Some(format!("it has version {}, not {VERSION}", memory.version))
    } else if node.is_some_and(|node| node != memory.node) {
        Some(format!("it is of node {:?}", memory.node))
    } else if memory.networks != networks(conf) {
        Some(format!(
            "it is of network {}, not {}",
            memory.networks,
            networks(conf)
        ))
    } else {
        None
    };
    if let Some(reason) = refused {
        info!(%file, reason, "the last known state is not used");
        return None;
    }
    let nodes = memory.nodes.into_iter();
    let nodes = nodes.map(|node| (node.name.clone(), node)).collect();
    Some((memory.node, nodes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn conf(network: &str) -> NetConf {
        let json = format!(r#"{{"Network":"{network}","Backend":{{"Type":"vxlan"}}}}"#);
        NetConf::parse_assigned(&json).unwrap()
    }

    #[tokio::test]
    async fn what_was_written_is_read_by_the_same_node_in_the_same_network_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("subnet.env.kube.json");
        let names = Names::new("example.com").unwrap();
        let node = |name: &str, part: &str| Node {
            name: name.into(),
            uid: format!("uid of {name}"),
            created: "2026-01-01T00:00:00Z".into(),
            annotations: [("example.com/kube-subnet-manager".into(), part.into())].into(),
            pod_cidrs: vec!["10.5.1.0/24".into()],
            ..Node::default()
        };
        let nodes = [node("a", "false"), node("b", "true"), node("c", "false")];
        let nodes: BTreeMap<String, Node> = nodes.map(|node| (node.name.clone(), node)).into();
        let text = text(&nodes, "a", &names, &conf("10.5.0.0/16")).unwrap();
        assert!(save(&path, text).await);
        let (own, read) = load(&path, Some("a"), &conf("10.5.0.0/16")).unwrap();
        assert_eq!(own, "a");
        assert_eq!(read.keys().collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!(read["b"], nodes["b"]);
        assert!(load(&path, None, &conf("10.5.0.0/16")).is_some());
        assert!(load(&path, Some("b"), &conf("10.5.0.0/16")).is_none());
        assert!(load(&path, Some("a"), &conf("10.6.0.0/16")).is_none());
        std::fs::write(&path, "{\"version\":1").unwrap();
        assert!(load(&path, Some("a"), &conf("10.5.0.0/16")).is_none());
    }
}
