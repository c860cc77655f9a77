//! On a node that runs upstream our agent starts, stops and dies, and upstream starts again: MAC, lease and device stay, the kernel's
//! state stays complete, and no packet is lost.

mod rig;
mod takeover_rig;

use flannel_testkit::{
    Families, Family, eventually, privileged,
    upstream::{Firewall, UpstreamConf},
};
use rig::PATIENCE;
use takeover_rig::{Cluster, Monitor, StoreKind, Traffic, conf_of};

/// The way to attach programs on kernels before 6.6.
const CLSACT: &str = "--bpf-attach=clsact";

/// Who carries the packets while our agent runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Carrier {
    Bpf,
    Kernel,
}

/// Upstream to us, killed, started, stopped, upstream again, us again: under traffic, with a peer of upstream's and then with a
/// peer of ours.
fn round_trip(
    families: impl Into<Families>,
    store: StoreKind,
    firewall: Firewall,
    flags: &[&str],
    carrier: Carrier,
) {
    if !privileged() {
        return;
    }
    let mut cluster = Cluster::start(
        store,
        2,
        UpstreamConf {
            firewall,
            ..conf_of(families)
        },
    );
    if flags.contains(&CLSACT) {
        // To add any qdisc the kernel stops a device's queues for a moment and drops what is sent then (`dev_deactivate`, seen with
        // `tc qdisc add dev eth0 clsact` alone on 6.18). Where there are no tcx links the first start cannot be without that; all
        // later ones find the qdisc.
        for node in 0..2 {
            cluster.take_over(node, flags);
            cluster.stop_agent(node);
            cluster.start_upstream(node);
        }
    }
    let (kernel, identity) = (cluster.kernel(0), cluster.identity(0));
    let same = |cluster: &Cluster, when: &str| {
        kernel.assert_same(&cluster.kernel(0), when);
        assert_eq!(cluster.identity(0), identity, "{when}");
    };
    let monitor = Monitor::start(&cluster, 0);
    let traffic = Traffic::start(&cluster);
    let attached = flags.contains(&CLSACT);
    carries(&cluster, if attached { carrier } else { Carrier::Kernel });

    for round in ["taken over", "taken over again"] {
        cluster.take_over(0, flags);
        same(&cluster, round);
        carries(&cluster, carrier);

        cluster.kill_agent(0);
        same(&cluster, "killed");
        carries(&cluster, carrier);
        cluster.take_over(0, flags);
        same(&cluster, "started after a crash");
        carries(&cluster, carrier);

        cluster.stop_agent(0);
        same(&cluster, "stopped");
        let recreated = cluster.start_upstream(0);
        assert_eq!(recreated, None, "upstream accepts the device");
        same(&cluster, "handed back");
        carries(&cluster, carrier);
    }

    // The peer becomes ours too, and is handed back last.
    cluster.take_over(1, flags);
    cluster.take_over(0, flags);
    same(&cluster, "both are ours");
    carries(&cluster, carrier);
    if carrier == Carrier::Bpf {
        cluster.wait_grown("eBPF carries both ways", 200, |it, family| {
            it.carried(0, family)
        });
    }
    // Upstream may also come after a crash of ours.
    cluster.kill_agent(0);
    cluster.start_upstream(0);
    cluster.stop_agent(1);
    cluster.start_upstream(1);
    same(&cluster, "both are upstream's again");

    traffic.assert_untouched();
    assert_eq!(monitor.stop(), [""; 0], "removed on the way");
}

/// Programs are attached and carry the traffic, or there are none and the device does.
#[track_caller]
fn carries(cluster: &Cluster, carrier: Carrier) {
    match carrier {
        Carrier::Bpf => {
            eventually(PATIENCE, "programs at both hooks", || cluster.programs(0));
            // What a peer of upstream's sends has a checksum that no veth pair has verified: the kernel's device takes it.
            cluster.wait_grown("eBPF carries", 200, |it, family| {
                [it.carried(0, family)[0]; 2]
            });
        }
        Carrier::Kernel => {
            cluster.no_programs(0);
            cluster.wait_grown("the kernel carries", 200, |it, family| {
                it.by_kernel(0, family)
            });
        }
    }
}

#[test]
fn round_trip_by_etcd_and_iptables() {
    let firewall = Firewall::Iptables;
    round_trip(Family::V4, StoreKind::Etcd, firewall, &[], Carrier::Bpf);
}

#[test]
fn round_trip_by_etcd_and_iptables_with_both_families() {
    let firewall = Firewall::Iptables;
    round_trip(Families::Dual, StoreKind::Etcd, firewall, &[], Carrier::Bpf);
}

#[test]
fn round_trip_by_etcd_3_5_and_nftables_on_the_kernel_path() {
    round_trip(
        Family::V4,
        StoreKind::Etcd35,
        Firewall::Nftables,
        &["--datapath=kernel"],
        Carrier::Kernel,
    );
}

#[test]
fn round_trip_by_etcd_3_5_and_nftables_on_the_kernel_path_with_both_families() {
    round_trip(
        Families::Dual,
        StoreKind::Etcd35,
        Firewall::Nftables,
        &["--datapath=kernel"],
        Carrier::Kernel,
    );
}

/// The store is a directory: in etcd upstream cannot tell nodes with IPv6 alone from each other.
fn by_directory(family: Family, firewall: Firewall, flags: &[&str], carrier: Carrier) {
    round_trip(family, StoreKind::Dir, firewall, flags, carrier);
}

#[test]
fn round_trip_by_directory_and_nftables_through_the_stack() {
    let flags = ["--bpf-fast-path=off"];
    by_directory(Family::V4, Firewall::Nftables, &flags, Carrier::Bpf);
}

#[test]
fn round_trip_of_ipv6_and_nftables_through_the_stack() {
    let flags = ["--bpf-fast-path=off"];
    by_directory(Family::V6, Firewall::Nftables, &flags, Carrier::Bpf);
}

#[test]
fn round_trip_by_directory_and_iptables_on_the_kernel_path() {
    let flags = ["--datapath=kernel"];
    by_directory(Family::V4, Firewall::Iptables, &flags, Carrier::Kernel);
}

#[test]
fn round_trip_of_ipv6_and_iptables_on_the_kernel_path() {
    let flags = ["--datapath=kernel"];
    by_directory(Family::V6, Firewall::Iptables, &flags, Carrier::Kernel);
}

#[test]
fn round_trip_by_directory_and_iptables_with_established_flows_around_the_stack() {
    let flags = ["--bpf-fast-path=established"];
    by_directory(Family::V4, Firewall::Iptables, &flags, Carrier::Bpf);
}

#[test]
fn round_trip_of_ipv6_and_iptables_with_established_flows_around_the_stack() {
    let flags = ["--bpf-fast-path=established"];
    by_directory(Family::V6, Firewall::Iptables, &flags, Carrier::Bpf);
}

#[test]
fn round_trip_by_etcd_and_nftables_with_flows_around_the_stack_from_their_first_packet() {
    let flags = ["--bpf-fast-path=syn"];
    round_trip(
        Family::V4,
        StoreKind::Etcd,
        Firewall::Nftables,
        &flags,
        Carrier::Bpf,
    );
}

#[test]
fn round_trip_with_clsact_filters() {
    by_directory(Family::V4, Firewall::Iptables, &[CLSACT], Carrier::Bpf);
}

#[test]
fn round_trip_of_ipv6_with_clsact_filters() {
    by_directory(Family::V6, Firewall::Iptables, &[CLSACT], Carrier::Bpf);
}
