//! A TCP stream whose every byte is checked.

use super::PERIOD;
use crate::eventually::patience;
use crate::netns::Netns;
use crate::process::poll_in;
use crate::socket;
use anyhow::{Context as _, ensure};
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long connecting may take.
const CONNECT: Duration = Duration::from_secs(10);
/// How long a stream may stand still before it counts as broken.
const STALL: Duration = Duration::from_secs(30);
/// Bytes handed to the kernel at a time.
const CHUNK: usize = 128 << 10;

/// How much to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Amount {
    Bytes(u64),
    For(Duration),
}

/// The account of a transfer.
#[derive(Clone, Debug, PartialEq)]
pub struct TcpStats {
    /// Bytes that arrived, all of them right.
    pub bytes: u64,
    /// From the first byte sent to the last one received.
    pub elapsed: Duration,
    /// Megabits of payload a second.
    pub mbps: f64,
    /// Segments that the sender sent again (`tcpi_total_retrans`).
    pub retransmits: u32,
    /// Those of them that had not arrived already.
    pub lost: u32,
    /// The longest time in which the receiver got nothing.
    pub longest_stall: Duration,
    /// The sender's segment size in bytes at the end.
    pub mss: u32,
}

/// Sends a stream from the client to `server_ip` and checks it there. Fails when it stands still for 30 s, is cut or altered.
pub fn tcp_transfer(
    server_ns: &Netns,
    server_ip: impl Into<IpAddr>,
    client_ns: &Netns,
    amount: Amount,
) -> anyhow::Result<TcpStats> {
    let end = match amount {
        Amount::For(time) => Some(Instant::now() + time),
        Amount::Bytes(_) => None,
    };
    let server_ip = server_ip.into();
    transfer(server_ns, server_ip, client_ns, None, |sent| match amount {
        Amount::Bytes(all) => usize::try_from(all - sent).unwrap_or(CHUNK).min(CHUNK),
        Amount::For(_) if end.is_some_and(|end| Instant::now() >= end) => 0,
        Amount::For(_) => CHUNK,
    })
}

/// A stream in a thread of its own that lasts until it is stopped, for as many events as a test likes.
#[derive(Debug)]
pub struct TcpFlow {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<anyhow::Result<TcpStats>>>,
}

impl TcpFlow {
    /// Starts to send from the client to `server_ip`, as fast as it goes, and returns when it flows; whether that works is known at the end.
    pub fn start(
        server_ns: &Netns,
        server_ip: impl Into<IpAddr>,
        client_ns: &Netns,
    ) -> anyhow::Result<TcpFlow> {
        Self::begin(server_ns, server_ip.into(), client_ns, None)
    }

    /// Like [`TcpFlow::start`], at no more than `rate` bytes a second: what is lost then was not lost in an overflowing queue.
    pub fn start_paced(
        server_ns: &Netns,
        server_ip: impl Into<IpAddr>,
        client_ns: &Netns,
        rate: u32,
    ) -> anyhow::Result<TcpFlow> {
        Self::begin(server_ns, server_ip.into(), client_ns, Some(rate))
    }

    fn begin(
        server_ns: &Netns,
        server_ip: IpAddr,
        client_ns: &Netns,
        rate: Option<u32>,
    ) -> anyhow::Result<TcpFlow> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let (server, client) = (server_ns.clone(), client_ns.clone());
        let (flowing, under_way) = mpsc::sync_channel(1);
        let thread = std::thread::Builder::new()
            .name(format!("tcp {}", client_ns.name()))
            .spawn(move || {
                transfer(&server, server_ip, &client, rate, |sent| {
                    if sent > 0 {
                        let _first = flowing.try_send(());
                    }
                    if stopped.load(Ordering::Relaxed) {
                        0
                    } else {
                        CHUNK
                    }
                })
            })?;
        // What follows is to happen to a stream that flows. One that cannot begin ends its thread, and says so at the end.
        let _flows = under_way.recv_timeout(patience(CONNECT));
        Ok(TcpFlow {
            stop,
            thread: Some(thread),
        })
    }

    /// Stops sending, waits for what is under way, and gives the account. A stream that broke before is an error.
    pub fn stop(mut self) -> anyhow::Result<TcpStats> {
        self.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.take().context("the flow has ended")?;
        thread
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

impl Drop for TcpFlow {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// Sends as long as `left`, given the bytes sent so far, says how many of at most [`CHUNK`] to send next.
fn transfer(
    server_ns: &Netns,
    server_ip: IpAddr,
    client_ns: &Netns,
    rate: Option<u32>,
    left: impl Fn(u64) -> usize,
) -> anyhow::Result<TcpStats> {
    let listener = server_ns
        .try_run(|| TcpListener::bind((server_ip, 0)))?
        .with_context(|| format!("listen on {server_ip} in {}", server_ns.name()))?;
    let address = listener.local_addr()?;
    let client = client_ns
        .try_run(|| TcpStream::connect_timeout(&address, patience(CONNECT)))?
        .with_context(|| format!("connect to {address} from {}", client_ns.name()))?;
    // The client is connected, but if its last ACK was lost the server waits for another.
    ensure!(
        poll_in(&listener, patience(CONNECT))?,
        "{address} connected to, but not from"
    );
    let (server, _) = listener.accept()?;
    client.set_write_timeout(Some(patience(STALL)))?;
    if let Some(rate) = rate {
        socket::set_socket_option(
            &client,
            libc::SOL_SOCKET,
            libc::SO_MAX_PACING_RATE,
            rate.cast_signed(),
        )?;
    }
    server.set_read_timeout(Some(patience(STALL)))?;
    let start = Instant::now();
    let (sent, got) = std::thread::scope(|scope| {
        let receiver = scope.spawn(|| receive(&server, address, start));
        let sent = send(&client, left);
        if sent.is_err() {
            // Ends the receiver too.
            drop(client.shutdown(Shutdown::Both));
        }
        (sent, receiver.join())
    });
    let got = got.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    let got = got.context("receiver");
    let sent = match (sent, &got) {
        (Ok(sent), _) => sent,
        (Err(err), Err(other)) => return Err(err.context(format!("sender ({other:#})"))),
        (Err(err), Ok(_)) => return Err(err.context("sender")),
    };
    let got = got?;
    ensure!(
        sent == got.bytes,
        "{sent} bytes sent, {} arrived",
        got.bytes
    );
    let info = socket::tcp_info(&client).context("TCP_INFO")?;
    let elapsed = got.end.duration_since(start);
    Ok(TcpStats {
        bytes: sent,
        elapsed,
        #[expect(clippy::cast_precision_loss, reason = "a rate, not an account")]
        mbps: sent as f64 * 8.0 / 1e6 / elapsed.as_secs_f64().max(1e-9),
        retransmits: info.tcpi_total_retrans,
        lost: socket::lost_segments(&[&client])?,
        longest_stall: got.longest_stall,
        mss: info.tcpi_snd_mss,
    })
}

struct Received {
    bytes: u64,
    end: Instant,
    longest_stall: Duration,
}

fn send(mut stream: &TcpStream, left: impl Fn(u64) -> usize) -> anyhow::Result<u64> {
    // Two periods and a chunk: any position in the period has a whole chunk behind it.
    let block = super::pattern(0, PERIOD + CHUNK);
    let mut sent = 0_u64;
    loop {
        let left = left(sent);
        if left == 0 {
            break;
        }
        let from = position(sent);
        match stream.write(&block[from..from + left]) {
            Ok(len) => sent += len as u64,
            Err(err) if err.kind() == ErrorKind::Interrupted => {}
            Err(err) => return Err(err).with_context(|| format!("write at byte {sent}")),
        }
    }
    stream.shutdown(Shutdown::Write)?;
    Ok(sent)
}

fn receive(
    mut stream: &TcpStream,
    address: SocketAddr,
    start: Instant,
) -> anyhow::Result<Received> {
    let block = super::pattern(0, PERIOD + CHUNK);
    let mut buffer = vec![0; CHUNK];
    let mut got = Received {
        bytes: 0,
        end: start,
        longest_stall: Duration::ZERO,
    };
    loop {
        let len = match stream.read(&mut buffer) {
            Ok(len) => len,
            Err(err) if err.kind() == ErrorKind::Interrupted => continue,
            Err(err) => {
                return Err(err)
                    .with_context(|| format!("read at byte {} on {address}", got.bytes));
            }
        };
        let now = Instant::now();
        got.longest_stall = got.longest_stall.max(now.duration_since(got.end));
        got.end = now;
        if len == 0 {
            return Ok(got);
        }
        let from = position(got.bytes);
        ensure!(
            buffer[..len] == block[from..from + len],
            "the stream differs from what was sent within {len} bytes from byte {}",
            got.bytes
        );
        got.bytes += len as u64;
    }
}

/// The place of byte `at` of the stream in the pattern.
fn position(at: u64) -> usize {
    usize::try_from(at % PERIOD as u64).unwrap_or(0)
}
