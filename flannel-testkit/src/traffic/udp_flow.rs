//! A one-way stream of numbered datagrams, so that every loss is known.

use crate::eventually::patience;
use crate::family::Family;
use crate::netns::Netns;
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
}

/// A stream in threads of its own. Dropping it stops it.
#[derive(Debug)]
pub struct UdpFlow {
    stop: Arc<AtomicBool>,
    threads: Option<(JoinHandle<anyhow::Result<[u64; 2]>>, Receiver)>,
    sent: Arc<AtomicU64>,
}

type Receiver = JoinHandle<anyhow::Result<BTreeSet<u64>>>;

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
        let server = server_ns
            .try_run(|| UdpSocket::bind((server_ip, 0)))?
            .with_context(|| format!("bind {server_ip} in {}", server_ns.name()))?;
        let address = server.local_addr()?;
        let client = client_ns
            .try_run(|| UdpSocket::bind((Family::of(server_ip).unspecified(), 0)))?
            .with_context(|| format!("bind in {}", client_ns.name()))?;
        server.set_read_timeout(Some(LOOK_EVERY))?;
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
        let lost = (0..sent).filter(|number| !got.contains(number)).collect();
        Ok(UdpStats {
            sent,
            lost,
            refused,
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

/// Collects numbers until `sent`, known once it is not the greatest number of all, are there or [`GRACE`] has passed.
fn receive(server: &UdpSocket, bytes: usize, sent: &AtomicU64) -> anyhow::Result<BTreeSet<u64>> {
    let content = super::pattern(0, bytes);
    let mut buffer = vec![0; bytes + 1];
    let mut got = BTreeSet::new();
    let mut end = None;
    loop {
        let all = sent.load(Ordering::Relaxed);
        if all != u64::MAX {
            let end = *end.get_or_insert_with(|| Instant::now() + patience(GRACE));
            if got.len() as u64 >= all || Instant::now() >= end {
                return Ok(got);
            }
        }
        match server.recv(&mut buffer) {
            Ok(len) => {
                ensure!(
                    len == bytes && buffer[8..len] == content[8..],
                    "a datagram of {len} bytes differs from the {bytes} that were sent"
                );
                let mut number = [0; 8];
                number.copy_from_slice(&buffer[..8]);
                got.insert(u64::from_be_bytes(number));
            }
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted
                ) => {}
            Err(error) => return Err(error).context("receive a datagram"),
        }
    }
}
