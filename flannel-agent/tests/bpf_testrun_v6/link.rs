//! A peer on the same link: packets without outer headers, super-packets among them, behind the same gate.

use etherparse::PacketBuilder;
use flannel_common::{NodeRecordV6, config_flags, flow::mode, node_flags};
use flannel_testkit::privileged;

use crate::kernel::{
    BRIDGE_MAC, HOP_MAC, KINDS, Kernel, Kind, MTU, OUR_POD, PEER_POD, POD_MAC, REDIRECT, UNSPEC,
    UPLINK_MAC, frame, peer, pin_to_cpu,
};

/// A link's MTU is larger than that of the tunnel over it.
const LINK_MTU: u32 = MTU + 70;

/// A node with its pod, whose peer is on the link.
fn kernel() -> Kernel {
    let mut kernel = Kernel::load();
    let mut config = kernel.config();
    config.flags |= config_flags::ROUTED;
    config.mode = mode::ESTABLISHED;
    config.ring_shift = 4;
    kernel.put_config(&config);
    kernel.put_pod();
    kernel.put_node(&NodeRecordV6 {
        flags: node_flags::VALID | node_flags::NEXT_HOP | node_flags::ROUTED,
        path_mtu: LINK_MTU,
        ..peer()
    });
    // A run of its own has its own packet, whose number nobody carries over: the latest of the CPU counts.
    pin_to_cpu();
    kernel
}

fn sent(kind: Kind, len: usize) -> Vec<u8> {
    frame(kind, (POD_MAC, BRIDGE_MAC), OUR_POD, PEER_POD, len)
}

/// What the peer's pod answers, on the wire.
fn answer(kind: Kind, len: usize) -> Vec<u8> {
    let start = PacketBuilder::ethernet2(HOP_MAC, [0; 6]).ipv6(PEER_POD, OUR_POD, 63);
    let payload = vec![7; len];
    let mut out = Vec::new();
    match kind {
        Kind::Udp => start.udp(2_000, 1_000).write(&mut out, &payload),
        Kind::Tcp => start
            .tcp(2_000, 1_000, 5, 100)
            .ack(9)
            .write(&mut out, &payload),
        Kind::Echo => start.icmpv6_echo_reply(3, 4).write(&mut out, &payload),
    }
    .expect("a frame");
    out
}

/// The frame one hop later, with these MAC addresses, the destination's first.
fn hop(frame: &[u8], macs: [[u8; 6]; 2]) -> Vec<u8> {
    let mut frame = frame.to_vec();
    frame[..12].copy_from_slice(&macs.concat());
    frame[21] -= 1;
    frame
}

/// A packet of each way goes through the stack untouched.
fn witness(kernel: &mut Kernel, kind: Kind) {
    let out = sent(kind, 40);
    assert_eq!(kernel.run("from_pod", &out).counted, ["tagged"]);
    let routed = hop(&out, [HOP_MAC, UPLINK_MAC]);
    let ran = kernel.run("to_link", &routed);
    assert_eq!((ran.verdict, ran.counted), (UNSPEC, vec!["confirmed"]));
    let back = answer(kind, 40);
    assert_eq!(kernel.run("from_wire", &back).counted, ["tagged"]);
    let landed = hop(&back, [POD_MAC, BRIDGE_MAC]);
    assert_eq!(kernel.run("to_pod", &landed).counted, ["confirmed"]);
}

#[test]
fn what_the_stack_has_passed_goes_past_it_both_ways() {
    if !privileged() {
        return;
    }
    for kind in KINDS {
        let mut kernel = kernel();
        witness(&mut kernel, kind);
        for len in [0, 1, 40, 1_300] {
            let out = sent(kind, len);
            let ran = kernel.run("from_pod", &out);
            assert_eq!((ran.verdict, ran.counted), (REDIRECT, vec!["routed_out"]));
            assert_eq!(
                ran.packet,
                hop(&out, [HOP_MAC, UPLINK_MAC]),
                "{kind:?} {len}"
            );
            let back = answer(kind, len);
            let ran = kernel.run("from_wire", &back);
            assert_eq!((ran.verdict, ran.counted), (REDIRECT, vec!["routed_in"]));
            assert_eq!(
                ran.packet,
                hop(&back, [POD_MAC, BRIDGE_MAC]),
                "{kind:?} {len}"
            );
        }
    }
}

#[test]
fn super_packets_need_no_device() {
    if !privileged() {
        return;
    }
    let mut kernel = kernel();
    witness(&mut kernel, Kind::Tcp);
    let out = sent(Kind::Tcp, 3_000);
    let ran = kernel.run_as("from_pod", &out, 1_300);
    assert_eq!((ran.verdict, ran.counted), (REDIRECT, vec!["routed_out"]));
    assert_eq!(ran.packet, hop(&out, [HOP_MAC, UPLINK_MAC]));
    let back = answer(Kind::Tcp, 3_000);
    let ran = kernel.run_as("from_wire", &back, 1_300);
    assert_eq!((ran.verdict, ran.counted), (REDIRECT, vec!["routed_in"]));
}

#[test]
fn what_does_not_fit_or_is_not_known_is_the_stacks() {
    if !privileged() {
        return;
    }
    let mut kernel = kernel();
    witness(&mut kernel, Kind::Udp);
    let largest = LINK_MTU as usize - 48;
    for (len, verdict) in [(largest, REDIRECT), (largest + 1, UNSPEC)] {
        assert_eq!(
            kernel.run("from_pod", &sent(Kind::Udp, len)).verdict,
            verdict
        );
    }
    let good = answer(Kind::Udp, 40);
    for (what, at, to) in [
        ("the last hop", 21, 1),
        ("an extension header", 20, 0),
        ("from nobody's subnet", 29, 9),
        ("for nobody", 53, 9),
        ("for another host", 0, 2),
    ] {
        let mut packet = good.clone();
        packet[at] = to;
        let ran = kernel.run("from_wire", &packet);
        assert_eq!((ran.verdict, ran.packet), (UNSPEC, packet), "{what}");
    }
    assert_eq!(kernel.run("from_wire", &good).verdict, REDIRECT);
}
