//! ICMP echo over a raw socket of our own: every probe is numbered, so every loss is known.

use crate::eventually::patience;
use crate::family::Family;
use crate::netns::Netns;
use crate::process::poll_in;
use crate::socket;
use anyhow::{Context as _, bail};
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Type, code, checksum, identifier, sequence.
const ICMP_HEADER: usize = 8;
/// Probe number, behind the header.
const NUMBER: usize = 8;
/// The payload of `ping` unless asked otherwise.
const PAYLOAD: usize = 56;
/// How long a flood waits for its first reply, and when it is stopped for late ones.
const GRACE: Duration = Duration::from_secs(1);

/// Distinguishes the sockets of one process; the high bits of the pid distinguish processes.
static NEXT_ID: AtomicU32 = AtomicU32::new(0);

/// The account of a series of probes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PingStats {
    pub sent: u64,
    /// Probes with at least one reply.
    pub received: u64,
    /// Probes that went unanswered, `sent - received`.
    pub lost: u64,
    /// Replies beyond the first of a probe.
    pub duplicates: u64,
    /// The longest time without a reply between the first probe and the last.
    pub longest_gap: Duration,
    /// The longest outage: time between sending the answered probes on either side of a run of lost ones. Zero without loss.
    pub longest_outage: Duration,
    pub max_rtt: Duration,
    pub mean_rtt: Duration,
    /// Numbers of the first unanswered probes, from 0; at most 100.
    pub lost_numbers: Vec<u64>,
    /// The first error of sending (such as "network unreachable"), with the number of its like.
    pub send_errors: Option<(String, u64)>,
}

/// Sends one probe of 56 bytes and gives its round-trip time.
pub fn ping_once(
    ns: &Netns,
    dst: impl Into<IpAddr>,
    timeout: Duration,
) -> anyhow::Result<Duration> {
    ping_sized(ns, dst, PAYLOAD, false, timeout)
}

/// Sends one probe with `payload` bytes behind the ICMP header (the packet is 28 longer in IPv4, 48 in IPv6), with or without DF;
/// in IPv6, whole or cut by the sender where it is longer than the path's MTU.
pub fn ping_sized(
    ns: &Netns,
    dst: impl Into<IpAddr>,
    payload: usize,
    dont_fragment: bool,
    timeout: Duration,
) -> anyhow::Result<Duration> {
    let dst = dst.into();
    let mut probe = Prober::open(ns, dst, payload)?;
    socket::set_dont_fragment(&probe.fd, dst, dont_fragment).context("IP_MTU_DISCOVER")?;
    probe.send();
    if let Some((err, _)) = &probe.send_errors {
        bail!("ping {dst} from {}: {err}", ns.name());
    }
    probe.receive_until(Instant::now() + patience(timeout), 1)?;
    let stats = probe.stats();
    if stats.received == 0 {
        let why = probe.send_errors.map(|(err, _)| format!(" ({err})"));
        bail!(
            "ping {dst} from {}: no reply in {timeout:?}{}",
            ns.name(),
            why.unwrap_or_default()
        );
    }
    Ok(stats.max_rtt)
}

/// Sends `count` probes, one each `interval`, and waits up to a second for the last replies.
pub fn ping(
    ns: &Netns,
    dst: impl Into<IpAddr>,
    count: u64,
    interval: Duration,
) -> anyhow::Result<PingStats> {
    let mut probe = Prober::open(ns, dst.into(), PAYLOAD)?;
    probe.flood(interval, || false, count)?;
    Ok(probe.stats())
}

/// A steady stream of probes in a thread of its own. Dropping it stops it.
#[derive(Debug)]
pub struct FloodPing {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<anyhow::Result<PingStats>>>,
}

impl FloodPing {
    /// Starts to probe `dst` from `ns`, one probe of 56 bytes each `interval`, and returns when the first is answered or lost.
    pub fn start(
        ns: &Netns,
        dst: impl Into<IpAddr>,
        interval: Duration,
    ) -> anyhow::Result<FloodPing> {
        FloodPing::start_sized(ns, dst, interval, PAYLOAD)
    }

    /// Like [`FloodPing::start`] with `payload` bytes in each probe.
    pub fn start_sized(
        ns: &Netns,
        dst: impl Into<IpAddr>,
        interval: Duration,
        payload: usize,
    ) -> anyhow::Result<FloodPing> {
        let mut probe = Prober::open(ns, dst.into(), payload)?;
        // What follows is to happen to a flood that is on its way, however late its thread gets a processor.
        probe.send();
        probe.receive_until(Instant::now() + patience(GRACE), 1)?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name(format!("flood {}", ns.name()))
            .spawn(move || {
                probe.flood(interval, || stopped.load(Ordering::Relaxed), u64::MAX)?;
                Ok(probe.stats())
            })?;
        Ok(FloodPing {
            stop,
            thread: Some(thread),
        })
    }

    /// Stops sending, waits up to a second for the last replies, and gives the account.
    pub fn stop(mut self) -> anyhow::Result<PingStats> {
        self.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.take().context("a running flood")?;
        thread
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

impl Drop for FloodPing {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic in the thread has already been reported by it.
            drop(thread.join());
        }
    }
}

/// When a probe went out and how long its reply took.
struct Probe {
    sent: Instant,
    rtt: Option<Duration>,
}

struct Prober {
    fd: OwnedFd,
    family: Family,
    id: u16,
    payload: usize,
    probes: Vec<Probe>,
    answered: u64,
    duplicates: u64,
    longest_gap: Duration,
    last_reply: Option<Instant>,
    send_errors: Option<(String, u64)>,
    buffer: Vec<u8>,
}

impl Prober {
    fn open(ns: &Netns, dst: IpAddr, payload: usize) -> anyhow::Result<Prober> {
        let fd = ns
            .try_run(|| socket::icmp(dst))?
            .with_context(|| format!("ICMP socket to {dst} in {}", ns.name()))?;
        let seed = std::process::id().wrapping_mul(0x9e37_79b9) >> 16;
        let id = NEXT_ID.fetch_add(1, Ordering::Relaxed).wrapping_add(seed) & 0xffff;
        Ok(Prober {
            fd,
            family: Family::of(dst),
            id: u16::try_from(id)?,
            payload: payload.max(NUMBER),
            probes: Vec::new(),
            answered: 0,
            duplicates: 0,
            longest_gap: Duration::ZERO,
            last_reply: None,
            send_errors: None,
            buffer: vec![0; 65_536],
        })
    }

    /// Sends the next probe. What cannot be sent counts as sent and lost.
    fn send(&mut self) {
        let number = self.probes.len();
        let sequence = u16::try_from(number & 0xffff).unwrap_or(0);
        let mut packet = vec![self.echo(true), 0, 0, 0];
        packet.extend(self.id.to_be_bytes());
        packet.extend(sequence.to_be_bytes());
        packet.extend((number as u64).to_be_bytes());
        packet.extend(super::pattern(number, self.payload - NUMBER));
        // In IPv6 the kernel does it, as it alone knows the source.
        let sum = crate::packet::checksum(&packet, 0);
        packet[2..4].copy_from_slice(&sum.to_be_bytes());
        self.probes.push(Probe {
            sent: Instant::now(),
            rtt: None,
        });
        // An ICMP error for an earlier probe is reported by the next send, which then has not sent: try again once.
        let sent = socket::send(self.fd.as_raw_fd(), &packet)
            .or_else(|_| socket::send(self.fd.as_raw_fd(), &packet));
        if let Err(err) = sent {
            self.note_error(&err);
        }
    }

    fn note_error(&mut self, err: &io::Error) {
        let errors = self.send_errors.get_or_insert((err.to_string(), 0));
        errors.1 += 1;
    }

    /// Takes what has arrived, without waiting.
    fn drain(&mut self) -> anyhow::Result<()> {
        loop {
            let mut buffer = std::mem::take(&mut self.buffer);
            let got = socket::receive(self.fd.as_raw_fd(), &mut buffer);
            let now = Instant::now();
            let outcome = match got {
                Ok(Some(len)) => self.take(&buffer[..len], now).map(|()| true),
                Ok(None) => Ok(false),
                Err(err) => {
                    // An ICMP error about an earlier probe; that probe stays unanswered.
                    self.note_error(&err);
                    Ok(true)
                }
            };
            self.buffer = buffer;
            if !outcome? {
                return Ok(());
            }
        }
    }

    /// ICMP's type of a request or a reply.
    fn echo(&self, request: bool) -> u8 {
        match (self.family, request) {
            (Family::V4, true) => 8,
            (Family::V4, false) => 0,
            (Family::V6, true) => 128,
            (Family::V6, false) => 129,
        }
    }

    /// Accounts for an echo reply. Raw sockets show the IP header of IPv4 alone.
    fn take(&mut self, packet: &[u8], now: Instant) -> anyhow::Result<()> {
        let header = match self.family {
            Family::V4 => usize::from(packet.first().map_or(0, |byte| byte & 0x0f)) * 4,
            Family::V6 => 0,
        };
        let Some(icmp) = packet
            .get(header..)
            .filter(|icmp| icmp.len() >= ICMP_HEADER + NUMBER)
        else {
            return Ok(());
        };
        if icmp[0] != self.echo(false) || icmp[4..6] != self.id.to_be_bytes() {
            return Ok(());
        }
        let mut number = [0; NUMBER];
        number.copy_from_slice(&icmp[ICMP_HEADER..ICMP_HEADER + NUMBER]);
        let number = usize::try_from(u64::from_be_bytes(number))?;
        let Some(probe) = self.probes.get_mut(number) else {
            bail!(
                "reply to probe {number}, of which only {} were sent",
                self.probes.len()
            );
        };
        if icmp[ICMP_HEADER + NUMBER..] != super::pattern(number, self.payload - NUMBER) {
            bail!("the reply to probe {number} came back with another payload");
        }
        if probe.rtt.is_some() {
            self.duplicates += 1;
            return Ok(());
        }
        probe.rtt = Some(now.duration_since(probe.sent));
        self.answered += 1;
        let since = self.last_reply.unwrap_or(self.probes[0].sent);
        self.longest_gap = self.longest_gap.max(now.duration_since(since));
        self.last_reply = Some(now);
        Ok(())
    }

    /// Receives until `end`, or until `enough` probes have been answered.
    fn receive_until(&mut self, end: Instant, enough: u64) -> anyhow::Result<()> {
        loop {
            self.drain()?;
            let left = end.saturating_duration_since(Instant::now());
            if self.answered >= enough || left.is_zero() {
                return Ok(());
            }
            poll_in(&self.fd, left)?;
        }
    }

    fn flood(
        &mut self,
        interval: Duration,
        stopped: impl Fn() -> bool,
        count: u64,
    ) -> anyhow::Result<()> {
        let mut next = Instant::now();
        while self.probes.len() as u64 != count && !stopped() {
            self.send();
            // After a stall of this process go on from now, instead of sending a burst.
            next = (next + interval).max(Instant::now());
            self.receive_until(next, u64::MAX)?;
        }
        let sent = self.probes.len() as u64;
        self.receive_until(Instant::now() + patience(GRACE), sent)
    }

    fn stats(&self) -> PingStats {
        let sent = self.probes.len() as u64;
        let rtts = || self.probes.iter().filter_map(|probe| probe.rtt);
        let lost = self
            .probes
            .iter()
            .zip(0..)
            .filter(|(probe, _)| probe.rtt.is_none());
        PingStats {
            sent,
            received: self.answered,
            lost: sent - self.answered,
            duplicates: self.duplicates,
            longest_gap: self.longest_gap.max(self.gap_at_end()),
            longest_outage: self.longest_outage(),
            max_rtt: rtts().max().unwrap_or_default(),
            mean_rtt: rtts()
                .sum::<Duration>()
                .checked_div(u32::try_from(self.answered).unwrap_or(u32::MAX))
                .unwrap_or_default(),
            lost_numbers: lost.map(|(_, number)| number).take(100).collect(),
            send_errors: self.send_errors.clone(),
        }
    }

    /// From the last reply to the last probe sent: nothing, unless the outage outlasts the series.
    fn gap_at_end(&self) -> Duration {
        let first = self.probes.first().map(|probe| probe.sent);
        let last = self.probes.last().map(|probe| probe.sent);
        let since = self.last_reply.or(first);
        last.zip(since).map_or(Duration::ZERO, |(last, since)| {
            last.saturating_duration_since(since)
        })
    }

    fn longest_outage(&self) -> Duration {
        let mut longest = Duration::ZERO;
        let mut before = self.probes.first().map(|probe| probe.sent);
        let mut losing = false;
        for (at, probe) in self.probes.iter().enumerate() {
            losing |= probe.rtt.is_none();
            let last = at + 1 == self.probes.len();
            if probe.rtt.is_some() || last {
                if let Some(before) = before.filter(|_| losing) {
                    longest = longest.max(probe.sent.duration_since(before));
                }
                before = Some(probe.sent);
                losing = false;
            }
        }
        longest
    }
}
