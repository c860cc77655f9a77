//! Two agents and a plain kernel node, whose cards segment nothing: everybody reaches everybody, no packet is dropped, through
//! eBPF, and still so while an agent is replaced.

use std::time::Duration;

use flannel_agent::dataplane::bpf::AttachMode;
use flannel_core::plan::Hook;
use flannel_testkit::{
    KernelNode, LabOptions, Offloads, eventually,
    json::link,
    privileged,
    traffic::{Amount, FloodPing, tcp_transfer},
};
use serde_json::{Value, json};

use crate::{
    lacks,
    rig::{NET_CONF, PATIENCE, Rig},
    wire_rig::{End, kernel_end, vtep_mac},
};

/// Bytes of a stream. Enough for super-packets, which must be segmented after the encapsulation.
const STREAM: u64 = 2 << 20;
/// Part of it that eBPF must have carried: before it knows the next hop, the kernel does.
const MOST: u64 = STREAM / 4 * 3;
/// The node that has the kernel's device and no agent.
const KERNEL: usize = 2;

#[test]
fn the_overlay_works_attached_as_this_kernel_likes_best() {
    run(AttachMode::detect(), "vxlan");
}

/// Where that is tcx. Elsewhere it is the same as the above, for which there is time.
#[test]
fn the_overlay_works_on_clsact() {
    run(AttachMode::Clsact, "vxlan");
}

/// Without the kernel's device eBPF carries everything, and other functions of the kernel come into play.
#[test]
fn the_overlay_works_without_a_vxlan_device() {
    run(AttachMode::detect(), "veth");
}

fn run(attach: AttachMode, device: &str) {
    if !privileged() {
        return;
    }
    assert!(!lacks("bpf") && !lacks("vxlan"), "not for this kernel");
    let flags = [
        "--datapath=bpf".to_owned(),
        "--bpf-fast-path=established".to_owned(),
        format!("--bpf-attach={}", attach.as_str()),
        format!("--bpf-device={device}"),
    ];
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    let (mut rig, ends) = start(&flags);
    let mut lost = Vec::new();
    for (from, to) in [(0, 1), (1, KERNEL), (KERNEL, 0)] {
        let before = dropped(&rig, from);
        let (client, server) = (&ends[from].pod, &ends[to].pod);
        eventually(PATIENCE, &format!("ping from {from} to {to}"), || {
            flannel_testkit::traffic::ping_once(&client.ns, server.ip, Duration::from_secs(1))
        });
        tcp_transfer(&server.ns, server.ip, &client.ns, Amount::Bytes(STREAM))
            .unwrap_or_else(|error| panic!("TCP from {from} to {to}: {error:#}"));
        lost.push(dropped(&rig, from) - before);
    }
    assert_eq!(lost, [0, 0, 0], "packets that uplinks dropped");
    for node in 0..KERNEL {
        check_path(&rig.status_is_ok(node), attach, device);
    }

    let flood = FloodPing::start(&ends[0].pod.ns, ends[1].pod.ip, Duration::from_millis(20));
    let flood = flood.expect("a flood");
    rig.kill_agent(1);
    rig.start_agent(1, &flags);
    rig.wait_ready(1);
    let stats = flood.stop().expect("the account");
    assert_eq!(stats.lost, 0, "around a restart: {stats:?}");
    check_path(&rig.status_is_ok(1), attach, device);
}

fn start(flags: &[&str]) -> (Rig, Vec<End>) {
    let options = LabOptions {
        nodes: 3,
        offloads: Offloads::Off,
        ..LabOptions::default()
    };
    let mut rig = Rig::with(options, NET_CONF);
    let (kernel, theirs) = kernel_end(&rig, KERNEL);
    for node in 0..KERNEL {
        rig.start_agent(node, flags);
    }
    let mut ends = Vec::new();
    for node in 0..KERNEL {
        rig.wait_ready(node);
        rig.add_pod(node);
        introduce(&rig, &kernel, node);
        ends.push(End::of(&rig, node));
    }
    ends.push(theirs);
    rig.wait_converged();
    rig.wait_carried();
    (rig, ends)
}

/// Tells the kernel node of one of ours, as upstream's daemon would.
fn introduce(rig: &Rig, kernel: &KernelNode, node: usize) {
    let (ns, ip) = (rig.ns(node), rig.node(node).ip);
    kernel
        .add_peer(rig.node(node).subnet, vtep_mac(ns), ip)
        .expect("tell the kernel node of ours");
}

/// Packets that the uplink of a node has not sent.
fn dropped(rig: &Rig, node: usize) -> u64 {
    let link = link(rig.ns(node), "eth0").expect("the uplink");
    link["stats64"]["tx"]["dropped"].as_u64().expect("a count")
}

/// What carries the traffic of a node is attached the wanted way, and has carried the streams.
fn check_path(status: &Value, attach: AttachMode, device: &str) {
    let path = &status["datapath"];
    let hooks: Vec<&str> = Hook::BASE.iter().map(|hook| hook.as_str()).collect();
    assert_eq!(path["attach"], attach.as_str(), "{path}");
    assert_eq!(path["attached"], json!(hooks), "{path}");
    assert_eq!(status["device"]["kind"], device, "{status}");
    let bytes = |of: &Value, way: &str| of[way]["bytes"].as_u64().unwrap_or(0);
    let counters = &status["counters"];
    for way in ["encap", "decap"] {
        assert!(bytes(counters, way) > MOST, "{way} of a stream: {counters}");
        let past = &status["fast_path"]["counters"];
        assert!(bytes(past, way) > 0, "{way} around the stack: {past}");
    }
}
