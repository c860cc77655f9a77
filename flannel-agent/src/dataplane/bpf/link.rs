//! Looking at pinned links: what aya's view of a link leaves out is on which interface it is.

use std::{
    ffi::CString,
    os::{
        fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
};

use flannel_core::addr::IfIndex;

/// `BPF_OBJ_GET` and `BPF_OBJ_GET_INFO_BY_FD` in `include/uapi/linux/bpf.h`.
const BPF_OBJ_GET: libc::c_int = 7;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_int = 15;

/// A pinned tcx link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PinnedTcx {
    /// The program that it holds.
    pub(super) program: u32,
    /// The interface; `None` once it is gone, or somebody has detached the link.
    pub(super) ifindex: Option<IfIndex>,
}

/// `union bpf_attr` for `BPF_OBJ_GET`.
#[repr(C)]
#[derive(Default)]
struct ObjGet {
    pathname: u64,
    bpf_fd: u32,
    file_flags: u32,
}

/// `union bpf_attr` for `BPF_OBJ_GET_INFO_BY_FD`.
#[repr(C)]
struct InfoByFd {
    bpf_fd: u32,
    info_len: u32,
    info: u64,
}

/// The head of `struct bpf_link_info` with the `tcx` member of its union, which older kernels leave zero.
#[repr(C)]
#[derive(Default)]
struct LinkInfo {
    kind: u32,
    id: u32,
    prog_id: u32,
    padding: u32,
    ifindex: u32,
    attach_type: u32,
}

/// The link that is pinned there, if one is.
pub(super) fn pinned(path: &Path) -> Option<PinnedTcx> {
    let path = CString::new(path.as_os_str().as_bytes()).ok()?;
    let mut get = ObjGet {
        pathname: path.as_ptr() as u64,
        ..ObjGet::default()
    };
    let fd = i32::try_from(bpf(BPF_OBJ_GET, &mut get)).ok();
    let fd = fd.filter(|fd| *fd >= 0)?;
    // SAFETY: the kernel has just opened it for us, and nobody else knows of it.
    #[expect(unsafe_code, reason = "the descriptor comes from a raw system call")]
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    let mut info = LinkInfo::default();
    let mut ask = InfoByFd {
        bpf_fd: u32::try_from(fd.as_raw_fd()).ok()?,
        info_len: size_of::<LinkInfo>() as u32,
        info: (&raw mut info) as u64,
    };
    if bpf(BPF_OBJ_GET_INFO_BY_FD, &mut ask) != 0 {
        return None;
    }
    Some(PinnedTcx {
        program: info.prog_id,
        ifindex: IfIndex::try_from(info.ifindex).ok(),
    })
}

fn bpf<T>(command: libc::c_int, attributes: &mut T) -> libc::c_long {
    // SAFETY: `attributes` is of the kernel's layout for the command and as long as we say; what it points at outlives the call.
    #[expect(unsafe_code, reason = "no safe wrapper gives a link's interface")]
    unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_mut(attributes),
            size_of::<T>(),
        )
    }
}
