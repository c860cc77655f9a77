//! Following the network configuration.

use std::time::Duration;

use flannel_agent::leases::Store;
use tokio::{task::JoinHandle, time::timeout};

use super::{CONFIG_KEY, config, lease_key};
use crate::{
    etcd_server::EtcdServer,
    lease_rig::{CONF, Log, PATIENCE},
};

const OTHER: &str = r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan","MTU":1400}}"#;
const THIRD: &str = r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan","MTU":1300}}"#;

/// Waits in a task for another text than `known`.
async fn wait_after(etcd: &EtcdServer, known: &'static str) -> JoinHandle<String> {
    let store = Store::open(&config(etcd)).await.unwrap();
    tokio::spawn(async move { store.net_conf_after(known).await })
}

async fn outcome(waiting: JoinHandle<String>) -> String {
    timeout(PATIENCE, waiting).await.unwrap().unwrap()
}

/// Long enough for a watch to be opened, or for what should not happen.
async fn linger() {
    tokio::time::sleep(Duration::from_millis(500)).await;
}

#[tokio::test]
async fn a_changed_configuration_is_seen_once_it_differs() {
    let etcd = EtcdServer::start();
    // One that differs already.
    etcd.ctl(&["put", CONFIG_KEY, OTHER]);
    assert_eq!(outcome(wait_after(&etcd, CONF).await).await, OTHER);

    etcd.ctl(&["put", CONFIG_KEY, CONF]);
    let waiting = wait_after(&etcd, CONF).await;
    linger().await;
    // The same text again, other keys, and none at all: no other configuration.
    etcd.ctl(&["put", CONFIG_KEY, CONF]);
    etcd.ctl(&["put", "/coreos.com/network/config2", OTHER]);
    etcd.ctl(&["put", &lease_key("10.5.7.0-24"), "1"]);
    etcd.ctl(&["del", CONFIG_KEY]);
    linger().await;
    assert!(!waiting.is_finished());
    etcd.ctl(&["put", CONFIG_KEY, CONF]);
    linger().await;
    assert!(!waiting.is_finished());
    etcd.ctl(&["put", CONFIG_KEY, OTHER]);
    assert_eq!(outcome(waiting).await, OTHER);
}

#[tokio::test]
async fn a_missing_configuration_may_come_later() {
    let etcd = EtcdServer::start();
    let log = Log::capture();
    let store = Store::open(&config(&etcd)).await.unwrap();
    let (text, ()) = tokio::join!(
        async { timeout(PATIENCE, store.net_conf_after(CONF)).await.unwrap() },
        async {
            log.until(&["INFO", "the network configuration was removed"])
                .await;
            etcd.ctl(&["put", CONFIG_KEY, OTHER]);
        }
    );
    assert_eq!(text, OTHER);
}

#[tokio::test]
async fn an_outage_a_compaction_and_a_wiped_store_hide_no_change() {
    let mut etcd = EtcdServer::start();
    etcd.ctl(&["put", CONFIG_KEY, CONF]);
    let log = Log::capture();
    let store = Store::open(&config(&etcd)).await.unwrap();
    let (text, ()) = tokio::join!(
        async { timeout(PATIENCE, store.net_conf_after(CONF)).await.unwrap() },
        async {
            linger().await;
            etcd.stop();
            log.until(&["WARN", "lease store unreachable"]).await;
            etcd.aside(|etcd| {
                etcd.ctl(&["put", CONFIG_KEY, OTHER]);
                let revision = etcd.meta(CONFIG_KEY, "ModRevision").to_string();
                etcd.ctl(&["compact", &revision, "--physical"]);
            });
            etcd.restart();
        }
    );
    assert_eq!(text, OTHER);

    // Revisions of a wiped store are lower than what was watched from.
    for _ in 0..20 {
        etcd.ctl(&["put", CONFIG_KEY, CONF]);
    }
    let ((), text) = tokio::join!(
        async {
            linger().await;
            etcd.stop();
            etcd.wipe();
            etcd.restart();
            etcd.ctl(&["put", CONFIG_KEY, CONF]);
            linger().await;
            etcd.ctl(&["put", CONFIG_KEY, THIRD]);
        },
        async { timeout(PATIENCE, store.net_conf_after(CONF)).await.unwrap() },
    );
    assert_eq!(text, THIRD);
    // A stop and a start are one outage each, not a storm of attempts.
    assert!(log.lines(&["WARN", "lease store unreachable"]).len() <= 2);
}

#[tokio::test]
async fn a_frozen_etcd_is_waited_for() {
    let etcd = EtcdServer::start();
    etcd.ctl(&["put", CONFIG_KEY, CONF]);
    let waiting = wait_after(&etcd, CONF).await;
    linger().await;
    etcd.signal("STOP");
    linger().await;
    etcd.signal("CONT");
    etcd.ctl(&["put", CONFIG_KEY, OTHER]);
    assert_eq!(outcome(waiting).await, OTHER);
}
