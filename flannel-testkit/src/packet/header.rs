//! What the two versions of IP have in common, as far as frames are concerned.

use super::{Ipv4, Ipv6};
use crate::family::Family;
use crate::node::{Node, Pod};
use std::fmt::Debug;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// An address, and the header that has such addresses.
pub trait Address: Copy + Debug + Eq + Ord + Into<IpAddr> + Send + 'static {
    type Header: Header<Address = Self>;
    /// Its family.
    const FAMILY: Family;

    /// The pod's address of this family, which it must have.
    fn of(pod: &Pod) -> Self;
    /// The node's address of this family on its uplink.
    fn at(node: &Node) -> Self;
}

impl Address for Ipv4Addr {
    type Header = Ipv4;
    const FAMILY: Family = Family::V4;

    fn of(pod: &Pod) -> Ipv4Addr {
        pod.ip
    }

    fn at(node: &Node) -> Ipv4Addr {
        node.ip
    }
}

impl Address for Ipv6Addr {
    type Header = Ipv6;
    const FAMILY: Family = Family::V6;

    #[track_caller]
    fn of(pod: &Pod) -> Ipv6Addr {
        let (address, _) = pod.v6.expect("an address of IPv6");
        address
    }

    fn at(node: &Node) -> Ipv6Addr {
        node.ipv6
    }
}

/// An IP header; protocol and payload come with the packet.
pub trait Header: Clone + Debug + PartialEq + Eq {
    type Address;
    /// `EtherType` of its packets.
    const ETHERTYPE: u16;
    /// Number of its ICMP.
    const ICMP: u8;
    /// ICMP's types of an echo request and of a reply.
    const ECHO: [u8; 2];
    /// Whether the ICMP checksum covers addresses.
    const ICMP_HAS_PSEUDO_HEADER: bool;

    /// A header as hosts send it.
    fn usual(src: Self::Address, dst: Self::Address) -> Self;
    /// The packet: this header, then `payload`.
    fn packet(&self, protocol: u8, payload: &[u8]) -> Vec<u8>;
    /// Header, protocol and payload of a packet.
    fn read(packet: &[u8]) -> anyhow::Result<(Self, u8, &[u8])>;
    /// The unfolded sum of the pseudo-header of `len` bytes of `protocol`.
    fn pseudo_sum(&self, protocol: u8, len: usize) -> u32;
    /// Source.
    fn source(&self) -> Self::Address;
    /// Destination.
    fn destination(&self) -> Self::Address;
    /// The same without what tells packets from another: identification, flow label.
    #[must_use]
    fn without_marks(&self) -> Self;
    /// Whether this is a piece of a larger packet.
    fn is_piece(&self) -> bool;
    /// Whether its checksum is right, where it has one.
    fn is_summed(&self) -> bool;
    /// DSCP and ECN.
    fn tos(&self) -> u8;
    /// Sets DSCP and ECN.
    fn set_tos(&mut self, tos: u8);
    /// Hops left.
    fn ttl(&self) -> u8;
    /// Sets the hops left.
    fn set_ttl(&mut self, ttl: u8);
    /// The header of a piece that begins `offset` bytes into the payload, and whether more come behind it.
    #[must_use]
    fn piece(&self, offset: u16, more: bool) -> Self;
    /// Bytes of the header of a piece.
    fn piece_header(&self) -> usize;
}
