//! Raw sockets: frames onto an interface, ICMP, and the namespace cookie.

use crate::eventually::patience;
use crate::family::Family;
use crate::netns::Netns;
use crate::process::check;
use anyhow::Context as _;
use nix::sys::socket::{SockaddrLike as _, SockaddrStorage};
use std::io;
use std::mem::size_of;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::fs::MetadataExt as _;
use std::thread;
use std::time::{Duration, Instant};

/// Only echo replies pass the kernel's ICMP filter: bit 0 (`ICMP_ECHOREPLY`) clear, all others set.
const ONLY_ECHO_REPLIES: u32 = !1;
/// `linux/icmp.h`: the option that sets the filter of a raw ICMP socket.
const ICMP_FILTER: i32 = 1;
/// `linux/icmpv6.h`: the same of an ICMPv6 socket, a bit for each of 256 types.
const ICMP6_FILTER: i32 = 1;
/// `ICMPV6_ECHO_REPLY`.
const ECHO_REPLY_V6: usize = 129;
/// Bytes that a socket may hold for its reader; the kernel doubles the number. By default it is 212,992 in all, and a datagram takes up to
/// 4352 of them: a receiver that waits 100 ms for a processor would lose what comes every 2 ms.
const ROOM: i32 = 8 << 20;
/// `linux/sock_diag.h`: the numbers of `SO_MEMINFO`, and which of them counts what the socket has dropped.
const MEMINFO: usize = 9;
const MEMINFO_DROPS: usize = 8;

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

/// Sends one packet, from its IP header on, through the stack of `ns`.
pub fn send_ip(ns: &Netns, to: impl Into<IpAddr>, packet: &[u8]) -> anyhow::Result<()> {
    let to = to.into();
    let sent = ns.run(|| {
        let address = SocketAddr::new(to, 0);
        let fd = new_socket(domain(&address), libc::SOCK_RAW, libc::IPPROTO_RAW)?;
        let (addr, len) = sockaddr(address);
        // SAFETY: both pointers are to live values of the lengths given.
        let sent = unsafe {
            libc::sendto(
                fd.as_raw_fd(),
                packet.as_ptr().cast(),
                packet.len(),
                0,
                (&raw const addr).cast(),
                len,
            )
        };
        usize::try_from(sent).map_err(|_| io::Error::last_os_error())
    });
    let sent = sent.with_context(|| format!("send a packet to {to} from {}", ns.name()))?;
    anyhow::ensure!(sent == packet.len(), "sent {sent} of {}", packet.len());
    Ok(())
}

/// An option of a socket that is a plain number.
pub fn set_socket_option(
    fd: &impl AsRawFd,
    level: i32,
    name: i32,
    value: i32,
) -> anyhow::Result<()> {
    set_option(fd, level, name, value).with_context(|| format!("socket option {level}/{name}"))
}

/// An option of a socket that is made of bytes.
pub fn set_socket_bytes<const LEN: usize>(
    fd: &impl AsRawFd,
    level: i32,
    name: i32,
    value: [u8; LEN],
) -> anyhow::Result<()> {
    set_bytes(fd, level, name, &value).with_context(|| format!("socket option {level}/{name}"))
}

/// Sends one frame out of `ifname` of `ns`. To make a node *receive* a frame, send it out of the other
/// end of its uplink: `send_raw(lab.underlay(), &node.port, …)`.
pub fn send_raw(ns: &Netns, ifname: &str, frame: &[u8]) -> anyhow::Result<()> {
    RawSocket::open(ns, ifname)?.send(frame)
}

/// A raw ICMP socket of the calling thread's namespace that hears only echo replies of `dst`. One of IPv6 fills in the checksum.
pub(crate) fn icmp(dst: IpAddr) -> io::Result<OwnedFd> {
    let address = SocketAddr::new(dst, 0);
    let fd = match dst {
        IpAddr::V4(_) => {
            let fd = new_socket(libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_ICMP)?;
            let filter = ONLY_ECHO_REPLIES.cast_signed();
            set_option(&fd, libc::IPPROTO_RAW, ICMP_FILTER, filter)?;
            fd
        }
        IpAddr::V6(_) => {
            let fd = new_socket(libc::AF_INET6, libc::SOCK_RAW, libc::IPPROTO_ICMPV6)?;
            let mut filter = [u32::MAX; 8];
            filter[ECHO_REPLY_V6 / 32] &= !(1 << (ECHO_REPLY_V6 % 32));
            set_bytes(&fd, libc::IPPROTO_ICMPV6, ICMP6_FILTER, &filter)?;
            fd
        }
    };
    make_room(&fd)?;
    let (addr, len) = sockaddr(address);
    // SAFETY: `addr` is a complete address and `len` its size.
    check(unsafe { libc::connect(fd.as_raw_fd(), (&raw const addr).cast(), len) })?;
    Ok(fd)
}

/// Lets a socket keep what arrives while its reader waits for a processor: what it dropped then would count as lost on the way.
pub(crate) fn make_room(fd: &impl AsRawFd) -> io::Result<()> {
    set_option(fd, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, ROOM)
}

/// Packets that have reached a socket, and that it dropped: it had no room for them, or their checksum was wrong.
pub(crate) fn dropped(fd: &impl AsRawFd) -> io::Result<u32> {
    let mut info = [0_u32; MEMINFO];
    let mut len = size_of_val(&info).try_into().map_err(io::Error::other)?;
    // SAFETY: the kernel writes at most `len` bytes, the size of `info`.
    check(unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_MEMINFO,
            info.as_mut_ptr().cast(),
            &raw mut len,
        )
    })?;
    Ok(info[MEMINFO_DROPS])
}

/// Sets or clears path MTU discovery, which decides the DF bit of what the socket sends over IPv4, and whether the sender cuts
/// what is longer than the path's MTU over IPv6.
pub(crate) fn set_dont_fragment(fd: &impl AsRawFd, of: IpAddr, on: bool) -> io::Result<()> {
    let (level, name) = match of {
        IpAddr::V4(_) => (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER),
        IpAddr::V6(_) => (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER),
    };
    // The two families have the same numbers.
    let mode = if on {
        libc::IP_PMTUDISC_DO
    } else {
        libc::IP_PMTUDISC_DONT
    };
    set_option(fd, level, name, mode)
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

/// Segments that these ends have sent again because they were lost. One that was only late, as on a busy machine, arrives twice: its
/// receiver says so (RFC 2883), and it does not count. Waits a moment for that word.
pub(crate) fn lost_segments(ends: &[&TcpStream]) -> io::Result<u32> {
    /// How long the word of a duplicate may be on its way.
    const DUPLICATE: Duration = Duration::from_millis(300);
    let until = Instant::now() + DUPLICATE;
    loop {
        let mut lost = 0;
        for end in ends {
            lost += resent_once(*end)?;
        }
        if lost == 0 || Instant::now() > until {
            return Ok(lost);
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// Segments sent again less those that the receiver had already: `tcpi_total_retrans` and `tcpi_dsack_dups` of the kernel's
/// `struct tcp_info` (include/uapi/linux/tcp.h; the latter since 4.19, and not in libc's).
fn resent_once(fd: &impl AsRawFd) -> io::Result<u32> {
    const TOTAL_RETRANS: usize = 100;
    const DSACK_DUPS: usize = 216;
    let mut info = [0_u8; DSACK_DUPS + 4];
    let mut len = info.len().try_into().map_err(io::Error::other)?;
    // SAFETY: the kernel writes at most `len` bytes, the size of `info`.
    check(unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &raw mut len,
        )
    })?;
    let word = |at: usize| {
        let bytes = info[at..].first_chunk().copied().unwrap_or_default();
        u32::from_ne_bytes(bytes)
    };
    Ok(word(TOTAL_RETRANS).saturating_sub(word(DSACK_DUPS)))
}

/// The cookie of the calling thread's network namespace; before 5.14, what the agent takes in its place: the inode of the namespace
/// below a word of ones.
pub(crate) fn netns_cookie() -> io::Result<u64> {
    let fd = new_socket(libc::AF_INET, libc::SOCK_DGRAM, 0)?;
    let mut cookie = 0_u64;
    let mut len = size_of::<u64>().try_into().map_err(io::Error::other)?;
    // SAFETY: the kernel writes at most `len` bytes, the size of `cookie`.
    let asked = check(unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut len,
        )
    });
    match asked {
        Ok(_) => Ok(cookie),
        Err(err) if err.raw_os_error() == Some(libc::ENOPROTOOPT) => {
            let inode = std::fs::metadata("/proc/thread-self/ns/net")?.ino();
            Ok(inode | 0xffff_ffff_0000_0000)
        }
        Err(err) => Err(err),
    }
}

/// Listens with `SO_REUSEADDR`, for many connections at once.
pub(crate) fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let fd = new_socket(domain(&address), libc::SOCK_STREAM, 0)?;
    set_option(&fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)?;
    bind(&fd, address)?;
    // SAFETY: listen takes no pointers.
    check(unsafe { libc::listen(fd.as_raw_fd(), 4096) })?;
    Ok(fd.into())
}

/// How long an address may stay in use after its socket: a process that another thread starts has all descriptors for a moment.
const INHERITED: Duration = Duration::from_secs(2);

/// Tries again while an address is in use by a socket that is gone.
pub(crate) fn free_address<T>(mut bind: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    let until = Instant::now() + patience(INHERITED);
    loop {
        match bind() {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && Instant::now() < until => {
                thread::sleep(Duration::from_millis(10));
            }
            outcome => return outcome,
        }
    }
}

/// Connects from a port (0 is any) that may have been used just before.
pub(crate) fn connect(port: u16, target: SocketAddr, limit: Duration) -> io::Result<TcpStream> {
    let kind = libc::SOCK_STREAM | libc::SOCK_NONBLOCK;
    let fd = new_socket(domain(&target), kind, 0)?;
    set_option(&fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)?;
    if port != 0 {
        let any = Family::of(target.ip()).unspecified();
        bind(&fd, SocketAddr::new(any, port))?;
    }
    let (addr, len) = sockaddr(target);
    // SAFETY: `addr` is a complete address and `len` its size.
    let begun = check(unsafe { libc::connect(fd.as_raw_fd(), (&raw const addr).cast(), len) });
    if let Err(err) = begun
        && err.raw_os_error() != Some(libc::EINPROGRESS)
    {
        return Err(err);
    }
    if poll(&[&fd], libc::POLLOUT, limit)?.is_none() {
        return Err(io::ErrorKind::TimedOut.into());
    }
    let stream = TcpStream::from(fd);
    if let Some(err) = stream.take_error()? {
        return Err(err);
    }
    stream.set_nonblocking(false)?;
    Ok(stream)
}

/// Closing the socket will send a RST.
pub(crate) fn linger_nothing(fd: &impl AsRawFd) -> io::Result<()> {
    let linger = libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    let len = size_of::<libc::linger>()
        .try_into()
        .map_err(io::Error::other)?;
    // SAFETY: `linger` is live and `len` its size.
    check(unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_LINGER,
            (&raw const linger).cast(),
            len,
        )
    })
    .map(drop)
}

/// The first of some sockets that has something to read or to accept; `None` when `limit` passed first.
pub(crate) fn first_readable(
    fds: &[&impl AsRawFd],
    limit: Duration,
) -> anyhow::Result<Option<usize>> {
    Ok(poll(fds, libc::POLLIN, limit)?)
}

fn poll(fds: &[&impl AsRawFd], events: i16, limit: Duration) -> io::Result<Option<usize>> {
    let end = Instant::now() + limit;
    let mut set: Vec<libc::pollfd> = fds
        .iter()
        .map(|fd| libc::pollfd {
            fd: fd.as_raw_fd(),
            events,
            revents: 0,
        })
        .collect();
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let millis = left.as_millis().try_into().unwrap_or(i32::MAX);
        let count = set.len().try_into().map_err(io::Error::other)?;
        // SAFETY: the pointer and count are those of a live mutable slice.
        match check(unsafe { libc::poll(set.as_mut_ptr(), count, millis) }) {
            Ok(_) => {}
            Err(err) if err.kind() == io::ErrorKind::Interrupted => continue,
            Err(err) => return Err(err),
        }
        let ready = set.iter().position(|fd| fd.revents != 0);
        if ready.is_some() || left.is_zero() {
            return Ok(ready);
        }
    }
}

fn bind(fd: &OwnedFd, address: SocketAddr) -> io::Result<()> {
    let (addr, len) = sockaddr(address);
    // SAFETY: `addr` is a complete address and `len` its size.
    check(unsafe { libc::bind(fd.as_raw_fd(), (&raw const addr).cast(), len) }).map(drop)
}

fn domain(address: &SocketAddr) -> i32 {
    match address {
        SocketAddr::V4(_) => libc::AF_INET,
        SocketAddr::V6(_) => libc::AF_INET6,
    }
}

/// An address as the kernel takes it, and the length of it.
fn sockaddr(address: SocketAddr) -> (SockaddrStorage, libc::socklen_t) {
    let addr = SockaddrStorage::from(address);
    let len = addr.len();
    (addr, len)
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

fn set_bytes<T>(fd: &impl AsRawFd, level: i32, name: i32, value: &T) -> io::Result<()> {
    let len = size_of::<T>().try_into().map_err(io::Error::other)?;
    // SAFETY: `value` is live and `len` its size.
    check(unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            level,
            name,
            std::ptr::from_ref(value).cast(),
            len,
        )
    })
    .map(drop)
}
