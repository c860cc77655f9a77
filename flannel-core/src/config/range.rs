//! The subnet range of one address family: upstream's `CheckNetworkConfig`, written once for both families.

use std::fmt::Display;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use ipnet::{Ipv4Net, Ipv6Net};

use super::{ConfigError, FamilyConf, integer, string};
use crate::json::Object;

/// An IP address as a number, for arithmetic that is the same in both families.
pub(crate) trait Address: Copy + Ord + Display + FromStr {
    /// Width of an address in bits.
    const BITS: u8;

    fn to_number(self) -> u128;

    /// Takes the low [`Self::BITS`] bits.
    fn from_number(number: u128) -> Self;
}

impl Address for Ipv4Addr {
    const BITS: u8 = 32;

    fn to_number(self) -> u128 {
        self.to_bits().into()
    }

    fn from_number(number: u128) -> Self {
        let [.., a, b, c, d] = number.to_be_bytes();
        Self::new(a, b, c, d)
    }
}

impl Address for Ipv6Addr {
    const BITS: u8 = 128;

    fn to_number(self) -> u128 {
        self.to_bits()
    }

    fn from_number(number: u128) -> Self {
        Self::from_bits(number)
    }
}

/// A network of one family, with the names and limits upstream has for that family.
pub(crate) trait Network: Copy + Display + FromStr {
    type Addr: Address;

    const KEY: &'static str;
    const LEN_KEY: &'static str;
    const MIN_KEY: &'static str;
    const MAX_KEY: &'static str;
    const EXAMPLE: &'static str;
    const WANTED: &'static str;
    const WANTED_ADDRESS: &'static str;
    /// Upstream's words for text that does not parse.
    fn bad(text: &str) -> String;
    /// The subnet length where none is given and the network is large enough.
    const DEFAULT_LEN: u8;

    fn truncated(self) -> Self;
    fn prefix(self) -> u8;
    fn first(self) -> Self::Addr;
    fn last(self) -> Self::Addr;
}

impl Network for Ipv4Net {
    type Addr = Ipv4Addr;

    const KEY: &'static str = "Network";
    const LEN_KEY: &'static str = "SubnetLen";
    const MIN_KEY: &'static str = "SubnetMin";
    const MAX_KEY: &'static str = "SubnetMax";
    const EXAMPLE: &'static str = "10.244.0.0/16";
    const WANTED: &'static str = "a string such as \"10.244.0.0/16\"";
    const WANTED_ADDRESS: &'static str = "a string such as \"10.244.1.0\"";
    const DEFAULT_LEN: u8 = 24;

    fn bad(_text: &str) -> String {
        "invalid IPv4 CIDR format".to_owned()
    }

    fn truncated(self) -> Self {
        self.trunc()
    }

    fn prefix(self) -> u8 {
        self.prefix_len()
    }

    fn first(self) -> Ipv4Addr {
        self.network()
    }

    fn last(self) -> Ipv4Addr {
        self.broadcast()
    }
}

impl Network for Ipv6Net {
    type Addr = Ipv6Addr;

    const KEY: &'static str = "IPv6Network";
    const LEN_KEY: &'static str = "IPv6SubnetLen";
    const MIN_KEY: &'static str = "IPv6SubnetMin";
    const MAX_KEY: &'static str = "IPv6SubnetMax";
    const EXAMPLE: &'static str = "fd00:10:244::/48";
    const WANTED: &'static str = "a string such as \"fd00:10:244::/48\"";
    const WANTED_ADDRESS: &'static str = "a string such as \"fd00:10:244:1::\"";
    const DEFAULT_LEN: u8 = 64;

    fn bad(text: &str) -> String {
        format!("invalid CIDR address: {}", text.escape_debug())
    }

    fn truncated(self) -> Self {
        self.trunc()
    }

    fn prefix(self) -> u8 {
        self.prefix_len()
    }

    fn first(self) -> Ipv6Addr {
        self.network()
    }

    fn last(self) -> Ipv6Addr {
        self.broadcast()
    }
}

/// What the configuration says about one family, parsed and not yet checked: a disabled family needs no check.
pub(super) struct Given<N, A> {
    network: Option<N>,
    len: Option<u8>,
    min: Option<A>,
    max: Option<A>,
}

impl<N: Network> Given<N, N::Addr> {
    pub(super) fn read(object: &Object) -> Result<Self, ConfigError> {
        let network = match string(object, N::KEY, N::KEY, N::WANTED)? {
            None => None,
            Some(text) => Some(text.parse().map(N::truncated).map_err(|_| {
                let fix = format!(", write one such as {}", N::EXAMPLE);
                rule(N::bad(text), N::KEY, &format!("{text:?}"), fix)
            })?),
        };
        let address = |key: &'static str| match string(object, key, key, N::WANTED_ADDRESS)? {
            None => Ok(None),
            Some(text) => {
                let fix = format!("not an address of this family, write {}", N::WANTED_ADDRESS);
                let parsed: Result<N::Addr, _> = text.parse();
                let addr = parsed.map_err(|_| invalid(key, &format!("{text:?}"), fix))?;
                // Upstream cannot tell the zero address from an absent one.
                Ok(Some(addr).filter(|addr| addr.to_number() != 0))
            }
        };
        Ok(Self {
            network,
            len: integer(object, N::LEN_KEY, N::LEN_KEY, N::Addr::BITS.into())?
                .and_then(|len| u8::try_from(len).ok())
                .filter(|len| *len != 0),
            min: address(N::MIN_KEY)?,
            max: address(N::MAX_KEY)?,
        })
    }

    /// The network alone, for subnets that somebody else gives out: their length and range are not ours to judge, and the length stands
    /// for one that is usual.
    pub(super) fn unchecked(self) -> Result<FamilyConf<N, N::Addr>, ConfigError> {
        let network = self.network.ok_or(ConfigError::MissingNetwork {
            key: N::KEY,
            example: N::EXAMPLE,
        })?;
        Ok(FamilyConf {
            network,
            subnet_len: N::DEFAULT_LEN.max(network.prefix()),
            min: network.first(),
            max: network.last(),
        })
    }

    /// Checks in upstream's order and fills in what is not given.
    pub(super) fn check(self) -> Result<FamilyConf<N, N::Addr>, ConfigError> {
        let network = self.network.ok_or(ConfigError::MissingNetwork {
            key: N::KEY,
            example: N::EXAMPLE,
        })?;
        let subnet_len = subnet_len(network, self.len)?;
        let size = 1u128 << (N::Addr::BITS - subnet_len);
        let first = network.first().to_number();
        let last = network.last().to_number();
        // The first subnet is never used, so that the base address of the network stays free.
        let min = self.min.map_or(first + size, Address::to_number);
        let max = self.max.map_or(last - (size - 1), Address::to_number);
        for (key, number) in [(N::MIN_KEY, min), (N::MAX_KEY, max)] {
            let addr = N::Addr::from_number(number);
            if !(first..=last).contains(&number) {
                return Err(rule(
                    format!("{key} is not in the range of the {}", N::KEY),
                    key,
                    &addr,
                    format!(", use an address inside {network}"),
                ));
            }
            let base = N::Addr::from_number(number & !(size - 1));
            if number % size != 0 {
                return Err(rule(
                    format!("{key} is not on a SubnetLen boundary: {addr}"),
                    key,
                    &addr,
                    format!(", use {base} for subnets of /{subnet_len}"),
                ));
            }
        }
        let (min, max) = (N::Addr::from_number(min), N::Addr::from_number(max));
        if min > max {
            let fix = format!(
                "it is above {} {max}, so there is no subnet to give out: swap or widen them",
                N::MAX_KEY
            );
            return Err(invalid(N::MIN_KEY, &min, fix));
        }
        Ok(FamilyConf {
            network,
            subnet_len,
            min,
            max,
        })
    }
}

fn subnet_len<N: Network>(network: N, given: Option<u8>) -> Result<u8, ConfigError> {
    let prefix = network.prefix();
    let most = N::Addr::BITS - 2;
    match given {
        Some(len) if len > most => Err(rule(
            format!("SubnetLen must be less than /{}", most + 1),
            N::LEN_KEY,
            &len,
            String::new(),
        )),
        Some(len) if len < prefix.saturating_add(2) => Err(rule(
            "network must be able to accommodate at least four subnets".to_owned(),
            N::LEN_KEY,
            &len,
            format!(", use at least {} with {network}", prefix.saturating_add(2)),
        )),
        Some(len) => Ok(len),
        None if prefix > most - 2 => {
            let lead = if N::Addr::BITS == 32 {
                "network"
            } else {
                N::KEY
            };
            Err(rule(
                format!(
                    "{lead} is too small. Minimum useful network prefix is /{}",
                    most - 2
                ),
                N::KEY,
                &network,
                String::new(),
            ))
        }
        None => Ok(N::DEFAULT_LEN.max(prefix + 2)),
    }
}

fn rule(rule: String, key: &'static str, value: &dyn Display, fix: String) -> ConfigError {
    ConfigError::Rule {
        rule,
        key,
        value: value.to_string(),
        fix,
    }
}

fn invalid(key: &'static str, value: &dyn Display, fix: impl Into<String>) -> ConfigError {
    ConfigError::Invalid {
        key,
        value: value.to_string(),
        fix: fix.into(),
    }
}
