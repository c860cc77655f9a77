use super::*;
use crate::key::SecretKey;

const PSK: &str = "AwoRGB8mLTQ7QklQV15lbHN6gYiPlp2kq7K5wMfO1dw=";
const V4: &str = r#""Network":"10.5.0.0/16""#;
const DUAL: &str = r#""Network":"10.5.0.0/16","IPv6Network":"fd00::/48","EnableIPv6":true"#;
const V6: &str = r#""EnableIPv4":false,"IPv6Network":"fd00::/48","EnableIPv6":true"#;

fn json(families: &str, backend: &str) -> String {
    format!(r#"{{{families},"Backend":{{{backend}}}}}"#)
}

#[test]
fn types_are_looked_up_in_lower_case() {
    for (written, kind, in_leases) in [
        ("vxlan", BackendKind::Vxlan, "vxlan"),
        ("VXLAN", BackendKind::Vxlan, "vxlan"),
        ("host-gw", BackendKind::HostGw, "host-gw"),
        ("Host-GW", BackendKind::HostGw, "host-gw"),
        ("wireguard", BackendKind::Wireguard, "wireguard"),
        ("WireGuard", BackendKind::Wireguard, "wireguard"),
        ("alloc", BackendKind::Alloc, ""),
        ("Alloc", BackendKind::Alloc, ""),
    ] {
        let conf = parse(&json(V4, &format!(r#""Type":"{written}""#)));
        assert_eq!(
            (
                conf.backend.kind,
                conf.backend.type_as_written.as_str(),
                conf.backend.kind.lease_type()
            ),
            (kind, written, in_leases)
        );
        assert!(conf.warnings.is_empty(), "{:?}", conf.warnings);
    }
}

#[test]
fn what_upstream_has_and_we_have_not_is_refused_in_its_words() {
    let supported = r#"supported: "vxlan", "host-gw", "wireguard", "alloc""#;
    for (backend, kind, instead) in [
        (
            r#""Type":"udp""#,
            "udp",
            r#"; "vxlan" takes its place on every network"#,
        ),
        (
            r#""Type":"UDP""#,
            "udp",
            r#"; "vxlan" takes its place on every network"#,
        ),
        (
            r#""Type":"ipip""#,
            "ipip",
            r#"; "vxlan" takes its place on every network"#,
        ),
        (
            r#""Type":"ipsec""#,
            "ipsec",
            r#"; "wireguard" takes its place"#,
        ),
        (
            r#""Type":"extension""#,
            "extension",
            "; commands from the network config are not run",
        ),
        (
            r#""Type":"tencent-vpc""#,
            "tencent-vpc",
            r#"; "alloc" leaves the routes to the cloud's own controller"#,
        ),
        (r#""Type":"aws-vpc""#, "aws-vpc", ""),
        (r#""Type":"hostgw""#, "hostgw", ""),
        (r#""Type":"a\nb""#, "a\\nb", ""),
        (r#""Type":"""#, "", "; set Backend.Type"),
        (r#""Type":null"#, "", "; set Backend.Type"),
        ("", "", "; set Backend.Type"),
    ] {
        assert_eq!(
            message(&json(V4, backend)),
            format!("Error fetching backend: unknown backend type: {kind} ({supported}{instead})")
        );
    }
}

#[test]
fn wireguard_settings() {
    let read = |settings: &str| {
        let backend = format!(r#""Type":"wireguard"{settings}"#);
        parse(&json(DUAL, &backend)).backend.wireguard
    };
    let default = WireguardConf {
        port: 51_820,
        port_v6: 51_821,
        psk: None,
        keepalive: 0,
        mode: WireguardMode::Separate,
        mtu: None,
    };
    assert_eq!(read(""), default);
    assert_eq!(
        read(
            r#","ListenPort":null,"ListenPortV6":null,"PSK":"","PersistentKeepaliveInterval":0,"Mode":"separate","MTU":0"#
        ),
        default
    );
    assert_eq!(
        read(&format!(
            r#","listenport":1,"ListenPortV6":65535,"psk":"{PSK}","PersistentKeepaliveInterval":25,"Mode":"auto","MTU":1400"#
        )),
        WireguardConf {
            port: 1,
            port_v6: 65_535,
            psk: Some(SecretKey::new(std::array::from_fn(|at| {
                u8::try_from(at * 7 + 3).unwrap()
            }))),
            keepalive: 25,
            mode: WireguardMode::Auto,
            mtu: Some(1400),
        }
    );
    for mode in WireguardMode::ALL {
        assert_eq!(read(&format!(r#","Mode":"{mode}""#)).mode, mode);
    }
    // One device: the second port is of no matter.
    let same = read(r#","ListenPort":51821,"Mode":"auto""#);
    assert_eq!((same.port, same.port_v6), (51_821, 51_821));
}

#[test]
fn wireguard_errors_name_the_value_and_the_fix() {
    let modes = r#"use one of the strings "separate", "auto", "ipv4" and "ipv6""#;
    let key = r#"write 32 bytes in base64, such as "wg genpsk" prints"#;
    for (families, settings, expected) in [
        (
            V4,
            r#""ListenPort":0"#,
            "Backend.ListenPort is 0: use a value between 1 and 65535",
        ),
        (
            V4,
            r#""ListenPortV6":65536"#,
            "Backend.ListenPortV6 is 65536: use a value between 0 and 65535",
        ),
        (
            V4,
            r#""ListenPort":"51820""#,
            "Backend.ListenPort is a string (\"51820\"): write a whole number without quotes",
        ),
        (
            V4,
            r#""PersistentKeepaliveInterval":-1"#,
            "Backend.PersistentKeepaliveInterval is -1: use a value between 0 and 65535",
        ),
        (
            V4,
            r#""Mode":"""#,
            &format!("no valid Mode configured: Backend.Mode is \"\", {modes}"),
        ),
        (
            V4,
            r#""Mode":"Auto""#,
            &format!("no valid Mode configured: Backend.Mode is \"Auto\", {modes}"),
        ),
        (
            V4,
            r#""Mode":"ipv6""#,
            "Backend.Mode is \"ipv6\": nodes have no addresses of that family while EnableIPv6 is false",
        ),
        (
            V6,
            r#""Mode":"ipv4""#,
            "Backend.Mode is \"ipv4\": nodes have no addresses of that family while EnableIPv4 is false",
        ),
        (
            DUAL,
            r#""ListenPort":51821"#,
            "Backend.ListenPortV6 is 51821: both devices listen on all addresses of the node: use another port than ListenPort",
        ),
        (
            V4,
            r#""MTU":1359"#,
            "Backend.MTU is 1359: it is the MTU of the underlay and must be at least 1360, or 0 for the one of the uplink",
        ),
        (
            V4,
            r#""MTU":65616"#,
            "Backend.MTU is 65616: use a value between 0 and 65615",
        ),
        (
            V4,
            r#""PSK":"secret""#,
            &format!("Backend.PSK is not a key: {key}"),
        ),
        (
            V4,
            r#""PSK":123456"#,
            &format!("Backend.PSK is a number: {key}"),
        ),
    ] {
        let backend = format!(r#""Type":"wireguard",{settings}"#);
        assert_eq!(message(&json(families, &backend)), expected);
    }
}

/// A backend decodes its own keys only: those of another one are unknown to it, whatever they say.
#[test]
fn keys_of_other_backends_are_passed_over() {
    for (kind, settings) in [
        ("host-gw", r#""VNI":"x","MTU":7,"PSK":1,"DirectRouting":1"#),
        ("alloc", r#""VNI":"x","MTU":7,"Mode":"x""#),
        ("wireguard", r#""VNI":"x","Port":-1,"GBP":1"#),
        ("vxlan", r#""ListenPort":0,"PSK":1,"Mode":"x""#),
    ] {
        let conf = parse(&json(V4, &format!(r#""Type":"{kind}",{settings}"#)));
        assert_eq!(conf.backend.vxlan, VxlanConf::default(), "{kind}");
        assert_eq!(conf.backend.wireguard, WireguardConf::default(), "{kind}");
        assert!(conf.warnings.is_empty(), "{kind}");
    }
}

#[test]
fn the_fast_path_is_of_vxlan_and_host_gw() {
    for kind in BackendKind::ALL {
        let conf = parse(&json(
            V4,
            &format!(r#""Type":"{kind}","BpfFastPath":"off""#),
        ));
        assert_eq!(conf.backend.fast_path, Some(Choice::Off));
        let expected: &[&str] = match kind {
            BackendKind::Vxlan | BackendKind::HostGw => &[],
            BackendKind::Wireguard => &[
                "Backend.BpfFastPath is set, but no eBPF program carries traffic of backend wireguard: it has no effect, remove it",
            ],
            BackendKind::Alloc => &[
                "Backend.BpfFastPath is set, but no eBPF program carries traffic of backend alloc: it has no effect, remove it",
            ],
        };
        assert_eq!(conf.warnings, expected);
        assert!(
            message(&json(V4, &format!(r#""Type":"{kind}","BpfFastPath":"no""#)))
                .starts_with("Backend.BpfFastPath is \"no\": ")
        );
    }
}

#[test]
fn mtu_of_a_link_by_backend() {
    // Backend, families, configured MTU, link MTU, MTU of the pods, warnings.
    let cases = [
        ("host-gw", V4, 0, 1500, Some(1500), 0),
        ("host-gw", DUAL, 0, 1500, Some(1500), 0),
        ("host-gw", V4, 1400, 1500, Some(1500), 0),
        ("host-gw", V4, 0, 65_536, Some(65_535), 0),
        ("host-gw", V4, 0, 68, Some(68), 0),
        ("host-gw", V4, 0, 67, None, 0),
        ("host-gw", V6, 0, 1280, Some(1280), 0),
        ("host-gw", V6, 0, 1279, None, 0),
        ("alloc", V4, 0, 1500, Some(1500), 0),
        ("alloc", V6, 0, 9000, Some(9000), 0),
        ("wireguard", V4, 0, 1500, Some(1420), 0),
        ("wireguard", DUAL, 0, 1500, Some(1420), 0),
        ("wireguard", V6, 0, 9000, Some(8920), 0),
        ("wireguard", V4, 1400, 1500, Some(1320), 0),
        ("wireguard", V6, 1400, 1500, Some(1320), 0),
        ("wireguard", DUAL, 9000, 1500, Some(1420), 1),
        ("wireguard", V4, 0, 148, Some(68), 0),
        ("wireguard", V4, 0, 147, None, 0),
        ("wireguard", V6, 0, 1360, Some(1280), 0),
        ("wireguard", V6, 0, 1359, None, 0),
        ("vxlan", V4, 0, 1500, Some(1450), 0),
        ("vxlan", DUAL, 0, 1500, Some(1430), 0),
    ];
    for (kind, families, mtu, link, expected, warnings) in cases {
        let conf = parse(&json(families, &format!(r#""Type":"{kind}","MTU":{mtu}"#)));
        let case = format!("{kind} {families} {mtu} {link}");
        assert_eq!(
            tunnel_mtu(&conf, link).ok().map(Mtu::get),
            expected,
            "{case}"
        );
        assert_eq!(mtu_warnings(&conf, link).len(), warnings, "{case}");
    }
}

#[test]
fn only_vxlan_announces_its_settings() {
    for kind in ["host-gw", "WireGuard", "alloc"] {
        let lines = parse(&json(V4, &format!(r#""Type":"{kind}""#))).announcement();
        assert_eq!(
            lines,
            [format!("Found network config - Backend type: {kind}")]
        );
    }
}

#[test]
fn changes_of_the_backend_while_running() {
    let conf = |backend: &str| parse(&json(DUAL, backend));
    let changed = |was: &str, is: &str| change(&conf(was), &conf(is));
    for (was, is) in [
        (r#""Type":"host-gw""#, r#""Type":"HOST-GW","MTU":1"#),
        (
            r#""Type":"wireguard""#,
            r#""Type":"wireguard","ListenPort":51820,"PSK":"""#,
        ),
    ] {
        assert_eq!(changed(was, is), Change::Same, "{was} {is}");
    }
    for (was, is) in [
        (
            r#""Type":"host-gw""#,
            r#""Type":"host-gw","BpfFastPath":"off""#,
        ),
        (r#""Type":"wireguard""#, r#""Type":"wireguard","MTU":1400"#),
        (
            r#""Type":"wireguard""#,
            r#""Type":"wireguard","PersistentKeepaliveInterval":25"#,
        ),
    ] {
        assert_eq!(changed(was, is), Change::Live, "{was} {is}");
    }
    let restarts = [
        (
            r#""Type":"vxlan","VNI":7"#,
            r#""Type":"host-gw""#.to_owned(),
            "Backend.Type was vxlan and is host-gw now: nodes of different backends do not reach each other, and what this one has is made for the backend it started with",
        ),
        (
            r#""Type":"alloc""#,
            format!(r#""Type":"wireguard","PSK":"{PSK}","Mode":"auto""#),
            "Backend.Type was alloc and is wireguard now: ",
        ),
        (
            r#""Type":"wireguard""#,
            r#""Type":"wireguard","ListenPort":7"#.to_owned(),
            "Backend.ListenPort was 51820 and is 7 now: ",
        ),
        (
            r#""Type":"wireguard""#,
            r#""Type":"wireguard","ListenPortV6":7"#.to_owned(),
            "Backend.ListenPortV6 was 51821 and is 7 now: ",
        ),
        (
            r#""Type":"wireguard""#,
            r#""Type":"wireguard","Mode":"ipv6""#.to_owned(),
            "Backend.Mode was separate and is ipv6 now: ",
        ),
        (
            r#""Type":"wireguard""#,
            format!(r#""Type":"wireguard","PSK":"{PSK}""#),
            "Backend.PSK is another one now: ",
        ),
    ];
    for (was, is, expected) in restarts {
        let Change::Restart(lines) = changed(was, &is) else {
            panic!("{was} {is}");
        };
        assert!(
            matches!(&lines[..], [line] if line.starts_with(expected) && !line.contains(PSK)),
            "{lines:?}"
        );
    }
}
