//! Leases in etcd, end to end: the keys and values of upstream, races, revoked leases, nonsense keys, reboots.

mod etcd_rig;
mod rig;

use std::{collections::BTreeSet, fs, time::Duration};

use etcd_rig::{EtcdRig, NET_CONF, PREFIX, hold, lossless, value};
use flannel_testkit::{Subnet, eventually, json, privileged};
use rig::{DEVICE, PATIENCE};

/// What upstream v0.28.9 wrote: `etcdctl get --prefix ""` of a node with public address 192.168.77.12.
const UPSTREAM_KEY: &str = "/coreos.com/network/subnets/10.5.3.0-24";
const UPSTREAM_VALUE: &str = r#"{"PublicIP":"192.168.77.12","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"1a:cf:f4:7b:c6:ea"}}"#;
const UPSTREAM_MAC: &str = "1a:cf:f4:7b:c6:ea";
/// The same with VNI 7 and SubnetLen 26.
const UPSTREAM_KEY_26: &str = "/coreos.com/network/subnets/10.5.10.128-26";
const UPSTREAM_VALUE_VNI_7: &str = r#"{"PublicIP":"192.168.77.12","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":7,"VtepMAC":"1a:cf:f4:7b:c6:ea"}}"#;

#[test]
fn keys_and_values_are_upstreams() {
    if !privileged() {
        return;
    }
    let cases = [
        (
            r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}"#,
            DEVICE,
            ["10.5.1.0/24", "10.5.3.0/24"],
            [UPSTREAM_KEY, UPSTREAM_VALUE],
        ),
        (
            r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan","VNI":7,"Port":4789},"SubnetLen":26,"SubnetMin":"10.5.10.0","SubnetMax":"10.5.20.192"}"#,
            "flannel.7",
            ["10.5.15.192/26", "10.5.10.128/26"],
            [UPSTREAM_KEY_26, UPSTREAM_VALUE_VNI_7],
        ),
    ];
    for (conf, device, subnets, [key, value]) in cases {
        let mut rig = EtcdRig::new(2, conf);
        for (node, subnet) in subnets.iter().enumerate() {
            rig.prefer(node, subnet.parse().unwrap());
            rig.start_agent(node, &[]);
        }
        for (node, subnet) in subnets.iter().enumerate() {
            rig.wait_ready(node);
            let subnet: Subnet = subnet.parse().unwrap();
            let link = json::link(rig.ns(node), device).unwrap();
            let mac = link["address"].as_str().unwrap();
            // Upstream's node of the sample is our node 1; of the other node the address differs too.
            let ip = rig.lab.node(node).ip.to_string();
            let key = key.replace(&subnets[1].replace('/', "-"), &subnet.lease_key());
            let value = value
                .replace(UPSTREAM_MAC, mac)
                .replace("192.168.77.12", &ip);
            assert_eq!(rig.etcd.get(&key).unwrap(), Some(value));
            let (_, lease) = rig.revision_and_lease(subnet).unwrap();
            let lease = format!("{lease:016x}");
            let text = rig
                .etcd
                .etcdctl(&["lease", "timetolive", &lease, "--keys"])
                .unwrap();
            let (granted, rest) = text.split_once(" remaining(").unwrap();
            assert_eq!(granted, format!("lease {lease} granted with TTL(86400s),"));
            assert!(
                rest.ends_with(&format!("s), attached keys([{key}])\n")),
                "{text}"
            );
            assert_eq!(
                rig.subnet_env(node),
                format!(
                    "FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET={}/{}\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=false\n",
                    subnet.gateway(),
                    subnet.prefix_len()
                )
            );
        }
        // Nothing else is in etcd, and no etcd lease is left over by a restart either.
        assert_eq!(rig.stop_agent(1, libc::SIGTERM), 0);
        rig.start_agent(1, &[]);
        rig.wait_log(1, "reusing");
        rig.wait_ready(1);
        let keys = rig.etcd.keys("").unwrap();
        assert_eq!(keys.len(), 3, "{keys:?}");
        eventually(PATIENCE, "one etcd lease a node", || {
            let text = rig.etcd.etcdctl(&["lease", "list"]).unwrap();
            if text.starts_with("found 2 leases") {
                return Ok(());
            }
            Err(text)
        });
    }
}

/// The agents of six nodes start at the same moment, and there are five subnets.
#[test]
fn five_subnets_are_shared_by_five_of_six_and_the_sixth_waits() {
    if !privileged() {
        return;
    }
    let five = r#"{"Network":"10.244.0.0/16","SubnetMin":"10.244.10.0","SubnetMax":"10.244.14.0","Backend":{"Type":"vxlan"}}"#;
    let mut rig = EtcdRig::new(6, five);
    for _round in 0..2 {
        for node in 0..6 {
            let _absent = fs::remove_file(rig.lab.node(node).run_dir.join("subnet.env"));
            rig.start_agent(node, &["--datapath=kernel"]);
        }
        let waiting = eventually(PATIENCE, "five have a lease, one waits", || {
            let ready: Vec<bool> = (0..6)
                .map(|node| rig.lines(node, "flannel is ready") > 0)
                .collect();
            match (0..6).filter(|node| !ready[*node]).collect::<Vec<_>>()[..] {
                [one] if rig.lines(one, "out of subnets") > 0 => Ok(one),
                _ => Err(format!("ready: {ready:?}")),
            }
        });
        rig.all_run();
        let holders: BTreeSet<Subnet> = (0..6)
            .filter(|node| *node != waiting)
            .map(|node| rig.subnet(node))
            .collect();
        assert_eq!(holders.len(), 5, "two nodes have the same subnet");
        let leases = rig.leases();
        assert!(leases.keys().eq(&holders), "{leases:?} {holders:?}");

        // One leaves for good, and the sixth gets what it had. Until then it said one line, and touched nobody's lease.
        let (leaver, revision) = (usize::from(waiting == 0), rig.stored());
        hold(Duration::from_secs(2), || {
            assert_eq!(rig.stored(), revision);
            assert_eq!(rig.lines(waiting, "WARN"), 1);
        });
        assert_eq!(rig.stop_agent(leaver, libc::SIGTERM), 0);
        let freed = rig.subnet(leaver);
        rig.etcd
            .delete(&format!("{PREFIX}/subnets/{}", freed.lease_key()))
            .unwrap();
        rig.wait_ready(waiting);
        assert_eq!(rig.subnet(waiting), freed);
        assert_eq!(rig.lines(waiting, "out of subnets"), 1);
        rig.all_run();

        for node in (0..6).filter(|node| *node != leaver) {
            assert_eq!(rig.stop_agent(node, libc::SIGTERM), 0);
        }
        rig.etcd
            .etcdctl(&["del", "--prefix", &format!("{PREFIX}/subnets/")])
            .unwrap();
    }
}

#[test]
fn a_revoked_lease_is_acquired_again() {
    if !privileged() {
        return;
    }
    let mut rig = EtcdRig::start(2, &[]);
    let (subnet, before) = (rig.subnet(0), rig.leases());
    let flood = rig.flood(1, 0);
    for way in ["revoked", "deleted"] {
        let (revision, lease) = rig.revision_and_lease(subnet).unwrap();
        if way == "revoked" {
            let lease = format!("{lease:016x}");
            rig.etcd.etcdctl(&["lease", "revoke", &lease]).unwrap();
        } else {
            let key = format!("{PREFIX}/subnets/{}", subnet.lease_key());
            rig.etcd.delete(&key).unwrap();
        }
        eventually(PATIENCE, &format!("the {way} lease is back"), || {
            let now = rig.revision_and_lease(subnet);
            now.filter(|(now, lease)| *now > revision && *lease != 0)
                .ok_or("not yet")
        });
        assert_eq!(rig.leases(), before, "another subnet or MAC after all");
        rig.wait_converged();
    }
    assert_eq!(rig.lines(0, "Lease has been revoked"), 2);
    rig.all_run();
    // The peer saw the lease go, and come back before it had taken anything down.
    let stats = flood.stop().unwrap();
    assert_eq!(stats.lost, 0, "{stats:?}");
}

#[test]
fn nonsense_under_the_prefix_costs_nobody_a_peer() {
    if !privileged() {
        return;
    }
    let mut rig = EtcdRig::start(3, &[]);
    let before = rig.leases();
    let mac_of_1 = rig.device_mac(1).unwrap();
    let flood = rig.flood(0, 1);
    let stranger = "192.168.77.99";
    let good_mac = "0a:00:00:00:00:99";
    let overlapping = value(stranger, 1, good_mac);
    // The key, its value, and whether a line of the log has to name it.
    let nonsense = [
        ("subnets/foo", "1", true),
        ("subnets-kick", "1", false),
        ("subnets", "1", false),
        ("subnets/10.244.70.0-24", "{\"PublicIP\":", true),
        ("subnets/10.244.71.0-24", "[]", true),
        ("subnets/10.244.72.0-24", "", true),
        ("subnets/10.244.73.300-24", &overlapping, true),
        ("subnets/10.244.74.0-24&fd00::", &overlapping, true),
        (
            "subnets/10.244.75.0-24",
            r#"{"PublicIP":"192.168.77.99","PublicIPv6":null,"BackendType":"host-gw"}"#,
            true,
        ),
        (
            "subnets/10.244.76.0-24",
            &value("224.0.0.1", 1, good_mac),
            true,
        ),
        (
            "subnets/10.244.77.0-24",
            &value(stranger, 1, "01:00:5e:00:00:01"),
            true,
        ),
        // Leases that claim what others have: part of node 0's subnet, part of node 1's, two nodes' at once, everything.
        ("subnets/10.244.1.0-25", &overlapping, true),
        ("subnets/10.244.2.128-25", &overlapping, true),
        ("subnets/10.244.2.0-23", &overlapping, true),
        ("subnets/10.244.0.0-16", &overlapping, true),
        // The MAC address of node 1 with another public address.
        (
            "subnets/10.244.90.0-24",
            &value(stranger, 1, &mac_of_1),
            true,
        ),
    ];
    for (name, text, _) in &nonsense {
        rig.put(name, text);
        // Long enough for the watch, the plan and the changes.
        hold(Duration::from_millis(300), || {
            for node in 0..3 {
                for (subnet, peer) in &before {
                    if *subnet != rig.subnet(node) {
                        rig.assert_peer(node, *subnet, peer, name);
                    }
                }
            }
        });
    }
    // The watch still lives.
    rig.put_lease("10.244.60.0-24", "192.168.77.60", "0a:00:00:00:00:60");
    let newcomer: Subnet = "10.244.60.0/24".parse().unwrap();
    for node in 0..3 {
        eventually(PATIENCE, "a real peer is added", || {
            rig.ns(node)
                .ip(&format!("route get {}", newcomer.host(2)))
                .and_then(|route| {
                    anyhow::ensure!(route.contains(DEVICE), "{route}");
                    Ok(())
                })
        });
        for (name, _, named) in &nonsense {
            let name = name.trim_start_matches("subnets/");
            let net = name.replace('-', "/");
            let log = rig.agent(node).log();
            let said = |needle: &str| {
                log.lines()
                    .any(|line| line.contains("WARN") && line.contains(needle))
            };
            assert_eq!(said(name) || said(&net), *named, "{name}: {log}");
        }
    }
    lossless(flood);
    rig.all_run();
}

#[test]
fn the_mac_outlives_the_device_and_the_node() {
    if !privileged() {
        return;
    }
    let mut rig = EtcdRig::start(2, &[]);
    let (mac, subnet) = (rig.device_mac(0).unwrap(), rig.subnet(0));
    let (value, written) = (rig.leases(), rig.revision_and_lease(subnet));
    rig.ns(0).ip(&format!("link del {DEVICE}")).unwrap();
    rig.wait_converged();
    assert_eq!(rig.device_mac(0).unwrap(), mac);
    assert_eq!(rig.revision_and_lease(subnet), written, "published again");

    // A reboot: neither device nor files nor pins are left, etcd has the lease.
    rig.agent(0).sigkill();
    rig.ns(0).ip(&format!("link del {DEVICE}")).unwrap();
    for file in ["subnet.env", "flannel-agent.json"] {
        fs::remove_file(rig.lab.node(0).run_dir.join(file)).unwrap();
    }
    let cookie = rig.ns(0).cookie().unwrap();
    let pins = flannel_core::mark::instance_path(cookie, 1.try_into().unwrap());
    fs::remove_dir_all(pins).unwrap();
    rig.start_agent(0, &[]);
    rig.wait_ready(0);
    assert_eq!(rig.device_mac(0).unwrap(), mac);
    assert_eq!(rig.subnet(0), subnet);
    assert_eq!(rig.leases(), value);
    rig.wait_converged();
    lossless({
        let flood = rig.flood(1, 0);
        hold(Duration::from_millis(300), || {});
        flood
    });
}

#[test]
fn a_signal_ends_every_phase_at_once() {
    if !privileged() {
        return;
    }
    let one = r#"{"Network":"10.244.0.0/16","SubnetMin":"10.244.10.0","SubnetMax":"10.244.10.0","Backend":{"Type":"vxlan"}}"#;
    let mut rig = EtcdRig::new(1, one);
    let conf = format!("{PREFIX}/config");
    for signal in [libc::SIGTERM, libc::SIGINT] {
        rig.etcd.delete(&conf).unwrap();
        rig.start_agent(0, &[]);
        rig.wait_log(0, "flannel config not found");
        assert_eq!(rig.stop_agent(0, signal), 0, "waiting for a configuration");

        rig.etcd.stop().unwrap();
        rig.start_agent(0, &[]);
        rig.wait_log(0, "unreachable");
        assert_eq!(rig.stop_agent(0, signal), 0, "etcd is down");
        rig.etcd.restart().unwrap();

        // A name that takes long to be looked up: nobody answers at the resolver's address.
        rig.start_agent(0, &["--etcd-endpoints=http://etcd.invalid:2379"]);
        rig.wait_log(0, "lease store");
        assert_eq!(rig.stop_agent(0, signal), 0, "looking up a name");

        rig.etcd.pause().unwrap();
        rig.start_agent(0, &[]);
        rig.wait_log(0, "lease store");
        assert_eq!(rig.stop_agent(0, signal), 0, "etcd does not answer");
        rig.etcd.resume().unwrap();

        rig.put("config", one);
        rig.put_lease("10.244.10.0-24", "192.168.77.99", "0a:00:00:00:00:99");
        rig.start_agent(0, &[]);
        rig.wait_log(0, "out of subnets");
        assert_eq!(rig.stop_agent(0, signal), 0, "waiting for a lease");

        rig.put("config", NET_CONF);
        rig.start_agent(0, &[]);
        rig.wait_ready(0);
        assert_eq!(rig.stop_agent(0, signal), 0, "running");

        rig.start_agent(0, &[]);
        rig.wait_ready(0);
        rig.etcd.pause().unwrap();
        assert_eq!(rig.stop_agent(0, signal), 0, "running without etcd");
        rig.etcd.resume().unwrap();
        rig.etcd
            .etcdctl(&["del", "--prefix", &format!("{PREFIX}/subnets/")])
            .unwrap();
    }
}

/// What carries the traffic of a node is not touched by a start that fails.
#[test]
fn a_configuration_gone_bad_holds_up_the_next_start_and_no_traffic() {
    if !privileged() {
        return;
    }
    let mut rig = EtcdRig::start(2, &[]);
    let peers = rig.kernel_peers(0).unwrap();
    let mac_of_1 = rig.device_mac(1).unwrap();
    let flood = rig.flood(1, 0);
    assert_eq!(rig.stop_agent(0, libc::SIGTERM), 0);
    rig.put(
        "config",
        r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan","VNI":-1}}"#,
    );
    rig.start_agent(0, &[]);
    rig.agent(0)
        .wait_log("Couldn't fetch network config: Backend.VNI is -1", PATIENCE)
        .unwrap();
    // Longer than it waits before it asks again.
    std::thread::sleep(Duration::from_secs(3));
    assert!(rig.agent(0).is_running());
    assert_eq!(rig.lines(0, "ERROR"), 1, "said once");
    assert_eq!(rig.kernel_peers(0).unwrap(), peers);
    rig.wait_map(0, &mac_of_1, true);
    // Mended, and nobody need restart anything.
    rig.put("config", NET_CONF);
    rig.agent(0).wait_log("flannel is ready", PATIENCE).unwrap();
    lossless(flood);
}
