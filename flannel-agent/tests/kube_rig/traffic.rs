//! Traffic between two pods, and the account of what was lost.

use std::time::Duration;

use flannel_testkit::{
    Netns, Pod, eventually,
    traffic::{FloodPing, TcpFlow},
};

use crate::rig::PATIENCE;

/// 1 kHz.
const EVERY: Duration = Duration::from_millis(1);
/// What a stream sends, in bytes a second: less than overflows a queue on its way.
const RATE: u32 = 2_000_000;

/// Traffic of which nothing may be lost.
pub(crate) struct Traffic {
    pings: [FloodPing; 2],
    stream: TcpFlow,
    /// Where the stream is sent from, and what it had received twice there before.
    sender: Netns,
    twice: u64,
}

impl Traffic {
    /// Starts probes both ways, and a stream from `a` to `b`.
    pub(super) fn start(a: &Pod, b: &Pod) -> Traffic {
        let ping = |from: &Pod, to: &Pod| FloodPing::start(&from.ns, to.ip, EVERY).expect("probes");
        Traffic {
            pings: [ping(a, b), ping(b, a)],
            twice: duplicates(&a.ns),
            sender: a.ns.clone(),
            stream: TcpFlow::start_paced(&b.ns, b.ip, &a.ns, RATE).expect("a stream"),
        }
    }

    /// Ends it and looks whether anything was lost.
    #[track_caller]
    pub(crate) fn lossless(self) {
        for ping in self.pings {
            let stats = ping.stop().expect("the account of the probes");
            assert!(stats.sent > 0 && stats.lost == 0, "{stats:?}");
        }
        let stats = self.stream.stop().expect("an unbroken stream");
        assert!(stats.bytes > 0);
        // On a busy machine an acknowledgement may be late. What was sent again for that alone arrives twice, and the receiver
        // says so (RFC 2883); what was lost arrives once.
        eventually(PATIENCE, "what was sent again arrived twice", || {
            let twice = duplicates(&self.sender) - self.twice;
            (u64::from(stats.retransmits) <= twice)
                .then_some(())
                .ok_or(format!("{twice} of {stats:?}"))
        });
    }
}

/// Segments of which receivers have told this namespace that they got them twice.
fn duplicates(ns: &Netns) -> u64 {
    let text = ns.exec(["cat", "/proc/net/netstat"]).expect("netstat");
    let mut lines = text
        .lines()
        .filter_map(|line| line.strip_prefix("TcpExt: "));
    let names = lines.next().unwrap_or_default().split(' ');
    let values = lines.next().unwrap_or_default().split(' ');
    let counter = |wanted: &str| {
        let mut pairs = names.clone().zip(values.clone());
        pairs.find_map(|(name, value)| (name == wanted).then(|| value.parse::<u64>().ok())?)
    };
    // Kernels before 5.11 count blocks only.
    let segments = counter("TCPDSACKRecvSegs").or(counter("TCPDSACKRecv"));
    segments.expect("a counter of duplicates")
}
