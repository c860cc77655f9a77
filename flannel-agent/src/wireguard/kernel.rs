//! Looking at the devices, and making single changes. It must never decide anything.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::SocketAddr,
};

use flannel_core::{
    addr::IfIndex,
    distribution::Feature,
    key::{PublicKey, SecretKey},
    mark,
    wireguard::{Inner, Observed, Op, wire},
};
use ipnet::IpNet;
use thiserror::Error;

use super::{
    key_file::{self, KeyFileError},
    socket::Wireguard,
};
use crate::{
    dataplane::netlink::{Netlink, NetlinkError},
    kernel_modules,
    telemetry::chain,
};

/// Something about the encrypted overlay that failed.
#[derive(Debug, Error)]
pub enum WireguardError {
    /// The kernel lacks it.
    #[error("Backend.Type is \"wireguard\", but the kernel has no WireGuard ({reason}): {advice}")]
    Missing {
        /// What the kernel and `modprobe` said.
        reason: String,
        /// What to do.
        advice: String,
    },
    /// The key cannot be had.
    #[error(transparent)]
    Key(#[from] KeyFileError),
    /// Links, addresses and routes.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// WireGuard itself.
    #[error("{what}: {cause}{}", advice(cause))]
    Refused {
        /// What was attempted.
        what: String,
        /// The kernel's answer.
        #[source]
        cause: io::Error,
    },
    /// What has our device's name and is none.
    #[error("{0}")]
    InTheWay(String),
    /// The device went away while it was being set up.
    #[error("{what}: there is no device {device}")]
    Gone {
        /// What was attempted.
        what: String,
        /// The device.
        device: String,
    },
}

impl WireguardError {
    /// Whether it is about the operator's files, not about the kernel.
    pub(crate) fn is_usage(&self) -> bool {
        matches!(self, Self::Key(_))
    }
}

fn advice(cause: &io::Error) -> &'static str {
    match cause.raw_os_error() {
        Some(libc::EADDRINUSE) => {
            " (another program or device has the UDP port: stop it, or set Backend.ListenPort)"
        }
        Some(libc::EPERM) => " (the agent needs CAP_NET_ADMIN)",
        Some(libc::EAFNOSUPPORT) => " (the kernel has IPv6 switched off)",
        _ => "",
    }
}

/// The kernel's half.
#[derive(Debug)]
pub(crate) struct Kernel {
    net: Netlink,
    wireguard: Wireguard,
    /// The endpoint that each peer was given last.
    given: BTreeMap<(String, PublicKey), SocketAddr>,
}

impl Kernel {
    /// Finds out whether the kernel has WireGuard, loading its module if need be. Changes nothing else.
    pub(crate) async fn open(net: Netlink) -> Result<Self, WireguardError> {
        let open = || {
            Wireguard::open().map_err(|cause| WireguardError::Refused {
                what: "open the kernel's WireGuard interface".into(),
                cause,
            })
        };
        let wireguard = if let Some(wireguard) = open()? {
            wireguard
        } else {
            let host = kernel_modules::host(Feature::Wireguard);
            let loaded = kernel_modules::load_feature(Feature::Wireguard, &host).await;
            match (open()?, loaded) {
                (Some(wireguard), _) => {
                    tracing::info!("loaded the kernel module wireguard");
                    wireguard
                }
                (None, loaded) => {
                    let tried = loaded.map_or_else(
                        |failure| failure,
                        |()| "modprobe has loaded something else".to_owned(),
                    );
                    return Err(WireguardError::Missing {
                        reason: format!("modprobe wireguard: {tried}"),
                        advice: host.advice(Feature::Wireguard),
                    });
                }
            }
        };
        Ok(Self {
            net,
            wireguard,
            given: BTreeMap::new(),
        })
    }

    /// Reads the private key, or makes one.
    pub(crate) fn private_key() -> Result<SecretKey, WireguardError> {
        let path = key_file::path();
        let (key, new) = key_file::obtain(&path)?;
        if new {
            tracing::info!("made a private key in {}", path.display());
        }
        Ok(key)
    }

    /// Looks at the devices that have our names.
    pub(crate) async fn observe(&self) -> Result<Observed, WireguardError> {
        let mut seen = Observed::default();
        for name in [mark::WIREGUARD_DEVICE, mark::WIREGUARD_DEVICE_V6] {
            let Some(mut device) = self.net.plain_device(name).await? else {
                continue;
            };
            if mark::is_our_wireguard(name, &device.kind) {
                let mut inner = match self.wireguard.device(name) {
                    Ok(inner) => inner,
                    // Gone in between: the next look sees that.
                    Err(error) if error.raw_os_error() == Some(libc::ENODEV) => continue,
                    Err(cause) => {
                        let what = format!("read the peers of {name}");
                        return Err(WireguardError::Refused { what, cause });
                    }
                };
                for (key, peer) in &mut inner.peers {
                    peer.given = self.given.get(&(name.to_owned(), *key)).copied();
                }
                device.inner = Some(inner);
            }
            seen.devices.insert(name.to_owned(), device);
        }
        Ok(seen)
    }

    /// Makes a change.
    pub(crate) async fn apply(&mut self, op: &Op) -> Result<(), WireguardError> {
        let family = self.wireguard.family();
        let net = &self.net;
        match op {
            Op::CreateDevice { device, mtu } => match net.create_wireguard(device, *mtu).await {
                Err(error) if error.errno() != Some(libc::EEXIST) => Err(error.into()),
                _ => Ok(()),
            },
            Op::DeleteDevice { device } => {
                self.given.retain(|(name, _), _| name != device);
                match net.index(device).await? {
                    Some(index) => Ok(net.delete_device(index).await?),
                    None => Ok(()),
                }
            }
            Op::SetDevice {
                device,
                private,
                port,
            } => self.change(op, &wire::set_device(family, device, private, *port)),
            Op::PutPeer {
                device,
                key,
                peer,
                endpoint,
            } => {
                self.change(op, &wire::put_peer(family, device, key, peer, *endpoint))?;
                if *endpoint {
                    self.given.insert((device.clone(), *key), peer.endpoint);
                }
                Ok(())
            }
            Op::RemovePeer { device, key } => {
                self.given.remove(&(device.clone(), *key));
                self.change(op, &wire::remove_peer(family, device, key))
            }
            Op::SetMtu { device, mtu } => {
                let index = self.index(op, device).await?;
                Ok(net.set_mtu(index, *mtu).await?)
            }
            Op::PutAddress { device, address } => {
                let index = self.index(op, device).await?;
                Ok(net.put_plain_address(index, *address).await?)
            }
            Op::DelAddress { device, address } => {
                let index = self.index(op, device).await?;
                Ok(net.del_plain_address(index, *address).await?)
            }
            Op::SetUp { device } => {
                let index = self.index(op, device).await?;
                match net.up(index).await {
                    // The device opens its sockets now.
                    Err(error) if error.errno() == Some(libc::EADDRINUSE) => {
                        Err(WireguardError::Refused {
                            what: op.to_string(),
                            cause: io::Error::from_raw_os_error(libc::EADDRINUSE),
                        })
                    }
                    answer => Ok(answer?),
                }
            }
            Op::PutRoute { device, network } => {
                let index = self.index(op, device).await?;
                Ok(net.put_straight_route(index, *network).await?)
            }
            Op::DelRoute { device, network } => {
                let index = self.index(op, device).await?;
                Ok(net.del_straight_route(index, *network).await?)
            }
        }
    }

    fn change(&self, op: &Op, request: &[u8]) -> Result<(), WireguardError> {
        self.wireguard
            .change(request)
            .map_err(|cause| WireguardError::Refused {
                what: op.to_string(),
                cause,
            })
    }

    async fn index(&self, op: &Op, device: &str) -> Result<IfIndex, WireguardError> {
        let index = self.net.index(device).await?;
        index.ok_or_else(|| WireguardError::Gone {
            what: op.to_string(),
            device: device.to_owned(),
        })
    }
}

/// A device as somebody sees it who changes nothing.
#[derive(Debug)]
pub(crate) struct Seen {
    pub(crate) mtu: u32,
    pub(crate) up: bool,
    /// Networks that are led to it.
    pub(crate) routes: BTreeSet<IpNet>,
    /// What WireGuard says of it, or why it does not. The private key and those that are shared with peers are left out.
    pub(crate) inner: io::Result<Inner>,
}

/// Looks at a device; `None` if there is none of that name, or it is of another kind.
pub(crate) async fn look(net: &Netlink, name: &str) -> Result<Option<Seen>, NetlinkError> {
    let Some(device) = net.plain_device(name).await? else {
        return Ok(None);
    };
    if !mark::is_our_wireguard(name, &device.kind) {
        return Ok(None);
    }
    Ok(Some(Seen {
        mtu: device.mtu,
        up: device.up,
        routes: device.routes,
        inner: read(name),
    }))
}

/// WireGuard's half of a device, without the private key and those that are shared with peers.
pub(crate) fn read(name: &str) -> io::Result<Inner> {
    let none = || io::Error::from_raw_os_error(libc::EOPNOTSUPP);
    let mut inner = Wireguard::open()?.ok_or_else(none)?.device(name)?;
    inner.private = None;
    for peer in inner.peers.values_mut() {
        peer.psk = None;
    }
    Ok(inner)
}

/// One line for a failure.
pub(super) fn told(error: &WireguardError) -> String {
    chain(error)
}
