//! The address families of a lab, and prefixes of either.

use crate::subnet::Subnet;
use anyhow::Context as _;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

/// An address family.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    #[default]
    V4,
    V6,
}

impl Family {
    /// Both.
    pub const ALL: [Family; 2] = [Family::V4, Family::V6];

    /// The family of an address.
    pub fn of(address: impl Into<IpAddr>) -> Family {
        match address.into() {
            IpAddr::V4(_) => Family::V4,
            IpAddr::V6(_) => Family::V6,
        }
    }

    /// Bytes of an IP header without options or extensions.
    pub fn header(self) -> usize {
        match self {
            Family::V4 => 20,
            Family::V6 => 40,
        }
    }

    /// Bytes that VXLAN adds to a packet: outer IP, UDP, VXLAN, inner Ethernet.
    pub fn overhead(self) -> u32 {
        match self {
            Family::V4 => 50,
            Family::V6 => 70,
        }
    }

    /// The flag by which `ip` is told the family.
    pub fn flag(self) -> &'static str {
        match self {
            Family::V4 => "-4",
            Family::V6 => "-6",
        }
    }

    /// The address that means any.
    pub fn unspecified(self) -> IpAddr {
        match self {
            Family::V4 => Ipv4Addr::UNSPECIFIED.into(),
            Family::V6 => Ipv6Addr::UNSPECIFIED.into(),
        }
    }

    /// The tunnel device that flannel gives this family.
    pub fn device(self, vni: u32) -> String {
        match self {
            Family::V4 => format!("flannel.{vni}"),
            Family::V6 => format!("flannel-v6.{vni}"),
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Family::V4 => "IPv4",
            Family::V6 => "IPv6",
        })
    }
}

/// The families that an underlay and its pods have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Families {
    #[default]
    V4,
    V6,
    Dual,
}

impl Families {
    /// Whether `family` is one of them.
    pub fn has(self, family: Family) -> bool {
        self == Families::Dual || self == Families::from(family)
    }

    /// Them, IPv4 first.
    pub fn list(self) -> Vec<Family> {
        let all = Family::ALL.into_iter();
        all.filter(|family| self.has(*family)).collect()
    }
}

impl From<Family> for Families {
    fn from(family: Family) -> Families {
        match family {
            Family::V4 => Families::V4,
            Family::V6 => Families::V6,
        }
    }
}

/// A prefix of either family with the host bits cleared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Prefix {
    base: IpAddr,
    len: u8,
}

impl Prefix {
    /// The prefix of `len` bits that contains `address`.
    pub fn new(address: impl Into<IpAddr>, len: u8) -> Prefix {
        let base = match address.into() {
            IpAddr::V4(address) => Subnet::new(address, len).base().into(),
            IpAddr::V6(address) => {
                assert!(len <= 128, "prefix length {len} of an IPv6 prefix");
                let mask = u128::MAX.checked_shl(128 - u32::from(len)).unwrap_or(0);
                Ipv6Addr::from_bits(address.to_bits() & mask).into()
            }
        };
        Prefix { base, len }
    }

    /// Its family.
    pub fn family(self) -> Family {
        Family::of(self.base)
    }

    /// The first address, flannel's device address.
    pub fn base(self) -> IpAddr {
        self.base
    }

    /// The prefix length in bits.
    pub fn prefix_len(self) -> u8 {
        self.len
    }

    /// The address `n` above the base.
    pub fn host(self, n: u32) -> IpAddr {
        match self.base {
            IpAddr::V4(base) => Ipv4Addr::from_bits(base.to_bits() + n).into(),
            IpAddr::V6(base) => Ipv6Addr::from_bits(base.to_bits() + u128::from(n)).into(),
        }
    }

    /// Subnet number `n` of `len` bits.
    #[must_use]
    pub fn subnet(self, len: u8, n: u32) -> Prefix {
        let base = match self.base {
            IpAddr::V4(base) => Ipv4Addr::from_bits(base.to_bits() + (n << (32 - len))).into(),
            IpAddr::V6(base) => IpAddr::from(Ipv6Addr::from_bits(
                base.to_bits() + (u128::from(n) << (128 - len)),
            )),
        };
        Prefix::new(base, len)
    }

    /// The gateway of the pods: the first host address.
    pub fn gateway(self) -> IpAddr {
        self.host(1)
    }

    /// Whether `address` lies in the prefix.
    pub fn contains(self, address: impl Into<IpAddr>) -> bool {
        let address = address.into();
        Family::of(address) == self.family() && Prefix::new(address, self.len) == self
    }

    /// Its part of a lease key: `10.244.1.0-24`, `fd00:10:244:1::-64`.
    pub fn lease_key(self) -> String {
        format!("{}-{}", self.base, self.len)
    }

    /// The same, where it is one of IPv4.
    pub fn as_subnet(self) -> Option<Subnet> {
        match self.base {
            IpAddr::V4(base) => Some(Subnet::new(base, self.len)),
            IpAddr::V6(_) => None,
        }
    }
}

impl From<Subnet> for Prefix {
    fn from(subnet: Subnet) -> Prefix {
        Prefix::new(subnet.base(), subnet.prefix_len())
    }
}

impl From<(Ipv4Addr, u8)> for Prefix {
    fn from((address, len): (Ipv4Addr, u8)) -> Prefix {
        Prefix::new(address, len)
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.base, self.len)
    }
}

impl FromStr for Prefix {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Prefix> {
        let (address, len) = text
            .split_once('/')
            .with_context(|| format!("prefix {text:?} has no length"))?;
        let address: IpAddr = address
            .parse()
            .with_context(|| format!("prefix {text:?}"))?;
        let len: u8 = len.parse().with_context(|| format!("prefix {text:?}"))?;
        let most = if address.is_ipv4() { 32 } else { 128 };
        anyhow::ensure!(len <= most, "prefix {text:?}: length {len} is above {most}");
        Ok(Prefix::new(address, len))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_masks_and_counts_in_both_families() {
        let net: Prefix = "fd00:10:244:3::9/64".parse().unwrap();
        assert_eq!(net.to_string(), "fd00:10:244:3::/64");
        assert_eq!(net.gateway().to_string(), "fd00:10:244:3::1");
        assert_eq!(net.lease_key(), "fd00:10:244:3::-64");
        assert!(net.contains(net.host(70_000)) && !net.contains(Ipv4Addr::LOCALHOST));
        let wide: Prefix = "fd00:10:244::/48".parse().unwrap();
        assert_eq!(wide.subnet(64, 3), net);
        assert_eq!(net.as_subnet(), None);
        let four: Prefix = "10.244.0.0/16".parse().unwrap();
        assert_eq!(four.subnet(24, 7).to_string(), "10.244.7.0/24");
        assert_eq!(four.as_subnet(), Some("10.244.0.0/16".parse().unwrap()));
        assert!("fd00::/129".parse::<Prefix>().is_err());
        assert!("10.0.0.0/33".parse::<Prefix>().is_err());
        assert_eq!(Prefix::new(Ipv6Addr::LOCALHOST, 0).to_string(), "::/0");
    }

    #[test]
    fn families_are_listed_in_order() {
        assert_eq!(Families::Dual.list(), Family::ALL);
        assert_eq!(Families::from(Family::V6).list(), [Family::V6]);
        assert!(!Families::default().has(Family::V6));
    }
}
