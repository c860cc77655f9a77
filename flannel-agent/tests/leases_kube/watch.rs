//! Following the other nodes.

use std::time::Duration;

use flannel_testkit::apiserver::{Gone, Kind, WatchEnd};
use serde_json::json;

use crate::{
    lease_rig::{Agent, Log, attrs, key, snapshot},
    rig::{Cluster, until, with_conf},
};

#[tokio::test]
async fn nodes_come_change_and_go() {
    let log = Log::capture();
    let cluster = Cluster::new(&[1, 2, 3]);
    cluster.peer("n2", 2);
    let mut agent = cluster.agent(1).await;
    agent
        .until_leases(
            "the list",
            &snapshot(&[("10.5.1.0-24", 1), ("10.5.2.0-24", 2)]),
        )
        .await;
    cluster.peer("n3", 3);
    agent
        .until_leases(
            "another",
            &snapshot(&[("10.5.1.0-24", 1), ("10.5.2.0-24", 2), ("10.5.3.0-24", 3)]),
        )
        .await;
    cluster.peer("n3", 33);
    agent
        .until_leases(
            "its change",
            &snapshot(&[("10.5.1.0-24", 1), ("10.5.2.0-24", 2), ("10.5.3.0-24", 33)]),
        )
        .await;
    // Annotations that cannot be read cost a node nothing that was read before, nor does taking them away.
    cluster.set("n3", "backend-data", Some("{"));
    log.until(&["WARN", r#"Error turning node "n3" to lease"#])
        .await;
    cluster.set("n2", "kube-subnet-manager", None);
    log.until(&["WARN", r#"node "n2" has lost annotations"#])
        .await;
    let leases = agent
        .view
        .borrow()
        .snapshot
        .clone()
        .expect("a list")
        .leases
        .len();
    assert_eq!(leases, 3);
    cluster.api.delete_node("n2").expect("delete");
    agent
        .until_leases(
            "one less",
            &snapshot(&[("10.5.1.0-24", 1), ("10.5.3.0-24", 33)]),
        )
        .await;
    agent.stop().await;
}

#[tokio::test]
async fn heartbeats_are_no_news() {
    let log = Log::capture();
    let cluster = Cluster::new(&[1, 2]);
    cluster.peer("n2", 2);
    let mut agent = cluster.agent(1).await;
    agent
        .until_leases(
            "the list",
            &snapshot(&[("10.5.1.0-24", 1), ("10.5.2.0-24", 2)]),
        )
        .await;
    agent.until("connected", |view| view.connected).await;
    // Our own annotations have come back to us, and the last known state is written.
    tokio::time::sleep(Duration::from_millis(2500)).await;
    agent.view.mark_unchanged();
    let looks = || {
        log.lines(&["looking at what is known of the cluster"])
            .len()
    };
    let before = looks();
    for beat in 0..20 {
        for node in ["n1", "n2"] {
            cluster
                .api
                .edit_node(node, |node| node["status"]["beat"] = json!(beat))
                .expect("edit");
        }
        // Slower than changes are gathered.
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    // Nothing was worked out anew for them, either: in a large cluster there are some every second.
    assert_eq!(looks(), before);
    // Behind them comes something that matters: in order, so the beats have been seen by then.
    cluster.peer("n2", 22);
    agent.view.changed().await.expect("a view");
    let view = agent.view.borrow_and_update().clone();
    assert_eq!(
        view.snapshot.expect("a list").leases[&key("10.5.2.0-24")],
        attrs(22)
    );
    assert!((1..10).contains(&(looks() - before)));
    agent.stop().await;
}

#[tokio::test]
async fn half_of_a_dual_stack_node_may_change() {
    let cluster = Cluster::new(&[]);
    for (name, v4, v6) in [
        ("n1", "10.5.1.0/24", "fd00:0:0:1::/64"),
        ("n2", "10.5.2.0/24", "fd00:0:0:2::/64"),
    ] {
        let node = flannel_testkit::apiserver::node(name, &[v4, v6]);
        cluster.api.create(Kind::Node, node).expect("a node");
    }
    cluster.peer("n2", 2);
    cluster.set("n2", "public-ipv6", Some("2001:db8::2"));
    cluster.set(
        "n2",
        "backend-v6-data",
        Some(r#"{"VNI":1,"VtepMAC":"0a:00:00:00:06:02"}"#),
    );
    let conf = r#"{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd00::/48","Backend":{"Type":"vxlan"}}"#;
    let mut offer = with_conf(1, conf);
    offer.attrs.public_ipv6 = Some("2001:db8::1".parse().expect("address"));
    offer.attrs.v6 = offer.attrs.v4;
    let mut agent = Agent::start(&cluster.config(1), offer).await;
    assert_eq!(agent.held.lease.key, key("10.5.1.0-24&fd00:0:0:1::-64"));
    let subnet = key("10.5.2.0-24&fd00:0:0:2::-64");
    let peer = |agent: &Agent| {
        agent
            .view
            .borrow()
            .snapshot
            .as_ref()
            .and_then(|all| all.leases.get(&subnet).cloned())
    };
    agent
        .until("the peer", |view| {
            view.snapshot
                .as_ref()
                .is_some_and(|all| all.leases.contains_key(&subnet))
        })
        .await;
    cluster.set("n2", "public-ip", Some("192.168.77.99"));
    agent
        .until("its IPv4 address", |view| {
            view.snapshot
                .as_ref()
                .is_some_and(|all| all.leases[&subnet].public_ip == Some([192, 168, 77, 99].into()))
        })
        .await;
    cluster.set("n2", "public-ipv6", Some("2001:db8::99"));
    agent
        .until("its IPv6 address", |view| {
            view.snapshot.as_ref().is_some_and(|all| {
                all.leases[&subnet].public_ipv6 == Some("2001:db8::99".parse().expect("address"))
            })
        })
        .await;
    assert!(peer(&agent).is_some());
    agent.stop().await;
}

#[tokio::test]
async fn a_forgotten_history_leads_to_a_new_list() {
    for gone in [Gone::Event, Gone::Status] {
        let log = Log::capture();
        let cluster = Cluster::new(&[1, 2, 3]);
        cluster.api.set_gone(gone);
        cluster.peer("n2", 2);
        cluster.peer("n3", 3);
        let mut agent = cluster.agent(1).await;
        agent
            .until("three", |view| {
                view.connected
                    && view
                        .snapshot
                        .as_ref()
                        .is_some_and(|all| all.leases.len() == 3)
            })
            .await;
        cluster.api.stop().expect("stop");
        agent.until("the outage", |view| !view.connected).await;
        assert_eq!(
            agent
                .view
                .borrow()
                .snapshot
                .as_ref()
                .expect("a list")
                .leases
                .len(),
            3
        );
        cluster.api.delete_node("n2").expect("delete");
        cluster.peer("n3", 33);
        cluster.api.compact();
        cluster.api.resume().expect("resume");
        agent
            .until_leases(
                "what is left",
                &snapshot(&[("10.5.1.0-24", 1), ("10.5.3.0-24", 33)]),
            )
            .await;
        agent
            .until("connected", |view| {
                view.connected && view.last_error.is_none()
            })
            .await;
        assert_eq!(
            log.lines(&["fell behind, listing them again"]).len(),
            1,
            "{gone:?}"
        );
        assert_eq!(log.lines(&["lease store unreachable"]).len(), 1, "{gone:?}");
        assert_eq!(log.lines(&["lease store is back"]).len(), 1, "{gone:?}");
        agent.stop().await;
    }
}

#[tokio::test]
async fn watches_that_end_are_taken_up_where_they_ended() {
    let cluster = Cluster::new(&[1, 2]);
    let mut agent = cluster.agent(1).await;
    agent.until("connected", |view| view.connected).await;
    let lists = || {
        let asked = cluster.asked("GET", "/api/v1/nodes");
        asked
            .iter()
            .filter(|one| !one.query.contains("watch"))
            .count()
    };
    let before = lists();
    for (end, host) in [(WatchEnd::Clean, 20), (WatchEnd::Cut, 21)] {
        cluster.api.end_watches(end);
        cluster.peer("n2", host);
        agent
            .until_leases(
                "its change",
                &snapshot(&[("10.5.1.0-24", 1), ("10.5.2.0-24", host)]),
            )
            .await;
    }
    assert_eq!(lists(), before);
    // A bookmark moves on where the next watch begins.
    cluster
        .api
        .create(
            Kind::Event,
            json!({
                "metadata": {"name": "x", "namespace": "default"},
                "involvedObject": {"kind": "Node", "name": "n1"},
            }),
        )
        .expect("something else");
    cluster.api.send_bookmarks();
    tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    let revision = cluster.api.revision();
    cluster.api.forget_asked();
    cluster.api.end_watches(WatchEnd::Clean);
    let wanted = format!("resourceVersion={revision}");
    until("a watch from the bookmark", || {
        cluster
            .asked("GET", "/api/v1/nodes")
            .iter()
            .any(|one| one.query.contains("watch") && one.query.contains(&wanted))
            || {
                cluster.peer("n2", 22);
                false
            }
    })
    .await;
    agent.stop().await;
}

#[tokio::test]
async fn long_lists_come_in_pages_and_count_only_as_a_whole() {
    let cluster = Cluster::new(&[]);
    cluster.api.create_full_size_nodes(0..1200);
    cluster
        .api
        .create_node("n1", "10.64.250.0/24")
        .expect("a node");
    let conf = r#"{"Network":"10.0.0.0/8","Backend":{"Type":"vxlan"}}"#;
    let config = cluster.config(1);
    let mut agent = Agent::start(&config, with_conf(1, conf)).await;
    // Every view counts, from the first one on.
    let view = agent.until("a list", |view| view.snapshot.is_some()).await;
    assert_eq!(
        view.snapshot.expect("a list").leases.len(),
        1200,
        "one of them has our subnet"
    );
    let asked = cluster.asked("GET", "/api/v1/nodes");
    let pages: Vec<&str> = asked
        .iter()
        .map(|one| one.query.as_str())
        .filter(|query| query.contains("limit=500"))
        .collect();
    assert_eq!(pages.len(), 3, "{pages:?}");
    assert_eq!(
        pages
            .iter()
            .filter(|page| page.contains("continue="))
            .count(),
        2
    );
    agent.stop().await;
}
