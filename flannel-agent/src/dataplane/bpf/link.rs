//! Links by their system calls. What aya's view of a link leaves out is on which interface it is; and where the kernel refuses a link
//! for XDP, aya would attach the program without one, which nobody could find again.

use std::{
    ffi::CString,
    io,
    os::{
        fd::{BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
};

use flannel_core::addr::IfIndex;

use super::syscall::{
    BPF_LINK_CREATE, BPF_LINK_DETACH, BPF_LINK_UPDATE, BPF_OBJ_GET, BPF_OBJ_GET_INFO_BY_FD,
    BPF_OBJ_PIN, InfoByFd, Obj, bpf, number, owned,
};

/// `BPF_XDP` of `enum bpf_attach_type`.
const BPF_XDP: u32 = 37;
/// `XDP_FLAGS_DRV_MODE` in `include/uapi/linux/if_link.h`: in the driver or not at all.
const XDP_FLAGS_DRV_MODE: u32 = 1 << 2;

/// A pinned link of tcx or XDP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Pinned {
    /// The program that it holds.
    pub(super) program: u32,
    /// The interface; `None` once it is gone, or somebody has detached the link.
    pub(super) ifindex: Option<IfIndex>,
}

/// `union bpf_attr` for `BPF_LINK_CREATE`.
#[repr(C)]
struct LinkCreate {
    prog_fd: u32,
    target_ifindex: u32,
    attach_type: u32,
    flags: u32,
}

/// `union bpf_attr` for `BPF_LINK_UPDATE`.
#[repr(C)]
struct LinkUpdate {
    link_fd: u32,
    new_prog_fd: u32,
    flags: u32,
    old_prog_fd: u32,
}

/// `union bpf_attr` for `BPF_LINK_DETACH`.
#[repr(C)]
struct LinkDetach {
    link_fd: u32,
}

/// The head of `struct bpf_link_info` with the `tcx` member of its union, which older kernels leave zero. The `xdp` member is an interface
/// index at the same place.
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
pub(super) fn pinned(path: &Path) -> Option<Pinned> {
    let fd = open(path).ok()?;
    let mut info = LinkInfo::default();
    let mut ask = InfoByFd {
        bpf_fd: number(&fd).ok()?,
        info_len: size_of::<LinkInfo>() as u32,
        info: (&raw mut info) as u64,
    };
    bpf(BPF_OBJ_GET_INFO_BY_FD, &mut ask).ok()?;
    Some(Pinned {
        program: info.prog_id,
        ifindex: IfIndex::try_from(info.ifindex).ok(),
    })
}

/// Opens what is pinned there.
pub(super) fn open(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut get = Obj {
        pathname: path.as_ptr() as u64,
        ..Obj::default()
    };
    bpf(BPF_OBJ_GET, &mut get).and_then(owned)
}

/// Pins a link, which then outlives us.
pub(super) fn pin(link: &OwnedFd, path: &Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut pin = Obj {
        pathname: path.as_ptr() as u64,
        bpf_fd: number(link)?,
        ..Obj::default()
    };
    bpf(BPF_OBJ_PIN, &mut pin).map(drop)
}

/// Attaches a program to the XDP hook of an interface's driver.
pub(super) fn attach_xdp(program: BorrowedFd<'_>, ifindex: IfIndex) -> io::Result<OwnedFd> {
    let mut create = LinkCreate {
        prog_fd: number(&program)?,
        target_ifindex: ifindex.get(),
        attach_type: BPF_XDP,
        flags: XDP_FLAGS_DRV_MODE,
    };
    bpf(BPF_LINK_CREATE, &mut create).and_then(owned)
}

/// Puts another program into a link, in place of whatever it holds.
pub(super) fn replace(link: &OwnedFd, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut update = LinkUpdate {
        link_fd: number(link)?,
        new_prog_fd: number(&program)?,
        flags: 0,
        old_prog_fd: 0,
    };
    bpf(BPF_LINK_UPDATE, &mut update).map(drop)
}

/// Takes the link that is pinned there, if one is, off its interface at once. One that is only unpinned goes some time later.
pub(super) fn detach(path: &Path) {
    let Ok(link) = open(path) else { return };
    let detached = number(&link).and_then(|link_fd| {
        let mut detach = LinkDetach { link_fd };
        bpf(BPF_LINK_DETACH, &mut detach)
    });
    if let Err(error) = detached {
        tracing::debug!(%error, "detach a link: it goes with its pin");
    }
}
