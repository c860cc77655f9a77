//! The lease store in etcd, against a real one.

mod etcd_server;
mod lease_rig;

use std::{collections::BTreeSet, process::Command, time::Duration};

use etcd_server::EtcdServer;
use flannel_agent::leases::{ErrorKind, EtcdOptions, Offer, Outcome, Store, StoreConfig};
use flannel_core::{addr::VtepMac, lease::VxlanData};
use lease_rig::{Agent, CONF, FIVE, Log, PATIENCE, attrs, key, offer, snapshot};
use tokio::{task::JoinSet, time::timeout};
use tokio_util::sync::CancellationToken;

const CONFIG_KEY: &str = "/coreos.com/network/config";
const SUBNETS: &str = "/coreos.com/network/subnets/";

fn options(etcd: &EtcdServer) -> EtcdOptions {
    EtcdOptions {
        endpoints: vec![etcd.url()],
        ..EtcdOptions::default()
    }
}

fn config(etcd: &EtcdServer) -> StoreConfig {
    StoreConfig::Etcd(options(etcd))
}

fn with_previous(offer: Offer, subnet: &str) -> Offer {
    Offer {
        previous: Some(key(subnet)),
        ..offer
    }
}

fn lease_key(name: &str) -> String {
    format!("{SUBNETS}{name}")
}

/// A value as some other node would write it.
fn put(etcd: &EtcdServer, name: &str, node: u8) {
    etcd.ctl(&["put", &lease_key(name), &attrs(node).to_json()]);
}

#[tokio::test]
async fn keys_values_and_ttl_are_those_of_upstream() {
    let etcd = EtcdServer::start();
    etcd.ctl(&["put", CONFIG_KEY, CONF]);
    let log = Log::capture();
    let store = Store::open(&config(&etcd)).await.unwrap();
    assert_eq!(store.net_conf().await.unwrap(), CONF);

    let mac: VtepMac = "1a:cf:f4:7b:c6:ea".parse().unwrap();
    let mut wanted = with_previous(offer(12, CONF), "10.5.3.0-24");
    wanted.attrs.v4 = Some(VxlanData { vni: 1, mac });
    assert_eq!(store.own_stored(&wanted.identity).await.unwrap(), None);
    let held = store.acquire(&wanted).await.unwrap();
    assert_eq!(held.outcome, Outcome::Previous);
    assert_eq!(
        store.own_stored(&wanted.identity).await.unwrap(),
        Some(held.lease.clone())
    );

    assert_eq!(etcd.keys(SUBNETS), [lease_key("10.5.3.0-24")]);
    assert_eq!(
        etcd.value(&lease_key("10.5.3.0-24")),
        r#"{"PublicIP":"192.168.77.12","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"1a:cf:f4:7b:c6:ea"}}"#
    );
    let leases = etcd.leases();
    assert_eq!(leases.len(), 1, "{leases:?}");
    let ttl = etcd.ctl(&["lease", "timetolive", &leases[0], "--keys"]);
    assert!(ttl.contains("granted with TTL(86400s)"), "{ttl}");
    assert!(ttl.contains(&lease_key("10.5.3.0-24")), "{ttl}");
    assert_eq!(log.lines(&["INFO", "Lease acquired: 10.5.3.0/24"]).len(), 1);

    // A second start takes the same lease over, and the etcd lease of the first one is not left behind.
    let held = store.acquire(&offer(12, CONF)).await.unwrap();
    assert_eq!(held.outcome, Outcome::Reused);
    assert_eq!(held.lease.key, key("10.5.3.0-24"));
    let after = etcd.leases();
    assert_eq!(after.len(), 1);
    assert_ne!(after, leases);
}

#[tokio::test]
async fn dual_stack_keys_and_values_are_those_of_upstream() {
    let conf = r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"},"EnableIPv6":true,"IPv6Network":"fd05::/48"}"#;
    let etcd = EtcdServer::start();
    let store = Store::open(&config(&etcd)).await.unwrap();
    let mut wanted = with_previous(offer(11, conf), "10.5.6.0-24&fd05:0:0:13::-64");
    wanted.attrs.public_ipv6 = Some("fd77::11".parse().unwrap());
    wanted.identity.public_ipv6 = wanted.attrs.public_ipv6;
    let data = |mac: &str| {
        Some(VxlanData {
            vni: 1,
            mac: mac.parse().unwrap(),
        })
    };
    wanted.attrs.v4 = data("ae:90:b6:ed:0c:2e");
    wanted.attrs.v6 = data("76:53:12:e2:42:3d");
    store.acquire(&wanted).await.unwrap();
    assert_eq!(
        etcd.value(&lease_key("10.5.6.0-24&fd05:0:0:13::-64")),
        r#"{"PublicIP":"192.168.77.11","PublicIPv6":"fd77::11","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"ae:90:b6:ed:0c:2e"},"BackendV6Data":{"VNI":1,"VtepMAC":"76:53:12:e2:42:3d"}}"#
    );
}

#[tokio::test]
async fn five_nodes_share_out_the_last_five_subnets() {
    let etcd = EtcdServer::start();
    let mut starts = JoinSet::new();
    for node in 1..=5 {
        let config = config(&etcd);
        starts.spawn(async move { Agent::start(&config, offer(node, FIVE)).await });
    }
    let mut agents = starts.join_all().await;
    let subnets: BTreeSet<_> = agents.iter().map(|agent| agent.held.lease.key).collect();
    assert_eq!(subnets.len(), 5, "{subnets:?}");
    let mut expected = snapshot(&[]);
    for agent in &agents {
        let lease = agent.held.lease.clone();
        expected.leases.insert(lease.key, lease.attrs);
    }
    for agent in &mut agents {
        agent
            .until_leases("everybody sees all five", &expected)
            .await;
    }
    // Lost races leave no etcd lease behind.
    assert_eq!(etcd.leases().len(), 5);

    // A sixth finds no subnet, says so, and gets one as soon as one is free.
    let log = Log::capture();
    let store = Store::open(&config(&etcd)).await.unwrap();
    let error = store.acquire(&offer(6, FIVE)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Retry);
    let text = error.to_string();
    for part in ["out of subnets", "10.5.0.0/16", "10.5.10.0", "10.5.14.0"] {
        assert!(text.contains(part), "{text}");
    }
    let sixth = tokio::spawn({
        let config = config(&etcd);
        async move { Agent::start(&config, offer(6, FIVE)).await }
    });
    log.until(&["WARN", "no lease yet"]).await;
    let leaving = agents.remove(0);
    let freed = leaving.held.lease.key;
    leaving.stop().await;
    let lease = etcd.meta(&lease_key(&freed.to_string()), "Lease");
    etcd.ctl(&["lease", "revoke", &format!("{lease:x}")]);
    let sixth = timeout(PATIENCE, sixth).await.unwrap().unwrap();
    assert_eq!(sixth.held.lease.key, freed);
    assert_eq!(log.lines(&["WARN", "no lease yet"]).len(), 1);
    assert!(agents.iter().all(Agent::is_running));
    assert_eq!(etcd.leases().len(), 5);
}

#[tokio::test]
async fn dual_stack_nodes_never_share_half_a_lease() {
    // One IPv4 subnet is wanted by both, each with another IPv6 subnet: the keys differ, the subnets do not.
    let conf = r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"},"EnableIPv6":true,"IPv6Network":"fd05::/48"}"#;
    let etcd = EtcdServer::start();
    let mut starts = JoinSet::new();
    for node in 1..=4_u8 {
        let config = config(&etcd);
        let previous = format!("10.5.6.0-24&fd05:0:0:{node}::-64");
        let mut wanted = with_previous(offer(node, conf), &previous);
        wanted.attrs.public_ipv6 = Some(format!("fd77::{node}").parse().unwrap());
        wanted.identity.public_ipv6 = wanted.attrs.public_ipv6;
        starts.spawn(async move {
            let store = Store::open(&config).await.unwrap();
            store.acquire(&wanted).await.unwrap().lease.key
        });
    }
    let keys = starts.join_all().await;
    let v4: BTreeSet<_> = keys.iter().map(|key| key.v4).collect();
    let v6: BTreeSet<_> = keys.iter().map(|key| key.v6).collect();
    assert_eq!((v4.len(), v6.len()), (4, 4), "{keys:?}");
    assert_eq!(etcd.keys(SUBNETS).len(), 4);
    assert_eq!(etcd.leases().len(), 4);
}

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
async fn a_reservation_stays_without_a_lease() {
    let etcd = EtcdServer::start();
    etcd.ctl(&[
        "put",
        &lease_key("10.5.7.0-24"),
        r#"{"PublicIP":"192.168.77.1"}"#,
    ]);
    let mut agent = Agent::start(&config(&etcd), offer(1, CONF)).await;
    assert_eq!(agent.held.outcome, Outcome::Reused);
    assert_eq!(agent.held.lease.key, key("10.5.7.0-24"));
    agent.until("connected", |view| view.connected).await;
    let name = lease_key("10.5.7.0-24");
    assert_eq!(etcd.value(&name), attrs(1).to_json());
    assert_eq!(etcd.meta(&name, "Lease"), 0);
    // Also when a changed offer is published.
    let mut changed = offer(1, CONF);
    changed.attrs.v4 = attrs(0xee).v4;
    let value = changed.attrs.to_json();
    agent.offer.send(changed).unwrap();
    etcd.until("the new value", |etcd| etcd.value(&name) == value)
        .await;
    assert_eq!(etcd.meta(&name, "Lease"), 0);
    assert!(etcd.leases().is_empty());
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

#[tokio::test]
async fn the_first_working_endpoint_is_used_and_prefixes_are_cleaned() {
    let etcd = EtcdServer::start();
    etcd.ctl(&["put", "/other/net/config", CONF]);
    let dead = "http://127.0.0.1:1";
    let options = EtcdOptions {
        endpoints: vec![format!("{dead},{}", etcd.url())],
        prefix: "//other/./net/".to_owned(),
        ..EtcdOptions::default()
    };
    let log = Log::capture();
    let store = Store::open(&StoreConfig::Etcd(options)).await.unwrap();
    assert_eq!(store.net_conf().await.unwrap(), CONF);
    assert_eq!(
        store.describe(),
        format!("etcd {dead},{} prefix /other/net", etcd.url())
    );
    assert!(log.lines(&["WARN"]).is_empty());

    let store = Store::open(&config(&etcd)).await.unwrap();
    let error = store.net_conf().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Retry);
    let text = error.to_string();
    assert!(
        text.contains("Did you create your config using etcdv3 API?"),
        "{text}"
    );
    assert!(text.contains(CONFIG_KEY), "{text}");

    let options = EtcdOptions {
        endpoints: vec![dead.to_owned()],
        ..EtcdOptions::default()
    };
    let store = Store::open(&StoreConfig::Etcd(options)).await.unwrap();
    for _ in 0..3 {
        let error = store.net_conf().await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Retry);
        let text = error.chain();
        assert!(text.contains(dead) && text.contains("refused"), "{text}");
    }
    assert_eq!(
        log.lines(&["WARN", "lease store unreachable", dead]).len(),
        1
    );
    // Waiting for a lease ends when asked to.
    let cancel = CancellationToken::new();
    let wanted = offer(1, CONF);
    let waiting = store.acquire_until(&wanted, &cancel);
    let (result, ()) = tokio::join!(waiting, async { cancel.cancel() });
    assert!(result.is_none());
}

#[tokio::test]
async fn bad_options_are_named() {
    let good = EtcdOptions::default;
    let cases = [
        (
            EtcdOptions {
                endpoints: vec![",".to_owned()],
                ..good()
            },
            "no etcd endpoint",
        ),
        (
            EtcdOptions {
                endpoints: vec!["ftp://a".to_owned()],
                ..good()
            },
            "ftp://a",
        ),
        (
            EtcdOptions {
                certfile: Some("/c".into()),
                ..good()
            },
            "--etcd-certfile is given without --etcd-keyfile",
        ),
        (
            EtcdOptions {
                keyfile: Some("/k".into()),
                ..good()
            },
            "--etcd-keyfile is given without --etcd-certfile",
        ),
        (
            EtcdOptions {
                password: Some("hunter2".to_owned()),
                ..good()
            },
            "without --etcd-username",
        ),
        (
            EtcdOptions {
                endpoints: vec!["https://127.0.0.1:1".to_owned()],
                cafile: Some("/nonexistent/ca.pem".into()),
                ..good()
            },
            "read --etcd-cafile /nonexistent/ca.pem",
        ),
        (
            EtcdOptions {
                endpoints: vec!["https://127.0.0.1:1".to_owned()],
                certfile: Some("/dev/null".into()),
                keyfile: Some("/dev/null".into()),
                ..good()
            },
            "https://127.0.0.1:1",
        ),
    ];
    for (options, expected) in cases {
        let error = Store::open(&StoreConfig::Etcd(options)).await.unwrap_err();
        let text = error.chain();
        assert_eq!(error.kind(), ErrorKind::Config, "{text}");
        assert!(text.contains(expected), "{text}");
        assert!(!text.contains("hunter2"), "{text}");
    }
}

#[tokio::test]
async fn passwords_are_used_and_never_shown() {
    let etcd = EtcdServer::start();
    let log = Log::capture();
    let with = |password: &str| EtcdOptions {
        username: Some("root".to_owned()),
        password: Some(password.to_owned()),
        ..options(&etcd)
    };
    // etcd without authentication takes no token; the name is not needed then.
    let store = Store::open(&StoreConfig::Etcd(with("hunter2")))
        .await
        .unwrap();
    store.acquire(&offer(1, CONF)).await.unwrap();

    etcd.ctl(&["user", "add", "root:hunter2"]);
    etcd.ctl(&["auth", "enable"]);
    let mut agent = Agent::start(&StoreConfig::Etcd(with("hunter2")), offer(1, CONF)).await;
    agent.until("connected", |view| view.connected).await;

    let store = Store::open(&StoreConfig::Etcd(with("hunter3")))
        .await
        .unwrap();
    let error = store.net_conf().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused, "{error}");
    assert!(
        error.to_string().contains("authentication failed"),
        "{error}"
    );
    let store = Store::open(&config(&etcd)).await.unwrap();
    let error = store.net_conf().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused, "{error}");

    let shown = format!(
        "{} {store:?} {:?} {error:?}",
        store.describe(),
        with("hunter2")
    );
    // The libraries show message contents at TRACE; what counts is what a log can show at the level of `-v 1`.
    let logged = log.text();
    let ours = logged.lines().filter(|line| !line.contains("TRACE"));
    for line in ours.chain([shown.as_str()]) {
        assert!(!line.contains("hunter"), "{line}");
    }
}

#[tokio::test]
async fn tls_with_client_certificates() {
    let pki = Pki::new();
    let etcd = EtcdServer::start_with(
        "https",
        &[
            "--cert-file",
            &pki.path("server.pem"),
            "--key-file",
            &pki.path("server.key"),
            "--trusted-ca-file",
            &pki.path("ca.pem"),
            "--client-cert-auth",
        ],
    );
    let with = |ca: &str, client: bool| EtcdOptions {
        cafile: Some(pki.path(ca).into()),
        certfile: client.then(|| pki.path("client.pem").into()),
        keyfile: client.then(|| pki.path("client.key").into()),
        ..options(&etcd)
    };
    let mut agent = Agent::start(&StoreConfig::Etcd(with("ca.pem", true)), offer(1, CONF)).await;
    agent.until("connected", |view| view.connected).await;

    // The server asks for a certificate, and the client does not trust just anybody.
    for options in [with("ca.pem", false), with("other.pem", true)] {
        let store = Store::open(&StoreConfig::Etcd(options)).await.unwrap();
        let error = store.net_conf().await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Retry);
        let text = error.chain().to_lowercase();
        assert!(text.contains("certificate"), "{text}");
    }
    // Certificates do not make a plain endpoint a TLS one.
    let plain = EtcdServer::start();
    let options = EtcdOptions {
        endpoints: vec![plain.url()],
        ..with("ca.pem", true)
    };
    let store = Store::open(&StoreConfig::Etcd(options)).await.unwrap();
    store.acquire(&offer(1, CONF)).await.unwrap();
}

/// Certificates for one test, made by the openssl command.
struct Pki(tempfile::TempDir);

impl Pki {
    fn new() -> Self {
        let pki = Pki(tempfile::tempdir().unwrap());
        for ca in ["ca", "other"] {
            pki.openssl(&format!(
                "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN={ca} -keyout {ca}.key -out {ca}.pem"
            ));
        }
        std::fs::write(pki.path("ext"), "subjectAltName=IP:127.0.0.1\n").unwrap();
        for name in ["server", "client"] {
            pki.openssl(&format!(
                "req -newkey rsa:2048 -nodes -subj /CN={name} -keyout {name}.key -out {name}.csr"
            ));
            pki.openssl(&format!(
                "x509 -req -in {name}.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile ext -out {name}.pem"
            ));
        }
        pki
    }

    fn path(&self, name: &str) -> String {
        self.0.path().join(name).display().to_string()
    }

    fn openssl(&self, args: &str) {
        let output = Command::new("openssl")
            .args(args.split(' '))
            .current_dir(self.0.path())
            .output()
            .expect("openssl");
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
}
