//! A path that carries less than the tunnel was made for: whoever carries the packets, eBPF or the kernel's device, pods see the
//! same ICMP errors, streams go on, and nothing too large goes out. Every test runs on both, and on eBPF without that device.

#[path = "netns_pmtu/ecn.rs"]
mod ecn;
#[path = "netns_pmtu/icmp.rs"]
mod icmp;
mod rig;

use std::{net::IpAddr, time::Duration};

use flannel_testkit::{
    Capture, Direction, Family, Lab, LabOptions, Offloads, eventually, privileged,
    traffic::{self, Amount, TcpFlow, TcpStats},
};
use rig::{PATIENCE, Rig, list};

/// Who carries the packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Carrier {
    /// The kernel's device: what the others are measured against.
    Kernel,
    /// eBPF with the kernel's device under it, for every packet that comes out of the stack.
    Bpf,
    /// The same, and around the stack what that has let pass.
    Around,
    /// eBPF alone.
    BpfAlone,
}

impl Carrier {
    /// Those of a family: IPv6 needs the kernel's device.
    fn all(family: Family) -> &'static [Self] {
        const ALL: [Carrier; 4] = [
            Carrier::Kernel,
            Carrier::Bpf,
            Carrier::Around,
            Carrier::BpfAlone,
        ];
        match family {
            Family::V4 => &ALL,
            Family::V6 => &ALL[..3],
        }
    }

    fn flags(self) -> &'static [&'static str] {
        match self {
            Self::Kernel => &["--datapath=kernel"],
            Self::Bpf => &["--datapath=bpf", "--bpf-fast-path=off"],
            Self::Around => &["--datapath=bpf", "--bpf-fast-path=established"],
            Self::BpfAlone => &["--datapath=bpf", "--bpf-device=veth", "--bpf-fast-path=off"],
        }
    }
}

/// Bytes in the largest packet that fits into a tunnel over a path, behind a UDP or an ICMP header.
fn payload(family: Family, path_mtu: u32) -> usize {
    (path_mtu - family.overhead()) as usize - family.header() - 8
}

fn lab(family: Family) -> Rig {
    let options = LabOptions {
        nodes: 2,
        offloads: Offloads::Off,
        ..LabOptions::default()
    };
    Rig::of(family.into(), options)
}

/// Two nodes without offloads, so that what is captured is what a wire would carry.
fn two_nodes(family: Family, carrier: Carrier) -> Rig {
    let mut rig = lab(family);
    rig.start_all(carrier.flags());
    rig
}

/// The ways in which a path becomes narrow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Narrowing {
    Route,
    Gateway,
    Device,
}

impl Narrowing {
    const ALL: [Self; 3] = [Self::Route, Self::Gateway, Self::Device];

    fn before(self, rig: &Rig) {
        if let Self::Gateway = self {
            for key in ["all", "br0"] {
                let key = format!("net/ipv4/conf/{key}/send_redirects");
                rig.lab()
                    .underlay()
                    .set_sysctl(&key, "0")
                    .expect("no redirects");
            }
            let (peer, via) = (rig.node(1).address(rig.family()), gateway(rig));
            let line = format!("route add {peer} via {via} dev eth0");
            rig.ns(0).ip(&line).expect("a route");
        }
    }

    fn narrow(self, rig: &Rig) {
        self.set(rig, "1400");
    }

    fn widen(self, rig: &Rig) {
        self.set(rig, "1500");
    }

    fn set(self, rig: &Rig, mtu: &str) {
        let (ns, peer) = (rig.ns(0), rig.node(1).address(rig.family()));
        let line = match self {
            Self::Route => {
                let link = match rig.family() {
                    Family::V4 => "192.168.77.0/24 dev eth0 src 192.168.77.11",
                    Family::V6 => "fd77::/64 dev eth0 proto kernel metric 256",
                };
                format!("route change {link} mtu {mtu}")
            }
            Self::Gateway => {
                format!(
                    "route change {peer} via {} dev eth0 mtu {mtu}",
                    gateway(rig)
                )
            }
            Self::Device => format!("link set eth0 mtu {mtu}"),
        };
        ns.ip(&line).expect("change the way");
        if let Self::Device = self {
            // A veth end drops what is larger than its own MTU.
            rig.ns(1).ip(&line).expect("change the other end");
        }
    }
}

fn gateway(rig: &Rig) -> IpAddr {
    Lab::gateway(rig.family())
}

/// Waits until the agent of node 0 knows that the path has this MTU.
#[track_caller]
fn wait_path_mtu(rig: &Rig, carrier: Carrier, mtu: u32) {
    if carrier == Carrier::Kernel {
        return;
    }
    eventually(PATIENCE, &format!("the path MTU is {mtu}"), || {
        let peers = rig.peers(0);
        let all = list(&peers).iter().all(|peer| peer["path_mtu"] == mtu);
        let any = !list(&peers).is_empty();
        (all && any).then_some(()).ok_or(format!("{peers}"))
    });
}

/// Bytes that node 0 has sent on its uplink.
#[track_caller]
fn sent(rig: &Rig) -> u64 {
    let link = flannel_testkit::json::link(rig.ns(0), "eth0").expect("the uplink");
    link["stats64"]["tx"]["bytes"].as_u64().expect("bytes")
}

#[track_caller]
fn wait_sent(rig: &Rig, more: u64) {
    let from = sent(rig);
    eventually(PATIENCE, "the stream goes on", || {
        let now = sent(rig) - from;
        (now >= more)
            .then_some(())
            .ok_or(format!("{now} bytes of {more}"))
    });
}

/// Waits until the tunnel device of a node has the MTU for this path.
#[track_caller]
fn wait_tunnel_mtu(rig: &Rig, node: usize, path: u32) {
    let want = path - rig.family().overhead();
    eventually(PATIENCE, &format!("the tunnel's MTU is {want}"), || {
        let device = flannel_testkit::json::link(rig.ns(node), &rig.device());
        let mtu = device.map_err(|error| format!("{error:#}"))?["mtu"].clone();
        (mtu == want).then_some(()).ok_or(mtu.to_string())
    });
}

/// Makes the path narrow while a stream runs over it, and wide again, and gives the account of the stream.
fn stream_over_a_path_that_narrows(rig: &Rig, carrier: Carrier, narrowing: Narrowing) -> TcpStats {
    narrowing.before(rig);
    let (client, server) = (rig.pod(0).clone(), rig.pod(1).clone());
    let stream = TcpFlow::start(&server.ns, server.address(rig.family()), &client.ns);
    let stream = stream.expect("a stream");
    wait_sent(rig, 4 << 20);
    narrowing.narrow(rig);
    wait_path_mtu(rig, carrier, 1400);
    if narrowing == Narrowing::Device {
        wait_tunnel_mtu(rig, 0, 1400);
    }
    // 14 bytes of Ethernet header and 1400 of packet are the most that may pass.
    let (wire, port) = (rig.lab().underlay(), &rig.node(0).port);
    let capture = Capture::start_directed(wire, port, "greater 1415", Direction::In);
    let capture = capture.expect("a capture");
    let before = carried(rig, carrier);
    wait_sent(rig, 4 << 20);
    let large = capture.stop().expect("the capture");
    assert_eq!(
        large.packets.iter().map(|p| p.wire_len).max(),
        None,
        "{carrier:?} {narrowing:?}: too large for the path"
    );
    // Without the kernel's device only eBPF can have carried them.
    let now = carried(rig, carrier);
    assert!(
        carrier != Carrier::BpfAlone || now > before + 50,
        "{before} {now}"
    );
    let stats = stream.stop();
    let stats = stats.unwrap_or_else(|error| panic!("{carrier:?} {narrowing:?}: {error:#}"));
    narrowing.widen(rig);
    wait_path_mtu(rig, carrier, 1500);
    for node in 0..2 {
        wait_tunnel_mtu(rig, node, 1500);
    }
    // Hosts remember a narrow path for ten minutes.
    for ns in [rig.ns(0), &client.ns] {
        let flag = rig.family().flag();
        ns.ip(&format!("{flag} route flush cache")).expect("forget");
    }
    stats
}

fn carried(rig: &Rig, carrier: Carrier) -> u64 {
    if carrier == Carrier::Kernel {
        return 0;
    }
    rig.counters(0).encap
}

fn streams(family: Family) {
    if !privileged() {
        return;
    }
    for carrier in Carrier::all(family).iter().copied() {
        // However it narrows, the programs of the fast path learn it from the same map.
        let ways = match (family, carrier) {
            (Family::V4, Carrier::Around) | (Family::V6, _) => 1,
            _ => 3,
        };
        for narrowing in Narrowing::ALL.into_iter().take(ways) {
            let rig = two_nodes(family, carrier);
            let stats = stream_over_a_path_that_narrows(&rig, carrier, narrowing);
            eprintln!("{carrier:?} {narrowing:?}: {stats:?}");
            // The kernel's device cuts outer packets in two instead of telling the sender: a router does not go by what it learnt
            // of a path (`ip_forward_use_pmtu`). Without it the route says so: 1400 less the tunnel's overhead, an IP header, and a
            // TCP header with timestamps.
            // The MTU of the uplink itself is followed: the tunnel's device says so to everybody. Of IPv6 no router cuts anything, and
            // each tells what it knows.
            let told = carrier == Carrier::BpfAlone
                || narrowing == Narrowing::Device
                || family == Family::V6;
            let mtu = if told { 1400 } else { 1500 };
            let mss = payload(family, mtu) + 8 - 32;
            assert_eq!(stats.mss as usize, mss, "{carrier:?} {narrowing:?}");
            // Wide again: the largest packet passes whole, by the same way as before.
            let before = carried(&rig, carrier);
            let (from, to) = (&rig.pod(0).ns, rig.pod(1).address(family));
            let largest = payload(family, 1500);
            traffic::ping_sized(from, to, largest, true, Duration::from_secs(2))
                .unwrap_or_else(|error| panic!("{carrier:?} {narrowing:?}: {error:#}"));
            let now = carried(&rig, carrier);
            assert!(carrier == Carrier::Kernel || now > before, "{before} {now}");
        }
    }
}

#[test]
fn a_stream_survives_a_path_that_narrows() {
    streams(Family::V4);
}

#[test]
fn a_stream_over_ipv6_survives_a_path_that_narrows() {
    streams(Family::V6);
}

fn datagrams(family: Family) {
    if !privileged() {
        return;
    }
    for carrier in Carrier::all(family).iter().copied() {
        let rig = two_nodes(family, carrier);
        Narrowing::Route.narrow(&rig);
        wait_path_mtu(&rig, carrier, 1400);
        let pods = (rig.pod(0), rig.pod(1));
        let (narrow, wide) = (payload(family, 1400), payload(family, 1500));
        // The first one that is too large, and must not be cut, teaches the sender.
        let lesson = traffic::udp_echo(&pods.1.ns, pods.1.address(family), &pods.0.ns, &[wide]);
        let lost = carrier == Carrier::BpfAlone || family == Family::V6;
        assert_eq!(lesson.is_err(), lost, "{carrier:?}: {lesson:?}");
        if family == Family::V6 {
            // It teaches the node, which tells the sender of the second one.
            eventually(PATIENCE, "the sender knows the path", || {
                let limit = Duration::from_millis(500);
                let (from, to) = (&pods.0.ns, pods.1.address(family));
                traffic::ping_sized(from, to, wide, false, limit).map(drop)
            });
        }
        let sizes = [1, narrow, narrow + 1, 1400, wide, wide + 1, 9000, 60_000];
        for (server, client) in [(pods.1, pods.0), (pods.0, pods.1)] {
            traffic::udp_echo(&server.ns, server.address(family), &client.ns, &sizes)
                .unwrap_or_else(|error| panic!("{carrier:?}: {error:#}"));
        }
    }
}

#[test]
fn datagrams_of_all_sizes_cross_a_narrow_path() {
    for family in Family::ALL {
        datagrams(family);
    }
}

/// A sender with a kernel device over a narrow path cuts the outer packets. The receiver has no vxlan device whose socket would
/// take what the stack puts together again.
#[test]
fn ebpf_alone_receives_outer_fragments() {
    if !privileged() {
        return;
    }
    let mut rig = lab(Family::V4);
    for (node, carrier) in [(0, Carrier::Kernel), (1, Carrier::BpfAlone)] {
        rig.start_agent(node, carrier.flags());
    }
    for node in 0..2 {
        rig.wait_ready(node);
        rig.add_pod(node);
    }
    rig.wait_converged();
    Narrowing::Route.narrow(&rig);
    let (sender, receiver) = (rig.pod(0), rig.pod(1));
    rig.wait_fragments_heard(1);
    let capture =
        Capture::start(rig.ns(1), "eth0", "udp or (ip[6:2] & 0x3fff != 0)").expect("capture");
    let sizes = [1, 1351, 1400, 1422];
    for _ in 0..3 {
        traffic::udp_echo(&receiver.ns, receiver.ip, &sender.ns, &sizes).expect("datagrams");
    }
    let fragments = capture.stop().expect("captured").packets;
    let cut = fragments
        .iter()
        .filter(|packet| packet.data.get(20).is_some_and(|byte| byte & 0x20 != 0))
        .count();
    assert!(cut >= 9, "only {cut} packets came in fragments");
    let stats = traffic::tcp_transfer(
        &receiver.ns,
        receiver.ip,
        &sender.ns,
        Amount::Bytes(2_000_000),
    )
    .expect("a stream");
    assert_eq!(stats.bytes, 2_000_000);
}
