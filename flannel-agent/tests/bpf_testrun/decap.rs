//! `from_wire`, one case per verdict and reason.

use etherparse::{Ipv4Header, NetSlice, PacketBuilder, SlicedPacket};
use flannel_common::{Config, config_flags};
use flannel_testkit::privileged;

use crate::kernel::{
    CARRIED, Kernel, LOCAL, MTU, OUR_POD, OWN_MAC, PEER_MAC, PEER_POD, PORT, REDIRECT, REMOTE, Ran,
    SHOT, UNSPEC, VNI, shortest,
};

const PROGRAM: &str = "from_wire";
/// The loopback's, so that the kernel takes the packet for one to this host.
const HOST_MAC: [u8; 6] = [0; 6];
/// Outer headers.
const OUTER: usize = 50;
const IP: usize = 14;
const UDP: usize = 34;
const VXLAN: usize = 42;
const INNER: usize = 50;
const INNER_IP: usize = 64;

/// A datagram from the peer's pod to ours, as it is inside.
fn inner(len: usize) -> Vec<u8> {
    let payload: Vec<u8> = (0..len).map(|at| at as u8).collect();
    let mut frame = Vec::new();
    PacketBuilder::ethernet2(PEER_MAC, OWN_MAC)
        .ipv4(PEER_POD, OUR_POD, 63)
        .udp(1_000, 2_000)
        .write(&mut frame, &payload)
        .expect("a frame");
    frame
}

/// What the peer sends for an inner frame, without a UDP checksum.
pub(crate) fn wrapped(inner: &[u8]) -> Vec<u8> {
    let mut payload = vec![8, 0, 0, 0];
    payload.extend((VNI << 8).to_be_bytes());
    payload.extend(inner);
    let mut frame = Vec::new();
    PacketBuilder::ethernet2(PEER_MAC, HOST_MAC)
        .ipv4(REMOTE, LOCAL, 64)
        .udp(40_000, PORT)
        .write(&mut frame, &payload)
        .expect("a frame");
    frame[UDP + 6..UDP + 8].fill(0);
    frame
}

/// A usual packet of the overlay.
pub(crate) fn packet(len: usize) -> Vec<u8> {
    wrapped(&inner(len))
}

/// Makes the checksum of the outer header right again after a change.
fn fixed(mut frame: Vec<u8>) -> Vec<u8> {
    let (mut ip, _) = Ipv4Header::from_slice(&frame[IP..]).expect("an IPv4 header");
    ip.header_checksum = ip.calc_header_checksum();
    let bytes = ip.to_bytes();
    frame[IP..IP + bytes.len()].copy_from_slice(&bytes);
    frame
}

fn with(change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut frame = packet(40);
    change(&mut frame);
    frame
}

/// Runs a packet: unchanged, counted under `reason` if there is one, passed on, and dropped alone if `dropped_alone`.
#[track_caller]
fn untouched(
    kernel: &mut Kernel,
    frame: &[u8],
    gso_size: u32,
    reason: Option<&str>,
    dropped_alone: bool,
) {
    let alone = if dropped_alone { SHOT } else { UNSPEC };
    for (config, verdict) in [(kernel.config_alone(), alone), (kernel.config(), UNSPEC)] {
        kernel.put_config(&config);
        let (ran, counted) = kernel.run_counted(PROGRAM, frame, gso_size);
        let packet = frame.to_vec();
        assert_eq!(
            (ran, counted),
            (Ran { verdict, packet }, reason),
            "{frame:02x?}"
        );
    }
}

#[track_caller]
fn left(kernel: &mut Kernel, frame: &[u8], reason: &str) {
    untouched(kernel, frame, 0, Some(reason), true);
}

#[track_caller]
fn not_ours(kernel: &mut Kernel, frame: &[u8]) {
    untouched(kernel, frame, 0, None, false);
}

#[track_caller]
fn carried(kernel: &mut Kernel, frame: &[u8], inner: &[u8]) {
    let (ran, counted) = kernel.run_counted(PROGRAM, frame, 0);
    assert_eq!(
        (ran.verdict, counted),
        (REDIRECT, Some(CARRIED)),
        "{frame:02x?}"
    );
    assert_eq!(ran.packet, inner);
}

#[test]
fn every_length_is_decapsulated() {
    if !privileged() {
        return;
    }
    let mut kernel = Kernel::load();
    for len in 0..=MTU as usize - 28 {
        carried(&mut kernel, &packet(len), &inner(len));
    }
}

#[test]
fn receivers_rules() {
    if !privileged() {
        return;
    }
    let mut kernel = Kernel::load();
    let kernel = &mut kernel;
    for bit in 0..8 {
        let frame = with(|frame| frame[VXLAN] ^= 1 << bit);
        left(kernel, &frame, if bit == 3 { "no_vni" } else { "reserved" });
    }
    for at in [VXLAN + 1, VXLAN + 2, VXLAN + 3, VXLAN + 7] {
        for bit in 0..8 {
            left(kernel, &with(|frame| frame[at] ^= 1 << bit), "reserved");
        }
    }
    for at in VXLAN + 4..VXLAN + 7 {
        for bit in 0..8 {
            // Another network's packets may have another owner: they go on even alone.
            let frame = with(|frame| frame[at] ^= 1 << bit);
            untouched(kernel, &frame, 0, Some("other_vni"), false);
        }
    }
    for at in INNER..INNER + 6 {
        left(kernel, &with(|frame| frame[at] ^= 1), "other_host");
    }
    let broadcast = with(|frame| frame[INNER..INNER + 6].fill(0xff));
    carried(kernel, &broadcast, &broadcast[OUTER..]);
    let reflected = with(|frame| frame[INNER + 6..INNER + 12].copy_from_slice(&OWN_MAC));
    left(kernel, &reflected, "own_source");
    for ethertype in [[0x08, 0x06], [0x86, 0xdd], [0x81, 0x00], [0, 0x2e]] {
        let frame = with(|frame| frame[INNER + 12..INNER_IP].copy_from_slice(&ethertype));
        left(kernel, &frame, "not_ipv4");
    }
    // A checksum that no device has verified is the stack's to verify. Alone it is taken on trust.
    for check in [[0x12, 0x34], [0xff, 0xff]] {
        let frame = with(|frame| frame[UDP + 6..UDP + 8].copy_from_slice(&check));
        let (ran, counted) = kernel.run_counted(PROGRAM, &frame, 0);
        assert_eq!((ran.verdict, counted), (UNSPEC, Some("outer_checksum")));
        assert_eq!(ran.packet, frame);
        kernel.put_config(&kernel.config_alone());
        carried(kernel, &frame, &inner(40));
        kernel.put_config(&kernel.config());
    }
}

#[test]
fn outer_headers() {
    if !privileged() {
        return;
    }
    let mut kernel = Kernel::load();
    let kernel = &mut kernel;
    for at in [IP + 1, IP + 4, IP + 8, IP + 10, IP + 12] {
        left(kernel, &with(|frame| frame[at] ^= 0x10), "outer_header");
    }
    let from = |source: [u8; 4]| {
        fixed(with(|frame| {
            frame[IP + 12..IP + 16].copy_from_slice(&source);
        }))
    };
    for source in [
        [127, 0, 0, 1],
        [224, 0, 0, 1],
        [239, 1, 1, 1],
        [0; 4],
        [0xff; 4],
        LOCAL,
    ] {
        left(kernel, &from(source), "outer_source");
    }
    for source in [
        [126, 0, 0, 1],
        [128, 0, 0, 1],
        [223, 1, 1, 1],
        [240, 0, 0, 1],
        [8, 8, 8, 8],
    ] {
        carried(kernel, &from(source), &inner(40));
    }
    for (first, second) in [(0x20, 0x00), (0x20, 0x01)] {
        let frame = fixed(with(|frame| {
            frame[IP + 6..IP + 8].copy_from_slice(&[first, second]);
        }));
        // Even alone: the stack puts it together, for the agent's socket.
        let reason = (second == 0).then_some("outer_fragment");
        untouched(kernel, &frame, 0, reason, false);
    }
    let mut options = with(|frame| {
        frame[IP] = 0x46;
        frame.splice(UDP..UDP, [1, 1, 1, 0]);
    });
    untouched(kernel, &options, 0, Some("outer_options"), false);
    options[IP + 20 + 4 + 3] ^= 1;
    not_ours(kernel, &options);
    for change in [(0, 0x65), (0, 0x44), (9, 6), (9, 136), (16, 1), (19, 0)] {
        not_ours(
            kernel,
            &fixed_or_not(with(|frame| frame[IP + change.0] = change.1)),
        );
    }
    not_ours(kernel, &with(|frame| frame[UDP + 3] ^= 1));
    not_ours(
        kernel,
        &with(|frame| frame[12..14].copy_from_slice(&[0x86, 0xdd])),
    );
    // To another host on the link, and to all of them.
    for mac in [[2, 0, 0, 0, 9, 9], [0xff; 6], [1, 0, 0x5e, 0, 0, 1]] {
        not_ours(kernel, &with(|frame| frame[..6].copy_from_slice(&mac)));
    }
}

/// Like [`fixed`], where the header is one at all.
fn fixed_or_not(frame: Vec<u8>) -> Vec<u8> {
    if frame[IP] == 0x45 {
        fixed(frame)
    } else {
        frame
    }
}

#[test]
fn lengths() {
    if !privileged() {
        return;
    }
    let mut kernel = Kernel::load();
    let kernel = &mut kernel;
    let full = packet(40);
    for len in shortest(&full)..full.len() {
        let frame = &full[..len];
        match len {
            _ if len < VXLAN => not_ours(kernel, frame),
            _ if len < INNER => left(kernel, frame, "too_short"),
            _ => left(kernel, frame, "length"),
        }
    }
    for padding in 1..64 {
        left(
            kernel,
            &with(|frame| frame.resize(frame.len() + padding, 0)),
            "length",
        );
    }
    for len in 0..=u16::MAX {
        // All of them are a matter of a second; half of them tell as much.
        if usize::from(len) + UDP == full.len() || len % 97 > 1 && len > 200 {
            continue;
        }
        let frame = with(|frame| frame[UDP + 4..UDP + 6].copy_from_slice(&len.to_be_bytes()));
        left(
            kernel,
            &frame,
            if len < 16 { "too_short" } else { "length" },
        );
    }
    // Whole outside, without a whole inner header.
    for len in 0..34 {
        left(kernel, &wrapped(&inner(40)[..len]), "too_short");
    }
    let longest = MTU as usize + 4;
    carried(kernel, &packet(longest - 28), &inner(longest - 28));
    left(kernel, &packet(longest - 27), "over_tunnel_mtu");
}

#[test]
fn congestion_bits() {
    if !privileged() {
        return;
    }
    let mut kernel = Kernel::load();
    // RFC 6040, figure 4, as Linux has it: outer bits by inner bits, 0 not capable, 1 and 2 capable, 3 congested.
    let table = [
        [Some(0), Some(1), Some(2), Some(3)],
        [Some(0), Some(1), Some(1), Some(3)],
        [Some(0), Some(1), Some(2), Some(3)],
        [None, Some(3), Some(3), Some(3)],
    ];
    for (outer, row) in (0_u8..).zip(table) {
        for (inside, result) in (0_u8..).zip(row) {
            for dscp in (0..=0xfc).step_by(4) {
                let mut frame = packet(40);
                frame[IP + 1] = outer;
                let mut ip = Ipv4Header::from_slice(&frame[INNER_IP..])
                    .expect("a header")
                    .0;
                ip.dscp = (dscp >> 2).try_into().expect("six bits");
                ip.ecn = inside.try_into().expect("two bits");
                ip.header_checksum = ip.calc_header_checksum();
                frame[INNER_IP..INNER_IP + 20].copy_from_slice(&ip.to_bytes());
                let frame = fixed(frame);
                let Some(result) = result else {
                    left(&mut kernel, &frame, "ecn");
                    continue;
                };
                let (ran, counted) = kernel.run_counted(PROGRAM, &frame, 0);
                assert_eq!((ran.verdict, counted), (REDIRECT, Some(CARRIED)));
                let got = SlicedPacket::from_ethernet(&ran.packet).expect("a whole frame");
                let Some(NetSlice::Ipv4(got)) = got.net else {
                    panic!("not IPv4: {:02x?}", ran.packet);
                };
                ip.ecn = result.try_into().expect("two bits");
                // This also says that the checksum is right.
                ip.header_checksum = ip.calc_header_checksum();
                assert_eq!(
                    got.header().to_header(),
                    ip,
                    "{outer} outside, {inside} inside"
                );
                assert_eq!(ran.packet[34..], frame[INNER_IP + 20..]);
                assert_eq!(ran.packet[..14], frame[INNER..INNER_IP]);
            }
        }
    }
}

#[test]
fn super_packets() {
    if !privileged() {
        return;
    }
    let mut kernel = Kernel::load();
    kernel.put_config(&kernel.config());
    let (ran, counted) = kernel.run_counted(PROGRAM, &packet(1_000), 500);
    assert_eq!((ran.verdict, counted), (UNSPEC, Some("gso")));
    assert_eq!(ran.packet, packet(1_000));
    // In a run a super-packet has no type, and the kernel takes no room away from such a one.
    kernel.put_config(&kernel.config_alone());
    let (ran, counted) = kernel.run_counted(PROGRAM, &packet(1_000), 500);
    assert_eq!((ran.verdict, counted), (SHOT, Some("adjust_room")));
}

#[test]
fn nothing_is_decapsulated_until_it_is_switched_on() {
    if !privileged() {
        return;
    }
    let mut kernel = Kernel::load();
    let off = Config {
        flags: config_flags::ENCAP | config_flags::ALONE,
        ..kernel.config()
    };
    kernel.put_config(&off);
    let (ran, counted) = kernel.run_counted(PROGRAM, &packet(40), 0);
    assert_eq!((ran.verdict, counted), (UNSPEC, Some("disabled")));
    assert_eq!(ran.packet, packet(40));
    // Not even an address yet: no packet is ours.
    kernel.put_config(&Config::default());
    not_ours_now(&mut kernel, &packet(40));
}

#[track_caller]
fn not_ours_now(kernel: &mut Kernel, frame: &[u8]) {
    let (ran, counted) = kernel.run_counted(PROGRAM, frame, 0);
    assert_eq!((ran.verdict, counted), (UNSPEC, None));
    assert_eq!(ran.packet, frame);
}
