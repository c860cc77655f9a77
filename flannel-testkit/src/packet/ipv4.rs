//! The IPv4 header.

use super::{Csum, ETHERTYPE_IPV4, Header, checksum};
use anyhow::{Context as _, ensure};
use std::net::Ipv4Addr;

const HEADER: usize = 20;
const DONT_FRAGMENT: u16 = 0x4000;
const MORE_FRAGMENTS: u16 = 0x2000;
const OFFSET: u16 = 0x1fff;

/// An IPv4 header; protocol and payload come with the packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ipv4 {
    pub src: Ipv4Addr,
    pub dst: Ipv4Addr,
    /// DSCP in the upper six bits, ECN in the lower two.
    pub tos: u8,
    pub ttl: u8,
    pub id: u16,
    pub dont_fragment: bool,
    pub more_fragments: bool,
    /// In units of 8 bytes.
    pub fragment_offset: u16,
    /// A multiple of 4 bytes, at most 40.
    pub options: Vec<u8>,
    pub csum: Csum,
    /// Total length field; `None` is the right one.
    pub total_len: Option<u16>,
}

impl Ipv4 {
    /// A header as hosts send it: TTL 64, everything else zero, DF clear.
    pub fn new(src: Ipv4Addr, dst: Ipv4Addr) -> Ipv4 {
        Ipv4 {
            src,
            dst,
            tos: 0,
            ttl: 64,
            id: 0,
            dont_fragment: false,
            more_fragments: false,
            fragment_offset: 0,
            options: Vec::new(),
            csum: Csum::Right,
            total_len: None,
        }
    }

    /// The ECN bits: 0 not capable, 1 and 2 capable, 3 congestion experienced.
    pub fn ecn(&self) -> u8 {
        self.tos & 3
    }

    /// Whether this is a piece of a larger packet.
    pub fn is_fragment(&self) -> bool {
        self.more_fragments || self.fragment_offset != 0
    }

    /// The packet: this header, then `payload`.
    pub fn bytes(&self, protocol: u8, payload: &[u8]) -> Vec<u8> {
        assert!(
            self.options.len() <= 40 && self.options.len().is_multiple_of(4),
            "{} bytes of IPv4 options",
            self.options.len()
        );
        let header = HEADER + self.options.len();
        let real_len = u16::try_from(header + payload.len()).unwrap_or(u16::MAX);
        let words = u8::try_from(header / 4).unwrap_or(15);
        let mut out = vec![0x40 | words, self.tos];
        out.extend(self.total_len.unwrap_or(real_len).to_be_bytes());
        out.extend(self.id.to_be_bytes());
        let flags = if self.dont_fragment { DONT_FRAGMENT } else { 0 }
            | if self.more_fragments {
                MORE_FRAGMENTS
            } else {
                0
            };
        out.extend((flags | (self.fragment_offset & OFFSET)).to_be_bytes());
        out.extend([self.ttl, protocol, 0, 0]);
        out.extend(self.src.octets());
        out.extend(self.dst.octets());
        out.extend(&self.options);
        let right = checksum(&out, 0);
        out[10..12].copy_from_slice(&self.csum.field(right).to_be_bytes());
        out.extend(payload);
        out
    }

    /// Header, protocol and payload of a packet. What follows the total length is padding and left out; a total
    /// length beyond the end is an error.
    pub fn parse(packet: &[u8]) -> anyhow::Result<(Ipv4, u8, &[u8])> {
        ensure!(
            packet.len() >= HEADER,
            "{} bytes, no IPv4 header",
            packet.len()
        );
        ensure!(packet[0] >> 4 == 4, "IP version {}", packet[0] >> 4);
        let header = usize::from(packet[0] & 0x0f) * 4;
        ensure!(header >= HEADER, "header length {header}");
        let word = |at: usize| u16::from_be_bytes([packet[at], packet[at + 1]]);
        let address =
            |at: usize| Ipv4Addr::new(packet[at], packet[at + 1], packet[at + 2], packet[at + 3]);
        let total = usize::from(word(2));
        let payload = packet
            .get(header..total)
            .with_context(|| format!("total length {total} of {} bytes", packet.len()))?;
        let mut zeroed = packet[..header].to_vec();
        zeroed[10..12].fill(0);
        let ip = Ipv4 {
            src: address(12),
            dst: address(16),
            tos: packet[1],
            ttl: packet[8],
            id: word(4),
            dont_fragment: word(6) & DONT_FRAGMENT != 0,
            more_fragments: word(6) & MORE_FRAGMENTS != 0,
            fragment_offset: word(6) & OFFSET,
            options: packet[HEADER..header].to_vec(),
            csum: Csum::of(word(10), checksum(&zeroed, 0)),
            total_len: None,
        };
        Ok((ip, packet[9], payload))
    }
}

impl Header for Ipv4 {
    type Address = Ipv4Addr;
    const ETHERTYPE: u16 = ETHERTYPE_IPV4;
    const ICMP: u8 = 1;
    const ECHO: [u8; 2] = [8, 0];
    const ICMP_HAS_PSEUDO_HEADER: bool = false;

    fn usual(src: Ipv4Addr, dst: Ipv4Addr) -> Ipv4 {
        Ipv4::new(src, dst)
    }

    fn packet(&self, protocol: u8, payload: &[u8]) -> Vec<u8> {
        self.bytes(protocol, payload)
    }

    fn read(packet: &[u8]) -> anyhow::Result<(Ipv4, u8, &[u8])> {
        Ipv4::parse(packet)
    }

    fn pseudo_sum(&self, protocol: u8, len: usize) -> u32 {
        let half = |address: Ipv4Addr| {
            let bits = address.to_bits();
            (bits >> 16) + (bits & 0xffff)
        };
        half(self.src) + half(self.dst) + u32::from(protocol) + u32::try_from(len).unwrap_or(0)
    }

    fn source(&self) -> Ipv4Addr {
        self.src
    }

    fn destination(&self) -> Ipv4Addr {
        self.dst
    }

    fn without_marks(&self) -> Ipv4 {
        Ipv4 {
            id: 0,
            ..self.clone()
        }
    }

    fn is_piece(&self) -> bool {
        self.is_fragment()
    }

    fn is_summed(&self) -> bool {
        self.csum == Csum::Right
    }

    fn tos(&self) -> u8 {
        self.tos
    }

    fn set_tos(&mut self, tos: u8) {
        self.tos = tos;
    }

    fn ttl(&self) -> u8 {
        self.ttl
    }

    fn set_ttl(&mut self, ttl: u8) {
        self.ttl = ttl;
    }

    fn piece(&self, offset: u16, more: bool) -> Ipv4 {
        Ipv4 {
            more_fragments: self.more_fragments || more,
            fragment_offset: self.fragment_offset + offset / 8,
            total_len: None,
            ..self.clone()
        }
    }

    fn piece_header(&self) -> usize {
        HEADER + self.options.len()
    }
}
