//! Nodes of other families and backends, healthy and not.

use flannel_testkit::{Families, Family, LabOptions, eventually, privileged};

use crate::{assert_fails, assert_healthy, check, ended, rig::Rig, rig::net_conf};

fn start(families: Families, backend: &str) -> Rig {
    let options = LabOptions {
        nodes: 2,
        families,
        ..LabOptions::default()
    };
    let conf = net_conf(families).replace("vxlan", backend);
    let mut rig = Rig::with(options, &conf);
    for node in 0..2 {
        rig.start_agent(node, &[]);
    }
    for node in 0..2 {
        rig.wait_ready(node);
        rig.add_pod(node);
    }
    rig
}

/// Both know each other soon after they are ready.
#[track_caller]
fn settle(rig: &Rig, skipped: &[&str]) {
    eventually(crate::rig::PATIENCE, "nothing is wrong", || {
        let answer = check(rig, 0);
        (answer.1 == 0)
            .then_some(())
            .ok_or(format!("{:#?}", answer.0))
    });
    for node in 0..2 {
        let answer = check(rig, node);
        assert_healthy(&answer, &[]);
        assert_eq!(ended(&answer.0, "SKIP"), skipped, "{:#?}", answer.0);
    }
}

#[test]
fn ipv6_alone_and_both_families() {
    if !privileged() {
        return;
    }
    let rig = start(Families::V6, "vxlan");
    settle(&rig, &["certificates"]);
    let (findings, _) = check(&rig, 0);
    assert!(
        findings["path-mtu"]
            .1
            .starts_with("packets of 1430 bytes pass to 1")
    );
    drop(rig);

    let mut rig = start(Families::Dual, "vxlan");
    settle(&rig, &["certificates"]);
    let (findings, _) = check(&rig, 0);
    for name in ["path-mtu", "path-mtu-v6"] {
        assert!(
            findings[name]
                .1
                .starts_with("packets of 1430 bytes pass to 1"),
            "{findings:#?}"
        );
    }
    // With the agent gone what breaks stays so.
    rig.kill_agent(0);
    rig.ns(0).ip("link del flannel-v6.1").expect("remove it");
    let answer = check(&rig, 0);
    assert_fails(
        &answer,
        "device-v6",
        "flannel-v6.1 does not exist",
        "start the agent",
    );
}

#[test]
fn without_a_tunnel() {
    if !privileged() {
        return;
    }
    let mut rig = start(Families::Dual, "host-gw");
    let skipped = [
        "certificates",
        "device",
        "device-v6",
        "firewall-input",
        "offload",
        "overlay",
        "overlay-v6",
        "path-mtu",
        "path-mtu-v6",
        "port",
        "vxlan",
    ];
    settle(&rig, &skipped);
    rig.kill_agent(0);
    let peer = rig.node(1).subnet_of(Family::V6).to_string();
    rig.ns(0)
        .ip(&format!("-6 route del {peer}"))
        .expect("remove the route");
    assert_fails(&check(&rig, 0), "peer-entries-v6", &peer, "start the agent");
}

#[test]
fn without_a_data_path() {
    if !privileged() {
        return;
    }
    let rig = start(Families::V4, "alloc");
    let skipped = [
        "certificates",
        "datapath",
        "device",
        "firewall-input",
        "offload",
        "overlay",
        "path-mtu",
        "peer-entries",
        "port",
        "rung",
        "vxlan",
    ];
    settle(&rig, &skipped);
    let (findings, _) = check(&rig, 0);
    assert!(findings["agent"].1.starts_with("running"), "{findings:#?}");
}
