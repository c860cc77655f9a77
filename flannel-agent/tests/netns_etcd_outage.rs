//! etcd goes away for half a minute, loses its history, loses everything, or is not there yet: traffic goes on, and the nodes
//! agree again afterwards.

mod etcd_rig;
mod rig;

use std::time::{Duration, Instant};

use etcd_rig::{EtcdRig, NET_CONF, PREFIX, hold, lossless};
use flannel_testkit::{eventually, privileged};
use rig::{PATIENCE, Peer};

const OLD_MAC: &str = "0a:00:00:00:00:01";
const NEW_MAC: &str = "0a:00:00:00:00:02";

#[test]
fn half_a_minute_without_etcd_and_its_history_costs_no_packet() {
    if !privileged() {
        return;
    }
    let mut rig = EtcdRig::start(2, &[]);
    rig.put_lease("10.244.70.0-24", "192.168.77.70", OLD_MAC);
    rig.put_lease("10.244.71.0-24", "192.168.77.71", "0a:00:00:00:00:71");
    rig.wait_converged();
    rig.wait_map(0, OLD_MAC, true);
    let flood = rig.flood(0, 1);

    let start = Instant::now();
    rig.etcd.stop().unwrap();
    rig.connect_etcd(false);
    for node in 0..2 {
        rig.wait_log(node, "lease store unreachable");
    }
    assert!(!rig.store_connected(0));
    // Behind the agents' backs one peer changes its MAC and address, one leaves, one comes, and the history is thrown away.
    rig.etcd.restart().unwrap();
    let before = rig.leases();
    rig.put_lease("10.244.70.0-24", "192.168.77.80", NEW_MAC);
    rig.etcd
        .delete(&format!("{PREFIX}/subnets/10.244.71.0-24"))
        .unwrap();
    rig.put_lease("10.244.72.0-24", "192.168.77.72", "0a:00:00:00:00:72");
    let (revision, _) = rig
        .revision_and_lease("10.244.72.0/24".parse().unwrap())
        .unwrap();
    rig.etcd
        .etcdctl(&["compact", &revision.to_string()])
        .unwrap();
    hold(
        Duration::from_secs(30).saturating_sub(start.elapsed()),
        || {
            rig.all_run();
        },
    );
    rig.wait_peers(&before);

    rig.connect_etcd(true);
    rig.wait_converged();
    let changed: Vec<Peer> = rig.leases().into_values().collect();
    assert!(
        changed.iter().any(|peer| peer.mac == NEW_MAC),
        "{changed:?}"
    );
    for node in 0..2 {
        rig.wait_map(node, NEW_MAC, true);
        rig.wait_map(node, OLD_MAC, false);
        assert_eq!(rig.lines(node, "lease store unreachable"), 1);
    }
    assert!(rig.store_connected(0));
    lossless(flood);
    rig.all_run();
}

/// An etcd that answers nothing for a while, and is then found compacted: the connections stay open all the time.
#[test]
fn a_frozen_etcd_costs_no_packet() {
    if !privileged() {
        return;
    }
    let mut rig = EtcdRig::start(2, &[]);
    let flood = rig.flood(1, 0);
    rig.etcd.pause().unwrap();
    hold(Duration::from_secs(2), || rig.all_run());
    rig.etcd.resume().unwrap();
    rig.put_lease("10.244.70.0-24", "192.168.77.70", OLD_MAC);
    rig.wait_converged();
    lossless(flood);
}

#[test]
fn an_etcd_that_lost_everything_gets_the_same_leases_again() {
    if !privileged() {
        return;
    }
    let mut rig = EtcdRig::start(3, &[]);
    let before = rig.leases();
    // The new store may have fewer revisions than the old one by the time an agent looks, or more.
    for padding in [0, 40] {
        let flood = rig.flood(0, 1);
        let back = rig.flood(2, 0);
        rig.etcd.wipe().unwrap();
        rig.connect_etcd(false);
        rig.etcd.restart().unwrap();
        rig.put("config", NET_CONF);
        for number in 0..padding {
            rig.put("padding", &number.to_string());
        }
        assert!(rig.stored().is_empty());
        rig.connect_etcd(true);
        eventually(PATIENCE, "all leases are back", || {
            let now = rig.leases();
            if now == before {
                return Ok(());
            }
            Err(format!("{now:?}"))
        });
        // Everybody has had the time to see what the others wrote.
        hold(Duration::from_millis(500), || rig.wait_peers(&before));
        lossless(flood);
        lossless(back);
        rig.all_run();
    }
    for node in 0..3 {
        let subnet = rig.subnet(node);
        let (_, lease) = rig.revision_and_lease(subnet).unwrap();
        assert_ne!(lease, 0, "the lease of node {node} would never expire");
    }
}

#[test]
fn a_start_without_etcd_waits_for_it_and_disturbs_nothing() {
    if !privileged() {
        return;
    }
    let mut rig = EtcdRig::start(2, &[]);
    let leases = rig.leases();
    let flood = rig.flood(1, 0);
    rig.etcd.stop().unwrap();
    assert_eq!(rig.stop_agent(0, libc::SIGTERM), 0);
    rig.start_agent(0, &[]);
    rig.wait_log(0, "unreachable");
    let endpoint = rig.etcd.endpoint();
    // One line says what it is waiting for, however often it asks.
    hold(Duration::from_secs(4), || {
        assert_eq!(rig.lines(0, "WARN"), 1);
        assert_eq!(rig.lines(0, &format!("{endpoint}: ")), 1);
        assert_eq!(rig.lines(0, "flannel is ready"), 0);
        rig.all_run();
    });
    rig.etcd.restart().unwrap();
    rig.wait_ready(0);
    rig.wait_converged();
    assert_eq!(rig.leases(), leases);
    lossless(flood);
}
