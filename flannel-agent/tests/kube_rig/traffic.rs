//! Traffic between two pods, and the account of what was lost.

use std::time::Duration;

use flannel_testkit::{
    Pod,
    traffic::{FloodPing, TcpFlow},
};

/// 1 kHz.
const EVERY: Duration = Duration::from_millis(1);
/// What a stream sends, in bytes a second: less than overflows a queue on its way.
const RATE: u32 = 2_000_000;

/// Traffic of which nothing may be lost.
pub(crate) struct Traffic {
    pings: [FloodPing; 2],
    stream: TcpFlow,
}

impl Traffic {
    /// Starts probes both ways, and a stream from `a` to `b`.
    pub(super) fn start(a: &Pod, b: &Pod) -> Traffic {
        let ping = |from: &Pod, to: &Pod| FloodPing::start(&from.ns, to.ip, EVERY).expect("probes");
        Traffic {
            pings: [ping(a, b), ping(b, a)],
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
        // Some may have been sent again for an acknowledgement that was late.
        assert_eq!(stats.lost, 0, "{stats:?}");
    }
}
