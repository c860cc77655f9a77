//! TCP connections of which both ends are in the caller's hands.

use crate::eventually::patience;
use crate::netns::Netns;
use crate::process::poll_in;
use crate::socket;
use anyhow::{Context as _, ensure};
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

/// How long a connection may stand still, or take to come about.
const LIMIT: Duration = Duration::from_secs(5);
/// Bytes handed to the kernel at a time.
const CHUNK: usize = 256 << 10;

/// A listening socket.
#[derive(Debug)]
pub struct TcpServer {
    listener: TcpListener,
    /// Where it listens.
    pub address: SocketAddr,
}

impl TcpServer {
    /// Listens on `ip` and `port` of `ns`; port 0 is any.
    pub fn listen(ns: &Netns, ip: impl Into<IpAddr>, port: u16) -> anyhow::Result<TcpServer> {
        let ip = ip.into();
        let address = SocketAddr::new(ip, port);
        let listener = ns
            .try_run(|| socket::free_address(|| socket::listen(address)))?
            .with_context(|| format!("listen on {address} in {}", ns.name()))?;
        let port = listener.local_addr()?.port();
        Ok(TcpServer {
            listener,
            address: SocketAddr::new(ip, port),
        })
    }
}

/// An established connection: what is sent at one end is read, and compared, at the other.
#[derive(Debug)]
pub struct TcpPair {
    client: TcpStream,
    server: TcpStream,
    /// The client's own address.
    pub local: SocketAddr,
    /// The client's address as the server sees it.
    pub seen: SocketAddr,
    /// Which of the servers has taken the connection.
    pub by: usize,
}

/// A way of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From the client to the server.
    Up,
    /// From the server to the client.
    Down,
}

impl TcpPair {
    /// Connects `client_ns` to `target`, which one of `servers` answers.
    pub fn connect(
        client_ns: &Netns,
        target: SocketAddr,
        servers: &[&TcpServer],
    ) -> anyhow::Result<TcpPair> {
        TcpPair::connect_from(client_ns, 0, target, servers)
    }

    /// Like [`TcpPair::connect`] from a port of the caller's choice, or any if it is 0.
    pub fn connect_from(
        client_ns: &Netns,
        port: u16,
        target: SocketAddr,
        servers: &[&TcpServer],
    ) -> anyhow::Result<TcpPair> {
        TcpPair::connect_within(patience(LIMIT), client_ns, port, target, servers)
    }

    /// Opens `count` connections to one server.
    pub fn connect_many(
        client_ns: &Netns,
        target: SocketAddr,
        server: &TcpServer,
        count: usize,
    ) -> anyhow::Result<Vec<TcpPair>> {
        client_ns.try_run(|| {
            let connect = |_| {
                let client = socket::connect(0, target, patience(LIMIT))?;
                TcpPair::accept(client, &[&server.listener])
            };
            (0..count)
                .map(connect)
                .collect::<anyhow::Result<_>>()
                .with_context(|| format!("{count} connections to {target}"))
        })?
    }

    /// Like [`TcpPair::connect_from`] with a time limit of the caller's.
    pub fn connect_within(
        limit: Duration,
        client_ns: &Netns,
        port: u16,
        target: SocketAddr,
        servers: &[&TcpServer],
    ) -> anyhow::Result<TcpPair> {
        let what = || format!("connect from {} to {target}", client_ns.name());
        let client = client_ns
            .try_run(|| socket::connect(port, target, limit))?
            .with_context(what)?;
        let listeners: Vec<&TcpListener> = servers.iter().map(|server| &server.listener).collect();
        TcpPair::accept(client, &listeners).with_context(what)
    }

    fn accept(client: TcpStream, listeners: &[&TcpListener]) -> anyhow::Result<TcpPair> {
        client.set_nodelay(true)?;
        let local = client.local_addr()?;
        let by = socket::first_readable(listeners, patience(LIMIT))?
            .context("connected, but to none of the servers")?;
        let (server, seen) = listeners[by].accept()?;
        for end in [&client, &server] {
            end.set_read_timeout(Some(patience(LIMIT)))?;
            end.set_write_timeout(Some(patience(LIMIT)))?;
        }
        server.set_nodelay(true)?;
        Ok(TcpPair {
            client,
            server,
            local,
            seen,
            by,
        })
    }

    /// Sends `bytes` one way and compares them at the other end.
    pub fn send(&mut self, way: Way, bytes: usize) -> anyhow::Result<()> {
        let (from, to) = match way {
            Way::Up => (&self.client, &self.server),
            Way::Down => (&self.server, &self.client),
        };
        carry(from, to, bytes).with_context(|| {
            format!(
                "{bytes} bytes {way:?} a connection from {} ({}) to server {}",
                self.local, self.seen, self.by
            )
        })
    }

    /// Sends `bytes` there, then back.
    pub fn exchange(&mut self, bytes: usize) -> anyhow::Result<()> {
        self.send(Way::Up, bytes)?;
        self.send(Way::Down, bytes)
    }

    /// Sends one byte and says whether anything arrives at the other end in time. What does is taken, and not compared: do not
    /// use [`TcpPair::send`] on the connection after this.
    pub fn arrives(&mut self, way: Way, within: Duration) -> anyhow::Result<bool> {
        let (mut from, mut to) = match way {
            Way::Up => (&self.client, &self.server),
            Way::Down => (&self.server, &self.client),
        };
        from.write_all(&[0])?;
        if !poll_in(to, within)? {
            return Ok(false);
        }
        let len = to.read(&mut [0; 4096])?;
        ensure!(len > 0, "the connection from {} is closed", self.local);
        Ok(true)
    }

    /// Closes one end's sending side with a FIN, which the other end must see.
    pub fn finish(&mut self, way: Way) -> anyhow::Result<()> {
        let (from, to) = match way {
            Way::Up => (&self.client, &self.server),
            Way::Down => (&self.server, &self.client),
        };
        from.shutdown(Shutdown::Write)?;
        expect_end(to).with_context(|| format!("FIN {way:?} from {}", self.local))
    }

    /// Closes both ways in good order, the client first.
    pub fn close(mut self) -> anyhow::Result<()> {
        self.finish(Way::Up)?;
        self.finish(Way::Down)
    }

    /// Closes with a RST from the client, which the server must see.
    pub fn reset(self) -> anyhow::Result<()> {
        socket::linger_nothing(&self.client)?;
        drop(self.client);
        let seen = (&self.server).read(&mut [0; 16]);
        match seen {
            Err(err) if err.kind() == ErrorKind::ConnectionReset => Ok(()),
            other => anyhow::bail!("RST from {}: the server saw {other:?}", self.local),
        }
    }

    /// Closes both ends with a RST that nobody need see.
    pub fn abandon(self) -> anyhow::Result<()> {
        socket::linger_nothing(&self.client)?;
        Ok(socket::linger_nothing(&self.server)?)
    }

    /// Segments that either end has sent again because they were lost.
    pub fn lost_segments(&self) -> anyhow::Result<u32> {
        Ok(socket::lost_segments(&[&self.client, &self.server])?)
    }

    /// The client's end.
    pub fn client(&self) -> &TcpStream {
        &self.client
    }

    /// The server's end.
    pub fn server(&self) -> &TcpStream {
        &self.server
    }
}

fn carry(from: &TcpStream, to: &TcpStream, bytes: usize) -> anyhow::Result<()> {
    if bytes <= 16 << 10 {
        // Fits every socket buffer: no thread.
        put(from, bytes)?;
        return get(to, bytes);
    }
    std::thread::scope(|scope| {
        let sender = scope.spawn(|| {
            let sent = put(from, bytes);
            if sent.is_err() {
                // Ends the receiver too.
                drop(to.shutdown(Shutdown::Read));
            }
            sent
        });
        let got = get(to, bytes);
        if got.is_err() {
            drop(from.shutdown(Shutdown::Both));
        }
        let sent = sender
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        match (sent, got) {
            (Err(sent), Err(got)) => Err(sent.context(format!("receiver: {got:#}"))),
            (sent, got) => sent.and(got),
        }
    })
}

fn put(mut stream: &TcpStream, bytes: usize) -> anyhow::Result<()> {
    let block = super::pattern(0, CHUNK.min(bytes));
    let mut left = bytes;
    while left > 0 {
        // Every chunk but the last is a whole block: the receiver counts on it.
        stream
            .write_all(&block[..left.min(CHUNK)])
            .with_context(|| format!("write, {left} of {bytes} bytes left"))?;
        left -= left.min(CHUNK);
    }
    Ok(())
}

fn get(mut stream: &TcpStream, bytes: usize) -> anyhow::Result<()> {
    let block = super::pattern(0, CHUNK.min(bytes));
    let mut buffer = vec![0; CHUNK.min(bytes)];
    let mut left = bytes;
    while left > 0 {
        let now = left.min(CHUNK);
        stream
            .read_exact(&mut buffer[..now])
            .with_context(|| format!("read, {left} of {bytes} bytes left"))?;
        ensure!(
            buffer[..now] == block[..now],
            "altered on the way, {left} of {bytes} bytes left"
        );
        left -= now;
    }
    Ok(())
}

fn expect_end(mut stream: &TcpStream) -> anyhow::Result<()> {
    ensure!(poll_in(stream, patience(LIMIT))?, "it did not arrive");
    let len = stream.read(&mut [0; 16])?;
    ensure!(len == 0, "{len} bytes came instead");
    Ok(())
}
