//! Both overlays of a node behind one network card, which takes one program of native XDP: that for IPv4 goes on with the one for IPv6,
//! which is in an array of one entry pinned beside it.
//!
//! Either overlay comes and goes by itself. Where IPv6 is first, or alone, its program has the hook; IPv4 takes the link over with what it
//! holds in the array, and gives it back when it goes. So the driver, which may set up all its queues anew, is asked once.

use std::{
    fs, io,
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use flannel_core::{
    addr::{Family, IfIndex},
    mark::PINS_XDP_NEXT,
};

use super::{
    attach::is_attached,
    join, link,
    pins::Instance,
    syscall::{
        BPF_MAP_DELETE_ELEM, BPF_MAP_LOOKUP_ELEM, BPF_MAP_UPDATE_ELEM, BPF_PROG_GET_FD_BY_ID, bpf,
        number, owned,
    },
};

/// `union bpf_attr` for the commands about an entry of a map.
#[repr(C)]
#[derive(Default)]
struct Entry {
    map_fd: u32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// `union bpf_attr` for `BPF_PROG_GET_FD_BY_ID`.
#[repr(C)]
#[derive(Default)]
struct ById {
    id: u32,
    next_id: u32,
    open_flags: u32,
}

impl Instance {
    /// The arrays that its program of native XDP goes on with, in the order of [`super::xdp::PROGRAMS`]; none in that of IPv6.
    pub(super) fn next_xdp(&self) -> Vec<(&'static str, PathBuf)> {
        let names = PINS_XDP_NEXT.into_iter();
        let names = names.filter(|_| self.overlay().family == Family::V4);
        names.map(|name| (name, join(self.dir(), name))).collect()
    }

    /// The place of IPv4's overlay, whose program goes on with ours.
    pub(super) fn before_xdp(&self) -> Option<Self> {
        (self.overlay().family == Family::V6).then(|| self.sibling())?
    }

    /// The place of IPv6's overlay, with whose program ours goes on.
    fn behind_xdp(&self) -> Option<Self> {
        (self.overlay().family == Family::V4).then(|| self.sibling())?
    }

    /// Whether its own link has the hook of this interface.
    pub(super) fn has_xdp_hook(&self, index: IfIndex) -> bool {
        is_attached(&self.xdp_link(), index)
    }

    /// The program that is in the array, by its number.
    pub(super) fn behind(&self) -> Option<u32> {
        self.next_xdp()
            .iter()
            .find_map(|(_, pin)| get(pin).ok().filter(|program| *program != 0))
    }

    /// Empties the arrays. That they are empty, or not there, is as good.
    pub(super) fn clear_behind(&self) {
        for (_, pin) in self.next_xdp() {
            if let Err(error) = delete(&pin)
                && error.raw_os_error() != Some(libc::ENOENT)
            {
                tracing::warn!(pin = %pin.display(), %error, "empty an array of programs");
            }
        }
    }

    /// Puts the program of IPv6 behind that of IPv4, whose place this is. `variant` is its index in [`super::xdp::PROGRAMS`].
    pub(super) fn put_behind(&self, variant: usize, program: BorrowedFd<'_>) -> io::Result<()> {
        let slots = self.next_xdp();
        let (_, pin) = slots.get(variant).ok_or(io::ErrorKind::NotFound)?;
        put(pin, program)
    }

    /// Takes the hook of an interface over from the overlay of IPv6, if that has it: with its program behind ours. False if it has not.
    pub(super) fn take_xdp(
        &self,
        index: IfIndex,
        variant: usize,
        program: BorrowedFd<'_>,
    ) -> io::Result<bool> {
        self.clear_behind();
        let Some(behind) = self.behind_xdp().filter(|at| at.has_xdp_hook(index)) else {
            return Ok(false);
        };
        let theirs = link::open(&behind.xdp_link())?;
        let there = link::pinned(&behind.xdp_link()).map_or(0, |link| link.program);
        let kept =
            program_by_id(there).and_then(|program| self.put_behind(variant, program.as_fd()));
        if let Err(error) = kept {
            // To find it takes CAP_SYS_ADMIN. Its own loop puts one there.
            tracing::debug!(%error, "keep the program for IPv6");
        }
        // Until it is replaced, it goes on as before.
        fs::rename(behind.xdp_link(), self.xdp_link())?;
        link::replace(&theirs, program)?;
        Ok(true)
    }

    /// Leaves the hook to the program of IPv6, if there is one behind ours. False if our link is still there.
    pub(super) fn leave_xdp(&self) -> bool {
        let there = link::pinned(&self.xdp_link()).is_some_and(|link| link.ifindex.is_some());
        let left = match (self.behind_xdp(), self.behind()) {
            (Some(behind), Some(program)) if there && behind.dir().exists() => {
                let left = self.leave_xdp_to(&behind, program);
                if let Err(error) = &left {
                    // Its own loop attaches one.
                    tracing::debug!(%error, "leave native XDP to the program for IPv6");
                }
                left.is_ok()
            }
            _ => false,
        };
        self.clear_behind();
        left
    }

    fn leave_xdp_to(&self, behind: &Self, program: u32) -> io::Result<()> {
        let program = program_by_id(program)?;
        link::replace(&link::open(&self.xdp_link())?, program.as_fd())?;
        fs::rename(self.xdp_link(), behind.xdp_link())?;
        tracing::info!("native XDP goes on with the program for IPv6 alone");
        Ok(())
    }
}

/// Makes a call about the first entry of a pinned map. The kernel takes no value where it needs none.
fn call(command: libc::c_int, pin: &Path, value: Option<&mut u32>) -> io::Result<()> {
    let map = link::open(pin)?;
    let key = 0u32;
    let mut entry = Entry {
        map_fd: number(&map)?,
        key: (&raw const key) as u64,
        value: value.map_or(0, |value| std::ptr::from_mut(value) as u64),
        ..Entry::default()
    };
    bpf(command, &mut entry).map(drop)
}

fn get(pin: &Path) -> io::Result<u32> {
    let mut program = 0;
    call(BPF_MAP_LOOKUP_ELEM, pin, Some(&mut program))?;
    Ok(program)
}

fn put(pin: &Path, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut fd = u32::try_from(program.as_raw_fd()).map_err(io::Error::other)?;
    call(BPF_MAP_UPDATE_ELEM, pin, Some(&mut fd))
}

fn delete(pin: &Path) -> io::Result<()> {
    call(BPF_MAP_DELETE_ELEM, pin, None)
}

fn program_by_id(id: u32) -> io::Result<OwnedFd> {
    let mut ask = ById {
        id,
        ..ById::default()
    };
    bpf(BPF_PROG_GET_FD_BY_ID, &mut ask).and_then(owned)
}
