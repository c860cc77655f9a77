//! What `bpf_skb_adjust_room` accepts on this kernel: asked at run time, because the verifier does not look at flags and
//! an old kernel answers -EINVAL to every call (5.10 with ENCAP_L2_ETH; all before 7.3 with DECAP_L4_UDP).
//!
//! The agent runs this with `BPF_PROG_TEST_RUN`; it is never attached.

use aya_ebpf::{bindings::bpf_adj_room_mode::BPF_ADJ_ROOM_MAC, programs::TcContext};
use flannel_common::map::room_flags;

/// Adjusts by the `i32` in the first four bytes of the packet with the flags in the next four (see [`room_flags`]), both
/// little-endian.
/// Returns the helper's result, or 1 if the packet is too short to say.
pub(crate) fn adjust_room(ctx: &TcContext) -> i32 {
    let (Ok(delta), Ok(flags)) = (ctx.load::<[u8; 4]>(0), ctx.load::<[u8; 4]>(4)) else {
        return 1;
    };
    let (delta, flags) = (i32::from_le_bytes(delta), u32::from_le_bytes(flags));
    match ctx.adjust_room(delta, BPF_ADJ_ROOM_MAC, room_flags(flags)) {
        Ok(()) => 0,
        Err(errno) => errno as i32,
    }
}
