//! Nodes that upstream runs on, before ours takes over: nothing is wrong with them, and what is left over is told.

use flannel_testkit::{
    Family, privileged, process,
    upstream::{Firewall, LeaseStore, UpstreamConf},
};

use crate::{
    Findings, assert_healthy, assert_line, ended, findings,
    rig::{PATIENCE, agent_binary},
    takeover_rig::{Cluster, StoreKind, conf},
};

fn check(cluster: &Cluster) -> (Findings, i32) {
    let store = match cluster.store() {
        LeaseStore::Etcd(etcd) => format!("--etcd-endpoints={}", etcd.endpoint()),
        LeaseStore::Dir(dir) => format!("--lease-dir={}", dir.display()),
    };
    let file = format!("--subnet-file={}", cluster.nodes[0].subnet_file.display());
    let mut command = cluster.ns(0).command(agent_binary());
    command.args(["check", "-ojson", &store, &file]);
    let done = process::finish(&mut command, PATIENCE).expect("run check");
    (findings(&done), done.status.code().unwrap_or(-1))
}

#[test]
fn a_node_of_upstreams_is_fit_to_be_taken_over() {
    if !privileged() {
        return;
    }
    for (store, firewall) in [
        (StoreKind::Etcd, Firewall::Iptables),
        (StoreKind::Dir, Firewall::Nftables),
    ] {
        let mut cluster = Cluster::start(store, 3, UpstreamConf { firewall, ..conf() });
        let answer = check(&cluster);
        assert_healthy(&answer, &[]);
        let (findings, _) = &answer;
        for name in [
            "lease",
            "device",
            "peer-entries",
            "subnet-file",
            "bridge",
            "mtu",
            "port",
        ] {
            assert_eq!(findings[name].0, "OK", "{findings:#?}");
        }
        assert!(
            findings["path-mtu"].1.contains("to 2 peers"),
            "{findings:#?}"
        );
        assert_eq!(findings["agent"].0, "SKIP", "{findings:#?}");

        // As upstream leaves it when a node is deleted while it is down.
        let device = cluster.device(Family::V4);
        let ns = cluster.ns(0).clone();
        ns.ip(&format!(
            "route add 10.5.99.0/24 via 10.5.99.0 dev {device} onlink"
        ))
        .unwrap();
        let (findings, code) = check(&cluster);
        assert_eq!(code, 0, "{findings:#?}");
        assert_eq!(ended(&findings, "WARN"), ["peer-entries"], "{findings:#?}");
        assert_line(
            &findings,
            "peer-entries",
            "delete route 10.5.99.0/24",
            "start the agent",
        );

        cluster.take_over(0, &[]);
        assert_healthy(&check(&cluster), &[]);
    }
}
