//! All nodes of a cluster as one list of leases.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use super::{Families, Names, Node, NodeError, read_lease};
use crate::lease::{LeaseAttrs, SubnetKey};

/// What the nodes of a cluster amount to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cluster {
    /// The leases by subnet.
    pub leases: BTreeMap<SubnetKey, LeaseAttrs>,
    /// Which node each is of.
    pub holders: BTreeMap<SubnetKey, String>,
    /// What could not be read, by node.
    pub problems: BTreeMap<String, Vec<NodeError>>,
    /// Nodes that lost their subnet to another one with the same.
    pub twins: Vec<Twin>,
}

/// Two nodes with one subnet.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Twin {
    /// The subnet.
    pub key: SubnetKey,
    /// The node it counts as.
    pub kept: String,
    /// The other one.
    pub left_out: String,
}

/// Reads all nodes that take part, but for `except`. Of two with the same subnet the one made last has it: the object of a machine
/// that is gone may linger.
pub fn read_cluster<'a>(
    nodes: impl IntoIterator<Item = &'a Node>,
    names: &Names,
    families: Families,
    except: &str,
) -> Cluster {
    let mut cluster = Cluster::default();
    let mut taking_part: Vec<&Node> = nodes
        .into_iter()
        .filter(|node| node.name != except && node.takes_part(names))
        .collect();
    taking_part.sort_by(|a, b| (&a.created, &a.name).cmp(&(&b.created, &b.name)));
    for node in taking_part {
        let reading = read_lease(node, names, families);
        if !reading.problems.is_empty() {
            cluster.problems.insert(node.name.clone(), reading.problems);
        }
        let Some(lease) = reading.lease else { continue };
        cluster.leases.insert(lease.key, lease.attrs);
        if let Some(before) = cluster.holders.insert(lease.key, node.name.clone()) {
            cluster.twins.push(Twin {
                key: lease.key,
                kept: node.name.clone(),
                left_out: before,
            });
        }
    }
    cluster
}

/// Public addresses that more than one node has, with the nodes.
pub fn shared_addresses<'a>(
    leases: impl IntoIterator<Item = (&'a str, &'a LeaseAttrs)>,
) -> BTreeMap<IpAddr, BTreeSet<String>> {
    let mut holders: BTreeMap<IpAddr, BTreeSet<String>> = BTreeMap::new();
    for (node, attrs) in leases {
        let v4 = attrs.public_ip.map(IpAddr::V4);
        let v6 = attrs.public_ipv6.map(IpAddr::V6);
        for address in v4.into_iter().chain(v6) {
            holders.entry(address).or_default().insert(node.to_owned());
        }
    }
    holders.retain(|_, nodes| nodes.len() > 1);
    holders
}
