//! The agent's maps, read with `bpftool` and taken apart here, by the layouts that `flannel-common` documents.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use flannel_testkit::{Family, LabOptions, Prefix, Subnet, json::ip_json, mac_text};
use serde_json::Value;

use super::{Rig, list, text};

/// What the map `nodes` has for a peer's subnet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MapPeer {
    /// Index in `nodes`.
    pub(crate) id: u32,
    pub(crate) public_ip: String,
    pub(crate) mac: String,
    pub(crate) own_mac: String,
    /// Outer destination and source; `None` while the next hop is unresolved.
    pub(crate) hop: Option<(String, String)>,
    pub(crate) ifindex: u32,
    pub(crate) path_mtu: u32,
}

/// The map `config`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MapConfig {
    pub(crate) flags: u32,
    pub(crate) tunnel_ifindex: u32,
    pub(crate) tunnel_mtu: u32,
    pub(crate) own_mac: String,
}

/// `VALID` and `NEXT_HOP` of an entry of `nodes`.
const VALID: u32 = 1;
const NEXT_HOP: u32 = 2;

/// Where the fields are in an entry of `nodes`, and in `config`.
struct Layout {
    /// Outer destination, before the inner link header.
    public_ip: usize,
    /// Inner destination and source.
    inner: usize,
    /// Interface index, flags, path MTU.
    words: usize,
    tunnel_ifindex: usize,
    own_mac: usize,
}

const V4: Layout = Layout {
    public_ip: 30,
    inner: 50,
    words: 64,
    tunnel_ifindex: 20,
    own_mac: 46,
};
const V6: Layout = Layout {
    public_ip: 38,
    inner: 70,
    words: 84,
    tunnel_ifindex: 48,
    own_mac: 86,
};

impl Layout {
    fn of(family: Family) -> Layout {
        match family {
            Family::V4 => V4,
            Family::V6 => V6,
        }
    }

    fn address(&self, family: Family, record: &[u8]) -> IpAddr {
        let bytes = &record[self.public_ip..];
        match family {
            Family::V4 => Ipv4Addr::from(four(bytes, 0)).into(),
            Family::V6 => Ipv6Addr::from(*bytes.first_chunk().expect("16 bytes")).into(),
        }
    }
}

/// Subnet number `index` of the network of the nodes.
fn subnet(family: Family, index: u32) -> Prefix {
    let options = LabOptions::default();
    match family {
        Family::V4 => Prefix::from(options.network).subnet(24, index),
        Family::V6 => options.network_v6.subnet(64, index),
    }
}

impl Rig {
    /// The peers that the maps of IPv4 have.
    #[track_caller]
    pub(crate) fn map_peers(&self, node: usize) -> BTreeMap<Subnet, MapPeer> {
        let peers = self.map_peers_of(node).into_iter();
        let peers = peers.filter_map(|(prefix, peer)| Some((prefix.as_subnet()?, peer)));
        peers.collect()
    }

    /// The peers that the maps have.
    #[track_caller]
    pub(crate) fn map_peers_of(&self, node: usize) -> BTreeMap<Prefix, MapPeer> {
        let family = self.family;
        let at = Layout::of(family);
        // A node that changes gets another entry, to which its subnet is then pointed.
        let (subnets, nodes) = loop {
            let before = self.map_values(node, "subnets");
            let nodes = self.map_values(node, "nodes");
            if self.map_values(node, "subnets") == before {
                break (before, nodes);
            }
        };
        let ids = (0..).zip(subnets.iter().map(|value| word(value, 0)));
        ids.filter(|(_, id)| *id != 0)
            .filter_map(|(index, id)| {
                let record = nodes.get(id as usize)?;
                let flags = word(record, at.words + 4);
                if flags & VALID == 0 {
                    return None;
                }
                let hop = (flags & NEXT_HOP != 0).then(|| (mac(record, 0), mac(record, 6)));
                let peer = MapPeer {
                    id,
                    public_ip: at.address(family, record).to_string(),
                    mac: mac(record, at.inner),
                    own_mac: mac(record, at.inner + 6),
                    hop,
                    ifindex: word(record, at.words),
                    path_mtu: word(record, at.words + 8),
                };
                Some((subnet(family, index), peer))
            })
            .collect()
    }

    #[track_caller]
    pub(crate) fn map_config(&self, node: usize) -> MapConfig {
        let values = self.map_values(node, "config");
        let config = &values[0];
        let at = Layout::of(self.family);
        MapConfig {
            flags: word(config, 4),
            tunnel_ifindex: word(config, at.tunnel_ifindex),
            tunnel_mtu: word(config, at.tunnel_ifindex + 4),
            own_mac: mac(config, at.own_mac),
        }
    }

    /// The map `config` as it is.
    #[track_caller]
    pub(crate) fn config_bytes(&self, node: usize) -> Vec<u8> {
        self.map_values(node, "config").remove(0)
    }

    #[track_caller]
    pub(crate) fn map_values(&self, node: usize, map: &str) -> Vec<Vec<u8>> {
        let dump = self.map_dump(node, map);
        list(&dump)
            .iter()
            .map(|entry| bytes(&entry["value"]))
            .collect()
    }

    /// Writes an entry of an array with `bpftool`.
    #[track_caller]
    pub(crate) fn map_write(&self, node: usize, map: &str, key: u32, value: &[u8]) {
        let pin = self.map_pin(node, map).display().to_string();
        let hex = |bytes: &[u8]| -> Vec<String> {
            bytes.iter().map(|byte| format!("{byte:02x}")).collect()
        };
        let mut words: Vec<String> = ["bpftool", "map", "update", "pinned", &pin, "key", "hex"]
            .map(str::to_owned)
            .to_vec();
        words.extend(hex(&key.to_ne_bytes()));
        words.extend(["value".to_owned(), "hex".to_owned()]);
        words.extend(hex(value));
        self.ns(node).exec(&words).expect("write a map entry");
    }

    /// Whether the maps have exactly what the leases and the kernel say; else what is wrong.
    pub(crate) fn maps_whole(&self, node: usize) -> Result<(), String> {
        let link = flannel_testkit::json::link(self.ns(node), &self.device())
            .map_err(|error| format!("{error:#}"))?;
        let own = self.lease(node);
        let config = self.map_config(node);
        let alone = link["linkinfo"]["info_kind"] != "vxlan";
        let wanted = MapConfig {
            // ENCAP, DECAP; eBPF alone also ALONE and DECAP_GSO. Other kernels may be able to clear GSO state.
            flags: if alone {
                0b1111
            } else {
                config.flags & 0b1000 | 0b0011
            },
            tunnel_ifindex: number(&link["ifindex"]),
            tunnel_mtu: number(&link["mtu"]),
            own_mac: own.mac.clone(),
        };
        if config != wanted {
            return Err(format!("config is {config:?}, wanted {wanted:?}"));
        }
        let uplink = flannel_testkit::json::link(self.ns(node), "eth0")
            .map_err(|error| format!("{error:#}"))?;
        let peers = self.map_peers_of(node);
        let mut leases = self.leases_of(self.family);
        leases.remove(&self.node(node).subnet_of(self.family));
        if peers.keys().ne(leases.keys()) {
            return Err(format!("the maps have {peers:?}, wanted {leases:?}"));
        }
        for (subnet, lease) in &leases {
            let peer = &peers[subnet];
            let hop = next_hop(self, node, &lease.public_ip)?;
            let wanted = MapPeer {
                id: peer.id,
                public_ip: lease.public_ip.clone(),
                mac: lease.mac.clone(),
                own_mac: own.mac.clone(),
                hop: Some((hop, text(&uplink, "address").unwrap_or_default())),
                ifindex: number(&uplink["ifindex"]),
                path_mtu: number(&uplink["mtu"]),
            };
            if *peer != wanted {
                return Err(format!(
                    "for {subnet} the maps have {peer:?}, wanted {wanted:?}"
                ));
            }
        }
        Ok(())
    }
}

/// The MAC address to which the kernel sends what is for `ip`.
fn next_hop(rig: &Rig, node: usize, ip: &str) -> Result<String, String> {
    let ask = || -> anyhow::Result<Option<String>> {
        let route = ip_json(rig.ns(node), &["route", "get", ip])?;
        let gateway = text(&route[0], "gateway").unwrap_or_else(|| ip.to_owned());
        let neighbours = ip_json(rig.ns(node), &["neigh", "show", &gateway, "dev", "eth0"])?;
        Ok(text(&neighbours[0], "lladdr"))
    };
    ask()
        .map_err(|error| format!("{error:#}"))?
        .ok_or_else(|| format!("the next hop to {ip} is unresolved"))
}

fn number(value: &Value) -> u32 {
    value
        .as_u64()
        .and_then(|number| number.try_into().ok())
        .expect("a number")
}

fn bytes(value: &Value) -> Vec<u8> {
    list(value)
        .iter()
        .map(|byte| {
            let digits = byte.as_str().expect("a byte").trim_start_matches("0x");
            u8::from_str_radix(digits, 16).expect("a byte in hex")
        })
        .collect()
}

fn four(bytes: &[u8], at: usize) -> [u8; 4] {
    bytes[at..at + 4].try_into().expect("four bytes")
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(four(bytes, at))
}

fn mac(bytes: &[u8], at: usize) -> String {
    mac_text(bytes[at..at + 6].try_into().expect("six bytes"))
}
