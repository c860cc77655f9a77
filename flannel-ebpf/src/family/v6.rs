//! What the programs for IPv6 over IPv6 have of their own.
//!
//! Two things differ from IPv4. The outer UDP checksum must be there, so only packets are encapsulated here whose own checksum stands for
//! their payload ([`inner_sum`]); super-packets would need a checksum for each segment, which only the tunnel device can have made. And a
//! checksum that no device has verified can be verified here, from headers alone.
//!
//! Where there is no tunnel device but a pair of veths, both kinds of packet go through the pair. Its near end offloads nothing, so that at
//! the far end they are in pieces as they go to the wire, and every byte of them can be summed up.

use aya_ebpf::{
    bindings::{__sk_buff, BPF_CSUM_LEVEL_QUERY},
    helpers::{bpf_csum_diff, bpf_csum_level, bpf_csum_update, bpf_skb_load_bytes},
    programs::{TcContext, XdpContext},
};
use flannel_common::{
    DropReason, checksum, config_flags, ecn,
    flow::{AddressV6, PROTO_TCP, PROTO_UDP},
    header_v6,
};
use network_types::{
    eth::{EthHdr, EtherType},
    ip::Ipv6Hdr,
    udp::UdpHdr,
};

use crate::access::{Bytes, copy, header as read, linear, load, sum_words};

pub(crate) use flannel_common::{
    ConfigV6 as Config, NodeRecordV6 as NodeRecord, OVERHEAD_V6 as OVERHEAD,
    flow::PROTO_ICMPV6 as PROTO_ICMP,
    header_v6::{HEADER_LEN, INNER_ETH, IP, UDP, VXLAN},
    map::{BARE_MAGIC_V6 as BARE_MAGIC, subnet_index_v6 as subnet_index},
};

pub(crate) type Address = AddressV6;
pub(crate) type IpHdr = Ipv6Hdr;

pub(crate) const ETHER_TYPE: EtherType = EtherType::Ipv6;
/// The other family's, as it is in a frame.
pub(crate) const OTHER_ETHER_TYPE: [u8; 2] = [0x08, 0x00];
/// The same as it is in a frame.
pub(crate) const ETHER_TYPE_BYTES: [u8; 2] = [0x86, 0xdd];
/// Why a packet of another family is not carried.
pub(crate) const NOT_THIS_FAMILY: DropReason = DropReason::NotIpv6;
/// Length of a header without extensions.
pub(crate) const IP_LEN: usize = Ipv6Hdr::LEN;
/// The part of a header that a router changes: up to its hop limit.
pub(crate) const IP_PART: usize = 8;
/// `ICMPv6` echo request and reply.
pub(crate) const ECHO: [u8; 2] = [128, 129];
/// `ICMPv6` errors: unreachable, packet too big, time exceeded, parameter problem.
pub(crate) const ERRORS: [u8; 4] = [1, 2, 3, 4];
/// Whether the tunnel device must encapsulate super-packets: the outer checksum is another one for each segment.
pub(crate) const GSO_BY_DEVICE: bool = true;
/// Whether UDP may do without a checksum.
pub(crate) const UDP_UNSUMMED: bool = false;

/// Offset of the outer addresses, up to which nothing is under the UDP checksum.
const ADDRESSES: usize = IP + 8;
const NEXT_FRAGMENT: u8 = 44;
/// Length of a fragment header.
const FRAGMENT_LEN: usize = 8;

#[inline(always)]
pub(crate) fn source(ip: &Ipv6Hdr) -> Address {
    copy(&ip.src_addr)
}

#[inline(always)]
pub(crate) fn destination(ip: &Ipv6Hdr) -> Address {
    copy(&ip.dst_addr)
}

/// Whether the first address counts as the local end between two pods of a node.
#[inline(always)]
pub(crate) fn is_below(a: Address, b: Address) -> bool {
    let (a, b) = (halves(&a), halves(&b));
    a[0] < b[0] || (a[0] == b[0] && a[1] < b[1])
}

#[inline(always)]
fn halves(address: &Address) -> [u64; 2] {
    let from: *const u8 = address.as_ptr();
    // SAFETY: sixteen bytes from here are readable, and every bit pattern is a number.
    unsafe {
        [
            u64::from_be(load::<u64>(from)),
            u64::from_be(load::<u64>(from.add(8))),
        ]
    }
}

#[inline(always)]
fn is_same(a: &Address, b: &Address) -> bool {
    let (a, b) = (halves(a), halves(b));
    a[0] == b[0] && a[1] == b[1]
}

#[inline(always)]
pub(crate) const fn hops(ip: &Ipv6Hdr) -> u8 {
    ip.hop_limit
}

#[inline(always)]
pub(crate) const fn protocol(ip: &Ipv6Hdr) -> u8 {
    ip.next_hdr
}

/// The traffic class.
#[inline(always)]
pub(crate) const fn tos(ip: &Ipv6Hdr) -> u8 {
    ip.vcf[0] << 4 | ip.vcf[1] >> 4
}

/// Length of the packet in bytes, as its header has it; of a jumbogram only the header's.
#[inline(always)]
pub(crate) fn packet_len(ip: &Ipv6Hdr) -> u32 {
    u32::from(u16::from_be_bytes(ip.payload_len)) + IP_LEN as u32
}

/// Length of the header in bytes.
#[inline(always)]
pub(crate) const fn header_len(_ip: &Ipv6Hdr) -> u32 {
    IP_LEN as u32
}

/// Whether it is one at all. Extension headers, fragments among them, show as protocols that nobody here follows.
#[inline(always)]
pub(crate) const fn is_whole(ip: &Ipv6Hdr) -> bool {
    ip.vcf[0] >> 4 == 6
}

/// The part that a router changes, after one more hop, with this traffic class.
#[inline(always)]
pub(crate) const fn next_hop(ip: &Ipv6Hdr, tos: u8) -> [u8; IP_PART] {
    let mut part = with_tos(ip, tos);
    part[7] = ip.hop_limit.wrapping_sub(1);
    part
}

/// The part that a router changes, with this traffic class.
#[inline(always)]
pub(crate) const fn with_tos(ip: &Ipv6Hdr, tos: u8) -> [u8; IP_PART] {
    [
        ip.vcf[0] & 0xf0 | tos >> 4,
        ip.vcf[1] & 0x0f | tos << 4,
        ip.vcf[2],
        ip.vcf[3],
        ip.payload_len[0],
        ip.payload_len[1],
        ip.next_hdr,
        ip.hop_limit,
    ]
}

/// Tells the kernel what a change of that part does to the sum over the packet that it may have (`CHECKSUM_COMPLETE`). Nothing in the
/// header makes up for the change, and UDP drops a packet at the pod when a sum that software has made is wrong (`udp6_csum_init`).
#[inline(always)]
pub(crate) fn account(ctx: &TcContext, was: &Ipv6Hdr, part: &[u8; IP_PART]) {
    let change = |now: [u8; 2], was: [u8; 2]| {
        u32::from(u16::from_ne_bytes(now)) + u32::from(!u16::from_ne_bytes(was))
    };
    // The words of the traffic class and of the hop limit.
    let sum = change([part[0], part[1]], [was.vcf[0], was.vcf[1]])
        + change([part[6], part[7]], [was.next_hdr, was.hop_limit]);
    // SAFETY: a helper call on the context. It fails where there is no such sum.
    unsafe { bpf_csum_update(ctx.skb.skb, sum) };
}

/// The outer headers of a packet to us, as far as they concern the decapsulation.
#[derive(Clone, Copy)]
pub(crate) struct Outer {
    pub(crate) tos: u8,
    /// Length of the IP packet in bytes.
    pub(crate) total: u32,
    /// Length of the UDP packet in bytes.
    pub(crate) udp: u32,
    check: [u8; 2],
}

impl Outer {
    #[inline(always)]
    fn of(ip: &Ipv6Hdr, udp: UdpHdr) -> Self {
        Self {
            tos: tos(ip),
            total: packet_len(ip),
            udp: u32::from(u16::from_be_bytes(udp.len)),
            check: udp.check,
        }
    }
}

/// Reads the outer headers. `None`: not a packet of the overlay to us.
#[inline(always)]
pub(crate) fn outer(ctx: &TcContext, config: &Config) -> Result<Option<Outer>, DropReason> {
    let Some(eth) = read::<EthHdr>(ctx, 0) else {
        return Ok(None);
    };
    let Some(ip) = read::<Ipv6Hdr>(ctx, IP) else {
        return Ok(None);
    };
    if eth.ether_type != u16::from(ETHER_TYPE)
        || !is_whole(&ip)
        || !is_same(&ip.dst_addr, &copy(&config.local))
    {
        return Ok(None);
    }
    if ip.next_hdr == NEXT_FRAGMENT {
        return fragment(ctx, config);
    }
    // Behind other extension headers nobody looks: the stack does.
    if ip.next_hdr != PROTO_UDP {
        return Ok(None);
    }
    let Some(udp) = read::<UdpHdr>(ctx, UDP) else {
        return Ok(None);
    };
    Ok((udp.dst == copy(&config.port)).then_some(Outer::of(&ip, udp)))
}

/// A fragment: ours to count only if it is the first and goes to our port; otherwise nobody can tell.
#[inline(always)]
fn fragment(ctx: &TcContext, config: &Config) -> Result<Option<Outer>, DropReason> {
    if !linear(ctx, (UDP + FRAGMENT_LEN + UdpHdr::LEN) as u32) {
        return Ok(None);
    }
    let Some(header) = read::<[u8; FRAGMENT_LEN]>(ctx, UDP) else {
        return Ok(None);
    };
    let first = header[0] == PROTO_UDP && u16::from_be_bytes([header[2], header[3]]) & 0xfff8 == 0;
    match read::<UdpHdr>(ctx, UDP + FRAGMENT_LEN) {
        Some(udp) if first && udp.dst == copy(&config.port) => Err(DropReason::OuterFragment),
        _ => Ok(None),
    }
}

/// What the kernel's IP and UDP layers would refuse of the outer headers.
#[inline(always)]
pub(crate) fn check_outer(
    ctx: &TcContext,
    config: &Config,
    outer: &Outer,
    inner: &Ipv6Hdr,
) -> Result<(), DropReason> {
    let ip: Ipv6Hdr = read(ctx, IP).ok_or(DropReason::TooShort)?;
    if is_martian(&ip.src_addr, &copy(&config.local)) {
        return Err(DropReason::OuterSource);
    }
    // SAFETY: a helper call on the context.
    let verified = unsafe { bpf_csum_level(ctx.skb.skb, u64::from(BPF_CSUM_LEVEL_QUERY)) } >= 0;
    // Without a checksum the kernel refuses it, and says so where it counts such packets.
    if outer.check == [0, 0] {
        return Err(DropReason::OuterChecksum);
    }
    if verified || is_summed(ctx, outer, inner) {
        return Ok(());
    }
    // Alone there is nobody else to read the packet.
    if config.flags & config_flags::ALONE != 0
        && is_right(ctx.skb.skb, outer.udp, u16::from_be_bytes(outer.check))
    {
        return Ok(());
    }
    Err(DropReason::OuterChecksum)
}

/// Whether the outer checksum is right, from every byte of the packet.
#[inline(never)]
fn is_right(skb: *mut __sk_buff, len: u32, check: u16) -> bool {
    let addresses = sum_bytes(skb, ADDRESSES as u64, 32);
    let pseudo = header_v6::pseudo_sum(addresses, len);
    let len = u64::from(len);
    header_v6::is_left_to_device(pseudo, check)
        || len <= LONGEST
            && checksum::fold(pseudo + u32::from(sum_bytes(skb, UDP as u64, len))) == 0xffff
}

/// Whether the outer checksum is right, as far as headers tell; the payload is under the inner packet's own, which its receiver verifies.
#[inline(always)]
fn is_summed(ctx: &impl Bytes, outer: &Outer, inner: &Ipv6Hdr) -> bool {
    if packet_len(inner) + OVERHEAD != outer.total
        || !sum_stands_for_payload(ctx, HEADER_LEN, inner)
    {
        return false;
    }
    let Some(words) = sum_words(ctx, ADDRESSES, HEADER_LEN - ADDRESSES) else {
        return false;
    };
    let sum = u32::from(checksum::fold_words(words))
        + u32::from(PROTO_UDP)
        + outer.udp
        + header_v6::inner_sum(with_tos(inner, tos(inner)));
    checksum::fold(sum) == 0xffff
}

/// Whether a packet, whose header is at `at`, has a checksum of its own over all that follows the header.
#[inline(always)]
fn sum_stands_for_payload(ctx: &impl Bytes, at: usize, ip: &Ipv6Hdr) -> bool {
    if !is_whole(ip) {
        return false;
    }
    match ip.next_hdr {
        PROTO_TCP | PROTO_ICMP => true,
        PROTO_UDP => read::<UdpHdr>(ctx, at + IP_LEN).is_some_and(|udp| udp.check != [0, 0]),
        _ => false,
    }
}

/// Whether the kernel refuses packets from this address (`ip6_rcv_core`): loopback, multicast, none; and our own.
#[inline(always)]
fn is_martian(source: &Address, local: &Address) -> bool {
    let [high, low] = halves(source);
    source[0] == 0xff || (high == 0 && low <= 1) || is_same(source, local)
}

/// The outer headers of a packet that is in every respect as peers send it, before anybody has looked at it.
#[inline(always)]
pub(crate) fn plain_outer(ctx: &impl Bytes, config: &Config, inner: &Ipv6Hdr) -> Option<Outer> {
    let ip: Ipv6Hdr = read(ctx, IP)?;
    let udp: UdpHdr = read(ctx, UDP)?;
    let outer = Outer::of(&ip, udp);
    let plain = is_whole(&ip)
        && ip.next_hdr == PROTO_UDP
        && is_same(&ip.dst_addr, &copy(&config.local))
        && udp.dst == copy(&config.port)
        && udp.check != [0, 0]
        && !is_martian(&ip.src_addr, &copy(&config.local))
        && is_summed(ctx, &outer, inner);
    plain.then_some(outer)
}

/// Whether native XDP takes such outer headers off.
#[inline(always)]
pub(crate) fn may_be_stripped(ctx: &TcContext, outer: &Outer, inner: &Ipv6Hdr) -> bool {
    // A checksum that only the device has verified is one that XDP leaves alone.
    is_summed(ctx, outer, inner)
}

/// What the inner packet adds to the outer checksum, if that can be told: from headers, or where `whole` from all of it.
#[inline(always)]
pub(crate) fn inner_sum(
    ctx: &TcContext,
    inner: &Ipv6Hdr,
    hop: bool,
    whole: bool,
) -> Result<u32, DropReason> {
    // SAFETY: a read of a context field, which the verifier turns into a checked load.
    if unsafe { (*ctx.skb.skb).gso_size } != 0 {
        return Err(DropReason::Gso);
    }
    if linear(ctx, (EthHdr::LEN + IP_LEN + UdpHdr::LEN) as u32)
        && packet_len(inner) + EthHdr::LEN as u32 == ctx.len()
        && sum_stands_for_payload(ctx, EthHdr::LEN, inner)
    {
        let start = if hop {
            next_hop(inner, tos(inner))
        } else {
            with_tos(inner, tos(inner))
        };
        return Ok(header_v6::inner_sum(start));
    }
    if !whole {
        return Err(DropReason::Protocol);
    }
    let at = EthHdr::LEN as u64;
    let len = u64::from(ctx.len()) - at;
    if len > LONGEST {
        return Err(DropReason::TooLong);
    }
    Ok(u32::from(sum_bytes(ctx.skb.skb, at, len)))
}

/// The most bytes that are summed up: no Ethernet carries longer packets.
const LONGEST: u64 = 0x4000;

/// The one's complement sum of `len` bytes of the packet from byte `at` on, an even number.
///
/// A function of its own: its buffer is no part of the frame of the programs that call it.
#[inline(never)]
fn sum_bytes(skb: *mut __sk_buff, at: u64, len: u64) -> u16 {
    const CHUNK: u64 = 64;
    let mut chunk = [0u64; CHUNK as usize / 8];
    let mut sum = 0;
    let mut done = 0;
    while done <= LONGEST {
        let rest = len - done;
        let from = (at + done) as u32;
        let to: *mut u64 = chunk.as_mut_ptr();
        // SAFETY: the buffer has room for a chunk. What cannot be read leaves it as it is, and the sum wrong: nobody takes such a packet.
        unsafe {
            if rest < CHUNK {
                if rest == 0 {
                    break;
                }
                chunk = [0; CHUNK as usize / 8];
                // Its bounds in a way that the verifier understands and the compiler cannot take for said already: 5.10 does not see that
                // what is not zero is at least one.
                let rest =
                    (core::ptr::read_volatile(&raw const rest).wrapping_sub(1) & (CHUNK - 1)) + 1;
                bpf_skb_load_bytes(skb.cast(), from, to.cast(), rest as u32);
            } else {
                bpf_skb_load_bytes(skb.cast(), from, to.cast(), CHUNK as u32);
            }
            sum = bpf_csum_diff(core::ptr::null_mut(), 0, to.cast(), CHUNK as u32, sum) as u32;
        }
        if rest < CHUNK {
            break;
        }
        done += CHUNK;
    }
    checksum::fold_words(u64::from(sum))
}

/// Fills what of the prebuilt header depends on the packet; `sum` is what the inner one adds to the checksum.
#[inline(always)]
pub(crate) fn complete(
    out: &mut [u8; HEADER_LEN],
    node: &NodeRecord,
    inner: &Ipv6Hdr,
    sum: u32,
    inner_len: u32,
    port: u16,
) {
    header_v6::complete(
        out,
        node.udp_sum,
        sum,
        inner_len,
        ecn::outer_for(tos(inner)),
        port,
    );
}

/// Nothing comes behind the program of native XDP for IPv6: that for IPv4 has the interface where there are both.
#[inline(always)]
pub(crate) const fn hand_on(_ctx: &XdpContext, _frags: bool) {}
