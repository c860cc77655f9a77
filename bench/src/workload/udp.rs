//! UDP: round trips, and as many datagrams as the path carries.

use std::{
    fs,
    net::{IpAddr, SocketAddr, UdpSocket},
    os::fd::AsRawFd as _,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use nix::sys::socket::{SockaddrLike as _, SockaddrStorage};

use super::socket::{bind_udp, shrink};
use crate::{
    pin,
    rig::{End, Rig},
};

const ECHO_PORT: u16 = 7007;
/// First of the ports that nobody reads.
const SINK_PORT: u16 = 20_000;
/// Until caches are warm and, with a gate, the flow is established.
const WARM_UP: Duration = Duration::from_millis(10);
/// Datagrams handed over at a time.
const BATCH: usize = 50;
/// Datagrams still on their way when the sender is done.
const SETTLE: Duration = Duration::from_millis(3);

/// Round trips a second of one byte, both ends on the first CPU.
pub(super) fn round_trips(rig: &Rig, length: Duration) -> anyhow::Result<f64> {
    let server = bind_udp(&rig.server, ECHO_PORT)?;
    let client = bind_udp(&rig.client, 0)?;
    client.connect((rig.server.ip, ECHO_PORT))?;
    server.connect(SocketAddr::from((
        rig.client.ip,
        client.local_addr()?.port(),
    )))?;
    thread::scope(|scope| {
        let echo = scope.spawn(|| echo(&server));
        let asking = scope.spawn(|| {
            pin::fifo_on_cpu(0)?;
            let outcome = ask(&client, WARM_UP).and_then(|_| ask(&client, length));
            // An empty datagram ends it.
            client.send(&[])?;
            outcome
        });
        let outcome = asking
            .join()
            .map_err(|_| anyhow::anyhow!("the client panicked"))?;
        let echoed = echo
            .join()
            .map_err(|_| anyhow::anyhow!("the server panicked"))?;
        let (count, took) = outcome.context("client")?;
        echoed.context("server")?;
        Ok(count as f64 / took.as_secs_f64())
    })
}

fn echo(socket: &UdpSocket) -> anyhow::Result<()> {
    pin::fifo_on_cpu(0)?;
    let mut buffer = [0; 16];
    loop {
        let len = socket.recv(&mut buffer)?;
        if len == 0 {
            return Ok(());
        }
        socket.send(&buffer[..len])?;
    }
}

fn ask(socket: &UdpSocket, length: Duration) -> anyhow::Result<(u64, Duration)> {
    let start = Instant::now();
    let mut buffer = [0; 16];
    let mut count = 0;
    loop {
        socket.send(b"x")?;
        socket.recv(&mut buffer).context("no answer")?;
        count += 1;
        let took = start.elapsed();
        if took >= length {
            return Ok((count, took));
        }
    }
}

/// Datagrams a second that reach the server's socket, sent from and received on the first CPU, over `flows` pairs of ports.
///
/// Nobody reads: what arrives is dropped for want of space and counted by the kernel, so that only the path costs.
pub(super) fn packets(
    rig: &Rig,
    size: usize,
    flows: usize,
    length: Duration,
) -> anyhow::Result<f64> {
    let (clients, sinks) = ports(flows);
    let sinks: Vec<UdpSocket> = (0..sinks)
        .map(|sink| bind_udp(&rig.server, SINK_PORT + sink as u16))
        .collect::<Result<_, _>>()?;
    for sink in &sinks {
        shrink(sink)?;
    }
    let addresses: Vec<SocketAddr> = (0..sinks.len())
        .map(|sink| SocketAddr::from((rig.server.ip, SINK_PORT + sink as u16)))
        .collect();
    let sockets: Vec<UdpSocket> = (0..clients)
        .map(|_| bind_udp(&rig.client, 0))
        .collect::<Result<_, _>>()?;
    if let ([socket], [address]) = (sockets.as_slice(), addresses.as_slice()) {
        socket.connect(address)?;
    }
    let mut batches: Vec<Batch> = Vec::new();
    for socket in &sockets {
        for chunk in addresses.chunks(BATCH) {
            batches.push(Batch::new(socket, chunk, flows == 1, size));
        }
    }
    // Every pair has been seen, and every buffer is full.
    let full = batches.len().max(10);
    on_first_cpu(|| {
        let mut sent = 0;
        for turn in 0..full {
            let at = turn % batches.len();
            sent += batches[at].send()?;
        }
        Ok(sent)
    })?;
    thread::sleep(SETTLE);
    let before = dropped(&rig.server)?;
    let (sent, took) = on_first_cpu(|| {
        let start = Instant::now();
        let mut sent = 0;
        loop {
            for batch in &mut batches {
                sent += batch.send()?;
                let took = start.elapsed();
                if took >= length {
                    return Ok((sent, took));
                }
            }
        }
    })?;
    thread::sleep(SETTLE);
    let arrived = dropped(&rig.server)?.saturating_sub(before);
    ensure!(arrived > 0, "none of {sent} datagrams arrived");
    Ok(arrived as f64 / took.as_secs_f64())
}

/// Runs `work` in a thread that has the first CPU to itself.
fn on_first_cpu<T: Send>(work: impl FnOnce() -> anyhow::Result<T> + Send) -> anyhow::Result<T> {
    thread::scope(|scope| {
        let thread = scope.spawn(|| {
            pin::fifo_on_cpu(0)?;
            work()
        });
        thread
            .join()
            .map_err(|_| anyhow::anyhow!("the sender panicked"))?
    })
}

/// How many client sockets and how many sinks give so many pairs.
fn ports(flows: usize) -> (usize, usize) {
    let sinks = (1..=400.min(flows))
        .rev()
        .find(|sinks| flows.is_multiple_of(*sinks) && sinks * sinks <= 2 * flows)
        .unwrap_or(1);
    (flows / sinks, sinks)
}

/// Datagrams that the kernel had no room for in the sockets of a pod.
fn dropped(end: &End) -> anyhow::Result<u64> {
    let (file, parse): (_, fn(&str) -> Option<u64>) = match end.ip {
        IpAddr::V4(_) => ("/proc/thread-self/net/snmp", in_errors),
        IpAddr::V6(_) => ("/proc/thread-self/net/snmp6", in_errors_v6),
    };
    let text = end
        .ns
        .try_run(|| fs::read_to_string(file))?
        .context("read the UDP counters")?;
    parse(&text).context("the UDP counters have no InErrors")
}

fn in_errors(snmp: &str) -> Option<u64> {
    let mut lines = snmp.lines().filter_map(|line| line.strip_prefix("Udp: "));
    let (names, values) = (lines.next()?, lines.next()?);
    let at = names
        .split_whitespace()
        .position(|name| name == "InErrors")?;
    values.split_whitespace().nth(at)?.parse().ok()
}

fn in_errors_v6(snmp6: &str) -> Option<u64> {
    let value = snmp6
        .lines()
        .find_map(|line| line.strip_prefix("Udp6InErrors"))?;
    value.trim().parse().ok()
}

/// Datagrams for one `sendmmsg`, from one socket, built once.
struct Batch {
    fd: i32,
    messages: Vec<libc::mmsghdr>,
    // What the messages point to; never touched again.
    _payload: Box<[u8]>,
    _vector: Box<libc::iovec>,
    _names: Box<[SockaddrStorage]>,
}

// SAFETY: the pointers lead to boxes that the batch owns and that nobody writes to.
unsafe impl Send for Batch {}

impl Batch {
    /// One datagram to each address; [`BATCH`] of them to the peer of a connected socket.
    fn new(socket: &UdpSocket, addresses: &[SocketAddr], connected: bool, size: usize) -> Self {
        let mut payload = vec![0x5a_u8; size].into_boxed_slice();
        let mut vector = Box::new(libc::iovec {
            iov_base: payload.as_mut_ptr().cast(),
            iov_len: size,
        });
        let mut names: Box<[SockaddrStorage]> = addresses
            .iter()
            .map(|address| SockaddrStorage::from(*address))
            .collect();
        let count = if connected { BATCH } else { names.len() };
        let messages = (0..count)
            .map(|index| {
                // SAFETY: a message header is plain data; zeros are an empty one.
                let mut message: libc::mmsghdr = unsafe { std::mem::zeroed() };
                message.msg_hdr.msg_iov = &raw mut *vector;
                message.msg_hdr.msg_iovlen = 1;
                if !connected {
                    message.msg_hdr.msg_namelen = names[index].len();
                    message.msg_hdr.msg_name = (&raw mut names[index]).cast();
                }
                message
            })
            .collect();
        Self {
            fd: socket.as_raw_fd(),
            messages,
            _payload: payload,
            _vector: vector,
            _names: names,
        }
    }

    fn send(&mut self) -> anyhow::Result<u64> {
        // SAFETY: the headers and all they point to are owned by this batch, and their number is right.
        let sent = unsafe {
            libc::sendmmsg(
                self.fd,
                self.messages.as_mut_ptr(),
                self.messages.len() as u32,
                0,
            )
        };
        u64::try_from(sent)
            .map_err(|_| std::io::Error::last_os_error())
            .context("sendmmsg")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_of_ports_add_up() {
        for (flows, expected) in [(1, (1, 1)), (10_000, (80, 125)), (100_000, (250, 400))] {
            let (clients, sinks) = ports(flows);
            assert_eq!(clients * sinks, flows);
            assert_eq!((clients, sinks), expected);
        }
    }

    #[test]
    fn the_counter_is_found_by_its_name() {
        let text = "Ip: a b\nIp: 1 2\nUdp: InDatagrams NoPorts InErrors OutDatagrams\nUdp: 5 6 7 8\nUdpLite: InErrors\nUdpLite: 9\n";
        assert_eq!(in_errors(text), Some(7));
        assert_eq!(in_errors("Ip: a\nIp: 1\n"), None);
    }
}
