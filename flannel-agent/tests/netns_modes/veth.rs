//! No vxlan device type: eBPF does all the work, on a veth pair that carries the device's name.

use std::time::Duration;

use flannel_testkit::{
    Confinement,
    json::link,
    privileged,
    traffic::{Amount, FloodPing},
};

use crate::{
    assert_one_warning, device_kind, exchange, restart,
    rig::{DEVICE, Rig},
    stream,
};

/// Node 0 lacks the device type, node 1 was told to do without, node 2 has both, node 3 has the kernel's device alone.
fn four_kinds() -> Rig {
    let mut rig = Rig::new(4);
    rig.start_confined(0, &[], &Confinement::NO_VXLAN);
    rig.start_agent(1, &["--bpf-device=veth"]);
    rig.start_agent(2, &[]);
    rig.start_agent(3, &["--datapath=kernel"]);
    for node in 0..4 {
        rig.wait_ready(node);
        rig.add_pod(node);
    }
    rig.wait_converged();
    rig
}

#[test]
fn without_the_device_type_the_overlay_reaches_every_kind_of_node() {
    if !privileged() {
        return;
    }
    let mut rig = four_kinds();
    let kinds: Vec<String> = (0..4).map(|node| device_kind(&rig, node)).collect();
    assert_eq!(kinds, ["veth", "veth", "vxlan", "vxlan"]);
    for (a, b) in [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3)] {
        exchange(&rig, a, b);
    }
    for node in [0, 1] {
        let status = rig.status(node);
        assert_eq!(status["ok"], true, "{status}");
        assert_eq!(status["device"]["kind"], "veth", "{status}");
        assert_eq!(status["datapath"]["mode"], "bpf", "{status}");
        assert_eq!(status["problems"], serde_json::json!([]), "{status}");
    }
    assert_one_warning(
        &mut rig,
        0,
        &["refuses vxlan devices", "eBPF carries the overlay alone"],
    );
    assert_one_warning(&mut rig, 1, &["--bpf-device=veth"]);
}

#[test]
fn a_node_without_the_device_type_follows_the_cluster_and_survives_its_agent() {
    if !privileged() {
        return;
    }
    let mut rig = four_kinds();
    // Leave, come back, come back with another address.
    let ghost = "10.244.77.0/24".parse().expect("a subnet");
    for (ip, mac) in [
        ("192.168.77.60", "02:00:00:00:77:01"),
        ("192.168.77.61", "02:00:00:00:77:02"),
    ] {
        rig.put_lease(ghost, ip.parse().expect("an address"), mac);
        crate::eventually(crate::PATIENCE, "the newcomer is known", || {
            let peers = rig.peers(0);
            let found = crate::list(&peers).iter().any(|peer| {
                peer["subnet"] == "10.244.77.0/24"
                    && peer["vtep"] == ip
                    && peer["path"] == "bpf"
                    && peer["kernel_complete"] == true
            });
            found.then_some(()).ok_or(format!("{peers}"))
        });
    }
    rig.remove_lease(ghost);
    rig.wait_converged();

    let before = link(rig.ns(0), DEVICE).expect("the device");
    let flood =
        FloodPing::start(&rig.pod(0).ns, rig.pod(3).ip, Duration::from_millis(1)).expect("a flood");
    restart(&mut rig, 0, &[], &Confinement::NO_VXLAN);
    rig.wait_converged();
    let stats = flood.stop().expect("the account");
    assert_eq!(stats.lost, 0, "{stats:?}");
    let after = link(rig.ns(0), DEVICE).expect("the device");
    for field in ["ifindex", "address", "mtu"] {
        assert_eq!(before[field], after[field], "{field}");
    }
    stream(&rig, 0, 3, Amount::Bytes(20 << 20));
    stream(&rig, 3, 0, Amount::Bytes(20 << 20));
}

#[test]
fn the_device_changes_its_kind_there_and_back() {
    if !privileged() {
        return;
    }
    let mut rig = Rig::start(2, &[]);
    let mac = rig.lease(0).mac;
    let steps: [(&[&str], &str); 6] = [
        (&["--bpf-device=veth"], "veth"),
        (&[], "vxlan"),
        (&["--bpf-device=veth", "--bpf-attach=clsact"], "veth"),
        (&["--datapath=kernel"], "vxlan"),
        (&["--bpf-device=veth"], "veth"),
        (&["--bpf-device=vxlan"], "vxlan"),
    ];
    for (flags, kind) in steps {
        rig.kill_agent(0);
        rig.start_agent(0, flags);
        rig.wait_ready(0);
        rig.wait_converged();
        assert_eq!(device_kind(&rig, 0), kind, "{flags:?}");
        assert_eq!(rig.lease(0).mac, mac, "{flags:?}");
        let address = link(rig.ns(0), DEVICE).expect("the device")["address"].clone();
        assert_eq!(address, mac.as_str(), "{flags:?}");
        exchange(&rig, 0, 1);
        for leftover in ["flannelp.1", "flan-1", "flannel.1~"] {
            let there = link(rig.ns(0), leftover).is_ok();
            assert_eq!(
                there,
                kind == "veth" && leftover == "flannelp.1",
                "{leftover}"
            );
        }
    }
}
