//! Forwarding without an overlay, for the benchmark to compare with: what eBPF costs between two pods when nothing is
//! encapsulated and nothing is checked. Never part of the agent.
#![no_std]
#![no_main]
#![expect(
    clippy::needless_pass_by_value,
    reason = "the classifier macro hands the context over by value"
)]

use aya_ebpf::{
    bindings::TC_ACT_UNSPEC,
    helpers::{bpf_redirect, bpf_redirect_peer},
    macros::{classifier, map},
    maps::HashMap,
    programs::TcContext,
};
use network_types::{
    eth::{EthHdr, EtherType},
    ip::{Ipv4Hdr, Ipv6Hdr},
};

/// Where packets to an address go: interface, then destination and source MAC address.
#[repr(C)]
#[derive(Clone, Copy)]
struct Hop {
    ifindex: u32,
    macs: [u8; 12],
}

/// Addresses of remote pods to the uplink and the other node's MAC address.
#[map(name = "remote")]
static REMOTE: HashMap<[u8; 4], Hop> = HashMap::with_max_entries(1024, 0);

/// Addresses of local pods to their veth and MAC address.
#[map(name = "local")]
static LOCAL: HashMap<[u8; 4], Hop> = HashMap::with_max_entries(1024, 0);

/// The same of IPv6.
#[map(name = "remote6")]
static REMOTE6: HashMap<[u8; 16], Hop> = HashMap::with_max_entries(1024, 0);

/// The same of IPv6.
#[map(name = "local6")]
static LOCAL6: HashMap<[u8; 16], Hop> = HashMap::with_max_entries(1024, 0);

/// Ingress of a pod's veth on the host: out of the uplink.
#[classifier]
pub(crate) fn bench_from_pod(ctx: TcContext) -> i32 {
    match hop(&ctx, &REMOTE) {
        // SAFETY: a helper call with plain values.
        Some(ifindex) => (unsafe { bpf_redirect(ifindex, 0) }) as i32,
        None => TC_ACT_UNSPEC,
    }
}

/// Ingress of the uplink: into the pod.
#[classifier]
pub(crate) fn bench_from_wire(ctx: TcContext) -> i32 {
    match hop(&ctx, &LOCAL) {
        // SAFETY: a helper call with plain values.
        Some(ifindex) => (unsafe { bpf_redirect_peer(ifindex, 0) }) as i32,
        None => TC_ACT_UNSPEC,
    }
}

/// [`bench_from_pod`] for IPv6.
#[classifier]
pub(crate) fn bench_from_pod6(ctx: TcContext) -> i32 {
    match hop6(&ctx, &REMOTE6) {
        // SAFETY: a helper call with plain values.
        Some(ifindex) => (unsafe { bpf_redirect(ifindex, 0) }) as i32,
        None => TC_ACT_UNSPEC,
    }
}

/// [`bench_from_wire`] for IPv6.
#[classifier]
pub(crate) fn bench_from_wire6(ctx: TcContext) -> i32 {
    match hop6(&ctx, &LOCAL6) {
        // SAFETY: a helper call with plain values.
        Some(ifindex) => (unsafe { bpf_redirect_peer(ifindex, 0) }) as i32,
        None => TC_ACT_UNSPEC,
    }
}

/// [`hop`] for IPv6, which has no header checksum.
#[inline(always)]
fn hop6(ctx: &TcContext, hops: &HashMap<[u8; 16], Hop>) -> Option<u32> {
    const NEEDED: usize = EthHdr::LEN + Ipv6Hdr::LEN;
    if ctx.data() + NEEDED > ctx.data_end() {
        ctx.pull_data(NEEDED as u32).ok()?;
    }
    let (start, end) = (ctx.data(), ctx.data_end());
    if start + NEEDED > end {
        return None;
    }
    let eth = start as *mut EthHdr;
    let ip = (start + EthHdr::LEN) as *mut Ipv6Hdr;
    // SAFETY: the bounds were just checked; both types are packed and have no invalid values.
    let (ether_type, dst, hops_left) =
        unsafe { ((*eth).ether_type, (*ip).dst_addr, (*ip).hop_limit) };
    if ether_type != u16::from(EtherType::Ipv6) || hops_left <= 1 {
        return None;
    }
    // SAFETY: entries are written before traffic flows, and not changed.
    let hop = unsafe { hops.get(dst) }?;
    // SAFETY: as above; the addresses are the first twelve bytes of the frame.
    unsafe {
        (*ip).hop_limit = hops_left - 1;
        *(start as *mut [u8; 12]) = hop.macs;
    }
    Some(hop.ifindex)
}

/// Rewrites the MAC addresses and counts the hop in the TTL, as any router does.
#[inline(always)]
fn hop(ctx: &TcContext, hops: &HashMap<[u8; 4], Hop>) -> Option<u32> {
    const NEEDED: usize = EthHdr::LEN + Ipv4Hdr::LEN;
    if ctx.data() + NEEDED > ctx.data_end() {
        ctx.pull_data(NEEDED as u32).ok()?;
    }
    let (start, end) = (ctx.data(), ctx.data_end());
    if start + NEEDED > end {
        return None;
    }
    let eth = start as *mut EthHdr;
    let ip = (start + EthHdr::LEN) as *mut Ipv4Hdr;
    // SAFETY: the bounds were just checked; both types are packed and have no invalid values.
    let (ether_type, dst, ttl, check) = unsafe {
        (
            (*eth).ether_type,
            (*ip).dst_addr,
            (*ip).ttl,
            u16::from_be_bytes((*ip).check),
        )
    };
    if ether_type != u16::from(EtherType::Ipv4) || ttl <= 1 {
        return None;
    }
    // SAFETY: entries are written before traffic flows, and not changed.
    let hop = unsafe { hops.get(dst) }?;
    let sum = u32::from(check) + 0x100;
    let sum = (sum + (sum >> 16)) as u16;
    // SAFETY: as above; the addresses are the first twelve bytes of the frame.
    unsafe {
        (*ip).ttl = ttl - 1;
        (*ip).check = sum.to_be_bytes();
        *(start as *mut [u8; 12]) = hop.macs;
    }
    Some(hop.ifindex)
}

/// The licence the kernel reads: some helpers are for GPL-compatible programs only.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    // Never reached: nothing in these programs panics, or the verifier would refuse them.
    loop {}
}
