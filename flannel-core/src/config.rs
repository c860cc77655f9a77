//! The network configuration: the `config` key in etcd, or `net-conf.json`.
//!
//! Text in, checked values out. Parsing follows Go's JSON rules, so every file upstream reads is read here; the
//! checks are upstream's, plus the ones whose absence upstream pays for later (ranges, lengths, `Min` above `Max`).
//! What comes out of here needs no further checking and is the same on every node; only [`tunnel_mtu`] depends on
//! the node.

use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{Ipv4Net, Ipv6Net};
use thiserror::Error;

use crate::addr::Vni;
use crate::fastpath::Choice;
use crate::json::{Json, Object};
use crate::lease::VXLAN;
use crate::mark;

mod change;
mod mtu;
mod range;

pub use change::{Change, change};
pub use mtu::{OVERHEAD_V4, OVERHEAD_V6, mtu_warnings, tunnel_mtu};
pub(crate) use range::Address;

/// UDP port of flannel's VXLAN where the configuration names none: the kernel's own default, not IANA's 4789.
pub const DEFAULT_PORT: u16 = 8472;

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
    /// A backend of upstream's that does not exist here, or no backend at all.
    #[error(
        "unknown backend type: {kind}: only \"vxlan\" is supported, set Backend.Type to \"vxlan\""
    )]
    UnknownBackend {
        /// The type as written; `""` when it is missing.
        kind: String,
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

/// The `Backend` object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backend {
    /// The type in lower case: always `vxlan`.
    pub kind: String,
    /// The type as written, for the log.
    pub type_as_written: String,
    /// The settings of the vxlan backend.
    pub vxlan: VxlanConf,
    /// What is wanted of the fast path, where the configuration says: a key that upstream does not know and passes over.
    pub fast_path: Option<Choice>,
}

/// The settings of the vxlan backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VxlanConf {
    /// Network identifier, also in the device name.
    pub vni: Vni,
    /// UDP port of the tunnel.
    pub port: u16,
    /// The port as configured, 0 for the default: for the log.
    pub port_as_written: u16,
    /// MTU of the underlay in bytes, where it is not to be taken from the uplink. The tunnel's is less.
    pub mtu: Option<u32>,
    /// Whether the device carries the group policy extension.
    pub gbp: bool,
    /// Whether the device learns MAC addresses from traffic.
    pub learning: bool,
    /// Whether peers on the same link are reached by plain routes.
    pub direct_routing: bool,
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
        let enable_ipv4 = boolean(&object, "EnableIPv4", true)?;
        let enable_ipv6 = boolean(&object, "EnableIPv6", false)?;
        let enable_nftables = boolean(&object, "EnableNFTables", false)?;
        let range4 = Given4::read(&object)?;
        let range6 = Given6::read(&object)?;
        if !enable_ipv4 && !enable_ipv6 {
            return Err(ConfigError::NoFamily);
        }
        let mut warnings = Vec::new();
        let backend = backend(&object, &mut warnings)?;
        check_device_names(backend.vxlan.vni, enable_ipv4, enable_ipv6)?;
        mtu::check_explicit(backend.vxlan.mtu, enable_ipv6)?;
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
    /// Upstream's log lines about a configuration (upstream: main.go, pkg/backend/vxlan).
    pub fn announcement(&self) -> [String; 2] {
        let vxlan = &self.backend.vxlan;
        [
            format!(
                "Found network config - Backend type: {}",
                self.backend.type_as_written
            ),
            format!(
                "VXLAN config: VNI={} Port={} GBP={} Learning={} DirectRouting={}",
                vxlan.vni, vxlan.port_as_written, vxlan.gbp, vxlan.learning, vxlan.direct_routing
            ),
        ]
    }
}

fn backend(object: &Object, warnings: &mut Vec<String>) -> Result<Backend, ConfigError> {
    let empty = Object::default();
    let (settings, type_as_written) = match object.get("Backend") {
        None => {
            warnings.push(
                "Backend is missing from the network config: using vxlan, where upstream flannel would use udp; \
                 add \"Backend\":{\"Type\":\"vxlan\"}"
                    .to_owned(),
            );
            (&empty, VXLAN.to_owned())
        }
        Some(Json::Object(settings)) => {
            let wanted = "a string, \"vxlan\"";
            let kind = string(settings, "Type", "Backend.Type", wanted)?;
            (settings, kind.unwrap_or_default().to_owned())
        }
        Some(other) => {
            return Err(wrong_type(
                "Backend",
                other,
                "an object such as {\"Type\":\"vxlan\"}",
            ));
        }
    };
    let kind = type_as_written.to_lowercase();
    if kind != VXLAN {
        let kind = if kind.is_empty() {
            "\"\"".to_owned()
        } else {
            type_as_written.escape_debug().to_string()
        };
        return Err(ConfigError::UnknownBackend { kind });
    }
    let vxlan = vxlan(settings)?;
    Ok(Backend {
        kind,
        type_as_written,
        vxlan,
        fast_path: fast_path(settings)?,
    })
}

fn fast_path(settings: &Object) -> Result<Option<Choice>, ConfigError> {
    const KEY: &str = "Backend.BpfFastPath";
    let wanted = "one of the strings \"auto\", \"off\", \"established\" and \"syn\"";
    string(settings, "BpfFastPath", KEY, wanted)?
        .map(|text| {
            text.parse().map_err(|_unknown| ConfigError::Invalid {
                key: KEY,
                value: format!("{text:?}"),
                fix: format!("use {wanted}"),
            })
        })
        .transpose()
}

fn vxlan(settings: &Object) -> Result<VxlanConf, ConfigError> {
    let vni = integer(settings, "VNI", "Backend.VNI", u64::from(Vni::MAX.get()))?;
    let vni = match vni {
        Some(value) => u32::try_from(value)
            .ok()
            .and_then(|vni| Vni::try_from(vni).ok()),
        None => Some(Vni::DEFAULT),
    };
    let port = integer(settings, "Port", "Backend.Port", u64::from(u16::MAX))?;
    let port = port
        .and_then(|port| u16::try_from(port).ok())
        .unwrap_or_default();
    let mtu = integer(settings, "MTU", "Backend.MTU", mtu::MAX_EXPLICIT.into())?;
    let flag = |name, key| match settings.get(name) {
        None => Ok(false),
        Some(Json::Bool(value)) => Ok(*value),
        Some(other) => Err(wrong_type(key, other, "true or false")),
    };
    Ok(VxlanConf {
        vni: vni.unwrap_or(Vni::MAX),
        port: if port == 0 { DEFAULT_PORT } else { port },
        port_as_written: port,
        mtu: mtu
            .and_then(|mtu| u32::try_from(mtu).ok())
            .filter(|mtu| *mtu != 0),
        gbp: flag("GBP", "Backend.GBP")?,
        learning: flag("Learning", "Backend.Learning")?,
        direct_routing: flag("DirectRouting", "Backend.DirectRouting")?,
    })
}

/// The kernel refuses a device whose name is too long, long after the configuration was accepted everywhere.
fn check_device_names(vni: Vni, ipv4: bool, ipv6: bool) -> Result<(), ConfigError> {
    let names = [
        ipv4.then(|| (mark::device_name(vni), 9_999_999)),
        ipv6.then(|| (mark::device_v6_name(vni), 9_999)),
    ];
    for (name, most) in names.into_iter().flatten() {
        mark::check_name(&name).map_err(|_| ConfigError::Invalid {
            key: "Backend.VNI",
            value: vni.to_string(),
            fix: format!(
                "device name {name} would have more than 15 characters, use at most {most}"
            ),
        })?;
    }
    Ok(())
}

fn boolean(object: &Object, key: &'static str, default: bool) -> Result<bool, ConfigError> {
    match object.get(key) {
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
