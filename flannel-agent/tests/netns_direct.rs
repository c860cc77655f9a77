//! `DirectRouting`: peers on the same link are routed to, others tunnelled, and what was is gone when that changes.

mod rig;

use std::time::Duration;

use flannel_common::counter::CounterId;
use flannel_testkit::{
    Capture, KernelNode, LabOptions, eventually, privileged,
    traffic::{self, FloodPing, TcpFlow},
};
use rig::{DEVICE, PATIENCE, Rig};

const NET_CONF: &str =
    r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan","DirectRouting":true}}"#;
/// What the stream sends, in bytes a second: less than overflows a queue on its way.
const RATE: u32 = 10_000_000;

fn is_routed(rig: &Rig, from: usize, to: usize) -> Result<(), String> {
    rig.is_routed(from, to)?;
    let left = leftovers(rig, from, to);
    left.is_empty()
        .then_some(())
        .ok_or_else(|| format!("of the tunnel there is {left:?}"))
}

fn is_tunnelled(rig: &Rig, from: usize, to: usize) -> Result<(), String> {
    let route = rig.route(from, to);
    let right = route["dev"] == DEVICE && route["flags"][0] == "onlink";
    let there = leftovers(rig, from, to);
    (right && there.len() == 2)
        .then_some(())
        .ok_or_else(|| format!("{route}, and of the tunnel {there:?}"))
}

/// What the tunnel device knows of a peer: its neighbour and its forwarding entry.
fn leftovers(rig: &Rig, from: usize, to: usize) -> Vec<String> {
    let ns = rig.ns(from);
    let base = rig.node(to).subnet.base();
    let neighbours = ns
        .ip(&format!("neigh show {base} dev {DEVICE} nud permanent"))
        .expect("list neighbours");
    let entries = ns
        .exec(["bridge", "fdb", "show", "dev", DEVICE])
        .expect("list forwarding entries");
    let peer = format!("dst {} ", rig.node(to).ip);
    let entries = entries.lines().filter(|line| line.contains(&peer));
    neighbours
        .lines()
        .chain(entries)
        .map(str::to_owned)
        .collect()
}

fn start(nodes: u8, flags: &[&str]) -> Rig {
    let options = LabOptions {
        nodes,
        ..LabOptions::default()
    };
    let mut rig = Rig::with(options, NET_CONF);
    for node in 0..usize::from(nodes) {
        rig.start_agent(node, flags);
    }
    for node in 0..usize::from(nodes) {
        rig.wait_ready(node);
        rig.add_pod(node);
    }
    for from in 0..usize::from(nodes) {
        for to in (0..usize::from(nodes)).filter(|to| *to != from) {
            eventually(PATIENCE, "every peer is routed to", || {
                is_routed(&rig, from, to)
            });
        }
    }
    rig.wait_carried();
    rig
}

fn fast(rig: &Rig, node: usize) -> [u64; 4] {
    [
        CounterId::FastRoutedOut,
        CounterId::FastRoutedIn,
        CounterId::FastEncap,
        CounterId::FastDecap,
    ]
    .map(|id| rig.packets(node, id))
}

#[test]
fn peers_on_the_link_are_routed_to_past_the_stack() {
    if !privileged() {
        return;
    }
    let rig = start(2, &[]);
    let (a, b) = (rig.pod(0), rig.pod(1));
    let wire = Capture::start(rig.ns(1), "eth0", "").expect("a capture");
    let tcp = TcpFlow::start_paced(&b.ns, b.ip, &a.ns, RATE).expect("a stream");
    let ping = FloodPing::start(&b.ns, a.ip, Duration::from_millis(5)).expect("pings");
    eventually(PATIENCE, "both ways are fast", || {
        let (here, there) = (fast(&rig, 0), fast(&rig, 1));
        let enough = [here[0], here[1], there[0], there[1]]
            .iter()
            .all(|packets| *packets > 200);
        enough
            .then_some(())
            .ok_or_else(|| format!("{here:?} {there:?}"))
    });
    let tcp = tcp.stop().expect("the stream");
    let ping = ping.stop().expect("the pings");
    assert_eq!((tcp.lost, ping.lost), (0, 0), "{tcp:?} {ping:?}");
    let wire = wire.stop().expect("the capture");
    assert!(wire.packets.len() > 200);
    assert_eq!(wire.vxlan().len(), 0, "nothing is wrapped");
    assert_eq!(fast(&rig, 0)[2..], [0, 0]);
}

#[test]
fn without_ebpf_the_routes_alone_do_it() {
    if !privileged() {
        return;
    }
    let rig = start(2, &["--datapath=kernel"]);
    let wire = Capture::start(rig.ns(1), "eth0", "").expect("a capture");
    rig.ping(0, 1).expect("a ping");
    let wire = wire.stop().expect("the capture");
    assert_eq!(wire.vxlan().len(), 0, "nothing is wrapped");
    assert!(!wire.packets.is_empty());
}

#[test]
fn a_peer_that_goes_behind_a_router_and_comes_back_loses_nothing() {
    if !privileged() {
        return;
    }
    for flags in [&[][..], &["--datapath=kernel"]] {
        let rig = start(3, flags);
        // What a host would tell another on the same link is not the matter here.
        for node in 0..3 {
            for (key, value) in [("send_redirects", "0"), ("accept_redirects", "0")] {
                for which in ["all", "eth0"] {
                    let key = format!("net/ipv4/conf/{which}/{key}");
                    rig.ns(node).set_sysctl(&key, value).expect("a sysctl");
                }
            }
        }
        let (a, b) = (rig.pod(0), rig.pod(1));
        let tcp = TcpFlow::start_paced(&b.ns, b.ip, &a.ns, RATE).expect("a stream");
        let back = TcpFlow::start_paced(&a.ns, a.ip, &b.ns, RATE).expect("a stream");
        std::thread::sleep(Duration::from_secs(1));
        let detour = format!("{} via {} dev eth0", rig.node(1).ip, rig.node(2).ip);
        for _ in 0..2 {
            rig.ns(0)
                .ip(&format!("route add {detour}"))
                .expect("a detour");
            eventually(PATIENCE, "it is tunnelled", || is_tunnelled(&rig, 0, 1));
            is_routed(&rig, 0, 2).expect("the other one is routed to");
            is_routed(&rig, 1, 0).expect("the peer sees no router");
            std::thread::sleep(Duration::from_secs(1));
            rig.ns(0)
                .ip(&format!("route del {detour}"))
                .expect("no detour");
            eventually(PATIENCE, "it is routed to", || is_routed(&rig, 0, 1));
            std::thread::sleep(Duration::from_millis(500));
        }
        for stats in [
            tcp.stop().expect("a stream"),
            back.stop().expect("a stream"),
        ] {
            assert_eq!(stats.lost, 0, "{stats:?}");
        }
        if flags.is_empty() {
            let [out, _, encap, _] = fast(&rig, 0);
            assert!(out > 200 && encap > 200, "{out} {encap}");
        }
    }
}

#[test]
fn routes_come_back_and_go_with_their_peers_and_others_stay() {
    if !privileged() {
        return;
    }
    let mut rig = start(3, &[]);
    let other = rig.node(2).subnet;
    // Somebody's own routes: inside the network and outside.
    for foreign in ["10.244.77.0/24", "172.30.0.0/16"] {
        let line = format!("route add {foreign} via {} dev eth0", rig.node(1).ip);
        rig.ns(0).ip(&line).expect("a route");
    }
    rig.ns(0)
        .ip(&format!("route del {other}"))
        .expect("delete a route");
    eventually(PATIENCE, "the route is back", || is_routed(&rig, 0, 2));
    let wrong = format!("route replace {other} via {} dev eth0", rig.node(1).ip);
    rig.ns(0).ip(&wrong).expect("replace a route");
    eventually(PATIENCE, "the route is right again", || {
        is_routed(&rig, 0, 2)
    });
    let log = rig.agent(0).log();
    assert!(log.contains("which was not ours"), "{log}");
    assert_eq!(rig.stop_agent(2), 0);
    rig.remove_lease(other);
    eventually(PATIENCE, "the route is gone", || {
        let there = rig.route(0, 2);
        there
            .is_null()
            .then_some(())
            .ok_or_else(|| there.to_string())
    });
    let all = rig.ns(0).ip("route show").expect("routes");
    for foreign in ["10.244.77.0/24 via", "172.30.0.0/16 via"] {
        assert!(all.contains(foreign), "{all}");
    }
    is_routed(&rig, 0, 1).expect("the other peer stays");
}

#[test]
fn upstreams_nodes_take_part() {
    if !privileged() {
        return;
    }
    let options = LabOptions {
        nodes: 2,
        ..LabOptions::default()
    };
    let mut rig = Rig::with(options, NET_CONF);
    let kernel = KernelNode::set_up(rig.node(1)).expect("a node of the kernel");
    let ours = rig.node(0).subnet;
    // As upstream with DirectRouting leaves it.
    let line = format!("route add {ours} via {}", rig.node(0).ip);
    rig.ns(1).ip(&line).expect("a route");
    let (_, lease) = kernel.lease();
    let mac = lease["BackendData"]["VtepMAC"]
        .as_str()
        .expect("a MAC")
        .to_owned();
    rig.put_lease(rig.node(1).subnet, rig.node(1).ip, &mac);
    rig.start_agent(0, &[]);
    rig.wait_ready(0);
    rig.add_pod(0);
    rig.add_pod_with_mtu(1, 1450);
    eventually(PATIENCE, "the peer is routed to", || is_routed(&rig, 0, 1));
    rig.wait_carried();
    let (a, b) = (rig.pod(0), rig.pod(1));
    let tcp = TcpFlow::start_paced(&b.ns, b.ip, &a.ns, RATE).expect("a stream");
    eventually(PATIENCE, "both ways are fast", || {
        let here = fast(&rig, 0);
        let enough = here[0] > 200 && here[1] > 50;
        enough.then_some(()).ok_or_else(|| format!("{here:?}"))
    });
    assert_eq!(tcp.stop().expect("the stream").lost, 0);
    // It may as well wrap what it sends: we take both.
    rig.ns(1)
        .ip(&format!("route del {ours}"))
        .expect("delete a route");
    let here = rig.lease(0);
    let mac: Vec<u8> = here
        .mac
        .split(':')
        .map(|octet| u8::from_str_radix(octet, 16).expect("hex"))
        .collect();
    kernel
        .add_peer(ours, mac.try_into().expect("six octets"), rig.node(0).ip)
        .expect("a peer");
    traffic::ping_once(&b.ns, a.ip, Duration::from_secs(1)).expect("a ping");
}
