//! The IPv6 header with its extensions.

use super::Header;
use anyhow::{Context as _, ensure};
use std::net::Ipv6Addr;

const HEADER: usize = 40;
/// Next header: the fragment header.
const FRAGMENT: u8 = 44;
/// Next headers that begin with a next header and a length in units of 8 bytes, the first not counted: hop-by-hop options, routing,
/// destination options.
const EXTENSIONS: [u8; 3] = [0, 43, 60];
/// Identification of fragments that are made here.
const ID: u32 = 0x1234_5678;

/// An extension header. Next header and length come with the packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extension {
    /// 0 hop-by-hop options, 43 routing, 60 destination options.
    pub kind: u8,
    /// What is behind the length: 6 bytes and a multiple of 8.
    pub data: Vec<u8>,
}

impl Extension {
    /// Options of this kind that mean nothing, in 8 bytes.
    pub fn padding(kind: u8) -> Extension {
        Extension {
            kind,
            data: vec![1, 4, 0, 0, 0, 0],
        }
    }
}

/// A fragment header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fragment {
    /// In units of 8 bytes.
    pub offset: u16,
    pub more: bool,
    pub id: u32,
}

/// An IPv6 header; protocol and payload come with the packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ipv6 {
    pub src: Ipv6Addr,
    pub dst: Ipv6Addr,
    /// DSCP in the upper six bits, ECN in the lower two.
    pub traffic_class: u8,
    /// 20 bits.
    pub flow_label: u32,
    pub hop_limit: u8,
    /// In order; all before the fragment header.
    pub extensions: Vec<Extension>,
    pub fragment: Option<Fragment>,
    /// Payload length field; `None` is the right one.
    pub payload_len: Option<u16>,
}

impl Ipv6 {
    /// A header as hosts send it: hop limit 64, everything else zero, no extensions.
    pub fn new(src: Ipv6Addr, dst: Ipv6Addr) -> Ipv6 {
        Ipv6 {
            src,
            dst,
            traffic_class: 0,
            flow_label: 0,
            hop_limit: 64,
            extensions: Vec::new(),
            fragment: None,
            payload_len: None,
        }
    }

    /// The ECN bits: 0 not capable, 1 and 2 capable, 3 congestion experienced.
    pub fn ecn(&self) -> u8 {
        self.traffic_class & 3
    }

    /// The packet: this header, then `payload`.
    pub fn bytes(&self, protocol: u8, payload: &[u8]) -> Vec<u8> {
        let mut kinds: Vec<u8> = self.extensions.iter().map(|one| one.kind).collect();
        kinds.extend(self.fragment.map(|_| FRAGMENT));
        kinds.push(protocol);
        let mut behind = kinds.into_iter();
        let first = behind.next().unwrap_or(protocol);
        let mut next = || behind.next().unwrap_or(protocol);
        let mut rest = Vec::with_capacity(payload.len());
        for extension in &self.extensions {
            let len = extension.data.len() + 2;
            assert!(len.is_multiple_of(8), "an extension of {len} bytes");
            rest.extend([next(), u8::try_from(len / 8 - 1).unwrap_or(u8::MAX)]);
            rest.extend(&extension.data);
        }
        if let Some(fragment) = self.fragment {
            rest.extend([next(), 0]);
            rest.extend(((fragment.offset << 3) | u16::from(fragment.more)).to_be_bytes());
            rest.extend(fragment.id.to_be_bytes());
        }
        rest.extend(payload);
        let real_len = u16::try_from(rest.len()).unwrap_or(u16::MAX);
        let word = 6 << 28 | u32::from(self.traffic_class) << 20 | (self.flow_label & 0x000f_ffff);
        let mut out = word.to_be_bytes().to_vec();
        out.extend(self.payload_len.unwrap_or(real_len).to_be_bytes());
        out.extend([first, self.hop_limit]);
        out.extend(self.src.octets());
        out.extend(self.dst.octets());
        out.extend(rest);
        out
    }

    /// Header, protocol and payload of a packet. What follows the payload length is padding and left out; a length beyond the
    /// end is an error. Behind a fragment header everything is payload.
    pub fn parse(packet: &[u8]) -> anyhow::Result<(Ipv6, u8, &[u8])> {
        let (header, rest) = packet
            .split_at_checked(HEADER)
            .with_context(|| format!("{} bytes, no IPv6 header", packet.len()))?;
        ensure!(header[0] >> 4 == 6, "IP version {}", header[0] >> 4);
        let word = u32::from_be_bytes([header[0], header[1], header[2], header[3]]);
        let len = usize::from(u16::from_be_bytes([header[4], header[5]]));
        let mut rest = rest
            .get(..len)
            .with_context(|| format!("payload length {len} of {} bytes", packet.len()))?;
        let address = |at: usize| -> anyhow::Result<Ipv6Addr> {
            let octets: [u8; 16] = header[at..at + 16].try_into()?;
            Ok(octets.into())
        };
        let mut ip = Ipv6::new(address(8)?, address(24)?);
        ip.traffic_class = u8::try_from(word >> 20 & 0xff)?;
        ip.flow_label = word & 0x000f_ffff;
        ip.hop_limit = header[7];
        let mut next = header[6];
        while EXTENSIONS.contains(&next) {
            let len = rest.get(1).map_or(8, |len| (usize::from(*len) + 1) * 8);
            let (extension, behind) = rest
                .split_at_checked(len)
                .with_context(|| format!("an extension of {len} bytes in {}", rest.len()))?;
            ip.extensions.push(Extension {
                kind: next,
                data: extension[2..].to_vec(),
            });
            (next, rest) = (extension[0], behind);
        }
        if next == FRAGMENT {
            let (header, behind) = rest.split_at_checked(8).context("no fragment header")?;
            let place = u16::from_be_bytes([header[2], header[3]]);
            ip.fragment = Some(Fragment {
                offset: place >> 3,
                more: place & 1 != 0,
                id: u32::from_be_bytes([header[4], header[5], header[6], header[7]]),
            });
            (next, rest) = (header[0], behind);
        }
        Ok((ip, next, rest))
    }
}

impl Header for Ipv6 {
    type Address = Ipv6Addr;
    const ETHERTYPE: u16 = 0x86dd;
    const ICMP: u8 = 58;
    const ECHO: [u8; 2] = [128, 129];
    const ICMP_HAS_PSEUDO_HEADER: bool = true;

    fn usual(src: Ipv6Addr, dst: Ipv6Addr) -> Ipv6 {
        Ipv6::new(src, dst)
    }

    fn packet(&self, protocol: u8, payload: &[u8]) -> Vec<u8> {
        self.bytes(protocol, payload)
    }

    fn read(packet: &[u8]) -> anyhow::Result<(Ipv6, u8, &[u8])> {
        Ipv6::parse(packet)
    }

    fn pseudo_sum(&self, protocol: u8, len: usize) -> u32 {
        let all = [self.src, self.dst].map(|address| address.segments());
        let sum: u32 = all.as_flattened().iter().copied().map(u32::from).sum();
        sum + u32::from(protocol) + u32::try_from(len).unwrap_or(0)
    }

    fn source(&self) -> Ipv6Addr {
        self.src
    }

    fn destination(&self) -> Ipv6Addr {
        self.dst
    }

    fn without_marks(&self) -> Ipv6 {
        Ipv6 {
            flow_label: 0,
            ..self.clone()
        }
    }

    fn is_piece(&self) -> bool {
        self.fragment.is_some()
    }

    fn is_summed(&self) -> bool {
        true
    }

    fn tos(&self) -> u8 {
        self.traffic_class
    }

    fn set_tos(&mut self, tos: u8) {
        self.traffic_class = tos;
    }

    fn ttl(&self) -> u8 {
        self.hop_limit
    }

    fn set_ttl(&mut self, ttl: u8) {
        self.hop_limit = ttl;
    }

    fn piece(&self, offset: u16, more: bool) -> Ipv6 {
        let whole = self.fragment.unwrap_or(Fragment {
            offset: 0,
            more: false,
            id: ID | (self.flow_label & 0xffff),
        });
        Ipv6 {
            fragment: Some(Fragment {
                offset: whole.offset + offset / 8,
                more: whole.more || more,
                id: whole.id,
            }),
            payload_len: None,
            ..self.clone()
        }
    }

    fn piece_header(&self) -> usize {
        let extensions = self.extensions.iter().map(|one| one.data.len() + 2);
        HEADER + 8 + extensions.sum::<usize>()
    }
}
