//! `subnet.env`, the contract with the flannel CNI plugin: writing it, and reading back what an earlier start wrote.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use ipnet::{Ipv4Net, Ipv6Net};

/// What goes into the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SubnetEnv {
    /// The whole IPv4 network.
    pub network: Option<Ipv4Net>,
    /// This node's IPv4 subnet, without host bits. The file has the first address in it, the pods' gateway.
    pub subnet: Option<Ipv4Net>,
    /// The whole IPv6 network.
    pub ipv6_network: Option<Ipv6Net>,
    /// This node's IPv6 subnet, without host bits.
    pub ipv6_subnet: Option<Ipv6Net>,
    /// MTU for the pods, in bytes.
    pub mtu: u32,
    /// Whether flannel masquerades, so that the plugin need not.
    pub ip_masq: bool,
}

impl SubnetEnv {
    /// Writes the text exactly as upstream does: same lines, same order, a line end after each.
    pub fn render(&self) -> String {
        let mut out = String::new();
        let mut line = |name: &str, value: &dyn Display| {
            out.extend([name, "=", &value.to_string(), "\n"]);
        };
        if let Some(network) = self.network {
            line("FLANNEL_NETWORK", &network.trunc());
        }
        if let Some(subnet) = self.subnet {
            let gateway = Ipv4Addr::from_bits(subnet.network().to_bits().wrapping_add(1));
            line(
                "FLANNEL_SUBNET",
                &format_args!("{gateway}/{}", subnet.prefix_len()),
            );
        }
        if let Some(network) = self.ipv6_network {
            line("FLANNEL_IPV6_NETWORK", &network.trunc());
        }
        if let Some(subnet) = self.ipv6_subnet {
            let gateway = Ipv6Addr::from_bits(subnet.network().to_bits().wrapping_add(1));
            line(
                "FLANNEL_IPV6_SUBNET",
                &format_args!("{gateway}/{}", subnet.prefix_len()),
            );
        }
        line("FLANNEL_MTU", &self.mtu);
        line("FLANNEL_IPMASQ", &self.ip_masq);
        out
    }
}

/// What an earlier start left: the subnets to ask for again, and the networks whose rules may still be there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Previous {
    /// The IPv4 network, without host bits.
    pub network: Option<Ipv4Net>,
    /// The IPv6 network, without host bits.
    pub ipv6_network: Option<Ipv6Net>,
    /// The IPv4 subnet, without host bits.
    pub subnet: Option<Ipv4Net>,
    /// The IPv6 subnet, without host bits.
    pub ipv6_subnet: Option<Ipv6Net>,
    /// What could not be read, one line each. A missing key is no warning: there is none at the first start.
    pub warnings: Vec<String>,
}

/// Reads the subnets out of a `subnet.env` of any release. What does not parse is left out with a warning.
///
/// Old releases wrote a comma list for several networks; of more than one entry, none is taken, as upstream does.
pub fn parse_previous(text: &str) -> Previous {
    let mut warnings = Vec::new();
    let (mut v4, mut v6) = (None, None);
    let (mut network, mut ipv6_network) = (None, None);
    for (number, line) in text.lines().enumerate() {
        match assignment(line) {
            Assignment::Broken => warnings.push(format!(
                "line {} is not NAME=value, ignoring it",
                number + 1
            )),
            // The last one wins, as in a shell.
            Assignment::Pair("FLANNEL_SUBNET", value) => v4 = Some(value),
            Assignment::Pair("FLANNEL_IPV6_SUBNET", value) => v6 = Some(value),
            Assignment::Pair("FLANNEL_NETWORK", value) => network = Some(value),
            Assignment::Pair("FLANNEL_IPV6_NETWORK", value) => ipv6_network = Some(value),
            Assignment::None | Assignment::Pair(..) => {}
        }
    }
    let v4 = v4.and_then(|value| single("FLANNEL_SUBNET", &value, &mut warnings));
    let v6 = v6.and_then(|value| single("FLANNEL_IPV6_SUBNET", &value, &mut warnings));
    let network: Option<Ipv4Net> =
        network.and_then(|value| single("FLANNEL_NETWORK", &value, &mut warnings));
    let ipv6_network: Option<Ipv6Net> =
        ipv6_network.and_then(|value| single("FLANNEL_IPV6_NETWORK", &value, &mut warnings));
    Previous {
        network: network.as_ref().map(Ipv4Net::trunc),
        ipv6_network: ipv6_network.as_ref().map(Ipv6Net::trunc),
        subnet: v4.as_ref().map(Ipv4Net::trunc),
        ipv6_subnet: v6.as_ref().map(Ipv6Net::trunc),
        warnings,
    }
}

/// Reads all assignments in such a file; the last one of a name counts, as in a shell. What is none is left out.
pub fn assignments(text: &str) -> BTreeMap<String, String> {
    text.lines()
        .filter_map(|line| match assignment(line) {
            Assignment::Pair(name, value) => Some((name.to_owned(), value)),
            Assignment::None | Assignment::Broken => None,
        })
        .collect()
}

enum Assignment<'a> {
    /// Blank or comment.
    None,
    Broken,
    Pair(&'a str, String),
}

fn assignment(line: &str) -> Assignment<'_> {
    let line = line.trim();
    if line.is_empty() || line.starts_with('#') {
        return Assignment::None;
    }
    let line = match line.strip_prefix("export") {
        Some(rest) if rest.starts_with(char::is_whitespace) => rest.trim_start(),
        _ => line,
    };
    match line.split_once('=') {
        Some((name, value)) if !name.trim().is_empty() => {
            Assignment::Pair(name.trim(), unquote(value.trim()))
        }
        _ => Assignment::Broken,
    }
}

/// Takes the quotes, or else a trailing comment, off a value. Subnets need no escape sequences.
fn unquote(value: &str) -> String {
    for quote in ['"', '\''] {
        if let Some((inner, _)) = value
            .strip_prefix(quote)
            .and_then(|rest| rest.split_once(quote))
        {
            return inner.to_owned();
        }
    }
    let bare = match value.find(" #") {
        Some(at) => value.split_at(at).0,
        None => value,
    };
    bare.trim_end().to_owned()
}

fn single<N: FromStr>(name: &str, value: &str, warnings: &mut Vec<String>) -> Option<N> {
    let mut found = Vec::new();
    for entry in value
        .split(',')
        .map(str::trim)
        .filter(|entry| !entry.is_empty())
    {
        match entry.parse() {
            Ok(net) => found.push(net),
            Err(_) => warnings.push(format!(
                "{name} has the invalid CIDR {entry:?}, ignoring it"
            )),
        }
    }
    if found.len() > 1 {
        warnings.push(format!(
            "more than 1 entry found for key: {name} ({value}), ignoring all of them"
        ));
        return None;
    }
    found.pop()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Files upstream v0.28.9 was seen to write.
    const GOLDEN: &[&str] = &[
        "FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=10.5.65.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n",
        "FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=10.5.15.193/26\nFLANNEL_MTU=1350\nFLANNEL_IPMASQ=false\n",
        "FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=10.5.6.1/24\nFLANNEL_IPV6_NETWORK=fd05::/48\n\
         FLANNEL_IPV6_SUBNET=fd05:0:0:13::1/64\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n",
    ];

    fn env(subnet: &str, mtu: u32, ip_masq: bool) -> SubnetEnv {
        SubnetEnv {
            network: Some("10.5.0.0/16".parse().unwrap()),
            subnet: Some(subnet.parse().unwrap()),
            ipv6_network: None,
            ipv6_subnet: None,
            mtu,
            ip_masq,
        }
    }

    #[test]
    fn golden_files_are_reproduced_byte_for_byte() {
        assert_eq!(env("10.5.65.0/24", 1450, true).render(), GOLDEN[0]);
        assert_eq!(env("10.5.15.192/26", 1350, false).render(), GOLDEN[1]);
        let dual = SubnetEnv {
            ipv6_network: Some("fd05::/48".parse().unwrap()),
            ipv6_subnet: Some("fd05:0:0:13::/64".parse().unwrap()),
            ..env("10.5.6.0/24", 1450, true)
        };
        assert_eq!(dual.render(), GOLDEN[2]);
        let v6_only = SubnetEnv {
            network: None,
            subnet: None,
            ..dual
        };
        assert_eq!(
            v6_only.render(),
            "FLANNEL_IPV6_NETWORK=fd05::/48\nFLANNEL_IPV6_SUBNET=fd05:0:0:13::1/64\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n"
        );
    }

    #[test]
    fn golden_files_are_read_back() {
        let subnets: Vec<_> = GOLDEN.iter().map(|text| parse_previous(text)).collect();
        let v4: Vec<_> = subnets
            .iter()
            .map(|p| p.subnet.unwrap().to_string())
            .collect();
        assert_eq!(v4, ["10.5.65.0/24", "10.5.15.192/26", "10.5.6.0/24"]);
        assert_eq!(
            subnets[2].ipv6_subnet.unwrap().to_string(),
            "fd05:0:0:13::/64"
        );
        assert!(subnets.iter().all(|previous| previous.warnings.is_empty()));
    }

    #[test]
    fn reader_takes_shell_syntax() {
        let subnet: Ipv4Net = "10.5.89.0/24".parse().unwrap();
        for text in [
            "FLANNEL_SUBNET=10.5.89.1/24",
            "  export FLANNEL_SUBNET=10.5.89.1/24\r\n",
            "FLANNEL_SUBNET = \"10.5.89.1/24\" # mine",
            "FLANNEL_SUBNET='10.5.89.1/24'",
            "FLANNEL_SUBNET=10.5.89.1/24 # mine",
            "# FLANNEL_SUBNET=10.5.1.1/24\n\nFLANNEL_SUBNET=10.5.89.1/24,",
            "FLANNEL_SUBNET=10.5.1.1/24\nFLANNEL_SUBNET=10.5.89.1/24\nOTHER=x",
        ] {
            let previous = parse_previous(text);
            assert_eq!(
                (previous.subnet, previous.warnings.len()),
                (Some(subnet), 0),
                "{text:?}"
            );
        }
    }

    #[test]
    fn reader_says_what_it_leaves_out() {
        let cases: [(&str, Option<&str>, &[&str]); 6] = [
            ("", None, &[]),
            ("FLANNEL_SUBNET=", None, &[]),
            (
                "FLANNEL_SUBNET=10.5.1.1/33",
                None,
                &["FLANNEL_SUBNET has the invalid CIDR \"10.5.1.1/33\", ignoring it"],
            ),
            (
                "FLANNEL_SUBNET=10.5.1.1/24,x",
                Some("10.5.1.0/24"),
                &["FLANNEL_SUBNET has the invalid CIDR \"x\", ignoring it"],
            ),
            (
                "FLANNEL_SUBNET=10.5.1.1/24,10.5.2.1/24",
                None,
                &[
                    "more than 1 entry found for key: FLANNEL_SUBNET (10.5.1.1/24,10.5.2.1/24), ignoring all of them",
                ],
            ),
            (
                "FLANNEL_SUBNET=10.5.1.1/24\ngarbage",
                Some("10.5.1.0/24"),
                &["line 2 is not NAME=value, ignoring it"],
            ),
        ];
        for (text, subnet, warnings) in cases {
            let previous = parse_previous(text);
            assert_eq!(
                previous.subnet.map(|net| net.to_string()).as_deref(),
                subnet,
                "{text:?}"
            );
            assert_eq!(previous.warnings, warnings, "{text:?}");
        }
    }

    #[test]
    fn assignments_are_a_shells() {
        let text = "A=1\nexport B='two words'\n#C=3\nD\nA=4 # last\n";
        let read: Vec<_> = assignments(text).into_iter().collect();
        let expected = [("A", "4"), ("B", "two words")];
        assert_eq!(
            read,
            expected.map(|(name, value)| (name.to_owned(), value.to_owned()))
        );
    }

    proptest! {
        /// Line by line, split at the first `=`, nothing taken off: so the CNI plugin reads it.
        #[test]
        fn the_plugin_reads_what_is_written(base: Ipv4Addr, len in 1u8..31, v6 in proptest::option::of((any::<Ipv6Addr>(), 1u8..127)), mtu: u32, ip_masq: bool) {
            let subnet = Ipv4Net::new(base, len).unwrap().trunc();
            let v6 = v6.map(|(base, len)| Ipv6Net::new(base, len).unwrap().trunc());
            let env = SubnetEnv {
                network: Some(subnet),
                subnet: Some(subnet),
                ipv6_network: v6,
                ipv6_subnet: v6,
                mtu,
                ip_masq,
            };
            let text = env.render();
            prop_assert!(text.ends_with('\n') && !text.contains(['"', '\'', ' ', '\r', '#']));
            let lines: BTreeMap<&str, &str> = text.lines().map(|line| line.split_once('=').unwrap()).collect();
            prop_assert_eq!(lines.len(), if v6.is_some() { 6 } else { 4 });
            prop_assert_eq!(lines["FLANNEL_NETWORK"].parse(), Ok(subnet));
            let gateway: Ipv4Net = lines["FLANNEL_SUBNET"].parse().unwrap();
            prop_assert_eq!(gateway.trunc(), subnet);
            prop_assert_eq!(gateway.addr().to_bits(), subnet.network().to_bits() + 1);
            prop_assert_eq!(lines.get("FLANNEL_IPV6_NETWORK").map(|net| net.parse().unwrap()), v6);
            prop_assert_eq!(lines["FLANNEL_MTU"].parse(), Ok(mtu));
            prop_assert_eq!(lines["FLANNEL_IPMASQ"], if ip_masq { "true" } else { "false" });
            // And back as assignments.
            let read = assignments(&text);
            prop_assert!(read.iter().map(|(name, value)| (name.as_str(), value.as_str())).eq(lines));
        }

        #[test]
        fn round_trip(base: Ipv4Addr, len in 1u8..31, base6: Ipv6Addr, len6 in 1u8..127, mtu: u32, ip_masq: bool) {
            let subnet = Ipv4Net::new(base, len).unwrap().trunc();
            let subnet6 = Ipv6Net::new(base6, len6).unwrap().trunc();
            let env = SubnetEnv {
                network: Some(subnet),
                subnet: Some(subnet),
                ipv6_network: Some(subnet6),
                ipv6_subnet: Some(subnet6),
                mtu,
                ip_masq,
            };
            let expected = Previous { network: Some(subnet), ipv6_network: Some(subnet6), subnet: Some(subnet), ipv6_subnet: Some(subnet6), warnings: vec![] };
            prop_assert_eq!(parse_previous(&env.render()), expected);
        }

        #[test]
        fn reading_never_panics(text in "(?s).*", bytes: Vec<u8>) {
            let _previous = parse_previous(&text);
            let _previous = parse_previous(&String::from_utf8_lossy(&bytes));
        }
    }
}
