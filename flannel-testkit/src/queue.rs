//! A policy agent as some network plugins have: every packet that a rule hands to `NFQUEUE` waits for its verdict.

use crate::netns::Netns;
use crate::process::{check, poll_in};
use anyhow::{Context as _, ensure};
use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// `NFNL_SUBSYS_QUEUE` in the upper half of a message type.
const SUBSYSTEM: u16 = 3 << 8;
/// `linux/netfilter/nfnetlink_queue.h`.
const MSG_PACKET: u16 = 0;
const MSG_VERDICT: u16 = 1;
const MSG_CONFIG: u16 = 2;
const CFG_CMD: u16 = 1;
const CFG_PARAMS: u16 = 2;
const CMD_BIND: u8 = 1;
const COPY_META: u8 = 1;
const PACKET_HDR: u16 = 1;
const VERDICT_HDR: u16 = 2;
/// `NF_DROP` and `NF_ACCEPT`.
const DROP: u32 = 0;
const ACCEPT: u32 = 1;
/// Length of `nlmsghdr` and of `nfgenmsg` behind it.
const HEADERS: usize = 20;
/// Time after which the reader looks whether it shall stop.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// A running agent. Dropping it ends it; what its rule then hands over is dropped by the kernel.
#[derive(Debug)]
pub struct QueueAgent {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<anyhow::Result<()>>>,
}

#[derive(Debug)]
struct Shared {
    stop: AtomicBool,
    accept: AtomicBool,
    judged: AtomicU64,
}

impl QueueAgent {
    /// Judges the packets of queue number `queue` of `ns`; accepts all until told otherwise.
    pub fn start(ns: &Netns, queue: u16) -> anyhow::Result<QueueAgent> {
        let socket = ns
            .try_run(|| open(queue))?
            .with_context(|| format!("bind queue {queue} in {}", ns.name()))?;
        let shared = Arc::new(Shared {
            stop: AtomicBool::new(false),
            accept: AtomicBool::new(true),
            judged: AtomicU64::new(0),
        });
        let known = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name(format!("queue {queue}"))
            .spawn(move || serve(&socket, queue, &known))?;
        Ok(QueueAgent {
            shared,
            thread: Some(thread),
        })
    }

    /// From now on lets all pass, or nothing.
    pub fn set_accept(&self, accept: bool) {
        self.shared.accept.store(accept, Ordering::Relaxed);
    }

    /// Packets that it has judged.
    pub fn judged(&self) -> u64 {
        self.shared.judged.load(Ordering::Relaxed)
    }
}

impl Drop for QueueAgent {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // Its errors show in that packets are dropped.
            drop(thread.join());
        }
    }
}

fn open(queue: u16) -> anyhow::Result<OwnedFd> {
    // SAFETY: socket takes no pointers.
    let fd = check(unsafe {
        libc::socket(
            libc::AF_NETLINK,
            libc::SOCK_RAW | libc::SOCK_CLOEXEC,
            libc::NETLINK_NETFILTER,
        )
    })?;
    // SAFETY: the descriptor is new and owned by nobody else.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    let family = u16::try_from(libc::AF_INET)?.to_be_bytes();
    configure(&fd, queue, CFG_CMD, &[CMD_BIND, 0, family[0], family[1]])?;
    configure(&fd, queue, CFG_PARAMS, &[0, 0, 0, 0, COPY_META])?;
    Ok(fd)
}

/// Sends one configuration attribute and waits for the kernel's answer.
fn configure(fd: &OwnedFd, queue: u16, attribute: u16, value: &[u8]) -> anyhow::Result<()> {
    let flags = libc::NLM_F_REQUEST | libc::NLM_F_ACK;
    send(fd, &message(MSG_CONFIG, flags, queue, attribute, value)?)?;
    let answer = receive(fd)?;
    let code = answer.get(16..20).context("a short answer")?;
    let code = i32::from_ne_bytes(code.try_into()?);
    ensure!(code == 0, io::Error::from_raw_os_error(-code));
    Ok(())
}

fn serve(fd: &OwnedFd, queue: u16, shared: &Shared) -> anyhow::Result<()> {
    while !shared.stop.load(Ordering::Relaxed) {
        if !poll_in(fd, LOOK_EVERY)? {
            continue;
        }
        let packet = receive(fd)?;
        let Some(id) = packet_id(&packet) else {
            continue;
        };
        let verdict = if shared.accept.load(Ordering::Relaxed) {
            ACCEPT
        } else {
            DROP
        };
        let mut value = verdict.to_be_bytes().to_vec();
        value.extend(id);
        let flags = libc::NLM_F_REQUEST;
        send(
            fd,
            &message(MSG_VERDICT, flags, queue, VERDICT_HDR, &value)?,
        )?;
        shared.judged.fetch_add(1, Ordering::Relaxed);
    }
    Ok(())
}

/// The number of a queued packet: the first four bytes of its header attribute.
fn packet_id(message: &[u8]) -> Option<[u8; 4]> {
    let kind = u16::from_ne_bytes(message.get(4..6)?.try_into().ok()?);
    if kind != SUBSYSTEM | MSG_PACKET {
        return None;
    }
    let mut at = HEADERS;
    loop {
        let len = u16::from_ne_bytes(message.get(at..at + 2)?.try_into().ok()?);
        let kind = u16::from_ne_bytes(message.get(at + 2..at + 4)?.try_into().ok()?);
        if kind == PACKET_HDR {
            return message.get(at + 4..at + 8)?.try_into().ok();
        }
        at += usize::from(len.max(4)).next_multiple_of(4);
    }
}

/// A netfilter netlink message with one attribute.
fn message(
    kind: u16,
    flags: libc::c_int,
    queue: u16,
    attribute: u16,
    value: &[u8],
) -> anyhow::Result<Vec<u8>> {
    let padded = value.len().next_multiple_of(4);
    let mut bytes = Vec::new();
    bytes.extend(u32::try_from(HEADERS + 4 + padded)?.to_ne_bytes());
    bytes.extend((SUBSYSTEM | kind).to_ne_bytes());
    bytes.extend(u16::try_from(flags)?.to_ne_bytes());
    // Sequence number and sender.
    bytes.extend([0; 8]);
    bytes.extend([u8::try_from(libc::AF_UNSPEC)?, 0]);
    bytes.extend(queue.to_be_bytes());
    bytes.extend(u16::try_from(4 + value.len())?.to_ne_bytes());
    bytes.extend(attribute.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(HEADERS + 4 + padded, 0);
    Ok(bytes)
}

fn send(fd: &OwnedFd, bytes: &[u8]) -> anyhow::Result<()> {
    let sent = crate::socket::send(fd.as_raw_fd(), bytes)?;
    ensure!(sent == bytes.len(), "sent {sent} of {} bytes", bytes.len());
    Ok(())
}

fn receive(fd: &OwnedFd) -> anyhow::Result<Vec<u8>> {
    ensure!(poll_in(fd, Duration::from_secs(5))?, "the kernel is silent");
    let mut buffer = vec![0; 8192];
    let len = crate::socket::receive(fd.as_raw_fd(), &mut buffer)?.context("nothing there")?;
    buffer.truncate(len);
    Ok(buffer)
}
