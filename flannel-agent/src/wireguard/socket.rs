//! The kernel's WireGuard interface: requests and answers over generic netlink. What is in them is `flannel_core::wireguard::wire`'s.

use std::{
    io,
    time::{SystemTime, UNIX_EPOCH},
};

use flannel_core::wireguard::{
    Inner,
    wire::{self, WireError},
};
use rtnetlink::sys::{Socket, SocketAddr};

/// `NETLINK_GENERIC`.
const PROTOCOL: isize = libc::NETLINK_GENERIC as isize;

/// A connection, in the network namespace that the process was in when it was opened.
#[derive(Debug)]
pub(super) struct Wireguard {
    socket: Socket,
    family: u16,
}

impl Wireguard {
    /// Opens a connection; `None` where the kernel has no WireGuard, or has not loaded its module yet.
    pub(super) fn open() -> io::Result<Option<Self>> {
        let mut socket = Socket::new(PROTOCOL)?;
        socket.bind_auto()?;
        // The kernel answers within the call.
        socket.set_non_blocking(true)?;
        let parts = match exchange(&socket, &wire::ask_family()) {
            Ok(parts) => parts,
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(None),
            Err(error) => return Err(error),
        };
        for part in parts {
            if let Some(family) = wire::family(&part).map_err(into_io)? {
                return Ok(Some(Self { socket, family }));
            }
        }
        Err(into_io(WireError::Short))
    }

    /// The number of the generic netlink family.
    pub(super) fn family(&self) -> u16 {
        self.family
    }

    /// Reads a device.
    pub(super) fn device(&self, name: &str) -> io::Result<Inner> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let now = now.map_or(0, |now| now.as_secs());
        let mut inner = Inner::default();
        for part in exchange(&self.socket, &wire::ask_device(self.family, name))? {
            wire::read_device(&mut inner, &part, now).map_err(into_io)?;
        }
        Ok(inner)
    }

    /// Makes a change.
    pub(super) fn change(&self, request: &[u8]) -> io::Result<()> {
        exchange(&self.socket, request).map(drop)
    }
}

/// Sends a request and gives the messages of the answer.
fn exchange(socket: &Socket, request: &[u8]) -> io::Result<Vec<Vec<u8>>> {
    // What an exchange that failed has left unread is no answer to this one.
    while socket.recv_from_full().is_ok() {}
    socket.send_to(request, &SocketAddr::new(0, 0), 0)?;
    let mut parts = Vec::new();
    loop {
        let (bytes, _) = socket.recv_from_full()?;
        let answer = wire::answer(&bytes).map_err(into_io)?;
        parts.extend(answer.parts.into_iter().map(<[u8]>::to_vec));
        if answer.done {
            return Ok(parts);
        }
    }
}

fn into_io(error: WireError) -> io::Error {
    match error {
        WireError::Errno(errno) => io::Error::from_raw_os_error(errno),
        WireError::Short => io::Error::new(io::ErrorKind::InvalidData, error),
    }
}
