//! Both families, and every backend.

use super::*;

const CIDRS: [&str; 2] = ["10.5.1.0/24", "fd00:1:0:1::/64"];

fn dual(kind: &str) -> NetConf {
    let json = format!(
        r#"{{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:1::/48","Backend":{{"Type":"{kind}"}}}}"#
    );
    NetConf::parse_assigned(&json).unwrap()
}

fn v6_only() -> NetConf {
    let json = r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00:1::/48","Backend":{"Type":"vxlan"}}"#;
    NetConf::parse_assigned(json).unwrap()
}

fn offered(kind: BackendKind) -> LeaseAttrs {
    let data = |last: u8| match kind {
        BackendKind::Vxlan => Some(
            VxlanData {
                vni: 1,
                mac: mac(last),
            }
            .into(),
        ),
        BackendKind::Wireguard => Some(
            WireguardData {
                public_key: PublicKey::new([last; 32]),
                port: 51_819 + u16::from(last),
            }
            .into(),
        ),
        BackendKind::HostGw | BackendKind::Alloc => None,
    };
    LeaseAttrs {
        public_ip: Some([192, 168, 88, 21].into()),
        // Upstream's alloc publishes no IPv6 address.
        public_ipv6: (kind != BackendKind::Alloc).then(|| "fd88::21".parse().unwrap()),
        backend_type: kind.lease_type().to_owned(),
        v4: data(1),
        v6: data(2),
    }
}

/// Byte for byte what upstream's nodes have.
#[test]
fn annotations_of_each_backend() {
    let key = |byte: &str| format!("{byte}=");
    let (one, two) = (
        key("AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE"),
        key("AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI"),
    );
    let cases = [
        (
            BackendKind::Vxlan,
            Some([
                r#"{"VNI":1,"VtepMAC":"02:00:00:00:00:01"}"#.to_owned(),
                r#"{"VNI":1,"VtepMAC":"02:00:00:00:00:02"}"#.to_owned(),
            ]),
        ),
        (
            BackendKind::Wireguard,
            Some([
                format!(r#"{{"PublicKey":"{one}","Port":51820}}"#),
                format!(r#"{{"PublicKey":"{two}","Port":51821}}"#),
            ]),
        ),
        (
            BackendKind::HostGw,
            Some(["null".to_owned(), "null".to_owned()]),
        ),
        (BackendKind::Alloc, None),
    ];
    for (kind, data) in cases {
        let mut expected = vec![
            ("kube-subnet-manager", "true".to_owned()),
            ("backend-type", kind.lease_type().to_owned()),
            ("public-ip", "192.168.88.21".to_owned()),
        ];
        match data {
            Some([v4, v6]) => expected.extend([
                ("backend-data", v4),
                ("backend-v6-data", v6),
                ("public-ipv6", "fd88::21".to_owned()),
            ]),
            None => expected.push(("backend-data", "null".to_owned())),
        }
        let expected = expected
            .into_iter()
            .map(|(name, value)| (format!("{DEFAULT_PREFIX}/{name}"), Some(value)));
        let mut node = node("x1", &CIDRS, &[]);
        let plan = plan_own(&node, &names(), &dual(kind.as_str()), &offered(kind)).unwrap();
        assert_eq!(plan.patch, expected.collect(), "{kind}");
        assert_eq!(plan.lease.key.to_string(), "10.5.1.0-24&fd00:1:0:1::-64");
        apply(&mut node, plan.patch);
        let reading = read_lease(&node, &names(), DUAL);
        assert_eq!(
            (reading.lease, reading.problems),
            (Some(plan.lease), vec![])
        );
    }
}

#[test]
fn what_an_earlier_backend_or_family_has_left_is_removed() {
    let mut node = node("x1", &CIDRS, &[]);
    node.annotations
        .insert("example.com/else".into(), "kept".into());
    let vxlan = offered(BackendKind::Vxlan);
    let plan = plan_own(&node, &names(), &dual("vxlan"), &vxlan).unwrap();
    apply(&mut node, plan.patch);
    let removed = |patch: &BTreeMap<String, Option<String>>| {
        let gone = patch.iter().filter(|(_, value)| value.is_none());
        gone.map(|(key, _)| key.replace("flannel.alpha.coreos.com/", ""))
            .collect::<Vec<_>>()
    };
    let without_v6 = plan_own(&node, &names(), &conf(""), &vxlan).unwrap();
    assert_eq!(
        removed(&without_v6.patch),
        ["backend-v6-data", "public-ipv6"]
    );
    assert_eq!(without_v6.patch.len(), 2);
    let without_v4 = plan_own(&node, &names(), &v6_only(), &vxlan).unwrap();
    assert_eq!(removed(&without_v4.patch), ["backend-data", "public-ip"]);
    let alloc = offered(BackendKind::Alloc);
    let alloc = plan_own(&node, &names(), &dual("alloc"), &alloc).unwrap();
    assert_eq!(removed(&alloc.patch), ["backend-v6-data", "public-ipv6"]);
    assert_eq!(
        alloc.patch[&names().key(Field::BackendData)].as_deref(),
        Some("null")
    );
    apply(&mut node, alloc.patch);
    assert_eq!(node.annotations["example.com/else"], "kept");
    let reading = read_lease(&node, &names(), DUAL);
    assert_eq!(reading.problems, []);
    assert_eq!(reading.lease, Some(alloc.lease));
}

#[test]
fn a_node_of_ipv6_alone() {
    let mut node = node("x1", &["fd00:1:0:1::/64"], &[]);
    node.pod_cidr = "fd00:1:0:1::/64".into();
    let attrs = offered(BackendKind::Vxlan);
    let plan = plan_own(&node, &names(), &v6_only(), &attrs).unwrap();
    assert_eq!(plan.lease.key.to_string(), "0.0.0.0-0&fd00:1:0:1::-64");
    let written: Vec<&str> = plan.patch.keys().map(String::as_str).collect();
    assert_eq!(
        written,
        [
            "flannel.alpha.coreos.com/backend-type",
            "flannel.alpha.coreos.com/backend-v6-data",
            "flannel.alpha.coreos.com/kube-subnet-manager",
            "flannel.alpha.coreos.com/public-ipv6",
        ]
    );
    apply(&mut node, plan.patch);
    let families = Families {
        v4: false,
        v6: true,
    };
    let reading = read_lease(&node, &names(), families);
    assert_eq!(reading.problems, []);
    let lease = reading.lease.unwrap();
    assert_eq!((lease.attrs.v4, lease.attrs.public_ip), (None, None));
    assert_eq!(lease.attrs.v6, attrs.v6);
}

#[test]
fn the_family_that_is_missing_is_named() {
    for (cidrs, conf, family) in [
        (&["10.5.1.0/24"][..], dual("vxlan"), "IPv6"),
        (&["fd00:1:0:1::/64"], dual("vxlan"), "IPv4"),
        (&["10.5.1.0/24"], v6_only(), "IPv6"),
        (&["fd00:1:0:1::/64"], super::conf(""), "IPv4"),
    ] {
        let node = node("x4", cidrs, &[]);
        let error = plan_own(&node, &names(), &conf, &offered(BackendKind::Vxlan));
        assert_eq!(
            error.unwrap_err().to_string(),
            format!(r#"missing {family} address on n.Spec.PodCIDRs of node "x4""#)
        );
    }
}

#[test]
fn the_administrators_ipv6_address_is_published_in_place_of_ours() {
    let mut node = node("x1", &CIDRS, &[(Field::PublicIpv6Overwrite, "2001:db8::9")]);
    let attrs = offered(BackendKind::Vxlan);
    let plan = plan_own(&node, &names(), &dual("vxlan"), &attrs).unwrap();
    assert_eq!(
        plan.lease.attrs.public_ipv6,
        Some("2001:db8::9".parse().unwrap())
    );
    assert_eq!(plan.lease.attrs.public_ip, attrs.public_ip);
    assert_eq!(
        plan.overwrites[0].announcement(),
        "Overriding public ipv6 with '2001:db8::9' from node annotation 'flannel.alpha.coreos.com/public-ipv6-overwrite'"
    );
    apply(&mut node, plan.patch);
    assert_eq!(node.get(&names(), Field::PublicIpv6), Some("2001:db8::9"));
    // Without IPv6 it says nothing to anybody.
    let plan = plan_own(&node, &names(), &conf(""), &attrs).unwrap();
    assert!(plan.overwrites.is_empty());
    node.annotations
        .insert(names().key(Field::PublicIpv6Overwrite), "10.0.0.1".into());
    let plan = plan_own(&node, &names(), &dual("vxlan"), &attrs).unwrap();
    assert_eq!(plan.lease.attrs.public_ipv6, attrs.public_ipv6);
    assert_eq!(
        plan.problems[0].to_string(),
        r#"annotation flannel.alpha.coreos.com/public-ipv6-overwrite of node "x1" is "10.0.0.1": it must be an IPv6 address"#
    );
}

#[test]
fn data_of_every_backend_is_wanted_where_it_has_some() {
    for (kind, data, problems) in [
        ("wireguard", r#"{"PublicKey":"a=","Port":1}"#, 1),
        ("wireguard", "null", 1),
        ("host-gw", "null", 0),
        ("host-gw", "what is this", 0),
        ("extension", "\"said\"", 0),
        ("vxlan", "null", 1),
    ] {
        let peer = node(
            "b",
            &["10.5.1.0/24"],
            &[
                (Field::KubeSubnetManager, "true"),
                (Field::BackendType, kind),
                (Field::BackendData, data),
                (Field::PublicIp, "192.168.77.11"),
            ],
        );
        let reading = read_lease(&peer, &names(), V4);
        assert_eq!(reading.problems.len(), problems, "{kind} {data}");
        assert_eq!(reading.lease.is_none(), problems > 0, "{kind} {data}");
    }
}
