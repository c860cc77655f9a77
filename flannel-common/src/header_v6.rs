//! The prebuilt outer header of IPv6: 84 bytes that precede the inner IPv6 packet on the wire.
//!
//! ```text
//!  0 outer Ethernet: next hop MAC, uplink MAC, 0x86dd
//! 14 outer IPv6: 6 tc 00000 len 11 hops src dst              (traffic class and length filled per packet)
//! 54 outer UDP: source port, 8472, length, checksum          (all but 8472 filled per packet)
//! 62 VXLAN: 08 000000 vni 00                                  (RFC 7348, section 5)
//! 70 inner Ethernet: peer VTEP MAC, own VTEP MAC, 0x86dd
//! 84 inner IPv6 packet
//! ```
//!
//! Over IPv6 the UDP checksum must be there: kernels drop packets without one (`udp6zerocsumrx` is off on flannel's device). Nobody has
//! to read the packet for it. The inner packet's own checksum, once it is filled in, makes its transport part sum to the complement of its
//! pseudo header, so the outer checksum depends on headers alone ([`inner_sum`]; the kernel's local checksum offload,
//! `Documentation/networking/checksum-offloads.rst`).

use crate::checksum;
use crate::header::{OUTER_TTL, VXLAN_I, vni_word};

/// Bytes from the outer Ethernet header to the inner IP packet.
pub const HEADER_LEN: usize = 84;
/// Bytes that the tunnel adds to the inner packet as the underlay's IP layer counts it: IPv6, UDP, VXLAN and inner Ethernet.
pub const OVERHEAD_V6: u32 = 70;

/// Offset of the outer IPv6 header.
pub const IP: usize = 14;
/// Offset of the outer UDP header.
pub const UDP: usize = 54;
/// Offset of the VXLAN header.
pub const VXLAN: usize = 62;
/// Offset of the inner Ethernet header.
pub const INNER_ETH: usize = 70;
/// Length of an IPv6 header without extensions.
const IP_LEN: usize = 40;
const PROTO_UDP: u8 = 17;

/// What a prebuilt header is made from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OuterV6 {
    /// MAC address of the next hop towards the peer.
    pub next_hop_mac: [u8; 6],
    /// MAC address of the uplink.
    pub uplink_mac: [u8; 6],
    /// Our VTEP address.
    pub local: [u8; 16],
    /// The peer's VTEP address.
    pub remote: [u8; 16],
    /// UDP destination port.
    pub port: u16,
    /// VXLAN network identifier; the upper 8 bits are ignored.
    pub vni: u32,
    /// The peer's VTEP MAC: destination of the inner frame.
    pub peer_mac: [u8; 6],
    /// Our VTEP MAC as published: source of the inner frame.
    pub own_mac: [u8; 6],
}

impl OuterV6 {
    /// Builds the header with the per-packet fields zero, and the one's complement sum of what of it the UDP checksum covers: addresses,
    /// protocol, destination port, VXLAN and inner Ethernet header.
    pub const fn build(&self) -> ([u8; HEADER_LEN], u32) {
        let mut h = [0; HEADER_LEN];
        put(&mut h, 0, &self.next_hop_mac);
        put(&mut h, 6, &self.uplink_mac);
        put(&mut h, 12, &[0x86, 0xdd]);
        put(&mut h, IP, &[0x60, 0, 0, 0, 0, 0, PROTO_UDP, OUTER_TTL]);
        put(&mut h, IP + 8, &self.local);
        put(&mut h, IP + 24, &self.remote);
        put(&mut h, UDP + 2, &self.port.to_be_bytes());
        put(&mut h, VXLAN, &[VXLAN_I, 0, 0, 0]);
        put(&mut h, VXLAN + 4, &vni_word(self.vni));
        put(&mut h, INNER_ETH, &self.peer_mac);
        put(&mut h, INNER_ETH + 6, &self.own_mac);
        put(&mut h, INNER_ETH + 12, &[0x86, 0xdd]);
        let sum = checksum::sum(h.split_at(IP + 8).1, PROTO_UDP as u32);
        (h, sum)
    }
}

/// What an inner packet adds to the sum that the outer UDP checksum covers: `start` are the first eight bytes of its header, as they will
/// be sent.
///
/// True only for a packet whose next header is TCP, UDP with a checksum, or `ICMPv6`, and whose checksum is right or will be filled in. Of the
/// header and the complement of the pseudo header addresses and length cancel out (RFC 1071: modulo 0xffff).
#[inline(always)]
pub fn inner_sum(start: [u8; 8]) -> u32 {
    let [version, class, flow, label, _, _, next, hops] = start;
    u32::from(u16::from_be_bytes([version, class]))
        + u32::from(u16::from_be_bytes([flow, label]))
        + u32::from(u16::from_be_bytes([next, hops]))
        + u32::from(!u16::from(next))
}

/// Fills the per-packet fields of a prebuilt header.
///
/// `inner_len` is the length of the inner IP packet in bytes, at most 65465 so that the outer length fits 16 bits; `outer_tos` is from
/// [`crate::ecn::outer_for`]; `sum` is from [`OuterV6::build`], `inner` from [`inner_sum`].
#[inline(always)]
pub fn complete(
    header: &mut [u8; HEADER_LEN],
    sum: u32,
    inner: u32,
    inner_len: u32,
    outer_tos: u8,
    source_port: u16,
) {
    let udp_len = (inner_len + OVERHEAD_V6) as u16 - IP_LEN as u16;
    let check = udp_check(sum, inner, udp_len, source_port);
    header[IP] = 0x60 | outer_tos >> 4;
    header[IP + 1] = outer_tos << 4;
    [header[IP + 4], header[IP + 5]] = udp_len.to_be_bytes();
    [header[UDP], header[UDP + 1]] = source_port.to_be_bytes();
    [header[UDP + 4], header[UDP + 5]] = udp_len.to_be_bytes();
    [header[UDP + 6], header[UDP + 7]] = check.to_be_bytes();
}

/// The outer UDP checksum. The length counts twice: in the pseudo header and in the UDP header. Zero is written as 0xffff (RFC 8200, 8.1).
#[inline(always)]
pub const fn udp_check(sum: u32, inner: u32, udp_len: u16, source_port: u16) -> u16 {
    let check = checksum::finish(sum + inner + 2 * udp_len as u32 + source_port as u32);
    if check == 0 { 0xffff } else { check }
}

/// The one's complement sum of the pseudo header of a UDP packet of `len` bytes, from that of its two addresses (RFC 8200, 8.1).
#[inline(always)]
pub const fn pseudo_sum(addresses: u16, len: u32) -> u32 {
    addresses as u32 + (len >> 16) + (len & 0xffff) + PROTO_UDP as u32
}

/// Whether the checksum field holds what a sender writes who leaves the rest to a device: the sum of the pseudo header alone. Between
/// virtual machines and containers of one host no device ever does the rest, and nothing can change the packet on its way.
#[inline(always)]
pub const fn is_left_to_device(pseudo: u32, check: u16) -> bool {
    checksum::fold(pseudo) == check
}

const fn put(header: &mut [u8; HEADER_LEN], at: usize, bytes: &[u8]) {
    let mut i = 0;
    while i < bytes.len() {
        header[at + i] = bytes[i];
        i += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use etherparse::{NetSlice, PacketBuilder, SlicedPacket, TransportSlice};
    use proptest::prelude::*;
    use std::vec::Vec;

    const OUTER: OuterV6 = OuterV6 {
        next_hop_mac: [2, 0, 0, 0, 0, 1],
        uplink_mac: [2, 0, 0, 0, 0, 2],
        local: [0xfd, 0x88, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x11],
        remote: [0xfd, 0x88, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x12],
        port: 8472,
        vni: 0x01_02_03,
        peer_mac: [2, 0, 0, 0, 1, 1],
        own_mac: [2, 0, 0, 0, 1, 2],
    };

    fn inner(kind: u8, source: [u8; 16], target: [u8; 16], hops: u8, payload: &[u8]) -> Vec<u8> {
        let start = PacketBuilder::ipv6(source, target, hops);
        let mut packet = Vec::new();
        match kind {
            0 => start.tcp(40_000, 80, 7, 1000).write(&mut packet, payload),
            1 => start.udp(40_000, 53).write(&mut packet, payload),
            _ => start.icmpv6_echo_request(5, 6).write(&mut packet, payload),
        }
        .expect("a packet");
        packet
    }

    proptest! {
        // A second implementation (etherparse) sums up every byte of what we built from headers alone.
        #[test]
        fn etherparse_agrees_with_every_field_and_the_checksum(
            kind in 0u8..3,
            source in any::<[u8; 16]>(),
            target in any::<[u8; 16]>(),
            hops in 1u8..,
            class in any::<u8>(),
            label in any::<[u8; 2]>(),
            payload in proptest::collection::vec(any::<u8>(), 0..1300),
            tos in 0u8..4,
            port in any::<u16>(),
        ) {
            let mut packet = inner(kind, source, target, hops, &payload);
            // Neither is part of any checksum but the outer one.
            packet[0] = 0x60 | class >> 4;
            packet[1] = class << 4 | label[0] & 0x0f;
            packet[2] = label[1];
            let (mut header, sum) = OUTER.build();
            let start = packet[..8].try_into().expect("eight bytes");
            complete(&mut header, sum, inner_sum(start), packet.len() as u32, tos, port);
            let mut frame = header.to_vec();
            frame.extend_from_slice(&packet);
            let read = SlicedPacket::from_ethernet(&frame).expect("a well-formed frame");
            let Some(NetSlice::Ipv6(ip)) = read.net else { panic!("not IPv6") };
            let ip = ip.header().to_header();
            prop_assert_eq!((ip.source, ip.destination), (OUTER.local, OUTER.remote));
            prop_assert_eq!(usize::from(ip.payload_length), packet.len() + 30);
            prop_assert_eq!(ip.hop_limit, 64);
            prop_assert_eq!(ip.traffic_class, tos);
            prop_assert_eq!(ip.flow_label.value(), 0);
            let Some(TransportSlice::Udp(udp)) = read.transport else { panic!("not UDP") };
            prop_assert_eq!((udp.source_port(), udp.destination_port()), (port, 8472));
            prop_assert_eq!(usize::from(udp.length()), packet.len() + 30);
            let whole = udp.to_header().calc_checksum_ipv6(&ip, udp.payload()).expect("a checksum");
            prop_assert_eq!(udp.checksum(), if whole == 0 { 0xffff } else { whole });
            prop_assert_eq!(&udp.payload()[..8], &[8, 0, 0, 0, 1, 2, 3, 0]);
            prop_assert_eq!(&udp.payload()[8..22], &[2, 0, 0, 0, 1, 1, 2, 0, 0, 0, 1, 2, 0x86, 0xdd]);
        }
    }

    proptest! {
        #[test]
        fn whoever_sums_up_the_packet_accepts_what_etherparse_makes(
            source in any::<[u8; 16]>(),
            target in any::<[u8; 16]>(),
            payload in proptest::collection::vec(any::<u8>(), 0..1300),
            flip in any::<proptest::sample::Index>(),
        ) {
            let mut packet = inner(1, source, target, 64, &payload);
            let addresses = checksum::fold(checksum::sum(&packet[8..40], 0));
            let pseudo = pseudo_sum(addresses, packet.len() as u32 - 40);
            prop_assert_eq!(checksum::fold(checksum::sum(&packet[40..], pseudo)), 0xffff);
            let at = 40 + flip.index(packet.len() - 40);
            packet[at] ^= 0x10;
            prop_assert_ne!(checksum::fold(checksum::sum(&packet[40..], pseudo)), 0xffff);
            // `~udp_v6_check(len, saddr, daddr, 0)` of a sender is the pseudo header's sum.
            prop_assert!(is_left_to_device(pseudo, checksum::fold(pseudo)));
            prop_assert!(!is_left_to_device(pseudo, checksum::fold(pseudo) ^ 1));
        }
    }

    #[test]
    fn a_sum_of_zero_is_written_as_its_other_spelling() {
        let found = (0..=u16::MAX).map(|port| udp_check(0x1234, 0, 100, port));
        let all: std::collections::BTreeSet<u16> = found.collect();
        assert!(!all.contains(&0));
        assert!(all.contains(&0xffff));
    }
}
