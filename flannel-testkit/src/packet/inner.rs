//! Frames that pods send: Ethernet, IP, and what is above.

use super::{
    Address, Csum, Header, Ipv4, Ipv6, PROTOCOL_TCP, PROTOCOL_UDP, checksum, ethernet,
    split_ethernet, split_ip, split_udp, udp,
};
use anyhow::{Context as _, ensure};
use std::net::{IpAddr, Ipv4Addr};

const TCP: usize = 20;
const ECHO: usize = 8;

/// What an IP packet carries.
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

/// An untagged Ethernet frame with an IP packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inner<A: Address = Ipv4Addr> {
    pub dst_mac: [u8; 6],
    pub src_mac: [u8; 6],
    /// 0x0800 or 0x86dd unless made to lie.
    pub ethertype: u16,
    pub ip: A::Header,
    pub l4: L4,
}

impl Inner {
    /// Takes a frame with IPv4 apart; see [`Inner::read`].
    pub fn parse(frame: &[u8]) -> anyhow::Result<Inner> {
        Inner::read(frame)
    }
}

impl<A: Address> Inner<A> {
    /// A frame with everything at its usual value. The MACs are the caller's to set.
    pub fn new(src: A, dst: A, l4: L4) -> Inner<A> {
        Inner {
            dst_mac: [0; 6],
            src_mac: [0; 6],
            ethertype: A::Header::ETHERTYPE,
            ip: A::Header::usual(src, dst),
            l4,
        }
    }

    /// A UDP datagram from port 40000 to `dst_port`.
    pub fn udp(src: A, dst: A, dst_port: u16, data: &[u8]) -> Inner<A> {
        let l4 = L4::Udp {
            src_port: 40_000,
            dst_port,
            csum: Csum::Right,
            data: data.to_vec(),
        };
        Inner::new(src, dst, l4)
    }

    /// A TCP segment with ACK and PSH from port 40000 to `dst_port`.
    pub fn tcp(src: A, dst: A, dst_port: u16, data: &[u8]) -> Inner<A> {
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
    pub fn echo(src: A, dst: A, id: u16, sequence: u16, data: &[u8]) -> Inner<A> {
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
    pub fn with_macs(mut self, src_mac: [u8; 6], dst_mac: [u8; 6]) -> Inner<A> {
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

    /// The IP packet alone.
    pub fn packet(&self) -> Vec<u8> {
        let (protocol, payload) = self.payload();
        self.ip.packet(protocol, &payload)
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
                let pseudo = self.ip.pseudo_sum(PROTOCOL_TCP, segment.len());
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
                let [request, answer] = A::Header::ECHO;
                let mut out = vec![if *reply { answer } else { request }, 0, 0, 0];
                out.extend(id.to_be_bytes());
                out.extend(sequence.to_be_bytes());
                out.extend(data);
                let right = icmp_checksum(&self.ip, &out);
                out[2..4].copy_from_slice(&csum.field(right).to_be_bytes());
                (A::Header::ICMP, out)
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
    pub fn read(frame: &[u8]) -> anyhow::Result<Inner<A>> {
        let (dst_mac, src_mac, ethertype, rest) = split_ethernet(frame)?;
        let (ip, protocol, payload) = split_ip::<A>(ethertype, rest)?;
        let l4 = match protocol {
            _ if ip.is_piece() => raw(protocol, payload),
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
            protocol if protocol == A::Header::ICMP => parse_echo(&ip, payload),
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

/// A frame with everything at its usual value, of the addresses' family. Panics when they are of two.
#[track_caller]
pub fn inner_frame(addresses: [IpAddr; 2], macs: [[u8; 6]; 2], l4: L4) -> Vec<u8> {
    let [src_mac, dst_mac] = macs;
    match addresses {
        [IpAddr::V4(src), IpAddr::V4(dst)] => {
            Inner::new(src, dst, l4).with_macs(src_mac, dst_mac).bytes()
        }
        [IpAddr::V6(src), IpAddr::V6(dst)] => {
            Inner::new(src, dst, l4).with_macs(src_mac, dst_mac).bytes()
        }
        [src, dst] => panic!("a packet from {src} to {dst}"),
    }
}

/// A message of the addresses' ICMP, whose checksum is filled in.
pub fn icmp(addresses: [IpAddr; 2], mut message: Vec<u8>) -> L4 {
    message[2..4].fill(0);
    let (protocol, sum) = match addresses {
        [IpAddr::V6(src), IpAddr::V6(dst)] => {
            let ip = Ipv6::usual(src, dst);
            (Ipv6::ICMP, icmp_checksum(&ip, &message))
        }
        _ => (Ipv4::ICMP, checksum(&message, 0)),
    };
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    L4::Raw {
        protocol,
        data: message,
    }
}

fn raw(protocol: u8, data: &[u8]) -> L4 {
    L4::Raw {
        protocol,
        data: data.to_vec(),
    }
}

fn parse_tcp(ip: &impl Header, segment: &[u8]) -> anyhow::Result<L4> {
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
    let pseudo = ip.pseudo_sum(PROTOCOL_TCP, segment.len());
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

/// The checksum of a message of the header's ICMP whose checksum field is zero.
fn icmp_checksum<H: Header>(ip: &H, message: &[u8]) -> u16 {
    let start = if H::ICMP_HAS_PSEUDO_HEADER {
        ip.pseudo_sum(H::ICMP, message.len())
    } else {
        0
    };
    checksum(message, start)
}

fn parse_echo<H: Header>(ip: &H, message: &[u8]) -> L4 {
    if message.len() < ECHO || !H::ECHO.contains(&message[0]) || message[1] != 0 {
        return raw(H::ICMP, message);
    }
    let word = |at: usize| u16::from_be_bytes([message[at], message[at + 1]]);
    let mut zeroed = message.to_vec();
    zeroed[2..4].fill(0);
    L4::Echo {
        reply: message[0] == H::ECHO[1],
        id: word(4),
        sequence: word(6),
        csum: Csum::of(word(2), icmp_checksum(ip, &zeroed)),
        data: message[ECHO..].to_vec(),
    }
}
