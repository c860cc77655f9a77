//! The single changes. Each is idempotent.

use std::fmt;

use ipnet::IpNet;

use super::Peer;
use crate::{
    addr::Mtu,
    key::{PublicKey, SecretKey},
};

/// A change to the kernel's objects. Prints as the line that is logged for it, without secrets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Makes a wireguard device, down.
    CreateDevice {
        /// Its name.
        device: String,
        /// MTU in bytes.
        mtu: Mtu,
    },
    /// Removes a device of ours that is not wanted any more, and its routes with it.
    DeleteDevice {
        /// Its name.
        device: String,
    },
    /// Sets the private key and the port of a device.
    SetDevice {
        /// Its name.
        device: String,
        /// The private key.
        private: SecretKey,
        /// The UDP port.
        port: u16,
    },
    /// Adds or changes a peer.
    PutPeer {
        /// Name of the device.
        device: String,
        /// The peer's public key.
        key: PublicKey,
        /// What it is to have.
        peer: Peer,
        /// Whether the endpoint is set, too: not where the peer has been heard from another.
        endpoint: bool,
    },
    /// Removes a peer.
    RemovePeer {
        /// Name of the device.
        device: String,
        /// The peer's public key.
        key: PublicKey,
    },
    /// Sets the MTU.
    SetMtu {
        /// Name of the device.
        device: String,
        /// In bytes.
        mtu: Mtu,
    },
    /// Adds an address.
    PutAddress {
        /// Name of the device.
        device: String,
        /// The address.
        address: IpNet,
    },
    /// Removes an address.
    DelAddress {
        /// Name of the device.
        device: String,
        /// The address.
        address: IpNet,
    },
    /// Sets a device up.
    SetUp {
        /// Its name.
        device: String,
    },
    /// Leads a network to the device.
    PutRoute {
        /// Name of the device.
        device: String,
        /// The network.
        network: IpNet,
    },
    /// Removes such a route.
    DelRoute {
        /// Name of the device.
        device: String,
        /// The network.
        network: IpNet,
    },
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::CreateDevice { device, mtu } => {
                write!(f, "create wireguard device {device} (MTU {mtu})")
            }
            Self::DeleteDevice { device } => write!(f, "delete wireguard device {device}"),
            Self::SetDevice { device, port, .. } => {
                write!(f, "set private key and port {port} of {device}")
            }
            Self::PutPeer {
                device,
                key,
                peer,
                endpoint,
            } => {
                let allowed: Vec<String> = peer.allowed.iter().map(ToString::to_string).collect();
                let allowed = allowed.join(" ");
                write!(f, "set peer {key} of {device}: {allowed}")?;
                if *endpoint {
                    write!(f, " via {}", peer.endpoint)?;
                }
                Ok(())
            }
            Self::RemovePeer { device, key } => write!(f, "remove peer {key} of {device}"),
            Self::SetMtu { device, mtu } => write!(f, "set MTU {mtu} on {device}"),
            Self::PutAddress { device, address } => write!(f, "add address {address} to {device}"),
            Self::DelAddress { device, address } => {
                write!(f, "remove address {address} from {device}")
            }
            Self::SetUp { device } => write!(f, "set {device} up"),
            Self::PutRoute { device, network } => write!(f, "set route {network} dev {device}"),
            Self::DelRoute { device, network } => write!(f, "delete route {network} dev {device}"),
        }
    }
}
