use super::*;
use crate::addr::Mtu;

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
            kind: "vxlan".to_owned(),
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
        (
            conf.backend.kind.as_str(),
            conf.backend.type_as_written.as_str()
        ),
        ("vxlan", "VXLAN")
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
        assert_eq!(conf.backend.kind, "vxlan");
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
fn backend_errors_name_the_value_and_the_fix() {
    let cases = [
        (
            r#""host-gw""#,
            "unknown backend type: host-gw: only \"vxlan\" is supported, set Backend.Type to \"vxlan\"",
        ),
        (
            r#""UDP""#,
            "unknown backend type: UDP: only \"vxlan\" is supported, set Backend.Type to \"vxlan\"",
        ),
        (
            r#""""#,
            "unknown backend type: \"\": only \"vxlan\" is supported, set Backend.Type to \"vxlan\"",
        ),
        (
            "null",
            "unknown backend type: \"\": only \"vxlan\" is supported, set Backend.Type to \"vxlan\"",
        ),
        (
            "1",
            "Backend.Type is a number (1): write a string, \"vxlan\"",
        ),
        (
            r#""vxlan","VNI":16777216"#,
            "Backend.VNI is 16777216: use a value between 0 and 16777215",
        ),
        (
            r#""vxlan","VNI":-1"#,
            "Backend.VNI is -1: use a value between 0 and 16777215",
        ),
        (
            r#""vxlan","VNI":10000000"#,
            "Backend.VNI is 10000000: device name flannel.10000000 would have more than 15 characters, use at most 9999999",
        ),
        (
            r#""vxlan","VNI":"3""#,
            "Backend.VNI is a string (\"3\"): write a whole number without quotes",
        ),
        (
            r#""vxlan","VNI":1.5"#,
            "Backend.VNI is a number (1.5): write a whole number without quotes",
        ),
        (
            r#""vxlan","VNI":true"#,
            "Backend.VNI is a boolean (true): write a whole number without quotes",
        ),
        (
            r#""vxlan","Port":70000"#,
            "Backend.Port is 70000: use a value between 0 and 65535",
        ),
        (
            r#""vxlan","MTU":40"#,
            "Backend.MTU is 40: it is the MTU of the underlay and must be at least 1330, or 0 for the one of the uplink",
        ),
        (
            r#""vxlan","MTU":65586"#,
            "Backend.MTU is 65586: use a value between 0 and 65585",
        ),
        (
            r#""vxlan","BpfFastPath":"fast""#,
            "Backend.BpfFastPath is \"fast\": use one of the strings \"auto\", \"off\", \"established\" and \"syn\"",
        ),
        (
            r#""vxlan","BpfFastPath":true"#,
            "Backend.BpfFastPath is a boolean (true): write one of the strings \"auto\", \"off\", \"established\" and \"syn\"",
        ),
        (
            r#""vxlan","GBP":1"#,
            "Backend.GBP is a number (1): write true or false",
        ),
    ];
    for (kind, expected) in cases {
        let json = format!(r#"{{"Network":"10.5.0.0/16","Backend":{{"Type":{kind}}}}}"#);
        assert_eq!(message(&json), expected);
    }
    assert_eq!(
        message(r#"{"Network":"10.5.0.0/16","Backend":{}}"#),
        "unknown backend type: \"\": only \"vxlan\" is supported, set Backend.Type to \"vxlan\""
    );
    assert_eq!(
        message(r#"{"Network":"10.5.0.0/16","Backend":"vxlan"}"#),
        "Backend is a string (\"vxlan\"): write an object such as {\"Type\":\"vxlan\"}"
    );
}

#[test]
fn network_errors_name_the_value_and_the_fix() {
    let cases = [
        (
            "",
            "please define a correct Network parameter in the flannel config, such as \"Network\":\"10.244.0.0/16\"",
        ),
        (
            r#""Network":7,"#,
            "Network is a number (7): write a string such as \"10.244.0.0/16\"",
        ),
        (
            r#""Network":"fd00::/48","#,
            "invalid IPv4 CIDR format: Network is \"fd00::/48\", write one such as 10.244.0.0/16",
        ),
        (
            r#""Network":"10.5.0.0","#,
            "invalid IPv4 CIDR format: Network is \"10.5.0.0\", write one such as 10.244.0.0/16",
        ),
        (
            r#""Network":"10.5.0.0/29","#,
            "network is too small. Minimum useful network prefix is /28: Network is 10.5.0.0/29",
        ),
        (
            r#""Network":"10.5.0.0/16","SubnetLen":31,"#,
            "SubnetLen must be less than /31: SubnetLen is 31",
        ),
        (
            r#""Network":"10.5.0.0/32","SubnetLen":30,"#,
            "network must be able to accommodate at least four subnets: SubnetLen is 30, use at least 34 with 10.5.0.0/32",
        ),
        (
            r#""Network":"10.5.0.0/16","SubnetLen":17,"#,
            "network must be able to accommodate at least four subnets: SubnetLen is 17, use at least 18 with 10.5.0.0/16",
        ),
        (
            r#""Network":"10.5.0.0/16","SubnetLen":"24","#,
            "SubnetLen is a string (\"24\"): write a whole number without quotes",
        ),
        (
            r#""Network":"10.5.0.0/16","SubnetLen":-1,"#,
            "SubnetLen is -1: use a value between 0 and 32",
        ),
        (
            r#""Network":"10.5.0.0/16","SubnetMin":"10.6.0.0","#,
            "SubnetMin is not in the range of the Network: SubnetMin is 10.6.0.0, use an address inside 10.5.0.0/16",
        ),
        (
            r#""Network":"10.5.0.0/16","SubnetMax":"10.6.0.0","#,
            "SubnetMax is not in the range of the Network: SubnetMax is 10.6.0.0, use an address inside 10.5.0.0/16",
        ),
        (
            r#""Network":"10.5.0.0/16","SubnetMin":"10.5.1.7","#,
            "SubnetMin is not on a SubnetLen boundary: 10.5.1.7: SubnetMin is 10.5.1.7, use 10.5.1.0 for subnets of /24",
        ),
        (
            r#""Network":"10.5.0.0/16","SubnetMax":"x","#,
            "SubnetMax is \"x\": not an address of this family, write a string such as \"10.244.1.0\"",
        ),
        (
            r#""Network":"10.5.0.0/16","SubnetMin":"10.5.9.0","SubnetMax":"10.5.3.0","#,
            "SubnetMin is 10.5.9.0: it is above SubnetMax 10.5.3.0, so there is no subnet to give out: swap or widen them",
        ),
        (
            r#""Network":"10.5.0.0/16","EnableIPv4":"yes","#,
            "EnableIPv4 is a string (\"yes\"): write true or false",
        ),
        (
            r#""Network":"10.5.0.0/16","EnableIPv4":false,"#,
            "none defined stack: EnableIPv4 and EnableIPv6 are both false, set one of them to true",
        ),
        (
            r#""Network":"10.5.0.0/16","EnableIPv6":true,"#,
            "please define a correct IPv6Network parameter in the flannel config, such as \"IPv6Network\":\"fd00:10:244::/48\"",
        ),
        (
            r#""Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd00::/125","#,
            "IPv6Network is too small. Minimum useful network prefix is /124: IPv6Network is fd00::/125",
        ),
        (
            r#""Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd00::/48","IPv6SubnetLen":127,"#,
            "SubnetLen must be less than /127: IPv6SubnetLen is 127",
        ),
        (
            r#""Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd00::/48","IPv6SubnetMin":"fd01::","#,
            "IPv6SubnetMin is not in the range of the IPv6Network: IPv6SubnetMin is fd01::, use an address inside fd00::/48",
        ),
        (
            r#""Network":"10.5.0.0/16","SubnetMax":"10.5.9.1","#,
            "SubnetMax is not on a SubnetLen boundary: 10.5.9.1: SubnetMax is 10.5.9.1, use 10.5.9.0 for subnets of /24",
        ),
        (
            r#""EnableIPv6":true,"Network":"10.5.0.0/16","IPv6Network":"fd00::/48","IPv6SubnetLen":49,"#,
            "network must be able to accommodate at least four subnets: IPv6SubnetLen is 49, use at least 50 with fd00::/48",
        ),
        (
            r#""EnableIPv6":true,"Network":"10.5.0.0/16","IPv6Network":"fd00::/48","IPv6SubnetMax":"fd01::","#,
            "IPv6SubnetMax is not in the range of the IPv6Network: IPv6SubnetMax is fd01::, use an address inside fd00::/48",
        ),
        (
            r#""EnableIPv6":true,"Network":"10.5.0.0/16","IPv6Network":"fd00::/48","IPv6SubnetMin":"fd00::7","#,
            "IPv6SubnetMin is not on a SubnetLen boundary: fd00::7: IPv6SubnetMin is fd00::7, use fd00:: for subnets of /64",
        ),
        (
            r#""EnableIPv6":true,"Network":"10.5.0.0/16","IPv6Network":"fd00::/48","IPv6SubnetMax":"fd00::7","#,
            "IPv6SubnetMax is not on a SubnetLen boundary: fd00::7: IPv6SubnetMax is fd00::7, use fd00:: for subnets of /64",
        ),
        (
            r#""IPv6Network":"fd00\n::/48","#,
            "invalid CIDR address: fd00\\n::/48: IPv6Network is \"fd00\\n::/48\", write one such as fd00:10:244::/48",
        ),
        (
            r#""IPv6Network":"10.0.0.0/8","#,
            "invalid CIDR address: 10.0.0.0/8: IPv6Network is \"10.0.0.0/8\", write one such as fd00:10:244::/48",
        ),
    ];
    for (text, expected) in cases {
        let json = format!(r#"{{{text}"Backend":{{"Type":"vxlan"}}}}"#);
        assert_eq!(message(&json), expected);
    }
}

#[test]
fn text_that_is_no_config() {
    assert_eq!(
        message(""),
        r#"network config is not valid JSON: EOF while parsing a value at line 1 column 0: write an object such as {"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#
    );
    assert_eq!(
        message("{} x"),
        r#"network config is not valid JSON: trailing characters at line 1 column 4: write an object such as {"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#
    );
    assert_eq!(
        message("[]"),
        r#"network config is an array: it must be an object such as {"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#
    );
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
