//! Handing a node back for good: the programs go, everything else stays, and what upstream programs from then on counts.

mod rig;
mod takeover_rig;

use std::net::Ipv4Addr;

use flannel_testkit::{privileged, process};
use rig::{PATIENCE, agent_binary};
use takeover_rig::{Cluster, StoreKind, Traffic, conf};

/// `flannel-agent cleanup --keep-device` on a node.
fn detach(cluster: &Cluster, node: usize) -> process::Finished {
    let upstream = &cluster.nodes[node];
    let mut command = upstream.ns.command(agent_binary());
    command
        .args(["cleanup", "--keep-device", "--subnet-file"])
        .arg(&upstream.subnet_file);
    process::finish(&mut command, PATIENCE).expect("run the agent")
}

/// The peer's machine is replaced: another MAC address under the same lease, and another public address if it `moves`.
fn replace_peer(cluster: &mut Cluster, moves: bool) {
    let peer = &mut cluster.nodes[1];
    peer.ns.ip("link del flannel.1").unwrap();
    peer.mac = [0x0a, 0, 0, 0, 0x12, 0x34];
    if moves {
        let [old, new] = [peer.public_ip, Ipv4Addr::new(192, 168, 77, 150)];
        peer.ns.ip(&format!("addr del {old}/24 dev eth0")).unwrap();
        peer.ns.ip(&format!("addr add {new}/24 dev eth0")).unwrap();
        peer.ns
            .ip("route replace default via 192.168.77.1")
            .unwrap();
        peer.public_ip = new;
    }
    cluster.start_upstream(1);
    cluster.sync_upstream();
}

fn hands_back(flags: &[&str]) {
    if !privileged() {
        return;
    }
    let mut cluster = Cluster::start(StoreKind::Etcd, 2, conf());
    if flags.contains(&"--bpf-attach=clsact") {
        // The first qdisc on a device costs what is sent at that moment.
        cluster.take_over(0, flags);
        cluster.stop_agent(0);
    }
    let (kernel, identity) = (cluster.kernel(0), cluster.identity(0));
    let traffic = Traffic::start(&cluster);
    cluster.take_over(0, flags);
    cluster.wait_grown("eBPF carries", 200, |it| [it.carried(0)[0]; 2]);
    let refused = detach(&cluster, 0);
    assert!(
        !refused.status.success() && refused.stderr.contains("an agent is running"),
        "{refused:?}"
    );
    cluster.stop_agent(0);
    let done = detach(&cluster, 0);
    assert!(done.status.success(), "{done:?}");
    assert!(done.stdout.contains("removed eBPF programs"), "{done:?}");
    cluster.programs(0).expect_err("no programs");
    kernel.assert_same(&cluster.kernel(0), "without programs");
    assert_eq!(cluster.identity(0), identity);
    cluster.wait_grown("the kernel carries", 200, |it| it.by_kernel(0));
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
    cluster.wait_grown("eBPF carries", 200, |it| [it.carried(0)[0]; 2]);
    traffic.assert_untouched();
}

#[test]
fn detached_and_handed_back() {
    hands_back(&[]);
}

#[test]
fn detached_and_handed_back_through_the_stack() {
    hands_back(&["--bpf-fast-path=off"]);
}

#[test]
fn detached_and_handed_back_by_clsact() {
    hands_back(&["--bpf-attach=clsact"]);
}

/// Without that the programs go on, but what the kernel would send elsewhere they leave to it.
#[test]
fn a_peer_that_changes_after_a_plain_stop_is_still_reached() {
    if !privileged() {
        return;
    }
    for flags in [&["--bpf-fast-path=off"][..], &[]] {
        let mut cluster = Cluster::start(StoreKind::Dir, 2, conf());
        cluster.take_over(0, flags);
        let traffic = Traffic::start(&cluster);
        cluster.wait_grown("eBPF carries", 200, |it| [it.carried(0)[0]; 2]);
        cluster.stop_agent(0);
        cluster.start_upstream(0);
        traffic.assert_untouched();
        replace_peer(&mut cluster, false);
        cluster.wait_all_pairs();
    }
}

#[test]
fn a_device_that_only_ebpf_serves_is_not_kept() {
    if !privileged() {
        return;
    }
    let mut cluster = Cluster::new(StoreKind::Dir, &[conf()], 1500);
    cluster.take_over(0, &["--bpf-device=veth"]);
    cluster.stop_agent(0);
    let refused = detach(&cluster, 0);
    assert!(
        !refused.status.success() && refused.stderr.contains("use cleanup without it"),
        "{refused:?}"
    );
    cluster.programs(0).expect("the programs are still there");
}
