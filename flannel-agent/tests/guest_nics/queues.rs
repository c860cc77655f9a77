//! A card with several queues.

use flannel_common::CounterId;
use flannel_testkit::{Offloads, traffic::TcpPair, traffic::TcpServer};

use crate::{counted, start, stream_both_ways, wait_standing};

#[test]
fn every_queue_strips() {
    let rig = start(Offloads::Default, &[]);
    for node in 0..2 {
        let shown = rig
            .ns(node)
            .exec(["ethtool", "-l", "eth0"])
            .expect("queues");
        let most = shown
            .lines()
            .find_map(|line| line.strip_prefix("Combined:"));
        let most: u32 = most.expect("a number").trim().parse().expect("a number");
        assert!(most > 1, "{shown}");
        wait_standing(&rig, node, "works", true);
    }
    let (a, b) = (rig.pod(0), rig.pod(1));
    let server = TcpServer::listen(&b.ns, b.ip, 7000).expect("a server");
    let mut pairs: Vec<TcpPair> = (0..16)
        .map(|_| TcpPair::connect(&a.ns, server.address, &[&server]).expect("a connection"))
        .collect();
    for _ in 0..4 {
        for pair in &mut pairs {
            pair.exchange(20_000).expect("bytes both ways");
        }
    }
    stream_both_ways(&rig);
    for node in 0..2 {
        assert_eq!(counted(&rig, node, CounterId::XdpMissed), 0);
    }
}
