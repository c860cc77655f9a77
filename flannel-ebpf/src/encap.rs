//! Encapsulation: the inner frame gets the peer's prebuilt outer header; and the hook at the egress of `flannel.<vni>`.

use aya_ebpf::{
    bindings::bpf_adj_room_mode::BPF_ADJ_ROOM_MAC,
    helpers::{bpf_get_hash_recalc, bpf_skb_store_bytes},
    programs::TcContext,
};
use flannel_common::{
    CounterId, DropReason, config_flags,
    flow::{PROTO_TCP, PROTO_UDP, Way, mode},
    header,
    map::room_flags,
    node_flags,
};
use network_types::{eth::EthHdr, udp::UdpHdr};

use crate::{
    Kind, Verdict,
    access::{copy, header as read, linear, load, mac_bits},
    family::{
        self, Config, ETHER_TYPE, GSO_BY_DEVICE, HEADER_LEN, INNER_ETH, IP_LEN, IP_PART, IpHdr,
        NOT_THIS_FAMILY, NodeRecord, OVERHEAD, destination, header_len, protocol, source,
        subnet_index, tos,
    },
    gate::{self, Case},
    maps, tuple,
};

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
    let alone = config.flags & config_flags::ALONE != 0;
    // What a pod sent and the device is to encapsulate: judged before, and not the stack's.
    let judged = GSO_BY_DEVICE && gate::was_judged(ctx);
    if judged && !alone {
        gate::clear_index(ctx);
        return Ok(Verdict::NOT_OURS);
    }
    // The far end of the pair: what the near end has left to the kernel comes in, cut up and with every checksum filled in.
    let at_far_end = GSO_BY_DEVICE && alone && is_at_far_end(ctx, config);
    if !linear(ctx, ETH_LEN + IP_LEN as u32) {
        return Err(DropReason::TooShort);
    }
    let eth: EthHdr = read(ctx, 0).ok_or(DropReason::TooShort)?;
    if eth.ether_type != u16::from(ETHER_TYPE) {
        return Err(NOT_THIS_FAMILY);
    }
    let inner: IpHdr = read(ctx, EthHdr::LEN).ok_or(DropReason::TooShort)?;

    let subnet = subnet_index(config, destination(&inner)).ok_or(DropReason::NoPeer)?;
    let node = maps::node_of(subnet).ok_or(DropReason::NoPeer)?;
    if node.flags & node_flags::VALID == 0 {
        return Err(DropReason::NoPeer);
    }
    if config.mode != mode::OFF && !judged && !at_far_end {
        witness(ctx, config, &inner);
    }
    // The kernel device forwards by inner MAC (its FDB), we by subnet: only where both say the same peer is it ours.
    if !macs_equal(&eth, &node.header) {
        return Err(DropReason::ForeignMac);
    }
    let known_hop = node.flags & node_flags::NEXT_HOP != 0;
    if !known_hop && !alone {
        return Err(DropReason::NoNextHop);
    }
    let bytes = ctx.len();
    let ifindex = node.ifindex;
    let pushed = fits(ctx, &inner, node.path_mtu, config.tunnel_mtu)
        .and_then(|()| push(ctx, config, node, &inner, false, at_far_end));
    match pushed {
        Ok(()) => {}
        // Of the three the last is a super-packet, too: nothing else is that long.
        Err(DropReason::Gso | DropReason::Protocol | DropReason::TooLong)
            if GSO_BY_DEVICE && alone && !at_far_end =>
        {
            return Ok(leave_to_far_end(ctx, judged));
        }
        Err(reason) => return Err(reason),
    }
    let kind = if known_hop { Kind::Send } else { Kind::Resolve };
    Ok(Verdict {
        kind,
        ifindex,
        // What comes in at the far end was counted before.
        bytes: if at_far_end { 0 } else { bytes },
    })
}

/// Whether the packet comes in through the interface, rather than goes out. One that came in through the near end and goes out there again
/// looks alike, but for the interface.
#[inline(always)]
fn is_at_far_end(ctx: &TcContext, config: &Config) -> bool {
    let skb = ctx.skb.skb;
    // SAFETY: reads of context fields, which the verifier turns into checked loads.
    let (from, at) = unsafe { ((*skb).ingress_ifindex, (*skb).ifindex) };
    from == at && at != config.tunnel_ifindex
}

/// Lets the packet go through the pair: the kernel cuts it up and fills its checksums in, and [`try_to_overlay`] has it again.
#[inline(always)]
fn leave_to_far_end(ctx: &TcContext, counted: bool) -> Verdict {
    if !counted {
        maps::count(CounterId::BpfEncap, ctx.len());
    }
    gate::clear_index(ctx);
    Verdict::NOT_OURS
}

/// What leaves the stack towards a peer, and came from a pod, says whether the stack has touched it.
#[inline(always)]
fn witness(ctx: &TcContext, config: &Config, ip: &IpHdr) {
    if subnet_index(config, source(ip)) != Some(config.own_index) {
        return;
    }
    let Some(inner) = tuple::inner(ctx, EthHdr::LEN) else {
        return;
    };
    let Some(pod) = maps::pod(source(&inner.ip)) else {
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
    inner: &IpHdr,
    path_mtu: u32,
    mtu: u32,
) -> Result<(), DropReason> {
    let inner_len = ctx.len() - ETH_LEN;
    // SAFETY: a read of a context field, which the verifier turns into a checked load.
    let gso_size = unsafe { (*ctx.skb.skb).gso_size };
    if gso_size == 0 {
        if inner_len + OVERHEAD > path_mtu {
            return Err(DropReason::OverPathMtu);
        }
    } else if path_mtu < mtu + OVERHEAD
        && segment_len(ctx, inner, gso_size, ETH_LEN).is_none_or(|len| len + OVERHEAD > path_mtu)
    {
        // The segments fit the tunnel's MTU, not the narrower path.
        return Err(DropReason::OverPathMtu);
    }
    if inner_len + OVERHEAD > 0xffff {
        return Err(DropReason::TooLong);
    }
    Ok(())
}

/// Puts the peer's header in front of the inner packet. With `hop` the inner hop limit goes down by one, as a router's does; with `whole`
/// every byte of it is as it will be sent, and may be read for the outer checksum.
///
/// With any error but [`DropReason::Torn`] the packet is as it was.
#[inline(always)]
pub(crate) fn push(
    ctx: &TcContext,
    config: &Config,
    node: &NodeRecord,
    inner: &IpHdr,
    hop: bool,
    whole: bool,
) -> Result<(), DropReason> {
    let sum = family::inner_sum(ctx, inner, hop, whole)?;
    let skb = ctx.skb.skb;
    let inner_len = ctx.len() - ETH_LEN;
    let mut out = Scratch {
        header: copy(&node.header),
        inner: [0; IP_PART],
    };
    // SAFETY: a helper call on the context. The hash is taken before the headers move, as the vxlan device does.
    let hash = unsafe { bpf_get_hash_recalc(skb) };
    let port = header::source_port(hash, config.source_port_min, config.source_port_span);
    family::complete(&mut out.header, node, inner, sum, inner_len, port);
    let len = if hop {
        out.inner = family::next_hop(inner, tos(inner));
        HEADER_LEN + IP_PART
    } else {
        HEADER_LEN
    };
    ctx.adjust_room(
        OVERHEAD as i32,
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
        -(OVERHEAD as i32),
        BPF_ADJ_ROOM_MAC,
        room_flags(config.decap_flags),
    ) {
        Ok(()) => DropReason::Store,
        Err(_) => DropReason::Torn,
    }
}

/// Length of the IP packets that a super-packet, whose IP header is at `at`, will be cut into (`skb_gso_network_seglen`); `None`
/// if nobody here can tell.
#[inline(always)]
pub(crate) fn segment_len(ctx: &TcContext, inner: &IpHdr, gso_size: u32, at: u32) -> Option<u32> {
    let ip_len = header_len(inner);
    let transport_len = match protocol(inner) {
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
