//! eBPF alone: outer fragments.
//!
//! A sender whose path is narrower than its pods believe lets the kernel fragment the outer packet. A vxlan device has a socket for
//! what the stack puts together again; where there is none this module is that socket. It must never see a packet that eBPF can
//! carry: only fragments, and outer headers with options, are let through to it.

use std::{
    io::{self, IoSliceMut},
    net::{IpAddr, SocketAddr},
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    time::Duration,
};

use flannel_core::{addr::IfIndex, datagram::Receiver};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg, setsockopt, sockopt::IpRecvTos};
use thiserror::Error;
use tokio::{io::Interest, net::UdpSocket, time::sleep};

use super::netlink::Netlink;
use crate::telemetry::chain;

/// The largest UDP payload.
const MAX_DATAGRAM: usize = 65_535;

/// What could not be done for fragments.
#[derive(Debug, Error)]
pub enum FragmentError {
    /// The port is somebody else's, or sockets are not permitted.
    #[error("listen for reassembled packets on {0}")]
    Listen(SocketAddr, #[source] io::Error),
    /// No raw socket.
    #[error("open a packet socket on interface {}", .0.get())]
    Packet(IfIndex, #[source] io::Error),
    /// The socket broke.
    #[error("receive reassembled packets")]
    Receive(#[source] io::Error),
}

/// How long to wait before trying again.
const RETRY: Duration = Duration::from_millis(200);

/// Keeps [`carry`] going, whatever becomes of the device. Each trouble is one line.
pub async fn keep(net: Netlink, receiver: Receiver, local: IpAddr, port: u16, far_end: String) {
    let mut said = None;
    loop {
        let text = match net.index(&far_end).await {
            Ok(Some(index)) => match carry(receiver, local, port, index).await {
                Ok(()) => return,
                // Made anew: once more at once.
                Err(FragmentError::Packet(..)) => None,
                Err(error) => Some(chain(&error)),
            },
            // The reconcile loop is about to make it.
            Ok(None) => None,
            Err(error) => Some(chain(&error)),
        };
        if let Some(error) = text.filter(|text| said.as_ref() != Some(text)) {
            tracing::warn!(error, "fragmented overlay packets cannot be received");
            said = Some(error);
        }
        sleep(RETRY).await;
    }
}

/// Receives reassembled datagrams at `local` and `port`, and hands their frames to the other end of the tunnel device, `far_end`, so
/// that the tunnel device receives them. Runs until it is dropped or the socket breaks.
async fn carry(
    receiver: Receiver,
    local: IpAddr,
    port: u16,
    far_end: IfIndex,
) -> Result<(), FragmentError> {
    let address = SocketAddr::new(local, port);
    let socket = listen(address).map_err(|source| FragmentError::Listen(address, source))?;
    let out = Injector::open(far_end).map_err(|source| FragmentError::Packet(far_end, source))?;
    let mut buffer = vec![0; MAX_DATAGRAM];
    loop {
        socket.readable().await.map_err(FragmentError::Receive)?;
        match socket.try_io(Interest::READABLE, || receive(&socket, &mut buffer)) {
            Ok((len, tos)) => {
                let datagram = buffer.get(..len).unwrap_or_default();
                match receiver.frame(datagram, tos) {
                    Ok(frame) => match out.send(&frame) {
                        // The device was made anew, under another index.
                        Err(error)
                            if matches!(error.raw_os_error(), Some(libc::ENODEV | libc::ENXIO)) =>
                        {
                            return Err(FragmentError::Packet(far_end, error));
                        }
                        // What is larger than the device is lost, as it would be on the way into it.
                        Err(error) => tracing::trace!(%error, len, "hand on a reassembled packet"),
                        Ok(()) => {}
                    },
                    Err(reason) => {
                        tracing::trace!(reason = reason.as_str(), "drop a reassembled packet");
                    }
                }
            }
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock
                ) => {}
            Err(error) => return Err(FragmentError::Receive(error)),
        }
    }
}

fn listen(address: SocketAddr) -> io::Result<UdpSocket> {
    let socket = std::net::UdpSocket::bind(address)?;
    socket.set_nonblocking(true)?;
    match address {
        SocketAddr::V4(_) => setsockopt(&socket, IpRecvTos, &true)?,
        SocketAddr::V6(_) => receive_class(&socket)?,
    }
    UdpSocket::from_std(socket)
}

/// Asks for the traffic class of what is received.
#[expect(unsafe_code, reason = "no safe wrapper knows this socket option")]
fn receive_class(socket: &std::net::UdpSocket) -> io::Result<()> {
    let on: libc::c_int = 1;
    // SAFETY: the value is a C int that lives through the call, and its size is its own.
    let answer = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_IPV6,
            libc::IPV6_RECVTCLASS,
            (&raw const on).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if answer == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// One datagram: its length and the TOS byte of the header it came under.
fn receive(socket: &UdpSocket, buffer: &mut [u8]) -> io::Result<(usize, u8)> {
    let mut control = nix::cmsg_space!(libc::c_int);
    let mut slices = [IoSliceMut::new(buffer)];
    let message = recvmsg::<()>(
        socket.as_raw_fd(),
        &mut slices,
        Some(&mut control),
        MsgFlags::empty(),
    )?;
    let tos = message.cmsgs()?.find_map(|message| match message {
        ControlMessageOwned::Ipv4Tos(tos) => Some(tos),
        ControlMessageOwned::Ipv6TClass(class) => u8::try_from(class).ok(),
        _ => None,
    });
    Ok((message.bytes, tos.unwrap_or(0)))
}

/// A packet socket on one interface.
struct Injector {
    socket: OwnedFd,
    address: libc::sockaddr_ll,
}

#[expect(unsafe_code, reason = "no safe wrapper builds a sockaddr_ll")]
impl Injector {
    fn open(ifindex: IfIndex) -> io::Result<Self> {
        // Protocol 0: it sends, and receives nothing.
        // SAFETY: a call without pointers.
        let fd = unsafe {
            libc::socket(
                libc::AF_PACKET,
                libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK,
                0,
            )
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was just made and belongs to nobody else.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: a plain C struct for which all zeros is a value.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_ifindex = ifindex.get() as i32;
        address.sll_halen = 6;
        Ok(Self { socket, address })
    }

    fn send(&self, frame: &[u8]) -> io::Result<()> {
        // SAFETY: buffer and address live through the call, their lengths are their own.
        let sent = unsafe {
            libc::sendto(
                self.socket.as_raw_fd(),
                frame.as_ptr().cast(),
                frame.len(),
                0,
                (&raw const self.address).cast(),
                size_of::<libc::sockaddr_ll>() as libc::socklen_t,
            )
        };
        if sent < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        }
    }
}
