//! Traffic with exact accounting. Everything has a time limit, so that a broken data plane fails a test instead of hanging it.

mod datagrams;
mod iperf;
mod pair;
mod ping;
mod tcp;
mod udp;
mod udp_flow;

pub use datagrams::UdpEnd;
pub use iperf::iperf3;
pub use pair::{TcpPair, TcpServer, Way};
pub use ping::{FloodPing, PingStats, ping, ping_once, ping_sized};
pub use tcp::{Amount, TcpFlow, TcpStats, tcp_transfer};
pub use udp::udp_echo;
pub use udp_flow::{UdpFlow, UdpStats};

use std::sync::OnceLock;

/// Byte `i` of the pattern is byte `i % PERIOD`: a prime, so that no shift by a packet, page or block goes unseen.
const PERIOD: usize = 65_521;

/// `len` bytes of the pattern from position `from` on.
fn pattern(from: usize, len: usize) -> Vec<u8> {
    let block = block();
    let mut bytes = Vec::with_capacity(len);
    let mut at = from % PERIOD;
    while bytes.len() < len {
        let take = (PERIOD - at).min(len - bytes.len());
        bytes.extend_from_slice(&block[at..at + take]);
        at = 0;
    }
    bytes
}

/// One period of the pattern.
fn block() -> &'static [u8] {
    static BLOCK: OnceLock<Vec<u8>> = OnceLock::new();
    BLOCK.get_or_init(|| {
        let mut state = 0x2545_f491_u32;
        let next = || {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            state.to_be_bytes()[0]
        };
        std::iter::repeat_with(next).take(PERIOD).collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pattern_goes_on_over_its_period() {
        let long = pattern(0, 3 * PERIOD);
        assert_eq!(long[..PERIOD], long[PERIOD..2 * PERIOD]);
        assert_eq!(pattern(PERIOD - 3, 10), long[PERIOD - 3..PERIOD + 7]);
        assert_ne!(long[..1000], long[1..1001]);
    }
}
