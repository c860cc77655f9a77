//! Labs with IPv6, with both families, and with nodes on two links, shown on plain kernel overlays.

use flannel_testkit::packet::{Csum, Inner6, L4};
use flannel_testkit::services::{Flavour, HostPort, Policy, Service, Services, Transport};
use flannel_testkit::traffic::{self, Amount, FloodPing, TcpPair, TcpServer, UdpEnd, UdpFlow};
use flannel_testkit::{
    Capture, Families, Family, KernelNode, Lab, LabOptions, Offloads, Pod, Prefix, conntrack, json,
    kernel_node, mac_text, privileged,
};
use std::net::{Ipv6Addr, SocketAddr};
use std::time::Duration;

const SECOND: Duration = Duration::from_secs(1);

#[test]
fn two_kernel_nodes_carry_pod_traffic_over_ipv6_alone() {
    if !privileged() {
        return;
    }
    for offloads in [Offloads::Default, Offloads::Off] {
        let overlay = Overlay::new(Families::V6, offloads);
        let addresses = overlay.lab.node(0).ns.ip("-4 address show dev eth0");
        assert_eq!(addresses.unwrap(), "", "an IPv4 address");
        overlay.exchange(Family::V6);
    }
}

#[test]
fn two_kernel_nodes_carry_pod_traffic_over_both_families() {
    if !privileged() {
        return;
    }
    let overlay = Overlay::new(Families::Dual, Offloads::Default);
    for family in Family::ALL {
        overlay.exchange(family);
    }
    let [first, ..] = &overlay.kernel;
    let (key, value) = kernel_node::lease(&first.iter().collect::<Vec<_>>());
    assert_eq!(key, "10.244.1.0-24&fd00:10:244:1::-64");
    assert_eq!(value["PublicIP"], "192.168.77.11");
    assert_eq!(value["PublicIPv6"], "fd77::11");
    assert_eq!(
        value["BackendV6Data"]["VtepMAC"],
        mac_text(first[1].vtep_mac)
    );
}

#[test]
fn the_kernel_node_of_ipv6_has_upstreams_shape() {
    if !privileged() {
        return;
    }
    let overlay = Overlay::new(Families::V6, Offloads::Off);
    let (ours, other) = (&overlay.kernel[0][0], &overlay.kernel[1][0]);
    let link = json::link(&ours.ns, "flannel-v6.1").unwrap();
    // Asked for is 1450, as upstream does.
    assert_eq!(link["mtu"], 1430, "{link}");
    let data = &link["linkinfo"]["info_data"];
    assert_eq!(data["local6"], "fd77::11", "{data}");
    assert_eq!(
        (&data["udp_zero_csum6_tx"], &data["learning"]),
        (&false.into(), &false.into())
    );
    let routes = ours.ns.ip("-6 route show dev flannel-v6.1").unwrap();
    assert!(
        routes.contains("fd00:10:244:2::/64 via fd00:10:244:2:: metric 1024 onlink pref medium"),
        "{routes}"
    );
    let neighbours = ours
        .ns
        .ip("-6 neigh show dev flannel-v6.1 nud permanent")
        .unwrap();
    let mac = mac_text(other.vtep_mac);
    assert!(
        neighbours.contains(&format!("fd00:10:244:2:: lladdr {mac} PERMANENT")),
        "{neighbours}"
    );

    let [a, b] = &overlay.pods;
    let (from, to) = (a.address(Family::V6), b.address(Family::V6));
    let node = overlay.lab.node(0);
    let wire = Capture::start(overlay.lab.underlay(), &node.port, "udp port 8472").unwrap();
    traffic::udp_echo(&b.ns, to, &a.ns, &[10, 3_000]).unwrap();
    traffic::ping_sized(&a.ns, to, 100, true, SECOND).unwrap();
    let wire = wire.stop().unwrap();
    assert_eq!(wire.malformed().unwrap(), Vec::<String>::new());
    let frames = wire.vxlan_of::<Ipv6Addr>();
    let mut fragments = 0;
    let mut echoes = 0;
    for frame in &frames {
        assert_eq!(
            (frame.udp_csum, frame.ip.hop_limit, frame.vni),
            (Csum::Right, 64, 1)
        );
        let inner = frame.parse_inner().unwrap();
        if [from, to].contains(&inner.ip.src.into()) {
            fragments += usize::from(inner.ip.fragment.is_some());
            echoes += usize::from(matches!(
                inner.l4,
                L4::Echo {
                    csum: Csum::Right,
                    ..
                }
            ));
        }
    }
    assert_eq!((fragments, echoes), (6, 2), "{} frames", frames.len());
}

#[test]
fn a_frame_made_by_hand_reaches_the_pod() {
    if !privileged() {
        return;
    }
    let overlay = Overlay::new(Families::V6, Offloads::Off);
    let [a, b] = &overlay.pods;
    let (Some((from, _)), Some((to, _))) = (a.v6, b.v6) else {
        panic!("no addresses of IPv6");
    };
    let server = UdpEnd::bind(&b.ns, to, 4000).unwrap();
    let mut inner = Inner6::udp(from, to, 4000, b"");
    inner.ip.traffic_class = 0x28;
    flannel_testkit::send_ip(&a.ns, to, &inner.packet()).unwrap();
    assert!(server.has_some(SECOND).unwrap());
}

#[test]
fn far_nodes_are_behind_a_router() {
    if !privileged() {
        return;
    }
    let lab = Lab::new(LabOptions {
        nodes: 3,
        far_nodes: 1,
        families: Families::Dual,
        ..LabOptions::default()
    })
    .unwrap();
    let [a, b, far] = [0, 1, 2].map(|index| lab.node(index));
    assert!(far.is_far_from(a) && !a.is_far_from(b));
    for family in Family::ALL {
        for (to, routed) in [(b, false), (far, true)] {
            let address = to.address(family);
            traffic::ping_once(&a.ns, address, SECOND).unwrap();
            let argv = [family.flag(), "route", "get", &address.to_string()];
            let route = json::ip_json(&a.ns, &argv).unwrap();
            assert_eq!(route[0]["gateway"].is_string(), routed, "{route}");
        }
        let gateway = far.gateway(family).to_string();
        let route = json::ip_json(&far.ns, &[family.flag(), "route", "show", "default"]).unwrap();
        assert_eq!(route[0]["gateway"], gateway, "{route}");
    }
}

/// Two plain kernel nodes with a device of each family, and a pod on each.
struct Overlay {
    pods: [Pod; 2],
    kernel: [Vec<KernelNode>; 2],
    lab: Lab,
}

impl Overlay {
    fn new(families: Families, offloads: Offloads) -> Overlay {
        let lab = Lab::new(LabOptions {
            families,
            offloads,
            ..LabOptions::default()
        })
        .unwrap();
        let list = families.list();
        let kernel = [0, 1].map(|index| -> Vec<KernelNode> {
            let device = |family: &Family| KernelNode::set_up_family(lab.node(index), *family);
            list.iter().map(|family| device(family).unwrap()).collect()
        });
        for (ours, theirs) in kernel[0].iter().zip(&kernel[1]) {
            ours.connect(theirs).unwrap();
        }
        let pods = [0, 1].map(|index| {
            let node = lab.node(index);
            let subnets: Vec<_> = list.iter().map(|family| node.subnet_of(*family)).collect();
            node.add_pod_in(&subnets, 2, 1430).unwrap()
        });
        Overlay { pods, kernel, lab }
    }

    /// Everything that the kit can send.
    fn exchange(&self, family: Family) {
        let [a, b] = &self.pods;
        assert_eq!(a.families(), self.lab.families().list());
        let to = b.address(family);
        let flood = FloodPing::start(&b.ns, a.address(family), Duration::from_millis(2)).unwrap();
        let flow = UdpFlow::start(&b.ns, to, &a.ns, Duration::from_millis(2), 100).unwrap();
        traffic::ping_once(&a.ns, to, SECOND).unwrap();
        traffic::udp_echo(&b.ns, to, &a.ns, &[0, 1, 1_382, 1_383, 9_000, 60_000]).unwrap();
        let sent = traffic::tcp_transfer(&b.ns, to, &a.ns, Amount::Bytes(20_000_000)).unwrap();
        assert_eq!(sent.bytes, 20_000_000);
        let server = TcpServer::listen(&b.ns, to, 8099).unwrap();
        let mut pair = TcpPair::connect(&a.ns, server.address, &[&server]).unwrap();
        pair.exchange(100_000).unwrap();
        assert_eq!(pair.seen.ip(), a.address(family));
        pair.close().unwrap();
        let ends = [(&a.ns, a), (&b.ns, b)];
        let [client, server] =
            ends.map(|(ns, pod)| UdpEnd::bind(ns, pod.address(family), 0).unwrap());
        let (by, seen) = client.ask(server.address, &[&server], 500).unwrap();
        assert_eq!((by, seen), (0, client.address));
        let report = traffic::iperf3(&b.ns, to, &a.ns, &["-t", "1"]).unwrap();
        let rate = report["end"]["sum_received"]["bits_per_second"].as_f64();
        assert!(rate.unwrap() > 1e6, "{report}");
        let stats = flow.stop().unwrap();
        assert!(stats.sent > 10 && stats.lost.is_empty(), "{stats:?}");
        let stats = flood.stop().unwrap();
        assert!(stats.sent > 10 && stats.lost == 0, "{stats:?}");
        self.tracks(family);
    }

    /// Connection tracking of a node shows a connection, and forgets it.
    fn tracks(&self, family: Family) {
        let [a, b] = &self.pods;
        let ns = &self.lab.node(0).ns;
        let table = match family {
            Family::V4 => "ip",
            Family::V6 => "ip6",
        };
        let rules = format!(
            "add table {table} look; add chain {table} look forwarded {{ type filter hook forward priority 0; }}; \
             add rule {table} look forwarded ct state invalid drop"
        );
        ns.exec(["nft", &rules]).unwrap();
        let server = TcpServer::listen(&b.ns, b.address(family), 0).unwrap();
        let mut pair = TcpPair::connect(&a.ns, server.address, &[&server]).unwrap();
        pair.exchange(10).unwrap();
        let known = || {
            let all = conntrack::list_of(ns, family).unwrap();
            all.iter()
                .any(|entry| entry.touches(pair.local) && entry.assured)
        };
        assert!(known());
        conntrack::delete(ns, "tcp", pair.local).unwrap();
        assert!(!known());
        pair.abandon().unwrap();
    }
}

#[test]
fn services_of_ipv6_work_in_both_flavours() {
    if !privileged() {
        return;
    }
    for flavour in Flavour::ALL {
        let overlay = Overlay::new(Families::Dual, Offloads::Default);
        let [a, b] = &overlay.pods;
        let backend = SocketAddr::new(b.address(Family::V6), 8080);
        let address: SocketAddr = "[fd00:10:96::10]:80".parse().unwrap();
        let service = Service::tcp("web", address, &[backend])
            .with_node_port(30_080, Policy::Cluster)
            .with_affinity();
        let host_port = HostPort {
            transport: Transport::Tcp,
            port: 8088,
            backend,
        };
        let rules = [0, 1].map(|index| {
            let node = overlay.lab.node(index);
            let network: Prefix = "fd00:10:244::/48".parse().unwrap();
            let ports = std::slice::from_ref(&host_port);
            Services::install(
                node,
                flavour,
                network,
                std::slice::from_ref(&service),
                ports,
            )
            .unwrap()
        });
        let server = TcpServer::listen(&b.ns, backend.ip(), 8080).unwrap();
        let node_port = SocketAddr::new(overlay.lab.node(1).address(Family::V6), 30_080);
        let mapped = SocketAddr::new(node_port.ip(), 8088);
        for target in [address, node_port, mapped] {
            let mut pair = TcpPair::connect(&a.ns, target, &[&server]).unwrap();
            pair.exchange(1_000).unwrap();
            pair.close().unwrap();
        }
        assert_eq!(rules[0].invalid_drops().unwrap(), 0, "{flavour:?}");
    }
}
