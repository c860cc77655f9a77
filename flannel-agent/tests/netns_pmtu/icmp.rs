//! The errors that pods get, byte for byte those of a node on the kernel's device.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::Duration,
};

use flannel_testkit::{
    Capture, Family, Netns, Pod, RawSocket,
    json::link,
    packet::{Address, Header as _, Inner, L4, checksum},
    privileged, traffic,
};

use crate::{Carrier, Narrowing, lab, payload, rig::Rig, two_nodes, wait_path_mtu};

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
/// Two hops on the way, then the destination.
const TTLS: [u8; 4] = [1, 2, 3, 4];
/// Nobody listens there.
const PORT: u16 = 9;

/// Lengths around the MTU of the tunnel.
fn wide(family: Family) -> [usize; 5] {
    let largest = (1500 - family.overhead()) as usize;
    [100, largest - 1, largest, largest + 1, 1500]
}

/// The same, and around that of the narrow path.
fn narrow(family: Family) -> [usize; 8] {
    let [_, _, largest, larger, _] = wide(family);
    let fits = largest - 100;
    [100, fits - 1, fits, fits + 1, 1400, largest, larger, 1500]
}

fn probes(family: Family, lengths: &[usize]) -> Vec<Probe> {
    // Routers cut no packets of IPv6.
    let cut: &[bool] = match family {
        Family::V4 => &[true, false],
        Family::V6 => &[true],
    };
    let sized = lengths.iter().flat_map(|len| {
        cut.iter().map(|dont_fragment| Probe {
            len: *len,
            dont_fragment: *dont_fragment,
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

/// A packet, which a number tells from others of its kind.
fn frame(pods: [&Pod; 2], gateway: [u8; 6], family: Family, probe: Probe, number: u16) -> Vec<u8> {
    let [from, to] = pods;
    let data = vec![0x5a; probe.len - family.header() - 8];
    match family {
        Family::V4 => {
            let mut frame = Inner::udp(from.ip, to.ip, PORT, &data).with_macs(from.mac, gateway);
            frame.ip.id = 100 + number;
            frame.ip.ttl = probe.ttl;
            frame.ip.dont_fragment = probe.dont_fragment;
            frame.bytes()
        }
        Family::V6 => {
            let frame = Inner::udp(Ipv6Addr::of(from), Ipv6Addr::of(to), PORT, &data);
            let mut frame = frame.with_macs(from.mac, gateway);
            frame.ip.flow_label = 100 + u32::from(number);
            frame.ip.hop_limit = probe.ttl;
            frame.bytes()
        }
    }
}

/// Sends a probe a few times from the first pod of node 0 and gives what it got back.
fn send(rig: &Rig, from: &Pod, to: &Pod, probe: Probe) -> Outcome {
    let gateway = mac(rig.ns(0), "cni0");
    let family = rig.family();
    let (errors, arrivals) = match family {
        Family::V4 => (
            "icmp[0] == 3 or icmp[0] == 11",
            "udp or ip[6:2] & 0x3fff != 0",
        ),
        Family::V6 => ("icmp6 and ip6[40] < 128", "udp or ip6[6] == 44"),
    };
    // The pod forgets what it learnt, so that the answers are about this probe.
    let flush = format!("{} route flush cache", family.flag());
    from.ns.ip(&flush).expect("forget");
    let errors = Capture::start(&from.ns, "eth0", errors).expect("capture");
    let filter = format!("src host {} and ({arrivals})", from.address(family));
    let arrivals = Capture::start(&to.ns, "eth0", &filter).expect("capture");
    let socket = RawSocket::open(&from.ns, "eth0").expect("a socket");
    for number in 0..TIMES {
        let frame = frame([from, to], gateway, family, probe, number);
        socket.send(&frame).expect("send");
        // A round trip: whatever the probe caused has happened by then.
        traffic::ping_once(&from.ns, to.address(family), Duration::from_secs(2)).expect("a ping");
    }
    let errors = errors.stop().expect("the errors").packets;
    let arrived = arrivals.stop().expect("the arrivals").packets;
    let normal = |packet: &flannel_testkit::Packet| match family {
        Family::V4 => normal::<Ipv4Addr>(&packet.data, &[4, 10, 22, 28 + 4, 28 + 10]),
        // Flow labels.
        Family::V6 => normal::<Ipv6Addr>(&packet.data, &[2, 42, 48 + 2]),
    };
    Outcome {
        probe,
        errors: errors.iter().map(normal).collect(),
        arrived: !arrived.is_empty(),
    }
}

/// An ICMP packet without link header, identification and checksums, its own and those of the packet it quotes, which are at these
/// places. The checksums are checked instead.
fn normal<A: Address>(frame: &[u8], marks: &[usize]) -> Vec<u8> {
    let parsed = Inner::<A>::read(frame).expect("an IP packet");
    assert!(parsed.ip.is_summed(), "{parsed:?}");
    let L4::Raw { data, .. } = &parsed.l4 else {
        panic!("not an ICMP error: {parsed:?}")
    };
    let start = match A::FAMILY {
        Family::V4 => 0,
        Family::V6 => parsed.ip.pseudo_sum(A::Header::ICMP, data.len()),
    };
    assert_eq!(checksum(data, start), 0, "{parsed:?}");
    let mut bytes = frame[14..].to_vec();
    for at in marks {
        bytes[*at..at + 2].fill(0);
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
fn outcomes(family: Family, carrier: Carrier) -> Vec<Outcome> {
    let mut rig = lab(family);
    for node in 0..2 {
        rig.start_agent(node, carrier.flags());
    }
    let limit = match family {
        Family::V4 => "net/ipv4/icmp_ratelimit",
        Family::V6 => "net/ipv6/icmp/ratelimit",
    };
    let pods = [0, 1].map(|node| {
        rig.wait_ready(node);
        let pod = rig
            .node(node)
            .add_pod(rig.node(node).subnet_of(family), 2, 1500)
            .expect("a pod");
        for ns in [rig.ns(node), &pod.ns] {
            // By default a host sends one of these a second.
            ns.set_sysctl(limit, "0").expect("no limit");
        }
        pod
    });
    rig.wait_converged();
    let [from, to] = &pods;
    let mut all: Vec<Outcome> = probes(family, &wide(family))
        .into_iter()
        .map(|probe| send(&rig, from, to, probe))
        .collect();
    Narrowing::Route.narrow(&rig);
    wait_path_mtu(&rig, carrier, 1400);
    let narrow = probes(family, &narrow(family));
    all.extend(narrow.into_iter().map(|probe| send(&rig, from, to, probe)));
    all
}

fn compare(family: Family, carriers: &[Carrier]) -> Vec<Outcome> {
    let kernel = outcomes(family, Carrier::Kernel);
    for carrier in carriers {
        let bpf = outcomes(family, *carrier);
        assert_eq!(bpf.len(), kernel.len());
        for (bpf, kernel) in bpf.iter().zip(&kernel) {
            assert_eq!(bpf, kernel, "{carrier:?}");
        }
    }
    // The yardstick itself.
    let [gateway, far, pod] = ends(family);
    let [_, _, largest, ..] = wide(family);
    for (at, outcome) in kernel.iter().enumerate() {
        let is_narrow = at >= probes(family, &wide(family)).len();
        // What is too long for the path alone is cut once it has its outer headers, where routers cut.
        let whole = is_narrow && family == Family::V6;
        let Probe {
            len,
            dont_fragment,
            ttl,
        } = outcome.probe;
        let want = match ttl {
            1 => (expired(gateway), false),
            2 => (expired(far), false),
            _ if dont_fragment && len > largest => (too_big(gateway, len, largest), false),
            _ if whole && len > largest - 100 => (too_big(gateway, len, largest - 100), false),
            _ => (unreachable(pod), true),
        };
        let want = (vec![want.0], want.1);
        assert_eq!(summary(outcome), want, "{:?}", outcome.probe);
    }
    kernel
}

#[test]
fn errors_are_those_of_the_kernels_device() {
    if !privileged() {
        return;
    }
    let kernel = compare(Family::V4, &[Carrier::Bpf, Carrier::Around]);

    // Without the kernel's device nobody cuts outer packets: what must not be cut itself comes back.
    let [gateway, ..] = ends(Family::V4);
    let alone = outcomes(Family::V4, Carrier::BpfAlone);
    for (at, (alone, kernel)) in alone.iter().zip(&kernel).enumerate() {
        let Probe {
            len, dont_fragment, ..
        } = alone.probe;
        let is_narrow = at >= probes(Family::V4, &wide(Family::V4)).len();
        if is_narrow && dont_fragment && len > 1350 {
            assert_eq!(summary(alone), (vec![too_big(gateway, len, 1350)], false));
        } else {
            assert_eq!(alone, kernel);
        }
    }
}

#[test]
fn errors_of_ipv6_are_those_of_the_kernels_device() {
    if privileged() {
        compare(Family::V6, &[Carrier::Around]);
    }
}

/// Who answers: the pod's gateway, the other node, the other pod.
fn ends(family: Family) -> [IpAddr; 3] {
    let texts = match family {
        Family::V4 => ["10.244.1.1", "10.244.2.0", "10.244.2.2"],
        Family::V6 => ["fd00:10:244:1::1", "fd00:10:244:2::", "fd00:10:244:2::2"],
    };
    texts.map(|text| text.parse().expect("an address"))
}

/// An ICMP error in short: type, code, next-hop MTU, source, and length of the packet it is about.
type Short = (u8, u8, u16, IpAddr, usize);

/// What an error is about is said only where its size matters.
fn summary(outcome: &Outcome) -> (Vec<Short>, bool) {
    let word = |error: &[u8], at: usize| u16::from_be_bytes([error[at], error[at + 1]]);
    let errors = outcome.errors.iter().map(|error| {
        if error[0] >> 4 == 6 {
            let source: [u8; 16] = error[8..24].try_into().expect("sixteen bytes");
            let about = if error[40] == 2 {
                usize::from(word(error, 48 + 4)) + 40
            } else {
                0
            };
            return (error[40], error[41], word(error, 46), source.into(), about);
        }
        let source: [u8; 4] = error[12..16].try_into().expect("four bytes");
        let about = if error[21] == 4 {
            word(error, 30).into()
        } else {
            0
        };
        (error[20], error[21], word(error, 26), source.into(), about)
    });
    (errors.collect(), outcome.arrived)
}

fn too_big(from: IpAddr, len: usize, mtu: usize) -> Short {
    let mtu = u16::try_from(mtu).expect("an MTU");
    match from {
        IpAddr::V4(_) => (3, 4, mtu, from, len),
        IpAddr::V6(_) => (2, 0, mtu, from, len),
    }
}

fn expired(hop: IpAddr) -> Short {
    let kind = if hop.is_ipv4() { 11 } else { 3 };
    (kind, 0, 0, hop, 0)
}

/// Nobody listens at the port.
fn unreachable(pod: IpAddr) -> Short {
    match pod {
        IpAddr::V4(_) => (3, 3, 0, pod, 0),
        IpAddr::V6(_) => (1, 4, 0, pod, 0),
    }
}

/// What the node itself is told, which unlike a router goes by what it learns of a path.
#[test]
fn the_node_itself_learns_the_path_as_from_the_kernels_device() {
    for family in Family::ALL {
        learns(family);
    }
}

fn learns(family: Family) {
    if !privileged() {
        return;
    }
    let (narrow, wide) = (payload(family, 1400), payload(family, 1500));
    for carrier in Carrier::all(family).iter().copied() {
        let rig = two_nodes(family, carrier);
        Narrowing::Route.narrow(&rig);
        wait_path_mtu(&rig, carrier, 1400);
        let pod = rig.pod(1).address(family);
        let answers = [narrow, narrow + 1, narrow + 1, wide, narrow].map(|payload| {
            let limit = Duration::from_millis(500);
            let answer = traffic::ping_sized(rig.ns(0), pod, payload, true, limit);
            answer.map_err(|error| format!("{error:#}").contains("too long"))
        });
        let answers = answers.map(|answer| answer.map(drop));
        let first = match (family, carrier) {
            (_, Carrier::BpfAlone) => Err(true),
            // Cut on its way.
            (Family::V4, _) => Ok(()),
            // Lost, as nobody may cut it.
            (Family::V6, _) => Err(false),
        };
        let want = [Ok(()), first, Err(true), Err(true), Ok(())];
        assert_eq!(answers, want, "{family} {carrier:?}");
    }
}
