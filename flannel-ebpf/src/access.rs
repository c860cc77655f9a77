//! The one way to look into a packet.

use core::mem::MaybeUninit;

use aya_ebpf::programs::{TcContext, XdpContext};

/// Where the bytes of a packet are that a program may read directly.
pub(crate) trait Bytes {
    fn start(&self) -> usize;
    fn end(&self) -> usize;
}

impl Bytes for TcContext {
    #[inline(always)]
    fn start(&self) -> usize {
        self.data()
    }

    #[inline(always)]
    fn end(&self) -> usize {
        self.data_end()
    }
}

impl Bytes for XdpContext {
    #[inline(always)]
    fn start(&self) -> usize {
        self.data()
    }

    #[inline(always)]
    fn end(&self) -> usize {
        self.data_end()
    }
}

/// A header of type `T` at byte `offset`, if the linear part (with XDP the first buffer) of the packet holds all of it.
///
/// `T` must be a header without padding for which every bit pattern is valid, such as those of `network-types`.
#[inline(always)]
pub(crate) fn header<T: Copy>(ctx: &impl Bytes, offset: usize) -> Option<T> {
    let start = ctx.start();
    if start + offset + size_of::<T>() > ctx.end() {
        return None;
    }
    // SAFETY: the bounds were just checked, and the type has no invalid values.
    Some(unsafe { load((start + offset) as *const u8) })
}

/// The sum of the words of 32 bits from byte `offset` on, `len` bytes in all, for [`flannel_common::checksum::fold_words`]. Nothing of them
/// is kept, which would need stack.
#[inline(always)]
pub(crate) fn sum_words(ctx: &impl Bytes, offset: usize, len: usize) -> Option<u64> {
    let start = ctx.start();
    if start + offset + len > ctx.end() {
        return None;
    }
    let mut sum = 0;
    let mut at = 0;
    while at + 4 <= len {
        // SAFETY: the bounds were just checked.
        sum += u64::from(unsafe { load::<u32>((start + offset + at) as *const u8) });
        at += 4;
    }
    if at + 2 <= len {
        // SAFETY: as above.
        sum += u64::from(unsafe { load::<u16>((start + offset + at) as *const u8) });
    }
    Some(sum)
}

/// Reads a `T` in the widest words that its size allows. The compiler would read one byte after the other, for it knows nothing of
/// the packet's alignment; on the architectures that we load programs on (amd64, arm64) the kernel takes unaligned loads.
///
/// # Safety
///
/// `size_of::<T>()` bytes at `from` are readable, and every bit pattern is a valid `T`.
#[inline(always)]
#[expect(
    clippy::cast_ptr_alignment,
    reason = "unaligned loads are what this function is for"
)]
pub(crate) unsafe fn load<T: Copy>(from: *const u8) -> T {
    let mut value = MaybeUninit::<T>::uninit();
    let to: *mut u8 = value.as_mut_ptr().cast();
    let mut at = 0;
    // SAFETY: every access is below `size_of::<T>()`, on both sides.
    unsafe {
        while at + 8 <= size_of::<T>() {
            to.add(at)
                .cast::<u64>()
                .write_unaligned(*from.add(at).cast::<u64>());
            at += 8;
        }
        if at + 4 <= size_of::<T>() {
            to.add(at)
                .cast::<u32>()
                .write_unaligned(*from.add(at).cast::<u32>());
            at += 4;
        }
        if at + 2 <= size_of::<T>() {
            to.add(at)
                .cast::<u16>()
                .write_unaligned(*from.add(at).cast::<u16>());
            at += 2;
        }
        if at < size_of::<T>() {
            *to.add(at) = *from.add(at);
        }
        value.assume_init()
    }
}

/// Makes the first `len` bytes linear, where they are not already. Earlier reads stay valid: they are copies.
#[inline(always)]
pub(crate) fn linear(ctx: &TcContext, len: u32) -> bool {
    ctx.data() + len as usize <= ctx.data_end() || (ctx.len() >= len && ctx.pull_data(len).is_ok())
}

/// A copy of a field, read in words; for the compiler a field of bytes has no alignment.
#[inline(always)]
pub(crate) fn copy<T: Copy>(field: &T) -> T {
    // SAFETY: a reference is readable, and what it refers to is a valid value.
    unsafe { load(core::ptr::from_ref(field).cast()) }
}

/// A MAC address as a number, for comparing.
#[inline(always)]
pub(crate) fn mac_bits(mac: &[u8; 6]) -> u64 {
    let from: *const u8 = mac.as_ptr();
    // SAFETY: six bytes from here are readable, and every bit pattern is a number.
    let (low, high) = unsafe { (load::<u32>(from), load::<u16>(from.add(4))) };
    u64::from(low) | u64::from(high) << 32
}

/// The broadcast address as [`mac_bits`] gives it.
pub(crate) const BROADCAST: u64 = 0xffff_ffff_ffff;
