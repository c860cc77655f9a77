//! Clusters in which upstream v0.28.9, upstream v0.12.0 (which knows no IPv6) and ours each run on a node: all pairs, both ways, every
//! size.

mod rig;
mod takeover_rig;

use std::time::Duration;

use flannel_testkit::{
    Families, Family, Netns, Pod, json, privileged,
    traffic::{Amount, ping_sized, tcp_transfer, udp_echo},
    upstream::{Firewall, Release, UpstreamConf},
};
use takeover_rig::{Cluster, StoreKind, conf_of};

/// The node that ours runs on.
const OURS: usize = 2;
const LIMIT: Duration = Duration::from_secs(3);
const STREAM: Amount = Amount::Bytes(1 << 20);

fn all_pairs(families: impl Into<Families>, store: StoreKind, mtu: u32, flags: &[&str]) {
    if !privileged() {
        return;
    }
    let families = families.into();
    let current = UpstreamConf {
        mtu,
        ..conf_of(families)
    };
    let older = UpstreamConf {
        release: match families {
            Families::V4 => Release::V0_12,
            _ => Release::Current,
        },
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
    let lease = ours.lease().unwrap();
    assert_eq!(stored.remove(&ours.lease_key()), Some(lease));
    assert_eq!(stored, before);

    // The older node is taken over as well: its lease gets what v0.28.9 would write, the MAC address stays.
    let mut upgraded = cluster.nodes[1].clone();
    upgraded.conf.release = Release::Current;
    let (key, lease) = (upgraded.lease_key(), upgraded.lease().unwrap());
    cluster.take_over(1, flags);
    let stored = cluster.store().stored().unwrap();
    assert_eq!(stored.get(&key), Some(&lease));
    cluster.sync_upstream();
    cluster.wait_all_pairs();
    exchange_all(&cluster, mtu);
}

/// Echoes, datagrams and streams between all pods, over every family.
#[track_caller]
fn exchange_all(cluster: &Cluster, underlay: u32) {
    for (from, to) in cluster.pairs() {
        for family in cluster.families() {
            let [mtu, back] = [(from, to), (to, from)].map(|way| path(cluster, way, family));
            let whole = (underlay - family.overhead()) as usize;
            // Beside IPv6 ours gives pods what fits into either tunnel.
            let less = family == Family::V4 && cluster.families().len() == 2 && mtu == whole - 20;
            assert!(mtu == whole || less, "{from} to {to} over {family}: {mtu}");
            let pods = [from, to].map(|pod| mtu_of(&cluster.pods[pod].ns, "eth0"));
            // Then a sender learns the size from what is lost, there and back.
            let lossy = pods.iter().any(|pod| *pod > mtu.min(back));
            exchange((&cluster.pods[from], &cluster.pods[to]), family, mtu, lossy);
        }
    }
}

/// Bytes of the largest packet that gets from a pod to another: upstream gives pods 20 bytes too many for IPv6, ours does not.
fn path(cluster: &Cluster, (from, to): (usize, usize), family: Family) -> usize {
    let tunnel = mtu_of(cluster.ns(from), &cluster.device(family));
    let pods = [from, to].map(|pod| mtu_of(&cluster.pods[pod].ns, "eth0"));
    tunnel.min(pods[0]).min(pods[1])
}

fn mtu_of(ns: &Netns, device: &str) -> usize {
    let mtu = json::link(ns, device).unwrap()["mtu"].as_u64();
    mtu.expect("an MTU").try_into().unwrap()
}

/// Does it, twice more where packets may be lost until their sender knows the path.
#[track_caller]
fn tried(lossy: bool, what: &str, attempt: impl Fn() -> anyhow::Result<()>) {
    let mut done = attempt();
    for _ in 0..2 {
        if done.is_err() && lossy {
            done = attempt();
        }
    }
    if let Err(error) = done {
        panic!("{what}: {error:#}");
    }
}

#[track_caller]
fn exchange((client, server): (&Pod, &Pod), family: Family, mtu: usize, lossy: bool) {
    let what = format!("{} to {} over {family}", client.name, server.name);
    let ip = server.address(family);
    let whole = mtu - family.header() - 8;
    let limit = if lossy { LIMIT / 3 } else { LIMIT };
    let ping = |payload, dont_fragment| {
        ping_sized(&client.ns, ip, payload, dont_fragment, limit).map(drop)
    };
    for (payload, dont_fragment) in [
        (8, true),
        (whole, true),
        (whole + 1, false),
        (20_000, false),
    ] {
        tried(
            lossy && !dont_fragment,
            &format!("{what}, {payload} bytes"),
            || ping(payload, dont_fragment),
        );
    }
    ping(whole + 1, true).expect_err("more than the MTU, and not to be fragmented");
    let sizes = [1, 512, whole, whole + 1, 3 * mtu, 60_000];
    tried(lossy, &what, || {
        udp_echo(&server.ns, ip, &client.ns, &sizes)
    });
    if let Err(error) = tcp_transfer(&server.ns, ip, &client.ns, STREAM) {
        panic!("{what}: {error:#}");
    }
}

#[test]
fn all_pairs_with_ebpf() {
    all_pairs(Family::V4, StoreKind::Etcd, 1500, &[]);
}

#[test]
fn all_pairs_with_ebpf_through_the_stack() {
    all_pairs(Family::V4, StoreKind::Dir, 1500, &["--bpf-fast-path=off"]);
}

#[test]
fn all_pairs_on_the_kernel_path() {
    all_pairs(Family::V4, StoreKind::Etcd, 1500, &["--datapath=kernel"]);
}

#[test]
fn all_pairs_without_a_vxlan_device() {
    all_pairs(Family::V4, StoreKind::Dir, 1500, &["--bpf-device=veth"]);
}

#[test]
fn all_pairs_with_jumbo_frames() {
    all_pairs(Family::V4, StoreKind::Dir, 9000, &[]);
}

#[test]
fn all_pairs_with_jumbo_frames_on_the_kernel_path() {
    all_pairs(Family::V4, StoreKind::Dir, 9000, &["--datapath=kernel"]);
}

#[test]
fn all_pairs_of_ipv6_with_ebpf() {
    all_pairs(Family::V6, StoreKind::Dir, 1500, &[]);
}

#[test]
fn all_pairs_of_ipv6_on_the_kernel_path() {
    all_pairs(Family::V6, StoreKind::Dir, 1500, &["--datapath=kernel"]);
}

#[test]
fn all_pairs_of_ipv6_without_a_vxlan_device() {
    all_pairs(Family::V6, StoreKind::Dir, 1500, &["--bpf-device=veth"]);
}

#[test]
fn all_pairs_of_both_families_with_ebpf() {
    all_pairs(Families::Dual, StoreKind::Etcd, 1500, &[]);
}

#[test]
fn all_pairs_of_both_families_through_the_stack_with_jumbo_frames() {
    let flags = ["--bpf-fast-path=off"];
    all_pairs(Families::Dual, StoreKind::Dir, 9000, &flags);
}
