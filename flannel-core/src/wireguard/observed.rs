//! What the kernel has.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
};

use ipnet::IpNet;

use crate::{
    addr::IfIndex,
    key::{PublicKey, SecretKey},
};

/// The devices that have one of our names, whoever made them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Observed {
    /// By name.
    pub devices: BTreeMap<String, Device>,
}

/// A device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// Its index.
    pub index: IfIndex,
    /// The kind of link, as the kernel names it.
    pub kind: String,
    /// MTU in bytes.
    pub mtu: u32,
    /// Whether it is up.
    pub up: bool,
    /// Its addresses, link-local ones left out.
    pub addresses: BTreeSet<IpNet>,
    /// Destinations of the routes of the main table that lead straight to it.
    pub routes: BTreeSet<IpNet>,
    /// What WireGuard says of it; `None` where it is of another kind.
    pub inner: Option<Inner>,
}

/// WireGuard's half of a device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Inner {
    /// The private key; `None` on a new device.
    pub private: Option<SecretKey>,
    /// The public key that the kernel has computed from it.
    pub public: Option<PublicKey>,
    /// UDP port it listens on.
    pub port: u16,
    /// The peers.
    pub peers: BTreeMap<PublicKey, SeenPeer>,
}

/// A peer as the kernel has it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SeenPeer {
    /// Where packets for it go: what was set, or where its last authentic packet came from.
    pub endpoint: Option<SocketAddr>,
    /// What it may send, and what goes to it.
    pub allowed: BTreeSet<IpNet>,
    /// The key that is shared with it.
    pub psk: Option<SecretKey>,
    /// Seconds between packets that keep it reachable; 0 for none.
    pub keepalive: u16,
    /// Whether the last handshake is young enough to carry packets: then its endpoint works, whatever the lease says.
    pub alive: bool,
    /// The endpoint that this process has set last.
    pub given: Option<SocketAddr>,
    /// When the last handshake was, in seconds since 1970; 0 for never.
    pub handshake: u64,
    /// Bytes received.
    pub received: u64,
    /// Bytes sent.
    pub sent: u64,
}
