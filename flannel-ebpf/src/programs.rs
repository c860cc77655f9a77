//! The programs: one entry per hook, the policy of each on one screen.
//!
//! With a kernel vxlan device under it, the slow path is always to hand the packet on *unchanged*: that device then does
//! what it always did. Without one ([`config_flags::ALONE`]) what cannot be carried is dropped and counted.
#![expect(
    clippy::needless_pass_by_value,
    reason = "the classifier macro hands the context over by value"
)]

use aya_ebpf::{
    bindings::{BPF_F_INGRESS, TC_ACT_SHOT, TC_ACT_UNSPEC, xdp_action},
    helpers::{bpf_redirect, bpf_redirect_neigh, bpf_redirect_peer},
    macros::{classifier, xdp},
    programs::{TcContext, XdpContext},
};
use flannel_common::{CounterId, Direction, DropReason, config_flags, flow::mode};

use crate::{
    decap, encap,
    family::{self, Config},
    link, maps, pod, probe, xdp,
};

/// What a program decided about a packet that it understood.
///
/// A struct, not an enum with fields: LLVM merges the absent fields of an enum into whatever a register last held, and spills
/// that with a width which the verifier refuses for a pointer.
#[derive(Clone, Copy)]
pub(crate) struct Verdict {
    pub(crate) kind: Kind,
    pub(crate) ifindex: u32,
    pub(crate) bytes: u32,
}

#[derive(Clone, Copy)]
pub(crate) enum Kind {
    /// Not a packet of the overlay: none of our business.
    NotOurs,
    /// Encapsulated, outer MAC addresses complete: send it on this interface.
    Send,
    /// Encapsulated, next hop unknown to us: let the kernel resolve it.
    Resolve,
    /// Decapsulated: let the stack receive it on this interface.
    Receive,
    /// From a pod, past the stack, encapsulated, outer MAC addresses complete: send it on this interface.
    SendFast,
    /// From another node, past the stack: to the other end of this interface's veth pair.
    Deliver,
    /// From a pod of this node, past the stack: to the other end of this interface's veth pair.
    HandOver,
    /// From a pod, past the stack, to a node on the same link: send it on this interface as it is.
    SendRouted,
    /// From a node on the same link, past the stack: to the other end of this interface's veth pair.
    DeliverRouted,
}

impl Verdict {
    pub(crate) const NOT_OURS: Self = Self {
        kind: Kind::NotOurs,
        ifindex: 0,
        bytes: 0,
    };
}

/// Egress of `flannel.<vni>`: encapsulates what the host stack routed to a peer's subnet. Of IPv6 without a vxlan device, also ingress of
/// the other end of the pair, for what comes through it.
#[classifier]
pub(crate) fn to_overlay(ctx: TcContext) -> i32 {
    let Some(config) = maps::config() else {
        return slow(Direction::Encap, DropReason::Disabled, 0);
    };
    match encap::try_to_overlay(&ctx, config) {
        Ok(verdict) => carry(verdict),
        // It has room for outer headers between its own: nobody can make anything of it.
        Err(DropReason::Torn) => discard(Direction::Encap, DropReason::Torn),
        Err(reason) => slow(Direction::Encap, reason, config.flags),
    }
}

/// Ingress of the uplink: decapsulates the overlay's packets that are for this node.
#[classifier]
pub(crate) fn from_wire(ctx: TcContext) -> i32 {
    let Some(config) = maps::config() else {
        return TC_ACT_UNSPEC;
    };
    match decap::try_from_wire(&ctx, config) {
        Ok(verdict) => carry(verdict),
        Err(DropReason::Torn) => discard(Direction::Decap, DropReason::Torn),
        // Whatever else is on this node may own these: another network's packets are never dropped on a missing device's behalf.
        // Fragments and outer options are the stack's to deal with, to which the agent listens where there is no device.
        Err(
            reason @ (DropReason::Disabled
            // As it was, or without its outer headers: then the stack takes it for one from the uplink, and routes it.
            | DropReason::Store
            | DropReason::OtherVni
            | DropReason::OuterFragment
            | DropReason::OuterOptions),
        ) => slow(Direction::Decap, reason, 0),
        Err(reason) => slow(Direction::Decap, reason, config.flags),
    }
}

/// Ingress of a pod's veth on the host: what the pod sends.
#[classifier]
pub(crate) fn from_pod(ctx: TcContext) -> i32 {
    let Some(config) = gated() else {
        return TC_ACT_UNSPEC;
    };
    // The program of the other family, before this one or behind it, has its own use for what numbers a packet.
    if pod::is_of_other_family(&ctx) {
        return TC_ACT_UNSPEC;
    }
    match pod::try_from_pod(&ctx, config) {
        Ok(verdict) => carry(verdict),
        Err(reason) => discard(Direction::Encap, reason),
    }
}

/// Egress of a pod's veth on the host: what the stack delivers to the pod.
#[classifier]
pub(crate) fn to_pod(ctx: TcContext) -> i32 {
    if let Some(config) = gated() {
        pod::try_to_pod(&ctx, config);
    }
    TC_ACT_UNSPEC
}

/// Ingress of `flannel.<vni>`: what the kernel has decapsulated, and what `from_wire` has put there.
#[classifier]
pub(crate) fn from_overlay(ctx: TcContext) -> i32 {
    let Some(config) = gated() else {
        return TC_ACT_UNSPEC;
    };
    carry(pod::try_from_overlay(&ctx, config))
}

/// Egress of the uplink: what the stack has routed to a peer on the same link.
#[classifier]
pub(crate) fn to_link(ctx: TcContext) -> i32 {
    if let Some(config) = gated() {
        link::try_to_link(&ctx, config);
    }
    TC_ACT_UNSPEC
}

/// Native XDP on the uplink: takes the outer headers off before the driver makes a socket buffer.
#[xdp]
pub(crate) fn xdp_decap(ctx: XdpContext) -> u32 {
    strip(&ctx, false)
}

/// The same for drivers that receive into several buffers (jumbo frames); kernels before 5.18 refuse to load it.
#[xdp(frags)]
pub(crate) fn xdp_decap_frags(ctx: XdpContext) -> u32 {
    strip(&ctx, true)
}

#[inline(always)]
fn strip(ctx: &XdpContext, frags: bool) -> u32 {
    match xdp::try_xdp_decap(ctx) {
        None => {
            family::hand_on(ctx, frags);
            xdp_action::XDP_PASS
        }
        Some(Ok(())) => xdp_action::XDP_PASS,
        Some(Err(reason)) => {
            maps::count_reason(Direction::Decap, reason);
            xdp_action::XDP_DROP
        }
    }
}

/// The configuration, if the flow gate is on.
#[inline(always)]
fn gated() -> Option<&'static Config> {
    maps::config().filter(|config| config.mode != mode::OFF)
}

/// Runs `bpf_skb_adjust_room` with flags that the agent wants to know about; see [`crate::probe`].
#[classifier]
pub(crate) fn probe_room(ctx: TcContext) -> i32 {
    probe::adjust_room(&ctx)
}

#[inline(always)]
fn carry(verdict: Verdict) -> i32 {
    let Verdict {
        kind,
        ifindex,
        bytes,
    } = verdict;
    match kind {
        Kind::NotOurs => TC_ACT_UNSPEC,
        Kind::Send => {
            count_encap(bytes);
            // SAFETY: a helper call with plain values.
            (unsafe { bpf_redirect(ifindex, 0) }) as i32
        }
        Kind::Resolve => {
            count_encap(bytes);
            // SAFETY: no parameters: the kernel routes by the outer header.
            (unsafe { bpf_redirect_neigh(ifindex, core::ptr::null_mut(), 0, 0) }) as i32
        }
        Kind::Receive => {
            maps::count(CounterId::BpfDecap, bytes);
            // SAFETY: a helper call with plain values.
            (unsafe { bpf_redirect(ifindex, u64::from(BPF_F_INGRESS)) }) as i32
        }
        Kind::SendFast => {
            maps::count(CounterId::FastEncap, bytes);
            // SAFETY: a helper call with plain values.
            (unsafe { bpf_redirect(ifindex, 0) }) as i32
        }
        Kind::Deliver => {
            maps::count(CounterId::FastDecap, bytes);
            // SAFETY: a helper call with plain values.
            (unsafe { bpf_redirect_peer(ifindex, 0) }) as i32
        }
        Kind::HandOver => {
            maps::count(CounterId::FastLocal, bytes);
            // SAFETY: a helper call with plain values.
            (unsafe { bpf_redirect_peer(ifindex, 0) }) as i32
        }
        Kind::SendRouted => {
            maps::count(CounterId::FastRoutedOut, bytes);
            // SAFETY: a helper call with plain values.
            (unsafe { bpf_redirect(ifindex, 0) }) as i32
        }
        Kind::DeliverRouted => {
            maps::count(CounterId::FastRoutedIn, bytes);
            // SAFETY: a helper call with plain values.
            (unsafe { bpf_redirect_peer(ifindex, 0) }) as i32
        }
    }
}

/// Counts an encapsulated packet, unless it was counted before: then it has no bytes.
#[inline(always)]
fn count_encap(bytes: u32) {
    if bytes != 0 {
        maps::count(CounterId::BpfEncap, bytes);
    }
}

/// Hands the unchanged packet to whoever comes next, or drops it where nobody does.
fn slow(direction: Direction, reason: DropReason, flags: u32) -> i32 {
    maps::count_reason(direction, reason);
    if flags & config_flags::ALONE == 0 {
        TC_ACT_UNSPEC
    } else {
        TC_ACT_SHOT
    }
}

fn discard(direction: Direction, reason: DropReason) -> i32 {
    maps::count_reason(direction, reason);
    TC_ACT_SHOT
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
