//! What a backend stores in a lease so that other nodes can reach this one, byte for byte as upstream writes it.

use std::fmt;

use super::{LeaseError, bad_field};
use crate::addr::VtepMac;
use crate::config::BackendKind;
use crate::json::{Json, Object};
use crate::key::PublicKey;

/// What a node publishes about its end of one address family. Prints as the JSON that is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackendData {
    /// Of the vxlan backend.
    Vxlan(VxlanData),
    /// Of the wireguard backend.
    Wireguard(WireguardData),
}

/// What a node publishes about its VXLAN tunnel end point for one address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VxlanData {
    /// Network identifier as stored; 0 when missing, as releases before 0.15 wrote it. Upstream never compares it.
    pub vni: u32,
    /// MAC address of the node's VXLAN device.
    pub mac: VtepMac,
}

/// What a node publishes about its WireGuard device for one address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WireguardData {
    /// The device's public key.
    pub public_key: PublicKey,
    /// UDP port it listens on; 0 when missing, as releases before 0.26 wrote it: the port of the reader's own device then.
    pub port: u16,
}

impl From<VxlanData> for BackendData {
    fn from(data: VxlanData) -> Self {
        Self::Vxlan(data)
    }
}

impl From<WireguardData> for BackendData {
    fn from(data: WireguardData) -> Self {
        Self::Wireguard(data)
    }
}

impl fmt::Display for BackendData {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vxlan(VxlanData { vni, mac }) => {
                write!(f, r#"{{"VNI":{vni},"VtepMAC":"{mac}"}}"#)
            }
            Self::Wireguard(WireguardData { public_key, port }) => {
                write!(f, r#"{{"PublicKey":"{public_key}","Port":{port}}}"#)
            }
        }
    }
}

impl BackendData {
    /// An example of what that backend stores; `None` for one that stores nothing, or that exists elsewhere.
    pub(crate) fn example(backend_type: &str) -> Option<&'static str> {
        match backend_type.parse() {
            Ok(BackendKind::Vxlan) => {
                Some("an object such as {\"VNI\":1,\"VtepMAC\":\"0a:1b:2c:3d:4e:5f\"}")
            }
            Ok(BackendKind::Wireguard) => {
                Some("an object such as {\"PublicKey\":\"<32 bytes in base64>\",\"Port\":51820}")
            }
            Ok(BackendKind::HostGw | BackendKind::Alloc) | Err(_) => None,
        }
    }

    /// Reads what a backend has stored under `member`. `None` for a backend that stores nothing, or that exists elsewhere.
    pub(crate) fn read(
        backend_type: &str,
        value: &Json,
        member: &str,
    ) -> Result<Option<Self>, LeaseError> {
        let read = match backend_type.parse() {
            Ok(BackendKind::Vxlan) => vxlan,
            Ok(BackendKind::Wireguard) => wireguard,
            Ok(BackendKind::HostGw | BackendKind::Alloc) | Err(_) => return Ok(None),
        };
        match value {
            Json::Object(object) => read(object, member).map(Some),
            other => Err(bad_field(member, other, "an object")),
        }
    }
}

fn vxlan(object: &Object, member: &str) -> Result<BackendData, LeaseError> {
    let vni = match object.get("VNI") {
        None => 0,
        Some(value) => match value {
            Json::Unsigned(vni) => u32::try_from(*vni).ok(),
            _ => None,
        }
        .ok_or_else(|| {
            let wanted = "a whole number of at most 32 bits";
            bad_field(&format!("{member}.VNI"), value, wanted)
        })?,
    };
    let found = object.get("VtepMAC").unwrap_or(&Json::Null);
    let mac = match found {
        Json::String(text) => text.parse().ok(),
        _ => None,
    };
    let mac = mac.ok_or_else(|| {
        let wanted = "a MAC address such as 0a:1b:2c:3d:4e:5f";
        bad_field(&format!("{member}.VtepMAC"), found, wanted)
    })?;
    Ok(VxlanData { vni, mac }.into())
}

fn wireguard(object: &Object, member: &str) -> Result<BackendData, LeaseError> {
    let port = match object.get("Port") {
        None => 0,
        Some(value) => match value {
            Json::Unsigned(port) => u16::try_from(*port).ok(),
            _ => None,
        }
        .ok_or_else(|| bad_field(&format!("{member}.Port"), value, "a port number"))?,
    };
    let found = object.get("PublicKey").unwrap_or(&Json::Null);
    let key = match found {
        Json::String(text) => text.parse().ok(),
        _ => None,
    };
    let public_key = key.ok_or_else(|| {
        let wanted = "32 bytes in base64";
        bad_field(&format!("{member}.PublicKey"), found, wanted)
    })?;
    Ok(WireguardData { public_key, port }.into())
}
