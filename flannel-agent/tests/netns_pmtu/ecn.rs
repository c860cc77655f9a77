//! Congestion marks through the tunnel (RFC 6040), beside the kernel's device.

use std::{
    net::{Ipv4Addr, Ipv6Addr},
    time::Duration,
};

use flannel_testkit::{
    Capture, Direction, RawSocket,
    packet::{Address, Header as _, Inner, Vxlan},
    privileged, traffic,
};

use crate::{Carrier, rig::Rig, two_nodes};

/// Nobody listens there.
const PORT: u16 = 9;
/// A DSCP that must stay inside.
const DSCP: u8 = 0xb8;

/// What the ECN bits of a packet became: inside as sent, outside on the wire, inside on arrival.
type Marks = (u8, u8, Option<u8>);

/// A packet of each ECN codepoint from pod to pod. Gives the marks, and the last frame as it was on the wire.
fn through<A: Address>(rig: &Rig) -> (Vec<Marks>, Vxlan<A>) {
    let (from, to) = (rig.pod(0), rig.pod(1));
    let (source, destination) = (A::of(from), A::of(to));
    let gateway = flannel_testkit::json::link(rig.ns(0), "cni0").expect("cni0")["address"]
        .as_str()
        .expect("a MAC address")
        .to_owned();
    let gateway: Vec<u8> = gateway
        .split(':')
        .map(|byte| u8::from_str_radix(byte, 16).expect("hex"))
        .collect();
    let gateway: [u8; 6] = gateway.try_into().expect("six bytes");
    let mut marks = Vec::new();
    let mut last = None;
    for ecn in 0..4 {
        let wire = Capture::start_directed(
            rig.lab().underlay(),
            &rig.node(0).port,
            "udp port 8472",
            Direction::In,
        )
        .expect("a capture");
        let arrival = Capture::start(&to.ns, "eth0", "udp").expect("a capture");
        let frame = Inner::udp(source, destination, PORT, b"marked");
        let mut frame = frame.with_macs(from.mac, gateway);
        frame.ip.set_tos(DSCP | ecn);
        let socket = RawSocket::open(&from.ns, "eth0").expect("a socket");
        socket.send(&frame.bytes()).expect("send");
        traffic::ping_once(&from.ns, destination, Duration::from_secs(2)).expect("a ping");
        let sent: Vec<_> = wire
            .stop()
            .expect("the wire")
            .vxlan_of::<A>()
            .into_iter()
            .filter(|frame| {
                frame
                    .parse_inner()
                    .is_ok_and(|inner| inner.ip.tos() & !3 == DSCP && inner.ip.source() == source)
            })
            .filter(is_marked::<A>)
            .collect();
        assert_eq!(sent.len(), 1, "{sent:?}");
        assert_eq!(sent[0].ip.tos() & !3, 0, "the DSCP got out");
        assert!(sent[0].ip.is_summed());
        let arrived = tos_of_arrivals::<A>(&arrival.stop().expect("the arrival").packets);
        assert_eq!(arrived.len(), 1, "{arrived:?}");
        assert_eq!(arrived[0] & !3, DSCP);
        marks.push((ecn, sent[0].ip.tos(), Some(arrived[0] & 3)));
        last = sent.into_iter().next();
    }
    (marks, last.expect("a frame"))
}

fn is_marked<A: Address>(frame: &Vxlan<A>) -> bool {
    frame.inner.ends_with(b"marked")
}

fn tos_of_arrivals<A: Address>(packets: &[flannel_testkit::Packet]) -> Vec<u8> {
    packets
        .iter()
        .filter_map(|packet| Inner::<A>::read(&packet.data).ok())
        .inspect(|inner| assert!(inner.ip.is_summed(), "{inner:?}"))
        .map(|inner| inner.ip.tos())
        .collect()
}

/// Frames with every pair of marks, as routers on the way may leave them, given to node 1: what its pod gets.
fn from_the_wire<A: Address>(rig: &Rig, frame: &Vxlan<A>) -> Vec<Marks> {
    let to = rig.pod(1);
    let socket = RawSocket::open(rig.lab().underlay(), &rig.node(1).port).expect("a socket");
    let mut marks = Vec::new();
    for inner_ecn in 0..4 {
        for outer_ecn in 0..4 {
            let mut inner = frame.parse_inner().expect("an inner frame");
            inner.ip.set_tos(DSCP | inner_ecn);
            let mut frame = frame.clone();
            frame.ip.set_tos(outer_ecn);
            frame.inner = inner.bytes();
            let arrival = Capture::start(&to.ns, "eth0", "udp").expect("a capture");
            socket.send(&frame.bytes()).expect("send");
            rig.ping(0, 1).expect("a ping");
            let arrived = tos_of_arrivals::<A>(&arrival.stop().expect("the arrival").packets);
            assert!(arrived.len() <= 1, "{arrived:?}");
            marks.push((inner_ecn, outer_ecn, arrived.first().map(|tos| tos & 3)));
        }
    }
    marks
}

#[test]
fn congestion_marks_cross_as_rfc_6040_says() {
    marks_cross::<Ipv4Addr>();
}

#[test]
fn congestion_marks_of_ipv6_cross_as_rfc_6040_says() {
    marks_cross::<Ipv6Addr>();
}

fn marks_cross<A: Address>() {
    if !privileged() {
        return;
    }
    let mut all = Vec::new();
    for carrier in Carrier::all(A::FAMILY).iter().copied() {
        let rig = two_nodes(A::FAMILY, carrier);
        let before = (carrier != Carrier::Kernel).then(|| (rig.counters(0), rig.counters(1)));
        let (out, frame) = through::<A>(&rig);
        let back = from_the_wire(&rig, &frame);
        if let Some((sender, receiver)) = before {
            assert!(
                rig.counters(0).encap >= sender.encap + 4,
                "eBPF did not send them"
            );
            // All but the one that is dropped.
            assert!(
                rig.counters(1).decap >= receiver.decap + 4 + 15,
                "eBPF did not receive them"
            );
        }
        all.push((carrier, out, back));
    }
    for (carrier, out, back) in all {
        // RFC 6040, 4.1, normal mode: the inner field is copied. The kernel's device writes ECT(0) outside for CE inside.
        assert_eq!(
            out,
            [
                (0, 0, Some(0)),
                (1, 1, Some(1)),
                (2, 2, Some(2)),
                (3, 2, Some(3))
            ],
            "{carrier:?}"
        );
        // RFC 6040, 4.2: congestion outside gets in, or takes the packet with it if the inside cannot say it; ECT(1)
        // outside replaces ECT(0) inside.
        for (inner, outer, arrived) in back {
            let want = match (inner, outer) {
                (0, 3) => None,
                (_, 3) => Some(3),
                (2, 1) => Some(1),
                (inner, _) => Some(inner),
            };
            assert_eq!(
                arrived, want,
                "{carrier:?}: inner {inner:02b}, outer {outer:02b}"
            );
        }
    }
}
