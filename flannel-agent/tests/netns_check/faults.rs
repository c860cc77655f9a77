//! One thing of the overlay broken at a time.

use std::{fs, net::Ipv4Addr};

use flannel_testkit::{Subnet, eventually, privileged};

use crate::{
    assert_fails, assert_healthy, assert_warns, check, check_with,
    rig::{DEVICE, PATIENCE, Rig},
};

/// Two nodes that were up, and whose first agent is down: what is broken then stays so.
fn stopped() -> Rig {
    let mut rig = Rig::start(2, &[]);
    assert_eq!(rig.stop_agent(0), 0);
    rig
}

fn subnet(text: &str) -> Subnet {
    text.parse().expect("a subnet")
}

#[test]
fn a_narrow_underlay_is_measured() {
    if !privileged() {
        return;
    }
    for datapath in ["--datapath=kernel", "--datapath=bpf"] {
        let rig = Rig::start(3, &[datapath]);
        // In the middle, where neither node can see it: the switch drops what is larger, but for the room of a VLAN tag.
        let port = rig.node(2).port.clone();
        let underlay = rig.lab().underlay();
        underlay.ip(&format!("link set {port} mtu 1300")).unwrap();
        let answer = check(&rig, 0);
        let narrow = format!("{} 1254", rig.node(2).ip);
        assert_fails(&answer, "path-mtu", &narrow, "\"MTU\":1304");
        assert!(answer.0["path-mtu"].1.contains("1 of 2 peers"));
    }
}

#[test]
fn of_many_dead_peers_a_few_are_named_and_all_are_counted() {
    if !privileged() {
        return;
    }
    let rig = Rig::start(2, &[]);
    for host in 100..200_u8 {
        let mac = format!("02:00:00:00:01:{host:02x}");
        let ip = Ipv4Addr::new(192, 168, 77, host);
        rig.put_lease(subnet(&format!("10.244.{host}.0/24")), ip, &mac);
    }
    eventually(PATIENCE, "the kernel has all peers", || {
        rig.converged_kernel(0)
    });
    let (findings, code) = check(&rig, 0);
    assert_eq!(code, 1);
    let (status, found, _) = &findings["underlay"];
    assert_eq!(status, "FAIL", "{findings:#?}");
    assert!(
        found.starts_with("100 of 101 peers do not answer: 192.168.77.100, "),
        "{found}"
    );
    assert!(found.ends_with("and 95 more"), "{found}");
    assert!(findings["overlay"].1.starts_with("1 of 1"), "{findings:#?}");
    // There is no time for anything, and that is said.
    rig.ns(1).ip("link set eth0 down").unwrap();
    let (findings, _) = check_with(&rig, 0, &["--timeout=1"]);
    assert!(
        findings["underlay"].1.contains("no time for "),
        "{findings:#?}"
    );
}

#[test]
fn a_dead_peer_is_named_and_the_others_are_still_judged() {
    if !privileged() {
        return;
    }
    let rig = Rig::start(3, &[]);
    rig.ns(2).ip("link set eth0 down").unwrap();
    let answer = check(&rig, 0);
    let dead = rig.node(2).ip.to_string();
    assert_fails(&answer, "underlay", &dead, "delete its lease");
    assert!(
        answer.0["underlay"]
            .1
            .starts_with("1 of 2 peers do not answer")
    );
    assert!(answer.0["overlay"].1.starts_with("1 of 1 reachable"));
}

#[test]
fn a_peer_that_is_reached_only_at_the_underlay_is_named() {
    if !privileged() {
        return;
    }
    let rig = Rig::start(2, &["--datapath=kernel"]);
    // A firewall between the nodes.
    rig.ns(1)
        .exec([
            "iptables", "-A", "INPUT", "-p", "udp", "--dport", "8472", "-j", "DROP",
        ])
        .unwrap();
    let peer = rig.node(1).ip.to_string();
    assert_fails(&check(&rig, 0), "overlay", &peer, "UDP port 8472");
}

#[test]
fn forwarding_that_is_off_is_found() {
    if !privileged() {
        return;
    }
    let rig = Rig::start(2, &[]);
    rig.ns(0).set_sysctl("net/ipv4/ip_forward", "0").unwrap();
    assert_fails(
        &check(&rig, 0),
        "ip-forward",
        "ip_forward = 0",
        "ip_forward=1",
    );
}

#[test]
fn reverse_path_filters_matter_only_where_the_way_back_is_another() {
    if !privileged() {
        return;
    }
    let rig = Rig::start(2, &[]);
    for interface in ["all", "eth0", DEVICE] {
        let key = format!("net/ipv4/conf/{interface}/rp_filter");
        rig.ns(0).set_sysctl(&key, "1").unwrap();
    }
    assert_healthy(&check(&rig, 0), &[]);
    // The way to the peer's address leads elsewhere than where it comes from.
    let peer = rig.node(1).ip;
    rig.ns(0)
        .ip("link add other type veth peer name rehto")
        .unwrap();
    rig.ns(0).ip("addr add 192.0.2.1/24 dev other").unwrap();
    rig.ns(0).ip("link set other up").unwrap();
    rig.ns(0).ip("link set rehto up").unwrap();
    rig.ns(0)
        .ip(&format!("route add {peer}/32 dev other"))
        .unwrap();
    let (findings, _) = check_with(&rig, 0, &["--no-peers"]);
    let (status, found, fix) = &findings["rp-filter"];
    assert_eq!(status, "WARN", "{findings:#?}");
    assert!(found.contains(&format!("{peer} by other")), "{found}");
    assert!(fix.contains("net.ipv4.conf.eth0.rp_filter=2"), "{fix}");
}

#[test]
fn entries_of_peers_that_are_missing_or_left_over_are_found() {
    if !privileged() {
        return;
    }
    let rig = stopped();
    let peer = subnet("10.244.2.0/24");
    rig.ns(0).ip(&format!("route del {peer}")).unwrap();
    let answer = check_with(&rig, 0, &["--no-peers"]);
    assert_fails(
        &answer,
        "peer-entries",
        "set route 10.244.2.0/24",
        "start the agent",
    );
    rig.ns(0)
        .ip(&format!(
            "route add {peer} via 10.244.2.0 dev {DEVICE} onlink"
        ))
        .unwrap();
    assert_healthy(&check_with(&rig, 0, &["--no-peers"]), &["agent"]);

    let mac = rig.lease(1).mac;
    let forget = ["bridge", "fdb", "del", &mac, "dev", DEVICE];
    rig.ns(0).exec(forget).unwrap();
    let answer = check_with(&rig, 0, &["--no-peers"]);
    assert_fails(
        &answer,
        "peer-entries",
        &format!("set forwarding entry {mac}"),
        "start the agent",
    );
    let ip = rig.node(1).ip.to_string();
    let put = [
        "bridge",
        "fdb",
        "add",
        &mac,
        "dev",
        DEVICE,
        "dst",
        &ip,
        "self",
        "permanent",
    ];
    rig.ns(0).exec(put).unwrap();

    // A node that has left while the agent was down.
    rig.ns(0)
        .ip(&format!(
            "route add 10.244.99.0/24 via 10.244.99.0 dev {DEVICE} onlink"
        ))
        .unwrap();
    let answer = check_with(&rig, 0, &["--no-peers"]);
    assert_warns(
        &answer,
        "peer-entries",
        "delete route 10.244.99.0/24",
        "start the agent",
        &["agent"],
    );
}

#[test]
fn a_device_that_is_down_gone_or_of_another_kind_is_found() {
    if !privileged() {
        return;
    }
    let rig = stopped();
    rig.ns(0).ip(&format!("link set {DEVICE} down")).unwrap();
    let answer = check_with(&rig, 0, &["--no-peers"]);
    assert_fails(&answer, "device", "is down", "start the agent");
    rig.ns(0).ip(&format!("link del {DEVICE}")).unwrap();
    let answer = check_with(&rig, 0, &["--no-peers"]);
    assert_fails(&answer, "device", "does not exist", "start the agent");
    // Left by a flannel with other attributes.
    let local = rig.node(0).ip;
    rig.ns(0)
        .ip(&format!(
            "link add {DEVICE} type vxlan id 1 dstport 4789 dev eth0 local {local} nolearning"
        ))
        .unwrap();
    rig.ns(0)
        .ip(&format!("link set {DEVICE} mtu 1450 up"))
        .unwrap();
    let mac = rig.lease(0).mac;
    rig.ns(0)
        .ip(&format!("link set {DEVICE} address {mac}"))
        .unwrap();
    let answer = check_with(&rig, 0, &["--no-peers"]);
    assert_fails(
        &answer,
        "device",
        "port is 4789, not 8472",
        "start the agent",
    );
}

#[test]
fn a_mac_address_that_udev_has_changed_is_found() {
    if !privileged() {
        return;
    }
    let rig = stopped();
    let published = rig.lease(0).mac;
    let mut neighbours =
        crate::json::ip_json(rig.ns(0), &["neigh", "show", "dev", DEVICE]).unwrap();
    rig.ns(0)
        .ip(&format!("link set {DEVICE} address 02:00:00:00:00:77"))
        .unwrap();
    // The kernel has dropped the neighbours with it.
    for one in neighbours.as_array_mut().into_iter().flatten() {
        let (ip, mac) = (&one["dst"], &one["lladdr"]);
        rig.ns(0)
            .ip(&format!(
                "neigh replace {} lladdr {} nud permanent dev {DEVICE}",
                ip.as_str().unwrap(),
                mac.as_str().unwrap()
            ))
            .unwrap();
    }
    let answer = check_with(&rig, 0, &["--no-peers"]);
    assert_fails(&answer, "lease", &published, "MACAddressPolicy=none");
}

#[test]
fn an_address_of_dhcpcd_is_found() {
    if !privileged() {
        return;
    }
    let rig = Rig::start(2, &[]);
    rig.ns(0)
        .ip(&format!("addr add 169.254.7.7/16 dev {DEVICE}"))
        .unwrap();
    assert_warns(
        &check(&rig, 0),
        "device",
        "169.254.7.7/16",
        "denyinterfaces",
        &[],
    );
}

#[test]
fn a_bridge_of_an_earlier_subnet_is_found() {
    if !privileged() {
        return;
    }
    let rig = Rig::start(2, &[]);
    rig.ns(0).ip("addr flush dev cni0").unwrap();
    rig.ns(0).ip("addr add 10.244.55.1/24 dev cni0").unwrap();
    let answer = check(&rig, 0);
    assert_fails(&answer, "bridge", "10.244.55.1/24", "ip link del cni0");
}

#[test]
fn mtus_that_do_not_fit_are_found() {
    if !privileged() {
        return;
    }
    let rig = stopped();
    rig.ns(0)
        .ip(&format!("link set {DEVICE} mtu 1400"))
        .unwrap();
    let answer = check_with(&rig, 0, &["--no-peers"]);
    assert_fails(&answer, "mtu", "flannel.1 has 1400", "restart the agent");
    rig.ns(0)
        .ip(&format!("link set {DEVICE} mtu 1450"))
        .unwrap();
    let pod = &rig.pod(0).host_if;
    rig.ns(0).ip(&format!("link set {pod} mtu 1500")).unwrap();
    let answer = check_with(&rig, 0, &["--no-peers"]);
    assert_warns(
        &answer,
        "mtu",
        &format!("{pod} 1500"),
        "restart the pods",
        &["agent"],
    );
}

#[test]
fn a_wrong_subnet_file_is_found() {
    if !privileged() {
        return;
    }
    let rig = stopped();
    let file = rig.subnet_file(0);
    let right = fs::read_to_string(&file).unwrap();
    for (wrong, name, found) in [
        (
            right.replace("10.244.1.1/24", "10.244.77.1/24"),
            "lease",
            "10.244.77.0/24",
        ),
        (
            right.replace("10.244.0.0/16", "10.99.0.0/16"),
            "subnet-file",
            "10.99.0.0/16",
        ),
        (right.replace("MTU=1450", "MTU=1500"), "mtu", "1500"),
        (
            String::from("nonsense\n"),
            "subnet-file",
            "lacks FLANNEL_NETWORK",
        ),
    ] {
        fs::write(&file, wrong).unwrap();
        let mut answer = check_with(&rig, 0, &["--no-peers"]);
        if name == "lease" {
            // The bridge is judged by the same file.
            let (status, ..) = answer.0.remove("bridge").unwrap();
            assert_eq!(status, "FAIL");
        }
        assert_fails(&answer, name, found, "restart the agent");
    }
    fs::remove_file(&file).unwrap();
    let answer = check_with(&rig, 0, &["--no-peers"]);
    assert_fails(
        &answer,
        "subnet-file",
        "does not exist",
        "restart the agent",
    );
}

#[test]
fn several_ways_out_are_named() {
    if !privileged() {
        return;
    }
    let rig = Rig::new(1);
    let dir = format!("--lease-dir={}", rig.lease_dir().display());
    rig.ns(0)
        .ip("link add other type veth peer name rehto")
        .unwrap();
    rig.ns(0).ip("link set other up").unwrap();
    rig.ns(0).ip("link set rehto up").unwrap();
    rig.ns(0).ip("addr add 192.0.2.7/24 dev other").unwrap();
    rig.ns(0)
        .ip("route add default via 192.0.2.1 dev other metric 500")
        .unwrap();
    let answer = check_with(&rig, 0, &[&dir]);
    assert_warns(&answer, "uplink", "other metric 500", "--iface=eth0", &[]);
    assert_healthy(&check_with(&rig, 0, &[&dir, "--iface=eth0"]), &[]);
    // Another interface on the same LAN.
    rig.ns(0).ip("addr flush dev other").unwrap();
    rig.ns(0)
        .ip("addr add 192.168.77.200/24 dev other")
        .unwrap();
    let answer = check_with(&rig, 0, &[&dir]);
    assert_warns(
        &answer,
        "uplink",
        "also on its LAN: other",
        "--iface=eth0",
        &[],
    );
    // None at all.
    rig.ns(0).ip("route flush default").unwrap();
    rig.ns(0).ip("link del other").unwrap();
    rig.ns(0).ip("addr flush dev eth0").unwrap();
    let answer = check_with(&rig, 0, &[&dir]);
    assert_fails(&answer, "uplink", "", "--iface=");
}

#[test]
fn a_program_that_was_detached_is_missed() {
    if !privileged() {
        return;
    }
    let rig = stopped();
    fs::remove_file(rig.instance(0).join(flannel_core::mark::PIN_FROM_WIRE)).unwrap();
    let answer = check_with(&rig, 0, &["--no-peers"]);
    assert_warns(
        &answer,
        "datapath",
        "from_wire",
        "start the agent",
        &["agent"],
    );
}

#[test]
fn two_leases_with_one_address_are_a_conflict() {
    if !privileged() {
        return;
    }
    let rig = stopped();
    let own: Ipv4Addr = rig.node(0).ip;
    rig.put_lease(subnet("10.244.50.0/24"), own, "02:00:00:00:00:50");
    let (findings, code) = check_with(&rig, 0, &["--no-peers"]);
    assert_eq!(code, 1);
    let (status, found, fix) = &findings["lease"];
    assert_eq!(status, "FAIL", "{findings:#?}");
    assert!(
        found.contains("10-244-50-0") || found.contains("10.244.50.0"),
        "{found}"
    );
    assert!(fix.contains("--public-ip"), "{fix}");
}
