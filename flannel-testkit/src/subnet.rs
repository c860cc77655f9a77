//! An IPv4 prefix, as pods and leases use it.

use anyhow::Context as _;
use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

/// An IPv4 prefix with the host bits cleared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Subnet {
    base: Ipv4Addr,
    len: u8,
}

impl Subnet {
    /// The prefix of `len` bits that contains `addr`.
    pub fn new(addr: Ipv4Addr, len: u8) -> Subnet {
        assert!(len <= 32, "prefix length {len} of an IPv4 subnet");
        let mask = u32::MAX.checked_shl(32 - u32::from(len)).unwrap_or(0);
        Subnet {
            base: Ipv4Addr::from_bits(addr.to_bits() & mask),
            len,
        }
    }

    /// The first address, flannel's device address.
    pub fn base(self) -> Ipv4Addr {
        self.base
    }

    /// The prefix length in bits.
    pub fn prefix_len(self) -> u8 {
        self.len
    }

    /// The address `n` above the base.
    pub fn host(self, n: u32) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.base.to_bits() + n)
    }

    /// The gateway of the pods: the first host address.
    pub fn gateway(self) -> Ipv4Addr {
        self.host(1)
    }

    /// Whether `addr` lies in the prefix.
    pub fn contains(self, addr: Ipv4Addr) -> bool {
        Subnet::new(addr, self.len) == self
    }

    /// The form of an etcd lease key: `10.244.1.0-24`.
    pub fn lease_key(self) -> String {
        format!("{}-{}", self.base, self.len)
    }
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.base, self.len)
    }
}

impl FromStr for Subnet {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Subnet> {
        let (addr, len) = text
            .split_once('/')
            .with_context(|| format!("subnet {text:?} has no prefix length"))?;
        let addr = addr.parse().with_context(|| format!("subnet {text:?}"))?;
        let len: u8 = len.parse().with_context(|| format!("subnet {text:?}"))?;
        anyhow::ensure!(
            len <= 32,
            "subnet {text:?}: prefix length {len} is above 32"
        );
        Ok(Subnet::new(addr, len))
    }
}

impl From<(Ipv4Addr, u8)> for Subnet {
    fn from((addr, len): (Ipv4Addr, u8)) -> Subnet {
        Subnet::new(addr, len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_subnet_masks_and_counts() {
        let net: Subnet = "10.244.3.9/24".parse().unwrap();
        assert_eq!(net.to_string(), "10.244.3.0/24");
        assert_eq!(net.gateway(), Ipv4Addr::new(10, 244, 3, 1));
        assert_eq!(net.lease_key(), "10.244.3.0-24");
        assert!(net.contains(net.host(255)));
        assert!(!net.contains(Ipv4Addr::new(10, 244, 4, 0)));
        assert_eq!(Subnet::new(Ipv4Addr::BROADCAST, 0).to_string(), "0.0.0.0/0");
        assert!("10.0.0.0".parse::<Subnet>().is_err());
        assert!("10.0.0.0/33".parse::<Subnet>().is_err());
    }
}
