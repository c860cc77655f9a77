//! The rules that masquerade what leaves the cluster network and accept what is forwarded from and to it: which they are, in
//! iptables and in nftables, and what brings a node to them.
//!
//! The rules are upstream's to the byte, order included (upstream: `pkg/trafficmngr`). What differs is how a node gets there: with
//! one transaction per table, so that no packet ever passes without masquerade, and with nothing at all where all is in place.
//!
//! Chains are shared by several instances of flannel in one network namespace. So nothing here ever flushes a chain that may hold
//! rules of another cluster network, and a state that satisfies one instance is never undone by the other.

use ipnet::IpNet;

pub mod backend;
pub mod iptables;
pub mod nft;
pub mod obstacle;

#[cfg(test)]
mod tests;

/// The firewall mark by which kube-proxy says that it masquerades a packet itself.
pub const KUBE_PROXY_MARK: u32 = 0x4000;

/// What one address family is to have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// The cluster network.
    pub network: IpNet,
    /// This node's subnet of it.
    pub subnet: IpNet,
    /// The cluster network and subnet that this node had before, from `subnet.env`.
    pub previous: Option<(IpNet, IpNet)>,
    /// Whether to masquerade.
    pub masq: bool,
    /// Whether to accept forwarded packets.
    pub forward: bool,
    /// Whether source ports are drawn at random: `--random-fully`, `fully-random`.
    pub random_fully: bool,
}

impl Request {
    /// The networks whose rules are this instance's to remove: its own, and the one that it had before.
    pub fn networks(&self) -> impl Iterator<Item = IpNet> {
        let before = self
            .previous
            .map(|(network, _)| network)
            .filter(|network| *network != self.network);
        [Some(self.network), before].into_iter().flatten()
    }

    /// Whether the node had another network or subnet before. Without any it had, as upstream has it.
    pub fn has_moved(&self) -> bool {
        self.previous != Some((self.network, self.subnet))
    }

    /// The same without any rule: what is planned for it is removal.
    #[must_use]
    pub fn withdrawn(self) -> Self {
        Self {
            masq: false,
            forward: false,
            ..self
        }
    }
}

/// What is never masqueraded: multicast.
fn multicast(network: &IpNet) -> &'static str {
    match network {
        IpNet::V4(_) => "224.0.0.0/4",
        IpNet::V6(_) => "ff00::/8",
    }
}
