//! Raw sockets: frames onto an interface, ICMP, and the namespace cookie.

use crate::netns::Netns;
use crate::process::check;
use anyhow::Context as _;
use std::io;
use std::mem::size_of;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, FromRawFd as _, OwnedFd, RawFd};

/// Only echo replies pass the kernel's ICMP filter: bit 0 (`ICMP_ECHOREPLY`) clear, all others set.
const ONLY_ECHO_REPLIES: u32 = !1;
/// `linux/icmp.h`: the option that sets the filter of a raw ICMP socket.
const ICMP_FILTER: i32 = 1;

/// A packet socket that sends whole Ethernet frames out of one interface.
#[derive(Debug)]
pub struct RawSocket {
    fd: OwnedFd,
    ifname: String,
}

impl RawSocket {
    /// Opens a socket on `ifname` of `ns`. It receives nothing.
    pub fn open(ns: &Netns, ifname: &str) -> anyhow::Result<RawSocket> {
        let ifindex = i32::try_from(ns.ifindex(ifname)?)?;
        let fd = ns
            .run(|| new_socket(libc::AF_PACKET, libc::SOCK_RAW, 0))
            .context("packet socket")?;
        let addr = libc::sockaddr_ll {
            sll_family: libc::AF_PACKET.try_into()?,
            sll_protocol: 0,
            sll_ifindex: ifindex,
            sll_hatype: 0,
            sll_pkttype: 0,
            sll_halen: 0,
            sll_addr: [0; 8],
        };
        let len = size_of::<libc::sockaddr_ll>().try_into()?;
        // SAFETY: `addr` is a complete sockaddr_ll and `len` its size.
        check(unsafe { libc::bind(fd.as_raw_fd(), (&raw const addr).cast(), len) })
            .with_context(|| format!("bind a packet socket to {ifname} in {}", ns.name()))?;
        Ok(RawSocket {
            fd,
            ifname: ifname.to_owned(),
        })
    }

    /// Sends one frame, from its destination MAC on.
    pub fn send(&self, frame: &[u8]) -> anyhow::Result<()> {
        let sent = send(self.fd.as_raw_fd(), frame)
            .with_context(|| format!("send {} bytes out of {}", frame.len(), self.ifname))?;
        anyhow::ensure!(sent == frame.len(), "sent {sent} of {} bytes", frame.len());
        Ok(())
    }
}

/// Sends one frame out of `ifname` of `ns`. To make a node *receive* a frame, send it out of the other
/// end of its uplink: `send_raw(lab.underlay(), &node.port, …)`.
pub fn send_raw(ns: &Netns, ifname: &str, frame: &[u8]) -> anyhow::Result<()> {
    RawSocket::open(ns, ifname)?.send(frame)
}

/// A raw ICMP socket of the calling thread's namespace that hears only echo replies of `dst`.
pub(crate) fn icmp(dst: Ipv4Addr) -> io::Result<OwnedFd> {
    let fd = new_socket(libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_ICMP)?;
    set_option(
        &fd,
        libc::IPPROTO_RAW,
        ICMP_FILTER,
        ONLY_ECHO_REPLIES.cast_signed(),
    )?;
    set_option(&fd, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, 8 << 20)?;
    let addr = libc::sockaddr_in {
        sin_family: libc::AF_INET.try_into().map_err(io::Error::other)?,
        sin_port: 0,
        sin_addr: libc::in_addr {
            s_addr: u32::from_ne_bytes(dst.octets()),
        },
        sin_zero: [0; 8],
    };
    let len = size_of::<libc::sockaddr_in>();
    let len = len.try_into().map_err(io::Error::other)?;
    // SAFETY: `addr` is a complete sockaddr_in and `len` its size.
    check(unsafe { libc::connect(fd.as_raw_fd(), (&raw const addr).cast(), len) })?;
    Ok(fd)
}

/// Sets or clears path MTU discovery, which decides the DF bit of what the socket sends.
pub(crate) fn set_dont_fragment(fd: &impl AsRawFd, on: bool) -> io::Result<()> {
    let mode = if on {
        libc::IP_PMTUDISC_DO
    } else {
        libc::IP_PMTUDISC_DONT
    };
    set_option(fd, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, mode)
}

pub(crate) fn send(fd: RawFd, bytes: &[u8]) -> io::Result<usize> {
    // SAFETY: the pointer and length are those of a live slice.
    let sent = unsafe { libc::send(fd, bytes.as_ptr().cast(), bytes.len(), 0) };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}

/// Receives without waiting; `None` when there is nothing.
pub(crate) fn receive(fd: RawFd, buffer: &mut [u8]) -> io::Result<Option<usize>> {
    // SAFETY: the pointer and length are those of a live mutable slice.
    let got = unsafe {
        libc::recv(
            fd,
            buffer.as_mut_ptr().cast(),
            buffer.len(),
            libc::MSG_DONTWAIT,
        )
    };
    if let Ok(len) = usize::try_from(got) {
        return Ok(Some(len));
    }
    let err = io::Error::last_os_error();
    if err.kind() == io::ErrorKind::WouldBlock {
        return Ok(None);
    }
    Err(err)
}

/// The sender's view of a TCP connection.
pub(crate) fn tcp_info(fd: &impl AsRawFd) -> io::Result<libc::tcp_info> {
    // SAFETY: tcp_info is plain integers, for which all-zero is a value.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut len = size_of::<libc::tcp_info>()
        .try_into()
        .map_err(io::Error::other)?;
    // SAFETY: the kernel writes at most `len` bytes, the size of `info`.
    check(unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            (&raw mut info).cast(),
            &raw mut len,
        )
    })?;
    Ok(info)
}

/// The cookie of the calling thread's network namespace.
pub(crate) fn netns_cookie() -> io::Result<u64> {
    let fd = new_socket(libc::AF_INET, libc::SOCK_DGRAM, 0)?;
    let mut cookie = 0_u64;
    let mut len = size_of::<u64>().try_into().map_err(io::Error::other)?;
    // SAFETY: the kernel writes at most `len` bytes, the size of `cookie`.
    check(unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut len,
        )
    })?;
    Ok(cookie)
}

fn new_socket(family: i32, kind: i32, protocol: i32) -> io::Result<OwnedFd> {
    // SAFETY: socket takes no pointers.
    let fd = check(unsafe { libc::socket(family, kind | libc::SOCK_CLOEXEC, protocol) })?;
    // SAFETY: the descriptor is new and owned by nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn set_option(fd: &impl AsRawFd, level: i32, name: i32, value: i32) -> io::Result<()> {
    let len = size_of::<i32>().try_into().map_err(io::Error::other)?;
    // SAFETY: `value` is a live i32 and `len` its size.
    check(unsafe { libc::setsockopt(fd.as_raw_fd(), level, name, (&raw const value).cast(), len) })
        .map(drop)
}
