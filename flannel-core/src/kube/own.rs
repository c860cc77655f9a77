//! What this node's own Node object has to say, and which of it does not yet.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

use ipnet::IpNet;

use super::{
    Families, Field, Names, Node, NodeError,
    node::{annotation, contained, missing_family},
    subnets_of,
};
use crate::{
    config::NetConf,
    json::Json,
    lease::{BackendData, Lease, LeaseAttrs, VXLAN},
};

/// Most entries of the eBPF table of subnets, as a power of two: a /8 of /28.
const MOST_BITS: u8 = 20;

/// The annotations that every node of flannel's has.
const HEAD: [Field; 2] = [Field::KubeSubnetManager, Field::BackendType];

/// The annotations about a node's ends of the families that it has.
const ENDS: [Field; 4] = [
    Field::BackendData,
    Field::BackendV6Data,
    Field::PublicIp,
    Field::PublicIpv6,
];

/// What this node publishes, and what that takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnPlan {
    /// The lease, with the addresses that the administrator wants to have published.
    pub lease: Lease,
    /// The annotations that are missing or different, by full name; `None` for one that is to go.
    pub patch: BTreeMap<String, Option<String>>,
    /// Addresses that are published in place of this node's own.
    pub overwrites: Vec<Overwrite>,
    /// Annotations of the administrator's that cannot be used.
    pub problems: Vec<NodeError>,
}

/// An administrator's annotation in place of what the node found out itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Overwrite {
    /// Whether it is about IPv6.
    pub v6: bool,
    /// The annotation's full name.
    pub key: String,
    /// Its value.
    pub value: String,
    /// Whether the published value changes by it.
    pub is_news: bool,
}

impl Overwrite {
    /// Upstream's log line.
    pub fn announcement(&self) -> String {
        let (family, key, value) = (if self.v6 { "ipv6" } else { "ip" }, &self.key, &self.value);
        format!("Overriding public {family} with '{value}' from node annotation '{key}'")
    }
}

/// Finds out this node's subnet, what to publish under it, and which annotations differ. Nothing is to be published under a subnet
/// that is not complete or not inside the network: other nodes would believe it.
pub fn plan_own(
    node: &Node,
    names: &Names,
    conf: &NetConf,
    offered: &LeaseAttrs,
) -> Result<OwnPlan, NodeError> {
    let families = Families::from(conf);
    let key = subnets_of(node, families)?;
    if let Some(missing) = missing_family(node, &key, families) {
        return Err(missing);
    }
    contained(node, &key, conf)?;
    let mut problems = Vec::new();
    let mut overwrites = Vec::new();
    let mut attrs = offered.clone();
    let mut look = Look {
        node,
        names,
        problems: &mut problems,
        overwrites: &mut overwrites,
    };
    if families.v4
        && let Some(ip) = look.overwrite::<Ipv4Addr>(Field::PublicIpOverwrite, Field::PublicIp)
    {
        attrs.public_ip = Some(ip);
    }
    if families.v6
        && attrs.public_ipv6.is_some()
        && let Some(ip) = look.overwrite::<Ipv6Addr>(Field::PublicIpv6Overwrite, Field::PublicIpv6)
    {
        attrs.public_ipv6 = Some(ip);
    }
    let mut published = published(&attrs, families);
    // What an earlier backend or another set of families has left would go on leading packets here.
    let patch = ENDS
        .into_iter()
        .chain(HEAD)
        .map(|field| (names.key(field), published.remove(&field)))
        .filter(|(key, value)| node.annotations.get(key) != value.as_ref())
        .collect();
    Ok(OwnPlan {
        lease: Lease { key, attrs },
        patch,
        overwrites,
        problems,
    })
}

struct Look<'a> {
    node: &'a Node,
    names: &'a Names,
    problems: &'a mut Vec<NodeError>,
    overwrites: &'a mut Vec<Overwrite>,
}

impl Look<'_> {
    fn overwrite<A: FromStr + ToString>(&mut self, field: Field, published: Field) -> Option<A> {
        let value = self.node.get(self.names, field)?;
        let v6 = field == Field::PublicIpv6Overwrite;
        let Ok(address) = value.parse::<A>() else {
            let wanted = if v6 {
                "an IPv6 address"
            } else {
                "an IPv4 address"
            };
            let problem = annotation(self.node, self.names, field, Some(value), wanted);
            self.problems.push(problem);
            return None;
        };
        self.overwrites.push(Overwrite {
            v6,
            key: self.names.key(field),
            value: value.to_owned(),
            is_news: self.node.get(self.names, published) != Some(&address.to_string()),
        });
        Some(address)
    }
}

/// The annotations of a node with these attributes, values byte for byte as upstream writes them.
pub(super) fn published(attrs: &LeaseAttrs, families: Families) -> BTreeMap<Field, String> {
    // A backend without data publishes this.
    let data = |data: Option<BackendData>| data.map_or("null".to_owned(), |data| data.to_string());
    let mut fields = BTreeMap::from([
        (Field::KubeSubnetManager, "true".to_owned()),
        (Field::BackendType, attrs.backend_type.clone()),
    ]);
    if families.v4 {
        fields.insert(Field::BackendData, data(attrs.v4));
        let ip = attrs.public_ip.unwrap_or(Ipv4Addr::UNSPECIFIED);
        fields.insert(Field::PublicIp, ip.to_string());
    }
    if families.v6 {
        // Upstream's backends that know nothing of IPv6 publish nothing of it.
        if let Some(ip) = attrs.public_ipv6 {
            fields.insert(Field::BackendV6Data, data(attrs.v6));
            fields.insert(Field::PublicIpv6, ip.to_string());
        }
    }
    fields
}

/// What a node has stored of itself, whether or not it still takes part: the MAC addresses that a new device takes over. Also looks
/// where upstream does, which with a prefix such as `example.com/x` is not where anything is written.
pub fn stored_attrs(node: &Node, names: &Names) -> LeaseAttrs {
    let backend_type = node.get(names, Field::BackendType).unwrap_or_default();
    let read = |key: &str| -> Option<BackendData> {
        let json = Json::parse(node.annotations.get(key)?).ok()?;
        // Of a node whose annotations somebody has begun to remove, at least the MAC address.
        let kind = if backend_type.is_empty() {
            VXLAN
        } else {
            backend_type
        };
        BackendData::read(kind, &json, Field::BackendData.suffix()).ok()?
    };
    LeaseAttrs {
        public_ip: node
            .get(names, Field::PublicIp)
            .and_then(|text| text.parse().ok()),
        public_ipv6: node
            .get(names, Field::PublicIpv6)
            .and_then(|text| text.parse().ok()),
        backend_type: backend_type.to_owned(),
        v4: read(&names.key(Field::BackendData)).or_else(|| read(&names.stored_data_key())),
        v6: read(&names.key(Field::BackendV6Data)),
    }
}

/// The prefix length for which the eBPF table of subnets is to be made: that of the smallest subnet inside the network, not less than
/// `at_least`, and as far as a table of a bearable size goes. What is smaller still is left to the kernel's device.
pub fn granularity(network: IpNet, subnets: impl IntoIterator<Item = IpNet>, at_least: u8) -> u8 {
    let bits = network.max_prefix_len();
    let most = network.prefix_len().saturating_add(MOST_BITS).min(bits);
    subnets
        .into_iter()
        .filter(|subnet| network.contains(subnet))
        .map(|subnet| subnet.prefix_len())
        .filter(|len| *len <= most)
        .fold(at_least, u8::max)
}
