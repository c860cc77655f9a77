//! The `Backend` object: how packets travel between nodes, and the settings of each way.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{ConfigError, boolean, integer, mtu, string, wrong_type};
use crate::addr::{Family, Vni};
use crate::fastpath::Choice;
use crate::json::{Json, Object};
use crate::key::SecretKey;
use crate::mark;

/// UDP port of flannel's VXLAN where the configuration names none: the kernel's own default, not IANA's 4789.
pub const DEFAULT_PORT: u16 = 8472;

/// UDP port of the WireGuard device for IPv4, or for both families, where the configuration names none.
pub const DEFAULT_WIREGUARD_PORT: u16 = 51_820;

/// UDP port of the WireGuard device for IPv6 where the configuration names none.
pub const DEFAULT_WIREGUARD_PORT_V6: u16 = 51_821;

/// How packets travel between nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BackendKind {
    /// In VXLAN.
    Vxlan,
    /// As they are, by a route over the peer's address.
    HostGw,
    /// Encrypted, through the kernel's WireGuard.
    Wireguard,
    /// Not at all: somebody else routes, only subnets are given out.
    Alloc,
}

impl BackendKind {
    /// All of them, the default first.
    pub const ALL: [Self; 4] = [Self::Vxlan, Self::HostGw, Self::Wireguard, Self::Alloc];

    /// The name in the configuration.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Vxlan => "vxlan",
            Self::HostGw => "host-gw",
            Self::Wireguard => "wireguard",
            Self::Alloc => "alloc",
        }
    }

    /// The backend type in leases: upstream's `alloc` stores none.
    pub const fn lease_type(self) -> &'static str {
        match self {
            Self::Vxlan | Self::HostGw | Self::Wireguard => self.as_str(),
            Self::Alloc => "",
        }
    }

    /// Whether eBPF carries traffic of this backend.
    pub const fn has_fast_path(self) -> bool {
        match self {
            Self::Vxlan | Self::HostGw => true,
            Self::Wireguard | Self::Alloc => false,
        }
    }
}

impl fmt::Display for BackendKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Not the name of a backend that exists here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnknownKind;

impl FromStr for BackendKind {
    type Err = UnknownKind;

    /// Upstream lower-cases the name before it looks it up.
    fn from_str(text: &str) -> Result<Self, UnknownKind> {
        let name = text.to_lowercase();
        let known = Self::ALL.into_iter().find(|kind| kind.as_str() == name);
        known.ok_or(UnknownKind)
    }
}

/// The `Backend` object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backend {
    /// Which one.
    pub kind: BackendKind,
    /// The type as written, for the log.
    pub type_as_written: String,
    /// The settings of the vxlan backend; the defaults where it is another one.
    pub vxlan: VxlanConf,
    /// The settings of the wireguard backend; the defaults where it is another one.
    pub wireguard: WireguardConf,
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

impl Default for VxlanConf {
    fn default() -> Self {
        Self {
            vni: Vni::DEFAULT,
            port: DEFAULT_PORT,
            port_as_written: 0,
            mtu: None,
            gbp: false,
            learning: false,
            direct_routing: false,
        }
    }
}

/// The settings of the wireguard backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WireguardConf {
    /// UDP port of the device for IPv4, or of the only one.
    pub port: u16,
    /// UDP port of the device for IPv6, where that is one of its own.
    pub port_v6: u16,
    /// A key that all nodes share beside those of each pair.
    pub psk: Option<SecretKey>,
    /// Seconds between packets to a peer with which there is no traffic; 0 for none.
    pub keepalive: u16,
    /// Which devices there are, and over which family they reach peers.
    pub mode: WireguardMode,
    /// MTU of the underlay in bytes, where it is not to be taken from the uplink. The tunnel's is less.
    pub mtu: Option<u32>,
}

impl Default for WireguardConf {
    fn default() -> Self {
        Self {
            port: DEFAULT_WIREGUARD_PORT,
            port_v6: DEFAULT_WIREGUARD_PORT_V6,
            psk: None,
            keepalive: 0,
            mode: WireguardMode::Separate,
            mtu: None,
        }
    }
}

/// Which WireGuard devices there are, and over which family they reach peers (upstream: pkg/backend/wireguard).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum WireguardMode {
    /// One device for each family, which reaches peers over that family.
    Separate,
    /// One device for both families, which chooses for each peer.
    Auto,
    /// One device for both families, over IPv4.
    Ipv4,
    /// One device for both families, over IPv6.
    Ipv6,
}

impl WireguardMode {
    /// All of them, the default first.
    pub const ALL: [Self; 4] = [Self::Separate, Self::Auto, Self::Ipv4, Self::Ipv6];

    /// The name in the configuration.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Separate => "separate",
            Self::Auto => "auto",
            Self::Ipv4 => "ipv4",
            Self::Ipv6 => "ipv6",
        }
    }

    /// The family that peers are always reached over, of a device that carries both.
    const fn only(self) -> Option<Family> {
        match self {
            Self::Separate | Self::Auto => None,
            Self::Ipv4 => Some(Family::V4),
            Self::Ipv6 => Some(Family::V6),
        }
    }
}

impl fmt::Display for WireguardMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Reads the object, for a network of these families. Only the keys of the backend that is named are looked at, as upstream does.
pub(super) fn read(
    object: &Object,
    ipv4: bool,
    ipv6: bool,
    warnings: &mut Vec<String>,
) -> Result<Backend, ConfigError> {
    let empty = Object::default();
    let (settings, type_as_written) = match object.get("Backend") {
        None => {
            warnings.push(
                "Backend is missing from the network config: using vxlan, where upstream flannel would use udp; \
                 add \"Backend\":{\"Type\":\"vxlan\"}"
                    .to_owned(),
            );
            (&empty, BackendKind::Vxlan.as_str().to_owned())
        }
        Some(Json::Object(settings)) => {
            let wanted = "a string, such as \"vxlan\"";
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
    let kind: BackendKind = type_as_written
        .parse()
        .map_err(|UnknownKind| unknown(&type_as_written))?;
    let mut backend = Backend {
        kind,
        type_as_written,
        vxlan: VxlanConf::default(),
        wireguard: WireguardConf::default(),
        fast_path: fast_path(settings)?,
    };
    match kind {
        BackendKind::Vxlan => {
            backend.vxlan = vxlan(settings)?;
            check_device_names(backend.vxlan.vni, ipv4, ipv6)?;
            mtu::check_explicit(backend.vxlan.mtu, mtu::vxlan_overhead(ipv6))?;
        }
        BackendKind::Wireguard => {
            backend.wireguard = wireguard(settings)?;
            check_wireguard(&backend.wireguard, ipv4, ipv6)?;
            mtu::check_explicit(backend.wireguard.mtu, mtu::OVERHEAD_WIREGUARD)?;
        }
        BackendKind::HostGw | BackendKind::Alloc => {}
    }
    if backend.fast_path.is_some() && !kind.has_fast_path() {
        warnings.push(format!(
            "Backend.BpfFastPath is set, but no eBPF program carries traffic of backend {kind}: it has no effect, remove it"
        ));
    }
    Ok(backend)
}

/// Upstream's name for a type that exists nowhere, and what to do about one that exists only there.
fn unknown(type_as_written: &str) -> ConfigError {
    let kind = type_as_written.to_lowercase();
    let instead = match kind.as_str() {
        "udp" | "ipip" => "; \"vxlan\" takes its place on every network",
        "ipsec" => "; \"wireguard\" takes its place",
        "tencent-vpc" => "; \"alloc\" leaves the routes to the cloud's own controller",
        "extension" => "; commands from the network config are not run",
        "" => "; set Backend.Type",
        _ => "",
    };
    ConfigError::UnknownBackend {
        kind: kind.escape_debug().to_string(),
        instead,
    }
}

/// Names of the backends that exist here, in quotes, for messages.
pub(super) fn supported() -> String {
    BackendKind::ALL
        .map(|kind| format!("\"{kind}\""))
        .join(", ")
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
    let most = mtu::max_explicit(mtu::OVERHEAD_V4);
    Ok(VxlanConf {
        vni: vni.unwrap_or(Vni::MAX),
        port: if port == 0 { DEFAULT_PORT } else { port },
        port_as_written: port,
        mtu: explicit_mtu(settings, most)?,
        gbp: boolean(settings, "GBP", "Backend.GBP", false)?,
        learning: boolean(settings, "Learning", "Backend.Learning", false)?,
        direct_routing: boolean(settings, "DirectRouting", "Backend.DirectRouting", false)?,
    })
}

fn explicit_mtu(settings: &Object, most: u32) -> Result<Option<u32>, ConfigError> {
    let mtu = integer(settings, "MTU", "Backend.MTU", most.into())?;
    Ok(mtu
        .and_then(|mtu| u32::try_from(mtu).ok())
        .filter(|mtu| *mtu != 0))
}

fn wireguard(settings: &Object) -> Result<WireguardConf, ConfigError> {
    let default = WireguardConf::default();
    let number = |name, key| -> Result<Option<u16>, ConfigError> {
        let value = integer(settings, name, key, u64::from(u16::MAX))?;
        Ok(value.and_then(|value| u16::try_from(value).ok()))
    };
    let port = |name, key, default| match number(name, key)? {
        // The kernel would take any free one, which other nodes do not know.
        Some(0) => Err(ConfigError::Invalid {
            key,
            value: "0".to_owned(),
            fix: format!("use a value between 1 and {}", u16::MAX),
        }),
        given => Ok(given.unwrap_or(default)),
    };
    let keepalive = number(
        "PersistentKeepaliveInterval",
        "Backend.PersistentKeepaliveInterval",
    )?;
    Ok(WireguardConf {
        port: port("ListenPort", "Backend.ListenPort", default.port)?,
        port_v6: port("ListenPortV6", "Backend.ListenPortV6", default.port_v6)?,
        psk: psk(settings)?,
        keepalive: keepalive.unwrap_or(default.keepalive),
        mode: mode(settings)?.unwrap_or(default.mode),
        mtu: explicit_mtu(settings, mtu::max_explicit(mtu::OVERHEAD_WIREGUARD))?,
    })
}

/// What is wrong with it is told without the value: it is a secret.
fn psk(settings: &Object) -> Result<Option<SecretKey>, ConfigError> {
    let refused = |value: &str| ConfigError::Invalid {
        key: "Backend.PSK",
        value: value.to_owned(),
        fix: "write 32 bytes in base64, such as \"wg genpsk\" prints".to_owned(),
    };
    match settings.get("PSK") {
        None => Ok(None),
        Some(Json::String(text)) if text.is_empty() => Ok(None),
        Some(Json::String(text)) => match text.parse() {
            Ok(key) => Ok(Some(key)),
            Err(_not_a_key) => Err(refused("not a key")),
        },
        Some(other) => Err(refused(other.kind())),
    }
}

fn mode(settings: &Object) -> Result<Option<WireguardMode>, ConfigError> {
    const KEY: &str = "Backend.Mode";
    let wanted = "one of the strings \"separate\", \"auto\", \"ipv4\" and \"ipv6\"";
    let Some(text) = string(settings, "Mode", KEY, wanted)? else {
        return Ok(None);
    };
    let known = WireguardMode::ALL
        .into_iter()
        .find(|mode| mode.as_str() == text);
    known.map(Some).ok_or_else(|| ConfigError::Rule {
        rule: "no valid Mode configured".to_owned(),
        key: KEY,
        value: format!("{text:?}"),
        fix: format!(", use {wanted}"),
    })
}

fn check_wireguard(conf: &WireguardConf, ipv4: bool, ipv6: bool) -> Result<(), ConfigError> {
    let off = match conf.mode.only() {
        Some(Family::V4) if !ipv4 => Some("EnableIPv4"),
        Some(Family::V6) if !ipv6 => Some("EnableIPv6"),
        _ => None,
    };
    if let Some(off) = off {
        return Err(ConfigError::Invalid {
            key: "Backend.Mode",
            value: format!("\"{}\"", conf.mode),
            fix: format!("nodes have no addresses of that family while {off} is false"),
        });
    }
    if ipv4 && ipv6 && conf.mode == WireguardMode::Separate && conf.port == conf.port_v6 {
        return Err(ConfigError::Invalid {
            key: "Backend.ListenPortV6",
            value: conf.port_v6.to_string(),
            fix:
                "both devices listen on all addresses of the node: use another port than ListenPort"
                    .to_owned(),
        });
    }
    Ok(())
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
