//! Keeping a lease: renewal, loss, and other hands on our key.

use std::time::Duration;

use flannel_agent::leases::{DEFAULT_RENEW_MARGIN, EtcdOptions, StoreConfig};

use super::{SUBNETS, config, lease_key, options, put};
use crate::{
    etcd_server::EtcdServer,
    lease_rig::{Agent, CONF, Log, attrs, key, offer, snapshot, with_previous},
};

#[tokio::test]
async fn a_revoked_lease_is_taken_again_with_the_same_subnet() {
    let etcd = EtcdServer::start();
    let log = Log::capture();
    let mut agent = Agent::start(&config(&etcd), offer(1, CONF)).await;
    agent.until("connected", |view| view.connected).await;
    let subnet = agent.held.lease.key;
    let name = lease_key(&subnet.to_string());
    for round in 1..=2 {
        let before = etcd.leases();
        assert_eq!(before.len(), 1);
        // Once by revoking the etcd lease, once by deleting the key.
        match round {
            1 => etcd.ctl(&["lease", "revoke", &before[0]]),
            _ => etcd.ctl(&["del", &name]),
        };
        etcd.until("the key is back", |etcd| {
            etcd.keys(SUBNETS) == [name.as_str()]
        })
        .await;
        etcd.until("one etcd lease, a new one", |etcd| {
            let after = etcd.leases();
            after.len() == 1 && after != before
        })
        .await;
        assert_eq!(agent.subnet(), subnet);
        assert_eq!(log.lines(&["WARN", "Lease has been revoked"]).len(), round);
    }
    let view = agent
        .until("settled", |view| view.last_error.is_none())
        .await;
    assert!(
        view.snapshot
            .is_some_and(|all| all.leases.contains_key(&subnet))
    );
    assert!(agent.is_running());
}

#[tokio::test]
async fn a_subnet_taken_by_another_node_is_given_up() {
    let mut etcd = EtcdServer::start();
    let log = Log::capture();
    let wanted = with_previous(offer(1, CONF), "10.5.1.0-24");
    let mut agent = Agent::start(&config(&etcd), wanted).await;
    agent.until("connected", |view| view.connected).await;
    // The lease expires during an outage, and another node takes the subnet.
    etcd.aside(|etcd| {
        etcd.ctl(&["lease", "revoke", &etcd.leases()[0]]);
        put(etcd, "10.5.1.0-24", 2);
    });
    etcd.restart();
    let view = agent
        .until("another subnet", |view| {
            view.connected
                && view
                    .own
                    .as_ref()
                    .is_some_and(|own| own.key != key("10.5.1.0-24"))
        })
        .await;
    let lines = log.lines(&["ERROR", "another node took our subnet"]);
    assert_eq!(lines.len(), 1, "{lines:?}");
    for part in ["10.5.1.0-24", "192.168.77.1 ", "192.168.77.2 "] {
        assert!(
            format!("{} ", lines[0]).replace('"', " ").contains(part),
            "{lines:?}"
        );
    }
    assert_eq!(etcd.value(&lease_key("10.5.1.0-24")), attrs(2).to_json());
    let own = view.own.unwrap();
    assert_eq!(
        etcd.value(&lease_key(&own.key.to_string())),
        attrs(1).to_json()
    );
    let mut expected = snapshot(&[("10.5.1.0-24", 2)]);
    expected.leases.insert(own.key, own.attrs);
    agent.until_leases("both", &expected).await;
    assert_eq!(etcd.leases().len(), 1);
}

#[tokio::test]
async fn an_ordinary_lease_made_a_reservation_by_hand_stays_one() {
    let etcd = EtcdServer::start();
    let log = Log::capture();
    let mut agent = Agent::start(&config(&etcd), offer(1, CONF)).await;
    agent.until("connected", |view| view.connected).await;
    let name = agent.held.lease.key.to_string();
    put(&etcd, &name, 1);
    log.until(&["INFO", "made a reservation"]).await;
    etcd.until("no etcd lease", |etcd| etcd.leases().is_empty())
        .await;
    assert_eq!(etcd.meta(&lease_key(&name), "Lease"), 0);
}

#[tokio::test]
async fn an_own_key_that_was_scribbled_over_is_restored() {
    let etcd = EtcdServer::start();
    let log = Log::capture();
    let mut agent = Agent::start(&config(&etcd), offer(1, CONF)).await;
    agent.until("connected", |view| view.connected).await;
    let name = lease_key(&agent.held.lease.key.to_string());
    let lease = etcd.meta(&name, "Lease");
    // Unreadable, then readable with our address and another MAC address.
    let mut other = attrs(1);
    other.v4 = attrs(9).v4;
    for value in ["garbage".to_owned(), other.to_json()] {
        etcd.ctl(&["put", &format!("--lease={lease:x}"), &name, &value]);
        etcd.until("the value is back", |etcd| {
            etcd.value(&name) == attrs(1).to_json()
        })
        .await;
        assert_eq!(etcd.meta(&name, "Lease"), lease);
    }
    etcd.ctl(&["put", &name, "garbage without a lease"]);
    etcd.until("the value is back", |etcd| {
        etcd.value(&name) == attrs(1).to_json()
    })
    .await;
    assert_eq!(etcd.meta(&name, "Lease"), lease);
    assert_eq!(agent.subnet(), agent.held.lease.key);
    assert!(
        !log.lines(&["WARN", "rewritten by somebody else"])
            .is_empty()
    );
    // A reservation by hand has no more than the address.
    etcd.ctl(&["put", &name, r#"{"PublicIP":"192.168.77.1"}"#]);
    etcd.until("the value is complete", |etcd| {
        etcd.value(&name) == attrs(1).to_json()
    })
    .await;
    assert_eq!(etcd.meta(&name, "Lease"), 0);
}

#[tokio::test]
async fn a_changed_mac_is_published_under_the_same_lease() {
    let etcd = EtcdServer::start();
    let mut agent = Agent::start(&config(&etcd), offer(1, CONF)).await;
    agent.until("connected", |view| view.connected).await;
    let name = lease_key(&agent.held.lease.key.to_string());
    let lease = etcd.meta(&name, "Lease");
    let mut changed = offer(1, CONF);
    changed.attrs.v4 = attrs(0xee).v4;
    agent.offer.send(changed.clone()).unwrap();
    let view = agent
        .until("the view follows", |view| {
            view.own
                .as_ref()
                .is_some_and(|own| own.attrs == changed.attrs)
        })
        .await;
    let snapshot = view.snapshot.unwrap();
    assert_eq!(
        snapshot.leases.get(&agent.held.lease.key),
        Some(&changed.attrs)
    );
    assert_eq!(etcd.value(&name), changed.attrs.to_json());
    assert_eq!(etcd.meta(&name, "Lease"), lease);
}

#[tokio::test]
async fn renewal_extends_the_lease_and_touches_nothing_else() {
    let etcd = EtcdServer::start();
    let log = Log::capture();
    let options = EtcdOptions {
        ttl: Duration::from_secs(4),
        ..options(&etcd)
    };
    let mut agent = Agent::start(&StoreConfig::Etcd(options), offer(1, CONF)).await;
    agent.until("connected", |view| view.connected).await;
    let name = lease_key(&agent.held.lease.key.to_string());
    let before = (etcd.meta(&name, "Lease"), etcd.meta(&name, "ModRevision"));
    etcd.until("three renewals", |_| {
        log.lines(&["INFO", "Lease renewed"]).len() >= 3
    })
    .await;
    let after = (etcd.meta(&name, "Lease"), etcd.meta(&name, "ModRevision"));
    assert_eq!(before, after);
    assert!(
        log.lines(&["WARN"]).is_empty(),
        "{:?}",
        log.lines(&["WARN"])
    );
    // Once nobody renews, it ends.
    agent.stop().await;
    etcd.until("the lease expires", |etcd| etcd.keys(SUBNETS).is_empty())
        .await;
}

#[tokio::test]
async fn the_margin_says_when_to_renew() {
    let etcd = EtcdServer::start();
    for (margin, said) in [
        (DEFAULT_RENEW_MARGIN, "Waiting for 22h59m5"),
        (Duration::from_mins(90), "Waiting for 22h29m5"),
        (Duration::from_mins(1), "Waiting for 23h58m5"),
        // Longer than the lease: half of it.
        (Duration::from_hours(48), "Waiting for 11h59m5"),
    ] {
        let log = Log::capture();
        let options = EtcdOptions {
            renew_margin: margin,
            ..options(&etcd)
        };
        let agent = Agent::start(&StoreConfig::Etcd(options), offer(1, CONF)).await;
        log.until(&["INFO", said, "s to renew lease"]).await;
        agent.stop().await;
    }
}
