//! The port of the pods' bridge that makes room in front of packets: there while the fast path is on, and in nobody's way.

mod rig;

use flannel_testkit::{json::link, privileged};
use rig::{PATIENCE, Rig};
use serde_json::Value;

const NAME: &str = "flannel-hr.1";

fn headroom(rig: &Rig, node: usize) -> Option<Value> {
    link(rig.ns(node), NAME).ok()
}

#[track_caller]
fn wait(rig: &Rig, node: usize, there: bool) {
    flannel_testkit::eventually(PATIENCE, "the headroom device", || {
        if headroom(rig, node).is_some() == there {
            Ok(())
        } else {
            Err(format!("wanted: {there}"))
        }
    });
}

#[test]
fn the_device_is_down_a_port_and_the_last_in_every_choice() {
    if !privileged() {
        return;
    }
    let mut rig = Rig::start(2, &["--bpf-fast-path=established"]);
    wait(&rig, 0, true);
    let bridge = link(rig.ns(0), "cni0").expect("the bridge");
    let device = headroom(&rig, 0).expect("the device");
    assert_eq!(device["master"], "cni0");
    assert_eq!(device["operstate"], "DOWN", "{device}");
    assert_eq!(device["mtu"], bridge["mtu"]);
    assert_eq!(device["address"], "fe:ff:ff:ff:ff:ff");
    rig.ping(0, 1).expect("pods reach each other");
    // A restart makes no other.
    rig.stop_agent(0);
    rig.start_agent(0, &["--bpf-fast-path=established"]);
    rig.wait_ready(0);
    assert_eq!(
        headroom(&rig, 0).expect("the device")["ifindex"],
        device["ifindex"]
    );
    // Somebody's mistake is mended, and what somebody else made under the name is left alone.
    rig.ns(0)
        .ip(&format!("link del {NAME}"))
        .expect("delete it");
    wait(&rig, 0, true);
    rig.stop_agent(0);
    rig.start_agent(0, &["--bpf-fast-path=off"]);
    rig.wait_ready(0);
    wait(&rig, 0, false);
    rig.ns(0)
        .ip(&format!("link add {NAME} type bridge"))
        .expect("a stranger's");
    rig.stop_agent(0);
    rig.start_agent(0, &["--bpf-fast-path=established"]);
    rig.wait_ready(0);
    rig.ping(0, 1).expect("pods reach each other");
    assert_eq!(
        headroom(&rig, 0).expect("the stranger's")["linkinfo"]["info_kind"],
        "bridge"
    );
    assert_eq!(rig.status_is_ok(0)["problems"], serde_json::json!([]));
}

#[test]
fn cleanup_removes_it() {
    if !privileged() {
        return;
    }
    let mut rig = Rig::start(2, &["--bpf-fast-path=established"]);
    wait(&rig, 0, true);
    rig.stop_agent(0);
    let done = rig.cli(0, &["cleanup"]);
    assert!(done.status.success(), "{done:?}");
    assert!(headroom(&rig, 0).is_none());
    assert!(link(rig.ns(0), "cni0").is_ok());
}

#[test]
fn a_bridge_with_big_tcp_is_left_alone() {
    if !privileged() {
        return;
    }
    let mut rig = Rig::start(2, &["--bpf-fast-path=established"]);
    wait(&rig, 0, true);
    rig.stop_agent(0);
    let ip = |line: &str| rig.ns(0).ip(line).expect("ip");
    ip(&format!("link del {NAME}"));
    ip("link set cni0 gso_max_size 180000");
    rig.start_agent(0, &["--bpf-fast-path=established"]);
    rig.wait_ready(0);
    rig.ping(0, 1).expect("pods reach each other");
    rig.wait_carried();
    assert!(headroom(&rig, 0).is_none());
    let bridge = link(rig.ns(0), "cni0").expect("the bridge");
    assert_eq!(bridge["gso_max_size"], 180_000, "{bridge}");
}
