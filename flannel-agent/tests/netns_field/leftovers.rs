//! What an earlier configuration has left on a node, and nodes that cannot be told apart.

use flannel_testkit::{eventually, json::ip_json, privileged, process};

use crate::{
    assert_lossless,
    etcd_rig::{EtcdRig, NET_CONF, PREFIX},
    rig::{PATIENCE, Rig, agent_binary, list},
    wait_mended,
};

/// The network identifier was changed while no agent ran: the device of the earlier one, with its routes, is still there.
#[test]
fn the_device_of_an_earlier_network_identifier_is_in_nobodys_way() {
    if !privileged() {
        return;
    }
    let earlier = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan","VNI":7}}"#;
    for flags in [&[][..], &["--datapath=kernel"]] {
        let mut rig = Rig::new(2);
        let config = rig.lease_dir().join("config");
        let now = std::fs::read_to_string(&config).unwrap();
        std::fs::write(&config, earlier).unwrap();
        for node in 0..2 {
            rig.start_agent(node, flags);
        }
        for node in 0..2 {
            rig.wait_ready(node);
        }
        let routes = |rig: &Rig, device: &str| {
            let routes = ip_json(rig.ns(0), &["route", "show", "dev", device]);
            routes.map_or(0, |routes| list(&routes).len())
        };
        eventually(PATIENCE, "the earlier device has its peer", || {
            (routes(&rig, "flannel.7") == 1).then_some(()).ok_or("no")
        });
        for node in 0..2 {
            assert_eq!(rig.stop_agent(node), 0);
        }
        std::fs::write(&config, now).unwrap();
        rig.start_all(flags);
        wait_mended(&rig, "the pods reach each other");
        assert_eq!(routes(&rig, "flannel.7"), 0, "{flags:?}");
        assert_lossless(&rig, "over the new device");
    }
}

/// Vagrant gives all machines the same address on the interface with the default route: they hold one lease between them.
#[test]
fn two_nodes_with_one_address_are_told_what_to_write() {
    if !privileged() {
        return;
    }
    let mut rig = EtcdRig::new(2, NET_CONF);
    for node in 0..2 {
        rig.start_agent(node, &["--iface=eth0", "--public-ip=192.168.77.50"]);
        rig.wait_ready(node);
    }
    assert_eq!(rig.stored().len(), 1);
    let said = "another node has the same public address";
    rig.wait_log(0, said);
    let log = rig.agent(0).log();
    let line = log.lines().find(|line| line.contains(said));
    let line = line.expect("a line");
    for needle in [" WARN ", "192.168.77.50", "--iface", "--public-ip"] {
        assert!(line.contains(needle), "{needle}: {line}");
    }
    // As told; the device goes too, because the second node has taken over what it found in the lease, MAC address and all.
    let shared = rig.subnet(0);
    for node in 0..2 {
        assert_eq!(rig.stop_agent(node, libc::SIGTERM), 0);
        let file = rig.lab.node(node).run_dir.join("subnet.env");
        let mut cleanup = rig.ns(node).command(agent_binary());
        cleanup.args(["cleanup", "--subnet-file"]).arg(&file);
        process::succeed(&mut cleanup, PATIENCE).expect("flannel-agent cleanup");
    }
    rig.etcd
        .delete(&format!("{PREFIX}/subnets/{}", shared.lease_key()))
        .unwrap();
    for node in 0..2 {
        rig.start_agent(node, &["--iface=eth0"]);
        rig.wait_ready(node);
    }
    assert_ne!(rig.subnet(0), rig.subnet(1));
    rig.wait_converged();
    let macs = [0, 1].map(|node| rig.device_mac(node).expect("a MAC address"));
    assert_ne!(macs[0], macs[1]);
}
