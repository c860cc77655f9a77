//! Encapsulation: the inner frame gets the peer's prebuilt outer header; and the hook at the egress of `flannel.<vni>`.

use aya_ebpf::{
    bindings::bpf_adj_room_mode::BPF_ADJ_ROOM_MAC,
    helpers::{bpf_get_hash_recalc, bpf_get_prandom_u32, bpf_skb_store_bytes},
    programs::TcContext,
};
use flannel_common::{
    Config, DropReason, HEADER_LEN, NodeRecord, OVERHEAD_V4, checksum, config_flags, ecn,
    flow::{PROTO_TCP, PROTO_UDP, Way, mode},
    header::{self, INNER_ETH},
    map::{room_flags, subnet_index},
    node_flags,
};
use network_types::{
    eth::{EthHdr, EtherType},
    ip::Ipv4Hdr,
    udp::UdpHdr,
};

use crate::{
    Kind, Verdict,
    access::{copy, header as read, linear, load, mac_bits},
    gate::{self, Case},
    maps, tuple,
};

/// The part of an IPv4 header that a router changes: up to its checksum.
pub(crate) const IP_PART: usize = 12;

/// The stack copy of a header, aligned so that it moves in words.
#[repr(C, align(8))]
struct Scratch {
    header: [u8; HEADER_LEN],
    inner: [u8; IP_PART],
}

const ETH_LEN: u32 = EthHdr::LEN as u32;
/// Offset of the byte of a TCP header whose upper half is the header's length in words.
const TCP_OFFSET: usize = 12;

#[inline(always)]
pub(crate) fn try_to_overlay(ctx: &TcContext, config: &Config) -> Result<Verdict, DropReason> {
    if config.flags & config_flags::ENCAP == 0 {
        return Err(DropReason::Disabled);
    }
    if !maps::are_kept(gate::clock()) {
        return Err(DropReason::Stale);
    }
    if !linear(ctx, ETH_LEN + Ipv4Hdr::LEN as u32) {
        return Err(DropReason::TooShort);
    }
    let eth: EthHdr = read(ctx, 0).ok_or(DropReason::TooShort)?;
    if eth.ether_type != u16::from(EtherType::Ipv4) {
        return Err(DropReason::NotIpv4);
    }
    let inner: Ipv4Hdr = read(ctx, EthHdr::LEN).ok_or(DropReason::TooShort)?;

    let subnet = subnet_index(config, inner.dst_addr).ok_or(DropReason::NoPeer)?;
    let node = maps::node_of(subnet).ok_or(DropReason::NoPeer)?;
    if node.flags & node_flags::VALID == 0 {
        return Err(DropReason::NoPeer);
    }
    if config.mode != mode::OFF {
        witness(ctx, config, &inner);
    }
    // The kernel device forwards by inner MAC (its FDB), we by subnet: only where both say the same peer is it ours.
    if !macs_equal(&eth, &node.header) {
        return Err(DropReason::ForeignMac);
    }
    let known_hop = node.flags & node_flags::NEXT_HOP != 0;
    if !known_hop && config.flags & config_flags::ALONE == 0 {
        return Err(DropReason::NoNextHop);
    }
    fits(ctx, &inner, node.path_mtu, config.tunnel_mtu)?;
    let bytes = ctx.len();
    let ifindex = node.ifindex;
    push(ctx, config, node, &inner, false)?;
    let kind = if known_hop { Kind::Send } else { Kind::Resolve };
    Ok(Verdict {
        kind,
        ifindex,
        bytes,
    })
}

/// What leaves the stack towards a peer, and came from a pod, says whether the stack has touched it.
#[inline(always)]
fn witness(ctx: &TcContext, config: &Config, ip: &Ipv4Hdr) {
    if subnet_index(config, ip.src_addr) != Some(config.own_index) {
        return;
    }
    let Some(inner) = tuple::inner(ctx, EthHdr::LEN) else {
        return;
    };
    let Some(pod) = maps::pod(inner.ip.src_addr) else {
        return;
    };
    let case = Case {
        key: inner.key(Way::Out),
        packet: inner.packet(Way::Out),
        generation: pod.generation,
    };
    gate::witness(ctx, config, &case);
}

/// Whether the path carries the packet as it is: inner packets up to `mtu` bytes, outer packets up to `path_mtu`.
#[inline(always)]
pub(crate) fn fits(
    ctx: &TcContext,
    inner: &Ipv4Hdr,
    path_mtu: u32,
    mtu: u32,
) -> Result<(), DropReason> {
    let inner_len = ctx.len() - ETH_LEN;
    // SAFETY: a read of a context field, which the verifier turns into a checked load.
    let gso_size = unsafe { (*ctx.skb.skb).gso_size };
    if gso_size == 0 {
        if inner_len + OVERHEAD_V4 > path_mtu {
            return Err(DropReason::OverPathMtu);
        }
    } else if path_mtu < mtu + OVERHEAD_V4
        && segment_len(ctx, inner, gso_size, ETH_LEN).is_none_or(|len| len + OVERHEAD_V4 > path_mtu)
    {
        // The segments fit the tunnel's MTU, not the narrower path.
        return Err(DropReason::OverPathMtu);
    }
    if inner_len + OVERHEAD_V4 > 0xffff {
        return Err(DropReason::TooLong);
    }
    Ok(())
}

/// Puts the peer's header in front of the inner packet. With `hop` the inner hop limit goes down by one, as a router's does.
///
/// With any error but [`DropReason::Torn`] the packet is as it was.
#[inline(always)]
pub(crate) fn push(
    ctx: &TcContext,
    config: &Config,
    node: &NodeRecord,
    inner: &Ipv4Hdr,
    hop: bool,
) -> Result<(), DropReason> {
    let skb = ctx.skb.skb;
    let inner_len = ctx.len() - ETH_LEN;
    let mut out = Scratch {
        header: copy(&node.header),
        inner: [0; IP_PART],
    };
    // SAFETY: helper calls on the context. The hash is taken before the headers move, as the vxlan device does.
    let (hash, id) = unsafe { (bpf_get_hash_recalc(skb), bpf_get_prandom_u32() as u16) };
    let port = header::source_port(hash, config.source_port_min, config.source_port_span);
    header::complete(
        &mut out.header,
        node.ip_sum,
        inner_len,
        ecn::outer_for(inner.tos),
        id,
        port,
    );
    let len = if hop {
        out.inner = next_hop(inner, inner.tos);
        HEADER_LEN + IP_PART
    } else {
        HEADER_LEN
    };
    ctx.adjust_room(
        OVERHEAD_V4 as i32,
        BPF_ADJ_ROOM_MAC,
        room_flags(config.encap_flags),
    )
    .map_err(|_| DropReason::AdjustRoom)?;
    // SAFETY: the source is a stack buffer of at least the length given.
    let stored = unsafe { bpf_skb_store_bytes(skb, 0, (&raw const out).cast(), len as u32, 0) };
    if stored == 0 {
        Ok(())
    } else {
        Err(take_back(ctx, config))
    }
}

/// Takes the room away again that was made. What the kernel has noted of a tunnel stays, and is true again once its device has the packet.
#[inline(always)]
fn take_back(ctx: &TcContext, config: &Config) -> DropReason {
    match ctx.adjust_room(
        -(OVERHEAD_V4 as i32),
        BPF_ADJ_ROOM_MAC,
        room_flags(config.decap_flags),
    ) {
        Ok(()) => DropReason::Store,
        Err(_) => DropReason::Torn,
    }
}

/// The first [`IP_PART`] bytes of an IPv4 header after one more hop, with this type of service.
#[inline(always)]
pub(crate) fn next_hop(ip: &Ipv4Hdr, tos: u8) -> [u8; IP_PART] {
    let ttl = ip.ttl.wrapping_sub(1);
    let check = checksum::replace(
        u16::from_be_bytes(ip.check),
        u16::from_be_bytes([ip.ttl, ip.proto]),
        u16::from_be_bytes([ttl, ip.proto]),
    );
    let mut part = with_tos(
        &Ipv4Hdr {
            check: check.to_be_bytes(),
            ..*ip
        },
        tos,
    );
    part[8] = ttl;
    part
}

/// The first [`IP_PART`] bytes of an IPv4 header with this type of service.
#[inline(always)]
pub(crate) fn with_tos(ip: &Ipv4Hdr, tos: u8) -> [u8; IP_PART] {
    let check = if tos == ip.tos {
        ip.check
    } else {
        checksum::replace(
            u16::from_be_bytes(ip.check),
            u16::from_be_bytes([ip.vihl, ip.tos]),
            u16::from_be_bytes([ip.vihl, tos]),
        )
        .to_be_bytes()
    };
    [
        ip.vihl,
        tos,
        ip.tot_len[0],
        ip.tot_len[1],
        ip.id[0],
        ip.id[1],
        ip.frags[0],
        ip.frags[1],
        ip.ttl,
        ip.proto,
        check[0],
        check[1],
    ]
}

/// Length of the IP packets that a super-packet, whose IPv4 header is at `at`, will be cut into (`skb_gso_network_seglen`); `None`
/// if nobody here can tell.
#[inline(always)]
pub(crate) fn segment_len(ctx: &TcContext, inner: &Ipv4Hdr, gso_size: u32, at: u32) -> Option<u32> {
    let ip_len = u32::from(inner.vihl & 0x0f) * 4;
    let transport_len = match inner.proto {
        PROTO_TCP => {
            let offset: u8 = ctx.load((at + ip_len) as usize + TCP_OFFSET).ok()?;
            u32::from(offset >> 4) * 4
        }
        PROTO_UDP => UdpHdr::LEN as u32,
        _ => return None,
    };
    Some(ip_len + transport_len + gso_size)
}

#[inline(always)]
fn macs_equal(eth: &EthHdr, out: &[u8; HEADER_LEN]) -> bool {
    // SAFETY: both reads are inside the header.
    let (to, from) = unsafe {
        let inner = out.as_ptr().add(INNER_ETH);
        (load::<[u8; 6]>(inner), load::<[u8; 6]>(inner.add(6)))
    };
    mac_bits(&eth.dst_addr) == mac_bits(&to) && mac_bits(&eth.src_addr) == mac_bits(&from)
}
