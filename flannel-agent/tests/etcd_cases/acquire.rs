//! Taking a lease: what is written, races, reservations.

use std::{collections::BTreeSet, net::Ipv4Addr};

use flannel_agent::leases::{ErrorKind, Outcome, Store};
use flannel_core::{
    addr::{Family, VtepMac},
    lease::VxlanData,
};
use tokio::{task::JoinSet, time::timeout};

use super::{CONFIG_KEY, SUBNETS, config, lease_key};
use crate::{
    etcd_server::EtcdServer,
    lease_rig::{Agent, CONF, FIVE, Log, PATIENCE, attrs, key, offer, snapshot, with_previous},
};

#[tokio::test]
async fn keys_values_and_ttl_are_those_of_upstream() {
    let etcd = EtcdServer::start();
    etcd.ctl(&["put", CONFIG_KEY, CONF]);
    let log = Log::capture();
    let store = Store::open(&config(&etcd)).await.unwrap();
    assert_eq!(store.net_conf().await.unwrap(), CONF);

    let mac: VtepMac = "1a:cf:f4:7b:c6:ea".parse().unwrap();
    let mut wanted = with_previous(offer(12, CONF), "10.5.3.0-24");
    wanted.attrs.v4 = Some(VxlanData { vni: 1, mac }.into());
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
        let mac = mac.parse().unwrap();
        Some(VxlanData { vni: 1, mac }.into())
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
async fn a_lease_that_does_not_fit_the_configuration_any_more_is_replaced() {
    let etcd = EtcdServer::start();
    let log = Log::capture();
    let store = Store::open(&config(&etcd)).await.unwrap();
    let held = store.acquire(&offer(1, CONF)).await.unwrap();
    let old = held.lease.key.to_string();
    let before = etcd.leases();
    // The range of upstream's sample, in quarters of the subnets before.
    let range = r#"{"Network":"10.5.0.0/16","SubnetLen":26,"SubnetMin":"10.5.10.0","SubnetMax":"10.5.20.192","Backend":{"Type":"vxlan"}}"#;
    let held = store.acquire(&offer(1, range)).await.unwrap();
    assert_eq!(held.outcome, Outcome::New);
    let subnet = held.lease.key.v4.unwrap();
    let range_of: [Ipv4Addr; 2] = ["10.5.10.0", "10.5.20.192"].map(|ip| ip.parse().unwrap());
    let [low, high] = range_of;
    assert_eq!(subnet.prefix_len(), 26);
    assert!(
        subnet.network() >= low && subnet.network() <= high,
        "{subnet}"
    );
    // One transaction: at no moment both, or none.
    assert_eq!(etcd.keys(SUBNETS), [lease_key(&held.lease.key.to_string())]);
    let after = etcd.leases();
    assert_eq!(after.len(), 1);
    assert_ne!(after, before);
    let said = log.lines(&["WARN", &old, "not compatible with current config, deleting"]);
    assert_eq!(said.len(), 1);

    // The previous subnet counts only as long as it fits, too.
    etcd.ctl(&["del", "--prefix", SUBNETS]);
    let held = store.acquire(&with_previous(offer(1, range), &old)).await;
    assert_eq!(held.unwrap().outcome, Outcome::New);
    etcd.ctl(&["del", "--prefix", SUBNETS]);
    let fits = with_previous(offer(1, range), "10.5.15.192-26");
    let held = store.acquire(&fits).await.unwrap();
    assert_eq!(
        (held.outcome, held.lease.key),
        (Outcome::Previous, key("10.5.15.192-26"))
    );
}

#[tokio::test]
async fn leases_of_dual_stack_and_of_older_nodes_are_understood() {
    let etcd = EtcdServer::start();
    // As upstream wrote them: dual stack, IPv6 alone, and v0.12.0.
    let dual = r#"{"PublicIP":"192.168.77.12","PublicIPv6":"fd77::12","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"b2:dd:fe:4d:6e:7c"},"BackendV6Data":{"VNI":1,"VtepMAC":"96:d7:e0:3f:25:b6"}}"#;
    let v6 = r#"{"PublicIP":"0.0.0.0","PublicIPv6":"fd77::13","BackendType":"vxlan","BackendV6Data":{"VNI":1,"VtepMAC":"96:d7:e0:3f:25:b7"}}"#;
    let old = r#"{"PublicIP":"192.168.77.14","BackendType":"vxlan","BackendData":{"VtepMAC":"d2:e2:e0:0a:1a:b5"}}"#;
    let written = [
        ("10.5.74.0-24&fd05:0:0:4d::-64", dual),
        ("0.0.0.0-0&fd00:12:0:43::-64", v6),
        ("10.5.81.0-24", old),
    ];
    for (name, value) in written {
        etcd.ctl(&["put", &lease_key(name), value]);
    }
    let mut agent =
        Agent::start(&config(&etcd), with_previous(offer(1, CONF), "10.5.1.0-24")).await;
    let view = agent
        .until("a complete list", |view| view.snapshot.is_some())
        .await;
    let snapshot = view.snapshot.unwrap();
    let keys: Vec<String> = snapshot.leases.keys().map(ToString::to_string).collect();
    let mut wanted: Vec<String> = written.iter().map(|(name, _)| (*name).to_owned()).collect();
    wanted.push("10.5.1.0-24".to_owned());
    let sorted = |mut list: Vec<String>| {
        list.sort();
        list
    };
    assert_eq!(sorted(keys), sorted(wanted));
    let mac = |name: &str| {
        let data = snapshot.leases[&key(name)].vxlan(Family::V4);
        data.map(|data| (data.vni, data.mac.to_string()))
    };
    let has = |vni, mac: &str| Some((vni, mac.to_owned()));
    assert_eq!(
        mac("10.5.74.0-24&fd05:0:0:4d::-64"),
        has(1, "b2:dd:fe:4d:6e:7c")
    );
    assert_eq!(mac("10.5.81.0-24"), has(0, "d2:e2:e0:0a:1a:b5"));
    assert_eq!(mac("0.0.0.0-0&fd00:12:0:43::-64"), None);
    // Nobody else's subnet is given out, whatever key it stands under.
    let taken = FIVE
        .replace("10.5.10.0", "10.5.74.0")
        .replace("10.5.14.0", "10.5.74.0");
    let store = Store::open(&config(&etcd)).await.unwrap();
    let error = store.acquire(&offer(2, &taken)).await.unwrap_err();
    assert!(error.to_string().contains("out of subnets"), "{error}");
}
