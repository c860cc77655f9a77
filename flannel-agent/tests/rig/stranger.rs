//! A BPF program of somebody else: it looks at nothing and lets every packet pass on to the next program.

use std::{
    ffi::CString,
    io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    path::Path,
};

use flannel_testkit::Netns;

const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_OBJ_PIN: libc::c_int = 6;
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_PROG_TYPE_SCHED_CLS: u32 = 3;
pub(crate) const BPF_TCX_INGRESS: u32 = 46;
pub(crate) const BPF_TCX_EGRESS: u32 = 47;
/// `r0 = -1` (`TCX_NEXT`), `exit`.
const NEXT: [u64; 2] = [0xffff_ffff_0000_00b7, 0x95];

/// A `union bpf_attr`, of which only the first fields are used.
struct Attr([u8; 128]);

impl Attr {
    fn new() -> Attr {
        Attr([0; 128])
    }

    fn word(mut self, at: usize, value: u32) -> Attr {
        self.0[at..at + 4].copy_from_slice(&value.to_ne_bytes());
        self
    }

    fn pointer<T>(mut self, at: usize, to: *const T) -> Attr {
        self.0[at..at + 8].copy_from_slice(&(to as u64).to_ne_bytes());
        self
    }

    fn bytes(mut self, at: usize, bytes: &[u8]) -> Attr {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
        self
    }

    fn call(&self, command: libc::c_int) -> io::Result<libc::c_long> {
        // SAFETY: the buffer is larger than what the kernel reads of it, and what it points to outlives the call.
        let answer =
            unsafe { libc::syscall(libc::SYS_bpf, command, self.0.as_ptr(), self.0.len()) };
        if answer < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(answer)
    }

    fn open(&self, command: libc::c_int) -> io::Result<OwnedFd> {
        let fd = i32::try_from(self.call(command)?).map_err(io::Error::other)?;
        // SAFETY: the descriptor is new and owned by nobody else.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }
}

/// Loads the program under this name, of at most 15 letters.
pub(crate) fn program(name: &str) -> OwnedFd {
    let license = c"GPL";
    Attr::new()
        .word(0, BPF_PROG_TYPE_SCHED_CLS)
        .word(4, 2)
        .pointer(8, NEXT.as_ptr())
        .pointer(16, license.as_ptr())
        .bytes(48, name.as_bytes())
        .open(BPF_PROG_LOAD)
        .expect("load a program")
}

/// Attaches a program by tcx, as long as the link lives.
pub(crate) fn attach(program: &OwnedFd, ns: &Netns, ifname: &str, side: u32) -> OwnedFd {
    let index = ns.ifindex(ifname).expect("an interface");
    let attr = Attr::new()
        .word(0, fd(program))
        .word(4, index)
        .word(8, side);
    ns.run(|| attr.open(BPF_LINK_CREATE))
        .expect("attach a program")
}

/// Pins a program or link.
pub(crate) fn pin(object: &OwnedFd, path: &Path) {
    let text = CString::new(path.to_str().expect("a path")).expect("a path");
    Attr::new()
        .pointer(0, text.as_ptr())
        .word(8, fd(object))
        .call(BPF_OBJ_PIN)
        .expect("pin an object");
}

fn fd(object: &OwnedFd) -> u32 {
    object.as_raw_fd().cast_unsigned()
}
