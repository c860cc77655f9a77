//! `to_overlay`: the outer headers, above all the checksum, and what only the kernel's device can encapsulate.

use etherparse::{LinkHeader, NetSlice, SlicedPacket, TransportSlice};
use flannel_common::config_flags;
use flannel_testkit::privileged;

use crate::kernel::{
    HOP_MAC, KINDS, Kernel, Kind, LOCAL, MTU, OUR_POD, OWN_MAC, PEER_MAC, PEER_POD, PORT, PORTS,
    REDIRECT, REMOTE, Ran, SHOT, UNSPEC, UPLINK_MAC, VNI, frame,
};

const PROGRAM: &str = "to_overlay";

/// A packet from our pod to the peer's, as the stack hands it to the tunnel device.
fn packet(kind: Kind, len: usize) -> Vec<u8> {
    frame(kind, (OWN_MAC, PEER_MAC), OUR_POD, PEER_POD, len)
}

/// Checks an encapsulated frame: every field of the outer headers, the checksum over every byte, and that the rest is `inner`.
pub(crate) fn check_outer(frame: &[u8], inner: &[u8]) {
    let packet = SlicedPacket::from_ethernet(frame).expect("a well-formed frame");
    let link = packet.link.and_then(|link| link.to_header());
    let ethernet = link.and_then(LinkHeader::ethernet2).expect("Ethernet");
    assert_eq!(
        (ethernet.destination, ethernet.source),
        (HOP_MAC, UPLINK_MAC)
    );
    let Some(NetSlice::Ipv6(ip)) = packet.net else {
        panic!("not IPv6: {frame:02x?}");
    };
    let ip = ip.header().to_header();
    assert_eq!((ip.source, ip.destination), (LOCAL, REMOTE));
    assert_eq!(usize::from(ip.payload_length), frame.len() - 54);
    assert_eq!((ip.hop_limit, ip.flow_label.value()), (64, 0));
    // RFC 6040: as inside, but congestion seen inside does not show outside.
    let ecn = inner[15] >> 4 & 3;
    assert_eq!(ip.traffic_class, if ecn == 3 { 2 } else { ecn });
    let Some(TransportSlice::Udp(udp)) = packet.transport else {
        panic!("not UDP: {frame:02x?}");
    };
    assert_eq!(udp.destination_port(), PORT);
    assert!(PORTS.contains(&udp.source_port()));
    assert_eq!(usize::from(udp.length()), frame.len() - 54);
    let whole = udp.to_header().calc_checksum_ipv6(&ip, udp.payload());
    assert_eq!(udp.checksum(), whole.expect("a checksum"));
    let [a, b, c, d] = (VNI << 8).to_be_bytes();
    assert_eq!(udp.payload()[..8], [8, 0, 0, 0, a, b, c, d]);
    assert_eq!(&udp.payload()[8..], inner);
}

/// Runs a packet: nothing of it may be changed, and it must be counted under `reason`.
#[track_caller]
fn left(kernel: &mut Kernel, packet: &[u8], gso_size: u32, reason: &'static str) {
    // Without a device it goes to the far end of the pair, if that is of use.
    let alone = match reason {
        "gso" | "protocol" => (UNSPEC, "encap"),
        reason => (SHOT, reason),
    };
    for (flag, (verdict, reason)) in [(0, (UNSPEC, reason)), (config_flags::ALONE, alone)] {
        let mut config = kernel.config();
        config.flags |= flag;
        kernel.put_config(&config);
        let ran = kernel.run_as(PROGRAM, packet, gso_size);
        let packet = packet.to_vec();
        let counted = vec![reason];
        assert_eq!(
            ran,
            Ran {
                verdict,
                packet,
                counted
            }
        );
    }
    kernel.put_config(&kernel.config());
}

#[track_caller]
fn carried(kernel: &mut Kernel, packet: &[u8]) {
    let ran = kernel.run(PROGRAM, packet);
    assert_eq!((ran.verdict, ran.counted), (REDIRECT, vec!["encap"]));
    check_outer(&ran.packet, packet);
}

#[test]
fn every_length_and_class_gets_a_right_checksum() {
    if !privileged() {
        return;
    }
    let mut kernel = Kernel::load();
    for kind in KINDS {
        let head = packet(kind, 0).len() - 14;
        for len in 0..=MTU as usize - head {
            carried(&mut kernel, &packet(kind, len));
        }
    }
    for class in 0..=255u8 {
        let mut packet = packet(Kind::Udp, 40);
        packet[14] = 0x60 | class >> 4;
        packet[15] = class << 4 | 0x05;
        packet[16] = class;
        carried(&mut kernel, &packet);
    }
}

#[test]
fn what_has_no_checksum_of_its_own_is_the_kernels() {
    if !privileged() {
        return;
    }
    let mut kernel = Kernel::load();
    let mut unsummed = packet(Kind::Udp, 40);
    unsummed[60..62].fill(0);
    left(&mut kernel, &unsummed, 0, "protocol");
    // Hop-by-hop, routing, fragment, ESP, no next header, destination options, SCTP, IPv4 and IPv6 inside.
    for next in [0, 43, 44, 50, 59, 60, 132, 4, 41] {
        let mut packet = packet(Kind::Udp, 40);
        packet[20] = next;
        left(&mut kernel, &packet, 0, "protocol");
    }
    // A length that is not the frame's: padding, and a jumbogram.
    let mut padded = packet(Kind::Udp, 40);
    padded.push(0);
    left(&mut kernel, &padded, 0, "protocol");
    let mut jumbo = packet(Kind::Udp, 40);
    jumbo[18..20].fill(0);
    left(&mut kernel, &jumbo, 0, "protocol");
    left(&mut kernel, &packet(Kind::Tcp, 3_000), 1_000, "gso");
}

/// A frame whose inner packet says nothing of its payload, of `len` bytes behind its header.
fn mute(next: u8, len: usize) -> Vec<u8> {
    let mut packet = packet(Kind::Udp, len.max(8) - 8);
    packet[20] = next;
    packet.truncate(54 + len);
    packet[18..20].copy_from_slice(&(len as u16).to_be_bytes());
    packet
}

#[test]
fn at_the_far_end_of_a_pair_every_byte_is_summed_up() {
    if !privileged() {
        return;
    }
    let mut kernel = Kernel::load();
    let mut config = kernel.config();
    config.flags |= config_flags::ALONE;
    // On its way out through the interface that it came in by.
    kernel.put_config(&config);
    let ran = kernel.run_incoming(PROGRAM, &mute(44, 100));
    assert_eq!((ran.verdict, ran.counted), (UNSPEC, vec!["encap"]));
    config.tunnel_ifindex += 1;
    kernel.put_config(&config);
    let mut at_far_end = |packet: &[u8]| {
        let ran = kernel.run_incoming(PROGRAM, packet);
        // Counted at the near end.
        assert_eq!((ran.verdict, ran.counted), (REDIRECT, vec![]));
        check_outer(&ran.packet, packet);
    };
    // A fragment, ESP, SCTP, an extension header, and what is nothing at all.
    for next in [44, 50, 132, 60, 253] {
        for len in (0..200).chain(MTU as usize - 170..=MTU as usize - 40) {
            at_far_end(&mute(next, len));
        }
    }
    let mut unsummed = packet(Kind::Udp, 40);
    unsummed[60..62].fill(0);
    at_far_end(&unsummed);
    let mut padded = packet(Kind::Udp, 40);
    padded.push(7);
    at_far_end(&padded);
    // What the kernel has cut up.
    for kind in KINDS {
        at_far_end(&packet(kind, 1_000));
    }
}

#[test]
fn what_is_not_for_a_peer_or_too_large_is_left_alone() {
    if !privileged() {
        return;
    }
    let mut kernel = Kernel::load();
    let mut other = packet(Kind::Udp, 40);
    other[12..14].copy_from_slice(&[0x88, 0xb5]);
    left(&mut kernel, &other, 0, "not_ipv6");
    for (at, byte) in [(38, 0xfe), (39, 0x45), (44, 1), (45, 3)] {
        let mut packet = packet(Kind::Udp, 40);
        packet[at] = byte;
        left(&mut kernel, &packet, 0, "no_peer");
    }
    for at in 0..12 {
        let mut packet = packet(Kind::Udp, 40);
        packet[at] ^= 1;
        left(&mut kernel, &packet, 0, "foreign_mac");
    }
    let long = packet(Kind::Udp, MTU as usize - 47);
    left(&mut kernel, &long, 0, "over_path_mtu");
}
