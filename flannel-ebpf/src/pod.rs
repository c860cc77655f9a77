//! The hooks around a pod: both sides of its veth, and the ingress of `flannel.<vni>`.

use aya_ebpf::{helpers::bpf_skb_change_type, programs::TcContext};
use flannel_common::{
    DropReason, PodRecord,
    flow::{Way, mode},
    node_flags,
};
use network_types::eth::EthHdr;

use crate::{
    Kind, Verdict,
    access::{header as read, mac_bits},
    decap::land,
    encap,
    family::{
        Address, Config, ETHER_TYPE, GSO_BY_DEVICE, INNER_ETH, IpHdr, OTHER_ETHER_TYPE, OVERHEAD,
        destination, hops, source, subnet_index, tos,
    },
    gate::{self, Case},
    link, maps,
    tuple::{self, IcmpError, Inner},
};

const ETH_LEN: usize = EthHdr::LEN;
const PACKET_HOST: u32 = 0;

/// A packet that a pod has sent, before the stack.
#[inline(always)]
pub(crate) fn try_from_pod(ctx: &TcContext, config: &Config) -> Result<Verdict, DropReason> {
    // A pod may have numbered its packets, and so may whoever sent this one through another hook of ours.
    match plain(ctx) {
        Some((eth, inner)) => match subnet_index(config, destination(&inner.ip)) {
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
    let Some(pod) = sender(ctx, source(&inner.ip)) else {
        return Ok(slow(ctx));
    };
    let case = Case {
        key: inner.key(Way::Out),
        packet: inner.packet(Way::Out),
        generation: pod.generation,
    };
    if hops(&inner.ip) <= 1 || mac_bits(&eth.dst_addr) != mac_bits(&pod.gateway_mac) {
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
    ip: &IpHdr,
    pod: &PodRecord,
    case: Option<&Case>,
) -> Option<Result<Verdict, DropReason>> {
    const READY: u32 = node_flags::VALID | node_flags::NEXT_HOP;
    let node = maps::node_of(index)?;
    if node.flags & READY != READY {
        return None;
    }
    if node.flags & node_flags::ROUTED != 0 {
        return link::route(ctx, config, node, ip, pod, case).map(Ok);
    }
    // A pod whose MTU is larger than the tunnel's is told so by the stack.
    let inner_mtu = node.path_mtu.saturating_sub(OVERHEAD);
    let inner_mtu = if inner_mtu < config.tunnel_mtu {
        inner_mtu
    } else {
        config.tunnel_mtu
    };
    let limit = inner_mtu + OVERHEAD;
    if encap::fits(ctx, ip, limit, pod.mtu).is_err() {
        return None;
    }
    if let Some(case) = case
        && !gate::is_fast(ctx, config, case, node.ifindex)
    {
        return None;
    }
    // SAFETY: a read of a context field, which the verifier turns into a checked load.
    if GSO_BY_DEVICE && unsafe { (*ctx.skb.skb).gso_size } != 0 {
        return link::send(
            ctx,
            node,
            INNER_ETH,
            ip,
            Kind::SendFast,
            config.tunnel_ifindex,
        )
        .map(Ok);
    }
    let bytes = ctx.len();
    match encap::push(ctx, config, node, ip, true, false) {
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
    let pod = sender(ctx, source(&inner.ip))?;
    let target = maps::pod(destination(&inner.ip))?;
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
    let Some(pod) = sender(ctx, source(&error.ip)) else {
        return Ok(slow(ctx));
    };
    let Some(index) = subnet_index(config, destination(&error.ip)) else {
        return Ok(slow(ctx));
    };
    // The quoted packet came to this pod from the receiver of the error.
    if destination(&error.quoted.ip) != source(&error.ip)
        || source(&error.quoted.ip) != destination(&error.ip)
    {
        return Ok(slow(ctx));
    }
    if index == config.own_index {
        let Some(target) = maps::pod(destination(&error.ip)) else {
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
    if !known || hops(&error.ip) <= 1 || mac_bits(&eth.dst_addr) != mac_bits(&pod.gateway_mac) {
        return Ok(slow(ctx));
    }
    wrap(ctx, config, index, &error.ip, pod, None).unwrap_or(Ok(slow(ctx)))
}

/// A packet on its way to a pod, behind the stack.
#[inline(always)]
pub(crate) fn try_to_pod(ctx: &TcContext, config: &Config) {
    let Some((_, inner)) = plain(ctx) else {
        return;
    };
    let Some(index) = subnet_index(config, source(&inner.ip)) else {
        return;
    };
    let Some(pod) = sender(ctx, destination(&inner.ip)) else {
        return;
    };
    let (way, generation) = if index == config.own_index {
        let Some(source) = maps::pod(source(&inner.ip)) else {
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
    let Some((_, inner)) = plain(ctx) else {
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
        && let Ok(verdict) = land(ctx, pod, &inner.ip, tos(&inner.ip))
    {
        return verdict;
    }
    gate::tag(ctx, config, &case);
    Verdict::NOT_OURS
}

/// An ICMP error for a pod about a connection that was admitted by its SYN; it may come from any node on the way.
#[inline(always)]
pub(crate) fn error_to_pod(ctx: &TcContext, config: &Config) -> Verdict {
    let Some((_, error)) = plain_error(ctx) else {
        return Verdict::NOT_OURS;
    };
    let Some(pod) = maps::pod(destination(&error.ip)) else {
        return Verdict::NOT_OURS;
    };
    let known = source(&error.quoted.ip) == destination(&error.ip)
        && gate::is_by_syn(config, &error.quoted.key(Way::Out), pod.generation);
    if known
        && hops(&error.ip) > 1
        && takes(ctx, &error.ip, pod, ETH_LEN as u32)
        && let Ok(verdict) = land(ctx, pod, &error.ip, tos(&error.ip))
    {
        return verdict;
    }
    Verdict::NOT_OURS
}

/// The pod that an inner packet from another node is for, and the case to judge.
#[inline(always)]
pub(crate) fn inbound(config: &Config, inner: &Inner) -> Option<(&'static PodRecord, Case)> {
    if subnet_index(config, destination(&inner.ip)) != Some(config.own_index)
        || hops(&inner.ip) <= 1
    {
        return None;
    }
    let source = subnet_index(config, source(&inner.ip))?;
    if source == config.own_index {
        return None;
    }
    let _known = maps::node_of(source)?;
    let pod = maps::pod(destination(&inner.ip))?;
    Some((
        pod,
        Case {
            key: inner.key(Way::In),
            packet: inner.packet(Way::In),
            generation: pod.generation,
        },
    ))
}

/// Whether the bridge and the pod's veth would take the packet, whose IP packet begins at `at`; else the stack says so to its sender.
#[inline(always)]
pub(crate) fn takes(ctx: &TcContext, ip: &IpHdr, pod: &PodRecord, at: u32) -> bool {
    // SAFETY: a read of a context field, which the verifier turns into a checked load.
    let gso_size = unsafe { (*ctx.skb.skb).gso_size };
    if gso_size == 0 {
        return ctx.len() - at <= pod.mtu;
    }
    encap::segment_len(ctx, ip, gso_size, at).is_some_and(|len| len <= pod.mtu)
}

/// The pod at this interface, if the address is its own.
#[inline(always)]
fn sender(ctx: &TcContext, address: Address) -> Option<&'static PodRecord> {
    // SAFETY: a read of a context field, which the verifier turns into a checked load.
    let ifindex = unsafe { (*ctx.skb.skb).ifindex };
    maps::pod(address).filter(|pod| pod.ifindex == ifindex)
}

/// An untagged Ethernet frame with a packet of this family that the gate can follow.
#[inline(always)]
pub(crate) fn plain(ctx: &TcContext) -> Option<(EthHdr, Inner)> {
    let inner = tuple::inner(ctx, ETH_LEN)?;
    Some((ethernet(ctx)?, inner))
}

#[inline(always)]
fn plain_error(ctx: &TcContext) -> Option<(EthHdr, IcmpError)> {
    let error = tuple::icmp_error(ctx, ETH_LEN)?;
    Some((ethernet(ctx)?, error))
}

/// Whether the packet is one of the other IP version, as the kernel has it.
#[inline(always)]
pub(crate) fn is_of_other_family(ctx: &TcContext) -> bool {
    // SAFETY: a read of a context field, which the verifier turns into a checked load.
    let protocol = unsafe { (*ctx.skb.skb).protocol };
    protocol == u32::from(u16::from_ne_bytes(OTHER_ETHER_TYPE))
}

#[inline(always)]
pub(crate) fn ethernet(ctx: &TcContext) -> Option<EthHdr> {
    let eth: EthHdr = read(ctx, 0)?;
    // SAFETY: a read of a context field, which the verifier turns into a checked load.
    let vlan = unsafe { (*ctx.skb.skb).vlan_present };
    (vlan == 0 && eth.ether_type == u16::from(ETHER_TYPE)).then_some(eth)
}

#[inline(always)]
pub(crate) fn slow(ctx: &TcContext) -> Verdict {
    gate::untag(ctx);
    Verdict::NOT_OURS
}
