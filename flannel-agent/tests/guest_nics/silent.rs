//! A card that takes the program and never runs it: virtio_net without mergeable receive buffers.

use std::net::SocketAddr;

use flannel_common::CounterId;
use flannel_testkit::{Offloads, http};

use crate::{counted, has_program, longest_received, rig::PATIENCE, start, stream_both_ways};

#[test]
fn it_is_left_for_tc() {
    let mut rig = start(Offloads::Default, &["--metrics-addr=127.0.0.1:9476"]);
    for round in 1..=2 {
        stream_both_ways(&rig);
        for node in 0..2 {
            let xdp = crate::wait_standing(&rig, node, "idle", false);
            let reason = xdp["reason"].as_str().expect("a reason");
            assert!(reason.contains("mrg_rxbuf"), "{reason}");
            assert_eq!(counted(&rig, node, CounterId::XdpDecap), 0);
            let log = rig.agent(node).log();
            let said = |what: &str| log.matches(what).count();
            assert_eq!(said("native XDP is switched off"), 1, "{log}");
            assert_eq!(said("attach native XDP"), 1, "{log}");
            let address = SocketAddr::from(([127, 0, 0, 1], 9476));
            let metrics = http::get(rig.ns(node), address, "/metrics", PATIENCE);
            let metrics = metrics.expect("the metrics").body;
            assert!(
                metrics.contains("flannel_xdp_state{state=\"idle\"} 1"),
                "{metrics}"
            );
        }
        // tc has it, and what the tunnel's own GRO merges.
        let longest = longest_received(&rig, 1);
        assert!(longest > crate::FRAME, "the longest has {longest} bytes");
        stream_both_ways(&rig);
        for node in 0..2 {
            assert!(!has_program(&rig, node), "it stays detached");
            let carried = counted(&rig, node, CounterId::BpfDecap)
                + counted(&rig, node, CounterId::FastDecap);
            assert!(carried > 0);
        }
        // A new agent finds it out anew.
        if round == 1 {
            for node in 0..2 {
                rig.kill_agent(node);
                rig.start_agent(node, &["--metrics-addr=127.0.0.1:9476"]);
                rig.wait_ready(node);
            }
        }
    }
}

/// Without traffic of the overlay nothing is known, and nothing is said.
#[test]
fn silence_proves_nothing() {
    let mut rig = start(Offloads::Default, &[]);
    let other = rig.node(1).ip;
    let stats = flannel_testkit::traffic::ping(rig.ns(0), other, 500, crate::EVERY);
    assert_eq!(stats.expect("pings").lost, 0);
    for node in 0..2 {
        crate::wait_standing(&rig, node, "unproven", true);
        let log = rig.agent(node).log();
        assert!(!log.contains("native XDP is switched off"), "{log}");
    }
}
