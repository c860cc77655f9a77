//! The same rules in either family: every IPv4 address becomes the IPv6 address with the same last 32 bits.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, Ipv6Addr};

use serde_json::Value;

use super::*;
use crate::addr::Family;
use crate::fastpath::firewall::Judgement;

/// Bits in front of the IPv4 address.
const PREFIX: u8 = 96;

/// A node whose packets of one family are judged. What it is given is IPv4, and read in its family.
#[derive(Clone, Copy, Debug)]
pub(super) struct At(pub(super) Family);

pub(super) const V4: At = At(Family::V4);
pub(super) const V6: At = At(Family::V6);

/// Runs the case in each family.
pub(super) fn both(case: impl Fn(At)) {
    case(V4);
    case(V6);
}

impl At {
    pub(super) fn place(self) -> Place {
        let (network, own) = match self.0 {
            Family::V4 => ("10.244.0.0/16".to_owned(), "10.244.1.1".to_owned()),
            Family::V6 => (turn("10.244.0.0/16"), turn("10.244.1.1")),
        };
        Place {
            network: network.parse().expect("a network"),
            devices: ["cni0", "flannel.1", "veth1"].map(str::to_owned).into(),
            own: [own.parse().expect("an address")].into(),
            uplink: "eth0".to_owned(),
        }
    }

    /// A rule of iptables in this family.
    pub(super) fn turned(self, text: &str) -> String {
        match self.0 {
            Family::V4 => text.to_owned(),
            Family::V6 => turn(text),
        }
    }

    /// A dump of nft in this family.
    pub(super) fn turned_json(self, dump: &str) -> String {
        match self.0 {
            Family::V4 => dump.to_owned(),
            Family::V6 => {
                let mut value = serde_json::from_str(dump).expect("JSON");
                turn_json(&mut value);
                value.to_string()
            }
        }
    }

    pub(super) fn iptables(self, dump: &str) -> Firewall {
        Firewall {
            chains: iptables::parse(&self.turned(dump), "legacy", self.0),
        }
    }

    pub(super) fn nft(self, dump: &str) -> Firewall {
        let dump = self.turned_json(dump);
        Firewall {
            chains: nft::parse(&dump, self.0, &BTreeSet::new()).expect("a dump of nft"),
        }
    }

    pub(super) fn table(self, name: &str, lines: &[&str]) -> Firewall {
        self.iptables(&format!("*{name}\n{}\nCOMMIT\n", lines.join("\n")))
    }

    pub(super) fn forward(self, rules: &[&str]) -> Firewall {
        let lines: Vec<&str> = std::iter::once(":FORWARD ACCEPT [1:2]")
            .chain(rules.iter().copied())
            .collect();
        self.table("mangle", &lines)
    }

    pub(super) fn nft_rule(self, family: &str, hook: &str, expressions: &str) -> Firewall {
        self.nft(&format!(
            r#"{{"nftables": [{{"chain": {{"family": "{family}", "table": "t", "name": "c", "type": "filter", "hook": "{hook}", "prio": 0, "policy": "accept"}}}},
            {{"rule": {{"family": "{family}", "table": "t", "chain": "c", "expr": [{expressions}]}}}}]}}"#
        ))
    }

    pub(super) fn judge(self, firewall: &Firewall) -> Judgement {
        firewall.judge(&self.place())
    }

    pub(super) fn mode(self, choice: Choice, firewall: Firewall) -> GateMode {
        decide(choice, &self.signals(firewall)).mode
    }

    pub(super) fn signals(self, firewall: Firewall) -> Signals {
        let sysctl = |name| Sysctl {
            name,
            value: Some(1),
            error: None,
        };
        Signals {
            unsupported: None,
            place: self.place(),
            sysctls: Sysctls {
                tracking: true,
                be_liberal: sysctl("nf_conntrack_tcp_be_liberal"),
                ignore_invalid_rst: sysctl("nf_conntrack_tcp_ignore_invalid_rst"),
                loose: sysctl("nf_conntrack_tcp_loose"),
            },
            firewall,
            devices: BTreeMap::new(),
            unreadable: Vec::new(),
        }
    }
}

/// A text with IPv6 addresses in place of IPv4 addresses, and with ip6tables' words for what it calls otherwise.
fn turn(text: &str) -> String {
    let mut turned = String::new();
    let mut rest = text;
    while let Some(at) = rest.find(|one: char| one.is_ascii_digit()) {
        let (before, after) = rest.split_at(at);
        turned.push_str(before);
        let inside_a_word = before.ends_with(|one: char| one.is_alphanumeric() || one == '.');
        let length = |text: &str, more: &str| {
            text.find(|one: char| !one.is_ascii_digit() && !more.contains(one))
                .unwrap_or(text.len())
        };
        let (number, behind) = after.split_at(length(after, "."));
        let (number, behind) = match number.parse::<Ipv4Addr>() {
            Ok(address) if !inside_a_word => {
                let bits = behind.strip_prefix('/').unwrap_or_default();
                let (bits, beyond) = bits.split_at(length(bits, ""));
                match bits.parse::<u8>() {
                    Ok(0) => ("::/0".to_owned(), beyond),
                    Ok(bits) => (format!("{}/{}", wide(address), bits + PREFIX), beyond),
                    Err(_) if behind.starts_with(':') => (format!("[{}]", wide(address)), behind),
                    Err(_) => (wide(address).to_string(), behind),
                }
            }
            _ => (number.to_owned(), behind),
        };
        turned.push_str(&number);
        rest = behind;
    }
    turned.push_str(rest);
    for (four, six) in [
        ("-p icmp ", "-p ipv6-icmp "),
        ("-m icmp ", "-m icmp6 "),
        ("--icmp-type", "--icmpv6-type"),
        ("with icmp-", "with icmp6-"),
        ("-j TTL --ttl-set", "-j HL --hl-set"),
    ] {
        turned = turned.replace(four, six);
    }
    turned
}

/// The same for what nft lists. Words of the one family become words of the other.
fn turn_json(value: &mut Value) {
    match value {
        Value::String(text) => {
            *text = match text.as_str() {
                "ip" => "ip6".to_owned(),
                "ip6" => "ip".to_owned(),
                "ipv4" => "ipv6".to_owned(),
                "ipv6" => "ipv4".to_owned(),
                "icmp" => "icmpv6".to_owned(),
                "icmpv6" => "icmp".to_owned(),
                text => turn(text),
            }
        }
        Value::Array(items) => items.iter_mut().for_each(turn_json),
        Value::Object(fields) => {
            let of_ipv4 = |value: &Value| {
                value
                    .as_str()
                    .is_some_and(|text| text.parse::<Ipv4Addr>().is_ok())
            };
            if fields.get("addr").is_some_and(of_ipv4)
                && let Some(bits) = fields.get_mut("len")
                && let Some(length) = bits.as_u64()
            {
                *bits = (length + u64::from(PREFIX)).into();
            }
            fields.values_mut().for_each(turn_json);
        }
        _ => {}
    }
}

fn wide(address: Ipv4Addr) -> Ipv6Addr {
    let network = 0xfd00_u128 << 112;
    (network | u128::from(u32::from(address))).into()
}

#[test]
fn rules_are_turned_whole() {
    assert_eq!(
        turn(
            "-A X1 -s 10.244.1.7/32 ! -d 0.0.0.0/0 -p icmp -m mark --mark 0x1/0x2 --to-destination 10.0.0.9:80"
        ),
        "-A X1 -s fd00::af4:107/128 ! -d ::/0 -p ipv6-icmp -m mark --mark 0x1/0x2 --to-destination [fd00::a00:9]:80"
    );
    let dump = r#"{"a":{"prefix":{"addr":"10.244.0.0","len":16}},"b":["ip","ip6",{"len":16}]}"#;
    assert_eq!(
        V6.turned_json(dump),
        r#"{"a":{"prefix":{"addr":"fd00::af4:0","len":112}},"b":["ip6","ip",{"len":16}]}"#
    );
}
