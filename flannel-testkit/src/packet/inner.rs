//! Frames that pods send: Ethernet, IPv4, and what is above.

use super::{
    Csum, ETHERTYPE_IPV4, Ipv4, PROTOCOL_ICMP, PROTOCOL_TCP, PROTOCOL_UDP, checksum, ethernet,
    split_ethernet, split_udp, udp,
};
use anyhow::{Context as _, ensure};
use std::net::Ipv4Addr;

const TCP: usize = 20;
const ECHO: usize = 8;
const ECHO_REQUEST: u8 = 8;

/// What an IPv4 packet carries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum L4 {
    Udp {
        src_port: u16,
        dst_port: u16,
        csum: Csum,
        data: Vec<u8>,
    },
    Tcp {
        src_port: u16,
        dst_port: u16,
        sequence: u32,
        acknowledgement: u32,
        /// FIN 1, SYN 2, RST 4, PSH 8, ACK 16, URG 32, ECE 64, CWR 128.
        flags: u8,
        window: u16,
        csum: Csum,
        /// A multiple of 4 bytes, at most 40.
        options: Vec<u8>,
        data: Vec<u8>,
    },
    Echo {
        reply: bool,
        id: u16,
        sequence: u16,
        csum: Csum,
        data: Vec<u8>,
    },
    /// Any protocol, and the content of fragments.
    Raw { protocol: u8, data: Vec<u8> },
}

/// An untagged Ethernet frame with an IPv4 packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inner {
    pub dst_mac: [u8; 6],
    pub src_mac: [u8; 6],
    /// 0x0800 unless made to lie.
    pub ethertype: u16,
    pub ip: Ipv4,
    pub l4: L4,
}

impl Inner {
    /// A frame with everything at its usual value. The MACs are the caller's to set.
    pub fn new(src: Ipv4Addr, dst: Ipv4Addr, l4: L4) -> Inner {
        Inner {
            dst_mac: [0; 6],
            src_mac: [0; 6],
            ethertype: ETHERTYPE_IPV4,
            ip: Ipv4::new(src, dst),
            l4,
        }
    }

    /// A UDP datagram from port 40000 to `dst_port`.
    pub fn udp(src: Ipv4Addr, dst: Ipv4Addr, dst_port: u16, data: &[u8]) -> Inner {
        let l4 = L4::Udp {
            src_port: 40_000,
            dst_port,
            csum: Csum::Right,
            data: data.to_vec(),
        };
        Inner::new(src, dst, l4)
    }

    /// A TCP segment with ACK and PSH from port 40000 to `dst_port`.
    pub fn tcp(src: Ipv4Addr, dst: Ipv4Addr, dst_port: u16, data: &[u8]) -> Inner {
        let l4 = L4::Tcp {
            src_port: 40_000,
            dst_port,
            sequence: 1,
            acknowledgement: 1,
            flags: 0x18,
            window: 65_535,
            csum: Csum::Right,
            options: Vec::new(),
            data: data.to_vec(),
        };
        Inner::new(src, dst, l4)
    }

    /// An echo request.
    pub fn echo(src: Ipv4Addr, dst: Ipv4Addr, id: u16, sequence: u16, data: &[u8]) -> Inner {
        let l4 = L4::Echo {
            reply: false,
            id,
            sequence,
            csum: Csum::Right,
            data: data.to_vec(),
        };
        Inner::new(src, dst, l4)
    }

    /// Sets both MACs.
    #[must_use]
    pub fn with_macs(mut self, src_mac: [u8; 6], dst_mac: [u8; 6]) -> Inner {
        self.src_mac = src_mac;
        self.dst_mac = dst_mac;
        self
    }

    /// The frame.
    pub fn bytes(&self) -> Vec<u8> {
        let mut frame = ethernet(self.dst_mac, self.src_mac, self.ethertype);
        frame.extend(self.packet());
        frame
    }

    /// The IPv4 packet alone.
    pub fn packet(&self) -> Vec<u8> {
        let (protocol, payload) = self.payload();
        self.ip.bytes(protocol, &payload)
    }

    fn payload(&self) -> (u8, Vec<u8>) {
        match &self.l4 {
            L4::Udp {
                src_port,
                dst_port,
                csum,
                data,
            } => {
                let datagram = udp(&self.ip, [*src_port, *dst_port], *csum, None, data);
                (PROTOCOL_UDP, datagram)
            }
            L4::Tcp { csum, .. } => {
                let mut segment = self.tcp_segment();
                let pseudo = self.ip.pseudo_header(PROTOCOL_TCP, segment.len());
                let right = checksum(&segment, pseudo);
                segment[16..18].copy_from_slice(&csum.field(right).to_be_bytes());
                (PROTOCOL_TCP, segment)
            }
            L4::Echo {
                reply,
                id,
                sequence,
                csum,
                data,
            } => {
                let mut out = vec![if *reply { 0 } else { ECHO_REQUEST }, 0, 0, 0];
                out.extend(id.to_be_bytes());
                out.extend(sequence.to_be_bytes());
                out.extend(data);
                let right = checksum(&out, 0);
                out[2..4].copy_from_slice(&csum.field(right).to_be_bytes());
                (PROTOCOL_ICMP, out)
            }
            L4::Raw { protocol, data } => (*protocol, data.clone()),
        }
    }

    /// The TCP segment with a checksum of zero.
    fn tcp_segment(&self) -> Vec<u8> {
        let L4::Tcp {
            src_port,
            dst_port,
            sequence,
            acknowledgement,
            flags,
            window,
            csum: _,
            options,
            data,
        } = &self.l4
        else {
            return Vec::new();
        };
        assert!(
            options.len() <= 40 && options.len().is_multiple_of(4),
            "{} bytes of TCP options",
            options.len()
        );
        let words = u8::try_from((TCP + options.len()) / 4).unwrap_or(15);
        let mut out = Vec::with_capacity(TCP + options.len() + data.len());
        out.extend(src_port.to_be_bytes());
        out.extend(dst_port.to_be_bytes());
        out.extend(sequence.to_be_bytes());
        out.extend(acknowledgement.to_be_bytes());
        out.extend([words << 4, *flags]);
        out.extend(window.to_be_bytes());
        out.extend([0; 4]);
        out.extend(options);
        out.extend(data);
        out
    }

    /// Takes a frame apart. A fragment's content, and any protocol that [`L4`] does not name, is [`L4::Raw`].
    pub fn parse(frame: &[u8]) -> anyhow::Result<Inner> {
        let (dst_mac, src_mac, ethertype, rest) = split_ethernet(frame)?;
        ensure!(
            ethertype == ETHERTYPE_IPV4,
            "EtherType {ethertype:#06x}, not IPv4"
        );
        let (ip, protocol, payload) = Ipv4::parse(rest)?;
        let l4 = match protocol {
            _ if ip.is_fragment() => raw(protocol, payload),
            PROTOCOL_UDP => {
                let ([src_port, dst_port], csum, _, data) = split_udp(&ip, payload)?;
                L4::Udp {
                    src_port,
                    dst_port,
                    csum,
                    data: data.to_vec(),
                }
            }
            PROTOCOL_TCP => parse_tcp(&ip, payload)?,
            PROTOCOL_ICMP => parse_echo(payload),
            _ => raw(protocol, payload),
        };
        Ok(Inner {
            dst_mac,
            src_mac,
            ethertype,
            ip,
            l4,
        })
    }
}

fn raw(protocol: u8, data: &[u8]) -> L4 {
    L4::Raw {
        protocol,
        data: data.to_vec(),
    }
}

fn parse_tcp(ip: &Ipv4, segment: &[u8]) -> anyhow::Result<L4> {
    ensure!(
        segment.len() >= TCP,
        "{} bytes, no TCP header",
        segment.len()
    );
    let word = |at: usize| u16::from_be_bytes([segment[at], segment[at + 1]]);
    let long = |at: usize| (u32::from(word(at)) << 16) | u32::from(word(at + 2));
    let header = usize::from(segment[12] >> 4) * 4;
    let options = segment
        .get(TCP..header)
        .with_context(|| format!("TCP header of {header} bytes in {}", segment.len()))?;
    let mut zeroed = segment.to_vec();
    zeroed[16..18].fill(0);
    let pseudo = ip.pseudo_header(PROTOCOL_TCP, segment.len());
    Ok(L4::Tcp {
        src_port: word(0),
        dst_port: word(2),
        sequence: long(4),
        acknowledgement: long(8),
        flags: segment[13],
        window: word(14),
        csum: Csum::of(word(16), checksum(&zeroed, pseudo)),
        options: options.to_vec(),
        data: segment[header..].to_vec(),
    })
}

fn parse_echo(message: &[u8]) -> L4 {
    if message.len() < ECHO || ![0, ECHO_REQUEST].contains(&message[0]) || message[1] != 0 {
        return raw(PROTOCOL_ICMP, message);
    }
    let word = |at: usize| u16::from_be_bytes([message[at], message[at + 1]]);
    let mut zeroed = message.to_vec();
    zeroed[2..4].fill(0);
    L4::Echo {
        reply: message[0] == 0,
        id: word(4),
        sequence: word(6),
        csum: Csum::of(word(2), checksum(&zeroed, 0)),
        data: message[ECHO..].to_vec(),
    }
}
