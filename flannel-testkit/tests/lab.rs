//! The lab's own guarantees, shown on a plain kernel overlay of two nodes.

use flannel_testkit::packet::{Csum, ETHERNET, Inner, L4, Vxlan};
use flannel_testkit::traffic::{self, Amount, FloodPing, TcpPair, TcpServer};
use flannel_testkit::{
    Capture, Direction, KernelNode, Lab, LabOptions, Netns, Offloads, Pod, RawSocket, eventually,
    json, mac_text, privileged,
};
use std::path::Path;
use std::time::{Duration, Instant};

const SECOND: Duration = Duration::from_secs(1);

#[test]
fn two_kernel_nodes_carry_pod_traffic() {
    if !privileged() {
        return;
    }
    for offloads in [Offloads::Default, Offloads::Off] {
        let overlay = Overlay::new(offloads);
        let [a, b] = &overlay.pods;
        traffic::ping_once(&a.ns, b.ip, SECOND).unwrap();
        let sizes = [0, 1, 1422, 1423, 9000, 60_000];
        traffic::udp_echo(&b.ns, b.ip, &a.ns, &sizes).unwrap();
        let sent = traffic::tcp_transfer(&b.ns, b.ip, &a.ns, Amount::Bytes(50_000_000)).unwrap();
        assert_eq!(sent.bytes, 50_000_000);
        assert!(
            sent.mbps > 1.0 && sent.longest_stall < sent.elapsed,
            "{sent:?}"
        );
        assert!(sent.mss < 1450, "{sent:?}");
        let timed = traffic::tcp_transfer(&a.ns, a.ip, &b.ns, Amount::For(SECOND / 2)).unwrap();
        // Half a second was asked for; the two ends do not read one clock at one moment.
        assert!(timed.elapsed >= SECOND / 4 && timed.bytes > 0, "{timed:?}");
        println!("{offloads:?}: {sent:?} {timed:?}");
        let report = traffic::iperf3(&b.ns, b.ip, &a.ns, &["-t", "1"]).unwrap();
        let rate = report["end"]["sum_received"]["bits_per_second"].as_f64();
        assert!(rate.unwrap() > 1e6, "{report}");
    }
}

#[test]
fn a_flood_ping_loses_nothing_and_counts_what_is_lost() {
    if !privileged() {
        return;
    }
    let overlay = Overlay::new(Offloads::Default);
    let [a, b] = &overlay.pods;
    let flood = FloodPing::start(&a.ns, b.ip, Duration::from_millis(1)).unwrap();
    let start = Instant::now();
    while start.elapsed() < SECOND {
        traffic::ping_once(&b.ns, a.ip, SECOND).unwrap();
    }
    let stats = flood.stop().unwrap();
    assert!(stats.sent > 100, "{stats:?}");
    assert_eq!((stats.lost, stats.duplicates), (0, 0), "{stats:?}");
    assert_eq!(stats.sent, stats.received);
    assert_eq!(stats.longest_outage, Duration::ZERO);

    let few = traffic::ping(&a.ns, b.ip, 3, Duration::from_millis(5)).unwrap();
    assert_eq!((few.sent, few.received), (3, 3));

    let flood = FloodPing::start(&a.ns, b.ip, Duration::from_millis(1)).unwrap();
    overlay.lab.node(1).set_carrier(false).unwrap();
    traffic::ping_once(&a.ns, b.ip, SECOND / 5).unwrap_err();
    overlay.lab.node(1).set_carrier(true).unwrap();
    eventually(10 * SECOND, "the overlay is back", || {
        traffic::ping_once(&a.ns, b.ip, SECOND / 5)
    });
    let stats = flood.stop().unwrap();
    assert!(
        stats.lost > 0 && stats.lost + stats.received == stats.sent,
        "{stats:?}"
    );
    assert!(stats.longest_outage >= SECOND / 5, "{stats:?}");
    assert!(stats.longest_gap >= SECOND / 5, "{stats:?}");
    assert!(!stats.lost_numbers.is_empty(), "{stats:?}");
}

#[test]
fn segments_that_were_lost_are_counted_as_ss_counts_them() {
    if !privileged() {
        return;
    }
    let overlay = Overlay::new(Offloads::Default);
    let [a, b] = &overlay.pods;
    let server = TcpServer::listen(&b.ns, b.ip, 8099).unwrap();
    let target = server.address;
    let mut pair = TcpPair::connect(&a.ns, target, &[&server]).unwrap();
    pair.exchange(100_000).unwrap();
    assert_eq!(pair.lost_segments().unwrap(), 0);
    let rules = "add table ip lossy; \
        add chain ip lossy in { type filter hook prerouting priority 0; }; \
        add rule ip lossy in meta length > 500 numgen inc mod 5 0 drop";
    b.ns.exec(["nft", rules]).unwrap();
    pair.exchange(100_000).unwrap();
    let stream = traffic::tcp_transfer(&b.ns, b.ip, &a.ns, Amount::Bytes(1_000_000)).unwrap();
    assert!(stream.lost > 0, "{stream:?}");
    b.ns.exec(["nft", "delete table ip lossy"]).unwrap();
    let counted = pair.lost_segments().unwrap();
    assert!(counted > 0);
    let line = a.ns.exec(["ss", "-Htni", "dport", "8099"]).unwrap();
    let number = |name: &str| -> u32 {
        line.split_whitespace()
            .find_map(|word| word.strip_prefix(name)?.rsplit('/').next()?.parse().ok())
            .unwrap_or(0)
    };
    assert_eq!(
        counted,
        number("retrans:") - number("dsack_dups:"),
        "{line}"
    );
}

#[test]
fn a_capture_shows_the_wire_format_of_kernel_flannel() {
    if !privileged() {
        return;
    }
    let overlay = Overlay::new(Offloads::Off);
    let [a, b] = &overlay.pods;
    let [node_a, node_b] = [0, 1].map(|i| overlay.lab.node(i));
    let underlay = overlay.lab.underlay();
    let capture = Capture::start(underlay, &node_b.port, "udp port 8472").unwrap();
    let sent_only =
        Capture::start_directed(&node_a.ns, "eth0", "udp port 8472", Direction::Out).unwrap();
    traffic::ping(&a.ns, b.ip, 5, Duration::from_millis(1)).unwrap();
    let captured = capture.stop().unwrap();
    assert_eq!(captured.dropped, 0);
    assert_eq!(captured.malformed().unwrap(), Vec::<String>::new());
    let frames = captured.vxlan();
    assert_eq!((frames.len(), captured.packets.len()), (10, 10));
    assert!(captured.packets.is_sorted_by_key(|packet| packet.ts));
    assert_eq!(sent_only.stop().unwrap().vxlan().len(), 5);

    let [kernel_a, kernel_b] = &overlay.kernel;
    let request = &frames[0];
    assert_eq!((request.ip.src, request.ip.dst), (node_a.ip, node_b.ip));
    assert_eq!(
        (request.ip.tos, request.ip.ttl, request.ip.dont_fragment),
        (0, 64, false)
    );
    assert_eq!(
        (request.ip.csum, request.udp_csum),
        (Csum::Right, Csum::Right)
    );
    assert_eq!((request.dst_port, request.udp_len), (8472, None));
    assert_eq!((request.flags, request.vni), (0x08, 1));
    assert_eq!((request.reserved1, request.reserved2), ([0; 3], 0));
    let inner = request.parse_inner().unwrap();
    assert_eq!(
        (inner.src_mac, inner.dst_mac),
        (kernel_a.vtep_mac, kernel_b.vtep_mac)
    );
    assert_eq!((inner.ip.src, inner.ip.dst, inner.ip.ttl), (a.ip, b.ip, 63));
    let L4::Echo {
        reply,
        sequence,
        csum,
        ..
    } = inner.l4
    else {
        panic!("{inner:?}");
    };
    assert_eq!((reply, sequence, csum), (false, 0, Csum::Right));
    // What was taken apart builds the same bytes.
    assert_eq!(request.bytes(), captured.packets[0].data);
}

#[test]
fn the_kernel_takes_what_the_builders_make_and_refuses_what_they_spoil() {
    if !privileged() {
        return;
    }
    let overlay = Overlay::new(Offloads::Off);
    let [a, b] = &overlay.pods;
    let [node_a, node_b] = [0, 1].map(|i| overlay.lab.node(i));
    let [kernel_a, kernel_b] = &overlay.kernel;
    let link = json::link(&node_b.ns, "eth0").unwrap();
    let inner = |number: u16| {
        let echo = Inner::echo(a.ip, b.ip, 0x7e57, number, b"injected");
        echo.with_macs(kernel_a.vtep_mac, kernel_b.vtep_mac)
    };
    let outer = |number: u16| {
        let mut frame = Vxlan::new(node_a.ip, node_b.ip, 1, inner(number).bytes());
        frame.dst_mac = parse_mac(link["address"].as_str().unwrap());
        frame.src_mac = [2, 0, 0, 0, 0, 1];
        frame
    };
    let spoiled: [fn(&mut Vxlan); 6] = [
        |f| f.udp_csum = Csum::Wrong,
        |f| f.ip.csum = Csum::Wrong,
        |f| f.vni = 2,
        |f| f.flags = 0,
        |f| f.flags |= 0x01,
        |f| f.reserved2 = 1,
    ];
    let capture =
        Capture::start(&b.ns, "eth0", "icmp[icmptype] == 8 and icmp[4:2] == 0x7e57").unwrap();
    let socket = RawSocket::open(overlay.lab.underlay(), &node_b.port).unwrap();
    for (number, spoil) in (100..).zip(spoiled) {
        let mut frame = outer(number);
        spoil(&mut frame);
        socket.send(&frame.bytes()).unwrap();
    }
    socket.send(&outer(110).truncated(60)).unwrap();
    let mut fine = outer(0);
    socket.send(&fine.bytes()).unwrap();
    fine = outer(1);
    fine.udp_csum = Csum::Zero;
    fine.ip.tos = 0x02;
    socket.send(&fine.bytes()).unwrap();
    for piece in outer(2).fragments(60).unwrap() {
        socket.send(&piece).unwrap();
    }
    // The last one sent has passed when a ping by the same way has.
    traffic::ping_once(&a.ns, b.ip, SECOND).unwrap();
    let captured = capture.stop().unwrap();
    let numbers =
        captured
            .packets
            .iter()
            .map(|packet| match Inner::parse(&packet.data).unwrap().l4 {
                L4::Echo { sequence, .. } => sequence,
                other => panic!("{other:?}"),
            });
    assert_eq!(numbers.collect::<Vec<_>>(), [0, 1, 2]);
    assert_eq!(
        captured.packets[0].data[ETHERNET + 20..],
        inner(0).packet()[20..]
    );
}

#[test]
fn dropping_a_lab_removes_all_of_it_also_in_a_panic() {
    if !privileged() {
        return;
    }
    let overlay = Overlay::new(Offloads::Default);
    let prefix = overlay.lab.prefix().to_owned();
    let run_dir = overlay.lab.node(0).run_dir.clone();
    assert_eq!(names(&prefix).len(), 5, "underlay, two nodes, two pods");
    let mut sleeper = overlay.pods[0]
        .ns
        .command("sleep")
        .arg("600")
        .spawn()
        .unwrap();
    overlay.pods[1].clone().remove().unwrap();
    assert_eq!(names(&prefix).len(), 4);
    assert!(run_dir.is_dir());
    let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let _overlay = overlay;
        panic!("on purpose");
    }));
    assert!(panicked.is_err());
    assert_eq!(names(&prefix), Vec::<String>::new());
    assert!(!run_dir.exists());
    assert!(!sleeper.wait().unwrap().success(), "killed with the lab");
}

#[test]
fn a_namespace_is_entered_by_closures_and_programs() {
    if !privileged() {
        return;
    }
    let lab = Lab::new(LabOptions {
        mtu: 9000,
        second_uplink: true,
        ..LabOptions::default()
    })
    .unwrap();
    let [a, b] = [0, 1].map(|i| lab.node(i));
    let cookies =
        a.ns.run(|| (a.ns.cookie().unwrap(), b.ns.run(|| b.ns.cookie().unwrap())));
    assert_ne!(cookies.0, cookies.1);
    assert_eq!(a.ns.sysctl("net/ipv4/ip_forward").unwrap(), "1");
    assert_eq!(json::link(&a.ns, "eth1").unwrap()["mtu"], 9000);
    traffic::ping_once(&a.ns, b.second_ip.unwrap(), SECOND).unwrap();
    traffic::ping_sized(&a.ns, b.ip, 8972, true, SECOND).unwrap();
    let too_long = traffic::ping_sized(&a.ns, b.ip, 8973, true, SECOND).unwrap_err();
    assert!(too_long.to_string().contains("too long"), "{too_long:#}");
    let failed = a.ns.exec(["ip", "link", "show", "nonesuch"]).unwrap_err();
    assert!(format!("{failed:#}").contains("nonesuch"), "{failed:#}");
    let slow = a.ns.exec_for(SECOND / 10, ["sleep", "600"]).unwrap_err();
    assert!(format!("{slow:#}").contains("still running"), "{slow:#}");
    let panicked = std::panic::catch_unwind(|| a.ns.run(|| panic!("on purpose")));
    assert!(panicked.is_err());
    assert!(Netns::existing("fe-nonesuch").try_run(|| ()).is_err());
    let host = lab.host("client", 200).unwrap();
    traffic::ping_once(&host, a.ip, SECOND).unwrap();
    let pod = a.add_pod(a.subnet, 9, 8950).unwrap();
    let link = json::link(&pod.ns, "eth0").unwrap();
    assert_eq!(link["address"], mac_text(pod.mac));
    let port = json::link(&a.ns, &pod.host_if).unwrap();
    assert_eq!(
        (&port["master"], &port["mtu"]),
        (&"cni0".into(), &8950.into())
    );
    assert_eq!(port["linkinfo"]["info_slave_data"]["hairpin"], false);
    pod.set_hairpin(true).unwrap();
    let port = json::link(&a.ns, &pod.host_if).unwrap();
    assert_eq!(port["linkinfo"]["info_slave_data"]["hairpin"], true);
    assert_eq!(
        json::bpftool_json(&a.ns, &["net", "show"]).unwrap()[0]["tc"],
        serde_json::json!([])
    );
}

/// Two nodes with a pod each and a kernel overlay between them.
struct Overlay {
    pods: [Pod; 2],
    kernel: [KernelNode; 2],
    lab: Lab,
}

impl Overlay {
    fn new(offloads: Offloads) -> Overlay {
        let lab = Lab::new(LabOptions {
            offloads,
            ..LabOptions::default()
        })
        .unwrap();
        let kernel = [0, 1].map(|i| KernelNode::set_up(lab.node(i)).unwrap());
        kernel[0].connect(&kernel[1]).unwrap();
        let pods = [0, 1].map(|i| lab.node(i).add_pod(lab.node(i).subnet, 2, 1450).unwrap());
        Overlay { pods, kernel, lab }
    }
}

fn names(prefix: &str) -> Vec<String> {
    let entries = Path::new("/run/netns").read_dir().unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.starts_with(prefix)).collect()
}

fn parse_mac(text: &str) -> [u8; 6] {
    let bytes = text
        .split(':')
        .map(|byte| u8::from_str_radix(byte, 16).unwrap());
    bytes.collect::<Vec<_>>().try_into().unwrap()
}
