//! Whatever the tools print, reading it ends.

use proptest::prelude::*;

use super::*;
use crate::addr::Family;

proptest! {
    #[test]
    fn iptables_dumps_never_panic(lines in proptest::collection::vec(line(), 0..20)) {
        let dump = lines.join("\n");
        both(|at| {
            let chains = iptables::parse(&dump, "legacy", at.0);
            at.judge(&Firewall { chains });
        });
    }

    #[test]
    fn nft_dumps_never_panic(text in "\\PC{0,200}", cut in 0..7000usize) {
        drop(nft::parse(&text, Family::V4, &std::collections::BTreeSet::new()));
        let cut = KUBE_PROXY_NFT.get(..cut).unwrap_or(KUBE_PROXY_NFT);
        drop(nft::parse(cut, Family::V6, &std::collections::BTreeSet::new()));
    }

    #[test]
    fn nft_rules_of_any_shape_never_panic(value in json(), kind in "match|vmap|mangle|set|counter|jump|quota") {
        let dump = serde_json::json!({"nftables": [
            {"chain": {"family": "inet", "table": "t", "name": "c", "hook": "forward"}},
            {"rule": {"family": "inet", "table": "t", "chain": "c", "expr": [{kind: value}]}},
        ]});
        both(|at| {
            let none = std::collections::BTreeSet::new();
            let chains = nft::parse(&dump.to_string(), at.0, &none).expect("a dump");
            at.judge(&Firewall { chains });
        });
    }
}

fn line() -> impl Strategy<Value = String> {
    prop_oneof![
        "\\PC{0,60}",
        "[*:](filter|FORWARD|X)( ACCEPT| -)?",
        "-A (FORWARD|X)( (!|-s|-d|fd00::/8|-i|-j|-m|--ctstate|\"|\\\\|10.0.0.0/8|X|quota)){0,6}",
    ]
}

fn json() -> impl Strategy<Value = serde_json::Value> {
    use serde_json::Value;
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<u32>().prop_map(Value::from),
        "ip|ip6|ether|type|nfproto|ipv6|saddr|state|@s|10.0.0.1|fd00::1|mark|new|established|==|local".prop_map(Value::from),
    ];
    leaf.prop_recursive(5, 40, 4, |inner| {
        let key = "left|right|op|payload|protocol|field|ct|meta|key|data|set|concat|prefix|addr|len|fib|flags|elem|val|target|drop|tunnel";
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            proptest::collection::btree_map(key, inner, 0..4)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}
