//! A peer on the same link: packets without outer headers, the same gate.

use flannel_common::{
    Config, CounterId, NodeRecord, config_flags,
    flow::{ACK, FIN, PROTO_TCP, PROTO_UDP, SYN, Way, closing, mode},
    node_flags,
};
use flannel_testkit::privileged;

use crate::{
    decap::wrapped,
    flows::{
        CLIENT, GATEWAY_MAC, POD_MAC, SENT, SERVER, as_host, back, count, flow, furnish, gated,
        icmp_error, is_in_the_pod, is_on_the_wire, key, now, one_hop, out, put_flow, slow, tcp,
        translated, udp,
    },
    kernel::{
        CARRIED, HOP_MAC, Kernel, LOCAL, MTU, OUR_POD, PEER_MAC, PEER_POD, REDIRECT, REMOTE, Ran,
        UNSPEC, UPLINK_MAC, peer,
    },
};

/// As the stack sends it to the peer, and as the peer sends it.
const ROUTED: [[u8; 6]; 2] = [UPLINK_MAC, HOP_MAC];
const INSIDE: [[u8; 6]; 2] = [HOP_MAC, [0; 6]];
const LANDED: [[u8; 6]; 2] = [GATEWAY_MAC, POD_MAC];
/// A link's MTU is larger than that of the tunnel over it.
const LINK_MTU: u32 = MTU + 50;

fn neighbour() -> NodeRecord {
    NodeRecord {
        flags: node_flags::VALID | node_flags::NEXT_HOP | node_flags::ROUTED,
        path_mtu: LINK_MTU,
        ..peer()
    }
}

fn told(kernel: &Kernel, mode: u32) -> Config {
    let config = gated(kernel, mode);
    Config {
        flags: config.flags | config_flags::ROUTED,
        ..config
    }
}

/// A kernel whose peer is on the link.
fn kernel(mode: u32) -> Kernel {
    let mut kernel = Kernel::load();
    furnish(&mut kernel, mode);
    kernel.put_node(1, &neighbour());
    kernel.put_config(&told(&kernel, mode));
    kernel
}

#[track_caller]
fn is_on_the_link(ran: &Ran, sent: &[u8]) {
    assert_eq!(ran.verdict, REDIRECT);
    let mut frame = one_hop(sent);
    frame[..6].copy_from_slice(&HOP_MAC);
    frame[6..12].copy_from_slice(&UPLINK_MAC);
    assert_eq!(ran.packet, frame);
}

/// The handshake, each packet through both hooks of its way.
fn connect(kernel: &mut Kernel) {
    slow(kernel, "from_pod", &out(SENT, SYN));
    slow(kernel, "to_link", &out(ROUTED, SYN));
    slow(kernel, "from_wire", &back(INSIDE, SYN | ACK));
    slow(kernel, "to_pod", &back(LANDED, SYN | ACK));
    slow(kernel, "from_pod", &out(SENT, ACK));
    slow(kernel, "to_link", &out(ROUTED, ACK));
}

#[test]
fn a_connection_is_fast_after_its_handshake_and_bears_no_outer_headers() {
    if !privileged() {
        return;
    }
    let mut kernel = kernel(mode::ESTABLISHED);
    connect(&mut kernel);
    assert_eq!(count(&kernel, CounterId::GateConfirmed), 2);
    let data = out(SENT, ACK);
    is_on_the_link(&kernel.run("from_pod", &data), &data);
    let inside = back(INSIDE, ACK);
    is_in_the_pod(&kernel.run("from_wire", &inside), &inside);
    assert_eq!(count(&kernel, CounterId::FastRoutedOut), 1);
    assert_eq!(count(&kernel, CounterId::FastRoutedIn), 1);
    assert_eq!(count(&kernel, CounterId::FastEncap), 0);
    assert_eq!(count(&kernel, CounterId::FastDecap), 0);
}

#[test]
fn a_peer_that_changes_its_kind_is_believed_either_way() {
    if !privileged() {
        return;
    }
    let mut kernel = kernel(mode::ESTABLISHED);
    connect(&mut kernel);
    let data = out(SENT, ACK);
    is_on_the_link(&kernel.run("from_pod", &data), &data);
    // It wraps what we send as it is, or the other way round: its own look at the link is another one.
    let inside = back([PEER_MAC, crate::kernel::OWN_MAC], ACK);
    is_in_the_pod(&kernel.run("from_wire", &wrapped(&inside)), &inside);
    kernel.put_node(1, &peer());
    is_on_the_wire(&kernel.run("from_pod", &data), &data);
    let inside = back(INSIDE, ACK);
    is_in_the_pod(&kernel.run("from_wire", &inside), &inside);
    // Nobody on the link: plain packets are not even looked at.
    kernel.put_config(&gated(&kernel, mode::ESTABLISHED));
    slow(&mut kernel, "from_wire", &inside);
}

#[test]
fn super_packets_go_as_they_are() {
    if !privileged() {
        return;
    }
    let mut kernel = kernel(mode::ESTABLISHED);
    put_flow(&mut kernel, &key(PROTO_UDP), [now(), now()]);
    let sent = udp(SENT, (OUR_POD, CLIENT), (PEER_POD, SERVER), 3_000);
    let ran = kernel.run_as("from_pod", &sent, 1_000);
    is_on_the_link(&ran, &sent);
    let inside = udp(INSIDE, (PEER_POD, SERVER), (OUR_POD, CLIENT), 3_000);
    let ran = kernel.run_as("from_wire", &inside, 1_000);
    is_in_the_pod(&ran, &inside);
    // Segments that the path does not carry.
    kernel.put_node(
        1,
        &NodeRecord {
            path_mtu: 1_027,
            ..neighbour()
        },
    );
    assert_eq!(kernel.run_as("from_pod", &sent, 1_000).verdict, UNSPEC);
    assert_eq!(kernel.run_as("from_pod", &sent, 999).verdict, REDIRECT);
}

#[test]
fn the_links_mtu_is_the_limit() {
    if !privileged() {
        return;
    }
    let mut kernel = kernel(mode::ESTABLISHED);
    put_flow(&mut kernel, &key(PROTO_UDP), [now(), now()]);
    let datagram = |len: u32| {
        udp(
            SENT,
            (OUR_POD, CLIENT),
            (PEER_POD, SERVER),
            len as usize - 28,
        )
    };
    for (path_mtu, len, verdict) in [
        (LINK_MTU, LINK_MTU, REDIRECT),
        (LINK_MTU, LINK_MTU + 1, UNSPEC),
        (1_400, 1_400, REDIRECT),
        (1_400, 1_401, UNSPEC),
    ] {
        let node = NodeRecord {
            path_mtu,
            ..neighbour()
        };
        kernel.put_node(1, &node);
        let ran = kernel.run("from_pod", &datagram(len));
        assert_eq!(ran.verdict, verdict, "{len} bytes on {path_mtu}");
    }
    let inside = |len: u32| {
        udp(
            INSIDE,
            (PEER_POD, SERVER),
            (OUR_POD, CLIENT),
            len as usize - 28,
        )
    };
    is_in_the_pod(&kernel.run("from_wire", &inside(MTU)), &inside(MTU));
    slow(&mut kernel, "from_wire", &inside(MTU + 1));
}

#[test]
fn without_a_witness_everything_is_the_stacks() {
    if !privileged() {
        return;
    }
    let mut kernel = kernel(mode::ESTABLISHED);
    for seen in [[now(), 0], [0, now()], [0, 0]] {
        put_flow(&mut kernel, &key(PROTO_TCP), seen);
        slow(&mut kernel, "from_pod", &out(SENT, ACK));
        slow(&mut kernel, "from_wire", &back(INSIDE, ACK));
    }
    put_flow(&mut kernel, &key(PROTO_TCP), [now(), now()]);
    for node in [
        NodeRecord {
            flags: node_flags::VALID | node_flags::ROUTED,
            ..neighbour()
        },
        NodeRecord {
            flags: 0,
            ..neighbour()
        },
    ] {
        kernel.put_node(1, &node);
        slow(&mut kernel, "from_pod", &out(SENT, ACK));
    }
}

#[test]
fn what_the_uplink_sees_of_others_says_nothing() {
    if !privileged() {
        return;
    }
    let mut kernel = kernel(mode::ESTABLISHED);
    put_flow(&mut kernel, &key(PROTO_TCP), [now(), now()]);
    let good = out(ROUTED, ACK);
    let change = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut frame = good.clone();
        change(&mut frame);
        frame
    };
    let cases = [
        ("by another router", change(&|f| f[0] ^= 4)),
        ("from a pod of nobody", change(&|f| f[29] = 77)),
        (
            "from the host",
            change(&|f| f[26..30].copy_from_slice(&LOCAL)),
        ),
        (
            "to the peer itself",
            change(&|f| f[30..34].copy_from_slice(&REMOTE)),
        ),
        ("to nobody's subnet", change(&|f| f[32] = 77)),
        ("a fragment", change(&|f| f[20] = 0x20)),
        ("ARP", change(&|f| f[13] = 6)),
    ];
    for (what, packet) in cases {
        slow(&mut kernel, "to_link", &packet);
        let there = flow(&mut kernel, &key(PROTO_TCP));
        assert!(there.is_some(), "{what}");
    }
    assert_eq!(count(&kernel, CounterId::GateRefuted), 0);
    assert_eq!(count(&kernel, CounterId::GateConfirmed), 0);
    // Of a peer behind a router: the tunnel's hook is asked about it.
    kernel.put_node(1, &peer());
    slow(&mut kernel, "to_link", &good);
    assert!(flow(&mut kernel, &key(PROTO_TCP)).is_some());
}

#[test]
fn a_translated_packet_ends_it_and_is_remembered() {
    if !privileged() {
        return;
    }
    let mut kernel = kernel(mode::ESTABLISHED);
    put_flow(&mut kernel, &key(PROTO_TCP), [now(), now()]);
    let service = tcp(SENT, (OUR_POD, CLIENT), ([10, 96, 0, 1], 443), SYN);
    slow(&mut kernel, "from_pod", &service);
    slow(&mut kernel, "to_link", &out(ROUTED, SYN));
    assert_eq!(flow(&mut kernel, &key(PROTO_TCP)), None);
    assert!(translated(&mut kernel, &key(PROTO_TCP).pair(Way::Out)));
    assert_eq!(count(&kernel, CounterId::GateRefuted), 1);
    // What the stack delivers with other addresses than it came in with.
    put_flow(&mut kernel, &key(PROTO_TCP), [now(), now()]);
    let other = tcp(INSIDE, (PEER_POD, SERVER), ([10, 244, 1, 9], CLIENT), ACK);
    slow(&mut kernel, "from_wire", &other);
    slow(&mut kernel, "to_pod", &back(LANDED, ACK));
    assert_eq!(flow(&mut kernel, &key(PROTO_TCP)), None);
}

#[test]
fn a_sighting_counts_once_and_a_close_ends_it() {
    if !privileged() {
        return;
    }
    let mut kernel = kernel(mode::ESTABLISHED);
    slow(&mut kernel, "from_pod", &out(SENT, ACK));
    slow(&mut kernel, "to_link", &out(ROUTED, ACK));
    assert!(flow(&mut kernel, &key(PROTO_TCP)).is_some());
    slow(&mut kernel, "to_link", &out(ROUTED, ACK));
    assert_eq!(flow(&mut kernel, &key(PROTO_TCP)), None);
    put_flow(&mut kernel, &key(PROTO_TCP), [now(), now()]);
    slow(&mut kernel, "from_wire", &back(INSIDE, FIN | ACK));
    let closed = flow(&mut kernel, &key(PROTO_TCP)).expect("a tombstone");
    assert_eq!(closed.closing, [closing::NONE, closing::SENT]);
    slow(&mut kernel, "from_pod", &out(SENT, ACK));
}

#[test]
fn what_the_gate_cannot_follow_is_the_stacks() {
    if !privileged() {
        return;
    }
    let mut kernel = kernel(mode::ESTABLISHED);
    put_flow(&mut kernel, &key(PROTO_TCP), [now(), now()]);
    let good = back(INSIDE, ACK);
    is_in_the_pod(&kernel.run("from_wire", &good), &good);
    let change = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut frame = good.clone();
        change(&mut frame);
        frame
    };
    let cases = [
        ("a fragment", change(&|f| f[20] = 0x20)),
        ("options", change(&|f| f[14] = 0x46)),
        ("the last hop", change(&|f| f[22] = 1)),
        ("from our own subnet", change(&|f| f[28] = 1)),
        ("from nobody's subnet", change(&|f| f[28] = 77)),
        ("from outside", change(&|f| f[26] = 11)),
        ("for another subnet", change(&|f| f[32] = 3)),
        ("for nobody", change(&|f| f[33] = 77)),
        ("for another host", change(&|f| f[0] = 2)),
        ("a wrong length", change(&|f| f[17] += 1)),
        ("SCTP", change(&|f| f[23] = 132)),
        ("ARP", change(&|f| f[13] = 6)),
    ];
    for (what, packet) in cases {
        let ran = kernel.run("from_wire", &packet);
        assert_eq!((ran.verdict, ran.packet), (UNSPEC, packet), "{what}");
    }
    assert_eq!(count(&kernel, CounterId::FastRoutedIn), 1);
    assert!(kernel.counts().keys().all(|(_, label)| *label != CARRIED));
}

#[test]
fn padding_of_short_frames_is_no_part_of_them() {
    if !privileged() {
        return;
    }
    let mut kernel = kernel(mode::ESTABLISHED);
    put_flow(&mut kernel, &key(PROTO_UDP), [now(), now()]);
    let short = udp(INSIDE, (PEER_POD, SERVER), (OUR_POD, CLIENT), 1);
    let mut padded = short.clone();
    padded.resize(60, 0);
    is_in_the_pod(&kernel.run("from_wire", &padded), &short);
    // Slow, it is known again without its padding.
    put_flow(&mut kernel, &key(PROTO_UDP), [now(), 0]);
    let ran = kernel.run("from_wire", &padded);
    assert_eq!((ran.verdict, &ran.packet), (UNSPEC, &short));
    let landed = udp(LANDED, (PEER_POD, SERVER), (OUR_POD, CLIENT), 1);
    slow(&mut kernel, "to_pod", &landed);
    let there = flow(&mut kernel, &key(PROTO_UDP)).expect("an entry");
    assert!(there.seen[1] != 0, "{there:?}");
    // More than that is not padding.
    let mut long = udp(INSIDE, (PEER_POD, SERVER), (OUR_POD, CLIENT), 20);
    long.push(0);
    slow(&mut kernel, "from_wire", &long);
}

#[test]
fn a_syn_is_admitted_and_errors_about_its_connection_find_their_way() {
    if !privileged() {
        return;
    }
    let mut kernel = kernel(mode::SYN);
    let router = [10, 244, 2, 1];
    let error = icmp_error(INSIDE, router, OUR_POD, &out(SENT, ACK));
    slow(&mut kernel, "from_wire", &as_host(&error));
    let syn = out(SENT, SYN);
    is_on_the_link(&kernel.run("from_pod", &syn), &syn);
    let answer = back(INSIDE, SYN | ACK);
    is_in_the_pod(&kernel.run("from_wire", &answer), &answer);
    is_in_the_pod(&kernel.run("from_wire", &error), &error);
    let theirs = icmp_error(SENT, OUR_POD, PEER_POD, &back(LANDED, ACK));
    is_on_the_link(&kernel.run("from_pod", &theirs), &theirs);
    assert_eq!(count(&kernel, CounterId::GateAdmitted), 1);
    assert_eq!(count(&kernel, CounterId::FastRoutedIn), 2);
    assert_eq!(count(&kernel, CounterId::FastRoutedOut), 2);
}

#[test]
fn with_the_gate_shut_nothing_is_looked_at() {
    if !privileged() {
        return;
    }
    let mut kernel = kernel(mode::OFF);
    put_flow(&mut kernel, &key(PROTO_TCP), [now(), now()]);
    slow(&mut kernel, "from_pod", &out(SENT, ACK));
    slow(&mut kernel, "to_link", &out(ROUTED, ACK));
    slow(&mut kernel, "from_wire", &back(INSIDE, ACK));
    assert!(flow(&mut kernel, &key(PROTO_TCP)).is_some());
}
