//! The flow gate: what it lets pass, how the packet looks then, and what it learns behind the stack. Every history is a row of
//! runs on one CPU; between two programs stands, in the tests' mind, the host's stack.

use flannel_common::{
    Config, CounterId, NodeRecord, PodRecord,
    flow::{ACK, FIN, NatKey, PROTO_TCP, PROTO_UDP, RST, SYN, Way, closing, mode},
};
use flannel_testkit::privileged;

use crate::{
    decap::wrapped,
    flows::{
        CLIENT, EPOCH, GATEWAY_MAC, GENERATION, INSIDE, LANDED, LOOPBACK, OTHER_MAC, OTHER_POD,
        POD_MAC, ROUTED, SENT, SERVER, as_host, back, connect, count, flow, gated, hash,
        icmp_error, is_in_the_pod, is_on_the_wire, kernel, key, now, out, put_flow, put_neighbours,
        put_pod, rechecked, slow, tcp, translated, udp,
    },
    kernel::{Kernel, MTU, OUR_POD, PEER_POD, REDIRECT, UNSPEC, peer},
};

#[test]
fn a_connection_is_fast_after_its_handshake() {
    if !privileged() {
        return;
    }
    let mut kernel = kernel(mode::ESTABLISHED);
    connect(&mut kernel);
    let data = out(SENT, ACK);
    let ran = kernel.run("from_pod", &data);
    is_on_the_wire(&ran, &data);
    let inside = back(INSIDE, ACK);
    let ran = kernel.run("from_wire", &wrapped(&inside));
    is_in_the_pod(&ran, &inside);
    // What the kernel has decapsulated, such as a super-packet.
    let ran = kernel.run("from_overlay", &as_host(&inside));
    is_in_the_pod(&ran, &inside);
    assert_eq!(count(&kernel, CounterId::FastEncap), 1);
    assert_eq!(count(&kernel, CounterId::FastDecap), 2);
    assert_eq!(count(&kernel, CounterId::GateTagged), 3);
    assert_eq!(count(&kernel, CounterId::GateConfirmed), 2);
}

#[test]
fn without_both_witnesses_tcp_stays_slow() {
    if !privileged() {
        return;
    }
    let mut kernel = kernel(mode::ESTABLISHED);
    for seen in [[now(), 0], [0, now()], [0, 0]] {
        put_flow(&mut kernel, &key(PROTO_TCP), seen);
        slow(&mut kernel, "from_pod", &out(SENT, ACK));
    }
    put_flow(&mut kernel, &key(PROTO_TCP), [now(), now()]);
    assert_eq!(kernel.run("from_pod", &out(SENT, ACK)).verdict, REDIRECT);
    // UDP needs its own direction only.
    put_flow(&mut kernel, &key(PROTO_UDP), [now(), 0]);
    let datagram = udp(SENT, (OUR_POD, CLIENT), (PEER_POD, SERVER), 40);
    is_on_the_wire(&kernel.run("from_pod", &datagram), &datagram);
}

#[test]
fn an_entry_of_another_time_counts_for_nothing() {
    if !privileged() {
        return;
    }
    let mut kernel = kernel(mode::ESTABLISHED);
    put_flow(&mut kernel, &key(PROTO_TCP), [now(), now()]);
    let config = gated(&kernel, mode::ESTABLISHED);
    let fast = |kernel: &mut Kernel, config: &Config| {
        kernel.put_config(config);
        kernel.run("from_pod", &out(SENT, ACK)).verdict == REDIRECT
    };
    assert!(fast(&mut kernel, &config));
    for other in [
        Config {
            epoch: EPOCH + 1,
            ..config
        },
        Config {
            mode: mode::OFF,
            ..config
        },
    ] {
        assert!(!fast(&mut kernel, &other), "{other:?}");
    }
    let ancient = now().saturating_sub(6_000_000_000);
    put_flow(&mut kernel, &key(PROTO_TCP), [ancient.max(1), now()]);
    assert!(!fast(&mut kernel, &config), "the lease is over");
    put_flow(&mut kernel, &key(PROTO_TCP), [now(), now()]);
    assert!(fast(&mut kernel, &config));
    put_pod(&mut kernel, OUR_POD, LOOPBACK, POD_MAC, GENERATION + 1);
    assert!(!fast(&mut kernel, &config), "the address has a new owner");
}

#[test]
fn what_the_gate_cannot_follow_goes_on_unchanged_and_untagged() {
    if !privileged() {
        return;
    }
    let mut kernel = kernel(mode::ESTABLISHED);
    put_flow(&mut kernel, &key(PROTO_TCP), [now(), now()]);
    let good = out(SENT, ACK);
    assert_eq!(kernel.run("from_pod", &good).verdict, REDIRECT);
    let change = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut frame = good.clone();
        change(&mut frame);
        frame
    };
    let cases = [
        ("a fragment", change(&|f| f[20] = 0x20)),
        ("a later fragment", change(&|f| f[21] = 1)),
        ("options", change(&|f| f[14] = 0x46)),
        ("the last hop", change(&|f| f[22] = 1)),
        ("no hop left", change(&|f| f[22] = 0)),
        ("another pod's address", change(&|f| f[29] = 3)),
        ("no pod's address", change(&|f| f[29] = 77)),
        ("not by way of the host", change(&|f| f[..6].fill(9))),
        ("a broadcast", change(&|f| f[..6].fill(0xff))),
        ("outside the network", change(&|f| f[30] = 11)),
        ("nobody's subnet", change(&|f| f[32] = 77)),
        ("a wrong length", change(&|f| f[17] += 1)),
        ("padding", change(&|f| f.extend([0; 9]))),
        ("SCTP", change(&|f| f[23] = 132)),
        ("ARP", change(&|f| f[13] = 6)),
        (
            "multicast",
            change(&|f| f[30..34].copy_from_slice(&[239, 0, 0, 1])),
        ),
    ];
    let fast = count(&kernel, CounterId::FastEncap);
    let tagged = count(&kernel, CounterId::GateTagged);
    for (what, packet) in cases {
        let ran = kernel.run("from_pod", &packet);
        assert_eq!(ran.verdict, UNSPEC, "{what}");
        assert_eq!(ran.packet, packet, "{what}");
    }
    assert_eq!(count(&kernel, CounterId::FastEncap), fast);
    // A peer that is not there is found out only after the packet was found worth a tag.
    assert!(count(&kernel, CounterId::GateTagged) <= tagged + 1);
}

#[test]
fn a_path_that_is_too_narrow_or_unknown_is_for_the_stack() {
    if !privileged() {
        return;
    }
    let mut kernel = kernel(mode::ESTABLISHED);
    put_flow(&mut kernel, &key(PROTO_UDP), [now(), now()]);
    let datagram = |len: usize| udp(SENT, (OUR_POD, CLIENT), (PEER_POD, SERVER), len - 28);
    let verdict = |kernel: &mut Kernel, len| kernel.run("from_pod", &datagram(len)).verdict;
    assert_eq!(verdict(&mut kernel, MTU as usize), REDIRECT);
    assert_eq!(verdict(&mut kernel, MTU as usize + 1), UNSPEC);
    for (node, len) in [
        (
            NodeRecord {
                path_mtu: 1_400,
                ..peer()
            },
            1_351,
        ),
        (NodeRecord { flags: 1, ..peer() }, 100),
        (NodeRecord { flags: 0, ..peer() }, 100),
    ] {
        kernel.put_node(1, &node);
        assert_eq!(verdict(&mut kernel, len), UNSPEC, "{node:?}");
    }
    // Into the pod: what its veth would not take.
    kernel.put_node(1, &peer());
    let record = PodRecord {
        ifindex: LOOPBACK,
        generation: GENERATION,
        mtu: 1_000,
        mac: POD_MAC,
        gateway_mac: GATEWAY_MAC,
    };
    hash::<[u8; 4], PodRecord>(&mut kernel, "pods")
        .insert(OUR_POD, record, 0)
        .expect("write a pod");
    let inside = |len: usize| udp(INSIDE, (PEER_POD, SERVER), (OUR_POD, CLIENT), len - 28);
    let ran = kernel.run("from_wire", &wrapped(&inside(1_000)));
    is_in_the_pod(&ran, &inside(1_000));
    // Decapsulated for the stack, which answers.
    let ran = kernel.run("from_wire", &wrapped(&inside(1_001)));
    assert_eq!(ran.packet, inside(1_001));
}

#[test]
fn a_close_ends_it_before_the_stack() {
    if !privileged() {
        return;
    }
    for flags in [FIN | ACK, RST, RST | ACK] {
        let mut kernel = kernel(mode::ESTABLISHED);
        put_flow(&mut kernel, &key(PROTO_TCP), [now(), now()]);
        slow(&mut kernel, "from_pod", &out(SENT, flags));
        assert_eq!(
            flow(&mut kernel, &key(PROTO_TCP))
                .expect("a tombstone")
                .closing,
            [closing::SENT, closing::NONE]
        );
        slow(&mut kernel, "from_pod", &out(SENT, ACK));
        slow(&mut kernel, "from_overlay", &as_host(&back(INSIDE, ACK)));
        // No witness brings it back, a SYN that passes does.
        kernel.run("from_pod", &out(SENT, ACK));
        kernel.run("to_overlay", &out(ROUTED, ACK));
        slow(&mut kernel, "from_pod", &out(SENT, ACK));
        connect(&mut kernel);
        assert_eq!(kernel.run("from_pod", &out(SENT, ACK)).verdict, REDIRECT);
    }
}

#[test]
fn a_fin_that_did_not_come_out_of_the_stack_passes_when_it_comes_again() {
    if !privileged() {
        return;
    }
    let mut kernel = kernel(mode::ESTABLISHED);
    put_flow(&mut kernel, &key(PROTO_TCP), [now(), now()]);
    let fin = out(SENT, FIN | ACK);
    slow(&mut kernel, "from_pod", &fin);
    is_on_the_wire(&kernel.run("from_pod", &fin), &fin);
    // One that came out of it does not.
    put_flow(&mut kernel, &key(PROTO_TCP), [now(), now()]);
    slow(&mut kernel, "from_pod", &fin);
    kernel.run("to_overlay", &out(ROUTED, FIN | ACK));
    slow(&mut kernel, "from_pod", &fin);
}

#[test]
fn a_translated_packet_ends_it_and_is_remembered() {
    if !privileged() {
        return;
    }
    let mut kernel = kernel(mode::ESTABLISHED);
    put_flow(&mut kernel, &key(PROTO_TCP), [now(), now()]);
    // To a service's address before the stack, to the peer's pod behind it.
    let service = tcp(SENT, (OUR_POD, CLIENT), ([10, 96, 0, 1], 443), SYN);
    slow(&mut kernel, "from_pod", &service);
    kernel.run("to_overlay", &out(ROUTED, SYN));
    assert_eq!(flow(&mut kernel, &key(PROTO_TCP)), None);
    assert!(translated(&mut kernel, &key(PROTO_TCP).pair(Way::Out)));
    assert_eq!(count(&kernel, CounterId::GateRefuted), 1);
    // Its answers are not bypassed.
    slow(
        &mut kernel,
        "from_overlay",
        &as_host(&back(INSIDE, SYN | ACK)),
    );
    kernel.run(
        "to_pod",
        &tcp(LANDED, ([10, 96, 0, 1], 443), (OUR_POD, CLIENT), SYN | ACK),
    );
    assert_eq!(flow(&mut kernel, &key(PROTO_TCP)), None);
    // A packet with the flow's own addresses right before it does not vouch for the next.
    slow(&mut kernel, "from_pod", &out(SENT, ACK));
    slow(&mut kernel, "from_pod", &service);
    kernel.run("to_overlay", &out(ROUTED, ACK));
    assert_eq!(flow(&mut kernel, &key(PROTO_TCP)), None);
}

#[test]
fn a_sighting_counts_once() {
    if !privileged() {
        return;
    }
    let mut kernel = kernel(mode::ESTABLISHED);
    slow(&mut kernel, "from_pod", &out(SENT, ACK));
    kernel.run("to_overlay", &out(ROUTED, ACK));
    assert!(flow(&mut kernel, &key(PROTO_TCP)).is_some());
    kernel.run("to_overlay", &out(ROUTED, ACK));
    assert_eq!(flow(&mut kernel, &key(PROTO_TCP)), None);
}

#[test]
fn fragments_behind_the_stack_say_nothing() {
    if !privileged() {
        return;
    }
    let mut kernel = kernel(mode::ESTABLISHED);
    put_flow(&mut kernel, &key(PROTO_TCP), [now(), now()]);
    let mut fragment = out(ROUTED, ACK);
    fragment[20] = 0x20;
    kernel.run("to_overlay", &fragment);
    let mut fragment = back(LANDED, ACK);
    fragment[21] = 7;
    kernel.run("to_pod", &fragment);
    assert!(flow(&mut kernel, &key(PROTO_TCP)).is_some());
    assert_eq!(count(&kernel, CounterId::GateRefuted), 0);
}

#[test]
fn a_syn_is_admitted_in_both_directions() {
    if !privileged() {
        return;
    }
    let mut kernel = kernel(mode::SYN);
    let syn = out(SENT, SYN);
    is_on_the_wire(&kernel.run("from_pod", &syn), &syn);
    let answer = back(INSIDE, SYN | ACK);
    is_in_the_pod(&kernel.run("from_wire", &wrapped(&answer)), &answer);
    let fin = out(SENT, FIN | ACK);
    is_on_the_wire(&kernel.run("from_pod", &fin), &fin);
    let inbound = tcp(INSIDE, (PEER_POD, CLIENT), (OUR_POD, SERVER), SYN);
    is_in_the_pod(&kernel.run("from_wire", &wrapped(&inbound)), &inbound);
    assert_eq!(count(&kernel, CounterId::GateAdmitted), 2);
}

#[test]
fn a_syn_is_not_admitted_where_it_could_be_wrong() {
    if !privileged() {
        return;
    }
    // Without an entry only a SYN is admitted.
    let mut kernel = kernel(mode::SYN);
    for flags in [SYN | ACK, ACK, FIN | ACK, RST] {
        slow(&mut kernel, "from_pod", &out(SENT, flags));
    }
    // The stack also translates between the two.
    hash::<NatKey, u32>(&mut kernel, "nattuples")
        .insert(key(PROTO_TCP).pair(Way::Out), 1, 0)
        .expect("write a pair");
    slow(&mut kernel, "from_pod", &out(SENT, SYN));
    // The pod's interface is gone.
    let inbound = tcp(INSIDE, (PEER_POD, CLIENT), (OTHER_POD, SERVER), SYN);
    let ran = kernel.run("from_wire", &wrapped(&inbound));
    assert_eq!(ran.packet, inbound, "for the stack");
    assert_eq!(count(&kernel, CounterId::GateAdmitted), 0);
}

#[test]
fn errors_about_admitted_connections_find_their_way() {
    if !privileged() {
        return;
    }
    let mut kernel = kernel(mode::SYN);
    let router = [10, 244, 2, 0];
    let error = icmp_error(INSIDE, router, OUR_POD, &out(SENT, ACK));
    let theirs = icmp_error(SENT, OUR_POD, PEER_POD, &back(LANDED, ACK));
    slow(&mut kernel, "from_overlay", &as_host(&error));
    slow(&mut kernel, "from_pod", &theirs);
    kernel.run("from_pod", &out(SENT, SYN));
    is_in_the_pod(&kernel.run("from_overlay", &as_host(&error)), &error);
    is_on_the_wire(&kernel.run("from_pod", &theirs), &theirs);
    // About somebody else's connection, and as an answer to nobody.
    let other = icmp_error(INSIDE, router, OUR_POD, &out(SENT, ACK));
    let mut other = as_host(&other);
    other[14 + 20 + 8 + 20 + 1] ^= 1;
    slow(&mut kernel, "from_overlay", &other);
    let astray = icmp_error(SENT, OUR_POD, [10, 244, 2, 9], &back(LANDED, ACK));
    slow(&mut kernel, "from_pod", &astray);
}

#[test]
fn neighbours_are_handed_over_as_they_are() {
    if !privileged() {
        return;
    }
    let mut kernel = kernel(mode::ESTABLISHED);
    let local = |flags| {
        tcp(
            [POD_MAC, OTHER_MAC],
            (OUR_POD, CLIENT),
            (OTHER_POD, SERVER),
            flags,
        )
    };
    slow(&mut kernel, "from_pod", &local(ACK));
    put_neighbours(&mut kernel);
    let ran = kernel.run("from_pod", &local(ACK));
    assert_eq!((ran.verdict, ran.packet), (REDIRECT, local(ACK)));
    assert_eq!(count(&kernel, CounterId::FastLocal), 1);
    // Routed by the host, not bridged.
    let mut routed = local(ACK);
    routed[..6].copy_from_slice(&GATEWAY_MAC);
    slow(&mut kernel, "from_pod", &routed);
    // To itself.
    let hairpin = tcp(
        [POD_MAC, POD_MAC],
        (OUR_POD, CLIENT),
        (OUR_POD, SERVER),
        ACK,
    );
    slow(&mut kernel, "from_pod", &hairpin);
}

#[test]
fn a_broadcast_frame_is_the_stacks() {
    if !privileged() {
        return;
    }
    let mut kernel = kernel(mode::ESTABLISHED);
    put_flow(&mut kernel, &key(PROTO_TCP), [now(), now()]);
    let mut inside = back(INSIDE, ACK);
    is_in_the_pod(&kernel.run("from_wire", &wrapped(&inside)), &inside);
    inside[..6].fill(0xff);
    let ran = kernel.run("from_wire", &wrapped(&inside));
    assert_eq!((ran.verdict, ran.packet), (REDIRECT, inside));
    assert_eq!(count(&kernel, CounterId::FastDecap), 1);
}

#[test]
fn congestion_outside_reaches_the_pod() {
    if !privileged() {
        return;
    }
    let mut kernel = kernel(mode::ESTABLISHED);
    put_flow(&mut kernel, &key(PROTO_TCP), [now(), now()]);
    let mut inside = back(INSIDE, ACK);
    inside[15] = 0x28 | 2;
    let mut wire = wrapped(&rechecked(&inside));
    wire[15] = 3;
    let wire = rechecked(&wire);
    inside[15] = 0x28 | 3;
    is_in_the_pod(&kernel.run("from_wire", &wire), &rechecked(&inside));
}
