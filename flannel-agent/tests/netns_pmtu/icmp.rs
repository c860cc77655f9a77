//! The errors that pods get, byte for byte those of a node on the kernel's device.

use std::{collections::BTreeSet, time::Duration};

use flannel_testkit::{
    Capture, LabOptions, Netns, Offloads, Pod, RawSocket,
    json::link,
    packet::{Csum, Inner, L4},
    privileged, traffic,
};

use crate::{
    Carrier, Narrowing,
    rig::{NET_CONF, Rig},
    two_nodes, wait_path_mtu,
};

/// A packet that a pod sends: its length, whether it may be cut, and how far it may go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Probe {
    len: usize,
    dont_fragment: bool,
    ttl: u8,
}

/// What came of it: the ICMP errors without what differs from packet to packet, and whether it arrived.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Outcome {
    probe: Probe,
    errors: BTreeSet<Vec<u8>>,
    arrived: bool,
}

/// How often a probe is sent: the kernel's device lets the first oversize one pass, cut in two, and only then knows the path.
const TIMES: u16 = 3;
/// Lengths around the MTU of the tunnel, and around that of the narrow path.
const WIDE: [usize; 5] = [100, 1449, 1450, 1451, 1500];
const NARROW: [usize; 8] = [100, 1349, 1350, 1351, 1400, 1450, 1451, 1500];
/// Two hops on the way, then the destination.
const TTLS: [u8; 4] = [1, 2, 3, 4];
/// Nobody listens there.
const PORT: u16 = 9;

fn probes(lengths: &[usize]) -> Vec<Probe> {
    let sized = lengths.iter().flat_map(|len| {
        [true, false].map(|dont_fragment| Probe {
            len: *len,
            dont_fragment,
            ttl: 64,
        })
    });
    let short_lived = TTLS.map(|ttl| Probe {
        len: 100,
        dont_fragment: true,
        ttl,
    });
    sized.chain(short_lived).collect()
}

/// Sends a probe a few times from the first pod of node 0 and gives what it got back.
fn send(rig: &Rig, from: &Pod, to: &Pod, probe: Probe) -> Outcome {
    let gateway = mac(rig.ns(0), "cni0");
    // The pod forgets what it learnt, so that the answers are about this probe.
    from.ns.ip("route flush cache").expect("forget");
    let errors =
        Capture::start(&from.ns, "eth0", "icmp[0] == 3 or icmp[0] == 11").expect("capture");
    let filter = format!("src host {} and (udp or ip[6:2] & 0x3fff != 0)", from.ip);
    let arrivals = Capture::start(&to.ns, "eth0", &filter).expect("capture");
    let socket = RawSocket::open(&from.ns, "eth0").expect("a socket");
    for number in 0..TIMES {
        let mut frame = Inner::udp(from.ip, to.ip, PORT, &vec![0x5a; probe.len - 28])
            .with_macs(from.mac, gateway);
        frame.ip.id = 100 + number;
        frame.ip.ttl = probe.ttl;
        frame.ip.dont_fragment = probe.dont_fragment;
        socket.send(&frame.bytes()).expect("send");
        // A round trip: whatever the probe caused has happened by then.
        traffic::ping_once(&from.ns, to.ip, Duration::from_secs(2)).expect("a ping");
    }
    let errors = errors.stop().expect("the errors").packets;
    let arrived = arrivals.stop().expect("the arrivals").packets;
    Outcome {
        probe,
        errors: errors.iter().map(|packet| normal(&packet.data)).collect(),
        arrived: !arrived.is_empty(),
    }
}

/// An ICMP packet without link header, identification and checksums, its own and those of the packet it quotes. The
/// checksums are checked instead.
fn normal(frame: &[u8]) -> Vec<u8> {
    let parsed = Inner::parse(frame).expect("an IPv4 packet");
    assert_eq!(parsed.ip.csum, Csum::Right);
    let L4::Raw { data, .. } = &parsed.l4 else {
        panic!("not an ICMP error: {parsed:?}")
    };
    assert_eq!(flannel_testkit::packet::checksum(data, 0), 0, "{parsed:?}");
    let mut bytes = frame[14..].to_vec();
    for at in [4, 10, 22, 28 + 4, 28 + 10] {
        bytes[at..at + 2].fill(0);
    }
    bytes
}

fn mac(ns: &Netns, device: &str) -> [u8; 6] {
    let link = link(ns, device).expect("a device");
    let text = link["address"].as_str().expect("a MAC address").to_owned();
    let bytes: Vec<u8> = text
        .split(':')
        .map(|byte| u8::from_str_radix(byte, 16).expect("hex"))
        .collect();
    bytes.try_into().expect("six bytes")
}

/// The path as it was made, then narrow; pods that may send more than the tunnel carries.
fn outcomes(carrier: Carrier) -> Vec<Outcome> {
    let options = LabOptions {
        nodes: 2,
        offloads: Offloads::Off,
        ..LabOptions::default()
    };
    let mut rig = Rig::with(options, NET_CONF);
    for node in 0..2 {
        rig.start_agent(node, carrier.flags());
    }
    let pods = [0, 1].map(|node| {
        rig.wait_ready(node);
        let pod = rig
            .node(node)
            .add_pod(rig.node(node).subnet, 2, 1500)
            .expect("a pod");
        for ns in [rig.ns(node), &pod.ns] {
            // By default a host sends one of these a second.
            ns.set_sysctl("net/ipv4/icmp_ratelimit", "0")
                .expect("no limit");
        }
        pod
    });
    rig.wait_converged();
    let [from, to] = &pods;
    let mut all: Vec<Outcome> = probes(&WIDE)
        .into_iter()
        .map(|probe| send(&rig, from, to, probe))
        .collect();
    Narrowing::Route.narrow(&rig);
    wait_path_mtu(&rig, carrier, 1400);
    let narrow = probes(&NARROW);
    all.extend(narrow.into_iter().map(|probe| send(&rig, from, to, probe)));
    all
}

#[test]
fn errors_are_those_of_the_kernels_device() {
    if !privileged() {
        return;
    }
    let kernel = outcomes(Carrier::Kernel);
    for carrier in [Carrier::Bpf, Carrier::Around] {
        let bpf = outcomes(carrier);
        assert_eq!(bpf.len(), kernel.len());
        for (bpf, kernel) in bpf.iter().zip(&kernel) {
            assert_eq!(bpf, kernel, "{carrier:?}");
        }
    }
    // The yardstick itself.
    let refused = |len: usize| too_big(len, 1450);
    for outcome in &kernel {
        let Probe {
            len,
            dont_fragment,
            ttl,
        } = outcome.probe;
        match ttl {
            1 => assert_eq!(summary(outcome), (vec![expired([10, 244, 1, 1])], false)),
            2 => assert_eq!(summary(outcome), (vec![expired([10, 244, 2, 0])], false)),
            _ if dont_fragment && len > 1450 => {
                assert_eq!(summary(outcome), (vec![refused(len)], false));
            }
            _ => assert_eq!(
                summary(outcome),
                (vec![unreachable()], true),
                "{:?}",
                outcome.probe
            ),
        }
    }

    // Without the kernel's device nobody cuts outer packets: what must not be cut itself comes back.
    let alone = outcomes(Carrier::BpfAlone);
    for (at, (alone, kernel)) in alone.iter().zip(&kernel).enumerate() {
        let Probe {
            len, dont_fragment, ..
        } = alone.probe;
        let is_narrow = at >= WIDE.len() * 2 + TTLS.len();
        if is_narrow && dont_fragment && len > 1350 {
            assert_eq!(summary(alone), (vec![too_big(len, 1350)], false));
        } else {
            assert_eq!(alone, kernel);
        }
    }
}

/// An ICMP error in short: type, code, next-hop MTU, source, and length of the packet it is about.
type Short = (u8, u8, u16, [u8; 4], usize);

fn summary(outcome: &Outcome) -> (Vec<Short>, bool) {
    let word = |error: &[u8], at: usize| u16::from_be_bytes([error[at], error[at + 1]]);
    let errors = outcome.errors.iter().map(|error| {
        let source = [error[12], error[13], error[14], error[15]];
        // The length is not part of what is compared where only the kind matters.
        let about = if error[21] == 4 {
            word(error, 30).into()
        } else {
            0
        };
        (error[20], error[21], word(error, 26), source, about)
    });
    (errors.collect(), outcome.arrived)
}

fn too_big(len: usize, mtu: u16) -> Short {
    (3, 4, mtu, [10, 244, 1, 1], len)
}

fn expired(hop: [u8; 4]) -> Short {
    (11, 0, 0, hop, 0)
}

fn unreachable() -> Short {
    (3, 3, 0, [10, 244, 2, 2], 0)
}

/// What the node itself is told, which unlike a router goes by what it learns of a path.
#[test]
fn the_node_itself_learns_the_path_as_from_the_kernels_device() {
    if !privileged() {
        return;
    }
    let mut all = Vec::new();
    for carrier in Carrier::ALL {
        let rig = two_nodes(carrier);
        Narrowing::Route.narrow(&rig);
        wait_path_mtu(&rig, carrier, 1400);
        let answers = [1322, 1323, 1323, 1422, 1322].map(|payload| {
            let limit = Duration::from_millis(500);
            let answer = traffic::ping_sized(rig.ns(0), rig.pod(1).ip, payload, true, limit);
            answer.map_err(|error| format!("{error:#}").contains("too long"))
        });
        all.push(answers.map(|answer| answer.map(drop)));
    }
    let learns = [Ok(()), Ok(()), Err(true), Err(true), Ok(())];
    assert_eq!(all[0], learns, "the kernel's device");
    assert_eq!(all[1], learns, "eBPF above it");
    assert_eq!(all[2], learns, "eBPF above it, and around the stack");
    let knows = [Ok(()), Err(true), Err(true), Err(true), Ok(())];
    assert_eq!(all[3], knows, "eBPF alone");
}
