//! An API that does not answer.

use std::fs;

use flannel_agent::leases::{KubeOptions, Origin, Store};
use flannel_testkit::apiserver::{Failure, Kind};
use serde_json::json;
use tokio::time::timeout;

use crate::{
    lease_rig::{Agent, Log, PATIENCE, key, snapshot},
    rig::{Cluster, offer, store, until, with_conf},
};

/// Runs an agent until its last known state is on disk with both nodes.
async fn remembered() -> Cluster {
    let cluster = Cluster::new(&[1, 2, 3]);
    cluster.peer("n2", 2);
    let mut agent = cluster.agent(1).await;
    agent
        .until_leases("both", &snapshot(&[("10.5.1.0-24", 1), ("10.5.2.0-24", 2)]))
        .await;
    until("the file", || {
        fs::read_to_string(cluster.memory(1))
            .is_ok_and(|text| text.contains("n2") && text.contains("192.168.77.1\""))
    })
    .await;
    agent.stop().await;
    cluster
}

#[tokio::test]
async fn a_start_goes_by_the_last_known_state() {
    for hanging in [false, true] {
        let log = Log::capture();
        let cluster = remembered().await;
        if hanging {
            cluster.api.hang(true);
        } else {
            cluster.api.stop().expect("stop");
        }
        let opened = Store::open(&cluster.config(1)).await.expect("open");
        let Store::Kube(kube) = opened.twin() else {
            panic!("another store");
        };
        let origin = timeout(PATIENCE, kube.sync(&offer(1).conf, |_| {}))
            .await
            .expect("in time");
        assert!(
            matches!(&origin, Origin::Memory(text) if text.contains("last known state")),
            "{origin:?}"
        );
        assert_eq!(
            log.lines(&["WARN", "started from the last known state", "1 other nodes"])
                .len(),
            1
        );
        drop((opened, kube));
        // While it is away nodes change, and one goes.
        cluster.peer("n3", 3);
        cluster.api.delete_node("n2").expect("delete");
        let config = cluster.config(1);
        let opened = Store::open(&config).await.expect("open");
        let Store::Kube(kube) = opened.twin() else {
            panic!("another store");
        };
        kube.sync(&offer(1).conf, |_| {}).await;
        let mut agent = Agent::start_with(opened, offer(1)).await;
        let view = agent
            .until_leases(
                "as last known",
                &snapshot(&[("10.5.1.0-24", 1), ("10.5.2.0-24", 2)]),
            )
            .await;
        assert!(!view.connected);
        if hanging {
            cluster.api.hang(false);
            cluster.api.cut_connections().expect("cut");
        } else {
            cluster.api.resume().expect("resume");
        }
        agent
            .until_leases(
                "as it is",
                &snapshot(&[("10.5.1.0-24", 1), ("10.5.3.0-24", 3)]),
            )
            .await;
        agent.stop().await;
    }
}

/// A store that has started from the last known state, and knows of itself only its pod.
async fn started_without_a_name() -> (Cluster, Store) {
    let cluster = remembered().await;
    cluster.api.stop().expect("stop");
    let options = KubeOptions {
        node_name: None,
        pod_name: Some("p".into()),
        pod_namespace: Some("kube-flannel".into()),
        ..cluster.options(1)
    };
    let opened = Store::open(&store(options)).await.expect("open");
    let Store::Kube(kube) = opened.twin() else {
        panic!("another store");
    };
    kube.sync(&offer(1).conf, |_| {}).await;
    (cluster, opened)
}

#[tokio::test]
async fn the_name_of_the_node_is_in_the_last_known_state_too() {
    let (_cluster, opened) = started_without_a_name().await;
    assert!(
        opened.describe().ends_with("node n1"),
        "{}",
        opened.describe()
    );
}

#[tokio::test]
async fn a_remembered_name_that_is_wrong_is_put_right() {
    let log = Log::capture();
    let (cluster, opened) = started_without_a_name().await;
    let mut agent = Agent::start_with(opened, offer(1)).await;
    let view = agent.until("a list", |view| view.snapshot.is_some()).await;
    assert_eq!(view.own.map(|own| own.key), Some(key("10.5.1.0-24")));
    // Meanwhile the machine has become another node, and its name another's.
    cluster.set("n1", "public-ip", Some("192.168.77.99"));
    let pod = json!({
        "metadata": {"name": "p", "namespace": "kube-flannel"},
        "spec": {"nodeName": "n3"},
    });
    cluster.api.create(Kind::Pod, pod).expect("a pod");
    cluster.api.resume().expect("resume");
    agent
        .until("our subnet", |view| {
            view.own
                .as_ref()
                .is_some_and(|own| own.key == key("10.5.3.0-24"))
        })
        .await;
    assert_eq!(
        log.lines(&["WARN", "this node is \"n3\"", "\"n1\""]).len(),
        1
    );
    until("annotations", || {
        cluster.get("n3", "public-ip").as_deref() == Some("192.168.77.1")
    })
    .await;
    assert_eq!(
        cluster.get("n1", "public-ip").as_deref(),
        Some("192.168.77.99"),
        "the other node's"
    );
    agent.stop().await;
}

#[tokio::test]
async fn a_state_of_another_network_is_not_used() {
    let log = Log::capture();
    let cluster = remembered().await;
    cluster.api.stop().expect("stop");
    let opened = Store::open(&cluster.config(1)).await.expect("open");
    let Store::Kube(kube) = opened else {
        panic!("another store");
    };
    let conf = with_conf(1, r#"{"Network":"10.0.0.0/8","Backend":{"Type":"vxlan"}}"#).conf;
    let waits = async {
        log.until(&["the last known state is not used"]).await;
        cluster.api.resume().expect("resume");
    };
    let (origin, ()) = timeout(PATIENCE, async {
        tokio::join!(kube.sync(&conf, |_| {}), waits)
    })
    .await
    .expect("in time");
    assert_eq!(origin, Origin::Api);
    for line in [
        "Waiting 10m0s for node controller to sync",
        "Node controller sync successful",
        "Created subnet manager: Kubernetes Subnet Manager - n1",
    ] {
        assert_eq!(log.lines(&[line]).len(), 1, "{line}");
    }
}

#[tokio::test]
async fn failures_pass() {
    let cluster = Cluster::new(&[1]);
    for code in [429, 500, 503] {
        cluster.api.fail(Failure {
            times: Some(2),
            ..Failure::code(code)
        });
    }
    let mut agent = cluster.agent(1).await;
    agent.until("connected", |view| view.connected).await;
    assert!(cluster.get("n1", "public-ip").is_some());
    agent.stop().await;
}
