//! `flannel.<vni>` egress: the inner frame gets the peer's prebuilt outer header.

use aya_ebpf::{
    bindings::bpf_adj_room_mode::BPF_ADJ_ROOM_MAC,
    helpers::{bpf_get_hash_recalc, bpf_get_prandom_u32, bpf_skb_store_bytes},
    programs::TcContext,
};
use flannel_common::{
    Config, DropReason, HEADER_LEN, OVERHEAD_V4, config_flags, ecn,
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
    access::{header as read, linear},
    maps,
};

/// The stack copy of a header, aligned so that it moves in 64-bit words.
#[repr(C, align(8))]
struct Scratch([u8; HEADER_LEN]);

const ETH_LEN: u32 = EthHdr::LEN as u32;
const PROTO_TCP: u8 = 6;
const PROTO_UDP: u8 = 17;
/// Offset of the byte of a TCP header whose upper half is the header's length in words.
const TCP_OFFSET: usize = 12;

#[inline(always)]
pub(crate) fn try_to_overlay(ctx: &TcContext, config: &Config) -> Result<Verdict, DropReason> {
    if config.flags & config_flags::ENCAP == 0 {
        return Err(DropReason::Disabled);
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
    let mut out = Scratch(node.header);
    // The kernel device forwards by inner MAC (its FDB), we by subnet: only where both say the same peer is it ours.
    if !macs_equal(&eth, &out.0) {
        return Err(DropReason::ForeignMac);
    }
    let known_hop = node.flags & node_flags::NEXT_HOP != 0;
    if !known_hop && config.flags & config_flags::ALONE == 0 {
        return Err(DropReason::NoNextHop);
    }

    let skb = ctx.skb.skb;
    let bytes = ctx.len();
    let inner_len = bytes - ETH_LEN;
    // SAFETY: reads of context fields, which the verifier turns into checked loads.
    let gso_size = unsafe { (*skb).gso_size };
    let narrow = node.path_mtu < config.tunnel_mtu + OVERHEAD_V4;
    if gso_size == 0 {
        if inner_len + OVERHEAD_V4 > node.path_mtu {
            return Err(DropReason::OverPathMtu);
        }
    } else if narrow
        && segment_len(ctx, &inner, gso_size).is_none_or(|len| len + OVERHEAD_V4 > node.path_mtu)
    {
        // The segments fit the tunnel's MTU, not the narrower path.
        return Err(DropReason::OverPathMtu);
    }
    if inner_len + OVERHEAD_V4 > 0xffff {
        return Err(DropReason::TooLong);
    }

    // SAFETY: helper calls on the context. The hash is taken before the headers move, as the vxlan device does.
    let (hash, id) = unsafe { (bpf_get_hash_recalc(skb), bpf_get_prandom_u32() as u16) };
    let port = header::source_port(hash, config.source_port_min, config.source_port_span);
    header::complete(
        &mut out.0,
        node.ip_sum,
        inner_len,
        ecn::outer_for(inner.tos),
        id,
        port,
    );
    let ifindex = node.ifindex;

    // On failure the packet is as it was.
    ctx.adjust_room(
        OVERHEAD_V4 as i32,
        BPF_ADJ_ROOM_MAC,
        room_flags(config.encap_flags),
    )
    .map_err(|_| DropReason::AdjustRoom)?;
    // SAFETY: the source is a stack buffer of exactly the length given.
    let stored =
        unsafe { bpf_skb_store_bytes(skb, 0, out.0.as_ptr().cast(), HEADER_LEN as u32, 0) };
    if stored != 0 {
        return Err(DropReason::Store);
    }
    let kind = if known_hop { Kind::Send } else { Kind::Resolve };
    Ok(Verdict {
        kind,
        ifindex,
        bytes,
    })
}

/// Length of the IP packets that a super-packet will be cut into (`skb_gso_network_seglen`); `None` if nobody here can tell.
#[inline(always)]
fn segment_len(ctx: &TcContext, inner: &Ipv4Hdr, gso_size: u32) -> Option<u32> {
    let ip_len = u32::from(inner.vihl & 0x0f) * 4;
    let transport_len = match inner.proto {
        PROTO_TCP => {
            let offset: u8 = ctx.load((ETH_LEN + ip_len) as usize + TCP_OFFSET).ok()?;
            u32::from(offset >> 4) * 4
        }
        PROTO_UDP => UdpHdr::LEN as u32,
        _ => return None,
    };
    Some(ip_len + transport_len + gso_size)
}

#[inline(always)]
fn macs_equal(eth: &EthHdr, out: &[u8; HEADER_LEN]) -> bool {
    let mut differ = 0;
    let mut at = 0;
    while at < 6 {
        differ |= eth.dst_addr[at] ^ out[INNER_ETH + at];
        differ |= eth.src_addr[at] ^ out[INNER_ETH + 6 + at];
        at += 1;
    }
    differ == 0
}
