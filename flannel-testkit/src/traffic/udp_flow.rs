//! A one-way stream of numbered datagrams, so that every loss is known.

use crate::eventually::patience;
use crate::family::Family;
use crate::netns::Netns;
use crate::socket;
use anyhow::{Context as _, ensure};
use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::net::{IpAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How often the receiver looks whether it is to stop.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// How long a stopped stream waits for late datagrams.
const GRACE: Duration = Duration::from_secs(1);

/// The account of a stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UdpStats {
    pub sent: u64,
    /// Numbers of the datagrams that did not arrive.
    pub lost: Vec<u64>,
    /// Datagrams that the sender's own stack refused, such as with "network is unreachable".
    pub refused: u64,
    /// How many of the lost ones came as far as the receiver's socket, which dropped them: it was full, or the checksum was wrong.
    pub dropped: u32,
}

/// A stream in threads of its own. Dropping it stops it.
#[derive(Debug)]
pub struct UdpFlow {
    stop: Arc<AtomicBool>,
    threads: Option<(JoinHandle<anyhow::Result<[u64; 2]>>, Receiver)>,
    sent: Arc<AtomicU64>,
}

type Receiver = JoinHandle<anyhow::Result<Received>>;

struct Received {
    numbers: BTreeSet<u64>,
    dropped: u32,
}

impl UdpFlow {
    /// Starts to send a datagram of `bytes` (8 at least) from the client to `server_ip` each `interval`.
    pub fn start(
        server_ns: &Netns,
        server_ip: impl Into<IpAddr>,
        client_ns: &Netns,
        interval: Duration,
        bytes: usize,
    ) -> anyhow::Result<UdpFlow> {
        let server_ip = server_ip.into();
        let server = receiver(server_ns, server_ip)?;
        let address = server.local_addr()?;
        let client = client_ns
            .try_run(|| UdpSocket::bind((Family::of(server_ip).unspecified(), 0)))?
            .with_context(|| format!("bind in {}", client_ns.name()))?;
        let stop = Arc::new(AtomicBool::new(false));
        let sent = Arc::new(AtomicU64::new(u64::MAX));
        let stopped = Arc::clone(&stop);
        let sender = std::thread::Builder::new()
            .name(format!("udp {}", client_ns.name()))
            .spawn(move || {
                let mut datagram = super::pattern(0, bytes);
                let (mut number, mut refused) = (0_u64, 0);
                let mut next = Instant::now();
                while !stopped.load(Ordering::Relaxed) {
                    datagram[..8].copy_from_slice(&number.to_be_bytes());
                    match client.send_to(&datagram, address) {
                        Ok(len) => ensure!(len == bytes, "sent {len} of {bytes} bytes"),
                        Err(_) => refused += 1,
                    }
                    number += 1;
                    next += interval;
                    std::thread::sleep(next.saturating_duration_since(Instant::now()));
                }
                Ok([number, refused])
            })?;
        let all = Arc::clone(&sent);
        let receiver = std::thread::Builder::new()
            .name(format!("udp {}", server_ns.name()))
            .spawn(move || receive(&server, bytes, &all))?;
        Ok(UdpFlow {
            stop,
            threads: Some((sender, receiver)),
            sent,
        })
    }

    /// Stops sending, waits for what is under way, and gives the account.
    pub fn stop(mut self) -> anyhow::Result<UdpStats> {
        self.stop.store(true, Ordering::Relaxed);
        let (sender, receiver) = self.threads.take().context("the stream has ended")?;
        let counted = sender
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        let sent = counted.as_ref().map_or(0, |[sent, _]| *sent);
        self.sent.store(sent, Ordering::Relaxed);
        let got = receiver
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        let [sent, refused] = counted?;
        let lost = (0..sent).filter(|number| !got.numbers.contains(number));
        Ok(UdpStats {
            sent,
            lost: lost.collect(),
            refused,
            dropped: got.dropped,
        })
    }
}

impl Drop for UdpFlow {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // The receiver ends when it knows of a number that has been sent.
        self.sent.fetch_min(0, Ordering::Relaxed);
    }
}

/// The socket of a receiver.
fn receiver(ns: &Netns, ip: IpAddr) -> anyhow::Result<UdpSocket> {
    let server = ns
        .try_run(|| UdpSocket::bind((ip, 0)))?
        .with_context(|| format!("bind {ip} in {}", ns.name()))?;
    socket::make_room(&server).context("SO_RCVBUFFORCE")?;
    server.set_read_timeout(Some(LOOK_EVERY))?;
    Ok(server)
}

/// Collects numbers until `sent`, known once it is not the greatest number of all, are there or [`GRACE`] has passed and none is left.
fn receive(server: &UdpSocket, bytes: usize, sent: &AtomicU64) -> anyhow::Result<Received> {
    let content = super::pattern(0, bytes);
    let mut buffer = vec![0; bytes + 1];
    let mut numbers = BTreeSet::new();
    let mut end = None;
    loop {
        let all = sent.load(Ordering::Relaxed);
        if all != u64::MAX {
            end = end.or_else(|| Some(Instant::now() + patience(GRACE)));
        }
        if numbers.len() as u64 >= all {
            break;
        }
        match server.recv(&mut buffer) {
            Ok(len) => {
                ensure!(
                    len == bytes && buffer[8..len] == content[8..],
                    "a datagram of {len} bytes differs from the {bytes} that were sent"
                );
                let mut number = [0; 8];
                number.copy_from_slice(&buffer[..8]);
                numbers.insert(u64::from_be_bytes(number));
            }
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted
                ) =>
            {
                if end.is_some_and(|end| Instant::now() >= end) {
                    break;
                }
            }
            Err(error) => return Err(error).context("receive a datagram"),
        }
    }
    Ok(Received {
        numbers,
        dropped: socket::dropped(server).context("SO_MEMINFO")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::{Lab, LabOptions, privileged};
    use std::net::Ipv6Addr;

    const BYTES: usize = 1300;

    fn send(ns: &Netns, to: &UdpSocket, numbers: std::ops::Range<u64>) {
        let to = to.local_addr().unwrap();
        let client = ns.run(|| UdpSocket::bind((Ipv6Addr::LOCALHOST, 0)).unwrap());
        let mut datagram = super::super::pattern(0, BYTES);
        for number in numbers {
            datagram[..8].copy_from_slice(&number.to_be_bytes());
            client.send_to(&datagram, to).unwrap();
        }
    }

    /// As a receiver whose thread gets no processor for two seconds.
    #[test]
    fn a_receiver_that_is_late_has_lost_nothing() {
        if !privileged() {
            return;
        }
        let (one_second, full) = (500, 20_000);
        let lab = Lab::new(LabOptions {
            nodes: 0,
            ..LabOptions::default()
        })
        .unwrap();
        let ns = lab.extra("late").unwrap();
        let server = receiver(&ns, Ipv6Addr::LOCALHOST.into()).unwrap();
        send(&ns, &server, 0..2 * one_second);
        let got = receive(&server, BYTES, &AtomicU64::new(2 * one_second)).unwrap();
        assert_eq!(got.numbers.len() as u64, 2 * one_second);
        assert_eq!(got.dropped, 0);

        // What a socket drops all the same it tells.
        send(&ns, &server, 0..full);
        let got = receive(&server, BYTES, &AtomicU64::new(full)).unwrap();
        assert!(got.dropped > 0);
        assert_eq!(got.numbers.len() as u64 + u64::from(got.dropped), full);
    }
}
