//! What shows that an attached program runs, and what does not.

use std::net::SocketAddr;

use flannel_testkit::{
    LabOptions, Offloads, http, mac_text, privileged,
    traffic::{FloodPing, ping},
};

use crate::{
    EVERY, NATIVE, bare_lab, missed, program,
    rig::{NET_CONF, PATIENCE, Rig},
    stripped, wait_attached, wait_status, wire_rig,
};

/// A peer with outer checksums, which XDP leaves to others, says nothing about the driver.
#[test]
fn a_peer_with_checksums_proves_nothing() {
    if !privileged() {
        return;
    }
    let mut rig = bare_lab();
    let (kernel, theirs) = wire_rig::kernel_end(&rig, 1);
    wire_rig::start_with_peer(&mut rig, 0, &[NATIVE, "--bpf-device=veth"], &kernel);
    wait_attached(&rig, 0, PATIENCE);
    let stats = ping(&theirs.pod.ns, rig.pod(0).ip, 4_000, EVERY).expect("pings");
    assert_eq!(stats.lost, 0, "{stats:?}");
    let xdp = wait_status(&rig, 0, true, &["no packet has shown yet"]);
    assert_eq!(xdp["standing"], "unproven");
    assert_eq!((stripped(&rig, 0), missed(&rig, 0)), (0, 0));
}

/// Frames for the node go round its driver: to its second interface, and from there to where the first one's go after XDP.
fn go_round_the_driver(rig: &Rig, node: usize) {
    let port = rig.node(node).port.clone();
    let (underlay, ns) = (rig.lab().underlay(), rig.ns(node));
    let address = mac_text(wire_rig::mac_of(ns, "eth0"));
    // What arrives there is addressed to the other.
    ns.ip(&format!("link set eth1 address {address}"))
        .expect("set the address");
    let all = "u32 match u32 0 0 action mirred";
    for (ns, line) in [
        (underlay, format!("qdisc add dev {port} clsact")),
        (
            underlay,
            format!("filter add dev {port} egress {all} egress redirect dev {port}b"),
        ),
        (ns, "qdisc add dev eth1 clsact".to_owned()),
        (
            ns,
            format!("filter add dev eth1 ingress {all} ingress redirect dev eth0"),
        ),
    ] {
        ns.exec(["tc"].into_iter().chain(line.split_whitespace()))
            .unwrap_or_else(|error| panic!("{line}: {error:#}"));
    }
}

#[test]
fn a_driver_that_never_runs_it_is_found_out() {
    if !privileged() {
        return;
    }
    for mode in ["off", "established"] {
        let options = LabOptions {
            offloads: Offloads::Off,
            second_uplink: true,
            ..LabOptions::default()
        };
        let mut rig = Rig::with(options, NET_CONF);
        go_round_the_driver(&rig, 1);
        rig.start_all(&[
            NATIVE,
            &format!("--bpf-fast-path={mode}"),
            "--metrics-addr=127.0.0.1:9476",
        ]);
        // Both have answered each other a few times by now, which is not enough.
        let xdp = wait_status(&rig, 1, true, &["no packet has shown yet"]);
        assert_eq!(xdp["standing"], "unproven");
        let flood = FloodPing::start(&rig.pod(0).ns, rig.pod(1).ip, EVERY).expect("a ping");
        let xdp = wait_status(&rig, 1, false, &["does not run it"]);
        assert_eq!(xdp["standing"], "idle");
        program(&rig, 1).expect_err("it is detached");
        let stats = flood.stop().expect("stop the ping");
        assert_eq!(stats.lost, 0, "{stats:?}");
        assert_eq!(stripped(&rig, 1), 0);
        assert!(missed(&rig, 1) >= 16);
        wait_status(&rig, 0, true, &["strips"]);
        // It is not tried again, and said once.
        let stats = ping(&rig.pod(0).ns, rig.pod(1).ip, 4_000, EVERY).expect("pings");
        assert_eq!(stats.lost, 0, "{stats:?}");
        program(&rig, 1).expect_err("it stays detached");
        let log = rig.agent(1).log();
        let said = |what: &str| log.matches(what).count();
        assert_eq!(said("native XDP is switched off"), 1, "{log}");
        assert_eq!(said("attach native XDP"), 1, "{log}");
        let address = SocketAddr::from(([127, 0, 0, 1], 9476));
        let metrics = http::get(rig.ns(1), address, "/metrics", PATIENCE).expect("the metrics");
        for (state, value) in [("idle", 1), ("works", 0), ("off", 0)] {
            let line = format!("flannel_xdp_state{{state=\"{state}\"}} {value}");
            assert!(metrics.body.contains(&line), "{line}\n{metrics:?}");
        }
    }
}
