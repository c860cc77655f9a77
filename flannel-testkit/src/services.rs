//! The rules of kube-proxy, of the port mapping plugin and of flannel's masquerading, in a node's namespace.
//!
//! The chains, their order and their matches are those of the originals, in two flavours: legacy iptables and nftables. Only
//! what has no bearing on packets (health checks, load balancer firewalls) is left empty. The rule that drops what connection
//! tracking calls invalid has a counter, which [`Services::invalid_drops`] reads.

mod iptables;
mod nftables;

use crate::family::{Family, Prefix};
use crate::netns::{COMMAND_LIMIT, Netns};
use crate::node::Node;
use crate::process;
use anyhow::Context as _;
use std::fmt;
use std::io::{Seek as _, Write as _};
use std::net::{IpAddr, SocketAddr};

/// Which tool's rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Flavour {
    /// Legacy iptables, as kube-proxy's `iptables` mode; the compatible front end where there is no other.
    Iptables,
    /// nftables, as kube-proxy's `nftables` mode.
    Nftables,
}

impl Flavour {
    /// Both.
    pub const ALL: [Flavour; 2] = [Flavour::Iptables, Flavour::Nftables];
}

/// A transport protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    Tcp,
    Udp,
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Transport::Tcp => "tcp",
            Transport::Udp => "udp",
        })
    }
}

/// `externalTrafficPolicy`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// Any backend answers; the client's address is lost.
    Cluster,
    /// Backends of the node answer, and see the client's address.
    Local,
}

/// A Service with one port.
#[derive(Clone, Debug)]
pub struct Service {
    /// Unique among the services of a node.
    pub name: String,
    pub transport: Transport,
    /// The cluster IP and the port.
    pub address: SocketAddr,
    /// Chosen at random for each connection.
    pub backends: Vec<SocketAddr>,
    pub node_port: Option<(u16, Policy)>,
    /// `sessionAffinity: ClientIP`, for three hours.
    pub affinity: bool,
}

impl Service {
    /// A cluster IP over TCP.
    pub fn tcp(name: &str, address: SocketAddr, backends: &[SocketAddr]) -> Service {
        Service {
            name: name.to_owned(),
            transport: Transport::Tcp,
            address,
            backends: backends.to_vec(),
            node_port: None,
            affinity: false,
        }
    }

    /// A cluster IP over UDP.
    pub fn udp(name: &str, address: SocketAddr, backends: &[SocketAddr]) -> Service {
        Service {
            transport: Transport::Udp,
            ..Service::tcp(name, address, backends)
        }
    }

    /// The same with a port on every node.
    #[must_use]
    pub fn with_node_port(mut self, port: u16, policy: Policy) -> Service {
        self.node_port = Some((port, policy));
        self
    }

    /// The same with session affinity.
    #[must_use]
    pub fn with_affinity(mut self) -> Service {
        self.affinity = true;
        self
    }

    /// The backends in a subnet.
    fn local_backends(&self, subnet: Prefix) -> Vec<SocketAddr> {
        let all = self.backends.iter().copied();
        all.filter(|backend| subnet.contains(backend.ip()))
            .collect()
    }
}

/// A `hostPort` of a pod.
#[derive(Clone, Debug)]
pub struct HostPort {
    pub transport: Transport,
    /// The port on every address of the node.
    pub port: u16,
    pub backend: SocketAddr,
}

/// The rules of a node.
#[derive(Debug)]
pub struct Services {
    ns: Netns,
    flavour: Flavour,
    family: Family,
}

/// What the rules are made from.
struct Rules<'a> {
    /// The network of all pods.
    network: Prefix,
    /// The subnet of the node's own pods.
    subnet: Prefix,
    /// The node's own addresses, on which it has node ports.
    addresses: Vec<IpAddr>,
    services: &'a [Service],
    host_ports: &'a [HostPort],
}

impl Services {
    /// Puts the rules for all `services` and the pods' `host_ports` in place, in one transaction. `network` is the pods', and says the
    /// family.
    pub fn install(
        node: &Node,
        flavour: Flavour,
        network: impl Into<Prefix>,
        services: &[Service],
        host_ports: &[HostPort],
    ) -> anyhow::Result<Services> {
        let network = network.into();
        let family = network.family();
        let subnet = node.subnet_of(family);
        let rules = Rules {
            network,
            subnet,
            addresses: vec![node.address(family), subnet.host(0), subnet.gateway()],
            services,
            host_ports,
        };
        let ns = node.ns.clone();
        match flavour {
            Flavour::Iptables => {
                let restore = format!("{}-restore", iptables::program(family));
                feed(&ns, &[&restore], &iptables::text(&rules))
            }
            Flavour::Nftables => feed(&ns, &["nft", "-f", "-"], &nftables::text(&rules)),
        }
        .with_context(|| format!("rules of {}", node.name))?;
        Ok(Services {
            ns,
            flavour,
            family,
        })
    }

    /// Which tool's rules they are.
    pub fn flavour(&self) -> Flavour {
        self.flavour
    }

    /// Packets that the rule against invalid ones has dropped.
    pub fn invalid_drops(&self) -> anyhow::Result<u64> {
        match self.flavour {
            Flavour::Iptables => iptables::invalid_drops(&self.ns, self.family),
            Flavour::Nftables => nftables::invalid_drops(&self.ns, self.family),
        }
    }
}

/// The iptables program that [`Flavour::Iptables`] uses in a family.
pub fn iptables_program(family: Family) -> &'static str {
    iptables::program(family)
}

/// Runs a program with `text` on its standard input.
fn feed(ns: &Netns, argv: &[&str], text: &str) -> anyhow::Result<()> {
    let mut input = tempfile::tempfile()?;
    input.write_all(text.as_bytes())?;
    input.rewind()?;
    let (program, args) = argv.split_first().context("no program to run")?;
    let done = process::finish_reading(ns.command(program).args(args), input, COMMAND_LIMIT)?;
    anyhow::ensure!(
        done.status.success(),
        "{argv:?}: {}: {}; its input:\n{text}",
        done.status,
        done.stderr.trim()
    );
    Ok(())
}

/// Sixteen letters and digits that depend on `seed` alone, as kube-proxy makes the names of its chains.
fn hashed(seed: &str) -> String {
    const ALPHABET: &[u8; 32] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567";
    let mut hash = seed.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    let letter = || {
        hash = hash
            .wrapping_mul(0x5851_f42d_4c95_7f2d)
            .wrapping_add(0x1405_7b7e_f767_814f);
        char::from(ALPHABET[usize::try_from(hash >> 59).unwrap_or(0)])
    };
    std::iter::repeat_with(letter).take(16).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_differ_and_stay() {
        assert_eq!(hashed("a"), hashed("a"));
        assert_ne!(hashed("a"), hashed("b"));
        assert_eq!(hashed("default/web").len(), 16);
    }
}
