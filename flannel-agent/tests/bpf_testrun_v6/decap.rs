//! `from_wire`: a checksum that no device has verified is verified here, from headers alone.

use etherparse::{NetSlice, PacketBuilder, SlicedPacket, TransportSlice};
use flannel_common::config_flags;
use flannel_testkit::privileged;

use crate::kernel::{
    KINDS, Kernel, Kind, LOCAL, MTU, OUR_POD, OWN_MAC, PEER_MAC, PEER_POD, PORT, REDIRECT, REMOTE,
    Ran, SHOT, UNSPEC, VNI, frame,
};

const PROGRAM: &str = "from_wire";
/// The loopback's, so that the kernel takes the packet for one to this host.
const HOST_MAC: [u8; 6] = [0; 6];
const IP: usize = 14;
const UDP: usize = 54;
const INNER_IP: usize = 84;

/// A packet from the peer's pod to ours, as it is inside.
pub(crate) fn inner(kind: Kind, len: usize) -> Vec<u8> {
    frame(kind, (PEER_MAC, OWN_MAC), PEER_POD, OUR_POD, len)
}

/// What the peer sends for an inner frame.
pub(crate) fn wrapped(inner: &[u8]) -> Vec<u8> {
    let mut payload = vec![8, 0, 0, 0];
    payload.extend((VNI << 8).to_be_bytes());
    payload.extend(inner);
    let mut frame = Vec::new();
    PacketBuilder::ethernet2(PEER_MAC, HOST_MAC)
        .ipv6(REMOTE, LOCAL, 64)
        .udp(40_000, PORT)
        .write(&mut frame, &payload)
        .expect("a frame");
    frame
}

/// Makes the outer checksum right again after a change.
fn summed(mut frame: Vec<u8>) -> Vec<u8> {
    let sum = sum_of(&frame);
    frame[UDP + 6..UDP + 8].copy_from_slice(&sum.to_be_bytes());
    frame
}

fn sum_of(frame: &[u8]) -> u16 {
    let packet = SlicedPacket::from_ethernet(frame).expect("a frame");
    let Some(NetSlice::Ipv6(ip)) = packet.net else {
        panic!("not IPv6")
    };
    let Some(TransportSlice::Udp(udp)) = packet.transport else {
        panic!("not UDP")
    };
    udp.to_header()
        .calc_checksum_ipv6(&ip.header().to_header(), udp.payload())
        .expect("a checksum")
}

#[track_caller]
fn carried(kernel: &mut Kernel, frame: &[u8], inner: &[u8]) {
    let ran = kernel.run(PROGRAM, frame);
    assert_eq!((ran.verdict, ran.counted), (REDIRECT, vec!["decap"]));
    assert_eq!(ran.packet, inner);
}

#[track_caller]
fn left(kernel: &mut Kernel, frame: &[u8], reason: Option<&'static str>) {
    let ran = kernel.run(PROGRAM, frame);
    let untouched = Ran {
        verdict: UNSPEC,
        packet: frame.to_vec(),
        counted: reason.into_iter().collect(),
    };
    assert_eq!(ran, untouched);
}

fn with(change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut frame = wrapped(&inner(Kind::Udp, 40));
    change(&mut frame);
    frame
}

#[test]
fn every_length_is_decapsulated() {
    if !privileged() {
        return;
    }
    let mut kernel = Kernel::load();
    for kind in KINDS {
        let head = inner(kind, 0).len() - 14;
        for len in 0..=MTU as usize - head {
            let inner = inner(kind, len);
            carried(&mut kernel, &wrapped(&inner), &inner);
        }
    }
}

#[test]
fn a_header_that_was_damaged_is_the_kernels_to_refuse() {
    if !privileged() {
        return;
    }
    let mut kernel = Kernel::load();
    left(
        &mut kernel,
        &with(|frame| frame[UDP + 6..UDP + 8].fill(0)),
        Some("outer_checksum"),
    );
    // Each bit that the checksum covers and that does not make it another packet: port, checksum, inner MAC and IP header.
    let covered = (UDP..UDP + 2).chain(UDP + 6..UDP + 8).chain(76..INNER_IP);
    let inner_header = (INNER_IP + 1..INNER_IP + 4).chain(INNER_IP + 7..INNER_IP + 8);
    for at in covered.chain(inner_header) {
        for bit in 0..8 {
            let frame = with(|frame| frame[at] ^= 1 << bit);
            let ran = kernel.run(PROGRAM, &frame);
            assert_eq!(
                (ran.verdict, ran.counted),
                (UNSPEC, vec!["outer_checksum"]),
                "bit {bit} of byte {at}"
            );
        }
    }
    // What the checksum does not stand for.
    for next in [44, 59, 132] {
        let frame = summed(with(|frame| frame[INNER_IP + 6] = next));
        left(&mut kernel, &frame, Some("outer_checksum"));
    }
}

#[test]
fn without_a_device_every_byte_is_summed_up() {
    if !privileged() {
        return;
    }
    let mut kernel = Kernel::load();
    let mut config = kernel.config();
    config.flags |= config_flags::ALONE;
    kernel.put_config(&config);
    // A fragment, ESP, SCTP: of any length, and with any bit damaged.
    for next in [44, 50, 132] {
        for len in (0..150).chain(1_300..=1_382) {
            let mut inner = inner(Kind::Udp, len);
            inner[20] = next;
            carried(&mut kernel, &wrapped(&inner), &inner);
        }
    }
    let mut inner = inner(Kind::Udp, 41);
    inner[20] = 44;
    let frame = wrapped(&inner);
    for at in (UDP..UDP + 2)
        .chain(UDP + 6..UDP + 8)
        .chain(76..frame.len())
    {
        let mut damaged = frame.clone();
        damaged[at] ^= 0x10;
        let ran = kernel.run(PROGRAM, &damaged);
        assert_eq!(
            (ran.verdict, ran.counted),
            (SHOT, vec!["outer_checksum"]),
            "byte {at}"
        );
    }
    let mut without = frame.clone();
    without[UDP + 6..UDP + 8].fill(0);
    assert_eq!(
        kernel.run(PROGRAM, &without).counted,
        vec!["outer_checksum"]
    );
    // What a sender on the same host leaves to a device that never comes: the sum of the pseudo header.
    let mut left = frame;
    let mut pseudo: u32 = left[IP + 8..UDP]
        .chunks(2)
        .map(|word| u32::from(word[0]) << 8 | u32::from(word[1]))
        .sum();
    pseudo += 17 + (left.len() - UDP) as u32;
    let folded = (pseudo & 0xffff) + (pseudo >> 16);
    left[UDP + 6..UDP + 8].copy_from_slice(&(folded as u16).to_be_bytes());
    carried(&mut kernel, &left, &inner);
}

#[test]
fn what_is_not_to_us_is_not_touched() {
    if !privileged() {
        return;
    }
    let mut kernel = Kernel::load();
    left(&mut kernel, &with(|frame| frame[IP + 39] ^= 1), None);
    left(&mut kernel, &with(|frame| frame[UDP + 3] ^= 1), None);
    left(&mut kernel, &with(|frame| frame[IP + 6] = 60), None);
    for (source, what) in [
        (LOCAL, "our own"),
        ([0; 16], "none"),
        ([0xff; 16], "multicast"),
    ] {
        let frame = summed(with(|frame| {
            frame[IP + 8..IP + 24].copy_from_slice(&source);
        }));
        let ran = kernel.run(PROGRAM, &frame);
        assert_eq!(
            (ran.verdict, ran.counted),
            (UNSPEC, vec!["outer_source"]),
            "{what}"
        );
    }
    let other_vni = summed(with(|frame| frame[UDP + 8 + 4] ^= 1));
    left(&mut kernel, &other_vni, Some("other_vni"));
    let reserved = summed(with(|frame| frame[UDP + 8 + 7] = 1));
    left(&mut kernel, &reserved, Some("reserved"));
    let first_fragment = with(|frame| {
        frame[IP + 6] = 44;
        let fragment = [17, 0, 0, 1, 0, 0, 0, 9];
        frame.splice(UDP..UDP, fragment);
    });
    left(&mut kernel, &first_fragment, Some("outer_fragment"));
    let later_fragment = with(|frame| {
        frame[IP + 6] = 44;
        frame.splice(UDP..UDP, [17, 0, 0, 9, 0, 0, 0, 9]);
    });
    left(&mut kernel, &later_fragment, None);
}

#[test]
fn congestion_outside_shows_inside() {
    if !privileged() {
        return;
    }
    let mut kernel = Kernel::load();
    for (outside, inside, expected) in [(3, 1, 3), (3, 2, 3), (1, 2, 1), (0, 2, 2)] {
        let mut inner = inner(Kind::Udp, 40);
        inner[15] = inside << 4;
        let mut frame = wrapped(&inner);
        frame[IP + 1] = outside << 4;
        let mut wanted = inner.clone();
        wanted[15] = expected << 4;
        carried(&mut kernel, &frame, &wanted);
    }
    let mut inner = inner(Kind::Udp, 40);
    inner[15] = 0;
    let mut frame = wrapped(&inner);
    frame[IP + 1] = 3 << 4;
    left(&mut kernel, &frame, Some("ecn"));
}
