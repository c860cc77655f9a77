use proptest::prelude::*;

use super::*;
use crate::config::BackendKind;
use crate::key::PublicKey;

#[test]
fn upstream_key_cases() {
    for key in ["10.12.13.0-24", "10.12.13.0-24&fd00:12:13::-56"] {
        assert_eq!(key.parse::<SubnetKey>().unwrap().to_string(), key);
    }
    for key in [
        "10",
        "10.12.13.0",
        "10.12.13-24",
        "10.12.13.300-24",
        "&2001::-56",
        "10.12.13.0-24&:12:13:-56",
        "10.12.13.0-24&20011::-56",
        "10.12.13.0-24&2001-56",
        "10.12.13.0-24&2001::",
    ] {
        assert!(key.parse::<SubnetKey>().is_err(), "{key}");
    }
}

#[test]
fn keys_are_anchored_and_strict() {
    for key in [
        "",
        "-",
        "subnets/10.5.1.0-24",
        "x10.5.1.0-24",
        "10.5.1.0-24 ",
        "10x5.1.0-24",
        "10.5.1.0-32",
        "10.5.1.0-256",
        "10.5.1.0-+24",
        "10.5.1.0--24",
        "0.0.0.0-0",
        "10.5.1.0-24&",
        "10.5.1.0-24&fd00::-128",
        "10.5.1.0-24&FD00::-64",
        "10.5.1.0-24&fd00::-64&fd01::-64",
        "10.5.1.0-24&::ffff:1.2.3.4-120",
    ] {
        assert!(key.parse::<SubnetKey>().is_err(), "{key}");
    }
}

#[test]
fn keys_that_would_alias_are_refused_by_name() {
    for (key, canonical) in [
        ("10.5.1.7-24", "10.5.1.0-24"),
        ("10.5.1.0-024", "10.5.1.0-24"),
        ("10.5.1.0-24&fd00::1-64", "10.5.1.0-24&fd00::-64"),
        ("10.5.1.0-24&fd00:0:0:0:0:0:0:0-64", "10.5.1.0-24&fd00::-64"),
        ("10.5.1.0-0&fd00::-64", "0.0.0.0-0&fd00::-64"),
    ] {
        let error = key.parse::<SubnetKey>().unwrap_err();
        let expected = LeaseError::NotCanonical {
            key: key.to_owned(),
            canonical: canonical.to_owned(),
        };
        assert_eq!(error, expected);
        assert!(error.to_string().contains(key), "{error}");
    }
}

#[test]
fn ipv6_only_key_has_no_v4() {
    let key: SubnetKey = "0.0.0.0-0&fd00:12:0:43::-64".parse().unwrap();
    assert_eq!(key.v4, None);
    assert_eq!(key.v6, Some("fd00:12:0:43::/64".parse().unwrap()));
    assert_eq!(key.to_string(), "0.0.0.0-0&fd00:12:0:43::-64");
}

/// Every kind of key and value that upstream v0.28.9 writes.
const GOLDEN: &[(&str, &str)] = &[
    (
        "10.5.3.0-24",
        r#"{"PublicIP":"192.168.77.12","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"1a:cf:f4:7b:c6:ea"}}"#,
    ),
    (
        "10.5.70.0-24",
        r#"{"PublicIP":"192.168.77.11","PublicIPv6":null,"BackendType":"host-gw"}"#,
    ),
    (
        "10.5.34.0-24",
        r#"{"PublicIP":"192.168.77.12","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":7,"VtepMAC":"0e:fd:36:e4:13:e6"}}"#,
    ),
    (
        "10.5.15.192-26",
        r#"{"PublicIP":"192.168.77.11","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"8e:68:52:b8:ba:11"}}"#,
    ),
    (
        "10.5.6.0-24&fd05:0:0:13::-64",
        r#"{"PublicIP":"192.168.77.11","PublicIPv6":"fd77::11","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"ae:90:b6:ed:0c:2e"},"BackendV6Data":{"VNI":1,"VtepMAC":"76:53:12:e2:42:3d"}}"#,
    ),
    (
        "10.8.41.0-24&fd00:13:0:51::-64",
        r#"{"PublicIP":"192.168.88.21","PublicIPv6":"fd88::21","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"5e:68:0d:07:7d:a8"},"BackendV6Data":{"VNI":1,"VtepMAC":"f6:5d:11:04:7d:61"}}"#,
    ),
    ("10.5.1.0-24", r#"{"PublicIP":"1.2.3.4","PublicIPv6":null}"#),
    (
        "10.5.70.0-24&fd05:0:0:13::-64",
        r#"{"PublicIP":"192.168.77.11","PublicIPv6":"fd77::11","BackendType":"host-gw"}"#,
    ),
    (
        "0.0.0.0-0&fd00:12:0:43::-64",
        r#"{"PublicIP":"0.0.0.0","PublicIPv6":"fd77::11","BackendType":"vxlan","BackendV6Data":{"VNI":1,"VtepMAC":"76:53:12:e2:42:3d"}}"#,
    ),
    (
        "10.5.3.0-24",
        r#"{"PublicIP":"192.168.77.12","PublicIPv6":null,"BackendType":"wireguard","BackendData":{"PublicKey":"AwoRGB8mLTQ7QklQV15lbHN6gYiPlp2kq7K5wMfO1dw=","Port":51820}}"#,
    ),
    (
        "10.5.6.0-24&fd05:0:0:13::-64",
        r#"{"PublicIP":"192.168.77.11","PublicIPv6":"fd77::11","BackendType":"wireguard","BackendData":{"PublicKey":"//////////////////////////////////////////8=","Port":51820},"BackendV6Data":{"PublicKey":"//////////////////////////////////////////8=","Port":51821}}"#,
    ),
];

#[test]
fn golden_leases_are_reproduced_byte_for_byte() {
    for (key, value) in GOLDEN {
        assert_eq!(key.parse::<SubnetKey>().unwrap().to_string(), *key);
        assert_eq!(LeaseAttrs::from_json(value).unwrap().to_json(), *value);
    }
}

#[test]
fn writer_from_parts() {
    let attrs = LeaseAttrs::vxlan_v4(
        Ipv4Addr::new(192, 168, 77, 12),
        1,
        "1A:CF:F4:7B:C6:EA".parse().unwrap(),
    );
    assert_eq!(attrs.to_json(), GOLDEN[0].1);
    let none = LeaseAttrs::default();
    assert_eq!(
        none.to_json(),
        r#"{"PublicIP":"0.0.0.0","PublicIPv6":null}"#
    );
    assert_eq!(LeaseAttrs::from_json(&none.to_json()).unwrap(), none);
}

#[test]
fn reader_is_tolerant() {
    // Releases up to 0.14 wrote neither PublicIPv6 nor VNI.
    let old = r#"{"PublicIP":"192.168.77.12","BackendType":"vxlan","BackendData":{"VtepMAC":"d2:e2:e0:0a:1a:b5"}}"#;
    let attrs = LeaseAttrs::from_json(old).unwrap();
    assert_eq!(attrs.vxlan(Family::V4).unwrap().vni, 0);
    assert_eq!(attrs.public_ipv6, None);

    let odd = r#" {"publicip":"192.168.77.12", "Extra":[1], "backendtype":"vxlan",
        "BACKENDDATA":{"vni":3,"vtepmac":"D2:E2:E0:0A:1A:B5","x":{}}, "BackendV6Data":null} "#;
    let expected = LeaseAttrs::vxlan_v4(
        Ipv4Addr::new(192, 168, 77, 12),
        3,
        "d2:e2:e0:0a:1a:b5".parse().unwrap(),
    );
    assert_eq!(LeaseAttrs::from_json(odd).unwrap(), expected);

    // Releases before 0.26 wrote no port.
    let wireguard = r#"{"PublicIP":"1.2.3.4","PublicIPv6":null,"BackendType":"wireguard","BackendData":{"publickey":"AwoRGB8mLTQ7QklQV15lbHN6gYiPlp2kq7K5wMfO1dw="}}"#;
    let attrs = LeaseAttrs::from_json(wireguard).unwrap();
    let data = attrs.wireguard(Family::V4).unwrap();
    assert_eq!((attrs.backend_type.as_str(), data.port), ("wireguard", 0));
    assert_eq!(attrs.vxlan(Family::V4), None);
    let elsewhere =
        r#"{"PublicIP":"1.2.3.4","BackendType":"extension","BackendData":"what its command says"}"#;
    let attrs = LeaseAttrs::from_json(elsewhere).unwrap();
    assert_eq!((attrs.backend_type.as_str(), attrs.v4), ("extension", None));
    let host_gw = r#"{"PublicIP":"1.2.3.4","BackendType":"host-gw","BackendData":null}"#;
    assert_eq!(LeaseAttrs::from_json(host_gw).unwrap().v4, None);
}

#[test]
fn reader_names_what_is_wrong() {
    let cases = [
        (
            "",
            "lease value is not a JSON object: EOF while parsing a value at line 1 column 0",
        ),
        ("1", "lease value is not a JSON object: it is a number"),
        (
            r#"{"PublicIP":7}"#,
            "lease value has the invalid PublicIP 7: it must be an IPv4 address",
        ),
        (
            r#"{"PublicIP":"fd00::1"}"#,
            r#"lease value has the invalid PublicIP "fd00::1": it must be an IPv4 address"#,
        ),
        (
            r#"{"PublicIP":"1.2.3.4","BackendType":1}"#,
            "lease value has the invalid BackendType 1: it must be a string",
        ),
        (
            r#"{"BackendType":"vxlan","BackendData":"x"}"#,
            r#"lease value has the invalid BackendData "x": it must be an object"#,
        ),
        (
            r#"{"BackendType":"vxlan","BackendData":{"VNI":-1,"VtepMAC":"d2:e2:e0:0a:1a:b5"}}"#,
            "lease value has the invalid BackendData.VNI -1: it must be a whole number of at most 32 bits",
        ),
        (
            r#"{"BackendType":"vxlan","BackendData":{"VNI":1}}"#,
            "lease value has the invalid BackendData.VtepMAC null: it must be a MAC address such as 0a:1b:2c:3d:4e:5f",
        ),
        (
            r#"{"BackendType":"vxlan","BackendV6Data":{"VtepMAC":"x"}}"#,
            r#"lease value has the invalid BackendV6Data.VtepMAC "x": it must be a MAC address such as 0a:1b:2c:3d:4e:5f"#,
        ),
        (
            r#"{"BackendType":"wireguard","BackendData":{"PublicKey":"a="}}"#,
            r#"lease value has the invalid BackendData.PublicKey "a=": it must be 32 bytes in base64"#,
        ),
        (
            r#"{"BackendType":"wireguard","BackendV6Data":{"Port":70000}}"#,
            "lease value has the invalid BackendV6Data.Port 70000: it must be a port number",
        ),
    ];
    for (text, message) in cases {
        assert_eq!(
            LeaseAttrs::from_json(text).unwrap_err().to_string(),
            message
        );
    }
}

#[test]
fn strings_are_escaped_as_go_does() {
    assert_eq!(go_string("vxlan"), r#""vxlan""#);
    assert_eq!(
        go_string("a\"\\<&>\n\u{1}"),
        r#""a\"\\\u003c\u0026\u003e\n\u0001""#
    );
}

fn any_mac() -> impl Strategy<Value = VtepMac> {
    any::<[u8; 6]>().prop_map(VtepMac::new)
}

fn any_data(kind: BackendKind) -> impl Strategy<Value = Option<BackendData>> {
    let vxlan = (any::<u32>(), any_mac()).prop_map(|(vni, mac)| VxlanData { vni, mac }.into());
    let key = any::<[u8; 32]>().prop_map(PublicKey::new);
    let wireguard = (key, any::<u16>())
        .prop_map(|(public_key, port)| WireguardData { public_key, port }.into());
    proptest::option::of((vxlan, wireguard)).prop_map(move |data: Option<(_, _)>| match kind {
        BackendKind::Vxlan => data.map(|(vxlan, _)| vxlan),
        BackendKind::Wireguard => data.map(|(_, wireguard)| wireguard),
        BackendKind::HostGw | BackendKind::Alloc => None,
    })
}

prop_compose! {
    fn any_attrs_of(kind: BackendKind)(
        public_ip in proptest::option::of(1u32..),
        public_ipv6: Option<Ipv6Addr>,
        v4 in any_data(kind),
        v6 in any_data(kind),
    ) -> LeaseAttrs {
        LeaseAttrs {
            public_ip: public_ip.map(Ipv4Addr::from),
            public_ipv6,
            backend_type: kind.lease_type().to_owned(),
            v4,
            v6,
        }
    }
}

fn any_attrs() -> impl Strategy<Value = LeaseAttrs> {
    proptest::sample::select(&BackendKind::ALL[..]).prop_flat_map(any_attrs_of)
}

prop_compose! {
    fn any_key()(
        v4 in (any::<Ipv4Addr>(), 1u8..32),
        v6 in proptest::option::of((any::<Ipv6Addr>(), 0u8..128)),
    ) -> SubnetKey {
        SubnetKey {
            v4: Some(Ipv4Net::new(v4.0, v4.1).unwrap().trunc()),
            // IPv4 in IPv6 is written with dots, which no key has.
            v6: v6
                .map(|(ip, len)| Ipv6Net::new(ip, len).unwrap().trunc())
                .filter(|net| net.addr().to_ipv4_mapped().is_none()),
        }
    }
}

proptest! {
    #[test]
    fn attrs_round_trip(attrs in any_attrs()) {
        prop_assert_eq!(LeaseAttrs::from_json(&attrs.to_json()), Ok(attrs));
    }

    #[test]
    fn keys_round_trip(key in any_key()) {
        prop_assert_eq!(key.to_string().parse(), Ok(key));
    }

    #[test]
    fn a_key_that_parses_prints_the_same(text in "[0-9.]{1,15}-[0-9]{1,3}(&[a-f0-9:]{1,20}-[0-9]{1,3})?") {
        if let Ok(key) = text.parse::<SubnetKey>() {
            prop_assert_eq!(key.to_string(), text);
        }
    }

    #[test]
    fn reading_never_panics(text in ".*", bytes: Vec<u8>) {
        let _key = text.parse::<SubnetKey>();
        let _attrs = LeaseAttrs::from_json(&text);
        let lossy = String::from_utf8_lossy(&bytes);
        let _key = lossy.parse::<SubnetKey>();
        let _attrs = LeaseAttrs::from_json(&lossy);
    }

    #[test]
    fn strings_stay_strings(text in ".*") {
        prop_assert_eq!(serde_json::from_str::<String>(&go_string(&text)).unwrap(), text);
    }
}
