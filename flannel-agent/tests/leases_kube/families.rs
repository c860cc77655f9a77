//! Both families, and every backend.

use std::collections::BTreeMap;

use flannel_core::{addr::VtepMac, config::BackendKind, lease::VxlanData};
use flannel_testkit::apiserver::Kind;

use crate::{
    lease_rig::{self, Agent, Log, key},
    rig::{Cluster, PREFIX, dual, offer, until},
};

const SUBNET: &str = "10.5.1.0-24&fd05:0:0:1::-64";

/// Nodes of both families.
fn cluster(nodes: &[u8]) -> Cluster {
    let cluster = Cluster::new(&[]);
    for number in nodes {
        let (v4, v6) = (
            format!("10.5.{number}.0/24"),
            format!("fd05:0:0:{number:x}::/64"),
        );
        let node = flannel_testkit::apiserver::node(&format!("n{number}"), &[&v4, &v6]);
        cluster.api.create(Kind::Node, node).expect("a node");
    }
    cluster
}

/// The annotations of flannel's, without their prefix.
fn annotations(cluster: &Cluster, node: &str) -> BTreeMap<String, String> {
    let node = cluster.api.node(node).expect("the node");
    let all = node["metadata"]["annotations"].as_object().cloned();
    let all = all.unwrap_or_default().into_iter();
    all.filter_map(|(key, value)| {
        let name = key.strip_prefix(PREFIX)?.to_owned();
        Some((name, value.as_str()?.to_owned()))
    })
    .collect()
}

fn expected(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    let pairs = pairs.iter();
    pairs
        .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
        .collect()
}

#[tokio::test]
async fn annotations_of_each_backend_are_those_of_upstream() {
    let wireguard = |port: u16| {
        format!(r#"{{"PublicKey":"AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=","Port":{port}}}"#)
    };
    let (wireguard4, wireguard6) = (wireguard(51_820), wireguard(51_821));
    let of = |kind, v4: &str, v6: &str| {
        expected(&[
            ("backend-data", v4),
            ("backend-type", kind),
            ("backend-v6-data", v6),
            ("kube-subnet-manager", "true"),
            ("public-ip", "192.168.77.1"),
            ("public-ipv6", "fd77::1"),
        ])
    };
    let cluster = cluster(&[1]);
    // Each agent finds what the one before has left.
    for (kind, wanted) in [
        (
            BackendKind::Vxlan,
            of(
                "vxlan",
                r#"{"VNI":1,"VtepMAC":"0a:00:00:00:00:01"}"#,
                r#"{"VNI":1,"VtepMAC":"0a:00:00:00:01:01"}"#,
            ),
        ),
        (BackendKind::HostGw, of("host-gw", "null", "null")),
        (
            BackendKind::Wireguard,
            of("wireguard", &wireguard4, &wireguard6),
        ),
        (
            BackendKind::Alloc,
            expected(&[
                ("backend-data", "null"),
                ("backend-type", ""),
                ("kube-subnet-manager", "true"),
                ("public-ip", "192.168.77.1"),
            ]),
        ),
    ] {
        let agent = Agent::start(&cluster.config(1), dual(1, kind)).await;
        assert_eq!(agent.held.lease.key, key(SUBNET), "{kind}");
        assert_eq!(annotations(&cluster, "n1"), wanted, "{kind}");
        agent.stop().await;
        cluster.api.forget_asked();
        let agent = Agent::start(&cluster.config(1), dual(1, kind)).await;
        assert!(cluster.asked("PATCH", "").is_empty(), "{kind}");
        agent.stop().await;
    }
}

/// Other nodes would go on sending what nobody takes.
#[tokio::test]
async fn a_family_that_is_switched_off_is_not_published_any_more() {
    let cluster = cluster(&[1, 2]);
    let mut other = Agent::start(&cluster.config(2), dual(2, BackendKind::Vxlan)).await;
    let agent = Agent::start(&cluster.config(1), dual(1, BackendKind::Vxlan)).await;
    let has = |name: &str| {
        let name = key(name);
        move |view: &flannel_agent::leases::View| {
            let leases = view.snapshot.as_ref().map(|all| &all.leases);
            leases.is_some_and(|leases| leases.contains_key(&name))
        }
    };
    other.until("both families", has(SUBNET)).await;
    agent.stop().await;
    let agent = Agent::start(&cluster.config(1), offer(1)).await;
    assert_eq!(agent.held.lease.key, key("10.5.1.0-24"));
    assert_eq!(
        annotations(&cluster, "n1"),
        expected(&[
            ("backend-data", r#"{"VNI":1,"VtepMAC":"0a:00:00:00:00:01"}"#),
            ("backend-type", "vxlan"),
            ("kube-subnet-manager", "true"),
            ("public-ip", "192.168.77.1"),
        ])
    );
    other.until("IPv4 alone", has("10.5.1.0-24")).await;
    other
        .until("no IPv6", |view| !has(SUBNET)(view) && view.connected)
        .await;
    agent.stop().await;
    let agent = Agent::start(&cluster.config(1), dual(1, BackendKind::Vxlan)).await;
    other.until("both families again", has(SUBNET)).await;
    agent.stop().await;
    other.stop().await;
}

#[tokio::test]
async fn a_node_of_ipv6_alone_publishes_nothing_of_ipv4() {
    let cluster = Cluster::new(&[]);
    let node = flannel_testkit::apiserver::node("n1", &["fd05:0:0:1::/64"]);
    cluster.api.create(Kind::Node, node).expect("a node");
    let offer = lease_rig::v6_only(1, BackendKind::Vxlan);
    let agent = Agent::start(&cluster.config(1), offer).await;
    assert_eq!(agent.held.lease.key, key("0.0.0.0-0&fd05:0:0:1::-64"));
    assert_eq!(
        annotations(&cluster, "n1"),
        expected(&[
            (
                "backend-v6-data",
                r#"{"VNI":1,"VtepMAC":"0a:00:00:00:01:01"}"#
            ),
            ("backend-type", "vxlan"),
            ("kube-subnet-manager", "true"),
            ("public-ipv6", "fd77::1"),
        ])
    );
    agent.stop().await;
}

#[tokio::test]
async fn the_administrators_ipv6_address_is_published_while_running() {
    let cluster = cluster(&[1]);
    let log = Log::capture();
    cluster.set("n1", "public-ipv6-overwrite", Some("2001:db8::9"));
    let agent = Agent::start(&cluster.config(1), dual(1, BackendKind::Vxlan)).await;
    let published = || cluster.get("n1", "public-ipv6");
    assert_eq!(published().as_deref(), Some("2001:db8::9"));
    assert_eq!(
        cluster.get("n1", "public-ip").as_deref(),
        Some("192.168.77.1")
    );
    let line = "Overriding public ipv6 with '2001:db8::9' from node annotation 'flannel.alpha.coreos.com/public-ipv6-overwrite'";
    assert_eq!(log.lines(&["INFO", line]).len(), 1);
    cluster.set("n1", "public-ipv6-overwrite", None);
    until("our own again", || {
        published().as_deref() == Some("fd77::1")
    })
    .await;
    agent.stop().await;
}

/// A half that comes later is taken up: the data of IPv6 alone, too.
#[tokio::test]
async fn a_change_of_the_ipv6_data_alone_is_taken_up() {
    let cluster = cluster(&[1, 2]);
    let mut agent = Agent::start(&cluster.config(1), dual(1, BackendKind::Vxlan)).await;
    let other = Agent::start(&cluster.config(2), dual(2, BackendKind::Vxlan)).await;
    let subnet = other.held.lease.key;
    for last in [0xee, 0xef] {
        let data = VxlanData {
            vni: 1,
            mac: VtepMac::new([0x0a, 0, 0, 0, 1, last]),
        };
        let mut offer = other.offer.borrow().clone();
        offer.attrs.v6 = Some(data.into());
        other.offer.send(offer).expect("the store runs");
        agent
            .until("the new MAC address", |view| {
                let leases = view.snapshot.as_ref().map(|all| &all.leases);
                let peer = leases.and_then(|leases| leases.get(&subnet));
                peer.is_some_and(|peer| peer.v6 == Some(data.into()))
            })
            .await;
    }
    agent.stop().await;
    other.stop().await;
}
