//! The flow gate's thin half: look up, ask [`flannel_common::flow`], store.

use aya_ebpf::{
    helpers::{bpf_check_mtu, bpf_get_smp_processor_id, bpf_ktime_get_coarse_ns, bpf_ktime_get_ns},
    programs::TcContext,
};
use flannel_common::{
    CounterId,
    flow::{
        self, JUDGED, Judgement, Now, Packet, Testimony, Way, admitted, close, closing, judge,
        testify, witnessed,
    },
};

use crate::{
    family::Config,
    maps::{self, FlowKey, Sighting},
};

/// What the kernel's helpers offer, set by the agent before loading; the verifier then drops the branches that would call what is not
/// there. Bits of [`flannel_common::map::helper_flags`].
#[unsafe(no_mangle)]
static KERNEL_HELPERS: u32 = 0;

#[inline(always)]
fn helpers() -> u32 {
    // SAFETY: a plain constant; volatile, so that the compiler leaves the reading of the loaded value in place.
    unsafe { core::ptr::read_volatile(&raw const KERNEL_HELPERS) }
}

#[inline(always)]
pub(crate) fn clock() -> u64 {
    // SAFETY: helpers without parameters.
    unsafe {
        if helpers() & flannel_common::map::helper_flags::COARSE_CLOCK != 0 {
            bpf_ktime_get_coarse_ns()
        } else {
            bpf_ktime_get_ns()
        }
    }
}

/// A packet with everything that the gate judges it by.
#[derive(Clone, Copy)]
pub(crate) struct Case {
    pub(crate) key: FlowKey,
    pub(crate) packet: Packet,
    /// Generation of the pod, or of both together.
    pub(crate) generation: u32,
}

impl Case {
    #[inline(always)]
    const fn now(&self, config: &Config) -> Now {
        Now {
            mode: config.mode,
            epoch: config.epoch,
            generation: self.generation,
            lease: config.lease,
        }
    }
}

/// Before the stack: whether the packet may bypass it. `target` is the interface that a fast packet goes to.
#[inline(always)]
pub(crate) fn is_fast(ctx: &TcContext, config: &Config, case: &Case, target: u32) -> bool {
    let now = case.now(config);
    let flow = maps::flow(&case.key);
    match judge(&now, case.packet, flow.as_deref(), clock) {
        Judgement::Fast => maps::are_kept(clock()),
        Judgement::Slow => false,
        Judgement::Close => {
            if let Some(flow) = flow {
                close(&now, flow, case.packet.way, clock());
            }
            false
        }
        Judgement::Admit => {
            let pair = case.key.pair(case.packet.way);
            let fast = maps::are_kept(clock())
                && !maps::is_translated(&pair)
                && is_alive(ctx, target)
                && maps::put_flow(&case.key, &admitted(&now));
            if fast {
                maps::count(CounterId::GateAdmitted, ctx.len());
            }
            fast
        }
    }
}

/// Whether the flow was admitted by its SYN and is of the present: such a flow's ICMP errors are unknown to connection tracking.
#[inline(always)]
pub(crate) fn is_by_syn(config: &Config, key: &FlowKey, generation: u32) -> bool {
    config.mode == flow::mode::SYN
        && maps::are_kept(clock())
        && maps::flow(key).is_some_and(|flow| {
            flow.by_syn != 0 && flow.epoch == config.epoch && flow.generation == generation
        })
}

/// Whether an interface exists. Without it a SYN for a pod made anew would go to the interface of its predecessor, and be lost.
#[inline(always)]
fn is_alive(ctx: &TcContext, ifindex: u32) -> bool {
    if helpers() & flannel_common::map::helper_flags::CHECK_MTU == 0 {
        return false;
    }
    let mut mtu = 0;
    // SAFETY: the only pointer besides the context is to a local variable.
    unsafe { bpf_check_mtu(ctx.skb.skb.cast(), ifindex, &raw mut mtu, 0, 0) >= 0 }
}

/// Marks a packet that goes through the stack, so that it is known again behind it.
#[inline(always)]
pub(crate) fn tag(ctx: &TcContext, config: &Config, case: &Case) {
    maps::count(CounterId::GateTagged, ctx.len());
    let sighting = Sighting {
        key: case.key,
        way: case.packet.way as u32 + 1,
    };
    let shift = config.ring_shift & 15;
    // SAFETY: a helper without parameters.
    let cpu = unsafe { bpf_get_smp_processor_id() };
    let Some(number) = maps::remember(&sighting) else {
        return;
    };
    let slot = (cpu << shift) + (number & ((1 << shift) - 1));
    if maps::put_sighting(slot, &sighting) {
        set_index(ctx, slot + 1);
    }
}

/// A packet that the gate has nothing to say about: no tag of an earlier life may survive.
#[inline(always)]
pub(crate) fn untag(ctx: &TcContext) {
    set_index(ctx, 0);
    maps::forget();
}

/// Says that the gate was asked about this packet already.
#[inline(always)]
pub(crate) fn set_judged(ctx: &TcContext) {
    set_index(ctx, u32::from(JUDGED));
}

/// Whether [`set_judged`] was called on this packet.
#[inline(always)]
pub(crate) fn was_judged(ctx: &TcContext) -> bool {
    index(ctx) == u32::from(JUDGED)
}

/// Forgets who has numbered this packet before us.
#[inline(always)]
pub(crate) fn clear_index(ctx: &TcContext) {
    set_index(ctx, 0);
}

/// Behind the stack: what this packet says about its flow.
#[inline(always)]
pub(crate) fn witness(ctx: &TcContext, config: &Config, case: &Case) {
    let now = case.now(config);
    let way = case.packet.way;
    let tagged = is_tagged(ctx, &case.key, way);
    let flow = maps::flow(&case.key);
    match testify(&now, case.packet, tagged, flow.as_deref()) {
        Testimony::Nothing => {}
        Testimony::Confirm => {
            maps::count(CounterId::GateConfirmed, ctx.len());
            if let Some(flow) = flow {
                match way {
                    Way::Out => flow.seen[0] = clock(),
                    Way::In => flow.seen[1] = clock(),
                }
            }
        }
        Testimony::Closed => {
            if let Some(flow) = flow {
                match way {
                    Way::Out => flow.closing[0] = closing::PASSED,
                    Way::In => flow.closing[1] = closing::PASSED,
                }
            }
        }
        Testimony::Begin => {
            maps::count(CounterId::GateConfirmed, ctx.len());
            maps::put_flow(&case.key, &witnessed(&now, way, clock()));
        }
        Testimony::Forget => maps::remove_flow(&case.key),
        Testimony::Refute => {
            maps::count(CounterId::GateRefuted, ctx.len());
            if flow.is_some() {
                maps::remove_flow(&case.key);
            }
        }
        Testimony::RefutePair => {
            maps::count(CounterId::GateRefuted, ctx.len());
            maps::put_translated(&case.key.pair(way));
            if flow.is_some() {
                maps::remove_flow(&case.key);
            }
        }
    }
}

/// Whether the hook before the stack has seen this very packet with this very tuple.
#[inline(always)]
fn is_tagged(ctx: &TcContext, key: &FlowKey, way: Way) -> bool {
    let wanted = Sighting {
        key: *key,
        way: way as u32 + 1,
    };
    match index(ctx) {
        // Somebody's classifier that answers TC_ACT_OK has overwritten the number (`tc_run` in net/core/dev.c).
        0 => maps::last_is(&wanted),
        number => maps::sighting_is(number - 1, &wanted),
    }
}

#[inline(always)]
fn index(ctx: &TcContext) -> u32 {
    // SAFETY: a read of a context field, which the verifier turns into a checked load.
    unsafe { (*ctx.skb.skb).tc_index }
}

#[inline(always)]
fn set_index(ctx: &TcContext, number: u32) {
    // SAFETY: a write of a context field that classifiers may write.
    unsafe { (*ctx.skb.skb).tc_index = number };
}
