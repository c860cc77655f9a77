//! Leases as they are stored: the name of the key and the JSON of the value, byte for byte as upstream writes them.
//!
//! Reading is tolerant, because other releases wrote other fields; writing is exact, because upstream nodes and
//! older tools read what we write. Nothing here masks or repairs an address: a key that is not in the form we would
//! write is refused, since two keys for one subnet would shadow each other.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use thiserror::Error;

use crate::addr::{Family, VtepMac};
use crate::json::{Json, Object};

mod data;

pub use data::{BackendData, VxlanData, WireguardData};

/// The backend type of a lease with VXLAN tunnel data.
pub const VXLAN: &str = "vxlan";

/// What a stored lease was refused for.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum LeaseError {
    /// The last segment of the key does not look like a subnet at all.
    #[error("{key:?} is not a subnet key: keys look like 10.5.1.0-24 or 10.5.1.0-24&fd00::-64")]
    NotAKey {
        /// The text as stored.
        key: String,
    },
    /// An address or a prefix length inside the key does not parse.
    #[error("subnet key {key:?} has the invalid {part} {value:?}")]
    BadKeyPart {
        /// The text as stored.
        key: String,
        /// Which part of it.
        part: &'static str,
        /// The part as stored.
        value: String,
    },
    /// The key names a subnet in a form that nobody writes.
    #[error(
        "subnet key {key:?} is not in canonical form: write {canonical:?} (no bits after the prefix, shortest IPv6)"
    )]
    NotCanonical {
        /// The text as stored.
        key: String,
        /// What it would have to be.
        canonical: String,
    },
    /// The value is not JSON, or not an object.
    #[error("lease value is not a JSON object: {reason}")]
    NotAnObject {
        /// What the parser says, with line and column.
        reason: String,
    },
    /// A member of the value has a type or content it must not have.
    #[error("lease value has the invalid {field} {value}: it must be {wanted}")]
    BadField {
        /// Name of the member, with the object it is in.
        field: String,
        /// The value found, in JSON.
        value: String,
        /// What belongs there.
        wanted: &'static str,
    },
}

/// Names a lease: the subnets of one node. Prints as the last segment of the key in etcd.
///
/// Both parts `None` names nothing; [`FromStr`] never makes such a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SubnetKey {
    /// The IPv4 subnet, without host bits. `None` on a node that has IPv6 only (stored as `0.0.0.0-0`).
    pub v4: Option<Ipv4Net>,
    /// The IPv6 subnet, without host bits.
    pub v6: Option<Ipv6Net>,
}

impl SubnetKey {
    /// Names the lease of an IPv4-only node.
    pub fn from_v4(subnet: Ipv4Net) -> Self {
        Self {
            v4: Some(subnet.trunc()),
            v6: None,
        }
    }

    /// The subnet of one family.
    pub fn subnet(&self, family: Family) -> Option<IpNet> {
        match family {
            Family::V4 => self.v4.map(IpNet::V4),
            Family::V6 => self.v6.map(IpNet::V6),
        }
    }
}

impl From<Ipv4Net> for SubnetKey {
    fn from(subnet: Ipv4Net) -> Self {
        Self::from_v4(subnet)
    }
}

impl From<IpNet> for SubnetKey {
    /// Names the lease of a node of one family.
    fn from(subnet: IpNet) -> Self {
        match subnet {
            IpNet::V4(subnet) => subnet.into(),
            IpNet::V6(subnet) => Self {
                v4: None,
                v6: Some(subnet.trunc()),
            },
        }
    }
}

impl fmt::Display for SubnetKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let v4 = self.v4.unwrap_or_default();
        write!(f, "{}-{}", v4.addr(), v4.prefix_len())?;
        match self.v6 {
            Some(v6) => write!(f, "&{}-{}", v6.addr(), v6.prefix_len()),
            None => Ok(()),
        }
    }
}

impl FromStr for SubnetKey {
    type Err = LeaseError;

    /// Reads the last segment of a key. Upstream's pattern, anchored at both ends and with real dots.
    fn from_str(key: &str) -> Result<Self, LeaseError> {
        let (text4, text6) = match key.split_once('&') {
            Some((text4, text6)) => (text4, Some(text6)),
            None => (key, None),
        };
        let v4 = parse_v4(key, text4)?;
        let v6 = text6.map(|text| parse_v6(key, text)).transpose()?;
        let none4 = v4.addr().is_unspecified() && v4.prefix_len() == 0;
        if none4 && v6.is_none() {
            let key = key.to_owned();
            return Err(LeaseError::NotAKey { key });
        }
        let canonical = Self {
            v4: (!none4).then(|| v4.trunc()),
            v6: v6.map(|net| net.trunc()),
        };
        let written = canonical.to_string();
        if written == key {
            Ok(canonical)
        } else {
            Err(LeaseError::NotCanonical {
                key: key.to_owned(),
                canonical: written,
            })
        }
    }
}

fn parse_v4(key: &str, text: &str) -> Result<Ipv4Net, LeaseError> {
    let shaped = |c: char| c.is_ascii_digit() || c == '.';
    let (addr, len) = split_prefix(key, text, shaped)?;
    let ip: Ipv4Addr = addr
        .parse()
        .map_err(|_| bad_part(key, "IPv4 address", addr))?;
    // Upstream has five bits for the length, so /32 is not a lease.
    let refused = || bad_part(key, "IPv4 prefix length", len);
    let len: u8 = len
        .parse()
        .ok()
        .filter(|len| *len < 32)
        .ok_or_else(refused)?;
    Ipv4Net::new(ip, len).map_err(|_| refused())
}

fn parse_v6(key: &str, text: &str) -> Result<Ipv6Net, LeaseError> {
    let shaped = |c: char| c.is_ascii_digit() || ('a'..='f').contains(&c) || c == ':';
    let (addr, len) = split_prefix(key, text, shaped)?;
    let ip: Ipv6Addr = addr
        .parse()
        .map_err(|_| bad_part(key, "IPv6 address", addr))?;
    let refused = || bad_part(key, "IPv6 prefix length", len);
    let len: u8 = len
        .parse()
        .ok()
        .filter(|len| *len < 128)
        .ok_or_else(refused)?;
    Ipv6Net::new(ip, len).map_err(|_| refused())
}

/// Splits `<address>-<digits>`, holding each half to its alphabet.
fn split_prefix<'a>(
    key: &str,
    text: &'a str,
    shaped: impl Fn(char) -> bool,
) -> Result<(&'a str, &'a str), LeaseError> {
    text.split_once('-')
        .filter(|(addr, _)| !addr.is_empty() && addr.chars().all(shaped))
        .filter(|(_, len)| !len.is_empty() && len.bytes().all(|b| b.is_ascii_digit()))
        .ok_or_else(|| LeaseError::NotAKey {
            key: key.to_owned(),
        })
}

fn bad_part(key: &str, part: &'static str, value: &str) -> LeaseError {
    LeaseError::BadKeyPart {
        key: key.to_owned(),
        part,
        value: value.to_owned(),
    }
}

/// The value of a lease: who holds the subnet and how to reach it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LeaseAttrs {
    /// Address that other nodes send IPv4 tunnel packets to. `None` is stored as `0.0.0.0`.
    pub public_ip: Option<Ipv4Addr>,
    /// Address that other nodes send IPv6 tunnel packets to.
    pub public_ipv6: Option<Ipv6Addr>,
    /// `vxlan`, `host-gw`, …; empty for backends that store none.
    pub backend_type: String,
    /// What the backend needs of this node for IPv4. Read only when the backend is one of ours, and of its kind then.
    pub v4: Option<BackendData>,
    /// The same for IPv6.
    pub v6: Option<BackendData>,
}

impl LeaseAttrs {
    /// Describes an IPv4 VXLAN node.
    pub fn vxlan_v4(public_ip: Ipv4Addr, vni: u32, mac: VtepMac) -> Self {
        Self {
            public_ip: Some(public_ip),
            backend_type: VXLAN.to_owned(),
            v4: Some(VxlanData { vni, mac }.into()),
            ..Self::default()
        }
    }

    /// The address that other nodes send packets of one family to.
    pub fn address(&self, family: Family) -> Option<IpAddr> {
        match family {
            Family::V4 => self.public_ip.map(IpAddr::V4),
            Family::V6 => self.public_ipv6.map(IpAddr::V6),
        }
    }

    /// What the backend needs of this node for one family.
    pub fn data(&self, family: Family) -> Option<BackendData> {
        match family {
            Family::V4 => self.v4,
            Family::V6 => self.v6,
        }
    }

    /// The VXLAN tunnel end point of one family.
    pub fn vxlan(&self, family: Family) -> Option<VxlanData> {
        match self.data(family)? {
            BackendData::Vxlan(data) => Some(data),
            BackendData::Wireguard(_) => None,
        }
    }

    /// The address that other nodes send to, of a family.
    pub fn public(&self, family: Family) -> Option<IpAddr> {
        match family {
            Family::V4 => self.public_ip.map(IpAddr::V4),
            Family::V6 => self.public_ipv6.map(IpAddr::V6),
        }
    }

    /// The WireGuard device of one family.
    pub fn wireguard(&self, family: Family) -> Option<WireguardData> {
        match self.data(family)? {
            BackendData::Wireguard(data) => Some(data),
            BackendData::Vxlan(_) => None,
        }
    }

    /// Writes the value byte for byte as upstream does: Go's field order, compact, `PublicIPv6` null when absent.
    pub fn to_json(&self) -> String {
        let public_ip = self.public_ip.unwrap_or(Ipv4Addr::UNSPECIFIED);
        let public_ipv6 = match self.public_ipv6 {
            Some(ip) => format!(r#""{ip}""#),
            None => "null".to_owned(),
        };
        let kind = match self.backend_type.as_str() {
            "" => String::new(),
            kind => format!(r#","BackendType":{}"#, go_string(kind)),
        };
        let data = |name: &str, data: Option<BackendData>| match data {
            Some(data) => format!(r#","{name}":{data}"#),
            None => String::new(),
        };
        let v4 = data("BackendData", self.v4);
        let v6 = data("BackendV6Data", self.v6);
        format!(r#"{{"PublicIP":"{public_ip}","PublicIPv6":{public_ipv6}{kind}{v4}{v6}}}"#)
    }

    /// Reads a value of any release. Unknown members are ignored; tunnel data of other backends is left out.
    pub fn from_json(text: &str) -> Result<Self, LeaseError> {
        let parsed = Json::parse(text).map_err(|error| LeaseError::NotAnObject {
            reason: error.to_string(),
        })?;
        let Json::Object(object) = parsed else {
            let reason = format!("it is {}", parsed.kind());
            return Err(LeaseError::NotAnObject { reason });
        };
        let public_ip: Option<Ipv4Addr> = parse_member(&object, "PublicIP", "an IPv4 address")?;
        let backend_type = match object.get("BackendType") {
            None => String::new(),
            Some(Json::String(text)) => text.clone(),
            Some(other) => return Err(bad_field("BackendType", other, "a string")),
        };
        let data = |member| match object.get(member) {
            Some(value) => BackendData::read(&backend_type, value, member),
            None => Ok(None),
        };
        Ok(Self {
            public_ip: public_ip.filter(|ip| !ip.is_unspecified()),
            public_ipv6: parse_member(&object, "PublicIPv6", "an IPv6 address or null")?,
            v4: data("BackendData")?,
            v6: data("BackendV6Data")?,
            backend_type,
        })
    }
}

/// A subnet and who holds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease {
    /// The subnets.
    pub key: SubnetKey,
    /// The holder.
    pub attrs: LeaseAttrs,
}

fn parse_member<T: FromStr>(
    object: &Object,
    member: &str,
    wanted: &'static str,
) -> Result<Option<T>, LeaseError> {
    let Some(value) = object.get(member) else {
        return Ok(None);
    };
    let parsed = match value {
        Json::String(text) => text.parse().ok(),
        _ => None,
    };
    match parsed {
        Some(value) => Ok(Some(value)),
        None => Err(bad_field(member, value, wanted)),
    }
}

fn bad_field(field: &str, value: &Json, wanted: &'static str) -> LeaseError {
    LeaseError::BadField {
        field: field.to_owned(),
        value: value.to_string(),
        wanted,
    }
}

/// Quotes a string as Go's encoder does, which escapes what is special in HTML too.
fn go_string(text: &str) -> String {
    let mut out = String::from('"');
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            '\0'..='\x1f' | '<' | '>' | '&' | '\u{2028}' | '\u{2029}' => {
                out.extend(format!("\\u{:04x}", u32::from(c)).chars());
            }
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

#[cfg(test)]
mod tests;
