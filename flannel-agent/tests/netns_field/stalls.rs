//! Connections through Services with masquerade: where an outer or inner checksum is wrong the first packet of each is lost again
//! and again, and the connection comes about after 63 seconds, or never.

use std::net::SocketAddr;

use flannel_testkit::{
    LabOptions, Netns, Offloads, conntrack, privileged,
    services::Flavour,
    traffic::{TcpPair, TcpServer},
};

use crate::gate_rig::{
    Extra, Gate, Mode, NODE_PORT, Vip,
    Who::{A, B, C},
};

/// Collisions of ports come and go.
const TIMES: usize = 5;

/// Connects at the first attempt, and gives the connection when data has passed in both directions.
#[track_caller]
fn at_once(what: &str, from: &Netns, to: SocketAddr, server: &TcpServer) -> TcpPair {
    let mut pair =
        TcpPair::connect(from, to, &[server]).unwrap_or_else(|error| panic!("{what}: {error:#}"));
    // That of the handshake, which has taken all of a second if there was one.
    let again = pair.lost_segments().expect("TCP_INFO");
    assert_eq!(again, 0, "{what}: the handshake was sent again");
    for bytes in [1, 1400, 60_000, 200] {
        pair.exchange(bytes)
            .unwrap_or_else(|error| panic!("{what}: {bytes} bytes: {error:#}"));
    }
    pair
}

/// On the client's node the connection is translated, once; on the server's it is not.
#[track_caller]
fn masqueraded_once(what: &str, gate: &Gate, pair: &TcpPair) {
    let entries = |node: usize| {
        let entries = conntrack::list_of(gate.rig.ns(node), gate.family()).expect("conntrack");
        entries
            .into_iter()
            .filter(|entry| entry.protocol == "tcp" && entry.touches(pair.seen))
            .collect::<Vec<_>>()
    };
    assert_eq!(pair.seen.ip(), gate.tunnel_ip(0), "{what}");
    let there = entries(1);
    // Admitted by its first packet it is none of the stack's business there.
    let bypassed = gate.modes[1] == Mode::Syn && there.is_empty();
    assert!(there.len() == 1 || bypassed, "{what}: {there:?}");
    for entry in there {
        assert!(!entry.is_translated(), "{what}: {entry:?}");
        assert_eq!(entry.original.from, pair.seen, "{what}");
    }
    let [here] = &entries(0)[..] else {
        panic!("{what}: {:?}", entries(0));
    };
    assert_eq!(here.reply.to, pair.seen, "{what}: {here:?}");
    assert_ne!(here.original.from, here.reply.to, "{what}: {here:?}");
}

fn no_stall(offloads: Offloads, mode: Mode, flags: &[&str], flavour: Flavour) {
    let extra = Extra {
        flags,
        lab: LabOptions {
            offloads,
            ..LabOptions::default()
        },
        ..Extra::default()
    };
    let gate = Gate::with([mode; 3], flavour, extra);
    let server = gate.serve(B);
    let node_port = SocketAddr::new(gate.node_ip(0), NODE_PORT);
    for round in 0..TIMES {
        let what =
            |case: &str| format!("{offloads:?} {mode:?} {flags:?} {flavour:?} {round} {case}");
        let case = what("pod to cluster IP");
        let pair = at_once(&case, gate.ns(A), gate.vip(Vip::Remote), &server);
        assert_eq!(pair.seen.ip(), gate.ip(A), "{case}: masqueraded");
        pair.close().expect("close");
        // Those whose source must change, because the way back would be another: where upstream's stalls were.
        for (case, from, to) in [
            ("node to cluster IP", gate.rig.ns(0), gate.vip(Vip::Remote)),
            ("outside to node port", &gate.outside, node_port),
            ("pod elsewhere to node port", gate.ns(C), node_port),
        ] {
            let case = what(case);
            let pair = at_once(&case, from, to, &server);
            masqueraded_once(&case, &gate, &pair);
            pair.close().expect("close");
        }
    }
    gate.assert_no_invalid("at the end");
}

fn every_way(offloads: Offloads) {
    if !privileged() {
        return;
    }
    let masq = "--ip-masq";
    for mode in Mode::ALL {
        no_stall(offloads, mode, &[masq], Flavour::Iptables);
    }
    no_stall(offloads, Mode::Auto, &[masq], Flavour::Nftables);
    let kernel = [masq, "--datapath=kernel"];
    no_stall(offloads, Mode::Off, &kernel, Flavour::Iptables);
    let veth = [masq, "--bpf-device=veth"];
    no_stall(offloads, Mode::Established, &veth, Flavour::Iptables);
}

#[test]
fn services_answer_at_once_with_checksum_offload() {
    every_way(Offloads::Default);
}

#[test]
fn services_answer_at_once_without_checksum_offload() {
    every_way(Offloads::Off);
}
