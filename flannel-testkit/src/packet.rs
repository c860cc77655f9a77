//! Frames built and taken apart field by field, right or deliberately wrong.
//!
//! The same types serve both ways: `Vxlan::parse(&frame.bytes())` gives `frame` again. A default frame is what a
//! flannel node sends (TOS 0, DF clear, TTL 64, checksum present, flags `0x08`, port 8472). They serve both families: [`Vxlan`] and
//! [`Inner`] are of IPv4 unless said otherwise, as in [`Vxlan6`] and [`Inner6`].

mod header;
mod inner;
mod ipv4;
mod ipv6;

pub use header::{Address, Header};
pub use inner::{Inner, L4, icmp, inner_frame};
pub use ipv4::Ipv4;
pub use ipv6::{Extension, Fragment, Ipv6};

use anyhow::{Context as _, ensure};
use std::net::{Ipv4Addr, Ipv6Addr};

/// Length of an Ethernet header without a VLAN tag.
pub const ETHERNET: usize = 14;
/// Bytes that VXLAN over IPv4 adds to an IP packet: outer IPv4, UDP, VXLAN and inner Ethernet header.
pub const OVERHEAD: usize = 50;
/// The same over IPv6.
pub const OVERHEAD_V6: usize = 70;
/// EtherType of IPv4.
pub const ETHERTYPE_IPV4: u16 = 0x0800;
/// The port that flannel's VXLAN uses on Linux.
pub const PORT: u16 = 8472;
/// The VXLAN header's one flag that is set: a VNI is there.
pub const FLAG_VNI: u8 = 0x08;

pub(crate) const PROTOCOL_TCP: u8 = 6;
pub(crate) const PROTOCOL_UDP: u8 = 17;
const UDP: usize = 8;
const VXLAN: usize = 8;

/// The state of a checksum field.
///
/// In a capture on an interface with checksum offload the field of a packet that was sent here holds only the
/// pseudo-header's sum, which reads as [`Csum::Wrong`]; capture on uplinks with [`crate::Offloads::Off`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Csum {
    Zero,
    #[default]
    Right,
    Wrong,
}

impl Csum {
    /// The field's value, given the right one.
    fn field(self, right: u16) -> u16 {
        match self {
            Csum::Zero => 0,
            Csum::Right => right,
            // Never zero, which would mean "none" in UDP.
            Csum::Wrong if right == 0x0100 => 0x0200,
            Csum::Wrong => right ^ 0x0100,
        }
    }

    /// What a field is, given the right value.
    fn of(field: u16, right: u16) -> Csum {
        match field {
            _ if field == right => Csum::Right,
            0 => Csum::Zero,
            _ => Csum::Wrong,
        }
    }
}

/// [`Vxlan`] over IPv6.
pub type Vxlan6 = Vxlan<Ipv6Addr>;
/// [`Inner`] with an IPv6 packet.
pub type Inner6 = Inner<Ipv6Addr>;

/// A VXLAN packet on the wire: Ethernet, IP, UDP, VXLAN and an inner frame of any content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vxlan<A: Address = Ipv4Addr> {
    pub dst_mac: [u8; 6],
    pub src_mac: [u8; 6],
    pub ip: A::Header,
    pub src_port: u16,
    pub dst_port: u16,
    pub udp_csum: Csum,
    /// Length field of the UDP header; `None` is the right one.
    pub udp_len: Option<u16>,
    pub flags: u8,
    /// Bytes 1 to 3 of the VXLAN header (group policy lives there).
    pub reserved1: [u8; 3],
    /// 24 bits.
    pub vni: u32,
    /// Byte 7 of the VXLAN header.
    pub reserved2: u8,
    /// The inner Ethernet frame.
    pub inner: Vec<u8>,
}

impl Vxlan {
    /// Takes a frame over IPv4 apart; see [`Vxlan::read`].
    pub fn parse(frame: &[u8]) -> anyhow::Result<Vxlan> {
        Vxlan::read(frame)
    }
}

impl<A: Address> Vxlan<A> {
    /// What a flannel node at `src` sends to one at `dst`, both on one link. The MACs are the caller's to set.
    pub fn new(src: A, dst: A, vni: u32, inner: Vec<u8>) -> Vxlan<A> {
        Vxlan {
            dst_mac: [0; 6],
            src_mac: [0; 6],
            ip: A::Header::usual(src, dst),
            src_port: 49_152,
            dst_port: PORT,
            udp_csum: Csum::Right,
            udp_len: None,
            flags: FLAG_VNI,
            reserved1: [0; 3],
            vni,
            reserved2: 0,
            inner,
        }
    }

    /// The frame.
    pub fn bytes(&self) -> Vec<u8> {
        let mut vxlan = vec![self.flags];
        vxlan.extend(self.reserved1);
        vxlan.extend(((self.vni << 8) | u32::from(self.reserved2)).to_be_bytes());
        vxlan.extend(&self.inner);
        let udp = udp(
            &self.ip,
            [self.src_port, self.dst_port],
            self.udp_csum,
            self.udp_len,
            &vxlan,
        );
        let mut frame = ethernet(self.dst_mac, self.src_mac, A::Header::ETHERTYPE);
        frame.extend(self.ip.packet(PROTOCOL_UDP, &udp));
        frame
    }

    /// The first `len` bytes of the frame, its length fields unchanged.
    pub fn truncated(&self, len: usize) -> Vec<u8> {
        let mut frame = self.bytes();
        frame.truncate(len);
        frame
    }

    /// The frame as IP fragments for a link of `mtu` bytes. One fragment if it fits.
    pub fn fragments(&self, mtu: usize) -> anyhow::Result<Vec<Vec<u8>>> {
        fragment_of::<A>(&self.bytes(), mtu)
    }

    /// Takes a frame apart down to the VXLAN header. Fails on anything that is not a whole UDP packet of at least a VXLAN
    /// header; does not look at the port.
    pub fn read(frame: &[u8]) -> anyhow::Result<Vxlan<A>> {
        let (dst_mac, src_mac, ethertype, rest) = split_ethernet(frame)?;
        let (ip, protocol, payload) = split_ip::<A>(ethertype, rest).context("outer IP")?;
        ensure!(protocol == PROTOCOL_UDP, "IP protocol {protocol}, not UDP");
        ensure!(!ip.is_piece(), "a fragment");
        let (ports, udp_csum, udp_len, data) = split_udp(&ip, payload)?;
        ensure!(data.len() >= VXLAN, "{} bytes, no VXLAN header", data.len());
        let vni = u32::from_be_bytes([0, data[4], data[5], data[6]]);
        Ok(Vxlan {
            dst_mac,
            src_mac,
            ip,
            src_port: ports[0],
            dst_port: ports[1],
            udp_csum,
            udp_len,
            flags: data[0],
            reserved1: [data[1], data[2], data[3]],
            vni,
            reserved2: data[7],
            inner: data[VXLAN..].to_vec(),
        })
    }

    /// The inner frame, taken apart.
    pub fn parse_inner(&self) -> anyhow::Result<Inner<A>> {
        Inner::read(&self.inner).context("inner frame")
    }
}

/// Cuts an Ethernet frame with an IPv4 packet into fragments for a link of `mtu` bytes.
pub fn fragment(frame: &[u8], mtu: usize) -> anyhow::Result<Vec<Vec<u8>>> {
    fragment_of::<Ipv4Addr>(frame, mtu)
}

/// Cuts an Ethernet frame with a packet of the addresses' family into fragments for a link of `mtu` bytes; one if it fits.
pub fn fragment_of<A: Address>(frame: &[u8], mtu: usize) -> anyhow::Result<Vec<Vec<u8>>> {
    let (dst_mac, src_mac, ethertype, rest) = split_ethernet(frame)?;
    let (ip, protocol, payload) = split_ip::<A>(ethertype, rest)?;
    let step = mtu.saturating_sub(ip.piece_header()) / 8 * 8;
    ensure!(step > 0, "an MTU of {mtu} leaves no room");
    if frame.len() - ETHERNET <= mtu {
        return Ok(vec![frame.to_vec()]);
    }
    let mut all = Vec::new();
    for (index, piece) in payload.chunks(step).enumerate() {
        let last = (index + 1) * step >= payload.len();
        let part = ip.piece(u16::try_from(index * step)?, !last);
        let mut out = ethernet(dst_mac, src_mac, ethertype);
        out.extend(part.packet(protocol, piece));
        all.push(out);
    }
    Ok(all)
}

/// Header, protocol and payload of a packet of the addresses' family.
fn split_ip<A: Address>(ethertype: u16, packet: &[u8]) -> anyhow::Result<(A::Header, u8, &[u8])> {
    let wanted = A::Header::ETHERTYPE;
    ensure!(
        ethertype == wanted,
        "EtherType {ethertype:#06x}, not {wanted:#06x}"
    );
    A::Header::read(packet)
}

/// The Internet checksum (RFC 1071) of `bytes`, added to the unfolded sum `start`.
pub fn checksum(bytes: &[u8], start: u32) -> u16 {
    let mut sum = start;
    for pair in bytes.chunks(2) {
        let low = pair.get(1).copied().unwrap_or(0);
        sum += u32::from(u16::from_be_bytes([pair[0], low]));
        sum = (sum & 0xffff) + (sum >> 16);
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or(0)
}

/// An Ethernet header.
pub fn ethernet(dst: [u8; 6], src: [u8; 6], ethertype: u16) -> Vec<u8> {
    let mut header = Vec::with_capacity(ETHERNET);
    header.extend(dst);
    header.extend(src);
    header.extend(ethertype.to_be_bytes());
    header
}

type Ethernet<'a> = ([u8; 6], [u8; 6], u16, &'a [u8]);

/// Destination, source, EtherType and the rest of an untagged frame.
fn split_ethernet(frame: &[u8]) -> anyhow::Result<Ethernet<'_>> {
    let (header, rest) = frame
        .split_at_checked(ETHERNET)
        .with_context(|| format!("{} bytes, no Ethernet header", frame.len()))?;
    let (dst, src) = header.split_at(6);
    let ethertype = u16::from_be_bytes([header[12], header[13]]);
    Ok((dst.try_into()?, src[..6].try_into()?, ethertype, rest))
}

/// A UDP datagram; the checksum covers the pseudo-header that follows from `ip`.
fn udp(ip: &impl Header, ports: [u16; 2], csum: Csum, len: Option<u16>, data: &[u8]) -> Vec<u8> {
    let real_len = u16::try_from(UDP + data.len()).unwrap_or(u16::MAX);
    let mut out = Vec::with_capacity(UDP + data.len());
    out.extend(ports[0].to_be_bytes());
    out.extend(ports[1].to_be_bytes());
    out.extend(len.unwrap_or(real_len).to_be_bytes());
    out.extend([0, 0]);
    out.extend(data);
    let right = udp_checksum(ip, &out);
    out[6..8].copy_from_slice(&csum.field(right).to_be_bytes());
    out
}

type Udp<'a> = ([u16; 2], Csum, Option<u16>, &'a [u8]);

/// Ports, state of the checksum, length if it is not the right one, data.
fn split_udp<'a>(ip: &impl Header, datagram: &'a [u8]) -> anyhow::Result<Udp<'a>> {
    ensure!(
        datagram.len() >= UDP,
        "{} bytes, no UDP header",
        datagram.len()
    );
    let word = |at: usize| u16::from_be_bytes([datagram[at], datagram[at + 1]]);
    let mut zeroed = datagram.to_vec();
    zeroed[6..8].fill(0);
    let csum = Csum::of(word(6), udp_checksum(ip, &zeroed));
    let len = Some(word(4)).filter(|len| usize::from(*len) != datagram.len());
    Ok(([word(0), word(2)], csum, len, &datagram[UDP..]))
}

/// The checksum of a datagram whose checksum field is zero; never 0, which would mean "none".
fn udp_checksum(ip: &impl Header, datagram: &[u8]) -> u16 {
    match checksum(datagram, ip.pseudo_sum(PROTOCOL_UDP, datagram.len())) {
        0 => 0xffff,
        sum => sum,
    }
}

#[cfg(test)]
mod tests;
