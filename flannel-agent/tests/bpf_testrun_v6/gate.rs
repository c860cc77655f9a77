//! The flow gate around a pod: both ways past the stack, and super-packets by way of the tunnel device.

use etherparse::{NetSlice, PacketBuilder, SlicedPacket};
use flannel_common::flow::mode;
use flannel_testkit::privileged;

use crate::{
    encap::check_outer,
    kernel::{
        BRIDGE_MAC, Kernel, Kind, LOCAL, OUR_POD, OWN_MAC, PEER_MAC, PEER_POD, POD_MAC, PORT,
        REDIRECT, REMOTE, UNSPEC, VNI, frame, pin_to_cpu,
    },
};

/// What our pod sends to the peer's.
fn sent(kind: Kind, len: usize) -> Vec<u8> {
    frame(kind, (POD_MAC, BRIDGE_MAC), OUR_POD, PEER_POD, len)
}

/// A node whose stack passes everything untouched, and has passed a packet of each way.
fn witnessed(kind: Kind) -> Kernel {
    let mut kernel = Kernel::load();
    let mut config = kernel.config();
    config.mode = mode::ESTABLISHED;
    config.ring_shift = 4;
    kernel.put_config(&config);
    kernel.put_pod();
    // A run of its own has its own packet, whose number nobody carries over: the latest of the CPU counts.
    pin_to_cpu();
    let out = sent(kind, 40);
    assert_eq!(kernel.run("from_pod", &out).counted, ["tagged"]);
    let mut routed = frame(kind, (OWN_MAC, PEER_MAC), OUR_POD, PEER_POD, 40);
    routed[21] -= 1;
    let ran = kernel.run("to_overlay", &routed);
    assert_eq!(ran.counted, ["encap", "confirmed"]);
    let back = frame(kind, (PEER_MAC, [0; 6]), PEER_POD, OUR_POD, 40);
    let back = turned(back);
    assert_eq!(kernel.run("from_overlay", &back).counted, ["tagged"]);
    let mut delivered = back;
    delivered[..12].copy_from_slice(&[POD_MAC, BRIDGE_MAC].concat());
    assert_eq!(kernel.run("to_pod", &delivered).counted, ["confirmed"]);
    kernel
}

/// The same ports the other way round; an echo's reply instead of its request.
fn turned(mut frame: Vec<u8>) -> Vec<u8> {
    if frame[20] == 58 {
        frame[54] = 129;
    } else {
        let ports: [u8; 4] = frame[54..58].try_into().expect("ports");
        frame[54..56].copy_from_slice(&ports[2..]);
        frame[56..58].copy_from_slice(&ports[..2]);
    }
    frame
}

#[test]
fn what_the_stack_has_passed_goes_past_it_with_a_right_checksum() {
    if !privileged() {
        return;
    }
    for kind in [Kind::Udp, Kind::Tcp, Kind::Echo] {
        let mut kernel = witnessed(kind);
        for len in [0, 1, 40, 1_300] {
            let packet = sent(kind, len);
            let ran = kernel.run("from_pod", &packet);
            assert_eq!(
                (ran.verdict, ran.counted),
                (REDIRECT, vec!["fast_encap"]),
                "{kind:?} of {len}"
            );
            let mut inner = frame(kind, (OWN_MAC, PEER_MAC), OUR_POD, PEER_POD, len);
            inner[21] -= 1;
            check_outer(&ran.packet, &inner);
        }
    }
}

#[test]
fn what_arrives_goes_into_the_pod() {
    if !privileged() {
        return;
    }
    for kind in [Kind::Udp, Kind::Tcp] {
        let mut kernel = witnessed(kind);
        let mut inner = Vec::new();
        let start = PacketBuilder::ethernet2(PEER_MAC, OWN_MAC).ipv6(PEER_POD, OUR_POD, 63);
        match kind {
            Kind::Udp => start.udp(2_000, 1_000).write(&mut inner, &[7; 99]),
            _ => start
                .tcp(2_000, 1_000, 5, 100)
                .ack(9)
                .write(&mut inner, &[7; 99]),
        }
        .expect("a frame");
        let mut payload = vec![8, 0, 0, 0];
        payload.extend((VNI << 8).to_be_bytes());
        payload.extend(&inner);
        let mut outer = Vec::new();
        PacketBuilder::ethernet2(PEER_MAC, [0; 6])
            .ipv6(REMOTE, LOCAL, 64)
            .udp(40_000, PORT)
            .write(&mut outer, &payload)
            .expect("a frame");
        let ran = kernel.run("from_wire", &outer);
        assert_eq!((ran.verdict, ran.counted), (REDIRECT, vec!["fast_decap"]));
        inner[..12].copy_from_slice(&[POD_MAC, BRIDGE_MAC].concat());
        inner[21] -= 1;
        assert_eq!(ran.packet, inner);
    }
}

#[test]
fn super_packets_go_to_the_tunnel_device_past_the_stack() {
    if !privileged() {
        return;
    }
    let mut kernel = witnessed(Kind::Tcp);
    let packet = sent(Kind::Tcp, 3_000);
    let ran = kernel.run_as("from_pod", &packet, 1_300);
    assert_eq!((ran.verdict, ran.counted), (REDIRECT, vec!["fast_encap"]));
    let mut inner = frame(Kind::Tcp, (OWN_MAC, PEER_MAC), OUR_POD, PEER_POD, 3_000);
    inner[21] -= 1;
    assert_eq!(ran.packet, inner);
    let sliced = SlicedPacket::from_ethernet(&ran.packet).expect("a frame");
    assert!(matches!(sliced.net, Some(NetSlice::Ipv6(_))));
}

#[test]
fn what_the_gate_cannot_follow_is_the_stacks() {
    if !privileged() {
        return;
    }
    let mut kernel = witnessed(Kind::Udp);
    let mut solicitation = sent(Kind::Echo, 40);
    solicitation[54] = 135;
    let mut unsummed = sent(Kind::Udp, 40);
    unsummed[60..62].fill(0);
    let mut fragment = sent(Kind::Udp, 40);
    fragment[20] = 44;
    let mut last_hop = sent(Kind::Udp, 40);
    last_hop[21] = 1;
    for packet in [solicitation, unsummed, fragment, last_hop] {
        let ran = kernel.run("from_pod", &packet);
        assert_eq!((ran.verdict, &ran.packet), (UNSPEC, &packet));
        assert!(!ran.counted.contains(&"fast_encap"));
    }
}
