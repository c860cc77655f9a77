//! What is read from a Node object. Nearly all of it is left out while reading: a cluster has thousands, each of many kilobytes.

use std::{collections::BTreeMap, fmt, net::IpAddr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{
    Deserialize, Serialize, Serializer,
    de::{Deserializer, MapAccess, Visitor},
};
use thiserror::Error;

use super::{Field, Names};
use crate::{
    addr::Family,
    config::{BackendKind, NetConf},
    json::Json,
    lease::{BackendData, Lease, LeaseAttrs, SubnetKey},
};

/// A Node object, trimmed to what flannel needs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Node {
    /// `metadata.name`.
    pub name: String,
    /// `metadata.uid`: another one after the object was deleted and made again.
    pub uid: String,
    /// `metadata.resourceVersion`.
    pub resource_version: String,
    /// `metadata.creationTimestamp`, in RFC 3339, so that it sorts.
    pub created: String,
    /// The annotations that end in one of flannel's names, whatever their prefix.
    pub annotations: BTreeMap<String, String>,
    /// `spec.podCIDR`, empty when there is none.
    pub pod_cidr: String,
    /// `spec.podCIDRs`.
    pub pod_cidrs: Vec<String>,
}

impl Node {
    /// The value of an annotation; an empty one is none, as upstream has it.
    pub fn get(&self, names: &Names, field: Field) -> Option<&str> {
        let value = self.annotations.get(&names.key(field))?;
        Some(value.as_str()).filter(|value| !value.is_empty())
    }

    /// Whether the node takes part in flannel.
    pub fn takes_part(&self, names: &Names) -> bool {
        self.get(names, Field::KubeSubnetManager) == Some("true")
    }

    /// Whether anything differs that matters here: nodes are written every few seconds for other reasons.
    pub fn is_same(&self, other: &Self) -> bool {
        self.uid == other.uid
            && self.annotations == other.annotations
            && self.pod_cidr == other.pod_cidr
            && self.pod_cidrs == other.pod_cidrs
    }
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let WireNode { metadata, spec } = WireNode::deserialize(deserializer)?;
        Ok(Self {
            name: metadata.name,
            uid: metadata.uid,
            resource_version: metadata.resource_version,
            created: metadata.creation_timestamp.unwrap_or_default(),
            annotations: metadata.annotations.unwrap_or_default().0,
            pod_cidr: spec.pod_cidr.unwrap_or_default(),
            pod_cidrs: spec.pod_cidrs.unwrap_or_default(),
        })
    }
}

/// In the API's form, so that it is read back the same way.
impl Serialize for Node {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serde_json::json!({
            "metadata": {
                "name": self.name,
                "uid": self.uid,
                "resourceVersion": self.resource_version,
                "creationTimestamp": self.created,
                "annotations": self.annotations,
            },
            "spec": {"podCIDR": self.pod_cidr, "podCIDRs": self.pod_cidrs},
        })
        .serialize(serializer)
    }
}

#[derive(Deserialize)]
struct WireNode {
    metadata: WireMeta,
    #[serde(default)]
    spec: WireSpec,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct WireMeta {
    #[serde(default)]
    name: String,
    #[serde(default)]
    uid: String,
    #[serde(default)]
    resource_version: String,
    #[serde(default)]
    creation_timestamp: Option<String>,
    #[serde(default)]
    annotations: Option<Ours>,
}

#[derive(Default, Deserialize)]
struct WireSpec {
    #[serde(default, rename = "podCIDR")]
    pod_cidr: Option<String>,
    #[serde(default, rename = "podCIDRs")]
    pod_cidrs: Option<Vec<String>>,
}

/// The annotations that may be flannel's.
#[derive(Default)]
struct Ours(BTreeMap<String, String>);

impl<'de> Deserialize<'de> for Ours {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Keep;

        impl<'de> Visitor<'de> for Keep {
            type Value = Ours;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("annotations")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Ours, A::Error> {
                let mut kept = BTreeMap::new();
                while let Some(key) = map.next_key::<String>()? {
                    let name = key.rsplit_once('/').map_or(key.as_str(), |(_, name)| name);
                    if Field::ALL
                        .iter()
                        .any(|field| name.ends_with(field.suffix()))
                    {
                        kept.insert(key, map.next_value()?);
                    } else {
                        map.next_value::<serde::de::IgnoredAny>()?;
                    }
                }
                Ok(Ours(kept))
            }
        }
        deserializer.deserialize_map(Keep)
    }
}

/// The address families of a network configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Families {
    /// Whether nodes have IPv4 subnets.
    pub v4: bool,
    /// Whether nodes have IPv6 subnets.
    pub v6: bool,
}

impl From<&NetConf> for Families {
    fn from(conf: &NetConf) -> Self {
        Self {
            v4: conf.enable_ipv4,
            v6: conf.enable_ipv6,
        }
    }
}

/// Why a node is no lease, or not all of one. Upstream's words come first.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum NodeError {
    /// The cluster has not assigned a subnet.
    #[error("node {node:?} pod cidr not assigned")]
    NoPodCidr {
        /// The node's name.
        node: String,
    },
    /// More subnets than families.
    #[error("node {node:?} pod cidrs should be IPv4/IPv6 only or dualstack")]
    TooMany {
        /// The node's name.
        node: String,
    },
    /// A subnet that is none.
    #[error("node {node:?}: invalid CIDR address: {cidr}")]
    BadCidr {
        /// The node's name.
        node: String,
        /// The text.
        cidr: String,
    },
    /// An enabled family has no subnet.
    #[error("missing {family} address on n.Spec.PodCIDRs of node {node:?}")]
    MissingFamily {
        /// The node's name.
        node: String,
        /// `IPv4` or `IPv6`.
        family: &'static str,
    },
    /// The subnet is not inside the network.
    #[error(
        "subnet {:?} specified in the flannel net config doesn't contain {:?} {}PodCIDR of the {node:?} node",
        network.to_string(), subnet.to_string(), if subnet.addr().is_ipv6() { "IPv6 " } else { "" }
    )]
    Outside {
        /// The node's name.
        node: String,
        /// `Network` or `IPv6Network`.
        network: IpNet,
        /// The node's subnet.
        subnet: IpNet,
    },
    /// An annotation is missing or cannot be read.
    #[error("annotation {key} of node {node:?} is {value}: it must be {wanted}")]
    Annotation {
        /// The node's name.
        node: String,
        /// The annotation.
        key: String,
        /// Its value in quotes, or `missing`.
        value: String,
        /// What belongs there.
        wanted: &'static str,
    },
}

/// The subnets of a node, of the families that are enabled (upstream: pkg/subnet/kube `nodeToLease`): `podCIDRs`, or `podCIDR` where
/// that is empty.
pub fn subnets_of(node: &Node, families: Families) -> Result<SubnetKey, NodeError> {
    let name = || node.name.clone();
    let texts: Vec<&str> = match node.pod_cidrs.as_slice() {
        [] if node.pod_cidr.is_empty() => return Err(NodeError::NoPodCidr { node: name() }),
        [] => vec![node.pod_cidr.as_str()],
        some if some.len() > 2 => return Err(NodeError::TooMany { node: name() }),
        some => some.iter().map(String::as_str).collect(),
    };
    let mut key = SubnetKey { v4: None, v6: None };
    for text in texts {
        let bad = |_| NodeError::BadCidr {
            node: name(),
            cidr: text.to_owned(),
        };
        match text.parse::<IpNet>().map_err(bad)? {
            IpNet::V4(net) => key.v4 = key.v4.or(Some(net.trunc())),
            IpNet::V6(net) => key.v6 = key.v6.or(Some(net.trunc())),
        }
    }
    key.v4 = key.v4.filter(|_| families.v4);
    key.v6 = key.v6.filter(|_| families.v6);
    Ok(key)
}

/// The first enabled family that `key` has no subnet of.
pub(super) fn missing_family(
    node: &Node,
    key: &SubnetKey,
    families: Families,
) -> Option<NodeError> {
    let family = if families.v4 && key.v4.is_none() {
        "IPv4"
    } else if families.v6 && key.v6.is_none() {
        "IPv6"
    } else {
        return None;
    };
    Some(NodeError::MissingFamily {
        node: node.name.clone(),
        family,
    })
}

/// What was read from a Node object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reading {
    /// The lease, of the families that could be read.
    pub lease: Option<Lease>,
    /// What could not be read.
    pub problems: Vec<NodeError>,
}

/// Reads the lease of a node that takes part. Each family for itself: what one lacks does not cost the other its traffic.
pub fn read_lease(node: &Node, names: &Names, families: Families) -> Reading {
    let nothing = |problems| Reading {
        lease: None,
        problems,
    };
    let key = match subnets_of(node, families) {
        Ok(key) => key,
        Err(error) => return nothing(vec![error]),
    };
    let mut problems: Vec<NodeError> = missing_family(node, &key, families).into_iter().collect();
    let mut lease = Lease {
        key,
        attrs: LeaseAttrs {
            backend_type: node
                .get(names, Field::BackendType)
                .unwrap_or_default()
                .to_owned(),
            ..LeaseAttrs::default()
        },
    };
    for family in Family::ALL {
        if lease.key.subnet(family).is_none() {
            continue;
        }
        match published(node, names, family, &lease.attrs.backend_type) {
            Ok(None) => {}
            Ok(Some((IpAddr::V4(ip), data))) => {
                (lease.attrs.public_ip, lease.attrs.v4) = (Some(ip), data);
            }
            Ok(Some((IpAddr::V6(ip), data))) => {
                (lease.attrs.public_ipv6, lease.attrs.v6) = (Some(ip), data);
            }
            Err(error) => {
                match family {
                    Family::V4 => lease.key.v4 = None,
                    Family::V6 => lease.key.v6 = None,
                }
                problems.push(error);
            }
        }
    }
    let is_something = lease.key.v4.is_some() || lease.key.v6.is_some();
    Reading {
        lease: is_something.then_some(lease),
        problems,
    }
}

/// What a node publishes of one family: its address, of that family, and what its backend needs. `None` where the backend publishes
/// nothing.
fn published(
    node: &Node,
    names: &Names,
    family: Family,
    backend_type: &str,
) -> Result<Option<(IpAddr, Option<BackendData>)>, NodeError> {
    let (field, wanted) = match family {
        Family::V4 => (Field::PublicIp, "an IPv4 address"),
        Family::V6 => (Field::PublicIpv6, "an IPv6 address"),
    };
    let text = node.get(names, field);
    let silent = backend_type == BackendKind::Alloc.lease_type() && family == Family::V6;
    if silent && text.is_none() {
        return Ok(None);
    }
    let address = text
        .and_then(|text| text.parse().ok())
        .filter(|address| Family::of(*address) == family)
        .ok_or_else(|| annotation(node, names, field, text, wanted))?;
    let Some(wanted) = BackendData::example(backend_type) else {
        return Ok(Some((address, None)));
    };
    let field = data_field(family);
    let text = node.get(names, field);
    let data = text
        .and_then(|text| Json::parse(text).ok())
        .and_then(|json| BackendData::read(backend_type, &json, field.suffix()).ok()?)
        .ok_or_else(|| annotation(node, names, field, text, wanted))?;
    Ok(Some((address, Some(data))))
}

/// The annotation with what the backend needs of one family.
pub(super) const fn data_field(family: Family) -> Field {
    match family {
        Family::V4 => Field::BackendData,
        Family::V6 => Field::BackendV6Data,
    }
}

pub(super) fn annotation(
    node: &Node,
    names: &Names,
    field: Field,
    value: Option<&str>,
    wanted: &'static str,
) -> NodeError {
    NodeError::Annotation {
        node: node.name.clone(),
        key: names.key(field),
        value: value.map_or_else(|| "missing".to_owned(), |value| format!("{value:?}")),
        wanted,
    }
}

/// Holds the subnets of a node against the networks of the configuration.
pub(super) fn contained(node: &Node, key: &SubnetKey, conf: &NetConf) -> Result<(), NodeError> {
    let outside = |network: IpNet, subnet: IpNet| NodeError::Outside {
        node: node.name.clone(),
        network,
        subnet,
    };
    let v4: Option<(Ipv4Net, Ipv4Net)> = conf.ipv4.map(|family| family.network).zip(key.v4);
    if let Some((network, subnet)) = v4.filter(|(network, subnet)| !network.contains(subnet)) {
        return Err(outside(network.into(), subnet.into()));
    }
    let v6: Option<(Ipv6Net, Ipv6Net)> = conf.ipv6.map(|family| family.network).zip(key.v6);
    if let Some((network, subnet)) = v6.filter(|(network, subnet)| !network.contains(subnet)) {
        return Err(outside(network.into(), subnet.into()));
    }
    Ok(())
}
