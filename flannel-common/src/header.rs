//! The prebuilt outer header: 64 bytes that precede the inner IP packet on the wire.
//!
//! ```text
//!  0 outer Ethernet: next hop MAC, uplink MAC, 0x0800
//! 14 outer IPv4: 45 tos len id 0000 ttl 11 sum src dst       (tos, len, id, sum filled per packet)
//! 34 outer UDP: source port, 8472, length, 0                  (source port and length filled per packet)
//! 42 VXLAN: 08 000000 vni 00                                  (RFC 7348, section 5)
//! 50 inner Ethernet: peer VTEP MAC, own VTEP MAC, 0x0800
//! 64 inner IPv4 packet
//! ```
//!
//! The UDP checksum is zero, which RFC 7348 asks for and every kernel accepts over IPv4; DF is clear and the hop limit 64,
//! as on flannel's own device (`ttl auto`, `df unset`).

use crate::checksum;

/// Bytes from the outer Ethernet header to the inner IP packet.
pub const HEADER_LEN: usize = 64;
/// Bytes that the tunnel adds to the inner packet as the underlay's IP layer counts it: IPv4, UDP, VXLAN and inner Ethernet.
pub const OVERHEAD_V4: u32 = 50;

/// Offset of the outer IPv4 header.
pub const IP: usize = 14;
/// Offset of the outer UDP header.
pub const UDP: usize = 34;
/// Offset of the VXLAN header.
pub const VXLAN: usize = 42;
/// Offset of the inner Ethernet header.
pub const INNER_ETH: usize = 50;
/// Hop limit of the outer header.
pub const OUTER_TTL: u8 = 64;
/// VXLAN flags byte with only the I bit.
pub const VXLAN_I: u8 = 0x08;
const PROTO_UDP: u8 = 17;

/// What a prebuilt header is made from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OuterV4 {
    /// MAC address of the next hop towards the peer.
    pub next_hop_mac: [u8; 6],
    /// MAC address of the uplink.
    pub uplink_mac: [u8; 6],
    /// Our VTEP address.
    pub local: [u8; 4],
    /// The peer's VTEP address.
    pub remote: [u8; 4],
    /// UDP destination port.
    pub port: u16,
    /// VXLAN network identifier; the upper 8 bits are ignored.
    pub vni: u32,
    /// The peer's VTEP MAC: destination of the inner frame.
    pub peer_mac: [u8; 6],
    /// Our VTEP MAC as published: source of the inner frame.
    pub own_mac: [u8; 6],
}

impl OuterV4 {
    /// Builds the header with the per-packet fields zero, and the one's complement sum of its IPv4 part.
    pub const fn build(&self) -> ([u8; HEADER_LEN], u32) {
        let mut h = [0; HEADER_LEN];
        put(&mut h, 0, &self.next_hop_mac);
        put(&mut h, 6, &self.uplink_mac);
        put(&mut h, 12, &[0x08, 0x00]);
        put(
            &mut h,
            IP,
            &[0x45, 0, 0, 0, 0, 0, 0, 0, OUTER_TTL, PROTO_UDP],
        );
        put(&mut h, IP + 12, &self.local);
        put(&mut h, IP + 16, &self.remote);
        put(&mut h, UDP + 2, &self.port.to_be_bytes());
        put(&mut h, VXLAN, &[VXLAN_I, 0, 0, 0]);
        put(&mut h, VXLAN + 4, &vni_word(self.vni));
        put(&mut h, INNER_ETH, &self.peer_mac);
        put(&mut h, INNER_ETH + 6, &self.own_mac);
        put(&mut h, INNER_ETH + 12, &[0x08, 0x00]);
        let sum = checksum::sum(h.split_at(IP).1.split_at(20).0, 0);
        (h, sum)
    }
}

/// The last four bytes of a VXLAN header.
pub const fn vni_word(vni: u32) -> [u8; 4] {
    (vni << 8).to_be_bytes()
}

/// Fills the per-packet fields of a prebuilt header.
///
/// `inner_len` is the length of the inner IP packet in bytes (of the whole super-packet for GSO: segmentation rewrites
/// the lengths), at most 65485 so that the outer length fits 16 bits; `outer_tos` is from [`crate::ecn::outer_for`].
#[inline(always)]
pub fn complete(
    header: &mut [u8; HEADER_LEN],
    ip_sum: u32,
    inner_len: u32,
    outer_tos: u8,
    id: u16,
    source_port: u16,
) {
    let total = (inner_len + OVERHEAD_V4) as u16;
    let check = checksum::finish(ip_sum + u32::from(outer_tos) + u32::from(total) + u32::from(id));
    let udp_len = total.wrapping_sub(20);
    header[IP + 1] = outer_tos;
    [header[IP + 2], header[IP + 3]] = total.to_be_bytes();
    [header[IP + 4], header[IP + 5]] = id.to_be_bytes();
    [header[IP + 10], header[IP + 11]] = check.to_be_bytes();
    [header[UDP], header[UDP + 1]] = source_port.to_be_bytes();
    [header[UDP + 4], header[UDP + 5]] = udp_len.to_be_bytes();
}

/// The UDP source port for a flow hash, with the kernel's own formula (`udp_flow_src_port`, `include/net/udp.h`), so that
/// ECMP and RSS place a flow alike whichever path carries it.
#[inline(always)]
pub const fn source_port(hash: u32, min: u16, span: u16) -> u16 {
    let mixed = hash ^ (hash << 16);
    (((mixed as u64 * span as u64) >> 32) as u16).wrapping_add(min)
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
    use etherparse::{NetSlice, SlicedPacket, TransportSlice};
    use proptest::prelude::*;
    use std::vec::Vec;

    const OUTER: OuterV4 = OuterV4 {
        next_hop_mac: [2, 0, 0, 0, 0, 1],
        uplink_mac: [2, 0, 0, 0, 0, 2],
        local: [192, 168, 77, 11],
        remote: [192, 168, 77, 12],
        port: 8472,
        vni: 0x01_02_03,
        peer_mac: [2, 0, 0, 0, 1, 1],
        own_mac: [2, 0, 0, 0, 1, 2],
    };

    proptest! {
        // A second implementation (etherparse) reads what we built and agrees with every field and checksum.
        #[test]
        fn etherparse_reads_it_back(inner_len in 20u32..=1450, tos in 0u8..4, id in any::<u16>(), port in any::<u16>()) {
            let (mut header, sum) = OUTER.build();
            complete(&mut header, sum, inner_len, tos, id, port);
            let mut frame: Vec<u8> = header.to_vec();
            frame.resize(HEADER_LEN + inner_len as usize, 0);
            let packet = SlicedPacket::from_ethernet(&frame).expect("a well-formed frame");
            let Some(NetSlice::Ipv4(ip)) = packet.net else { panic!("not IPv4") };
            let ip = ip.header().to_header();
            prop_assert_eq!(ip.header_checksum, ip.calc_header_checksum());
            prop_assert_eq!(ip.source, OUTER.local);
            prop_assert_eq!(ip.destination, OUTER.remote);
            prop_assert_eq!(u32::from(ip.total_len), inner_len + OVERHEAD_V4);
            prop_assert_eq!(ip.identification, id);
            prop_assert_eq!(ip.time_to_live, 64);
            prop_assert!(!ip.dont_fragment);
            prop_assert_eq!(ip.ecn.value(), tos);
            prop_assert_eq!(ip.dscp.value(), 0);
            let Some(TransportSlice::Udp(udp)) = packet.transport else { panic!("not UDP") };
            prop_assert_eq!(udp.destination_port(), 8472);
            prop_assert_eq!(udp.source_port(), port);
            prop_assert_eq!(u32::from(udp.length()), inner_len + 30);
            prop_assert_eq!(udp.checksum(), 0);
            prop_assert_eq!(&udp.payload()[..8], &[8, 0, 0, 0, 1, 2, 3, 0]);
            prop_assert_eq!(&udp.payload()[8..22], &[2, 0, 0, 0, 1, 1, 2, 0, 0, 0, 1, 2, 8, 0]);
        }

        #[test]
        fn source_port_stays_in_range(hash in any::<u32>(), min in 1u16..60000, span in 1u16..5000) {
            let port = source_port(hash, min, span);
            prop_assert!(port >= min && port < min + span);
        }
    }

    #[test]
    fn source_port_formula() {
        // hash ^ (hash << 16) = 0x8001_0001; * 28231 >> 32 = 14115.
        assert_eq!(source_port(0x8000_0001, 32768, 28231), 32768 + 14115);
    }
}
