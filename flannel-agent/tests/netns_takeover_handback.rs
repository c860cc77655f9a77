//! Handing a node back for good: the programs go, everything else stays, and what upstream programs from then on counts.

mod rig;
mod takeover_rig;

use std::net::{Ipv4Addr, Ipv6Addr};

use flannel_testkit::{Families, Family, privileged, process};
use rig::{PATIENCE, agent_binary};
use takeover_rig::{Cluster, StoreKind, Traffic, conf_of};

/// `flannel-agent cleanup --keep-device` on a node.
fn detach(cluster: &Cluster, node: usize) -> process::Finished {
    let upstream = &cluster.nodes[node];
    let mut command = upstream.ns.command(agent_binary());
    command
        .args(["cleanup", "--keep-device", "--subnet-file"])
        .arg(&upstream.subnet_file);
    process::finish(&mut command, PATIENCE).expect("run the agent")
}

/// The peer's machine is replaced: another MAC address under the same lease, and another public address if it `moves`, of each family.
fn replace_peer(cluster: &mut Cluster, moves: bool) {
    let families = cluster.families();
    let peer = &mut cluster.nodes[1];
    (peer.mac, peer.mac_v6) = ([0x0a, 0, 0, 0, 0x12, 0x34], [0x0a, 0, 0, 0, 0x12, 0x36]);
    let was = [Family::V4, Family::V6].map(|family| peer.address(family));
    if moves {
        peer.public_ip = Ipv4Addr::new(192, 168, 77, 150);
        peer.public_ipv6 = Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 0x150);
    }
    for family in families {
        let device = peer.conf.device(family);
        peer.ns.ip(&format!("link del {device}")).unwrap();
        if !moves {
            continue;
        }
        let (len, rest, gateway) = match family {
            Family::V4 => (24, "", "192.168.77.1"),
            Family::V6 => (64, "nodad", "fd77::1"),
        };
        let [old, new] = [was[usize::from(family == Family::V6)], peer.address(family)];
        for line in [
            format!("addr del {old}/{len} dev eth0"),
            format!("addr add {new}/{len} dev eth0 {rest}"),
            format!("route replace default via {gateway}"),
        ] {
            peer.ns.ip(&line).unwrap();
        }
    }
    cluster.start_upstream(1);
    cluster.sync_upstream();
}

fn hands_back(families: impl Into<Families>, flags: &[&str]) {
    if !privileged() {
        return;
    }
    let families = families.into();
    let store = match families {
        // Nodes with IPv6 alone are one to upstream in etcd.
        Families::V6 => StoreKind::Dir,
        _ => StoreKind::Etcd,
    };
    let mut cluster = Cluster::start(store, 2, conf_of(families));
    if flags.contains(&"--bpf-attach=clsact") {
        // The first qdisc on a device costs what is sent at that moment.
        cluster.take_over(0, flags);
        cluster.stop_agent(0);
    }
    let (kernel, identity) = (cluster.kernel(0), cluster.identity(0));
    let traffic = Traffic::start(&cluster);
    cluster.take_over(0, flags);
    cluster.wait_grown("eBPF carries", 200, |it, family| {
        [it.carried(0, family)[0]; 2]
    });
    let refused = detach(&cluster, 0);
    assert!(
        !refused.status.success() && refused.stderr.contains("an agent is running"),
        "{refused:?}"
    );
    cluster.stop_agent(0);
    let done = detach(&cluster, 0);
    assert!(done.status.success(), "{done:?}");
    assert!(done.stdout.contains("removed eBPF programs"), "{done:?}");
    cluster.no_programs(0);
    kernel.assert_same(&cluster.kernel(0), "without programs");
    assert_eq!(cluster.identity(0), identity);
    cluster.wait_grown("the kernel carries", 200, |it, family| {
        it.by_kernel(0, family)
    });
    assert_eq!(cluster.start_upstream(0), None);
    kernel.assert_same(&cluster.kernel(0), "handed back");
    traffic.assert_untouched();

    replace_peer(&mut cluster, true);
    cluster.wait_all_pairs();

    // Nothing is left to detach, and taking over again is as before.
    let again = detach(&cluster, 0);
    assert!(again.status.success(), "{again:?}");
    let traffic = Traffic::start(&cluster);
    cluster.take_over(0, flags);
    cluster.wait_grown("eBPF carries", 200, |it, family| {
        [it.carried(0, family)[0]; 2]
    });
    traffic.assert_untouched();
}

#[test]
fn detached_and_handed_back() {
    hands_back(Family::V4, &[]);
}

#[test]
fn detached_and_handed_back_with_ipv6() {
    hands_back(Family::V6, &[]);
}

#[test]
fn detached_and_handed_back_with_both_families() {
    hands_back(Families::Dual, &[]);
}

#[test]
fn detached_and_handed_back_through_the_stack() {
    hands_back(Family::V4, &["--bpf-fast-path=off"]);
}

#[test]
fn detached_and_handed_back_by_clsact() {
    hands_back(Family::V4, &["--bpf-attach=clsact"]);
}

#[test]
fn detached_and_handed_back_by_clsact_with_both_families() {
    hands_back(Families::Dual, &["--bpf-attach=clsact"]);
}

/// Without that the programs go on, but what the kernel would send elsewhere they leave to it.
#[test]
fn a_peer_that_changes_after_a_plain_stop_is_still_reached() {
    changes_after_a_stop(Family::V4, &["--bpf-fast-path=off"]);
    changes_after_a_stop(Family::V4, &[]);
}

#[test]
fn a_peer_of_ipv6_that_changes_after_a_plain_stop_is_still_reached() {
    changes_after_a_stop(Family::V6, &["--bpf-fast-path=off"]);
    changes_after_a_stop(Family::V6, &[]);
}

fn changes_after_a_stop(family: Family, flags: &[&str]) {
    if !privileged() {
        return;
    }
    let mut cluster = Cluster::start(StoreKind::Dir, 2, conf_of(family));
    cluster.take_over(0, flags);
    let traffic = Traffic::start(&cluster);
    cluster.wait_grown("eBPF carries", 200, |it, family| {
        [it.carried(0, family)[0]; 2]
    });
    cluster.stop_agent(0);
    cluster.start_upstream(0);
    traffic.assert_untouched();
    replace_peer(&mut cluster, false);
    cluster.wait_all_pairs();
}

#[test]
fn a_device_that_only_ebpf_serves_is_not_kept() {
    for family in Family::ALL {
        only_ebpf_serves(family);
    }
}

fn only_ebpf_serves(family: Family) {
    if !privileged() {
        return;
    }
    let mut cluster = Cluster::new(StoreKind::Dir, &[conf_of(family)], 1500);
    cluster.take_over(0, &["--bpf-device=veth"]);
    cluster.stop_agent(0);
    let refused = detach(&cluster, 0);
    assert!(
        !refused.status.success() && refused.stderr.contains("use cleanup without it"),
        "{refused:?}"
    );
    cluster.programs(0).expect("the programs are still there");
}
