//! `subnet.env` as the plugin reads it: line by line, split at the first `=`, nothing taken off (upstream: `flannel.go`,
//! `loadFlannelSubnetEnv`). What it does not know it passes over.

use std::fmt::Display;

use ipnet::{Ipv4Net, Ipv6Net};
use thiserror::Error;

/// This node's part of the pod network.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SubnetEnv {
    /// The whole IPv4 networks, without host bits and without repetitions.
    pub networks: Vec<Ipv4Net>,
    /// The whole IPv6 networks.
    pub ipv6_networks: Vec<Ipv6Net>,
    /// This node's IPv4 subnet, without host bits.
    pub subnet: Option<Ipv4Net>,
    /// This node's IPv6 subnet.
    pub ipv6_subnet: Option<Ipv6Net>,
    /// MTU of the pods in bytes.
    pub mtu: u32,
    /// Whether flannel masquerades.
    pub ip_masq: bool,
}

/// Why a file is none.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum SubnetEnvError {
    /// In Go's words.
    #[error("invalid CIDR address: {0}")]
    Cidr(String),
    /// In Go's words.
    #[error("strconv.ParseUint: parsing {value:?}: {reason}")]
    Mtu {
        /// What stands there.
        value: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// Upstream panics here.
    #[error("{0} has no value: write {0}=…")]
    NoValue(String),
    /// Names of lines that must be there.
    #[error("{file} is missing {}", .names.join(", "))]
    Missing {
        /// The file.
        file: String,
        /// What it lacks.
        names: Vec<&'static str>,
    },
}

impl SubnetEnv {
    /// Reads the text of `file`, which is named in messages. Of a line that occurs twice the last counts.
    pub fn parse(file: &str, text: &str) -> Result<Self, SubnetEnvError> {
        let mut env = Self::default();
        let (mut mtu, mut ip_masq) = (None, None);
        for line in text.lines() {
            let (name, value) = match line.split_once('=') {
                Some((name, value)) => (name, Some(value)),
                None => (line, None),
            };
            let value = || value.ok_or_else(|| SubnetEnvError::NoValue(name.to_owned()));
            match name {
                "FLANNEL_NETWORK" => env.networks = list(value()?)?,
                "FLANNEL_IPV6_NETWORK" => env.ipv6_networks = list(value()?)?,
                "FLANNEL_SUBNET" => env.subnet = Some(cidr(value()?)?),
                "FLANNEL_IPV6_SUBNET" => env.ipv6_subnet = Some(cidr(value()?)?),
                "FLANNEL_MTU" => mtu = Some(number(value()?)?),
                "FLANNEL_IPMASQ" => ip_masq = Some(value()? == "true"),
                _ => {}
            }
        }
        let mut names = Vec::new();
        if env.networks.is_empty() && env.ipv6_networks.is_empty() {
            names.extend(["FLANNEL_NETWORK", "FLANNEL_IPV6_NETWORK"]);
        }
        if env.subnet.is_none() && env.ipv6_subnet.is_none() {
            names.extend(["FLANNEL_SUBNET", "FLANNEL_IPV6_SUBNET"]);
        }
        if mtu.is_none() {
            names.push("FLANNEL_MTU");
        }
        if ip_masq.is_none() {
            names.push("FLANNEL_IPMASQ");
        }
        match (mtu, ip_masq) {
            (Some(mtu), Some(ip_masq)) if names.is_empty() => Ok(Self {
                mtu,
                ip_masq,
                ..env
            }),
            _ => Err(SubnetEnvError::Missing {
                file: file.to_owned(),
                names,
            }),
        }
    }

    /// The subnets in the form of host-local's `subnet`, IPv4 first.
    pub(crate) fn subnets(&self) -> Vec<String> {
        texts(self.subnet.as_slice(), self.ipv6_subnet.as_slice())
    }

    /// The networks in the form of a route's `dst`, IPv4 first.
    pub(crate) fn networks(&self) -> Vec<String> {
        texts(&self.networks, &self.ipv6_networks)
    }
}

fn texts(v4: &[impl Display], v6: &[impl Display]) -> Vec<String> {
    let v4 = v4.iter().map(ToString::to_string);
    v4.chain(v6.iter().map(ToString::to_string)).collect()
}

/// An address family's notation of a subnet.
trait Cidr: std::str::FromStr + PartialEq {
    fn masked(self) -> Self;
}

impl Cidr for Ipv4Net {
    fn masked(self) -> Self {
        self.trunc()
    }
}

impl Cidr for Ipv6Net {
    fn masked(self) -> Self {
        self.trunc()
    }
}

fn cidr<N: Cidr>(text: &str) -> Result<N, SubnetEnvError> {
    let net: N = text
        .parse()
        .map_err(|_| SubnetEnvError::Cidr(text.to_owned()))?;
    Ok(net.masked())
}

fn list<N: Cidr>(text: &str) -> Result<Vec<N>, SubnetEnvError> {
    let mut nets = Vec::new();
    for entry in text.split(',') {
        let net = cidr(entry)?;
        if !nets.contains(&net) {
            nets.push(net);
        }
    }
    Ok(nets)
}

/// Go takes digits alone, where Rust takes a sign.
fn number(text: &str) -> Result<u32, SubnetEnvError> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let reason = if digits {
        "value out of range"
    } else {
        "invalid syntax"
    };
    let wrong = || SubnetEnvError::Mtu {
        value: text.to_owned(),
        reason,
    };
    if digits {
        text.parse().map_err(|_| wrong())
    } else {
        Err(wrong())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const FILE: &str = "/run/flannel/subnet.env";
    const GOLDEN: &str = "FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=10.5.65.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n";

    fn parse(text: &str) -> Result<SubnetEnv, String> {
        SubnetEnv::parse(FILE, text).map_err(|error| error.to_string())
    }

    #[test]
    fn what_upstream_writes() {
        let env = parse(GOLDEN).unwrap();
        assert_eq!(env.subnets(), ["10.5.65.0/24"]);
        assert_eq!(env.networks(), ["10.5.0.0/16"]);
        assert_eq!((env.mtu, env.ip_masq), (1450, true));
        let dual = format!(
            "{GOLDEN}FLANNEL_IPV6_NETWORK=fd05::/48\nFLANNEL_IPV6_SUBNET=fd05:0:0:13::1/64\n"
        );
        let env = parse(&dual).unwrap();
        assert_eq!(env.subnets(), ["10.5.65.0/24", "fd05:0:0:13::/64"]);
        assert_eq!(env.networks(), ["10.5.0.0/16", "fd05::/48"]);
    }

    #[test]
    fn several_networks_are_named_once_each() {
        let text = GOLDEN.replace("10.5.0.0/16", "10.5.0.0/16,10.6.1.2/16,10.5.0.0/16");
        assert_eq!(
            parse(&text).unwrap().networks(),
            ["10.5.0.0/16", "10.6.0.0/16"]
        );
    }

    #[test]
    fn it_is_no_shell() {
        for (from, to, said) in [
            (
                "FLANNEL_MTU=1450",
                "export FLANNEL_MTU=1450",
                format!("{FILE} is missing FLANNEL_MTU"),
            ),
            (
                "FLANNEL_MTU=1450",
                " FLANNEL_MTU=1450",
                format!("{FILE} is missing FLANNEL_MTU"),
            ),
            (
                "FLANNEL_MTU=1450",
                "FLANNEL_MTU=\"1450\"",
                r#"strconv.ParseUint: parsing "\"1450\"": invalid syntax"#.into(),
            ),
            (
                "FLANNEL_MTU=1450",
                "FLANNEL_MTU=+1450",
                r#"strconv.ParseUint: parsing "+1450": invalid syntax"#.into(),
            ),
            (
                "FLANNEL_MTU=1450",
                "FLANNEL_MTU=4294967296",
                r#"strconv.ParseUint: parsing "4294967296": value out of range"#.into(),
            ),
            (
                "10.5.65.1/24",
                "10.5.65.1/24 ",
                "invalid CIDR address: 10.5.65.1/24 ".into(),
            ),
            (
                "10.5.0.0/16",
                "10.5.0.0/16,",
                "invalid CIDR address: ".into(),
            ),
            (
                "10.5.65.1/24",
                "'10.5.65.1/24'",
                "invalid CIDR address: '10.5.65.1/24'".into(),
            ),
            (
                "FLANNEL_IPMASQ=true",
                "FLANNEL_IPMASQ",
                "FLANNEL_IPMASQ has no value: write FLANNEL_IPMASQ=…".into(),
            ),
        ] {
            assert_eq!(parse(&GOLDEN.replace(from, to)).unwrap_err(), said, "{to}");
        }
        for value in ["True", "1", " true", "yes"] {
            let env = parse(&GOLDEN.replace("IPMASQ=true", &format!("IPMASQ={value}")));
            assert!(!env.unwrap().ip_masq, "{value}");
        }
        // Line ends and lines that are nobody's.
        let odd = format!(
            "# a comment\n\nNOTHING\nOTHER=x=y\n{}",
            GOLDEN.replace('\n', "\r\n")
        );
        assert_eq!(parse(&odd), parse(GOLDEN));
    }

    #[test]
    fn what_is_missing_is_named() {
        assert_eq!(
            parse("").unwrap_err(),
            format!(
                "{FILE} is missing FLANNEL_NETWORK, FLANNEL_IPV6_NETWORK, FLANNEL_SUBNET, FLANNEL_IPV6_SUBNET, FLANNEL_MTU, FLANNEL_IPMASQ"
            )
        );
        assert_eq!(
            parse("FLANNEL_IPV6_NETWORK=fd05::/48\nFLANNEL_MTU=1\nFLANNEL_IPMASQ=true")
                .unwrap_err(),
            format!("{FILE} is missing FLANNEL_SUBNET, FLANNEL_IPV6_SUBNET")
        );
    }

    proptest! {
        /// The agent's own file passes: what either of the two writes, either plugin reads.
        #[test]
        fn the_agents_file_is_read(subnet: std::net::Ipv4Addr, len in 1u8..31, v6 in proptest::option::of((any::<std::net::Ipv6Addr>(), 1u8..127)), mtu: u32, ip_masq: bool) {
            let subnet = Ipv4Net::new(subnet, len).unwrap().trunc();
            let v6 = v6.map(|(base, len)| Ipv6Net::new(base, len).unwrap().trunc());
            let written = flannel_core::subnet_env::SubnetEnv {
                network: Some(subnet), subnet: Some(subnet), ipv6_network: v6, ipv6_subnet: v6, mtu, ip_masq,
            };
            let read = parse(&written.render()).unwrap();
            prop_assert_eq!(read, SubnetEnv {
                networks: vec![subnet], ipv6_networks: v6.into_iter().collect(), subnet: Some(subnet), ipv6_subnet: v6, mtu, ip_masq,
            });
        }

        #[test]
        fn never_panics(text in "(?s)(FLANNEL_[A-Z]{3,8}=?.{0,9}\n?){0,5}.*") {
            let _env = parse(&text);
        }
    }
}
