//! Echo requests that may not be fragmented.

use std::{
    io,
    net::Ipv4Addr,
    os::fd::{AsRawFd as _, OwnedFd},
    time::Duration,
};

use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};
use tokio::{
    net::UdpSocket,
    time::{Instant, timeout_at},
};

/// Bytes of an IPv4 header without options and of an ICMP header.
pub(super) const HEADERS: u32 = 28;
/// Bytes of an ordinary ping.
pub(super) const ORDINARY: u32 = HEADERS + 56;

const ECHO_REQUEST: u8 = 8;
const ECHO_REPLY: u8 = 0;

/// A socket to one address.
pub(super) struct Pinger {
    socket: UdpSocket,
    id: u16,
    sequence: u16,
}

impl Pinger {
    /// Opens it. Needs CAP_NET_RAW.
    pub(super) fn open(to: Ipv4Addr) -> io::Result<Self> {
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let socket = socket(
            AddressFamily::Inet,
            SockType::Raw,
            flags,
            SockProtocol::Icmp,
        )?;
        never_fragment(&socket)?;
        // Nothing but the protocol tells it from a UDP socket, once it is open.
        let socket = std::net::UdpSocket::from(socket);
        socket.connect((to, 0))?;
        Ok(Self {
            socket: UdpSocket::from_std(socket)?,
            id: std::process::id() as u16,
            sequence: 0,
        })
    }

    /// Sends a packet of `size` bytes, its headers included, and waits for the answer until `until`. An answer that does not come is
    /// none, whatever the reason.
    pub(super) async fn ask(&mut self, size: u32, until: Instant) -> Option<Duration> {
        self.sequence = self.sequence.wrapping_add(1);
        let sent = Instant::now();
        let packet = request(self.id, self.sequence, size);
        timeout_at(until, self.socket.send(&packet))
            .await
            .ok()?
            .ok()?;
        let mut buffer = vec![0; 65_536];
        loop {
            // An ICMP error for an earlier packet ends a receive as well: the next one may succeed.
            let Ok(length) = timeout_at(until, self.socket.recv(&mut buffer))
                .await
                .ok()?
            else {
                continue;
            };
            let packet = buffer.get(..length).unwrap_or_default();
            if answers(packet, self.id, self.sequence) {
                return Some(sent.elapsed());
            }
        }
    }
}

/// The DF bit, and no regard for what the kernel has learnt of the path: `IP_PMTUDISC_PROBE`.
fn never_fragment(socket: &OwnedFd) -> io::Result<()> {
    let value: libc::c_int = libc::IP_PMTUDISC_PROBE;
    // SAFETY: the value lives through the call and its size is its own.
    #[expect(unsafe_code, reason = "no safe wrapper knows this socket option")]
    let answer = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_IP,
            libc::IP_MTU_DISCOVER,
            (&raw const value).cast(),
            size_of_val(&value) as libc::socklen_t,
        )
    };
    if answer == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// The ICMP part of an echo request of this many bytes in all.
fn request(id: u16, sequence: u16, size: u32) -> Vec<u8> {
    let [id_high, id_low] = id.to_be_bytes();
    let [sequence_high, sequence_low] = sequence.to_be_bytes();
    let mut packet = vec![
        ECHO_REQUEST,
        0,
        0,
        0,
        id_high,
        id_low,
        sequence_high,
        sequence_low,
    ];
    packet.resize(size.saturating_sub(HEADERS) as usize + packet.len(), 0);
    let sum = checksum(&packet).to_be_bytes();
    if let Some(field) = packet.get_mut(2..4) {
        field.copy_from_slice(&sum);
    }
    packet
}

/// RFC 1071.
fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = bytes
        .chunks(2)
        .map(|pair| {
            let (high, low) = (pair.first().copied(), pair.get(1).copied());
            u32::from(u16::from_be_bytes([high.unwrap_or(0), low.unwrap_or(0)]))
        })
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// Whether a packet, IPv4 header included, is the answer.
fn answers(packet: &[u8], id: u16, sequence: u16) -> bool {
    let length = packet
        .first()
        .map_or(0, |first| usize::from(first & 0xf) * 4);
    let Some(icmp) = packet.get(length..) else {
        return false;
    };
    let word = |at: usize| Some(u16::from_be_bytes([*icmp.get(at)?, *icmp.get(at + 1)?]));
    icmp.first() == Some(&ECHO_REPLY) && word(4) == Some(id) && word(6) == Some(sequence)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_has_its_size_and_a_checksum_that_adds_up() {
        for size in [28, 29, 84, 1450] {
            let packet = request(7, 9, size);
            assert_eq!(packet.len() as u32 + 20, size);
            assert_eq!(checksum(&packet), 0);
        }
    }

    #[test]
    fn only_the_very_answer_counts() {
        let mut packet = vec![0x45; 20];
        packet.extend([0, 0, 0, 0, 0, 7, 0, 9]);
        assert!(answers(&packet, 7, 9));
        assert!(!answers(&packet, 7, 8));
        assert!(!answers(&packet[..27], 7, 9));
        packet[20] = ECHO_REQUEST;
        assert!(!answers(&packet, 7, 9));
        assert!(!answers(&[], 7, 9));
    }
}
