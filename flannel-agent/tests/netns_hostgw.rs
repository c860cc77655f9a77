//! The backend host-gw: routes alone, the pods' own packets on the wire, past the stack where that is proven right.

mod rig;

use std::time::Duration;

use flannel_common::counter::CounterId;
use flannel_testkit::{
    Capture, Family, LabOptions, eventually, privileged,
    services::iptables_program,
    traffic::{FloodPing, TcpFlow},
};
use rig::{PATIENCE, Rig, agent_binary, net_conf};
use serde_json::{Value, json};

/// Strict reverse path filtering of IPv6, which has no setting for it.
const STRICT: &str = "-t raw -A PREROUTING -i eth0 -m rpfilter --invert -j DROP";
/// What the stream sends, in bytes a second: less than overflows a queue on its way.
const RATE: u32 = 10_000_000;

fn lab_of(family: Family, nodes: u8) -> Rig {
    let options = LabOptions {
        nodes,
        families: family.into(),
        ..LabOptions::default()
    };
    let conf = net_conf(family.into()).replace("vxlan", "host-gw");
    Rig::with(options, &conf)
}

fn lab(nodes: u8) -> Rig {
    lab_of(Family::V4, nodes)
}

fn start(rig: &mut Rig, flags: &[&str]) {
    let all = 0..rig.lab().nodes().len();
    for node in all.clone() {
        rig.start_agent(node, flags);
    }
    for node in all {
        rig.wait_ready(node);
        rig.add_pod(node);
    }
    rig.wait_routed();
    rig.wait_carried();
}

/// Packets whose answers would leave by another interface are dropped.
fn filter_reverse_paths(rig: &Rig, family: Family) {
    for ns in rig.lab().nodes().iter().map(|node| &node.ns) {
        match family {
            Family::V4 => {
                for interface in ["all", "default", "eth0"] {
                    let key = format!("net/ipv4/conf/{interface}/rp_filter");
                    ns.set_sysctl(&key, "1").expect("a strict filter");
                }
            }
            Family::V6 => {
                let program = iptables_program(family);
                ns.exec([program].into_iter().chain(STRICT.split(' ')))
                    .expect("a strict filter");
            }
        }
    }
}

fn carry(flags: &[&str], fast: bool) {
    carry_in(&mut lab(2), flags, fast);
}

fn carry_in(rig: &mut Rig, flags: &[&str], fast: bool) {
    start(rig, flags);
    let family = rig.family();
    for node in 0..2 {
        let links = rig
            .ns(node)
            .ip("-o link show type vxlan")
            .expect("list links");
        assert_eq!(links, "", "there is no tunnel");
        assert_eq!(rig.subnet_env(node, "FLANNEL_MTU"), "1500");
    }
    let (a, b) = (rig.pod(0), rig.pod(1));
    let wire = Capture::start(rig.ns(1), "eth0", "udp port 8472").expect("a capture");
    let tcp = TcpFlow::start_paced(&b.ns, b.address(family), &a.ns, RATE).expect("a stream");
    let ping = FloodPing::start(&b.ns, a.address(family), Duration::from_millis(5)).expect("pings");
    if fast {
        eventually(PATIENCE, "both ways are fast on both nodes", || {
            let counts = [0, 1].map(|node| {
                [CounterId::FastRoutedOut, CounterId::FastRoutedIn].map(|id| rig.packets(node, id))
            });
            let enough = counts.iter().flatten().all(|packets| *packets > 200);
            enough.then_some(()).ok_or_else(|| format!("{counts:?}"))
        });
    } else {
        std::thread::sleep(Duration::from_secs(2));
    }
    let (tcp, ping) = (
        tcp.stop().expect("the stream"),
        ping.stop().expect("the pings"),
    );
    assert_eq!((tcp.lost, ping.lost), (0, 0), "{tcp:?} {ping:?}");
    assert!(tcp.bytes > 1 << 20, "{tcp:?}");
    let wire = wire.stop().expect("the capture");
    assert_eq!(wire.packets.len(), 0, "nothing is wrapped");
}

#[test]
fn pods_talk_past_the_stack_without_a_tunnel() {
    if !privileged() {
        return;
    }
    carry(&[], true);
    carry(&["--datapath=bpf"], true);
}

#[test]
fn the_kernels_routes_alone_do_it() {
    if !privileged() {
        return;
    }
    carry(&["--datapath=kernel"], false);
    carry(&["--bpf-fast-path=off"], false);
}

#[test]
fn strict_reverse_path_filters_let_routed_peers_pass() {
    if !privileged() {
        return;
    }
    for (family, flags, fast) in [
        (Family::V4, &[][..], true),
        (Family::V6, &[], true),
        (Family::V4, &["--bpf-fast-path=off"], false),
    ] {
        let mut rig = lab_of(family, 2);
        filter_reverse_paths(&rig, family);
        carry_in(&mut rig, flags, fast);
    }
}

#[test]
fn leases_are_upstreams() {
    if !privileged() {
        return;
    }
    let mut rig = lab(1);
    start(&mut rig, &[]);
    let file = rig.lease_file(rig.node(0).subnet);
    let text = std::fs::read_to_string(file).expect("the lease");
    let lease: Value = serde_json::from_str(&text).expect("JSON");
    let address = rig.node(0).ip.to_string();
    assert_eq!(
        (&lease["PublicIP"], &lease["BackendType"]),
        (&json!(address), &json!("host-gw"))
    );
    assert!(
        lease.get("BackendData").is_none_or(Value::is_null),
        "{lease}"
    );
}

#[test]
fn a_peer_behind_a_router_is_told_and_not_routed_to() {
    if !privileged() {
        return;
    }
    let mut rig = lab(2);
    let other = rig.node(1);
    let detour = format!("route add {} via 192.168.77.1 dev eth0", other.ip);
    let (subnet, address) = (other.subnet, other.ip);
    rig.ns(0).ip(&detour).expect("a detour");
    for node in 0..2 {
        rig.start_agent(node, &[]);
        rig.wait_ready(node);
    }
    eventually(PATIENCE, "it is told", || {
        let problems = rig.status(0)["problems"].to_string();
        let wanted =
            format!("peer {address} with {subnet} cannot be routed to: a router is between");
        problems.contains(&wanted).then_some(()).ok_or(problems)
    });
    assert!(rig.route(0, 1).is_null());
    rig.ns(0)
        .ip(&detour.replace("add", "del"))
        .expect("no detour");
    eventually(PATIENCE, "it is routed to", || rig.is_routed(0, 1));
}

#[test]
fn a_node_behind_nat_is_refused_in_upstreams_words() {
    if !privileged() {
        return;
    }
    let mut rig = lab(1);
    rig.start_binary(
        0,
        agent_binary(),
        &["--public-ip=198.51.100.7", "--iface=eth0"],
        &[],
    );
    let agent = rig.agent(0);
    agent.wait(PATIENCE).expect("it ends");
    let log = agent.log();
    assert!(
        log.contains("your PublicIP differs from interface IP, meaning that probably you're on a NAT, which is not supported by host-gw backend"),
        "{log}"
    );
}
