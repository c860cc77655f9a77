use proptest::prelude::*;

use super::*;

const KEYS: [&str; 11] = [
    "EnableIPv4",
    "EnableIPv6",
    "EnableNFTables",
    "Network",
    "SubnetLen",
    "SubnetMin",
    "SubnetMax",
    "IPv6Network",
    "IPv6SubnetLen",
    "IPv6SubnetMin",
    "IPv6SubnetMax",
];
const SETTINGS: [&str; 13] = [
    "Type",
    "VNI",
    "Port",
    "MTU",
    "GBP",
    "Learning",
    "DirectRouting",
    "BpfFastPath",
    "ListenPort",
    "ListenPortV6",
    "PSK",
    "PersistentKeepaliveInterval",
    "Mode",
];

/// JSON values, mostly those that belong under some key.
fn any_value() -> impl Strategy<Value = String> {
    prop_oneof![
        any::<bool>().prop_map(|value| value.to_string()),
        (0u64..70_000).prop_map(|value| value.to_string()),
        any::<i64>().prop_map(|value| value.to_string()),
        any::<f32>().prop_map(|value| serde_json::json!(value).to_string()),
        any::<Ipv4Addr>().prop_map(|ip| format!("\"{ip}\"")),
        (any::<Ipv4Addr>(), 0u8..34).prop_map(|(ip, len)| format!("\"{ip}/{len}\"")),
        (any::<Ipv6Addr>(), 0u8..130).prop_map(|(ip, len)| format!("\"{ip}/{len}\"")),
        "(?s).{0,8}".prop_map(|text| serde_json::json!(text).to_string()),
        Just("\"vxlan\"".to_owned()),
        Just("\"wireguard\"".to_owned()),
        Just("\"auto\"".to_owned()),
        Just("null".to_owned()),
        Just("[1,{}]".to_owned()),
        Just("{}".to_owned()),
    ]
}

fn any_object(keys: &'static [&'static str]) -> impl Strategy<Value = String> {
    let member = (proptest::sample::select(keys), any_value());
    proptest::collection::vec(member, 0..5).prop_map(|members| {
        let members: Vec<String> = members
            .iter()
            .map(|(key, value)| format!("\"{key}\":{value}"))
            .collect();
        members.join(",")
    })
}

fn any_conf() -> impl Strategy<Value = String> {
    let kinds = proptest::sample::select(&BackendKind::ALL[..]);
    (any_object(&KEYS), any_object(&SETTINGS), kinds).prop_map(|(keys, settings, kind)| {
        let comma = |members: &str| if members.is_empty() { "" } else { "," };
        let (before, behind) = (comma(&keys), comma(&settings));
        format!(
            "{{\"Network\":\"10.5.0.0/16\",\"IPv6Network\":\"fd00::/48\"{before}{keys},\
             \"Backend\":{{\"Type\":\"{kind}\"{behind}{settings}}}}}"
        )
    })
}

proptest! {
    #[test]
    fn parsing_never_panics(text in ".*", bytes: Vec<u8>) {
        let _conf = NetConf::parse(&text);
        let _conf = NetConf::parse(&String::from_utf8_lossy(&bytes));
    }

    /// Known keys with values of all kinds: an error has one line, and what is accepted can be compared with all else.
    #[test]
    fn any_value_under_any_key_is_read_or_refused_in_one_line(one in any_conf(), other in any_conf()) {
        let parsed: Vec<NetConf> = [&one, &other].into_iter().filter_map(|json| match NetConf::parse(json) {
            Ok(conf) => Some(conf),
            Err(error) => {
                assert!(!error.to_string().contains(char::is_control), "{json}: {error}");
                None
            }
        }).collect();
        for conf in &parsed {
            prop_assert_eq!(change(conf, conf), Change::Same);
            for other in &parsed {
                // A change that goes live one way goes live the other way, too.
                let (there, back) = (change(conf, other), change(other, conf));
                prop_assert_eq!(matches!(there, Change::Restart(_)), matches!(back, Change::Restart(_)));
                if let Change::Restart(lines) = there {
                    prop_assert!(!lines.is_empty() && lines.iter().all(|line| !line.contains('\n')));
                }
            }
        }
    }

    /// Whatever the numbers, an accepted range is usable.
    #[test]
    fn an_accepted_range_holds_together(
        base: u32,
        prefix in 0u8..=32,
        len in 0u64..40,
        min in proptest::option::of(any::<Ipv4Addr>()),
        max in proptest::option::of(any::<Ipv4Addr>()),
        link in 0u32..=65_585,
    ) {
        let base = Ipv4Addr::from(base);
        let mut json = format!(r#"{{"Network":"{base}/{prefix}","SubnetLen":{len},"Backend":{{"Type":"vxlan"}}"#);
        let align = |ip: Ipv4Addr| Ipv4Net::new(ip, u8::try_from(len.min(32)).unwrap()).unwrap().network();
        if let Some(ip) = min {
            json.extend([format!(r#","SubnetMin":"{}""#, align(ip))]);
        }
        if let Some(ip) = max {
            json.extend([format!(r#","SubnetMax":"{}""#, align(ip))]);
        }
        json.push('}');
        if let Ok(conf) = NetConf::parse(&json) {
            let v4 = conf.ipv4.unwrap();
            prop_assert!(v4.min <= v4.max);
            for base in [v4.min, v4.max] {
                let subnet = Ipv4Net::new(base, v4.subnet_len).unwrap();
                prop_assert_eq!(subnet.network(), base);
                prop_assert!(v4.network.contains(&subnet));
            }
            if let Ok(mtu) = tunnel_mtu(&conf, link) {
                prop_assert_eq!(mtu.get() + OVERHEAD_V4, link);
            }
        }
    }
}
