//! `to_overlay`, one case per verdict and reason.

use etherparse::{
    EtherType, IpNumber, LinkHeader, NetSlice, PacketBuilder, SlicedPacket, TransportSlice,
};
use flannel_common::{Config, NodeRecord, config_flags, node_flags};
use flannel_testkit::privileged;

use crate::kernel::{
    CARRIED, HOP_MAC, Kernel, LOCAL, MTU, NODES, OUR_POD, OWN_MAC, PEER_MAC, PEER_POD, PORT, PORTS,
    REDIRECT, REMOTE, Ran, SHOT, UNSPEC, UPLINK_MAC, VNI, peer,
};

const PROGRAM: &str = "to_overlay";

/// A datagram from our pod to the peer's, as the stack hands it to the tunnel device.
pub(crate) fn datagram(len: usize) -> Vec<u8> {
    let payload: Vec<u8> = (0..len).map(|at| at as u8).collect();
    let mut frame = Vec::new();
    PacketBuilder::ethernet2(OWN_MAC, PEER_MAC)
        .ipv4(OUR_POD, PEER_POD, 63)
        .udp(1_000, 2_000)
        .write(&mut frame, &payload)
        .expect("a frame");
    frame
}

/// Checks an encapsulated frame: every field and checksum of the outer headers, and that the rest is `inner` untouched.
pub(crate) fn check_outer(frame: &[u8], inner: &[u8]) {
    let packet = SlicedPacket::from_ethernet(frame).expect("a well-formed frame");
    let link = packet.link.and_then(|link| link.to_header());
    let ethernet = link.and_then(LinkHeader::ethernet2).expect("Ethernet");
    assert_eq!(ethernet.destination, HOP_MAC);
    assert_eq!(ethernet.source, UPLINK_MAC);
    assert_eq!(ethernet.ether_type, EtherType::IPV4);
    let Some(NetSlice::Ipv4(ip)) = packet.net else {
        panic!("not IPv4: {frame:02x?}");
    };
    let ip = ip.header().to_header();
    assert_eq!((ip.source, ip.destination), (LOCAL, REMOTE));
    assert_eq!(ip.header_checksum, ip.calc_header_checksum());
    assert_eq!(usize::from(ip.total_len), frame.len() - 14);
    assert_eq!((ip.time_to_live, ip.protocol), (64, IpNumber::UDP));
    assert!(!ip.dont_fragment && !ip.more_fragments && ip.fragment_offset.value() == 0);
    assert_eq!(ip.dscp.value(), 0);
    // RFC 6040: as inside, but congestion seen inside does not show outside.
    let ecn = inner[15] & 3;
    assert_eq!(ip.ecn.value(), if ecn == 3 { 2 } else { ecn });
    let Some(TransportSlice::Udp(udp)) = packet.transport else {
        panic!("not UDP: {frame:02x?}");
    };
    assert_eq!(udp.destination_port(), PORT);
    assert!(
        PORTS.contains(&udp.source_port()),
        "port {}",
        udp.source_port()
    );
    assert_eq!(usize::from(udp.length()), frame.len() - 34);
    assert_eq!(udp.checksum(), 0);
    let [a, b, c, d] = (VNI << 8).to_be_bytes();
    assert_eq!(udp.payload()[..8], [8, 0, 0, 0, a, b, c, d]);
    assert_eq!(&udp.payload()[8..], inner);
}

/// Runs a packet with the peer as given; nothing of it may be changed, and it must be counted under `reason`.
#[track_caller]
fn left(kernel: &mut Kernel, packet: &[u8], gso_size: u32, reason: &str) {
    for (config, verdict) in [(kernel.config_alone(), SHOT), (kernel.config(), UNSPEC)] {
        kernel.put_config(&config);
        let (ran, counted) = kernel.run_counted(PROGRAM, packet, gso_size);
        let packet = packet.to_vec();
        assert_eq!((ran, counted), (Ran { verdict, packet }, Some(reason)));
    }
}

#[track_caller]
fn carried(kernel: &mut Kernel, packet: &[u8]) {
    let (ran, counted) = kernel.run_counted(PROGRAM, packet, 0);
    assert_eq!((ran.verdict, counted), (REDIRECT, Some(CARRIED)));
    check_outer(&ran.packet, packet);
}

#[test]
fn every_length_and_tos_is_encapsulated() {
    if !privileged() {
        return;
    }
    let mut kernel = Kernel::load();
    for len in 0..=MTU as usize - 28 {
        carried(&mut kernel, &datagram(len));
    }
    for tos in 0..=255 {
        let mut packet = datagram(40);
        packet[15] = tos;
        carried(&mut kernel, &packet);
    }
}

#[test]
fn flows_spread_over_source_ports_and_keep_them() {
    if !privileged() {
        return;
    }
    let mut kernel = Kernel::load();
    let mut port_of = |flow: u16, len: usize| {
        let mut packet = datagram(len);
        packet[34..36].copy_from_slice(&flow.to_be_bytes());
        let out = kernel.run(PROGRAM, &packet).packet;
        (u16::from_be_bytes([out[34], out[35]]), [out[18], out[19]])
    };
    let mut ports = std::collections::BTreeSet::new();
    let mut ids = std::collections::BTreeSet::new();
    for flow in 1..=500 {
        let (port, id) = port_of(flow, 10);
        assert_eq!(port_of(flow, 500).0, port, "the port of flow {flow}");
        ports.insert(port);
        ids.insert(id);
    }
    assert!(ports.len() > 450, "{} ports", ports.len());
    assert!(ids.len() > 450, "{} identifications", ids.len());
}

#[test]
fn what_is_not_for_a_peer_is_left_alone() {
    if !privileged() {
        return;
    }
    let mut kernel = Kernel::load();
    for len in 14..34 {
        // The kernel runs nothing on an IPv4 packet without its header; the program does not look that far.
        let mut packet = datagram(0);
        packet.truncate(len);
        packet[12..14].copy_from_slice(&[0x88, 0xb5]);
        left(&mut kernel, &packet, 0, "too_short");
    }
    for ethertype in [[0x08, 0x06], [0x86, 0xdd], [0x81, 0x00], [0, 0]] {
        let mut packet = datagram(40);
        packet[12..14].copy_from_slice(&ethertype);
        left(&mut kernel, &packet, 0, "not_ipv4");
    }
    let to = |dst: [u8; 4]| {
        let mut packet = datagram(40);
        packet[30..34].copy_from_slice(&dst);
        packet
    };
    // Subnets without a node, and addresses around the network.
    for dst in [
        [10, 244, 1, 2],
        [10, 244, 3, 0],
        [10, 244, 255, 255],
        [10, 243, 255, 255],
        [10, 245, 2, 2],
        [0; 4],
        [255; 4],
        [224, 0, 0, 1],
    ] {
        left(&mut kernel, &to(dst), 0, "no_peer");
    }
    for dst in [[10, 244, 2, 0], [10, 244, 2, 255]] {
        carried(&mut kernel, &to(dst));
    }
    // Entries that point nowhere.
    for id in [2, NODES, u32::MAX] {
        kernel.put_subnet(3, id);
        left(&mut kernel, &to([10, 244, 3, 2]), 0, "no_peer");
    }
    let invalid = NodeRecord {
        flags: node_flags::NEXT_HOP,
        ..peer()
    };
    kernel.put_node(2, &invalid);
    kernel.put_subnet(3, 2);
    left(&mut kernel, &to([10, 244, 3, 2]), 0, "no_peer");
    for at in 0..12 {
        let mut packet = datagram(40);
        packet[at] ^= 1;
        left(&mut kernel, &packet, 0, "foreign_mac");
    }
}

#[test]
fn what_the_path_cannot_take_is_left_alone() {
    if !privileged() {
        return;
    }
    let mut kernel = Kernel::load();
    left(
        &mut kernel,
        &datagram(MTU as usize - 27),
        0,
        "over_path_mtu",
    );
    kernel.put_node(
        1,
        &NodeRecord {
            path_mtu: 1_400,
            ..peer()
        },
    );
    carried(&mut kernel, &datagram(1_400 - 50 - 28));
    left(&mut kernel, &datagram(1_400 - 50 - 27), 0, "over_path_mtu");
    // A super-packet whose segments of 1400 bytes do not fit.
    left(&mut kernel, &datagram(1_422), 1_400, "over_path_mtu");
    // In a run a super-packet has no type, and the kernel makes no room in such a one.
    kernel.put_node(1, &peer());
    left(&mut kernel, &datagram(1_422), 700, "adjust_room");
}

#[test]
fn a_peer_without_a_next_hop_is_for_the_kernel_to_find() {
    if !privileged() {
        return;
    }
    let mut kernel = Kernel::load();
    kernel.put_node(
        1,
        &NodeRecord {
            flags: node_flags::VALID,
            ..peer()
        },
    );
    let (ran, counted) = kernel.run_counted(PROGRAM, &datagram(40), 0);
    assert_eq!((ran.verdict, counted), (UNSPEC, Some("no_next_hop")));
    assert_eq!(ran.packet, datagram(40));
    // Alone, it goes out by the kernel's routes and neighbours.
    kernel.put_config(&kernel.config_alone());
    carried(&mut kernel, &datagram(40));
}

#[test]
fn nothing_is_encapsulated_until_it_is_switched_on() {
    if !privileged() {
        return;
    }
    let mut kernel = Kernel::load();
    let off = Config {
        flags: config_flags::DECAP,
        ..kernel.config()
    };
    for config in [off, Config::default()] {
        kernel.put_config(&config);
        let (ran, counted) = kernel.run_counted(PROGRAM, &datagram(40), 0);
        assert_eq!((ran.verdict, counted), (UNSPEC, Some("disabled")));
        assert_eq!(ran.packet, datagram(40));
    }
}
