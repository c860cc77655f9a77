//! Addresses and ports of an inner packet, where the flow gate can follow it.

use aya_ebpf::programs::TcContext;
use flannel_common::flow::{PROTO_TCP, PROTO_UDP, Packet, Way};

use crate::{
    access::{header as read, linear},
    family::{
        self, ECHO, ERRORS, IP_LEN, IpHdr, PROTO_ICMP, UDP_UNSUMMED, destination, is_whole,
        packet_len, protocol, source,
    },
    maps::FlowKey,
};

const ICMP_LEN: usize = 8;
/// The part of a TCP header up to its flags.
const TCP_PART: usize = 14;

/// A whole packet without options or extensions that carries TCP, UDP or ICMP echo.
#[derive(Clone, Copy)]
pub(crate) struct Inner {
    pub(crate) ip: IpHdr,
    /// For ICMP echo the identifier, here and in `dst_port`.
    pub(crate) src_port: [u8; 2],
    pub(crate) dst_port: [u8; 2],
    /// TCP flags, else zero.
    flags: u8,
}

impl Inner {
    /// The flow as the pod at the source sees it ([`Way::Out`]) or the one at the destination ([`Way::In`]).
    #[inline(always)]
    pub(crate) fn key(&self, way: Way) -> FlowKey {
        let (from, to) = (source(&self.ip), destination(&self.ip));
        let (local, remote, local_port, remote_port) = match way {
            Way::Out => (from, to, self.src_port, self.dst_port),
            Way::In => (to, from, self.dst_port, self.src_port),
        };
        FlowKey {
            local,
            remote,
            local_port,
            remote_port,
            proto: protocol(&self.ip),
            reserved: [0; 3],
        }
    }

    /// The way between two pods of this node, of which the one with the lower address counts as the local end.
    #[inline(always)]
    pub(crate) fn local_way(&self) -> Way {
        if family::is_below(source(&self.ip), destination(&self.ip)) {
            Way::Out
        } else {
            Way::In
        }
    }

    #[inline(always)]
    pub(crate) fn packet(&self, way: Way) -> Packet {
        Packet {
            way,
            tcp: protocol(&self.ip) == PROTO_TCP,
            flags: self.flags,
        }
    }
}

/// Reads the IP packet at `at`. `None`: fragments, options, other protocols, anything malformed; the gate knows nothing of them.
#[inline(always)]
pub(crate) fn inner(ctx: &TcContext, at: usize) -> Option<Inner> {
    if !linear(ctx, (at + IP_LEN + ICMP_LEN) as u32) {
        return None;
    }
    let ip: IpHdr = read(ctx, at)?;
    if !is_whole(&ip) || packet_len(&ip) + at as u32 != ctx.len() {
        return None;
    }
    let next = at + IP_LEN;
    let (src_port, dst_port, flags) = match protocol(&ip) {
        PROTO_TCP => {
            if !linear(ctx, (next + TCP_PART) as u32) {
                return None;
            }
            let tcp: [u8; TCP_PART] = read(ctx, next)?;
            ([tcp[0], tcp[1]], [tcp[2], tcp[3]], tcp[13])
        }
        PROTO_UDP => {
            let udp: [u8; 8] = read(ctx, next)?;
            if !UDP_UNSUMMED && udp[6] == 0 && udp[7] == 0 {
                return None;
            }
            ([udp[0], udp[1]], [udp[2], udp[3]], 0)
        }
        PROTO_ICMP => {
            let icmp: [u8; ICMP_LEN] = read(ctx, next)?;
            if !ECHO.contains(&icmp[0]) || icmp[1] != 0 {
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
    pub(crate) ip: IpHdr,
    pub(crate) quoted: Inner,
}

/// Reads an ICMP error at `at` that quotes a TCP packet.
#[inline(always)]
pub(crate) fn icmp_error(ctx: &TcContext, at: usize) -> Option<IcmpError> {
    let needed = at + IP_LEN + ICMP_LEN + IP_LEN + 4;
    if !linear(ctx, needed as u32) {
        return None;
    }
    let ip: IpHdr = read(ctx, at)?;
    let icmp: [u8; 2] = read(ctx, at + IP_LEN)?;
    if !is_whole(&ip)
        || protocol(&ip) != PROTO_ICMP
        || packet_len(&ip) + at as u32 != ctx.len()
        || !ERRORS.contains(&icmp[0])
    {
        return None;
    }
    let quoted: IpHdr = read(ctx, at + IP_LEN + ICMP_LEN)?;
    let ports: [u8; 4] = read(ctx, at + IP_LEN + ICMP_LEN + IP_LEN)?;
    if !is_whole(&quoted) || protocol(&quoted) != PROTO_TCP {
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
