//! `bpf(2)` itself, for what aya does not ask of it.

use std::{
    io,
    os::fd::{AsRawFd, FromRawFd as _, OwnedFd},
};

/// Commands of `bpf(2)` in `include/uapi/linux/bpf.h`.
pub(crate) const BPF_MAP_CREATE: libc::c_int = 0;
pub(crate) const BPF_MAP_LOOKUP_ELEM: libc::c_int = 1;
pub(crate) const BPF_MAP_UPDATE_ELEM: libc::c_int = 2;
pub(crate) const BPF_MAP_DELETE_ELEM: libc::c_int = 3;
pub(crate) const BPF_PROG_LOAD: libc::c_int = 5;
pub(crate) const BPF_OBJ_PIN: libc::c_int = 6;
pub(crate) const BPF_OBJ_GET: libc::c_int = 7;
pub(crate) const BPF_PROG_TEST_RUN: libc::c_int = 10;
pub(crate) const BPF_PROG_GET_FD_BY_ID: libc::c_int = 13;
pub(crate) const BPF_OBJ_GET_INFO_BY_FD: libc::c_int = 15;
pub(crate) const BPF_LINK_CREATE: libc::c_int = 28;
pub(crate) const BPF_LINK_UPDATE: libc::c_int = 29;
pub(crate) const BPF_LINK_DETACH: libc::c_int = 34;

/// `union bpf_attr` for `BPF_OBJ_GET` and `BPF_OBJ_PIN`.
#[repr(C)]
#[derive(Default)]
pub(crate) struct Obj {
    pub(crate) pathname: u64,
    pub(crate) bpf_fd: u32,
    pub(crate) file_flags: u32,
}

/// `union bpf_attr` for `BPF_OBJ_GET_INFO_BY_FD`.
#[repr(C)]
pub(crate) struct InfoByFd {
    pub(crate) bpf_fd: u32,
    pub(crate) info_len: u32,
    pub(crate) info: u64,
}

/// A descriptor as the calls want it.
pub(crate) fn number(fd: &impl AsRawFd) -> io::Result<u32> {
    u32::try_from(fd.as_raw_fd()).map_err(io::Error::other)
}

/// The descriptor that a call has opened.
pub(crate) fn owned(fd: libc::c_long) -> io::Result<OwnedFd> {
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel has just opened it for us, and nobody else knows of it.
    #[expect(unsafe_code, reason = "the descriptor comes from a raw system call")]
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Makes the call.
pub(crate) fn bpf<T>(command: libc::c_int, attributes: &mut T) -> io::Result<libc::c_long> {
    #[expect(
        unsafe_code,
        reason = "no safe wrapper knows all of its commands and fields"
    )]
    // SAFETY: `attributes` is of the kernel's layout for the command and as long as we say; what it points at outlives the call.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_mut(attributes),
            size_of::<T>(),
        )
    };
    if answer < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(answer)
}
