//! A packet socket on one interface: frames in, and the lengths of frames out.

use std::{
    collections::BTreeSet,
    io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    time::{Duration, Instant},
};

use flannel_core::addr::IfIndex;
use nix::sys::{
    socket::{setsockopt, sockopt::ReceiveTimeout},
    time::{TimeVal, TimeValLike as _},
};

/// The socket belongs to the network namespace in which it was opened.
pub(super) struct Wire(OwnedFd);

#[expect(unsafe_code, reason = "no safe wrapper builds a sockaddr_ll")]
impl Wire {
    /// Opens a socket that receives nothing yet.
    pub(super) fn new() -> io::Result<Self> {
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
        // SAFETY: a call without pointers.
        let fd = unsafe { libc::socket(libc::AF_PACKET, kind, 0) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was just made and belongs to nobody else.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Listens at an interface, which is also the one to send from.
    pub(super) fn bind(&self, ifindex: IfIndex) -> io::Result<()> {
        // SAFETY: a plain C struct for which all zeros is a value.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
        address.sll_ifindex = ifindex.get().cast_signed();
        // SAFETY: the address lives through the call, and its length is its own.
        let bound = unsafe {
            libc::bind(
                self.0.as_raw_fd(),
                (&raw const address).cast(),
                size_of::<libc::sockaddr_ll>() as libc::socklen_t,
            )
        };
        if bound < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

impl Wire {
    /// Sends a frame.
    pub(super) fn send(&self, frame: &[u8]) -> io::Result<()> {
        nix::unistd::write(&self.0, frame)?;
        Ok(())
    }

    /// Which of the awaited lengths arrive. Ends when all have, or after a while.
    pub(super) fn receive(&self, awaited: &BTreeSet<usize>, patience: Duration) -> BTreeSet<usize> {
        let mut came = BTreeSet::new();
        self.read_all(patience, |frame| {
            came.extend(awaited.get(&frame.len()));
            came.len() == awaited.len()
        });
        came
    }

    /// Hands frames to `look` until it says that it has seen enough, or for a while.
    pub(super) fn read_all(&self, patience: Duration, mut look: impl FnMut(&[u8]) -> bool) {
        let end = Instant::now() + patience;
        let mut buffer = [0u8; 2048];
        loop {
            let left = end.saturating_duration_since(Instant::now());
            // A timeout of zero is for ever.
            let left = left.max(Duration::from_micros(1)).as_micros();
            let timeout = TimeVal::microseconds(i64::try_from(left).unwrap_or(1));
            if setsockopt(&self.0, ReceiveTimeout, &timeout).is_err() {
                break;
            }
            match nix::unistd::read(&self.0, &mut buffer) {
                Ok(len) if look(buffer.get(..len).unwrap_or_default()) => break,
                Err(_nothing) if Instant::now() >= end => break,
                Ok(_) | Err(_) => {}
            }
        }
    }
}
