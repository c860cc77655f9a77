//! Which interface the overlay runs over, where that is not plain: two NICs, no default route, expressions, ways to an address, and
//! public addresses that the node does not have.

mod rig;

use std::fs;

use flannel_testkit::{LabOptions, eventually, json::ip_json, privileged, process, put_program};
use rig::{DEVICE, NET_CONF, PATIENCE, Rig, agent_binary, text};

/// Nodes with a second NIC, `eth1`, in 192.168.78.0/24.
fn two_nics(nodes: u8) -> Rig {
    let options = LabOptions {
        nodes,
        second_uplink: true,
        ..LabOptions::default()
    };
    Rig::with(options, NET_CONF)
}

/// What `ip` says the tunnel's outer packets are sent from and over.
#[track_caller]
fn tunnel(rig: &Rig, node: usize) -> (String, String) {
    let details = ip_json(rig.ns(node), &["-d", "link", "show", "dev", DEVICE]).expect("ip");
    let data = &details[0]["linkinfo"]["info_data"];
    (
        text(data, "link").expect("a lower device"),
        text(data, "local").expect("a local address"),
    )
}

/// Starts the agent of the node, and waits until it is ready or has ended.
#[track_caller]
fn start(rig: &mut Rig, node: usize, flags: &[&str]) {
    rig.start_agent(node, flags);
    rig.wait_ready(node);
}

/// Runs the agent of a node that must refuse to start, and gives its error line.
#[track_caller]
fn refused(rig: &Rig, flags: &[&str]) -> String {
    let mut command = rig.ns(0).command(agent_binary());
    command.args(rig.common_flags(0)).args(flags);
    let done = process::finish(&mut command, PATIENCE).expect("it ends");
    assert_eq!(done.status.code(), Some(2), "{}", done.stderr);
    let errors: Vec<&str> = done
        .stderr
        .lines()
        .filter(|line| line.contains(" ERROR "))
        .collect();
    let [error] = errors[..] else {
        panic!("{}", done.stderr);
    };
    error.to_owned()
}

#[test]
fn flags_choose_among_two_nics() {
    if !privileged() {
        return;
    }
    let mut rig = two_nics(1);
    let eth0 = ("eth0".to_owned(), rig.node(0).ip.to_string());
    let second = rig.node(0).second_ip.expect("an eth1").to_string();
    let eth1 = ("eth1".to_owned(), second.clone());
    for (flags, chosen) in [
        (&[][..], &eth0),
        (&["-iface=eth1"], &eth1),
        (&["--iface", &second], &eth1),
        (&["-iface=ens3", "-iface=eth1"], &eth1),
        (&["--iface-regex=^192\\.168\\.78\\."], &eth1),
        (&["--iface-regex", "th1$"], &eth1),
        (&["-iface=ens3", "-iface-regex=^eth1$"], &eth1),
        (&["--iface-can-reach=192.168.78.1"], &eth1),
        (&["--iface-can-reach=8.8.8.8"], &eth0),
        (
            &["-iface-regex=^ens", "-iface-can-reach=192.168.78.1"],
            &eth1,
        ),
        (&["--public-ip", &second], &eth1),
    ] {
        start(&mut rig, 0, flags);
        assert_eq!(tunnel(&rig, 0), *chosen, "{flags:?}");
        assert_eq!(rig.lease(0).public_ip, chosen.1, "{flags:?}");
        let log = rig.agent(0).log();
        let line = format!(
            "Using interface with name {} and address {}",
            chosen.0, chosen.1
        );
        assert!(log.contains(&line), "{flags:?}: {log}");
        assert_eq!(
            log.contains("Could not find valid interface matching"),
            flags.iter().any(|flag| flag.contains("ens")),
            "{log}"
        );
        assert_eq!(rig.stop_agent(0), 0);
        // To the next one this node is another node: with its own lease it would be an address that changed.
        fs::remove_file(rig.lease_file(rig.node(0).subnet)).expect("remove the lease");
    }
    // The kernel's own choice among default routes is by their metric.
    rig.ns(0).ip("route del default").expect("ip");
    rig.ns(0)
        .ip("route add default via 192.168.77.1 metric 200")
        .expect("ip");
    rig.ns(0)
        .ip("route add default via 192.168.78.1 metric 100")
        .expect("ip");
    start(&mut rig, 0, &[]);
    assert_eq!(tunnel(&rig, 0), eth1);
    assert_eq!(rig.stop_agent(0), 0);
    rig.ns(0).ip("route del default metric 100").expect("ip");
    rig.ns(0).ip("route del default metric 200").expect("ip");
    rig.ns(0)
        .ip("route add default nexthop via 192.168.77.1 nexthop via 192.168.78.1")
        .expect("ip");
    let error = refused(&rig, &[]);
    assert!(
        error.contains("found default route but could not determine interface")
            && error.contains(&format!("eth0:[{}", eth0.1))
            && error.contains(&format!("eth1:[{}", eth1.1)),
        "{error}"
    );
}

#[test]
fn without_a_default_route_the_only_nic_is_taken() {
    if !privileged() {
        return;
    }
    let mut rig = two_nics(2);
    for node in 0..2 {
        rig.ns(node).ip("route del default").expect("ip");
    }
    let error = refused(&rig, &[]);
    assert!(
        error.contains("Failed to find any valid interface to use: failed to get default interface: unable to find default route")
            && error.contains("--iface")
            && error.contains("eth0:[192.168.77.")
            && error.contains("eth1:[192.168.78."),
        "{error}"
    );
    let unreachable = refused(&rig, &["--iface-can-reach=8.8.8.8"]);
    assert!(unreachable.contains("no route to 8.8.8.8"), "{unreachable}");
    for node in 0..2 {
        rig.ns(node).ip("link del eth1").expect("ip");
    }
    rig.start_all(&[]);
    let log = rig.agent(0).log();
    let warning = log
        .lines()
        .find(|line| line.contains(" WARN ") && line.contains("default route"));
    assert!(
        warning.is_some_and(|line| line.contains("using eth0:[192.168.77.")),
        "{log}"
    );
    rig.ping(0, 1).expect("the pods reach each other");
    // A second start finds the overlay's own addresses and bridge beside it.
    assert_eq!(rig.stop_agent(0), 0);
    start(&mut rig, 0, &[]);
    assert_eq!(tunnel(&rig, 0).0, "eth0");
    rig.ping(0, 1).expect("the pods reach each other");
}

#[test]
fn two_nics_on_one_lan_are_told() {
    if !privileged() {
        return;
    }
    let mut rig = two_nics(1);
    rig.ns(0)
        .ip("addr add 192.168.77.200/24 dev eth1")
        .expect("ip");
    start(&mut rig, 0, &[]);
    let log = rig.agent(0).log();
    let warning = log
        .lines()
        .find(|line| line.contains("several interfaces are in 192.168.77.0/24"));
    let warning = warning.unwrap_or_else(|| panic!("{log}"));
    for needle in [
        " WARN ",
        "using eth0 (192.168.77.",
        "default route",
        "192.168.77.200",
        "--iface",
    ] {
        assert!(warning.contains(needle), "{needle}: {warning}");
    }
}

#[test]
fn a_start_is_told_in_upstreams_lines() {
    if !privileged() {
        return;
    }
    let mut rig = Rig::new(1);
    start(&mut rig, 0, &[]);
    let file = rig.subnet_file(0).display().to_string();
    let ip = rig.node(0).ip;
    rig.agent(0).sigterm().expect("send SIGTERM");
    assert_eq!(rig.agent(0).wait(PATIENCE).expect("it ends"), 0);
    let log = rig.agent(0).log();
    let mut rest = log.as_str();
    for line in [
        "CLI flags config: {etcdEndpoints:",
        "Determining IP address of default interface",
        &format!("Using interface with name eth0 and address {ip}"),
        &format!("Defaulting external address to interface address ({ip})"),
        "Found network config - Backend type: vxlan",
        "VXLAN config: VNI=1 Port=0 GBP=false Learning=false DirectRouting=false",
        "Lease acquired: 10.244.1.0/24",
        &format!("Wrote subnet file to {file}"),
        "flannel is ready",
        "Exiting cleanly...",
    ] {
        let found = rest.split_once(line);
        let (before, after) = found.unwrap_or_else(|| panic!("no {line:?} in its place: {log}"));
        assert!(before.ends_with(" INFO "), "{line}: {log}");
        rest = after;
    }
}

#[test]
fn a_public_address_that_is_translated_on_the_way() {
    if !privileged() {
        return;
    }
    for flags in [&[][..], &["--datapath=kernel"]] {
        let mut rig = Rig::new(2);
        // The switch translates: node 1 knows node 0 by an address that only the switch has.
        let public = "192.168.99.10";
        let inside = rig.node(0).ip.to_string();
        let rules = format!(
            "table ip nat {{\n chain pre {{ type nat hook prerouting priority -100; ip daddr {public} dnat to {inside}; }}\n \
             chain post {{ type nat hook postrouting priority 100; ip saddr {inside} udp dport 8472 snat to {public}; }}\n}}\n"
        );
        let file = rig.node(0).run_dir.join("nat.nft");
        fs::write(&file, rules).expect("write the rules");
        rig.lab()
            .underlay()
            .exec(["nft", "-f", &file.display().to_string()])
            .expect("nft");
        // Through the switch's routing, not its bridge: the nodes are on different networks.
        let other = rig.node(1).ip.to_string();
        for (node, peer) in [(0, &other), (1, &inside)] {
            rig.ns(node)
                .ip(&format!("route add {peer}/32 via 192.168.77.1"))
                .expect("ip");
        }
        let refused = refused(&rig, &["--public-ip", public]);
        assert!(
            refused.contains(&format!(
                "error looking up interface {public}: no interface with given IP found"
            )) && refused.contains("set --iface too")
                && refused.contains("eth0:["),
            "{refused}"
        );
        let nat: Vec<&str> = [&["-iface=eth0", "-public-ip", public], flags].concat();
        rig.start_agent(0, &nat);
        rig.start_agent(1, flags);
        for node in 0..2 {
            rig.wait_ready(node);
            rig.add_pod(node);
        }
        assert_eq!(rig.lease(0).public_ip, public);
        assert_eq!(tunnel(&rig, 0), ("eth0".to_owned(), inside.clone()));
        let log = rig.agent(0).log();
        assert!(
            log.contains(&format!("Using {public} as external address")),
            "{log}"
        );
        eventually(PATIENCE, "the pods reach each other", || {
            rig.ping(0, 1)
                .and_then(|_| rig.ping(1, 0))
                .map_err(|error| format!("{error:#}"))
        });
    }
}

#[test]
fn a_missing_br_netfilter_is_loaded_or_told() {
    if !privileged() {
        return;
    }
    let mut rig = Rig::new(1);
    let dir = rig.node(0).run_dir.join("bin");
    fs::create_dir(&dir).expect("a directory");
    let asked = dir.join("asked");
    let script = |name: &str, text: String| {
        let path = dir.join(name);
        put_program(&path, format!("#!/bin/sh\n{text}\n"));
        path
    };
    // A machine without the module: nothing is where the settings are, in a mount namespace that goes with the agent.
    let agent = script(
        "agent",
        format!(
            "exec unshare --mount sh -c 'mount -t tmpfs none /proc/sys/net/bridge && PATH={}:$PATH exec \"$0\" \"$@\"' {} \"$@\"",
            dir.display(),
            agent_binary().display()
        ),
    );
    for (modprobe, level, needle) in [
        (
            "echo no such module >&2; exit 1",
            " WARN ",
            "no such module",
        ),
        ("exec sleep 1000", " WARN ", "more than 5s"),
        (
            "touch /proc/sys/net/bridge/bridge-nf-call-iptables",
            " INFO ",
            "loaded the kernel module br_netfilter",
        ),
    ] {
        let recorded = format!("echo \"$@\" >>{}\n{modprobe}", asked.display());
        script("modprobe", recorded);
        rig.start_binary(0, &agent, &[], &[]);
        rig.wait_ready(0);
        assert_eq!(
            fs::read_to_string(&asked).expect("modprobe was run"),
            "br_netfilter\n"
        );
        fs::remove_file(&asked).expect("forget it");
        let log = rig.agent(0).log();
        let lines: Vec<&str> = log
            .lines()
            .filter(|line| line.contains("br_netfilter"))
            .collect();
        assert!(
            matches!(lines[..], [line] if line.contains(level) && line.contains(needle)),
            "{modprobe}: {log}"
        );
        assert_eq!(rig.stop_agent(0), 0);
    }
    // Nothing of this with nftables.
    let conf = NET_CONF.replace("\"Backend\"", "\"EnableNFTables\":true,\"Backend\"");
    fs::write(rig.lease_dir().join("config"), conf).expect("write the configuration");
    rig.start_binary(0, &agent, &[], &[]);
    rig.wait_ready(0);
    assert!(!asked.exists(), "modprobe was run");
}
