//! Peers on the same link: packets go there as they are, one hop later, and come from there so.
//!
//! The stack does the same with a route to the peer. Its packets are seen at the egress of the uplink, which is what the flow gate needs.

use aya_ebpf::{helpers::bpf_skb_change_tail, programs::TcContext};
use flannel_common::{
    PodRecord,
    flow::{Way, mode},
    node_flags,
};
use network_types::eth::EthHdr;

use crate::{
    Kind, Verdict,
    access::{header as read, load, mac_bits},
    decap::{land, store},
    encap,
    family::{
        self, Config, IP_PART, IpHdr, NodeRecord, destination, next_hop, packet_len, source,
        subnet_index, tos,
    },
    gate::{self, Case},
    maps, pod, tuple,
};

const ETH_LEN: usize = EthHdr::LEN;
/// The shortest frame on a wire, without its checksum: what is shorter is padded.
const SHORTEST_FRAME: u32 = 60;

/// What a node must be for packets to be routed to it.
const READY: u32 = node_flags::VALID | node_flags::NEXT_HOP | node_flags::ROUTED;

/// The start of a frame as it is sent on.
#[repr(C)]
struct Start {
    eth: [u8; ETH_LEN],
    ip: [u8; IP_PART],
}

/// A pod's packet for a peer on the link, before the stack. `None`: the stack must do it, the packet is as it was.
#[inline(always)]
pub(crate) fn route(
    ctx: &TcContext,
    config: &Config,
    node: &NodeRecord,
    ip: &IpHdr,
    pod: &PodRecord,
    case: Option<&Case>,
) -> Option<Verdict> {
    if !fits(ctx, ip, node.path_mtu, pod.mtu) {
        return None;
    }
    if let Some(case) = case
        && !gate::is_fast(ctx, config, case, node.ifindex)
    {
        return None;
    }
    send(ctx, node, 0, ip, Kind::SendRouted, node.ifindex)
}

/// Whether the path carries the packet; the segments of a super-packet are no larger than the pod's `mtu`.
#[inline(always)]
fn fits(ctx: &TcContext, ip: &IpHdr, path_mtu: u32, mtu: u32) -> bool {
    // SAFETY: a read of a context field, which the verifier turns into a checked load.
    let gso_size = unsafe { (*ctx.skb.skb).gso_size };
    if gso_size == 0 {
        return ctx.len() - ETH_LEN as u32 <= path_mtu;
    }
    path_mtu >= mtu
        || encap::segment_len(ctx, ip, gso_size, ETH_LEN as u32).is_some_and(|len| len <= path_mtu)
}

/// Past the stack to an interface, with the hop limit that the stack would have given the frame, and the Ethernet header at byte `at`
/// of the peer's prebuilt one. `None`: it is as it was.
#[inline(always)]
pub(crate) fn send(
    ctx: &TcContext,
    node: &NodeRecord,
    at: usize,
    ip: &IpHdr,
    kind: Kind,
    ifindex: u32,
) -> Option<Verdict> {
    // SAFETY: both Ethernet headers are inside the prebuilt one.
    let eth = unsafe { load::<[u8; ETH_LEN]>(node.header.as_ptr().add(at)) };
    let start = Start {
        eth,
        ip: next_hop(ip, tos(ip)),
    };
    // SAFETY: plain bytes without padding.
    let start: [u8; size_of::<Start>()] = unsafe { core::mem::transmute(start) };
    store(ctx, 0, &start).ok()?;
    family::account(ctx, ip, &next_hop(ip, tos(ip)));
    // The hook at that interface has nothing to ask it.
    gate::set_judged(ctx);
    Some(Verdict {
        kind,
        ifindex,
        bytes: ctx.len(),
    })
}

/// A packet that leaves through the uplink, behind the stack.
#[inline(always)]
pub(crate) fn try_to_link(ctx: &TcContext, config: &Config) {
    // Of the other family: that one's program comes behind this one, and has its own use for the packet's number.
    let Some(eth) = pod::ethernet(ctx) else {
        return;
    };
    if gate::was_judged(ctx) {
        gate::clear_index(ctx);
        return;
    }
    // Everything that this node sends comes by here: two looks at the header tell most of it apart.
    let Some(ip) = read::<IpHdr>(ctx, ETH_LEN) else {
        return;
    };
    if subnet_index(config, source(&ip)) != Some(config.own_index) {
        return;
    }
    let Some(node) = subnet_index(config, destination(&ip)).and_then(maps::node_of) else {
        return;
    };
    // SAFETY: a read inside the header.
    let hop = unsafe { load::<[u8; 6]>(node.header.as_ptr()) };
    // What the stack sends elsewhere (policy routing) says nothing about what would be sent to the peer.
    if node.flags & READY != READY || mac_bits(&eth.dst_addr) != mac_bits(&hop) {
        return;
    }
    let Some(inner) = tuple::inner(ctx, ETH_LEN) else {
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

/// A packet that the uplink has received, and that is not of the overlay.
#[inline(always)]
pub(crate) fn try_from_link(ctx: &TcContext, config: &Config) -> Verdict {
    let (Some(_), Some(ip)) = (pod::ethernet(ctx), read::<IpHdr>(ctx, ETH_LEN)) else {
        return Verdict::NOT_OURS;
    };
    if subnet_index(config, destination(&ip)) != Some(config.own_index) {
        return Verdict::NOT_OURS;
    }
    unpad(ctx, &ip);
    let Some((_, inner)) = pod::plain(ctx) else {
        gate::untag(ctx);
        return if config.mode == mode::SYN {
            routed(pod::error_to_pod(ctx, config))
        } else {
            Verdict::NOT_OURS
        };
    };
    let Some((pod, case)) = pod::inbound(config, &inner) else {
        return pod::slow(ctx);
    };
    if gate::is_fast(ctx, config, &case, pod.ifindex)
        && pod::takes(ctx, &inner.ip, pod, ETH_LEN as u32)
        && let Ok(verdict) = land(ctx, pod, &inner.ip, tos(&inner.ip))
    {
        return routed(verdict);
    }
    gate::tag(ctx, config, &case);
    Verdict::NOT_OURS
}

/// Takes off what a short packet was padded with, as the stack does (`ip_rcv_core`): it is not part of what is compared behind it.
#[inline(always)]
fn unpad(ctx: &TcContext, ip: &IpHdr) {
    let len = packet_len(ip) + ETH_LEN as u32;
    if ctx.len() > len && ctx.len() <= SHORTEST_FRAME {
        // SAFETY: a helper call on the context. A frame that stays as it was is the stack's.
        let _kept = unsafe { bpf_skb_change_tail(ctx.skb.skb, len, 0) };
    }
}

/// The same, counted as what it is.
#[inline(always)]
fn routed(verdict: Verdict) -> Verdict {
    match verdict.kind {
        Kind::Deliver => Verdict {
            kind: Kind::DeliverRouted,
            ..verdict
        },
        _ => verdict,
    }
}
