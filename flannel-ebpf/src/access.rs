//! The one way to look into a packet.

use aya_ebpf::programs::TcContext;

/// A header of type `T` at byte `offset`, if the linear part of the packet holds all of it.
///
/// `T` must be a header without padding for which every bit pattern is valid, such as those of `network-types`.
#[inline(always)]
pub(crate) fn header<T: Copy>(ctx: &TcContext, offset: usize) -> Option<T> {
    let start = ctx.data();
    if start + offset + size_of::<T>() > ctx.data_end() {
        return None;
    }
    // SAFETY: the bounds were just checked, the read asks for no alignment, and the type has no invalid values.
    Some(unsafe { ((start + offset) as *const T).read_unaligned() })
}

/// Makes the first `len` bytes linear, where they are not already. Earlier reads stay valid: they are copies.
#[inline(always)]
pub(crate) fn linear(ctx: &TcContext, len: u32) -> bool {
    ctx.data() + len as usize <= ctx.data_end() || (ctx.len() >= len && ctx.pull_data(len).is_ok())
}
