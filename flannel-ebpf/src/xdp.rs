//! Native XDP on the uplink: the outer headers go before the driver makes a socket buffer, so that GRO merges the inner packets as
//! it would without a tunnel. `from_wire` knows them by their metadata and does the rest.
//!
//! Taken is only what `from_wire` would take; everything else passes, and is `from_wire`'s to judge and count. An interface takes one
//! program: that for IPv4 hands packets of IPv6 on to the other ([`family::hand_on`]).

use aya_ebpf::{
    helpers::{bpf_xdp_adjust_head, bpf_xdp_adjust_meta},
    programs::XdpContext,
};
use flannel_common::{CounterId, DropReason, config_flags, ecn, map::BareMark};
use network_types::eth::EthHdr;

use crate::{
    access::header as read,
    decap::{check_inner, is_to_us, vxlan_of},
    family::{
        self, BARE_MAGIC, Config, ETHER_TYPE, HEADER_LEN, INNER_ETH, IP_LEN, IP_PART, IpHdr,
        OVERHEAD, Outer, VXLAN, tos, with_tos,
    },
    maps,
};

#[inline(always)]
fn write<T: Copy>(ctx: &XdpContext, offset: usize, value: T) -> Result<(), DropReason> {
    let start = ctx.data();
    if start + offset + size_of::<T>() > ctx.data_end() {
        return Err(DropReason::Store);
    }
    // SAFETY: the bounds were just checked.
    unsafe { ((start + offset) as *mut T).write_unaligned(value) };
    Ok(())
}

/// Strips a packet of the overlay. `None`: not one that may be stripped here, the frame is as it was.
#[inline(always)]
pub(crate) fn try_xdp_decap(ctx: &XdpContext) -> Option<Result<(), DropReason>> {
    let config = maps::config()?;
    if config.flags & (config_flags::DECAP | config_flags::XDP)
        != config_flags::DECAP | config_flags::XDP
    {
        return None;
    }
    let eth: EthHdr = read(ctx, 0)?;
    let inner: IpHdr = read(ctx, HEADER_LEN)?;
    let (outer, inner_eth) = plain(ctx, config, &eth, &inner)?;
    let was = tos(&inner);
    let now = match ecn::decap(outer.tos, was) {
        ecn::Decap::Keep => was,
        ecn::Decap::SetCe => (was & !ecn::MASK) | ecn::CE,
        ecn::Decap::SetEct1 => (was & !ecn::MASK) | ecn::ECT_1,
        ecn::Decap::Drop => return None,
    };
    // SAFETY: helper calls on the context.
    unsafe {
        if bpf_xdp_adjust_meta(ctx.ctx, -(size_of::<BareMark>() as i32)) != 0 {
            // The driver has no room for metadata.
            return None;
        }
        if bpf_xdp_adjust_head(ctx.ctx, OVERHEAD as i32) != 0 {
            return unmark(ctx);
        }
    }
    match finish(ctx, &eth, &inner_eth, &inner, now) {
        Ok(()) => Some(Ok(())),
        // The outer headers are still where they were.
        // SAFETY: a helper call on the context.
        Err(_) if unsafe { bpf_xdp_adjust_head(ctx.ctx, -(OVERHEAD as i32)) } == 0 => unmark(ctx),
        Err(_) => Some(Err(DropReason::Torn)),
    }
}

/// Takes the metadata away again, in which nobody has written anything: it might look like a mark.
#[inline(always)]
fn unmark(ctx: &XdpContext) -> Option<Result<(), DropReason>> {
    // SAFETY: a helper call on the context.
    if unsafe { bpf_xdp_adjust_meta(ctx.ctx, size_of::<BareMark>() as i32) } == 0 {
        None
    } else {
        Some(Err(DropReason::Torn))
    }
}

/// The outer headers and the inner Ethernet header of a packet that is in every respect as peers send it.
#[inline(always)]
fn plain(
    ctx: &XdpContext,
    config: &Config,
    eth: &EthHdr,
    inner: &IpHdr,
) -> Option<(Outer, [u8; EthHdr::LEN])> {
    if eth.ether_type != u16::from(ETHER_TYPE) || eth.dst_addr[0] & 1 != 0 {
        return None;
    }
    let outer = family::plain_outer(ctx, config, inner)?;
    let vxlan: [u8; 8] = read(ctx, VXLAN)?;
    let inner_eth: [u8; EthHdr::LEN] = read(ctx, INNER_ETH)?;
    // The frame may be longer by padding that the inner lengths tell from data; shorter it cannot be. Multi-buffer frames go on in
    // buffers that `data_end` does not cover.
    let enough = outer.total as usize + EthHdr::LEN >= HEADER_LEN + IP_LEN
        && outer.total <= config.tunnel_mtu + OVERHEAD;
    let ours = outer.udp + IP_LEN as u32 == outer.total
        && vxlan == vxlan_of(config)
        && is_to_us(config, &inner_eth)
        && check_inner(config, &inner_eth).is_ok();
    (ours && enough).then_some((outer, inner_eth))
}

/// Gives the inner packet a frame that the host takes for its own, and a mark that says what it was. On failure nothing is written.
#[inline(always)]
fn finish(
    ctx: &XdpContext,
    eth: &EthHdr,
    inner_eth: &[u8; EthHdr::LEN],
    inner: &IpHdr,
    now: u8,
) -> Result<(), DropReason> {
    let meta = ctx.metadata();
    let written = EthHdr::LEN + IP_PART;
    if meta + size_of::<BareMark>() > ctx.data() || ctx.data() + written > ctx.data_end() {
        return Err(DropReason::Store);
    }
    let mut header = *inner_eth;
    header[..6].copy_from_slice(&eth.dst_addr);
    write(ctx, 0, header)?;
    if now != tos(inner) {
        let part: [u8; IP_PART] = with_tos(inner, now);
        write(ctx, EthHdr::LEN, part)?;
    }
    // SAFETY: the bounds were checked above.
    unsafe { (meta as *mut BareMark).write_unaligned(BareMark { magic: BARE_MAGIC }) };
    maps::count(CounterId::XdpDecap, (ctx.data_end() - ctx.data()) as u32);
    Ok(())
}
