//! Addresses and ports of an inner packet, where the flow gate can follow it.

use aya_ebpf::programs::TcContext;
use flannel_common::flow::{FlowKey, PROTO_ICMP, PROTO_TCP, PROTO_UDP, Packet, Way};
use network_types::ip::Ipv4Hdr;

use crate::access::{header as read, linear};

const IP_LEN: usize = Ipv4Hdr::LEN;
const ICMP_ECHO_REPLY: u8 = 0;
const ICMP_UNREACHABLE: u8 = 3;
const ICMP_ECHO: u8 = 8;
const ICMP_TIME_EXCEEDED: u8 = 11;
const ICMP_PARAMETER: u8 = 12;
const ICMP_LEN: usize = 8;
/// The part of a TCP header up to its flags.
const TCP_PART: usize = 14;
/// Anything in the field but the DF bit.
const FRAGMENT: u16 = 0x3fff;

/// A whole IPv4 packet without options that carries TCP, UDP or ICMP echo.
#[derive(Clone, Copy)]
pub(crate) struct Inner {
    pub(crate) ip: Ipv4Hdr,
    /// For ICMP echo the identifier, here and in `dst_port`.
    pub(crate) src_port: [u8; 2],
    pub(crate) dst_port: [u8; 2],
    /// TCP flags, else zero.
    flags: u8,
}

impl Inner {
    /// The flow as the pod at the source sees it ([`Way::Out`]) or the one at the destination ([`Way::In`]).
    #[inline(always)]
    pub(crate) const fn key(&self, way: Way) -> FlowKey {
        let (local, remote, local_port, remote_port) = match way {
            Way::Out => (
                self.ip.src_addr,
                self.ip.dst_addr,
                self.src_port,
                self.dst_port,
            ),
            Way::In => (
                self.ip.dst_addr,
                self.ip.src_addr,
                self.dst_port,
                self.src_port,
            ),
        };
        FlowKey {
            local,
            remote,
            local_port,
            remote_port,
            proto: self.ip.proto,
            reserved: [0; 3],
        }
    }

    /// The way between two pods of this node, of which the one with the lower address counts as the local end.
    #[inline(always)]
    pub(crate) const fn local_way(&self) -> Way {
        if u32::from_be_bytes(self.ip.src_addr) < u32::from_be_bytes(self.ip.dst_addr) {
            Way::Out
        } else {
            Way::In
        }
    }

    #[inline(always)]
    pub(crate) const fn packet(&self, way: Way) -> Packet {
        Packet {
            way,
            tcp: self.ip.proto == PROTO_TCP,
            flags: self.flags,
        }
    }
}

/// Reads the IPv4 packet at `at`. `None`: fragments, options, other protocols, anything malformed; the gate knows nothing of them.
#[inline(always)]
pub(crate) fn inner(ctx: &TcContext, at: usize) -> Option<Inner> {
    if !linear(ctx, (at + IP_LEN + ICMP_LEN) as u32) {
        return None;
    }
    let ip: Ipv4Hdr = read(ctx, at)?;
    if ip.vihl != 0x45
        || u16::from_be_bytes(ip.frags) & FRAGMENT != 0
        || u32::from(u16::from_be_bytes(ip.tot_len)) + at as u32 != ctx.len()
    {
        return None;
    }
    let next = at + IP_LEN;
    let (src_port, dst_port, flags) = match ip.proto {
        PROTO_TCP => {
            if !linear(ctx, (next + TCP_PART) as u32) {
                return None;
            }
            let tcp: [u8; TCP_PART] = read(ctx, next)?;
            ([tcp[0], tcp[1]], [tcp[2], tcp[3]], tcp[13])
        }
        PROTO_UDP => {
            let udp: [u8; 4] = read(ctx, next)?;
            ([udp[0], udp[1]], [udp[2], udp[3]], 0)
        }
        PROTO_ICMP => {
            let icmp: [u8; ICMP_LEN] = read(ctx, next)?;
            if (icmp[0] != ICMP_ECHO && icmp[0] != ICMP_ECHO_REPLY) || icmp[1] != 0 {
                return None;
            }
            let id = [icmp[4], icmp[5]];
            (id, id, 0)
        }
        _ => return None,
    };
    Some(Inner {
        ip,
        src_port,
        dst_port,
        flags,
    })
}

/// An ICMP error about a TCP packet: the error's IP header, and the quoted packet, which its receiver had sent.
#[derive(Clone, Copy)]
pub(crate) struct IcmpError {
    pub(crate) ip: Ipv4Hdr,
    pub(crate) quoted: Inner,
}

/// Reads an ICMP error at `at` that quotes a TCP packet.
#[inline(always)]
pub(crate) fn icmp_error(ctx: &TcContext, at: usize) -> Option<IcmpError> {
    let needed = at + IP_LEN + ICMP_LEN + IP_LEN + 4;
    if !linear(ctx, needed as u32) {
        return None;
    }
    let ip: Ipv4Hdr = read(ctx, at)?;
    let icmp: [u8; 2] = read(ctx, at + IP_LEN)?;
    if ip.vihl != 0x45
        || ip.proto != PROTO_ICMP
        || u16::from_be_bytes(ip.frags) & FRAGMENT != 0
        || u32::from(u16::from_be_bytes(ip.tot_len)) + at as u32 != ctx.len()
        || ![ICMP_UNREACHABLE, ICMP_TIME_EXCEEDED, ICMP_PARAMETER].contains(&icmp[0])
    {
        return None;
    }
    let quoted: Ipv4Hdr = read(ctx, at + IP_LEN + ICMP_LEN)?;
    let ports: [u8; 4] = read(ctx, at + IP_LEN + ICMP_LEN + IP_LEN)?;
    if quoted.vihl != 0x45
        || quoted.proto != PROTO_TCP
        || u16::from_be_bytes(quoted.frags) & FRAGMENT != 0
    {
        return None;
    }
    Some(IcmpError {
        ip,
        quoted: Inner {
            ip: quoted,
            src_port: [ports[0], ports[1]],
            dst_port: [ports[2], ports[3]],
            flags: 0,
        },
    })
}
