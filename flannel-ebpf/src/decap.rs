//! Uplink ingress: a VXLAN packet for this node loses its outer headers and is received on `flannel.<vni>`.
//!
//! Only a packet that the kernel's receiver would accept without any further work is carried; all else is an
//! error value, which means "to the kernel device" (`vxlan_rcv` in `drivers/net/vxlan/vxlan_core.c`).

use aya_ebpf::{
    bindings::{BPF_CSUM_LEVEL_DEC, bpf_adj_room_mode::BPF_ADJ_ROOM_MAC},
    helpers::{bpf_csum_level, bpf_skb_store_bytes},
    programs::TcContext,
};
use flannel_common::{
    CounterId, DropReason, PodRecord, config_flags, ecn,
    flow::mode,
    header::VXLAN_I,
    map::{BareMark, room_flags},
};
use network_types::{eth::EthHdr, udp::UdpHdr, vxlan::VxlanHdr};

use crate::{
    Kind, Verdict,
    access::{BROADCAST, copy, header as read, linear, load, mac_bits},
    family::{
        self, BARE_MAGIC, Config, ETHER_TYPE_BYTES, HEADER_LEN, INNER_ETH, IP_LEN, IP_PART, IpHdr,
        NOT_THIS_FAMILY, OVERHEAD, UDP, VXLAN, next_hop, tos, with_tos,
    },
    gate, link, maps, pod,
    tuple::{self, Inner},
};

const PACKET_HOST: u32 = 0;
const ETH_LEN: u32 = EthHdr::LEN as u32;
const VLAN_LEN: u32 = 4;
/// Outer headers, the inner IP header, and what follows it as far as checksums are looked for.
const NEEDED: u32 = (HEADER_LEN + IP_LEN) as u32;

#[inline(always)]
pub(crate) fn try_from_wire(ctx: &TcContext, config: &Config) -> Result<Verdict, DropReason> {
    if config.flags & config_flags::XDP != 0 && is_bare(ctx) {
        return try_bare(ctx, config);
    }
    let skb = ctx.skb.skb;
    // SAFETY: reads of context fields, which the verifier turns into checked loads.
    let (packet_type, vlan, gso_size) =
        unsafe { ((*skb).pkt_type, (*skb).vlan_present, (*skb).gso_size) };
    if packet_type != PACKET_HOST || vlan != 0 || !linear(ctx, (UDP + UdpHdr::LEN) as u32) {
        return Ok(Verdict::NOT_OURS);
    }
    let Some(outer) = family::outer(ctx, config)? else {
        if config.flags & config_flags::ROUTED != 0 && config.mode != mode::OFF {
            return Ok(link::try_from_link(ctx, config));
        }
        return Ok(Verdict::NOT_OURS);
    };
    gate::clear_index(ctx);
    if config.flags & config_flags::DECAP == 0 {
        return Err(DropReason::Disabled);
    }
    let bytes = ctx.len();
    if bytes < (VXLAN + VxlanHdr::LEN) as u32 || outer.udp < (UdpHdr::LEN + VxlanHdr::LEN) as u32 {
        return Err(DropReason::TooShort);
    }
    if outer.total + ETH_LEN != bytes || outer.udp + IP_LEN as u32 != outer.total {
        return Err(DropReason::Length);
    }
    if !linear(ctx, (VXLAN + VxlanHdr::LEN) as u32) {
        return Err(DropReason::TooShort);
    }
    let vxlan: [u8; 8] = read(ctx, VXLAN).ok_or(DropReason::TooShort)?;
    if vxlan != vxlan_of(config) {
        return Err(unusual_vxlan(&vxlan, config));
    }
    if !linear(ctx, NEEDED) {
        return Err(DropReason::TooShort);
    }
    let inner_eth: [u8; EthHdr::LEN] = read(ctx, INNER_ETH).ok_or(DropReason::TooShort)?;
    let inner: IpHdr = read(ctx, HEADER_LEN).ok_or(DropReason::TooShort)?;
    family::check_outer(ctx, config, &outer, &inner)?;
    check_inner(config, &inner_eth)?;
    let frame = bytes - OVERHEAD;
    let was = tos(&inner);
    let congestion = ecn::decap(outer.tos, was);
    if config.flags & config_flags::XDP != 0
        && family::may_be_stripped(ctx, &outer, &inner)
        && is_to_us(config, &inner_eth)
        && (gso_size != 0 || outer.total <= config.tunnel_mtu + OVERHEAD)
        && congestion != ecn::Decap::Drop
    {
        // `xdp_decap` asks for no more.
        maps::count(CounterId::XdpMissed, frame);
    }
    if gso_size != 0 && config.flags & config_flags::DECAP_GSO == 0 {
        return Err(DropReason::Gso);
    }
    // What `is_skb_forwardable` refuses on injection; super-packets are exempt there.
    if gso_size == 0 && frame > config.tunnel_mtu + ETH_LEN + VLAN_LEN {
        return Err(DropReason::OverTunnelMtu);
    }
    if congestion == ecn::Decap::Drop {
        return Err(DropReason::Ecn);
    }

    let now = match congestion {
        ecn::Decap::SetCe => (was & !ecn::MASK) | ecn::CE,
        ecn::Decap::SetEct1 => (was & !ecn::MASK) | ecn::ECT_1,
        ecn::Decap::Keep | ecn::Decap::Drop => was,
    };
    if config.mode != mode::OFF
        && is_to_us(config, &inner_eth)
        && let Some((pod, inner)) = fast_target(ctx, config, HEADER_LEN)
    {
        pop(ctx, config)?;
        return land(ctx, pod, &inner.ip, now);
    }
    receive(ctx, config, &inner_eth, &inner, now)?;
    Ok(Verdict {
        kind: Kind::Receive,
        ifindex: config.tunnel_ifindex,
        bytes: frame,
    })
}

/// Removes the outer headers and gives the inner frame its own, as it is to be received. On failure the packet is as it was.
#[inline(always)]
fn receive(
    ctx: &TcContext,
    config: &Config,
    inner_eth: &[u8; EthHdr::LEN],
    inner: &IpHdr,
    now: u8,
) -> Result<(), DropReason> {
    let was = tos(inner);
    let outer_eth: [u8; EthHdr::LEN] = read(ctx, 0).ok_or(DropReason::TooShort)?;
    // Written first, and where they are now: the outer Ethernet header is the one that stays.
    store(ctx, 0, inner_eth)?;
    let marked = if now == was {
        Ok(())
    } else {
        let part: [u8; IP_PART] = with_tos(inner, now);
        store(ctx, HEADER_LEN as u32, &part)
    };
    let done = marked.and_then(|()| pop(ctx, config));
    if done.is_ok() && now != was {
        family::account(ctx, inner, &with_tos(inner, now));
    }
    if let Err(reason) = done {
        let part: [u8; IP_PART] = with_tos(inner, was);
        let undone = store(ctx, 0, &outer_eth).and_then(|()| store(ctx, HEADER_LEN as u32, &part));
        return Err(if undone.is_ok() {
            reason
        } else {
            DropReason::Torn
        });
    }
    Ok(())
}

/// The start of a frame as it reaches a pod.
#[repr(C)]
struct Landing {
    eth: [u8; EthHdr::LEN],
    ip: [u8; IP_PART],
}

/// The Ethernet header of a packet that the host delivers to the pod.
#[inline(always)]
fn frame_header(pod: &PodRecord) -> [u8; EthHdr::LEN] {
    let (to, from) = (copy(&pod.mac), copy(&pod.gateway_mac));
    let [high, low] = ETHER_TYPE_BYTES;
    [
        to[0], to[1], to[2], to[3], to[4], to[5], from[0], from[1], from[2], from[3], from[4],
        from[5], high, low,
    ]
}

/// Gives a frame without outer headers the addresses and the hop limit that it has when the host delivers it.
#[inline(always)]
pub(crate) fn land(
    ctx: &TcContext,
    pod: &PodRecord,
    ip: &IpHdr,
    tos: u8,
) -> Result<Verdict, DropReason> {
    let bytes = ctx.len();
    let landing = Landing {
        eth: frame_header(pod),
        ip: next_hop(ip, tos),
    };
    // SAFETY: plain bytes without padding.
    let header: [u8; size_of::<Landing>()] = unsafe { core::mem::transmute(landing) };
    store(ctx, 0, &header)?;
    family::account(ctx, ip, &next_hop(ip, tos));
    Ok(Verdict {
        kind: Kind::Deliver,
        ifindex: pod.ifindex,
        bytes,
    })
}

/// The pod that the packet, whose inner IP header is at `at`, may be handed to directly.
#[inline(always)]
fn fast_target(ctx: &TcContext, config: &Config, at: usize) -> Option<(&'static PodRecord, Inner)> {
    let inner = tuple::inner(ctx, at)?;
    let (pod, case) = pod::inbound(config, &inner)?;
    let fast = gate::is_fast(ctx, config, &case, pod.ifindex);
    if !fast {
        gate::set_judged(ctx);
    }
    (fast && pod::takes(ctx, &inner.ip, pod, at as u32)).then_some((pod, inner))
}

/// Whether `xdp_decap` has taken the outer headers off this packet.
#[inline(always)]
fn is_bare(ctx: &TcContext) -> bool {
    // SAFETY: reads of context fields, which the verifier turns into checked loads.
    let meta = unsafe { (*ctx.skb.skb).data_meta as usize };
    if meta + size_of::<BareMark>() > ctx.data() {
        return false;
    }
    // SAFETY: the bounds were just checked, and every number is a mark.
    unsafe { load::<BareMark>(meta as *const u8) }.magic == BARE_MAGIC
}

/// A packet without its outer headers, which were checked before: to its pod, or to the stack as if the tunnel device had received it.
#[inline(always)]
fn try_bare(ctx: &TcContext, config: &Config) -> Result<Verdict, DropReason> {
    gate::clear_index(ctx);
    if config.mode != mode::OFF
        && let Some((pod, inner)) = fast_target(ctx, config, EthHdr::LEN)
    {
        return land(ctx, pod, &inner.ip, tos(&inner.ip));
    }
    let bytes = ctx.len();
    store(ctx, 0, &copy(&config.own_mac))?;
    Ok(Verdict {
        kind: Kind::Receive,
        ifindex: config.tunnel_ifindex,
        bytes,
    })
}

/// Removes the outer headers. On failure the packet is as it was.
#[inline(always)]
fn pop(ctx: &TcContext, config: &Config) -> Result<(), DropReason> {
    ctx.adjust_room(
        -(OVERHEAD as i32),
        BPF_ADJ_ROOM_MAC,
        room_flags(config.decap_flags),
    )
    .map_err(|_| DropReason::AdjustRoom)?;
    // SAFETY: a helper call on the context. It undoes the level that the outer checksum took, as `udp_rcv` does.
    unsafe { bpf_csum_level(ctx.skb.skb, u64::from(BPF_CSUM_LEVEL_DEC)) };
    Ok(())
}

/// The VXLAN header that peers send.
#[inline(always)]
pub(crate) fn vxlan_of(config: &Config) -> [u8; 8] {
    let [a, b, c, _] = copy(&config.vni);
    [VXLAN_I, 0, 0, 0, a, b, c, 0]
}

/// What is wrong with a VXLAN header that is another than [`vxlan_of`].
#[inline(always)]
fn unusual_vxlan(vxlan: &[u8; 8], config: &Config) -> DropReason {
    if vxlan[0] & VXLAN_I == 0 {
        return DropReason::NoVni;
    }
    if [vxlan[4], vxlan[5], vxlan[6]] != [config.vni[0], config.vni[1], config.vni[2]] {
        return DropReason::OtherVni;
    }
    DropReason::Reserved
}

/// The receiver's rules for the inner frame (`eth_type_trans` and `vxlan_set_mac`): to us, and not from us.
#[inline(always)]
pub(crate) fn check_inner(config: &Config, eth: &[u8; EthHdr::LEN]) -> Result<(), DropReason> {
    let [d0, d1, d2, d3, d4, d5, s0, s1, s2, s3, s4, s5, kind @ ..] = *eth;
    let own = mac_bits(&config.own_mac);
    let to = mac_bits(&[d0, d1, d2, d3, d4, d5]);
    let from = mac_bits(&[s0, s1, s2, s3, s4, s5]);
    if kind != ETHER_TYPE_BYTES {
        return Err(NOT_THIS_FAMILY);
    }
    if from == own {
        return Err(DropReason::OwnSource);
    }
    if to != own && to != BROADCAST {
        return Err(DropReason::OtherHost);
    }
    Ok(())
}

/// Whether the inner frame is addressed to this node alone. A unicast packet in a broadcast frame is received, and not forwarded
/// (`ip_forward`).
#[inline(always)]
pub(crate) fn is_to_us(config: &Config, eth: &[u8; EthHdr::LEN]) -> bool {
    let [d0, d1, d2, d3, d4, d5, ..] = *eth;
    mac_bits(&[d0, d1, d2, d3, d4, d5]) == mac_bits(&config.own_mac)
}

#[inline(always)]
pub(crate) fn store<const N: usize>(
    ctx: &TcContext,
    offset: u32,
    bytes: &[u8; N],
) -> Result<(), DropReason> {
    // SAFETY: the source is a buffer of exactly the length given.
    let stored =
        unsafe { bpf_skb_store_bytes(ctx.skb.skb, offset, bytes.as_ptr().cast(), N as u32, 0) };
    if stored == 0 {
        Ok(())
    } else {
        Err(DropReason::Store)
    }
}
