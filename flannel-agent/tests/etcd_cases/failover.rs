//! Several endpoints: the one in use goes, and another takes its place.

use std::time::Duration;

use flannel_agent::leases::{EtcdOptions, Store, StoreConfig};
use tokio::time::timeout;

use super::{CONFIG_KEY, lease_key};
use crate::{
    etcd_server::cluster::EtcdCluster,
    lease_rig::{Agent, CONF, Log, PATIENCE, attrs, offer, snapshot, with_previous},
};

#[tokio::test]
async fn the_member_in_use_may_die_while_watching_and_renewing() {
    let mut etcd = EtcdCluster::start();
    let log = Log::capture();
    let options = EtcdOptions {
        endpoints: etcd.urls(),
        ttl: Duration::from_secs(6),
        ..EtcdOptions::default()
    };
    etcd.ctl(0, &["put", CONFIG_KEY, CONF]);
    let config = StoreConfig::Etcd(options);
    let mut agent = Agent::start(&config, with_previous(offer(1, CONF), "10.5.1.0-24")).await;
    agent.until("connected", |view| view.connected).await;
    let store = Store::open(&config).await.unwrap();
    let following = tokio::spawn(async move { store.net_conf_after(CONF).await });

    let mut leases = vec![("10.5.1.0-24".to_owned(), 1)];
    // The first of the list is in use; when it dies the next one is, and so on around.
    for (round, member) in [0, 1, 2, 0].into_iter().enumerate() {
        etcd.kill(member);
        let survivor = (member + 1) % 3;
        let renewed = log.lines(&["INFO", "Lease renewed"]).len();
        let node = 101 + u8::try_from(round).unwrap();
        let name = format!("10.5.{node}.0-24");
        etcd.ctl(
            survivor,
            &["put", &lease_key(&name), &attrs(node).to_json()],
        );
        leases.push((name, node));
        let expected: Vec<(&str, u8)> = leases
            .iter()
            .map(|(name, node)| (name.as_str(), *node))
            .collect();
        let view = agent
            .until_leases("a lease put after the failure", &snapshot(&expected))
            .await;
        assert_eq!(view.own, Some(agent.held.lease.clone()));
        let seen = async {
            while log.lines(&["INFO", "Lease renewed"]).len() <= renewed {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        timeout(PATIENCE, seen)
            .await
            .expect("renewed by another member");
        // etcd's own word for it.
        let key = lease_key("10.5.1.0-24");
        let value = etcd.ctl(survivor, &["get", "--print-value-only", &key]);
        assert_eq!(value.trim_end(), attrs(1).to_json());
        etcd.restart(member);
    }
    let other = CONF.replace("vxlan", "VXLAN");
    etcd.ctl(2, &["put", CONFIG_KEY, &other]);
    let text = timeout(PATIENCE, following).await.unwrap().unwrap();
    assert_eq!(text, other);
    assert_eq!(log.lines(&["Lease has been revoked"]), [""; 0]);
    assert_eq!(log.lines(&["ERROR"]), [""; 0]);
    assert!(agent.is_running());
}

#[tokio::test]
async fn a_start_uses_whichever_members_are_there() {
    let mut etcd = EtcdCluster::start();
    etcd.ctl(1, &["put", CONFIG_KEY, CONF]);
    etcd.kill(0);
    let log = Log::capture();
    let options = EtcdOptions {
        endpoints: vec![etcd.urls().join(",")],
        ..EtcdOptions::default()
    };
    let mut agent = Agent::start(&StoreConfig::Etcd(options), offer(1, CONF)).await;
    agent.until("connected", |view| view.connected).await;
    assert_eq!(log.lines(&["WARN"]), [""; 0]);
}
