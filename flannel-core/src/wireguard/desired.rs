//! What this node should have, from the configuration, its place in the network and the leases of all nodes.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use ipnet::IpNet;

use crate::{
    addr::{Family, Mtu},
    config::{BackendKind, NetConf, WireguardMode},
    key::{PublicKey, SecretKey},
    lease::{LeaseAttrs, SubnetKey, WireguardData},
    mark,
    plan::{PeerProblem, overlap},
};

/// Everything that this node should have of the encrypted overlay.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Desired {
    /// The devices, by name.
    pub tunnels: BTreeMap<String, Tunnel>,
    /// Networks of an earlier configuration, whose routes and addresses are to go from our devices.
    pub former: BTreeSet<IpNet>,
}

/// A device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tunnel {
    /// The private key.
    pub private: SecretKey,
    /// UDP port it listens on.
    pub port: u16,
    /// MTU in bytes.
    pub mtu: Mtu,
    /// Its addresses, `<subnet base>/32` and `/128`; none before there is a lease.
    pub addresses: BTreeSet<IpNet>,
    /// The networks that are led to it.
    pub networks: BTreeSet<IpNet>,
    /// The other nodes; `None` until the lease store has finished its first complete list.
    pub peers: Option<BTreeMap<PublicKey, Peer>>,
}

/// Another node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Where it listens.
    pub endpoint: SocketAddr,
    /// Its subnets: what it may send, and what goes to it.
    pub allowed: BTreeSet<IpNet>,
    /// The key that is shared with it.
    pub psk: Option<SecretKey>,
    /// Seconds between packets that keep it reachable; 0 for none.
    pub keepalive: u16,
}

/// What this node knows of itself.
#[derive(Clone, Debug)]
pub struct Place<'a> {
    /// The network configuration.
    pub conf: &'a NetConf,
    /// Its private key.
    pub private: &'a SecretKey,
    /// Its public key, as soon as the kernel has computed it.
    pub public: Option<PublicKey>,
    /// MTU of the devices, in bytes.
    pub mtu: Mtu,
    /// IPv4 address of the uplink.
    pub v4: Option<Ipv4Addr>,
    /// IPv6 address of the uplink.
    pub v6: Option<Ipv6Addr>,
    /// Networks of an earlier configuration.
    pub former: BTreeSet<IpNet>,
}

/// Works out what this node should have; `own` is its lease, `leases` those of all nodes. A lease that cannot be used is reported,
/// never fatal.
pub fn desired(
    place: &Place<'_>,
    own: Option<&SubnetKey>,
    leases: Option<&BTreeMap<SubnetKey, LeaseAttrs>>,
) -> (Desired, Vec<PeerProblem>) {
    let conf = &place.conf.backend.wireguard;
    let mut found = Desired::default();
    for family in place.families() {
        let name = place.device(family);
        let tunnel = found
            .tunnels
            .entry(name.to_owned())
            .or_insert_with(|| Tunnel {
                private: place.private.clone(),
                port: match (conf.mode, family) {
                    (WireguardMode::Separate, Family::V6) => conf.port_v6,
                    _ => conf.port,
                },
                mtu: place.mtu,
                addresses: BTreeSet::new(),
                networks: BTreeSet::new(),
                peers: leases.map(|_| BTreeMap::new()),
            });
        tunnel.networks.extend(place.network(family));
        let base = own.and_then(|own| subnet(own, family));
        tunnel
            .addresses
            .extend(base.map(|subnet| IpNet::from(subnet.network())));
    }
    let networks = found.tunnels.values().flat_map(|tunnel| &tunnel.networks);
    let networks: BTreeSet<&IpNet> = networks.collect();
    found.former = place
        .former
        .iter()
        .filter(|net| !networks.contains(net))
        .copied()
        .collect();
    let mut problems = Vec::new();
    let mut holders: BTreeMap<PublicKey, SubnetKey> = BTreeMap::new();
    for (key, attrs) in leases.into_iter().flatten() {
        if own.is_some_and(|own| is_own(own, key)) {
            continue;
        }
        let problem = |reason| PeerProblem { key: *key, reason };
        let peers = match place.peers(key, attrs, own) {
            Ok(peers) => peers,
            Err(reason) => {
                problems.push(problem(reason));
                continue;
            }
        };
        for (device, public, peer) in peers {
            if Some(public) == place.public {
                problems.push(problem(ONE_KEY_FOR_TWO.replace("{}", "this node's")));
                break;
            }
            if let Some(other) = holders.insert(public, *key).filter(|other| other != key) {
                holders.insert(public, other);
                problems.push(problem(
                    ONE_KEY_FOR_TWO.replace("{}", &format!("that of {other}")),
                ));
                break;
            }
            let tunnel = found.tunnels.get_mut(device);
            if let Some(peers) = tunnel.and_then(|tunnel| tunnel.peers.as_mut()) {
                peers.insert(public, peer);
            }
        }
    }
    (found, problems)
}

/// The kernel takes a key once: two nodes with the same are copies of one machine.
const ONE_KEY_FOR_TWO: &str = "its PublicKey is {}, too: remove the file of the private key on one of the two nodes and restart the agent there";

/// Whether a lease has a subnet that is this node's.
fn is_own(own: &SubnetKey, key: &SubnetKey) -> bool {
    (own.v4.is_some() && own.v4 == key.v4) || (own.v6.is_some() && own.v6 == key.v6)
}

fn subnet(key: &SubnetKey, family: Family) -> Option<IpNet> {
    match family {
        Family::V4 => key.v4.map(IpNet::V4),
        Family::V6 => key.v6.map(IpNet::V6),
    }
}

impl Place<'_> {
    /// The families that pods have.
    fn families(&self) -> impl Iterator<Item = Family> {
        let conf = self.conf;
        Family::ALL.into_iter().filter(|family| match family {
            Family::V4 => conf.enable_ipv4,
            Family::V6 => conf.enable_ipv6,
        })
    }

    fn network(&self, family: Family) -> Option<IpNet> {
        match family {
            Family::V4 => self.conf.ipv4.map(|conf| IpNet::V4(conf.network)),
            Family::V6 => self.conf.ipv6.map(|conf| IpNet::V6(conf.network)),
        }
    }

    /// The device that carries packets of a family.
    fn device(&self, family: Family) -> &'static str {
        match (self.conf.backend.wireguard.mode, family) {
            (WireguardMode::Separate, Family::V6) => mark::WIREGUARD_DEVICE_V6,
            _ => mark::WIREGUARD_DEVICE,
        }
    }

    /// What a lease adds to which device.
    fn peers(
        &self,
        key: &SubnetKey,
        attrs: &LeaseAttrs,
        own: Option<&SubnetKey>,
    ) -> Result<Vec<(&'static str, PublicKey, Peer)>, String> {
        let wanted = BackendKind::Wireguard.lease_type();
        if attrs.backend_type != wanted {
            let kind = &attrs.backend_type;
            return Err(format!(
                "its backend is {kind:?}, this node speaks {wanted:?}"
            ));
        }
        let subnets: Vec<(Family, IpNet)> = self
            .families()
            .filter_map(|family| Some((family, subnet(key, family)?)))
            .collect();
        if subnets.is_empty() {
            return Err("it has no subnet of a family that this node has".into());
        }
        let ours = own.into_iter().flat_map(|own| {
            Family::ALL
                .into_iter()
                .filter_map(|family| subnet(own, family))
        });
        for own in ours {
            if let Some((_, subnet)) = subnets.iter().find(|(_, subnet)| overlap(subnet, &own)) {
                return Err(format!(
                    "{subnet} overlaps this node's {own}: delete the wrong lease"
                ));
            }
        }
        if self.conf.backend.wireguard.mode == WireguardMode::Separate {
            let peers = subnets.into_iter().map(|(family, subnet)| {
                let data = data(attrs, family).ok_or_else(|| no_data(family))?;
                let peer = self.peer(attrs, family, &data, [subnet].into())?;
                Ok((self.device(family), data.public_key, peer))
            });
            return peers.collect();
        }
        // The same key in both, unless somebody else has written it: upstream takes the last.
        let data = subnets
            .iter()
            .rev()
            .find_map(|(family, _)| data(attrs, *family));
        let data = data.ok_or_else(|| no_data(Family::V4))?;
        let mode = self.conf.backend.wireguard.mode;
        let over = over(mode, (self.v4, self.v6), attrs);
        let data = WireguardData {
            port: self::data(attrs, over).map_or(data.port, |data| data.port),
            ..data
        };
        let allowed = subnets.into_iter().map(|(_, subnet)| subnet).collect();
        let peer = self.peer(attrs, over, &data, allowed)?;
        Ok(vec![(mark::WIREGUARD_DEVICE, data.public_key, peer)])
    }

    fn peer(
        &self,
        attrs: &LeaseAttrs,
        over: Family,
        data: &WireguardData,
        allowed: BTreeSet<IpNet>,
    ) -> Result<Peer, String> {
        let conf = &self.conf.backend.wireguard;
        let (address, field) = match over {
            Family::V4 => (attrs.public_ip.map(IpAddr::V4), "PublicIP"),
            Family::V6 => (attrs.public_ipv6.map(IpAddr::V6), "PublicIPv6"),
        };
        let address = address.ok_or_else(|| format!("it has no {field}"))?;
        if address.is_unspecified() || address.is_multicast() || address.is_loopback() {
            return Err(format!(
                "its {field} {address} is not the address of a host"
            ));
        }
        // Releases before 0.26 wrote no port: all nodes have the same then.
        let port = match (data.port, conf.mode, over) {
            (0, WireguardMode::Separate, Family::V6) => conf.port_v6,
            (0, ..) => conf.port,
            (port, ..) => port,
        };
        Ok(Peer {
            endpoint: SocketAddr::new(address, port),
            allowed,
            psk: conf.psk.clone(),
            keepalive: conf.keepalive,
        })
    }
}

/// Over which family the one device of a node with these addresses reaches a peer. In mode `auto` as upstream chooses it, but that a
/// peer or a node without IPv4 is reached over IPv6 (upstream: `selectMode` in pkg/backend/wireguard).
pub fn over(
    mode: WireguardMode,
    own: (Option<Ipv4Addr>, Option<Ipv6Addr>),
    attrs: &LeaseAttrs,
) -> Family {
    match mode {
        WireguardMode::Ipv4 => return Family::V4,
        WireguardMode::Ipv6 => return Family::V6,
        WireguardMode::Separate | WireguardMode::Auto => {}
    }
    let (Some(v4), Some(v6)) = (attrs.public_ip, attrs.public_ipv6) else {
        return if attrs.public_ip.is_some() {
            Family::V4
        } else {
            Family::V6
        };
    };
    let is_private = |ip: &Ipv6Addr| ip.is_unique_local();
    match own {
        (None, Some(_)) => Family::V6,
        (Some(_), _) if !v4.is_private() => Family::V4,
        (_, Some(own)) if !is_private(&v6) && !is_private(&own) => Family::V6,
        _ => Family::V4,
    }
}

fn data(attrs: &LeaseAttrs, family: Family) -> Option<WireguardData> {
    match family {
        Family::V4 => attrs.wireguard(Family::V4),
        Family::V6 => attrs.wireguard(Family::V6),
    }
}

fn no_data(family: Family) -> String {
    let member = match family {
        Family::V4 => "BackendData",
        Family::V6 => "BackendV6Data",
    };
    format!("it has no {member} with a PublicKey")
}
