use super::*;
use crate::addr::{Mtu, Vni};
use crate::fastpath::Choice;

mod backends;
mod errors;
mod properties;

fn parse(json: &str) -> NetConf {
    NetConf::parse(json).unwrap_or_else(|error| panic!("{json}: {error}"))
}

fn message(json: &str) -> String {
    let message = NetConf::parse(json).unwrap_err().to_string();
    assert!(!message.contains('\n'), "{message}");
    message
}

fn range4(json: &str) -> (u8, String, String) {
    let conf = parse(json).ipv4.unwrap();
    (conf.subnet_len, conf.min.to_string(), conf.max.to_string())
}

#[test]
fn the_usual_config() {
    let conf = parse(r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}"#);
    let expected = NetConf {
        enable_ipv4: true,
        enable_ipv6: false,
        enable_nftables: false,
        ipv4: Some(FamilyConf {
            network: "10.5.0.0/16".parse().unwrap(),
            subnet_len: 24,
            min: Ipv4Addr::new(10, 5, 1, 0),
            max: Ipv4Addr::new(10, 5, 255, 0),
        }),
        ipv6: None,
        backend: Backend {
            kind: BackendKind::Vxlan,
            type_as_written: "vxlan".to_owned(),
            vxlan: VxlanConf {
                vni: Vni::DEFAULT,
                port: 8472,
                port_as_written: 0,
                mtu: None,
                gbp: false,
                learning: false,
                direct_routing: false,
            },
            wireguard: WireguardConf::default(),
            fast_path: None,
        },
        warnings: vec![],
    };
    assert_eq!(conf, expected);
}

#[test]
fn every_config_of_the_samples() {
    let conf = parse(
        r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan","GBP":true,"Learning":true,"MTU":1400},"SubnetLen":26,"SubnetMin":"10.5.10.0","SubnetMax":"10.5.20.192"}"#,
    );
    let vxlan = conf.backend.vxlan;
    assert!(vxlan.gbp && vxlan.learning && !vxlan.direct_routing);
    assert_eq!(tunnel_mtu(&conf, 1500).map(Mtu::get), Ok(1350));
    let v4 = conf.ipv4.unwrap();
    assert_eq!((v4.subnet_len, v4.max), (26, Ipv4Addr::new(10, 5, 20, 192)));

    let conf = parse(
        r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan","VNI":7,"Port":4789,"DirectRouting":true}}"#,
    );
    let vxlan = conf.backend.vxlan;
    assert_eq!(
        (vxlan.vni.get(), vxlan.port, vxlan.direct_routing),
        (7, 4789, true)
    );

    let conf =
        parse(r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"},"EnableNFTables":true}"#);
    assert!(conf.enable_nftables);

    let conf = parse(
        r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"},"EnableIPv6":true,"IPv6Network":"fd05::/48"}"#,
    );
    let v6 = conf.ipv6.unwrap();
    assert_eq!(v6.min, "fd05:0:0:1::".parse::<Ipv6Addr>().unwrap());
    assert_eq!(v6.max, "fd05:0:0:ffff::".parse::<Ipv6Addr>().unwrap());
    assert!(conf.ipv4.is_some());
}

#[test]
fn upstream_range_examples() {
    let backend = r#""Backend":{"Type":"vxlan"}"#;
    let cases = [
        (r#""Network":"10.3.0.0/16""#, (24, "10.3.1.0", "10.3.255.0")),
        (
            r#""Network":"10.3.0.0/16","SubnetLen":28,"SubnetMin":"10.3.5.0","SubnetMax":"10.3.8.0""#,
            (28, "10.3.5.0", "10.3.8.0"),
        ),
        (r#""Network":"10.3.0.5/16""#, (24, "10.3.1.0", "10.3.255.0")),
        (r#""Network":"10.0.0.0/22""#, (24, "10.0.1.0", "10.0.3.0")),
        (
            r#""Network":"10.0.0.0/23""#,
            (25, "10.0.0.128", "10.0.1.128"),
        ),
        (r#""Network":"10.0.0.0/28""#, (30, "10.0.0.4", "10.0.0.12")),
        (r#""Network":"0.0.0.0/0""#, (24, "0.0.1.0", "255.255.255.0")),
        (
            r#""Network":"10.3.0.0/16","SubnetLen":0,"SubnetMin":"0.0.0.0","SubnetMax":null"#,
            (24, "10.3.1.0", "10.3.255.0"),
        ),
        (
            r#""Network":"10.3.0.0/16","SubnetMin":"10.3.0.0""#,
            (24, "10.3.0.0", "10.3.255.0"),
        ),
    ];
    for (text, (len, min, max)) in cases {
        let expected = (len, min.to_owned(), max.to_owned());
        assert_eq!(range4(&format!("{{{text},{backend}}}")), expected, "{text}");
    }
    for (network, len, min, max) in [
        ("fc00::/48", 64, "fc00:0:0:1::", "fc00:0:0:ffff::"),
        ("fc00::/63", 65, "fc00::8000:0:0:0", "fc00:0:0:1:8000::"),
        ("::/0", 64, "0:0:0:1::", "ffff:ffff:ffff:ffff::"),
    ] {
        let json = format!(
            r#"{{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"{network}",{backend}}}"#
        );
        let v6 = parse(&json).ipv6.unwrap();
        let expected: (u8, Ipv6Addr, Ipv6Addr) = (len, min.parse().unwrap(), max.parse().unwrap());
        assert_eq!((v6.subnet_len, v6.min, v6.max), expected, "{network}");
    }
}

#[test]
fn keys_follow_go() {
    let conf = parse(
        r#"{"network":"10.0.0.0/8","NETWORK":"10.5.0.0/16","Extra":{"a":[1]},"enableipv6":null,
            "backend":{"type":"VXLAN","vni":3,"Directrouting":true,"Name":"cbr0","MacPrefix":"0E-2A","bpf-fast-path":"off","MTU":null}}"#,
    );
    assert_eq!(conf.ipv4.unwrap().network.to_string(), "10.5.0.0/16");
    assert_eq!(
        (conf.backend.kind, conf.backend.type_as_written.as_str()),
        (BackendKind::Vxlan, "VXLAN")
    );
    assert!(conf.backend.vxlan.direct_routing);
    assert_eq!(
        (conf.backend.vxlan.vni.get(), conf.backend.vxlan.mtu),
        (3, None)
    );
    assert!(conf.warnings.is_empty());
}

#[test]
fn missing_backend_is_vxlan_with_a_warning() {
    for json in [
        r#"{"Network":"10.5.0.0/16"}"#,
        r#"{"Network":"10.5.0.0/16","Backend":null}"#,
    ] {
        let conf = parse(json);
        assert_eq!(conf.backend.kind, BackendKind::Vxlan);
        assert_eq!(conf.warnings.len(), 1);
        assert!(
            conf.warnings[0].contains("Backend is missing"),
            "{:?}",
            conf.warnings
        );
    }
}

#[test]
fn boundary_values_are_accepted() {
    for (settings, vni, port, mtu) in [
        (r#""VNI":0"#, 0, 8472, None),
        (r#""VNI":9999999"#, 9_999_999, 8472, None),
        (r#""Port":0"#, 1, 8472, None),
        (r#""Port":65535"#, 1, 65_535, None),
        (r#""MTU":0"#, 1, 8472, None),
        (r#""MTU":1330"#, 1, 8472, Some(1330)),
        (r#""MTU":65585"#, 1, 8472, Some(65_585)),
    ] {
        let conf = parse(&format!(
            r#"{{"Network":"10.5.0.0/16","Backend":{{"Type":"vxlan",{settings}}}}}"#
        ));
        let vxlan = conf.backend.vxlan;
        assert_eq!(
            (vxlan.vni.get(), vxlan.port, vxlan.mtu),
            (vni, port, mtu),
            "{settings}"
        );
    }
}

#[test]
fn ipv6_limits_the_device_name_and_the_mtu() {
    let json = |settings: &str| {
        format!(
            r#"{{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd00::/48","Backend":{{"Type":"vxlan",{settings}}}}}"#
        )
    };
    assert_eq!(parse(&json(r#""VNI":9999"#)).backend.vxlan.vni.get(), 9999);
    assert_eq!(
        message(&json(r#""VNI":10000"#)),
        "Backend.VNI is 10000: device name flannel-v6.10000 would have more than 15 characters, use at most 9999"
    );
    assert_eq!(
        message(&json(r#""MTU":1349"#)),
        "Backend.MTU is 1349: it is the MTU of the underlay and must be at least 1350, or 0 for the one of the uplink"
    );
}

#[test]
fn tunnel_mtu_of_a_link() {
    let conf = |families: &str, mtu: u32| {
        parse(&format!(
            r#"{{"Network":"10.5.0.0/16","IPv6Network":"fd00::/48",{families},"Backend":{{"Type":"vxlan","MTU":{mtu}}}}}"#
        ))
    };
    let v4 = r#""EnableIPv4":true"#;
    let dual = r#""EnableIPv6":true"#;
    let v6 = r#""EnableIPv4":false,"EnableIPv6":true"#;
    // Families, configured MTU, link MTU, tunnel MTU, number of warnings.
    let cases = [
        (v4, 0, 1500, Some(1450), 0),
        (dual, 0, 1500, Some(1430), 0),
        (v6, 0, 1500, Some(1430), 0),
        (v4, 0, 9000, Some(8950), 0),
        (v4, 0, 65_536, Some(65_486), 0),
        (v4, 0, 1_000_000, Some(65_535), 0),
        (v4, 1400, 1500, Some(1350), 0),
        (dual, 1400, 1500, Some(1350), 0),
        (dual, 1480, 1500, Some(1430), 0),
        (dual, 1481, 1500, Some(1431), 1),
        (dual, 1500, 1500, Some(1450), 1),
        (v4, 9000, 1500, Some(1450), 1),
        (dual, 9000, 1500, Some(1450), 2),
        (v4, 0, 118, Some(68), 0),
        (v4, 0, 117, None, 0),
        (v4, 0, 0, None, 0),
        (dual, 0, 1350, Some(1280), 0),
        (dual, 0, 1349, None, 0),
    ];
    for (families, mtu, link, expected, warnings) in cases {
        let conf = conf(families, mtu);
        assert_eq!(
            tunnel_mtu(&conf, link).ok().map(Mtu::get),
            expected,
            "{families} {mtu} {link}"
        );
        assert_eq!(
            mtu_warnings(&conf, link).len(),
            warnings,
            "{families} {mtu} {link}"
        );
    }
    assert_eq!(
        tunnel_mtu(&conf(v4, 0), 0).unwrap_err().to_string(),
        "MTU 0 of the uplink is too small for the tunnel: raise it to at least 118"
    );
    assert!(mtu_warnings(&conf(dual, 1500), 1500)[0].contains("at most 1480"));
}

#[test]
fn the_fast_path_is_a_key_of_the_backend() {
    let wanted = |key: &str| {
        let json = format!(r#"{{"Network":"10.5.0.0/16","Backend":{{"Type":"vxlan"{key}}}}}"#);
        parse(&json).backend.fast_path
    };
    assert_eq!(wanted(""), None);
    for choice in Choice::ALL {
        assert_eq!(
            wanted(&format!(r#","BpfFastPath":"{choice}""#)),
            Some(choice)
        );
    }
}

#[test]
fn it_is_announced_in_upstreams_words() {
    let lines = |backend: &str| {
        parse(&format!(
            r#"{{"Network":"10.5.0.0/16","Backend":{{{backend}}}}}"#
        ))
        .announcement()
    };
    assert_eq!(
        lines(r#""type":"vxlan""#),
        [
            "Found network config - Backend type: vxlan",
            "VXLAN config: VNI=1 Port=0 GBP=false Learning=false DirectRouting=false",
        ]
    );
    assert_eq!(
        lines(
            r#""Type":"VXLAN","VNI":7,"Port":4789,"DirectRouting":true,"GBP":true,"Learning":true"#
        ),
        [
            "Found network config - Backend type: VXLAN",
            "VXLAN config: VNI=7 Port=4789 GBP=true Learning=true DirectRouting=true",
        ]
    );
}
