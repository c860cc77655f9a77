//! Clusters in which upstream v0.28.9, upstream v0.12.0 and ours each run on a node: all pairs, both ways, every size.

mod rig;
mod takeover_rig;

use std::time::Duration;

use flannel_testkit::{
    Pod, privileged,
    traffic::{Amount, ping_sized, tcp_transfer, udp_echo},
    upstream::{Firewall, Release, UpstreamConf},
};
use takeover_rig::{Cluster, StoreKind, conf};

/// The node that ours runs on.
const OURS: usize = 2;
const LIMIT: Duration = Duration::from_secs(3);
const STREAM: Amount = Amount::Bytes(1 << 20);
/// IPv4 and ICMP or UDP.
const HEADERS: usize = 28;

fn all_pairs(store: StoreKind, mtu: u32, flags: &[&str]) {
    if !privileged() {
        return;
    }
    let current = UpstreamConf { mtu, ..conf() };
    let older = UpstreamConf {
        release: Release::V0_12,
        firewall: Firewall::Iptables,
        ..current
    };
    let mut cluster = Cluster::new(store, &[current, older, current], mtu);
    for node in [0, 1] {
        cluster.start_upstream(node);
    }
    let before = cluster.store().stored().unwrap();
    cluster.take_over(OURS, flags);
    for node in 0..3 {
        cluster.add_pod(node);
    }
    cluster.sync_upstream();
    cluster.wait_all_pairs();
    exchange_all(&cluster, mtu);

    // Nobody's lease but ours was written, and ours is upstream's in every byte.
    let mut stored = cluster.store().stored().unwrap();
    let ours = &cluster.nodes[OURS];
    let (_, mac, _, _) = cluster.identity(OURS);
    let key = ours.subnet.lease_key();
    assert_eq!(stored.remove(&key), Some(ours.lease(&mac)));
    assert_eq!(stored, before);

    // The older node is taken over as well: its lease gets what v0.28.9 would write, the MAC address stays.
    let mac = cluster.nodes[1].device_mac().unwrap();
    cluster.take_over(1, flags);
    let key = cluster.nodes[1].subnet.lease_key();
    let stored = cluster.store().stored().unwrap();
    let mut upgraded = cluster.nodes[1].clone();
    upgraded.conf.release = Release::Current;
    assert_eq!(stored.get(&key), Some(&upgraded.lease(&mac)));
    cluster.sync_upstream();
    cluster.wait_all_pairs();
    exchange_all(&cluster, mtu);
}

/// Echoes, datagrams and streams between all pods.
#[track_caller]
fn exchange_all(cluster: &Cluster, mtu: u32) {
    for (from, to) in cluster.pairs() {
        exchange(&cluster.pods[from], &cluster.pods[to], mtu as usize - 50);
    }
}

#[track_caller]
fn exchange(client: &Pod, server: &Pod, mtu: usize) {
    let what = format!("{} to {}", client.name, server.name);
    let whole = mtu - HEADERS;
    for (payload, dont_fragment) in [
        (8, true),
        (whole, true),
        (whole + 1, false),
        (20_000, false),
    ] {
        if let Err(error) = ping_sized(&client.ns, server.ip, payload, dont_fragment, LIMIT) {
            panic!("{what}, {payload} bytes: {error:#}");
        }
    }
    ping_sized(&client.ns, server.ip, whole + 1, true, LIMIT)
        .expect_err("more than the MTU, and not to be fragmented");
    let sizes = [1, 512, whole, whole + 1, 3 * mtu, 60_000];
    if let Err(error) = udp_echo(&server.ns, server.ip, &client.ns, &sizes) {
        panic!("{what}: {error:#}");
    }
    if let Err(error) = tcp_transfer(&server.ns, server.ip, &client.ns, STREAM) {
        panic!("{what}: {error:#}");
    }
}

#[test]
fn all_pairs_with_ebpf() {
    all_pairs(StoreKind::Etcd, 1500, &[]);
}

#[test]
fn all_pairs_with_ebpf_through_the_stack() {
    all_pairs(StoreKind::Dir, 1500, &["--bpf-fast-path=off"]);
}

#[test]
fn all_pairs_on_the_kernel_path() {
    all_pairs(StoreKind::Etcd, 1500, &["--datapath=kernel"]);
}

#[test]
fn all_pairs_without_a_vxlan_device() {
    all_pairs(StoreKind::Dir, 1500, &["--bpf-device=veth"]);
}

#[test]
fn all_pairs_with_jumbo_frames() {
    all_pairs(StoreKind::Dir, 9000, &[]);
}

#[test]
fn all_pairs_with_jumbo_frames_on_the_kernel_path() {
    all_pairs(StoreKind::Dir, 9000, &["--datapath=kernel"]);
}
