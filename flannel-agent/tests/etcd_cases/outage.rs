//! Following the others: outages, compaction, a wiped store, nonsense.

use flannel_agent::leases::Store;

use super::{config, lease_key, put};
use crate::{
    etcd_server::EtcdServer,
    lease_rig::{Agent, CONF, FIVE, Log, attrs, offer, snapshot, with_previous},
};

#[tokio::test]
async fn an_outage_with_compaction_changes_nothing_until_it_is_over() {
    let mut etcd = EtcdServer::start();
    let log = Log::capture();
    for (name, node) in [
        ("10.5.101.0-24", 101),
        ("10.5.102.0-24", 102),
        ("10.5.103.0-24", 103),
    ] {
        put(&etcd, name, node);
    }
    let wanted = with_previous(offer(1, CONF), "10.5.1.0-24");
    let mut agent = Agent::start(&config(&etcd), wanted).await;
    let before = snapshot(&[
        ("10.5.1.0-24", 1),
        ("10.5.101.0-24", 101),
        ("10.5.102.0-24", 102),
        ("10.5.103.0-24", 103),
    ]);
    agent.until_leases("the first list", &before).await;
    agent.until("connected", |view| view.connected).await;

    etcd.stop();
    let view = agent
        .until("the outage shows", |view| !view.connected)
        .await;
    assert_eq!(view.snapshot.as_deref(), Some(&before));
    // While the agent cannot see it: one peer leaves, one comes, one changes, and the history is thrown away.
    etcd.aside(|etcd| {
        etcd.ctl(&["del", &lease_key("10.5.101.0-24")]);
        put(etcd, "10.5.102.0-24", 112);
        put(etcd, "10.5.104.0-24", 104);
        let revision = etcd
            .meta(&lease_key("10.5.104.0-24"), "ModRevision")
            .to_string();
        etcd.ctl(&["compact", &revision, "--physical"]);
    });
    log.until(&["WARN", "lease store unreachable", &etcd.url()])
        .await;
    let view = agent.view.borrow().clone();
    assert_eq!(view.snapshot.as_deref(), Some(&before));
    assert!(view.last_error.is_some());

    etcd.restart();
    let after = snapshot(&[
        ("10.5.1.0-24", 1),
        ("10.5.102.0-24", 112),
        ("10.5.103.0-24", 103),
        ("10.5.104.0-24", 104),
    ]);
    let view = agent
        .until("converged", |view| {
            view.connected && view.snapshot.as_deref() == Some(&after)
        })
        .await;
    assert_eq!(view.last_error, None);
    assert_eq!(log.lines(&["WARN", "lease store unreachable"]).len(), 1);
    assert_eq!(log.lines(&["INFO", "lease store is back"]).len(), 1);
    assert_eq!(log.lines(&["fell behind compaction horizon"]).len(), 1);
    // And the new watch works.
    put(&etcd, "10.5.105.0-24", 105);
    agent
        .until("a new peer", |view| {
            view.snapshot
                .as_ref()
                .is_some_and(|all| all.leases.len() == 5)
        })
        .await;
    agent.stop().await;
    assert!(!etcd.value(&lease_key("10.5.1.0-24")).is_empty());
}

#[tokio::test]
async fn a_silent_etcd_is_an_outage_too() {
    let etcd = EtcdServer::start();
    let log = Log::capture();
    let mut agent = Agent::start(&config(&etcd), offer(1, CONF)).await;
    agent.until("connected", |view| view.connected).await;
    etcd.signal("STOP");
    agent
        .until("the silence shows", |view| !view.connected)
        .await;
    log.until(&["WARN", "lease store unreachable"]).await;
    etcd.signal("CONT");
    put(&etcd, "10.5.101.0-24", 101);
    let back = agent
        .until("back", |view| {
            view.connected
                && view
                    .snapshot
                    .as_ref()
                    .is_some_and(|all| all.leases.len() == 2)
        })
        .await;
    assert_eq!(back.own, Some(agent.held.lease.clone()));
}

#[tokio::test]
async fn nonsense_under_the_prefix_hides_nobody() {
    let etcd = EtcdServer::start();
    let log = Log::capture();
    put(&etcd, "10.5.101.0-24", 101);
    etcd.ctl(&["put", &lease_key("listed-nonsense"), "1"]);
    let wanted = with_previous(offer(1, CONF), "10.5.1.0-24");
    let mut agent = Agent::start(&config(&etcd), wanted).await;
    let expected = snapshot(&[("10.5.1.0-24", 1), ("10.5.101.0-24", 101)]);
    agent.until_leases("the first list", &expected).await;

    etcd.ctl(&["put", &lease_key("foo"), "1"]);
    etcd.ctl(&["put", "/coreos.com/network/subnets-stray", "1"]);
    etcd.ctl(&["put", "/coreos.com/network/subnets-old/10.5.9.0-24", "1"]);
    etcd.ctl(&["put", &lease_key("10.5.101.0-24"), "{\"PublicIP\":"]);
    etcd.ctl(&["put", &lease_key("10.5.102.0-24"), "garbage"]);
    put(&etcd, "10.5.103.0-24", 103);
    let expected = snapshot(&[
        ("10.5.1.0-24", 1),
        ("10.5.101.0-24", 101),
        ("10.5.103.0-24", 103),
    ]);
    agent.until_leases("all but the nonsense", &expected).await;
    for name in ["listed-nonsense", "foo", "10.5.101.0-24", "10.5.102.0-24"] {
        let lines = log.lines(&["WARN", "ignoring an unreadable lease", name]);
        assert_eq!(lines.len(), 1, "{name}: {lines:?}");
    }
    assert!(log.lines(&["subnets-"]).is_empty());
    // A subnet with an unreadable value is somebody's all the same.
    let five = FIVE
        .replace("10.5.10.0", "10.5.102.0")
        .replace("10.5.14.0", "10.5.102.0");
    let store = Store::open(&config(&etcd)).await.unwrap();
    assert!(store.acquire(&offer(2, &five)).await.is_err());
    // Deleting and mending are seen.
    put(&etcd, "10.5.102.0-24", 102);
    etcd.ctl(&["del", &lease_key("10.5.101.0-24")]);
    etcd.ctl(&["del", &lease_key("foo")]);
    let expected = snapshot(&[
        ("10.5.1.0-24", 1),
        ("10.5.102.0-24", 102),
        ("10.5.103.0-24", 103),
    ]);
    agent.until_leases("mended", &expected).await;
}

#[tokio::test]
async fn peers_of_a_wiped_etcd_are_kept_while_they_come_back() {
    let mut etcd = EtcdServer::start();
    let log = Log::capture();
    // Revisions of the old store are higher than any of the new one.
    for _ in 0..20 {
        put(&etcd, "10.5.101.0-24", 101);
    }
    let wanted = with_previous(offer(1, CONF), "10.5.1.0-24");
    let mut agent = Agent::start(&config(&etcd), wanted).await;
    let expected = snapshot(&[("10.5.1.0-24", 1), ("10.5.101.0-24", 101)]);
    agent.until_leases("the first list", &expected).await;
    etcd.stop();
    etcd.wipe();
    etcd.restart();
    etcd.until("the own lease is back", |etcd| {
        etcd.value(&lease_key("10.5.1.0-24")) == attrs(1).to_json()
    })
    .await;
    let view = agent.until("connected", |view| view.connected).await;
    assert_eq!(view.snapshot.as_deref(), Some(&expected));
    assert_eq!(
        log.lines(&["WARN", "the lease store was replaced"]).len(),
        1
    );
    put(&etcd, "10.5.101.0-24", 111);
    let expected = snapshot(&[("10.5.1.0-24", 1), ("10.5.101.0-24", 111)]);
    agent.until_leases("the peer came back", &expected).await;
}
