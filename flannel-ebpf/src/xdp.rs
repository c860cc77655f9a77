//! Native XDP on the uplink: the outer headers go before the driver makes a socket buffer, so that GRO merges the inner packets as
//! it would without a tunnel. `from_wire` knows them by their metadata and does the rest.
//!
//! Taken is only what `from_wire` would take; everything else passes, and is `from_wire`'s to judge and count.

use aya_ebpf::{
    helpers::{bpf_xdp_adjust_head, bpf_xdp_adjust_meta},
    programs::XdpContext,
};
use flannel_common::{
    Config, CounterId, DropReason, HEADER_LEN, OVERHEAD_V4, checksum, config_flags, ecn,
    header::{INNER_ETH, IP, UDP, VXLAN},
    map::{BARE_MAGIC, BareMark},
};
use network_types::{
    eth::{EthHdr, EtherType},
    ip::Ipv4Hdr,
    udp::UdpHdr,
};

use crate::{
    access::{copy, load},
    decap::{check_inner, is_martian, is_to_us, vxlan_of},
    encap::{IP_PART, with_tos},
    maps,
};

const PROTO_UDP: u8 = 17;
/// Anything in the field but the DF bit.
const FRAGMENT: u16 = 0x3fff;

/// A header of type `T` at byte `offset`, if the first buffer of the frame holds all of it.
#[inline(always)]
fn read<T: Copy>(ctx: &XdpContext, offset: usize) -> Option<T> {
    let start = ctx.data();
    if start + offset + size_of::<T>() > ctx.data_end() {
        return None;
    }
    // SAFETY: the bounds were just checked, and the type has no invalid values.
    Some(unsafe { load((start + offset) as *const u8) })
}

#[inline(always)]
fn write<T: Copy>(ctx: &XdpContext, offset: usize, value: T) -> Result<(), DropReason> {
    let start = ctx.data();
    if start + offset + size_of::<T>() > ctx.data_end() {
        return Err(DropReason::Store);
    }
    // SAFETY: as in `read`.
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
    let inner_eth = plain(ctx, config, &eth)?;
    let inner: Ipv4Hdr = read(ctx, HEADER_LEN)?;
    let outer: Ipv4Hdr = read(ctx, IP)?;
    let tos = match ecn::decap(outer.tos, inner.tos) {
        ecn::Decap::Keep => inner.tos,
        ecn::Decap::SetCe => (inner.tos & !ecn::MASK) | ecn::CE,
        ecn::Decap::SetEct1 => (inner.tos & !ecn::MASK) | ecn::ECT_1,
        ecn::Decap::Drop => return None,
    };
    // SAFETY: helper calls on the context.
    unsafe {
        if bpf_xdp_adjust_meta(ctx.ctx, -(size_of::<BareMark>() as i32)) != 0 {
            // The driver has no room for metadata.
            return None;
        }
        if bpf_xdp_adjust_head(ctx.ctx, OVERHEAD_V4 as i32) != 0 {
            return unmark(ctx);
        }
    }
    match finish(ctx, &eth, &inner_eth, &inner, tos) {
        Ok(()) => Some(Ok(())),
        // The outer headers are still where they were.
        // SAFETY: a helper call on the context.
        Err(_) if unsafe { bpf_xdp_adjust_head(ctx.ctx, -(OVERHEAD_V4 as i32)) } == 0 => {
            unmark(ctx)
        }
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

/// The inner Ethernet header of a packet that is in every respect as peers send it.
#[inline(always)]
fn plain(ctx: &XdpContext, config: &Config, eth: &EthHdr) -> Option<[u8; EthHdr::LEN]> {
    let ip: Ipv4Hdr = read(ctx, IP)?;
    let udp: UdpHdr = read(ctx, UDP)?;
    let vxlan: [u8; 8] = read(ctx, VXLAN)?;
    let total = u32::from(u16::from_be_bytes(ip.tot_len));
    let udp_len = u32::from(u16::from_be_bytes(udp.len));
    let ours = eth.ether_type == u16::from(EtherType::Ipv4)
        && eth.dst_addr[0] & 1 == 0
        && ip.vihl == 0x45
        && ip.proto == PROTO_UDP
        && ip.dst_addr == copy(&config.local)
        && u16::from_be_bytes(ip.frags) & FRAGMENT == 0
        && udp.dst == copy(&config.port)
        // Nobody has verified anything yet.
        && udp.check == [0, 0]
        && udp_len + Ipv4Hdr::LEN as u32 == total
        && vxlan == vxlan_of(config);
    let header: [u8; Ipv4Hdr::LEN] = read(ctx, IP)?;
    let inner_eth: [u8; EthHdr::LEN] = read(ctx, INNER_ETH)?;
    // The frame may be longer by padding that the inner lengths tell from data; shorter it cannot be. Multi-buffer frames go on in
    // buffers that `data_end` does not cover.
    let enough = total + EthHdr::LEN as u32 >= HEADER_LEN as u32 + Ipv4Hdr::LEN as u32
        && total <= config.tunnel_mtu + OVERHEAD_V4;
    (ours
        && enough
        && checksum::ipv4_header_is_valid(&header)
        && !is_martian(ip.src_addr, copy(&config.local))
        && is_to_us(config, &inner_eth)
        && check_inner(config, &inner_eth).is_ok())
    .then_some(inner_eth)
}

/// Gives the inner packet a frame that the host takes for its own, and a mark that says what it was. On failure nothing is written.
#[inline(always)]
fn finish(
    ctx: &XdpContext,
    eth: &EthHdr,
    inner_eth: &[u8; EthHdr::LEN],
    inner: &Ipv4Hdr,
    tos: u8,
) -> Result<(), DropReason> {
    let meta = ctx.metadata();
    let written = EthHdr::LEN + IP_PART;
    if meta + size_of::<BareMark>() > ctx.data() || ctx.data() + written > ctx.data_end() {
        return Err(DropReason::Store);
    }
    let mut header = *inner_eth;
    header[..6].copy_from_slice(&eth.dst_addr);
    write(ctx, 0, header)?;
    if tos != inner.tos {
        let part: [u8; IP_PART] = with_tos(inner, tos);
        write(ctx, EthHdr::LEN, part)?;
    }
    // SAFETY: the bounds were checked above.
    unsafe { (meta as *mut BareMark).write_unaligned(BareMark { magic: BARE_MAGIC }) };
    maps::count(CounterId::XdpDecap, (ctx.data_end() - ctx.data()) as u32);
    Ok(())
}
