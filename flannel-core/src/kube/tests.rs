use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::{
    addr::{Family, VtepMac},
    config::{BackendKind, NetConf},
    key::PublicKey,
    lease::{LeaseAttrs, SubnetKey, VxlanData, WireguardData},
};

mod families;

const V4: Families = Families {
    v4: true,
    v6: false,
};
const DUAL: Families = Families { v4: true, v6: true };

/// `GET /api/v1/nodes/a` of a cluster with upstream's flannel (annotations, spec and status as observed; managedFields shortened).
const GOLDEN: &str = r#"{"kind":"Node","apiVersion":"v1","metadata":{"name":"a","uid":"62dc9128-8845-462f-875c-d201b27666d0","resourceVersion":"78","creationTimestamp":"2026-11-20T22:26:56Z","annotations":{"flannel.alpha.coreos.com/backend-data":"{\"VNI\":1,\"VtepMAC\":\"b2:ab:a1:15:2f:15\"}","flannel.alpha.coreos.com/backend-type":"vxlan","flannel.alpha.coreos.com/kube-subnet-manager":"true","flannel.alpha.coreos.com/public-ip":"192.168.77.11","volumes.kubernetes.io/controller-managed-attach-detach":"true"},"managedFields":[{"manager":"curl","operation":"Update","apiVersion":"v1","time":"2026-11-20T22:26:56Z","fieldsType":"FieldsV1","fieldsV1":{"f:metadata":{}}}]},"spec":{"podCIDR":"10.5.1.0/24","podCIDRs":["10.5.1.0/24"],"taints":[{"key":"node.kubernetes.io/not-ready","effect":"NoSchedule"}]},"status":{"conditions":[{"type":"NetworkUnavailable","status":"False"}]}}"#;

fn names() -> Names {
    Names::new(DEFAULT_PREFIX).unwrap()
}

fn golden() -> Node {
    serde_json::from_str(GOLDEN).unwrap()
}

/// What the API does with a patch.
fn apply(node: &mut Node, patch: BTreeMap<String, Option<String>>) {
    for (key, value) in patch {
        match value {
            Some(value) => node.annotations.insert(key, value),
            None => node.annotations.remove(&key),
        };
    }
}

fn conf(extra: &str) -> NetConf {
    let json = format!(r#"{{"Network":"10.5.0.0/16","Backend":{{"Type":"vxlan"}}{extra}}}"#);
    NetConf::parse_assigned(&json).unwrap()
}

fn mac(last: u8) -> VtepMac {
    VtepMac::from([0x02, 0, 0, 0, 0, last])
}

fn attrs(host: u8) -> LeaseAttrs {
    LeaseAttrs::vxlan_v4([192, 168, 77, host].into(), 1, mac(host))
}

fn node(name: &str, cidrs: &[&str], annotations: &[(Field, &str)]) -> Node {
    Node {
        name: name.to_owned(),
        annotations: annotations
            .iter()
            .map(|(field, value)| (names().key(*field), (*value).to_owned()))
            .collect(),
        pod_cidr: cidrs.first().copied().unwrap_or_default().to_owned(),
        pod_cidrs: cidrs.iter().map(|cidr| (*cidr).to_owned()).collect(),
        ..Node::default()
    }
}

#[test]
fn prefixes_are_read_as_upstream_reads_them() {
    for (prefix, key) in [
        (
            "flannel.alpha.coreos.com",
            "flannel.alpha.coreos.com/backend-type",
        ),
        (
            "flannel.alpha.coreos.com/",
            "flannel.alpha.coreos.com/backend-type",
        ),
        (
            "flannel.alpha.coreos.com/prefix",
            "flannel.alpha.coreos.com/prefix-backend-type",
        ),
        (
            "flannel.alpha.coreos.com/prefix-",
            "flannel.alpha.coreos.com/prefix-backend-type",
        ),
        ("org.com", "org.com/backend-type"),
        ("org9.com", "org9.com/backend-type"),
        ("org.com/9", "org.com/9-backend-type"),
        ("org.com/9-", "org.com/9-backend-type"),
    ] {
        let names = Names::new(prefix).unwrap();
        assert_eq!(names.key(Field::BackendType), key, "{prefix}");
    }
    for prefix in [
        "org",
        "org/",
        "org/prefix",
        "org.COM",
        "org.com/PREFIX",
        "",
        ".com",
        "org.com/-",
    ] {
        let error = Names::new(prefix).unwrap_err().to_string();
        let words = "subnet/kube: prefix must be in a format: fqdn/[0-9a-z-_]*";
        assert!(error.starts_with(words), "{prefix:?}: {error}");
    }
    let error = Names::new("a.b/c/d").unwrap_err().to_string();
    let words = "subnet/kube: prefix can contain at most single slash";
    assert!(error.starts_with(words), "{error}");
    let names = Names::new("org.com/x").unwrap();
    assert_eq!(names.stored_data_key(), "org.com/x/backend-data");
}

#[test]
fn a_node_is_trimmed_to_what_is_needed() {
    let node = golden();
    assert_eq!(
        (node.name.as_str(), node.resource_version.as_str()),
        ("a", "78")
    );
    assert_eq!(node.annotations.len(), 4, "{:?}", node.annotations);
    assert_eq!(node.pod_cidrs, ["10.5.1.0/24"]);
    let bare: Node = serde_json::from_str(
        r#"{"metadata":{"name":"b","annotations":null,"creationTimestamp":null},"spec":{"podCIDRs":null}}"#,
    )
    .unwrap();
    assert_eq!(bare, self::node("b", &[], &[]));
}

#[test]
fn upstreams_annotations_are_read_and_written_byte_for_byte() {
    let node = golden();
    let reading = read_lease(&node, &names(), V4);
    let lease = reading.lease.unwrap();
    assert_eq!(lease.key.to_string(), "10.5.1.0-24");
    assert_eq!(
        lease.attrs.to_json(),
        r#"{"PublicIP":"192.168.77.11","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"b2:ab:a1:15:2f:15"}}"#
    );
    let plan = plan_own(&node, &names(), &conf(""), &lease.attrs).unwrap();
    assert!(plan.patch.is_empty(), "{:?}", plan.patch);
    let fresh = Node {
        annotations: BTreeMap::new(),
        ..node.clone()
    };
    let plan = plan_own(&fresh, &names(), &conf(""), &lease.attrs).unwrap();
    let expected = node.annotations.iter();
    let expected = expected.map(|(key, value)| (key.clone(), Some(value.clone())));
    assert_eq!(plan.patch, expected.collect());
}

#[test]
fn backends_without_data_publish_null() {
    let attrs = LeaseAttrs {
        public_ip: Some([192, 168, 77, 11].into()),
        backend_type: "host-gw".to_owned(),
        ..LeaseAttrs::default()
    };
    let written = own::published(&attrs, V4);
    assert_eq!(written[&Field::BackendData], "null");
    let both = own::published(
        &LeaseAttrs {
            public_ipv6: Some("fd00::1".parse().unwrap()),
            v6: Some(
                VxlanData {
                    vni: 1,
                    mac: mac(1),
                }
                .into(),
            ),
            ..attrs.clone()
        },
        DUAL,
    );
    assert_eq!(
        both[&Field::BackendV6Data],
        r#"{"VNI":1,"VtepMAC":"02:00:00:00:00:01"}"#
    );
    assert_eq!(both[&Field::PublicIpv6], "fd00::1");
    let peer = node(
        "a",
        &["10.5.1.0/24"],
        &[
            (Field::KubeSubnetManager, "true"),
            (Field::BackendType, "host-gw"),
            (Field::BackendData, "null"),
            (Field::PublicIp, "192.168.77.11"),
        ],
    );
    let reading = read_lease(&peer, &names(), V4);
    assert_eq!(reading.problems, []);
    assert_eq!(reading.lease.unwrap().attrs, attrs);
}

#[test]
fn only_what_differs_is_patched() {
    let node = golden();
    let plan = plan_own(&node, &names(), &conf(""), &attrs(11)).unwrap();
    let keys: Vec<&str> = plan.patch.keys().map(String::as_str).collect();
    assert_eq!(keys, ["flannel.alpha.coreos.com/backend-data"]);
}

#[test]
fn the_administrators_address_is_published_in_place_of_ours() {
    let mut node = golden();
    let key = names().key(Field::PublicIpOverwrite);
    node.annotations.insert(key.clone(), "203.0.113.9".into());
    let plan = plan_own(&node, &names(), &conf(""), &attrs(11)).unwrap();
    assert_eq!(plan.lease.attrs.public_ip, Some([203, 0, 113, 9].into()));
    assert_eq!(
        plan.patch[&names().key(Field::PublicIp)].as_deref(),
        Some("203.0.113.9")
    );
    assert_eq!(
        plan.overwrites[0].announcement(),
        "Overriding public ip with '203.0.113.9' from node annotation 'flannel.alpha.coreos.com/public-ip-overwrite'"
    );
    assert!(plan.overwrites[0].is_news);
    apply(&mut node, plan.patch);
    let plan = plan_own(&node, &names(), &conf(""), &attrs(11)).unwrap();
    assert!(plan.patch.is_empty() && !plan.overwrites[0].is_news);
    for (value, problems) in [("", 0), ("here", 1), ("fd00::1", 1)] {
        node.annotations.insert(key.clone(), value.into());
        let plan = plan_own(&node, &names(), &conf(""), &attrs(11)).unwrap();
        assert_eq!(
            plan.lease.attrs.public_ip,
            Some([192, 168, 77, 11].into()),
            "{value}"
        );
        assert_eq!(plan.problems.len(), problems, "{value}");
    }
}

#[test]
fn pod_cidrs_are_taken_by_upstreams_rules() {
    let read = |cidr: &str, cidrs: &[&str], families| {
        let mut node = node("x", cidrs, &[]);
        node.pod_cidr = cidr.to_owned();
        subnets_of(&node, families).map(|key| key.to_string())
    };
    let text = |result: Result<String, NodeError>| result.unwrap_err().to_string();
    assert_eq!(read("10.5.1.0/24", &[], V4).unwrap(), "10.5.1.0-24");
    assert_eq!(
        read("10.5.9.0/24", &["10.5.1.0/24"], V4).unwrap(),
        "10.5.1.0-24"
    );
    let both = ["fd00:1::/64", "10.5.1.0/24"];
    assert_eq!(read("", &both, DUAL).unwrap(), "10.5.1.0-24&fd00:1::-64");
    assert_eq!(read("", &both, V4).unwrap(), "10.5.1.0-24");
    assert_eq!(text(read("", &[], V4)), r#"node "x" pod cidr not assigned"#);
    assert_eq!(
        text(read("", &["10.5.1.0/24", "fd00::/64", "10.5.2.0/24"], DUAL)),
        r#"node "x" pod cidrs should be IPv4/IPv6 only or dualstack"#
    );
    assert_eq!(
        text(read("10.5.1.0", &[], V4)),
        r#"node "x": invalid CIDR address: 10.5.1.0"#
    );
}

#[test]
fn a_subnet_outside_the_network_is_not_published() {
    let outside = node("x5", &["10.99.1.0/24"], &[]);
    assert_eq!(
        plan_own(&outside, &names(), &conf(""), &attrs(1))
            .unwrap_err()
            .to_string(),
        r#"subnet "10.5.0.0/16" specified in the flannel net config doesn't contain "10.99.1.0/24" PodCIDR of the "x5" node"#
    );
    let wider = node("x5", &["10.4.0.0/15"], &[]);
    assert!(plan_own(&wider, &names(), &conf(""), &attrs(1)).is_err());
    let dual = conf(r#","EnableIPv6":true,"IPv6Network":"fd00:1::/48""#);
    let outside = node("x5", &["10.5.1.0/24", "fd00:2::/64"], &[]);
    assert_eq!(
        plan_own(&outside, &names(), &dual, &attrs(1))
            .unwrap_err()
            .to_string(),
        r#"subnet "fd00:1::/48" specified in the flannel net config doesn't contain "fd00:2::/64" IPv6 PodCIDR of the "x5" node"#
    );
    let lacking = node("x5", &["10.5.1.0/24"], &[]);
    assert_eq!(
        plan_own(&lacking, &names(), &dual, &attrs(1))
            .unwrap_err()
            .to_string(),
        r#"missing IPv6 address on n.Spec.PodCIDRs of node "x5""#
    );
}

#[test]
fn what_one_family_lacks_does_not_cost_the_other_its_traffic() {
    let half = node(
        "b",
        &["10.5.1.0/24", "fd00:1::/64"],
        &[
            (Field::KubeSubnetManager, "true"),
            (Field::BackendType, "vxlan"),
            (
                Field::BackendData,
                r#"{"VNI":1,"VtepMAC":"02:00:00:00:00:02"}"#,
            ),
            (Field::PublicIp, "192.168.77.12"),
        ],
    );
    let reading = read_lease(&half, &names(), DUAL);
    assert_eq!(reading.lease.unwrap().key.to_string(), "10.5.1.0-24");
    assert_eq!(
        reading.problems[0].to_string(),
        r#"annotation flannel.alpha.coreos.com/public-ipv6 of node "b" is missing: it must be an IPv6 address"#
    );
    let v4_only = read_lease(&golden(), &names(), DUAL);
    assert!(v4_only.lease.is_some() && v4_only.problems.len() == 1);
    for (field, value) in [
        (Field::PublicIp, "somewhere"),
        (Field::PublicIp, "fd00::1"),
        (Field::BackendData, "{"),
        (Field::BackendData, "null"),
        (Field::BackendData, r#"{"VNI":1}"#),
    ] {
        let mut node = golden();
        node.annotations
            .insert(names().key(field), value.to_owned());
        let reading = read_lease(&node, &names(), V4);
        assert_eq!(
            (reading.lease, reading.problems.len()),
            (None, 1),
            "{value}"
        );
    }
}

#[test]
fn the_mac_address_is_also_looked_for_where_upstream_looks() {
    let names = Names::new("org.com/x").unwrap();
    let mut node = golden();
    node.annotations.clear();
    assert_eq!(stored_attrs(&node, &names).v4, None);
    let data = |last| format!(r#"{{"VNI":1,"VtepMAC":"{}"}}"#, mac(last));
    node.annotations
        .insert("org.com/x/backend-data".into(), data(7));
    assert_eq!(
        stored_attrs(&node, &names).vxlan(Family::V4).unwrap().mac,
        mac(7)
    );
    node.annotations
        .insert("org.com/x-backend-data".into(), data(8));
    assert_eq!(
        stored_attrs(&node, &names).vxlan(Family::V4).unwrap().mac,
        mac(8)
    );
}

#[test]
fn a_cluster_is_read_node_by_node() {
    let peer = |name: &str, cidr: &str, host: u8, created: &str| {
        let fields = own::published(&attrs(host), V4);
        let fields: Vec<(Field, &str)> = fields.iter().map(|(f, v)| (*f, v.as_str())).collect();
        Node {
            created: created.to_owned(),
            ..node(name, &[cidr], &fields)
        }
    };
    let mut stranger = peer("stranger", "10.5.8.0/24", 8, "2026-01-01T00:00:00Z");
    stranger
        .annotations
        .remove(&names().key(Field::KubeSubnetManager));
    let nodes = [
        peer("a", "10.5.1.0/24", 1, "2026-01-01T00:00:00Z"),
        peer("b", "10.5.2.0/24", 2, "2026-01-02T00:00:00Z"),
        peer("old", "10.5.3.0/24", 3, "2026-01-01T00:00:00Z"),
        peer("new", "10.5.3.0/24", 2, "2026-01-03T00:00:00Z"),
        peer("bad", "10.5.300.0/24", 5, "2026-01-01T00:00:00Z"),
        stranger,
    ];
    let cluster = read_cluster(&nodes, &names(), V4, "a");
    let held: Vec<(String, &str)> = cluster
        .holders
        .iter()
        .map(|(key, node)| (key.to_string(), node.as_str()))
        .collect();
    assert_eq!(
        held,
        [
            ("10.5.2.0-24".to_owned(), "b"),
            ("10.5.3.0-24".to_owned(), "new")
        ]
    );
    assert_eq!(cluster.problems.keys().collect::<Vec<_>>(), ["bad"]);
    assert_eq!(cluster.twins.len(), 1);
    assert_eq!(cluster.twins[0].left_out, "old");
    let leases = cluster
        .leases
        .iter()
        .map(|(key, attrs)| (cluster.holders[key].as_str(), attrs));
    let shared = shared_addresses(leases);
    assert_eq!(shared.len(), 1);
    assert_eq!(
        shared.values().next().unwrap().iter().collect::<Vec<_>>(),
        ["b", "new"]
    );
}

#[test]
fn ranges_are_not_judged_where_the_cluster_gives_out_subnets() {
    for keys in [
        r#""Network":"10.5.0.0/24","SubnetLen":25"#,
        r#""Network":"10.5.0.0/29""#,
        r#""Network":"10.5.0.0/16","SubnetLen":16"#,
        r#""Network":"10.5.0.0/16","SubnetMin":"10.6.0.0","SubnetMax":"1.2.3.4""#,
    ] {
        let json = format!(r#"{{{keys},"Backend":{{"Type":"vxlan"}}}}"#);
        assert!(NetConf::parse(&json).is_err(), "{keys}");
        let family = NetConf::parse_assigned(&json).unwrap().ipv4.unwrap();
        assert!(family.subnet_len >= family.network.prefix_len(), "{keys}");
    }
    assert!(NetConf::parse_assigned(r#"{"Backend":{"Type":"vxlan"}}"#).is_err());
}

#[test]
fn the_table_follows_the_smallest_subnet() {
    let network = "10.5.0.0/16".parse().unwrap();
    let len = |subnets: &[&str], at_least| {
        granularity(
            network,
            subnets.iter().map(|net| net.parse().unwrap()),
            at_least,
        )
    };
    assert_eq!(len(&[], 24), 24);
    assert_eq!(len(&["10.5.1.0/25", "10.5.2.0/24"], 24), 25);
    assert_eq!(len(&["10.5.0.0/18"], 24), 24);
    assert_eq!(len(&["10.6.0.0/28"], 24), 24);
    assert_eq!(len(&["10.5.1.0/26"], 28), 28);
    let wide = "10.0.0.0/8".parse().unwrap();
    let subnets = ["10.0.0.0/28", "10.1.0.0/30"].map(|net| net.parse().unwrap());
    assert_eq!(granularity(wide, subnets, 24), 28);
    let v6 = "fd00::/48".parse().unwrap();
    let subnets = ["fd00:0:0:1::/66", "fd01::/80", "fd00::/69", "10.0.0.0/28"];
    let subnets = subnets.map(|net| net.parse().unwrap());
    assert_eq!(granularity(v6, subnets, 64), 66);
}

proptest! {
    #[test]
    fn what_a_node_publishes_is_what_others_read(
        ip in any::<[u8; 4]>(),
        ip6 in any::<[u8; 16]>(),
        vni in 0u32..1 << 24,
        octets in any::<[u8; 8]>(),
        port in any::<u16>(),
        kind in proptest::sample::select(&BackendKind::ALL[..]),
        subnet in 0u8..,
        dual in any::<bool>(),
    ) {
        let data = match (kind, octets) {
            (BackendKind::Vxlan, [octets @ .., _, _]) => Some(VxlanData { vni, mac: VtepMac::new(octets) }.into()),
            (BackendKind::Wireguard, octets) => {
                let key = std::array::from_fn(|at| octets[at % 8]);
                Some(WireguardData { public_key: PublicKey::new(key), port }.into())
            }
            (BackendKind::HostGw | BackendKind::Alloc, _) => None,
        };
        let attrs = LeaseAttrs {
            public_ip: Some(ip.into()),
            public_ipv6: dual.then(|| ip6.into()),
            backend_type: kind.lease_type().to_owned(),
            v4: data,
            v6: data.filter(|_| dual),
        };
        let v4 = format!("10.5.{subnet}.0/24");
        let v6 = format!("fd00:1:0:{subnet:x}::/64");
        let cidrs = if dual { vec![v4.as_str(), v6.as_str()] } else { vec![v4.as_str()] };
        let mut node = node("n", &cidrs, &[]);
        let conf = conf(if dual { r#","EnableIPv6":true,"IPv6Network":"fd00:1::/48""# } else { "" });
        let plan = plan_own(&node, &names(), &conf, &attrs).unwrap();
        apply(&mut node, plan.patch);
        let reading = read_lease(&node, &names(), Families::from(&conf));
        prop_assert_eq!(reading.problems, vec![]);
        prop_assert_eq!(reading.lease.unwrap(), plan.lease);
        let again = plan_own(&node, &names(), &conf, &attrs).unwrap();
        prop_assert!(again.patch.is_empty());
    }

    #[test]
    fn nothing_in_a_node_breaks_the_reading(
        cidrs in proptest::collection::vec("[0-9a-f:./]{0,24}", 0..4),
        values in proptest::collection::vec(".{0,40}", 4),
        prefix in ".{0,24}",
    ) {
        let cidrs: Vec<&str> = cidrs.iter().map(String::as_str).collect();
        let mut node = node("n", &cidrs, &[(Field::KubeSubnetManager, "true")]);
        let fields = [Field::BackendType, Field::BackendData, Field::PublicIp, Field::PublicIpv6];
        for (field, value) in fields.into_iter().zip(values) {
            node.annotations.insert(names().key(field), value);
        }
        let _reading = read_lease(&node, &names(), DUAL);
        let _cluster = read_cluster([&node], &names(), DUAL, "");
        let _plan = plan_own(&node, &names(), &conf(""), &attrs(1));
        let _names = Names::new(&prefix);
        let _key: Option<SubnetKey> = subnets_of(&node, DUAL).ok();
    }
}
