//! What an earlier configuration has left on a node, and nodes that cannot be told apart.

use flannel_testkit::{eventually, json::ip_json, privileged};

use crate::{
    assert_lossless,
    rig::{PATIENCE, Rig, list},
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

/// Vagrant gives all machines the same address on the interface with the default route: every node is a peer of itself.
#[test]
fn two_nodes_with_one_address_are_told_what_to_write() {
    if !privileged() {
        return;
    }
    let mut rig = Rig::start(2, &[]);
    let (subnet, ip) = ("10.244.66.0/24".parse().unwrap(), rig.node(0).ip);
    rig.put_lease(subnet, ip, "0a:00:00:00:00:66");
    let said = format!("{ip}");
    let line = rig.agent(0).wait_until(PATIENCE, "it says so", |agent| {
        let log = agent.log();
        let line = log
            .lines()
            .find(|line| line.contains(" WARN ") && line.contains("10.244.66.0/24"));
        line.map(str::to_owned)
            .ok_or_else(|| anyhow::anyhow!("not yet"))
    });
    let line = line.unwrap_or_else(|error| panic!("{error:#}"));
    assert!(line.contains(&said), "{line}");
    wait_mended_without(&rig);
}

/// The peer that is real is untouched by the one that is not.
#[track_caller]
fn wait_mended_without(rig: &Rig) {
    eventually(PATIENCE, "the pods reach each other", || {
        rig.ping(0, 1)
            .and_then(|_| rig.ping(1, 0))
            .map_err(|error| format!("{error:#}"))
    });
}
