//! The small checked types at the edge: network identifier, VTEP MAC, MTU and interface index.
//!
//! A value of one of these types is valid by construction. Nothing here guesses: what does not parse is an error
//! that names the value and the range.

use std::fmt;
use std::net::IpAddr;
use std::num::NonZeroU32;
use std::str::FromStr;

use ipnet::IpNet;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use thiserror::Error;

/// What a value of this module was refused for.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum AddrError {
    /// The VXLAN header has 24 bits for the network identifier.
    #[error("VNI {0} is out of range: use a value between 0 and 16777215")]
    VniOutOfRange(u32),
    /// Not six hexadecimal octets.
    #[error(
        "{0:?} is not a MAC address: write six pairs of hexadecimal digits, such as 0a:1b:2c:3d:4e:5f"
    )]
    NotAMac(String),
    /// Below what IPv4 allows, or above what a 16-bit length can hold.
    #[error("MTU {0} is out of range: use a value between {min} and {max}", min = Mtu::MIN, max = Mtu::MAX)]
    MtuOutOfRange(u32),
    /// The kernel counts interfaces from 1 and keeps the index in a signed 32-bit integer.
    #[error("interface index {0} is out of range: use a value between 1 and 2147483647")]
    IfIndexOutOfRange(u32),
}

/// An address family. What an overlay carries and what carries it are always of the same one.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// IPv4.
    #[default]
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both.
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];

    /// The family of an address.
    pub const fn of(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(_) => Self::V4,
            IpAddr::V6(_) => Self::V6,
        }
    }

    /// The family of a subnet.
    pub const fn of_net(subnet: &IpNet) -> Self {
        match subnet {
            IpNet::V4(_) => Self::V4,
            IpNet::V6(_) => Self::V6,
        }
    }

    /// Bits of an address.
    pub const fn bits(self) -> u8 {
        match self {
            Self::V4 => 32,
            Self::V6 => 128,
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        })
    }
}

/// VXLAN network identifier, 0 to 16777215. Zero is legal, and upstream accepts it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct Vni(u32);

impl Vni {
    /// The largest identifier the 24-bit field holds.
    pub const MAX: Vni = Vni(0x00ff_ffff);

    /// What flannel uses when the configuration names none.
    pub const DEFAULT: Vni = Vni(1);

    /// The identifier as a number.
    pub const fn get(self) -> u32 {
        self.0
    }
}

impl TryFrom<u32> for Vni {
    type Error = AddrError;

    fn try_from(value: u32) -> Result<Self, AddrError> {
        if value <= Self::MAX.0 {
            Ok(Self(value))
        } else {
            Err(AddrError::VniOutOfRange(value))
        }
    }
}

impl From<Vni> for u32 {
    fn from(vni: Vni) -> Self {
        vni.0
    }
}

impl fmt::Display for Vni {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// MAC address of a tunnel end point: the destination of inner frames towards that node.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VtepMac([u8; 6]);

impl VtepMac {
    /// Takes six octets as they are, in the order of transmission.
    pub const fn new(octets: [u8; 6]) -> Self {
        Self(octets)
    }

    /// Makes a locally administered unicast address out of six random octets, as upstream does.
    pub const fn from_random(octets: [u8; 6]) -> Self {
        let [first, rest @ ..] = octets;
        let [second, third, fourth, fifth, sixth] = rest;
        let first = (first & 0xfe) | 0x02;
        Self([first, second, third, fourth, fifth, sixth])
    }

    /// The octets in the order of transmission.
    pub const fn octets(self) -> [u8; 6] {
        self.0
    }

    /// Tells whether the group bit is set. Such an address (broadcast included) cannot be a node's own.
    pub const fn is_multicast(self) -> bool {
        let [first, ..] = self.0;
        first & 0x01 != 0
    }

    /// Tells whether the address is `00:00:00:00:00:00`, which no device may carry.
    pub const fn is_zero(self) -> bool {
        matches!(self.0, [0, 0, 0, 0, 0, 0])
    }
}

impl From<[u8; 6]> for VtepMac {
    fn from(octets: [u8; 6]) -> Self {
        Self(octets)
    }
}

impl fmt::Display for VtepMac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [first, rest @ ..] = self.0;
        write!(f, "{first:02x}")?;
        rest.iter().try_for_each(|octet| write!(f, ":{octet:02x}"))
    }
}

impl fmt::Debug for VtepMac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for VtepMac {
    type Err = AddrError;

    /// Reads six pairs of hexadecimal digits, of either case, with `:` between all of them or `-` between all.
    fn from_str(text: &str) -> Result<Self, AddrError> {
        let refused = || AddrError::NotAMac(text.to_owned());
        let separator = if text.contains('-') { '-' } else { ':' };
        let mut octets = [0; 6];
        let mut parts = text.split(separator);
        for octet in &mut octets {
            let part = parts.next().ok_or_else(refused)?;
            let hex = part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit());
            *octet = u8::from_str_radix(part, 16)
                .ok()
                .filter(|_| hex)
                .ok_or_else(refused)?;
        }
        match parts.next() {
            None => Ok(Self(octets)),
            Some(_) => Err(refused()),
        }
    }
}

impl Serialize for VtepMac {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for VtepMac {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(de::Error::custom)
    }
}

/// Maximum size of an IP packet on a device, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct Mtu(u32);

impl Mtu {
    /// The least a device that carries IPv4 may have (RFC 791; the kernel's `ETH_MIN_MTU`).
    pub const MIN: u32 = 68;
    /// The most an IPv4 total length can express (the kernel's `ETH_MAX_MTU`).
    pub const MAX: u32 = 65_535;

    /// The size in bytes.
    pub const fn get(self) -> u32 {
        self.0
    }
}

impl TryFrom<u32> for Mtu {
    type Error = AddrError;

    fn try_from(value: u32) -> Result<Self, AddrError> {
        if (Self::MIN..=Self::MAX).contains(&value) {
            Ok(Self(value))
        } else {
            Err(AddrError::MtuOutOfRange(value))
        }
    }
}

impl From<Mtu> for u32 {
    fn from(mtu: Mtu) -> Self {
        mtu.0
    }
}

impl fmt::Display for Mtu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The kernel's number of a network interface, unique in its network namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct IfIndex(NonZeroU32);

impl IfIndex {
    /// The lowest: the loopback's in every network namespace.
    pub const FIRST: Self = Self(NonZeroU32::MIN);

    /// The index as a number, never zero.
    pub const fn get(self) -> u32 {
        self.0.get()
    }
}

impl TryFrom<u32> for IfIndex {
    type Error = AddrError;

    fn try_from(value: u32) -> Result<Self, AddrError> {
        NonZeroU32::new(value)
            .filter(|_| i32::try_from(value).is_ok())
            .map(Self)
            .ok_or(AddrError::IfIndexOutOfRange(value))
    }
}

impl From<IfIndex> for u32 {
    fn from(index: IfIndex) -> Self {
        index.get()
    }
}

impl fmt::Display for IfIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn vni_takes_24_bits() {
        assert_eq!(Vni::try_from(0).map(Vni::get), Ok(0));
        assert_eq!(Vni::try_from(16_777_215), Ok(Vni::MAX));
        let error = Vni::try_from(16_777_216).unwrap_err();
        assert_eq!(error, AddrError::VniOutOfRange(16_777_216));
        assert_eq!(
            error.to_string(),
            "VNI 16777216 is out of range: use a value between 0 and 16777215"
        );
        assert_eq!(Vni::DEFAULT.to_string(), "1");
    }

    #[test]
    fn mac_reads_either_case_and_writes_lower() {
        for (text, written) in [
            ("d6:ff:5b:61:81:4f", "d6:ff:5b:61:81:4f"),
            ("D6:FF:5B:61:81:4F", "d6:ff:5b:61:81:4f"),
            ("00-15-5D-a0-00-01", "00:15:5d:a0:00:01"),
        ] {
            let mac: VtepMac = text.parse().unwrap();
            assert_eq!(mac.to_string(), written);
            assert_eq!(format!("{mac:?}"), written);
        }
    }

    #[test]
    fn mac_refuses_everything_else() {
        for text in [
            "",
            ":",
            "d6:ff:5b:61:81",
            "d6:ff:5b:61:81:4f:00",
            "d6:ff:5b:61:81:4",
            "d6:ff:5b:61:81:+f",
            "d6:ff:5b:61:81:4g",
            "d6-ff:5b:61:81:4f",
            "d6ff.5b61.814f",
            " d6:ff:5b:61:81:4f",
        ] {
            assert_eq!(
                text.parse::<VtepMac>(),
                Err(AddrError::NotAMac(text.to_owned())),
                "{text:?}"
            );
        }
    }

    #[test]
    fn mac_kinds() {
        let mac = |text: &str| text.parse::<VtepMac>().unwrap();
        assert!(mac("01:00:5e:00:00:01").is_multicast());
        assert!(mac("ff:ff:ff:ff:ff:ff").is_multicast());
        assert!(!mac("02:00:00:00:00:01").is_multicast());
        assert!(mac("00:00:00:00:00:00").is_zero());
        assert!(!mac("00:00:00:00:00:01").is_zero());
        assert_eq!(
            VtepMac::from_random([0xff; 6]).to_string(),
            "fe:ff:ff:ff:ff:ff"
        );
        assert_eq!(
            VtepMac::from_random([0; 6]).to_string(),
            "02:00:00:00:00:00"
        );
    }

    #[test]
    fn mac_is_a_json_string() {
        let mac = VtepMac::new([10, 27, 44, 61, 78, 95]);
        assert_eq!(
            serde_json::to_string(&mac).unwrap(),
            r#""0a:1b:2c:3d:4e:5f""#
        );
        assert_eq!(
            serde_json::from_str::<VtepMac>(r#""0A:1b:2c:3d:4e:5f""#).unwrap(),
            mac
        );
        assert!(serde_json::from_str::<VtepMac>("7").is_err());
        assert!(serde_json::from_str::<VtepMac>(r#""x""#).is_err());
    }

    #[test]
    fn mtu_and_index_bounds() {
        assert_eq!(Mtu::try_from(67), Err(AddrError::MtuOutOfRange(67)));
        assert_eq!(Mtu::try_from(68).map(Mtu::get), Ok(68));
        assert_eq!(Mtu::try_from(65_535).map(Mtu::get), Ok(65_535));
        assert_eq!(
            Mtu::try_from(65_536).unwrap_err().to_string(),
            "MTU 65536 is out of range: use a value between 68 and 65535"
        );
        assert_eq!(IfIndex::try_from(0), Err(AddrError::IfIndexOutOfRange(0)));
        assert_eq!(IfIndex::try_from(1).map(IfIndex::get), Ok(1));
        assert!(IfIndex::try_from(0x8000_0000).is_err());
    }

    #[test]
    fn numbers_are_json_numbers_in_range() {
        assert_eq!(serde_json::to_string(&Vni::DEFAULT).unwrap(), "1");
        assert_eq!(serde_json::from_str::<Vni>("7").unwrap().get(), 7);
        assert_eq!(serde_json::from_str::<Mtu>("1450").unwrap().get(), 1450);
        assert_eq!(serde_json::from_str::<IfIndex>("3").unwrap().get(), 3);
        assert!(serde_json::from_str::<Vni>("16777216").is_err());
        assert!(serde_json::from_str::<Mtu>("0").is_err());
        assert!(serde_json::from_str::<IfIndex>("0").is_err());
    }

    proptest! {
        #[test]
        fn mac_round_trips(octets: [u8; 6]) {
            let mac = VtepMac::new(octets);
            prop_assert_eq!(mac.to_string().parse(), Ok(mac));
            let made = VtepMac::from_random(octets);
            prop_assert!(!made.is_multicast() && !made.is_zero());
        }

        #[test]
        fn mac_never_panics(text in ".*") {
            let _result = text.parse::<VtepMac>();
        }
    }
}
