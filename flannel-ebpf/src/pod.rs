//! The hooks around a pod: both sides of its veth, and the ingress of `flannel.<vni>`.

use aya_ebpf::{helpers::bpf_skb_change_type, programs::TcContext};
use flannel_common::{
    Config, DropReason, PodRecord,
    flow::{Way, mode},
    map::subnet_index,
    node_flags,
};
use network_types::{
    eth::{EthHdr, EtherType},
    ip::Ipv4Hdr,
};

use crate::{
    Kind, Verdict,
    access::{header as read, mac_bits},
    decap::land,
    encap,
    gate::{self, Case},
    maps,
    tuple::{self, IcmpError, Inner},
};

const ETH_LEN: usize = EthHdr::LEN;
const PACKET_HOST: u32 = 0;

/// A packet that a pod has sent, before the stack.
#[inline(always)]
pub(crate) fn try_from_pod(ctx: &TcContext, config: &Config) -> Result<Verdict, DropReason> {
    // A pod may have numbered its packets, and so may whoever sent this one through another hook of ours.
    match plain_ipv4(ctx) {
        Some((eth, inner)) => match subnet_index(config, inner.ip.dst_addr) {
            Some(index) if index == config.own_index => Ok(to_neighbour(ctx, config, &eth, &inner)),
            Some(index) => to_peer(ctx, config, index, &eth, &inner),
            None => Ok(slow(ctx)),
        },
        None if config.mode == mode::SYN => error_to_peer(ctx, config),
        None => Ok(slow(ctx)),
    }
}

/// To a pod of another node.
#[inline(always)]
fn to_peer(
    ctx: &TcContext,
    config: &Config,
    index: u32,
    eth: &EthHdr,
    inner: &Inner,
) -> Result<Verdict, DropReason> {
    let Some(pod) = sender(ctx, inner.ip.src_addr) else {
        return Ok(slow(ctx));
    };
    let case = Case {
        key: inner.key(Way::Out),
        packet: inner.packet(Way::Out),
        generation: pod.generation,
    };
    if inner.ip.ttl <= 1 || mac_bits(&eth.dst_addr) != mac_bits(&pod.gateway_mac) {
        return Ok(slow(ctx));
    }
    wrap(ctx, config, index, &inner.ip, pod, Some(&case)).unwrap_or_else(|| {
        gate::tag(ctx, config, &case);
        Ok(Verdict::NOT_OURS)
    })
}

/// Encapsulates for the peer with that subnet. `None`: the stack must do it, the packet is as it was.
#[inline(always)]
fn wrap(
    ctx: &TcContext,
    config: &Config,
    index: u32,
    ip: &Ipv4Hdr,
    pod: &PodRecord,
    case: Option<&Case>,
) -> Option<Result<Verdict, DropReason>> {
    const READY: u32 = node_flags::VALID | node_flags::NEXT_HOP;
    let node = maps::node_of(index)?;
    if node.flags & READY != READY {
        return None;
    }
    // A pod whose MTU is larger than the tunnel's is told so by the stack.
    let inner_mtu = node.path_mtu.saturating_sub(flannel_common::OVERHEAD_V4);
    let inner_mtu = if inner_mtu < config.tunnel_mtu {
        inner_mtu
    } else {
        config.tunnel_mtu
    };
    let limit = inner_mtu + flannel_common::OVERHEAD_V4;
    if encap::fits(ctx, ip, limit, pod.mtu).is_err() {
        return None;
    }
    if let Some(case) = case
        && !gate::is_fast(ctx, config, case, node.ifindex)
    {
        return None;
    }
    let bytes = ctx.len();
    match encap::push(ctx, config, node, ip, true) {
        Ok(()) => Some(Ok(Verdict {
            kind: Kind::SendFast,
            ifindex: node.ifindex,
            bytes,
        })),
        Err(DropReason::Torn) => Some(Err(DropReason::Torn)),
        Err(_) => None,
    }
}

/// To another pod of this node, over the bridge.
#[inline(always)]
fn to_neighbour(ctx: &TcContext, config: &Config, eth: &EthHdr, inner: &Inner) -> Verdict {
    let Some((target, case)) = neighbours(ctx, eth, inner) else {
        return slow(ctx);
    };
    // SAFETY: a read of a context field, which the verifier turns into a checked load.
    let gso_size = unsafe { (*ctx.skb.skb).gso_size };
    // What the bridge would not forward (`is_skb_forwardable`).
    let too_long = gso_size == 0 && ctx.len() - ETH_LEN as u32 > target.mtu;
    if too_long || !gate::is_fast(ctx, config, &case, target.ifindex) {
        gate::tag(ctx, config, &case);
        return Verdict::NOT_OURS;
    }
    hand_over(ctx, target).unwrap_or_else(|| {
        gate::tag(ctx, config, &case);
        Verdict::NOT_OURS
    })
}

#[inline(always)]
fn neighbours(ctx: &TcContext, eth: &EthHdr, inner: &Inner) -> Option<(&'static PodRecord, Case)> {
    let pod = sender(ctx, inner.ip.src_addr)?;
    let target = maps::pod(inner.ip.dst_addr)?;
    let way = inner.local_way();
    // Bridged, not routed: then neither hop limit nor addresses change.
    let bridged = mac_bits(&eth.dst_addr) == mac_bits(&target.mac)
        && mac_bits(&eth.src_addr) == mac_bits(&pod.mac);
    (bridged && target.ifindex != pod.ifindex).then_some((
        target,
        Case {
            key: inner.key(way),
            packet: inner.packet(way),
            generation: pod.generation.wrapping_add(target.generation),
        },
    ))
}

/// To the other end of the target's veth pair, as it is. `None`: the stack must do it.
#[inline(always)]
fn hand_over(ctx: &TcContext, target: &PodRecord) -> Option<Verdict> {
    // SAFETY: a helper call on the context. Kernels before 6.15 leave the type as the bridge port found it: for somebody else.
    if unsafe { bpf_skb_change_type(ctx.skb.skb, PACKET_HOST) } != 0 {
        return None;
    }
    Some(Verdict {
        kind: Kind::HandOver,
        ifindex: target.ifindex,
        bytes: ctx.len(),
    })
}

/// An ICMP error about a connection that was admitted by its SYN: connection tracking, which does not know the connection, would
/// call the error invalid, here or at the other end.
#[inline(always)]
fn error_to_peer(ctx: &TcContext, config: &Config) -> Result<Verdict, DropReason> {
    let Some((eth, error)) = plain_error(ctx) else {
        return Ok(slow(ctx));
    };
    let Some(pod) = sender(ctx, error.ip.src_addr) else {
        return Ok(slow(ctx));
    };
    let Some(index) = subnet_index(config, error.ip.dst_addr) else {
        return Ok(slow(ctx));
    };
    // The quoted packet came to this pod from the receiver of the error.
    if error.quoted.ip.dst_addr != error.ip.src_addr
        || error.quoted.ip.src_addr != error.ip.dst_addr
    {
        return Ok(slow(ctx));
    }
    if index == config.own_index {
        let Some(target) = maps::pod(error.ip.dst_addr) else {
            return Ok(slow(ctx));
        };
        let key = error.quoted.key(error.quoted.local_way());
        let generation = pod.generation.wrapping_add(target.generation);
        if mac_bits(&eth.dst_addr) == mac_bits(&target.mac)
            && gate::is_by_syn(config, &key, generation)
        {
            return Ok(hand_over(ctx, target).unwrap_or_else(|| slow(ctx)));
        }
        return Ok(slow(ctx));
    }
    let known = gate::is_by_syn(config, &error.quoted.key(Way::In), pod.generation);
    if !known || error.ip.ttl <= 1 || mac_bits(&eth.dst_addr) != mac_bits(&pod.gateway_mac) {
        return Ok(slow(ctx));
    }
    wrap(ctx, config, index, &error.ip, pod, None).unwrap_or(Ok(slow(ctx)))
}

/// A packet on its way to a pod, behind the stack.
#[inline(always)]
pub(crate) fn try_to_pod(ctx: &TcContext, config: &Config) {
    let Some((_, inner)) = plain_ipv4(ctx) else {
        return;
    };
    let Some(index) = subnet_index(config, inner.ip.src_addr) else {
        return;
    };
    let Some(pod) = sender(ctx, inner.ip.dst_addr) else {
        return;
    };
    let (way, generation) = if index == config.own_index {
        let Some(source) = maps::pod(inner.ip.src_addr) else {
            return;
        };
        (
            inner.local_way(),
            pod.generation.wrapping_add(source.generation),
        )
    } else {
        (Way::In, pod.generation)
    };
    let case = Case {
        key: inner.key(way),
        packet: inner.packet(way),
        generation,
    };
    gate::witness(ctx, config, &case);
}

/// A packet for a pod that the tunnel device has received.
#[inline(always)]
pub(crate) fn try_from_overlay(ctx: &TcContext, config: &Config) -> Verdict {
    let judged = gate::was_judged(ctx);
    gate::untag(ctx);
    // SAFETY: a read of a context field, which the verifier turns into a checked load.
    if unsafe { (*ctx.skb.skb).pkt_type } != PACKET_HOST {
        return Verdict::NOT_OURS;
    }
    let Some((_, inner)) = plain_ipv4(ctx) else {
        return if config.mode == mode::SYN {
            error_to_pod(ctx, config)
        } else {
            Verdict::NOT_OURS
        };
    };
    let Some((pod, case)) = inbound(config, &inner) else {
        return Verdict::NOT_OURS;
    };
    if !judged
        && gate::is_fast(ctx, config, &case, pod.ifindex)
        && takes(ctx, &inner.ip, pod, ETH_LEN as u32)
        && let Ok(verdict) = land(ctx, pod, &inner.ip, inner.ip.tos)
    {
        return verdict;
    }
    gate::tag(ctx, config, &case);
    Verdict::NOT_OURS
}

/// An ICMP error for a pod about a connection that was admitted by its SYN; it may come from any node on the way.
#[inline(always)]
fn error_to_pod(ctx: &TcContext, config: &Config) -> Verdict {
    let Some((_, error)) = plain_error(ctx) else {
        return Verdict::NOT_OURS;
    };
    let Some(pod) = maps::pod(error.ip.dst_addr) else {
        return Verdict::NOT_OURS;
    };
    let known = error.quoted.ip.src_addr == error.ip.dst_addr
        && gate::is_by_syn(config, &error.quoted.key(Way::Out), pod.generation);
    if known
        && error.ip.ttl > 1
        && takes(ctx, &error.ip, pod, ETH_LEN as u32)
        && let Ok(verdict) = land(ctx, pod, &error.ip, error.ip.tos)
    {
        return verdict;
    }
    Verdict::NOT_OURS
}

/// The pod that an inner packet from another node is for, and the case to judge.
#[inline(always)]
pub(crate) fn inbound(config: &Config, inner: &Inner) -> Option<(&'static PodRecord, Case)> {
    if subnet_index(config, inner.ip.dst_addr) != Some(config.own_index) || inner.ip.ttl <= 1 {
        return None;
    }
    let source = subnet_index(config, inner.ip.src_addr)?;
    if source == config.own_index {
        return None;
    }
    let _known = maps::node_of(source)?;
    let pod = maps::pod(inner.ip.dst_addr)?;
    Some((
        pod,
        Case {
            key: inner.key(Way::In),
            packet: inner.packet(Way::In),
            generation: pod.generation,
        },
    ))
}

/// Whether the bridge and the pod's veth would take the packet, whose IPv4 packet begins at `at`; else the stack says so to its sender.
#[inline(always)]
pub(crate) fn takes(ctx: &TcContext, ip: &Ipv4Hdr, pod: &PodRecord, at: u32) -> bool {
    // SAFETY: a read of a context field, which the verifier turns into a checked load.
    let gso_size = unsafe { (*ctx.skb.skb).gso_size };
    if gso_size == 0 {
        return ctx.len() - at <= pod.mtu;
    }
    encap::segment_len(ctx, ip, gso_size, at).is_some_and(|len| len <= pod.mtu)
}

/// The pod at this interface, if the address is its own.
#[inline(always)]
fn sender(ctx: &TcContext, address: [u8; 4]) -> Option<&'static PodRecord> {
    // SAFETY: a read of a context field, which the verifier turns into a checked load.
    let ifindex = unsafe { (*ctx.skb.skb).ifindex };
    maps::pod(address).filter(|pod| pod.ifindex == ifindex)
}

/// An untagged Ethernet frame with an IPv4 packet that the gate can follow.
#[inline(always)]
fn plain_ipv4(ctx: &TcContext) -> Option<(EthHdr, Inner)> {
    let inner = tuple::inner(ctx, ETH_LEN)?;
    Some((ethernet(ctx)?, inner))
}

#[inline(always)]
fn plain_error(ctx: &TcContext) -> Option<(EthHdr, IcmpError)> {
    let error = tuple::icmp_error(ctx, ETH_LEN)?;
    Some((ethernet(ctx)?, error))
}

#[inline(always)]
fn ethernet(ctx: &TcContext) -> Option<EthHdr> {
    let eth: EthHdr = read(ctx, 0)?;
    // SAFETY: a read of a context field, which the verifier turns into a checked load.
    let vlan = unsafe { (*ctx.skb.skb).vlan_present };
    (vlan == 0 && eth.ether_type == u16::from(EtherType::Ipv4)).then_some(eth)
}

#[inline(always)]
fn slow(ctx: &TcContext) -> Verdict {
    gate::untag(ctx);
    Verdict::NOT_OURS
}
