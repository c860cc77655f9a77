//! What the programs for IPv4 over IPv4 have of their own.

use aya_ebpf::{
    bindings::BPF_CSUM_LEVEL_QUERY,
    helpers::{bpf_csum_level, bpf_get_prandom_u32},
    macros::map,
    maps::ProgramArray,
    programs::{TcContext, XdpContext},
};
use flannel_common::{DropReason, checksum, config_flags, ecn, flow::AddressV4, header};
use network_types::{
    eth::{EthHdr, EtherType},
    ip::Ipv4Hdr,
    udp::UdpHdr,
};

use crate::access::{Bytes, copy, header as read, sum_words};

pub(crate) use flannel_common::{
    Config, NodeRecord, OVERHEAD_V4 as OVERHEAD,
    flow::PROTO_ICMP,
    header::{HEADER_LEN, INNER_ETH, IP, UDP, VXLAN},
    map::{BARE_MAGIC, subnet_index},
};

pub(crate) type Address = AddressV4;
pub(crate) type IpHdr = Ipv4Hdr;

pub(crate) const ETHER_TYPE: EtherType = EtherType::Ipv4;
/// The other family's, as it is in a frame.
pub(crate) const OTHER_ETHER_TYPE: [u8; 2] = [0x86, 0xdd];
/// The same as it is in a frame.
pub(crate) const ETHER_TYPE_BYTES: [u8; 2] = [0x08, 0x00];
/// Why a packet of another family is not carried.
pub(crate) const NOT_THIS_FAMILY: DropReason = DropReason::NotIpv4;
/// Length of a header without options.
pub(crate) const IP_LEN: usize = Ipv4Hdr::LEN;
/// The part of a header that a router changes: up to its checksum.
pub(crate) const IP_PART: usize = 12;
/// ICMP echo request and reply.
pub(crate) const ECHO: [u8; 2] = [8, 0];
/// ICMP errors: unreachable, time exceeded, parameter problem.
pub(crate) const ERRORS: [u8; 3] = [3, 11, 12];
/// Whether the tunnel device must encapsulate super-packets: here the outer header is right for every segment.
pub(crate) const GSO_BY_DEVICE: bool = false;
/// Whether UDP may do without a checksum.
pub(crate) const UDP_UNSUMMED: bool = true;

const PROTO_UDP: u8 = 17;
const MORE_FRAGMENTS: u16 = 0x2000;
const OFFSET: u16 = 0x1fff;
/// What makes an IPv4 packet a fragment: anything in the field but the DF bit.
const FRAGMENT: u16 = MORE_FRAGMENTS | OFFSET;

#[inline(always)]
pub(crate) const fn source(ip: &Ipv4Hdr) -> Address {
    ip.src_addr
}

#[inline(always)]
pub(crate) const fn destination(ip: &Ipv4Hdr) -> Address {
    ip.dst_addr
}

/// Whether the first address counts as the local end between two pods of a node.
#[inline(always)]
pub(crate) const fn is_below(a: Address, b: Address) -> bool {
    u32::from_be_bytes(a) < u32::from_be_bytes(b)
}

#[inline(always)]
pub(crate) const fn hops(ip: &Ipv4Hdr) -> u8 {
    ip.ttl
}

#[inline(always)]
pub(crate) const fn protocol(ip: &Ipv4Hdr) -> u8 {
    ip.proto
}

#[inline(always)]
pub(crate) const fn tos(ip: &Ipv4Hdr) -> u8 {
    ip.tos
}

/// Length of the packet in bytes, as its header has it.
#[inline(always)]
pub(crate) fn packet_len(ip: &Ipv4Hdr) -> u32 {
    u32::from(u16::from_be_bytes(ip.tot_len))
}

/// Length of the header in bytes.
#[inline(always)]
pub(crate) fn header_len(ip: &Ipv4Hdr) -> u32 {
    u32::from(ip.vihl & 0x0f) * 4
}

/// Whether it has no options and is no fragment.
#[inline(always)]
pub(crate) fn is_whole(ip: &Ipv4Hdr) -> bool {
    ip.vihl == 0x45 && u16::from_be_bytes(ip.frags) & FRAGMENT == 0
}

/// The part that a router changes, after one more hop, with this type of service.
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

/// The part that a router changes, with this type of service.
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

/// Tells the kernel what a change of that part does to the sum over the packet that it may have: nothing, as the header's own
/// checksum makes up for it.
#[inline(always)]
pub(crate) const fn account(_ctx: &TcContext, _was: &Ipv4Hdr, _part: &[u8; IP_PART]) {}

/// The outer headers of a packet to us, as far as they concern the decapsulation.
#[derive(Clone, Copy)]
pub(crate) struct Outer {
    pub(crate) tos: u8,
    /// Length of the IP packet in bytes.
    pub(crate) total: u32,
    /// Length of the UDP packet in bytes.
    pub(crate) udp: u32,
    source: Address,
    check: [u8; 2],
}

/// Reads the outer headers. `None`: not a packet of the overlay to us.
#[inline(always)]
pub(crate) fn outer(ctx: &TcContext, config: &Config) -> Result<Option<Outer>, DropReason> {
    let Some(eth) = read::<EthHdr>(ctx, 0) else {
        return Ok(None);
    };
    let Some(ip) = read::<Ipv4Hdr>(ctx, IP) else {
        return Ok(None);
    };
    if eth.ether_type != u16::from(ETHER_TYPE)
        || ip.proto != PROTO_UDP
        || ip.dst_addr != copy(&config.local)
    {
        return Ok(None);
    }
    if u16::from_be_bytes(ip.frags) & FRAGMENT != 0 {
        // Which port it goes to only the first fragment says, and the kernel puts them together anyway.
        return fragment(ctx, config, &ip);
    }
    if ip.vihl != 0x45 {
        return options(ctx, config, &ip);
    }
    let Some(udp) = read::<UdpHdr>(ctx, UDP) else {
        return Ok(None);
    };
    Ok((udp.dst == copy(&config.port)).then_some(Outer {
        tos: ip.tos,
        total: packet_len(&ip),
        udp: u32::from(u16::from_be_bytes(udp.len)),
        source: ip.src_addr,
        check: udp.check,
    }))
}

/// A fragment: ours to count only if it is the first and goes to our port; otherwise nobody can tell.
#[inline(always)]
fn fragment(ctx: &TcContext, config: &Config, ip: &Ipv4Hdr) -> Result<Option<Outer>, DropReason> {
    let first = u16::from_be_bytes(ip.frags) & OFFSET == 0 && ip.vihl == 0x45;
    match read::<UdpHdr>(ctx, UDP) {
        Some(udp) if first && udp.dst == copy(&config.port) => Err(DropReason::OuterFragment),
        _ => Ok(None),
    }
}

/// A header with options: the UDP header is further down, at a place that depends on the packet.
#[inline(always)]
fn options(ctx: &TcContext, config: &Config, ip: &Ipv4Hdr) -> Result<Option<Outer>, DropReason> {
    let len = header_len(ip);
    if ip.vihl >> 4 != 4 || len <= Ipv4Hdr::LEN as u32 {
        return Ok(None);
    }
    match ctx.load::<UdpHdr>(EthHdr::LEN + len as usize) {
        Ok(udp) if udp.dst == copy(&config.port) => Err(DropReason::OuterOptions),
        _ => Ok(None),
    }
}

/// What the kernel's IP and UDP layers would refuse of the outer headers.
#[inline(always)]
pub(crate) fn check_outer(
    ctx: &TcContext,
    config: &Config,
    outer: &Outer,
    _inner: &Ipv4Hdr,
) -> Result<(), DropReason> {
    if !is_summed(ctx) {
        return Err(DropReason::OuterHeader);
    }
    if is_martian(outer.source, copy(&config.local)) {
        return Err(DropReason::OuterSource);
    }
    // What the device has not verified the kernel verifies. Alone there is nobody to ask, and RFC 7348 (section 5) lets a
    // receiver do without: a program cannot tell a sum not looked at from one that a local sender left to its device.
    if outer.check != [0, 0]
        && config.flags & config_flags::ALONE == 0
        // SAFETY: a helper call on the context.
        && unsafe { bpf_csum_level(ctx.skb.skb, u64::from(BPF_CSUM_LEVEL_QUERY)) } < 0
    {
        return Err(DropReason::OuterChecksum);
    }
    Ok(())
}

/// Whether the outer header's checksum is right.
#[inline(always)]
fn is_summed(ctx: &impl Bytes) -> bool {
    sum_words(ctx, IP, IP_LEN).is_some_and(|sum| checksum::fold_words(sum) == 0xffff)
}

/// Whether the kernel refuses packets from this address (`ip_route_input_slow`, `fib_validate_source`). What depends on its
/// routes, such as a subnet's broadcast address and `rp_filter`, is not looked at.
#[inline(always)]
fn is_martian(source: Address, local: Address) -> bool {
    source[0] == 127
        || source[0] >> 4 == 0xe
        || source == [0; 4]
        || source == [0xff; 4]
        || source == local
}

/// The outer headers of a packet that is in every respect as peers send it, before anybody has looked at it.
#[inline(always)]
pub(crate) fn plain_outer(ctx: &impl Bytes, config: &Config, _inner: &Ipv4Hdr) -> Option<Outer> {
    let ip: Ipv4Hdr = read(ctx, IP)?;
    let udp: UdpHdr = read(ctx, UDP)?;
    let plain = ip.vihl == 0x45
        && ip.proto == PROTO_UDP
        && ip.dst_addr == copy(&config.local)
        && u16::from_be_bytes(ip.frags) & FRAGMENT == 0
        && udp.dst == copy(&config.port)
        // Nobody has verified anything yet.
        && udp.check == [0, 0]
        && is_summed(ctx)
        && !is_martian(ip.src_addr, copy(&config.local));
    plain.then_some(Outer {
        tos: ip.tos,
        total: packet_len(&ip),
        udp: u32::from(u16::from_be_bytes(udp.len)),
        source: ip.src_addr,
        check: udp.check,
    })
}

/// Whether native XDP takes such outer headers off.
#[inline(always)]
pub(crate) fn may_be_stripped(_ctx: &TcContext, outer: &Outer, _inner: &Ipv4Hdr) -> bool {
    outer.check == [0, 0]
}

/// What the inner packet adds to the outer checksum: there is none.
#[inline(always)]
#[expect(clippy::unnecessary_wraps, reason = "IPv6 has conditions")]
pub(crate) const fn inner_sum(
    _ctx: &TcContext,
    _inner: &Ipv4Hdr,
    _hop: bool,
    _whole: bool,
) -> Result<u32, DropReason> {
    Ok(0)
}

/// Fills what of the prebuilt header depends on the packet.
#[inline(always)]
pub(crate) fn complete(
    out: &mut [u8; HEADER_LEN],
    node: &NodeRecord,
    inner: &Ipv4Hdr,
    _sum: u32,
    inner_len: u32,
    port: u16,
) {
    // SAFETY: a helper without parameters.
    let id = unsafe { bpf_get_prandom_u32() as u16 };
    header::complete(
        out,
        node.ip_sum,
        inner_len,
        ecn::outer_for(inner.tos),
        id,
        port,
    );
}

/// What native XDP goes on with for packets of IPv6: an interface takes one program, and where both families are carried it is the one for
/// IPv4. The agent puts that for IPv6 here.
#[map(name = "xdp_next")]
static XDP_NEXT: ProgramArray = ProgramArray::with_max_entries(1, 0);

/// The same for programs that take frames of several buffers: the kernel lets none of them into an array of others.
#[map(name = "xdp_next_frags")]
static XDP_NEXT_FRAGS: ProgramArray = ProgramArray::with_max_entries(1, 0);

/// Goes on with the program for IPv6, if the frame is one for it and there is such a program. Returns otherwise.
#[inline(always)]
pub(crate) fn hand_on(ctx: &XdpContext, frags: bool) {
    let eth: Option<EthHdr> = read(ctx, 0);
    if eth.is_some_and(|eth| eth.ether_type == u16::from(EtherType::Ipv6)) {
        let next = if frags { &XDP_NEXT_FRAGS } else { &XDP_NEXT };
        // SAFETY: nothing is left to be done here.
        unsafe { next.tail_call(ctx, 0) };
    }
}
