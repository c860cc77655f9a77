//! UDP sockets of which both ends are in the caller's hands.

use crate::eventually::patience;
use crate::netns::Netns;
use crate::socket;
use anyhow::{Context as _, ensure};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

/// How long one datagram may take in one direction.
const LIMIT: Duration = Duration::from_secs(3);

/// A bound socket that is connected to nobody, so that it sees who answers.
#[derive(Debug)]
pub struct UdpEnd {
    socket: UdpSocket,
    /// Where it is bound.
    pub address: SocketAddr,
}

impl UdpEnd {
    /// Binds a socket of `ns` to `ip` and `port`; port 0 is any.
    pub fn bind(ns: &Netns, ip: impl Into<IpAddr>, port: u16) -> anyhow::Result<UdpEnd> {
        let ip = ip.into();
        let address = SocketAddr::new(ip, port);
        let socket = ns
            .try_run(|| socket::free_address(|| UdpSocket::bind(address)))?
            .with_context(|| format!("bind {address} in {}", ns.name()))?;
        socket.set_read_timeout(Some(patience(LIMIT)))?;
        socket.set_write_timeout(Some(patience(LIMIT)))?;
        let port = socket.local_addr()?.port();
        Ok(UdpEnd {
            socket,
            address: SocketAddr::new(ip, port),
        })
    }

    /// The socket, to set options.
    pub fn socket(&self) -> &UdpSocket {
        &self.socket
    }

    /// Sends `bytes` of the pattern from position `mark` on.
    pub fn send(&self, to: SocketAddr, mark: usize, bytes: usize) -> anyhow::Result<()> {
        let len = self
            .socket
            .send_to(&super::pattern(mark, bytes), to)
            .with_context(|| format!("send {bytes} bytes from {} to {to}", self.address))?;
        ensure!(len == bytes, "sent {len} of {bytes} bytes");
        Ok(())
    }

    /// Receives what another end has sent with [`UdpEnd::send`], and gives the sender.
    pub fn receive(&self, mark: usize, bytes: usize) -> anyhow::Result<SocketAddr> {
        let mut buffer = vec![0; 65_536];
        let (len, from) = self
            .socket
            .recv_from(&mut buffer)
            .with_context(|| format!("receive {bytes} bytes at {}", self.address))?;
        ensure!(
            buffer[..len] == super::pattern(mark, bytes),
            "{len} bytes from {from} at {} differ from the {bytes} that were sent",
            self.address
        );
        Ok(from)
    }

    /// Whether a datagram is there or comes in time. It is taken.
    pub fn has_some(&self, within: Duration) -> anyhow::Result<bool> {
        let some = socket::first_readable(&[&self.socket], within)?.is_some();
        if some {
            self.socket.recv_from(&mut [0; 16])?;
        }
        Ok(some)
    }

    /// Takes what is there.
    pub fn take_all(&self) -> anyhow::Result<()> {
        while self.has_some(Duration::ZERO)? {}
        Ok(())
    }

    /// Sends a datagram of `bytes` to `target`, has the one of `servers` that gets it answer with as many, and gives its number and the
    /// client's address as it sees it. Fails when the answer comes from anywhere but `target`.
    pub fn ask(
        &self,
        target: SocketAddr,
        servers: &[&UdpEnd],
        bytes: usize,
    ) -> anyhow::Result<(usize, SocketAddr)> {
        self.ask_within(patience(LIMIT), target, servers, bytes)
    }

    /// Like [`UdpEnd::ask`], with a limit for the time that each datagram takes.
    pub fn ask_within(
        &self,
        limit: Duration,
        target: SocketAddr,
        servers: &[&UdpEnd],
        bytes: usize,
    ) -> anyhow::Result<(usize, SocketAddr)> {
        self.send(target, 1, bytes)?;
        let sockets: Vec<&UdpSocket> = servers.iter().map(|server| &server.socket).collect();
        let by = socket::first_readable(&sockets, limit)?.with_context(|| {
            format!(
                "{bytes} bytes from {} to {target} did not arrive",
                self.address
            )
        })?;
        let server = servers[by];
        let seen = server.receive(1, bytes)?;
        server.send(seen, 2, bytes)?;
        let answered = socket::first_readable(&[&self.socket], limit)?.is_some();
        ensure!(
            answered,
            "the answer from {target} to {} did not arrive",
            self.address
        );
        let from = self.receive(2, bytes)?;
        ensure!(
            from == target,
            "{} asked {target}, the answer came from {from}",
            self.address
        );
        Ok((by, seen))
    }
}
