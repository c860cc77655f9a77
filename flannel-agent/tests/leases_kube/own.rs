//! This node's own Node object while the agent runs.

use std::time::Duration;

use flannel_agent::leases::Store;
use serde_json::json;
use tokio::time::sleep;

use crate::{
    lease_rig::{Agent, Log, attrs, key, snapshot},
    rig::{Cluster, PREFIX, offer, until},
};

#[tokio::test]
async fn a_node_made_anew_is_annotated_again() {
    let log = Log::capture();
    let cluster = Cluster::new(&[1, 2]);
    let mut agent = cluster.agent(1).await;
    let mut other = cluster.agent(2).await;
    other
        .until("both", |view| {
            view.snapshot
                .as_ref()
                .is_some_and(|all| all.leases.len() == 2)
        })
        .await;
    cluster.api.delete_node("n1").expect("delete");
    agent
        .until("the loss", |view| view.last_error.is_some())
        .await;
    assert_eq!(
        log.lines(&["ERROR", "our Node object \"n1\" is gone"])
            .len(),
        1
    );
    assert_eq!(agent.subnet(), key("10.5.1.0-24"));
    cluster
        .api
        .create_node("n1", "10.5.1.0/24")
        .expect("create");
    until("annotations", || cluster.get("n1", "public-ip").is_some()).await;
    agent
        .until("well again", |view| view.last_error.is_none())
        .await;
    other
        .until("it again", |view| {
            view.snapshot
                .as_ref()
                .is_some_and(|all| all.leases.get(&key("10.5.1.0-24")) == Some(&attrs(1)))
        })
        .await;
    assert_eq!(log.lines(&["made anew"]).len(), 1);
    agent.stop().await;
    other.stop().await;
}

#[tokio::test]
async fn another_pod_cidr_is_another_lease() {
    let cluster = Cluster::new(&[1]);
    let mut agent = cluster.agent(1).await;
    agent
        .until("a list", |view| view.connected && view.snapshot.is_some())
        .await;
    cluster.api.delete_node("n1").expect("delete");
    cluster
        .api
        .create_node("n1", "10.5.77.0/24")
        .expect("create");
    let view = agent
        .until("the new one", |view| {
            view.own
                .as_ref()
                .is_some_and(|own| own.key == key("10.5.77.0-24"))
        })
        .await;
    assert!(
        view.snapshot
            .expect("a list")
            .leases
            .contains_key(&key("10.5.77.0-24"))
    );
    assert_eq!(
        cluster.get("n1", "public-ip").as_deref(),
        Some("192.168.77.1")
    );
    // One that must not be taken changes nothing.
    cluster.api.delete_node("n1").expect("delete");
    cluster
        .api
        .create_node("n1", "10.99.1.0/24")
        .expect("create");
    agent
        .until("a complaint", |view| {
            view.last_error
                .as_ref()
                .is_some_and(|error| error.contains("doesn't contain \"10.99.1.0/24\""))
        })
        .await;
    assert_eq!(agent.subnet(), key("10.5.77.0-24"));
    assert_eq!(cluster.get("n1", "public-ip"), None);
    agent.stop().await;
}

#[tokio::test]
async fn annotations_that_somebody_changed_are_restored() {
    let log = Log::capture();
    let cluster = Cluster::new(&[1]);
    let mut agent = cluster.agent(1).await;
    agent.until("a list", |view| view.connected).await;
    cluster.set("n1", "backend-data", None);
    until("restored", || cluster.get("n1", "backend-data").is_some()).await;
    assert_eq!(
        log.lines(&["WARN", "restoring them", "backend-data"]).len(),
        1
    );
    // Somebody who insists is not fought at full speed.
    cluster.api.forget_asked();
    for round in 0..20 {
        cluster.set(
            "n1",
            "public-ip",
            Some(&format!("192.168.77.{}", 100 + round)),
        );
        sleep(Duration::from_millis(100)).await;
    }
    let patches = cluster.asked("PATCH", "/nodes/n1/status").len();
    assert!((1..=6).contains(&patches), "{patches} patches");
    until("restored at last", || {
        cluster.get("n1", "public-ip").as_deref() == Some("192.168.77.1")
    })
    .await;
    agent.stop().await;
}

#[tokio::test]
async fn a_changed_offer_is_published() {
    let cluster = Cluster::new(&[1]);
    let mut agent = cluster.agent(1).await;
    agent.until("a list", |view| view.connected).await;
    agent.offer.send_modify(|offer| offer.attrs = attrs(9));
    until("published", || {
        cluster.get("n1", "public-ip").as_deref() == Some("192.168.77.9")
    })
    .await;
    agent
        .until("in the view", |view| {
            view.own.as_ref().is_some_and(|own| own.attrs == attrs(9))
        })
        .await;
    agent.stop().await;
}

#[tokio::test]
async fn the_administrators_address_comes_and_goes_while_running() {
    let log = Log::capture();
    let cluster = Cluster::new(&[1]);
    let mut agent = cluster.agent(1).await;
    agent.until("a list", |view| view.connected).await;
    cluster.set("n1", "public-ip-overwrite", Some("203.0.113.9"));
    until("published", || {
        cluster.get("n1", "public-ip").as_deref() == Some("203.0.113.9")
    })
    .await;
    let line = format!(
        "Overriding public ip with '203.0.113.9' from node annotation '{PREFIX}public-ip-overwrite'"
    );
    assert_eq!(log.lines(&[&line]).len(), 1);
    agent
        .until("in the view", |view| {
            view.own
                .as_ref()
                .is_some_and(|own| own.attrs.public_ip == Some([203, 0, 113, 9].into()))
        })
        .await;
    assert_eq!(log.lines(&["restoring"]), [""; 0]);
    cluster.set("n1", "public-ip-overwrite", None);
    until("our own again", || {
        cluster.get("n1", "public-ip").as_deref() == Some("192.168.77.1")
    })
    .await;
    agent.stop().await;
}

#[tokio::test]
async fn the_administrators_word_on_the_nodes_address_is_read() {
    let cluster = Cluster::new(&[1]);
    cluster.set("n1", "node-public-ip", Some("192.168.77.50"));
    let Store::Kube(kube) = Store::open(&cluster.config(1)).await.expect("open") else {
        panic!("another store");
    };
    kube.sync(&offer(1).conf, |_| {}).await;
    assert_eq!(
        kube.node_addresses().public_ip,
        Some([192, 168, 77, 50].into())
    );
}

#[tokio::test]
async fn two_nodes_with_one_address_are_told_of_once() {
    let log = Log::capture();
    let cluster = Cluster::new(&[1, 2]);
    cluster.allow_events();
    cluster.peer("n2", 1);
    let mut agent = cluster.agent(1).await;
    agent
        .until("both", |view| {
            view.snapshot
                .as_ref()
                .is_some_and(|all| all.leases.len() == 2)
        })
        .await;
    until("an Event", || cluster.event("DuplicatePublicIP").is_some()).await;
    cluster
        .api
        .create_node("n3", "10.5.3.0/24")
        .expect("create");
    cluster.peer("n3", 3);
    agent
        .until("three", |view| {
            view.snapshot
                .as_ref()
                .is_some_and(|all| all.leases.len() == 3)
        })
        .await;
    assert_eq!(
        log.lines(&[
            "WARN",
            r#"nodes "n1", "n2" publish the same address 192.168.77.1"#
        ])
        .len(),
        1
    );
    agent.stop().await;
}

#[tokio::test]
async fn a_peer_with_our_subnet_does_not_get_it() {
    let log = Log::capture();
    let cluster = Cluster::new(&[1]);
    cluster
        .api
        .create(
            flannel_testkit::apiserver::Kind::Node,
            json!({
                "metadata": {"name": "twin"}, "spec": {"podCIDRs": ["10.5.1.0/24"]},
            }),
        )
        .expect("a node");
    cluster.peer("twin", 7);
    let mut agent: Agent = cluster.agent(1).await;
    let view = agent.until("a list", |view| view.snapshot.is_some()).await;
    assert_eq!(
        view.snapshot.expect("a list").leases[&key("10.5.1.0-24")],
        attrs(1)
    );
    assert_eq!(
        log.lines(&["WARN", r#"node "twin" has our subnet"#]).len(),
        1
    );
    agent.stop().await;
}

#[tokio::test]
async fn an_answer_that_takes_long_holds_up_nothing_else() {
    let cluster = Cluster::new(&[1, 2]);
    let mut agent = cluster.agent(1).await;
    agent.until("connected", |view| view.connected).await;
    // The watch is open, only new requests wait.
    cluster.api.delay(Duration::from_secs(10));
    cluster.set("n1", "backend-data", None);
    sleep(Duration::from_millis(300)).await;
    for host in [2, 3] {
        cluster.peer("n2", host);
        agent
            .until_leases(
                "a peer",
                &snapshot(&[("10.5.1.0-24", 1), ("10.5.2.0-24", host)]),
            )
            .await;
    }
    assert_eq!(cluster.get("n1", "backend-data"), None, "answered by now");
    cluster.api.delay(Duration::ZERO);
    until("restored", || cluster.get("n1", "backend-data").is_some()).await;
    agent.stop().await;
}
