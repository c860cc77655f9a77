//! Both families, and what each backend stores.

use std::collections::BTreeSet;

use flannel_agent::leases::{Outcome, Store};
use flannel_core::{
    addr::VtepMac,
    config::BackendKind,
    lease::{LeaseAttrs, VxlanData},
};
use tokio::task::JoinSet;

use super::{SUBNETS, config, lease_key};
use crate::{
    etcd_server::EtcdServer,
    lease_rig::{Agent, CONF, dual, key, offer, v6_only, with_previous},
};

/// Values as upstream writes them for each backend.
#[tokio::test]
async fn values_of_each_backend_are_those_of_upstream() {
    let key1 = "AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=";
    for (kind, expected) in [
        (
            BackendKind::Wireguard,
            format!(
                r#"{{"PublicIP":"192.168.77.1","PublicIPv6":"fd77::1","BackendType":"wireguard","BackendData":{{"PublicKey":"{key1}","Port":51820}},"BackendV6Data":{{"PublicKey":"{key1}","Port":51821}}}}"#
            ),
        ),
        (
            BackendKind::HostGw,
            r#"{"PublicIP":"192.168.77.1","PublicIPv6":"fd77::1","BackendType":"host-gw"}"#.into(),
        ),
        (
            BackendKind::Alloc,
            r#"{"PublicIP":"192.168.77.1","PublicIPv6":null}"#.into(),
        ),
    ] {
        let etcd = EtcdServer::start();
        let store = Store::open(&config(&etcd)).await.unwrap();
        let name = "10.5.6.0-24&fd05:0:0:13::-64";
        let wanted = with_previous(dual(1, kind), name);
        let held = store.acquire(&wanted).await.unwrap();
        assert_eq!(held.lease.key, key(name), "{kind}");
        assert_eq!(etcd.value(&lease_key(name)), expected, "{kind}");
        let stored = store.own_stored(&wanted.identity).await.unwrap();
        assert_eq!(stored, Some(held.lease), "{kind}");
    }
}

/// Upstream's nodes of IPv6 alone all find the first one's lease, whose `PublicIP` is 0.0.0.0 as theirs, and take its subnet.
#[tokio::test]
async fn nodes_of_ipv6_alone_have_each_their_own_subnet() {
    let etcd = EtcdServer::start();
    let mut starts = JoinSet::new();
    for node in 1..=4 {
        let config = config(&etcd);
        starts.spawn(async move {
            let store = Store::open(&config).await.unwrap();
            let held = store.acquire(&v6_only(node, BackendKind::Vxlan)).await;
            (node, held.unwrap().lease.key)
        });
    }
    let held = starts.join_all().await;
    let keys: BTreeSet<_> = held.iter().map(|(_, key)| *key).collect();
    assert_eq!(keys.len(), 4, "{held:?}");
    assert!(keys.iter().all(|key| key.v4.is_none() && key.v6.is_some()));
    assert_eq!(etcd.keys(SUBNETS).len(), 4);
    for (node, key) in held {
        let name = lease_key(&key.to_string());
        assert!(name.contains("/0.0.0.0-0&fd05:"), "{name}");
        assert_eq!(
            etcd.value(&name),
            format!(
                r#"{{"PublicIP":"0.0.0.0","PublicIPv6":"fd77::{node}","BackendType":"vxlan","BackendV6Data":{{"VNI":1,"VtepMAC":"0a:00:00:00:01:0{node}"}}}}"#
            )
        );
        // The next start takes its own again, and nobody else's.
        let store = Store::open(&config(&etcd)).await.unwrap();
        let wanted = v6_only(node, BackendKind::Vxlan);
        let again = store.acquire(&wanted).await.unwrap();
        assert_eq!((again.lease.key, again.outcome), (key, Outcome::Reused));
        let stored = store.own_stored(&wanted.identity).await.unwrap();
        assert_eq!(stored, Some(again.lease));
    }
    assert_eq!(etcd.leases().len(), 4);
}

/// Upstream compares both families and takes a change up only when both have changed.
#[tokio::test]
async fn a_change_of_one_family_is_taken_up() {
    let etcd = EtcdServer::start();
    let mut first = Agent::start(&config(&etcd), dual(1, BackendKind::Vxlan)).await;
    let second = Agent::start(&config(&etcd), dual(2, BackendKind::Vxlan)).await;
    let subnet = second.held.lease.key;
    let changes: [fn(&mut LeaseAttrs); 4] = [
        |attrs| {
            let mac = VtepMac::new([0x0a, 0, 0, 0, 1, 0xee]);
            attrs.v6 = Some(VxlanData { vni: 1, mac }.into());
        },
        |attrs| attrs.public_ipv6 = Some("fd77::99".parse().unwrap()),
        |attrs| {
            let mac = VtepMac::new([0x0a, 0, 0, 0, 0, 0xee]);
            attrs.v4 = Some(VxlanData { vni: 1, mac }.into());
        },
        |attrs| attrs.public_ip = Some([192, 168, 77, 99].into()),
    ];
    for change in changes {
        let mut offer = second.offer.borrow().clone();
        change(&mut offer.attrs);
        offer.identity.public_ip = offer.attrs.public_ip;
        offer.identity.public_ipv6 = offer.attrs.public_ipv6;
        let wanted = offer.attrs.clone();
        second.offer.send(offer).unwrap();
        first
            .until("the change", |view| {
                let leases = view.snapshot.as_ref().map(|all| &all.leases);
                leases.is_some_and(|leases| leases.get(&subnet) == Some(&wanted))
            })
            .await;
    }
    first.stop().await;
    second.stop().await;
}

/// Upstream deletes the lease then, and takes another IPv4 subnet as well.
#[tokio::test]
async fn another_family_leaves_the_subnet_of_the_first_alone() {
    let etcd = EtcdServer::start();
    let store = Store::open(&config(&etcd)).await.unwrap();
    let before = store.acquire(&offer(1, CONF)).await.unwrap().lease.key;
    let both = store.acquire(&dual(1, BackendKind::Vxlan)).await.unwrap();
    assert_eq!(both.lease.key.v4, before.v4);
    assert!(both.lease.key.v6.is_some());
    assert_eq!(etcd.keys(SUBNETS), [lease_key(&both.lease.key.to_string())]);
    let alone = store
        .acquire(&v6_only(1, BackendKind::Vxlan))
        .await
        .unwrap();
    assert_eq!(alone.lease.key.v6, both.lease.key.v6);
    assert_eq!(alone.lease.key.v4, None);
    assert_eq!(
        etcd.keys(SUBNETS),
        [lease_key(&alone.lease.key.to_string())]
    );
    assert_eq!(etcd.leases().len(), 1);
}

#[tokio::test]
async fn another_backend_keeps_the_subnet() {
    let etcd = EtcdServer::start();
    let store = Store::open(&config(&etcd)).await.unwrap();
    let first = store.acquire(&dual(1, BackendKind::Vxlan)).await.unwrap();
    for kind in [
        BackendKind::HostGw,
        BackendKind::Wireguard,
        BackendKind::Alloc,
    ] {
        let next = store.acquire(&dual(1, kind)).await.unwrap();
        assert_eq!(
            (next.lease.key, next.outcome),
            (first.lease.key, Outcome::Reused)
        );
        let value = etcd.value(&lease_key(&first.lease.key.to_string()));
        assert_eq!(LeaseAttrs::from_json(&value), Ok(dual(1, kind).attrs));
    }
    assert_eq!(etcd.leases().len(), 1);
}
