//! Sockets in the pods, all with a limit on how long they wait.

use std::{
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::AsRawFd as _,
    time::Duration,
};

use anyhow::Context as _;
use nix::sys::{
    socket::{
        AddressFamily, SockFlag, SockType, SockaddrLike as _, SockaddrStorage, connect, setsockopt,
        socket,
        sockopt::{Linger, RcvBuf, ReceiveTimeout, SendTimeout},
    },
    time::TimeVal,
};

use crate::rig::End;

/// A packet that takes longer is lost for good.
pub(super) const PATIENCE: Duration = Duration::from_secs(2);
const PATIENCE_VAL: TimeVal = TimeVal::new(2, 0);

/// Listens in a pod; accepting gives up after [`PATIENCE`].
pub(super) fn listen(end: &End, port: u16) -> anyhow::Result<TcpListener> {
    let address = SocketAddr::from((end.ip, port));
    let listener = end
        .ns
        .try_run(|| TcpListener::bind(address))?
        .with_context(|| format!("listen on {address}"))?;
    setsockopt(&listener, ReceiveTimeout, &PATIENCE_VAL)?;
    Ok(listener)
}

/// Connects from a pod.
pub(super) fn connect_from(end: &End, address: SocketAddr) -> anyhow::Result<TcpStream> {
    let stream = end
        .ns
        .try_run(|| TcpStream::connect_timeout(&address, PATIENCE))?
        .with_context(|| format!("connect to {address}"))?;
    prepare(&stream)?;
    Ok(stream)
}

/// Accepts, and prepares what comes.
pub(super) fn accept(listener: &TcpListener) -> anyhow::Result<TcpStream> {
    let (stream, _) = listener.accept().context("accept")?;
    prepare(&stream)?;
    Ok(stream)
}

fn prepare(stream: &TcpStream) -> anyhow::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(())
}

/// Connects from this thread's namespace with as few system calls as can be; closing resets, so that no port is kept.
pub(super) fn connect_here(address: &SockaddrStorage) -> anyhow::Result<TcpStream> {
    let fd = socket(
        address.family().unwrap_or(AddressFamily::Inet),
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    let reset = libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    setsockopt(&fd, Linger, &reset)?;
    setsockopt(&fd, SendTimeout, &PATIENCE_VAL)?;
    setsockopt(&fd, ReceiveTimeout, &PATIENCE_VAL)?;
    connect(fd.as_raw_fd(), address).context("connect")?;
    Ok(TcpStream::from(fd))
}

/// Binds in a pod; port 0 is any.
pub(super) fn bind_udp(end: &End, port: u16) -> anyhow::Result<UdpSocket> {
    let address = (end.ip, port);
    let socket = end
        .ns
        .try_run(|| UdpSocket::bind(address))?
        .with_context(|| format!("bind {}:{port}", end.ip))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    Ok(socket)
}

/// Takes the smallest receive buffer: nobody reads, and what does not fit is counted by the kernel.
pub(super) fn shrink(socket: &UdpSocket) -> anyhow::Result<()> {
    setsockopt(socket, RcvBuf, &0)?;
    Ok(())
}

/// The address in the kernel's form.
pub(super) fn sockaddr(ip: IpAddr, port: u16) -> SockaddrStorage {
    SocketAddr::from((ip, port)).into()
}
