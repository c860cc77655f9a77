//! The network configuration: the `config` key in etcd, or `net-conf.json`.
//!
//! Text in, checked values out. Parsing follows Go's JSON rules, so every file upstream reads is read here; the
//! checks are upstream's, plus the ones whose absence upstream pays for later (ranges, lengths, `Min` above `Max`).
//! What comes out of here needs no further checking and is the same on every node; only [`tunnel_mtu`] depends on
//! the node.

use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use thiserror::Error;

use crate::addr::Family;
use crate::json::{Json, Object};

mod backend;
mod change;
mod mtu;
mod range;

pub use backend::{
    Backend, BackendKind, DEFAULT_PORT, DEFAULT_WIREGUARD_PORT, DEFAULT_WIREGUARD_PORT_V6,
    UnknownKind, VxlanConf, WireguardConf, WireguardMode,
};
pub use change::{Change, change};
pub use mtu::{OVERHEAD_V4, OVERHEAD_V6, OVERHEAD_WIREGUARD, mtu_warnings, tunnel_mtu};
pub(crate) use range::Address;

/// What a configuration was refused for. Each prints as one line with the value and the fix.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ConfigError {
    /// Not JSON.
    #[error(
        "network config is not valid JSON: {reason}: write an object such as {{\"Network\":\"10.244.0.0/16\",\"Backend\":{{\"Type\":\"vxlan\"}}}}"
    )]
    Syntax {
        /// What the parser says, with line and column.
        reason: String,
    },
    /// JSON, but not an object.
    #[error(
        "network config is {kind}: it must be an object such as {{\"Network\":\"10.244.0.0/16\",\"Backend\":{{\"Type\":\"vxlan\"}}}}"
    )]
    NotAnObject {
        /// The kind of value found.
        kind: &'static str,
    },
    /// A key has a value of the wrong JSON type.
    #[error("{key} is {kind} ({value}): write {wanted}")]
    WrongType {
        /// The key, with the object it is in.
        key: &'static str,
        /// The kind of value found.
        kind: &'static str,
        /// The value found.
        value: String,
        /// What belongs there.
        wanted: &'static str,
    },
    /// A key has a value of the right type that cannot be used.
    #[error("{key} is {value}: {fix}")]
    Invalid {
        /// The key, with the object it is in.
        key: &'static str,
        /// The value found.
        value: String,
        /// Why it cannot be used, and what can.
        fix: String,
    },
    /// A key breaks a rule of upstream's, which is told in its words first.
    #[error("{rule}: {key} is {value}{fix}")]
    Rule {
        /// Upstream's words.
        rule: String,
        /// The key.
        key: &'static str,
        /// The value found.
        value: String,
        /// What can be used, after a comma, where that is not plain from the rule.
        fix: String,
    },
    /// A family is enabled and has no network.
    #[error(
        "please define a correct {key} parameter in the flannel config, such as \"{key}\":\"{example}\""
    )]
    MissingNetwork {
        /// `Network` or `IPv6Network`.
        key: &'static str,
        /// A network of that family.
        example: &'static str,
    },
    /// Both families are off.
    #[error(
        "none defined stack: EnableIPv4 and EnableIPv6 are both false, set one of them to true"
    )]
    NoFamily,
    /// A backend of upstream's that does not exist here, or no backend at all. Upstream's words first, as they are in its log.
    #[error(
        "Error fetching backend: unknown backend type: {kind} (supported: {}{instead})",
        backend::supported()
    )]
    UnknownBackend {
        /// The type in lower case; empty when it is missing.
        kind: String,
        /// What to use in its place.
        instead: &'static str,
    },
    /// The uplink leaves no room for the tunnel.
    #[error(
        "MTU {link_mtu} of the uplink is too small for the tunnel: raise it to at least {least}"
    )]
    LinkMtu {
        /// The uplink's MTU, in bytes.
        link_mtu: u32,
        /// The least that works, in bytes.
        least: u32,
    },
}

/// The configuration of the whole overlay network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetConf {
    /// Whether nodes get IPv4 subnets.
    pub enable_ipv4: bool,
    /// Whether nodes get IPv6 subnets.
    pub enable_ipv6: bool,
    /// Whether masquerade and forward rules go to nftables rather than iptables.
    pub enable_nftables: bool,
    /// The IPv4 range, present exactly when IPv4 is enabled.
    pub ipv4: Option<FamilyConf<Ipv4Net, Ipv4Addr>>,
    /// The IPv6 range, present exactly when IPv6 is enabled.
    pub ipv6: Option<FamilyConf<Ipv6Net, Ipv6Addr>>,
    /// How packets travel between nodes.
    pub backend: Backend,
    /// What works but deserves a look, one line each.
    pub warnings: Vec<String>,
}

/// The range one address family takes its node subnets from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FamilyConf<N, A> {
    /// The whole network, without host bits.
    pub network: N,
    /// Prefix length of each node's subnet.
    pub subnet_len: u8,
    /// Base address of the first subnet that may be given out.
    pub min: A,
    /// Base address of the last subnet that may be given out, not below `min`.
    pub max: A,
}

type Given4 = range::Given<Ipv4Net, Ipv4Addr>;
type Given6 = range::Given<Ipv6Net, Ipv6Addr>;

impl NetConf {
    /// Reads and checks a configuration.
    pub fn parse(json: &str) -> Result<NetConf, ConfigError> {
        Self::parse_with(json, range::Given::check, range::Given::check)
    }

    /// Reads a configuration for a cluster that gives out the subnets itself: what it says of their length and range is not looked at
    /// (upstream does not run `CheckNetworkConfig` in Kubernetes mode).
    pub fn parse_assigned(json: &str) -> Result<NetConf, ConfigError> {
        Self::parse_with(json, range::Given::unchecked, range::Given::unchecked)
    }

    fn parse_with(
        json: &str,
        check4: impl FnOnce(Given4) -> Result<FamilyConf<Ipv4Net, Ipv4Addr>, ConfigError>,
        check6: impl FnOnce(Given6) -> Result<FamilyConf<Ipv6Net, Ipv6Addr>, ConfigError>,
    ) -> Result<NetConf, ConfigError> {
        let parsed = Json::parse(json).map_err(|error| ConfigError::Syntax {
            reason: error.to_string(),
        })?;
        let Json::Object(object) = parsed else {
            let kind = parsed.kind();
            return Err(ConfigError::NotAnObject { kind });
        };
        let flag = |key, default| boolean(&object, key, key, default);
        let enable_ipv4 = flag("EnableIPv4", true)?;
        let enable_ipv6 = flag("EnableIPv6", false)?;
        let enable_nftables = flag("EnableNFTables", false)?;
        let range4 = Given4::read(&object)?;
        let range6 = Given6::read(&object)?;
        if !enable_ipv4 && !enable_ipv6 {
            return Err(ConfigError::NoFamily);
        }
        let mut warnings = Vec::new();
        let backend = backend::read(&object, enable_ipv4, enable_ipv6, &mut warnings)?;
        Ok(NetConf {
            enable_ipv4,
            enable_ipv6,
            enable_nftables,
            ipv4: enable_ipv4.then(|| check4(range4)).transpose()?,
            ipv6: enable_ipv6.then(|| check6(range6)).transpose()?,
            backend,
            warnings,
        })
    }
}

impl NetConf {
    /// The families that nodes get subnets of, IPv4 first.
    pub fn families(&self) -> Vec<Family> {
        let enabled = [
            (self.enable_ipv4, Family::V4),
            (self.enable_ipv6, Family::V6),
        ];
        let enabled = enabled.into_iter().filter(|(enabled, _)| *enabled);
        enabled.map(|(_, family)| family).collect()
    }

    /// The network of a family, and the prefix length of each node's subnet; `None` while it is not enabled.
    pub fn range(&self, family: Family) -> Option<(IpNet, u8)> {
        match family {
            Family::V4 => self.ipv4.map(|conf| (conf.network.into(), conf.subnet_len)),
            Family::V6 => self.ipv6.map(|conf| (conf.network.into(), conf.subnet_len)),
        }
    }

    /// Upstream's log lines about a configuration (upstream: main.go, pkg/backend/vxlan).
    pub fn announcement(&self) -> Vec<String> {
        let backend = &self.backend;
        let mut lines = vec![format!(
            "Found network config - Backend type: {}",
            backend.type_as_written
        )];
        if backend.kind == BackendKind::Vxlan {
            let vxlan = &backend.vxlan;
            lines.push(format!(
                "VXLAN config: VNI={} Port={} GBP={} Learning={} DirectRouting={}",
                vxlan.vni, vxlan.port_as_written, vxlan.gbp, vxlan.learning, vxlan.direct_routing
            ));
        }
        lines
    }
}

fn boolean(
    object: &Object,
    name: &str,
    key: &'static str,
    default: bool,
) -> Result<bool, ConfigError> {
    match object.get(name) {
        None => Ok(default),
        Some(Json::Bool(value)) => Ok(*value),
        Some(other) => Err(wrong_type(key, other, "true or false")),
    }
}

fn string<'a>(
    object: &'a Object,
    name: &str,
    key: &'static str,
    wanted: &'static str,
) -> Result<Option<&'a str>, ConfigError> {
    match object.get(name) {
        None => Ok(None),
        Some(Json::String(text)) => Ok(Some(text)),
        Some(other) => Err(wrong_type(key, other, wanted)),
    }
}

fn integer(
    object: &Object,
    name: &str,
    key: &'static str,
    max: u64,
) -> Result<Option<u64>, ConfigError> {
    let value = match object.get(name) {
        None => return Ok(None),
        Some(Json::Unsigned(value)) if *value <= max => return Ok(Some(*value)),
        Some(Json::Unsigned(value)) => value.to_string(),
        Some(Json::Negative(value)) => value.to_string(),
        Some(other) => return Err(wrong_type(key, other, "a whole number without quotes")),
    };
    let fix = format!("use a value between 0 and {max}");
    Err(ConfigError::Invalid { key, value, fix })
}

fn wrong_type(key: &'static str, found: &Json, wanted: &'static str) -> ConfigError {
    ConfigError::WrongType {
        key,
        kind: found.kind(),
        value: found.to_string(),
        wanted,
    }
}

#[cfg(test)]
mod tests;
