//! Echo requests that may not be fragmented.

use std::{
    io,
    net::IpAddr,
    os::fd::{AsRawFd as _, OwnedFd},
    time::Duration,
};

use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};
use tokio::{
    net::UdpSocket,
    time::{Instant, timeout_at},
};

/// Bytes of an ICMP header.
const ICMP_HEADER: u32 = 8;
/// Bytes of an ordinary ping over IPv4.
pub(super) const ORDINARY: u32 = 20 + ICMP_HEADER + 56;

/// What differs between ICMP and ICMPv6.
struct Kind {
    /// Bytes of an IP header without options or extensions.
    header: u32,
    request: u8,
    reply: u8,
    /// Whether the IP header comes with what is received.
    whole: bool,
}

const V4: Kind = Kind {
    header: 20,
    request: 8,
    reply: 0,
    whole: true,
};
const V6: Kind = Kind {
    header: 40,
    request: 128,
    reply: 129,
    whole: false,
};

/// A socket to one address.
pub(super) struct Pinger {
    socket: UdpSocket,
    kind: &'static Kind,
    id: u16,
    sequence: u16,
}

impl Pinger {
    /// Opens it. Needs CAP_NET_RAW.
    pub(super) fn open(to: IpAddr) -> io::Result<Self> {
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let (kind, family, protocol) = match to {
            IpAddr::V4(_) => (&V4, AddressFamily::Inet, SockProtocol::Icmp),
            IpAddr::V6(_) => (&V6, AddressFamily::Inet6, SockProtocol::IcmpV6),
        };
        let socket = socket(family, SockType::Raw, flags, protocol)?;
        never_fragment(&socket, to)?;
        // Nothing but the protocol tells it from a UDP socket, once it is open.
        let socket = std::net::UdpSocket::from(socket);
        socket.connect((to, 0))?;
        Ok(Self {
            socket: UdpSocket::from_std(socket)?,
            kind,
            id: std::process::id() as u16,
            sequence: 0,
        })
    }

    /// Sends a packet of `size` bytes, its headers included, and waits for the answer until `until`. An answer that does not come is
    /// none, whatever the reason.
    pub(super) async fn ask(&mut self, size: u32, until: Instant) -> Option<Duration> {
        self.sequence = self.sequence.wrapping_add(1);
        let sent = Instant::now();
        let packet = request(self.kind, self.id, self.sequence, size);
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
            if answers(self.kind, packet, self.id, self.sequence) {
                return Some(sent.elapsed());
            }
        }
    }
}

/// The DF bit, and no regard for what the kernel has learnt of the path: `IP_PMTUDISC_PROBE`.
fn never_fragment(socket: &OwnedFd, to: IpAddr) -> io::Result<()> {
    let (level, option, value) = match to {
        IpAddr::V4(_) => (
            libc::IPPROTO_IP,
            libc::IP_MTU_DISCOVER,
            libc::IP_PMTUDISC_PROBE,
        ),
        IpAddr::V6(_) => (
            libc::IPPROTO_IPV6,
            libc::IPV6_MTU_DISCOVER,
            libc::IPV6_PMTUDISC_PROBE,
        ),
    };
    // SAFETY: the value lives through the call and its size is its own.
    #[expect(unsafe_code, reason = "no safe wrapper knows this socket option")]
    let answer = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
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
fn request(kind: &Kind, id: u16, sequence: u16, size: u32) -> Vec<u8> {
    let [id_high, id_low] = id.to_be_bytes();
    let [sequence_high, sequence_low] = sequence.to_be_bytes();
    let mut packet = vec![
        kind.request,
        0,
        0,
        0,
        id_high,
        id_low,
        sequence_high,
        sequence_low,
    ];
    let headers = kind.header + ICMP_HEADER;
    packet.resize(size.saturating_sub(headers) as usize + packet.len(), 0);
    // The kernel writes that of ICMPv6, which covers addresses too.
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

/// Whether a packet, as received, is the answer.
fn answers(kind: &Kind, packet: &[u8], id: u16, sequence: u16) -> bool {
    let first = packet.first().filter(|_| kind.whole);
    let length = first.map_or(0, |first| usize::from(first & 0xf) * 4);
    let Some(icmp) = packet.get(length..) else {
        return false;
    };
    let word = |at: usize| Some(u16::from_be_bytes([*icmp.get(at)?, *icmp.get(at + 1)?]));
    icmp.first() == Some(&kind.reply) && word(4) == Some(id) && word(6) == Some(sequence)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_has_its_size_and_a_checksum_that_adds_up() {
        for size in [28, 29, 84, 1450] {
            let packet = request(&V4, 7, 9, size);
            assert_eq!(packet.len() as u32 + 20, size);
            assert_eq!(checksum(&packet), 0);
        }
    }

    #[test]
    fn only_the_very_answer_counts() {
        let mut packet = vec![0x45; 20];
        packet.extend([0, 0, 0, 0, 0, 7, 0, 9]);
        assert!(answers(&V4, &packet, 7, 9));
        assert!(!answers(&V6, &packet, 7, 9));
        assert!(!answers(&V4, &packet, 7, 8));
        assert!(!answers(&V4, &packet[..27], 7, 9));
        packet[20] = V4.request;
        assert!(!answers(&V4, &packet, 7, 9));
        assert!(!answers(&V4, &[], 7, 9));
        let packet = [V6.reply, 0, 0, 0, 0, 7, 0, 9];
        assert!(answers(&V6, &packet, 7, 9));
        assert!(!answers(&V6, &packet, 8, 9));
    }
}
