//! The daemon from start to stop: flags, uplink, configuration, rung, device, lease, loop.
//!
//! Nothing on the node is changed before all that can be checked has been checked, and nothing is taken away at the end.

use std::{net::Ipv4Addr, path::Path, time::Duration};

use flannel_core::{
    addr::VtepMac,
    config::{self, ConfigError, NetConf},
    iface::{self, IfaceError, Uplink},
    lease::{LeaseAttrs, SubnetKey},
    mark::{self, MarkError},
    plan::{Desired, DeviceKind, ObservedKind, Tunnel},
    subnet_env,
};
use thiserror::Error;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{
    cli::{Args, DeviceChoice, EXIT_KERNEL, EXIT_STORE, EXIT_USAGE},
    datapath::{self, Rung},
    dataplane::{
        Dataplane, DataplaneError,
        netlink::{Netlink, NetlinkError},
    },
    files::{self, FileError},
    leases::{ErrorKind, LeaseError, Offer, Store, View},
    preflight::Capabilities,
    reconcile::{Loop, Readiness},
    state::{Datapath, Mode, State},
    telemetry::chain,
};

/// How long to wait before asking a store again that has no configuration yet: upstream's second.
const CONFIG_RETRY: Duration = Duration::from_secs(1);

/// Why the daemon could not start.
#[derive(Debug, Error)]
pub enum StartError {
    /// The interface to use cannot be told.
    #[error(transparent)]
    Iface(#[from] IfaceError),
    /// The network configuration is wrong.
    #[error("network configuration from {origin}: {source}")]
    Config {
        /// Which store it came from.
        origin: String,
        /// What is wrong.
        source: ConfigError,
    },
    /// A configuration that this version cannot serve.
    #[error("network configuration from {origin}: {reason}")]
    Unsupported {
        /// Which store it came from.
        origin: String,
        /// What and what to do.
        reason: String,
    },
    /// A device name too long for the kernel.
    #[error(transparent)]
    Mark(#[from] MarkError),
    /// A file that must be written and cannot.
    #[error(transparent)]
    File(#[from] FileError),
    /// The lease store refuses.
    #[error(transparent)]
    Lease(#[from] LeaseError),
    /// The kernel's own objects cannot be read.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// A change to the kernel failed.
    #[error(transparent)]
    Dataplane(#[from] DataplaneError),
    /// `--datapath=bpf`, and it cannot be.
    #[error("--datapath=bpf was asked for, but {0}")]
    NoBpf(String),
    /// Neither vxlan nor eBPF.
    #[error(
        "this node has no way to carry the overlay: {vxlan}; and {bpf}. Install the vxlan module (Debian: linux-modules or linux-image, \
         Raspberry Pi on Ubuntu: linux-modules-extra-raspi) or let the agent use eBPF"
    )]
    NoPath {
        /// Why no vxlan device.
        vxlan: String,
        /// Why no eBPF.
        bpf: String,
    },
    /// Not even netlink.
    #[error("CAP_NET_ADMIN is missing: run as root, or add the capability")]
    NoPrivilege,
}

impl StartError {
    /// The process's exit code.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Iface(_)
            | Self::Config { .. }
            | Self::Unsupported { .. }
            | Self::Mark(_)
            | Self::File(_) => EXIT_USAGE,
            Self::Lease(error) if error.kind() == ErrorKind::Config => EXIT_USAGE,
            Self::Lease(_) => EXIT_STORE,
            Self::Netlink(_)
            | Self::Dataplane(_)
            | Self::NoBpf(_)
            | Self::NoPath { .. }
            | Self::NoPrivilege => EXIT_KERNEL,
        }
    }
}

/// Runs until cancelled.
pub async fn run(args: &Args, cancel: CancellationToken) -> Result<(), StartError> {
    let net = Netlink::open()?;
    let uplink = choose_uplink(args, &net).await?;
    files::check_writable(&args.subnet_file)?;
    let store = Store::open(&args.store()).await?;
    tracing::info!(store = store.describe(), "lease store");
    let Some(conf) = cancel
        .run_until_cancelled(net_conf(&store))
        .await
        .transpose()?
    else {
        return Ok(());
    };
    let family = conf
        .ipv4
        .clone()
        .ok_or_else(|| unsupported(&store, "EnableIPv4 is false: only IPv4 is supported yet"))?;
    let public_ip = uplink
        .public_ip
        .ok_or_else(|| unsupported(&store, "the uplink has no IPv4 address"))?;
    let local = uplink.local_v4().unwrap_or(public_ip);
    let mtu = config::tunnel_mtu(&conf, uplink.mtu).map_err(|source| StartError::Config {
        origin: store.describe(),
        source,
    })?;
    for warning in conf
        .warnings
        .iter()
        .chain(&config::mtu_warnings(&conf, uplink.mtu))
    {
        tracing::warn!("{warning}");
    }
    if !Capabilities::effective().may_configure() {
        return Err(StartError::NoPrivilege);
    }
    // Checked to the end: from here on the node is changed.
    let ethernet = net.is_ethernet(uplink.index).await?;
    let rung = datapath::choose(args, &conf, ethernet)?;
    if let Rung::Kernel(reason) = &rung {
        tracing::warn!(
            reason,
            "the kernel's vxlan device carries the overlay, without eBPF"
        );
    }
    let identity = Args::identity(Some(public_ip));
    let name = mark::device_name(conf.backend.vxlan.vni);
    let mac = choose_mac(&net, &store, &name, &identity).await?;
    let tunnel = Tunnel {
        name: name.clone(),
        kind: vxlan(&conf, &uplink, local),
        mtu,
        mac: Some(mac),
        address: None,
        network: family.network,
    };
    let mut node = Node {
        args,
        conf: &conf,
        uplink: &uplink,
        rung,
        tunnel,
        dataplane: None,
        desired: None,
        path: None,
    };
    node.bring_up_device(&net, local).await?;
    let (Some(dataplane), Some(mut desired), Some(path)) =
        (node.dataplane, node.desired, node.path)
    else {
        return Err(StartError::NoPrivilege);
    };

    let previous = previous_subnet(&args.subnet_file);
    let attrs = LeaseAttrs::vxlan_v4(public_ip, conf.backend.vxlan.vni.get(), mac);
    let offer = Offer {
        conf: conf.clone(),
        identity,
        attrs,
        previous,
    };
    let Some(held) = store.acquire_until(&offer, &cancel).await.transpose()? else {
        return Ok(());
    };
    set_own(&mut desired, &held.lease.key);

    let state = State {
        version: env!("CARGO_PKG_VERSION").into(),
        pid: std::process::id(),
        vni: conf.backend.vxlan.vni,
        device: name,
        uplink: uplink.name.clone(),
        uplink_index: uplink.index,
        public_ip,
        vtep_mac: mac,
        network: family.network,
        subnet: held.lease.key.v4,
        mtu: mtu.get(),
        datapath: path,
        store: store.describe(),
        store_connected: true,
        problems: Vec::new(),
        subnet_file: args.subnet_file.clone(),
    };
    let (_offers, offers) = watch::channel(offer);
    let (views_in, views) = watch::channel(View {
        own: Some(held.lease.clone()),
        ..View::default()
    });
    let keeper = tokio::spawn(store.run(held, offers, views_in, cancel.clone()));
    let ready = Readiness::new(args.subnet_file.clone());
    Loop::new(dataplane, desired, views, state, ready)
        .run(cancel)
        .await;
    if let Err(error) = keeper.await {
        tracing::error!(%error, "the lease store's task ended");
    }
    Ok(())
}

/// Points the desired state at this node's own subnet.
pub(crate) fn set_own(desired: &mut Desired, key: &SubnetKey) {
    desired.own = key.v4.map(ipnet::IpNet::V4).into_iter().collect();
    desired.tunnel.address = key
        .v4
        .and_then(|subnet| ipnet::Ipv4Net::new(subnet.network(), 32).ok());
}

async fn choose_uplink(args: &Args, net: &Netlink) -> Result<Uplink, StartError> {
    let found = net.uplinks().await?;
    let uplink = iface::select(&found.links, &found.routes, &args.wanted(), true, false)?;
    tracing::info!(
        interface = uplink.name,
        address = uplink.address.map(tracing::field::display),
        public_ip = uplink.public_ip.map(tracing::field::display),
        mtu = uplink.mtu,
        reason = uplink.reason,
        "uplink"
    );
    Ok(uplink)
}

/// The network configuration. A store that cannot be reached, or has none yet, is asked again; a wrong one is an error.
async fn net_conf(store: &Store) -> Result<NetConf, StartError> {
    let mut reported = None;
    loop {
        match store.net_conf().await {
            Ok(text) => {
                let conf = NetConf::parse(&text).map_err(|source| StartError::Config {
                    origin: store.describe(),
                    source,
                })?;
                if conf.enable_ipv6 {
                    return Err(unsupported(
                        store,
                        "EnableIPv6 is true: only IPv4 is supported yet, set it to false",
                    ));
                }
                if conf.backend.vxlan.direct_routing {
                    tracing::warn!(
                        "Backend.DirectRouting is not supported yet: peers on the same link are reached by VXLAN too"
                    );
                }
                tracing::info!(
                    backend = conf.backend.type_as_written,
                    "found network config"
                );
                return Ok(conf);
            }
            Err(error) if error.kind() == ErrorKind::Retry => {
                let text = chain(&error);
                if reported.as_ref() != Some(&text) {
                    tracing::warn!(error = text, "no network config yet, trying again");
                    reported = Some(text);
                }
            }
            Err(error) => return Err(error.into()),
        }
        tokio::time::sleep(CONFIG_RETRY).await;
    }
}

fn unsupported(store: &Store, reason: &str) -> StartError {
    StartError::Unsupported {
        origin: store.describe(),
        reason: reason.into(),
    }
}

fn vxlan(conf: &NetConf, uplink: &Uplink, local: Ipv4Addr) -> DeviceKind {
    let vxlan = &conf.backend.vxlan;
    DeviceKind::Vxlan {
        vni: vxlan.vni,
        port: vxlan.port,
        lower: uplink.index,
        local,
        learning: vxlan.learning,
        gbp: vxlan.gbp,
    }
}

/// An existing device is adopted with its MAC, which peers know. Without one, the MAC of our stored lease saves every peer an
/// update; without that, a new one.
async fn choose_mac(
    net: &Netlink,
    store: &Store,
    name: &str,
    identity: &flannel_core::acquire::Identity,
) -> Result<VtepMac, StartError> {
    if let Some(device) = net.device(name).await? {
        if matches!(
            device.kind,
            ObservedKind::Vxlan { .. } | ObservedKind::Veth { .. }
        ) {
            return Ok(device.mac);
        }
    }
    let stored = store.own_stored(identity).await.ok().flatten();
    if let Some(data) = stored.and_then(|lease| lease.attrs.v4) {
        tracing::info!(mac = %data.mac, "the new device takes the MAC address of the stored lease");
        return Ok(data.mac);
    }
    Ok(VtepMac::from_random(random_bytes()))
}

fn random_bytes() -> [u8; 6] {
    use std::hash::{BuildHasher as _, Hasher as _};
    // The standard library's hasher keys come from the kernel's random source.
    let [a, b, c, d, e, f, _, _] = std::hash::RandomState::new()
        .build_hasher()
        .finish()
        .to_ne_bytes();
    [a, b, c, d, e, f]
}

fn previous_subnet(subnet_file: &Path) -> Option<SubnetKey> {
    let text = std::fs::read_to_string(subnet_file).ok()?;
    let previous = subnet_env::parse_previous(&text);
    for warning in &previous.warnings {
        tracing::debug!(file = %subnet_file.display(), "{warning}");
    }
    previous.subnet.map(SubnetKey::from_v4)
}

/// The parts of a node on their way up.
struct Node<'a> {
    args: &'a Args,
    conf: &'a NetConf,
    uplink: &'a Uplink,
    rung: Rung,
    tunnel: Tunnel,
    dataplane: Option<Dataplane>,
    desired: Option<Desired>,
    path: Option<Datapath>,
}

impl Node<'_> {
    /// Creates or adopts the device. Where the kernel has no vxlan, and eBPF can do without, a veth pair takes its name.
    async fn bring_up_device(&mut self, net: &Netlink, local: Ipv4Addr) -> Result<(), StartError> {
        let rung = std::mem::replace(&mut self.rung, Rung::Kernel(String::new()));
        let (bpf, kernel_reason) = match rung {
            Rung::Bpf(bpf) => (Some(*bpf), None),
            Rung::Kernel(reason) => (None, Some(reason)),
        };
        let mut refused = (self.args.bpf_device == DeviceChoice::Veth)
            .then(|| "--bpf-device=veth was given".to_owned());
        if refused.is_none() {
            refused = self.try_vxlan(net).await?;
        }
        if let Some(vxlan) = &refused {
            if let Some(bpf_reason) = kernel_reason {
                return Err(StartError::NoPath {
                    vxlan: vxlan.clone(),
                    bpf: bpf_reason,
                });
            }
            let peer = mark::peer_device_name(self.conf.backend.vxlan.vni)?;
            tracing::warn!(
                reason = vxlan,
                "no kernel vxlan device: eBPF carries the overlay alone"
            );
            self.tunnel.kind = DeviceKind::Veth { peer };
        }
        let settings = match &bpf {
            Some(bpf) => datapath::settings(bpf, self.conf, self.uplink, refused.is_some()),
            None => None,
        };
        self.path = Some(Datapath {
            mode: if bpf.is_some() {
                Mode::Bpf
            } else {
                Mode::Kernel
            },
            reason: kernel_reason.unwrap_or_else(|| "eBPF is permitted and works".into()),
            device: if refused.is_some() { "veth" } else { "vxlan" }.into(),
            attach: bpf
                .as_ref()
                .map(|bpf| bpf.attach_mode().as_str().to_owned()),
        });
        self.desired = Some(Desired {
            tunnel: self.tunnel.clone(),
            own: Default::default(),
            peers: None,
            bpf: settings,
        });
        self.dataplane = Some(Dataplane::new(net.clone(), bpf, local));
        Ok(())
    }

    /// Whether the kernel makes vxlan devices: `None` if it does (one is there then), else why not.
    async fn try_vxlan(&self, net: &Netlink) -> Result<Option<String>, StartError> {
        if let Some(device) = net.device(&self.tunnel.name).await? {
            if matches!(device.kind, ObservedKind::Vxlan { .. }) {
                return Ok(None);
            }
            if self.args.bpf_device == DeviceChoice::Auto
                && matches!(device.kind, ObservedKind::Veth { .. })
            {
                return self.try_elsewhere(net).await;
            }
            // The planner says what is wrong with it.
            return Ok(None);
        }
        match net.create_device(&self.tunnel).await {
            Ok(()) => {
                tracing::info!("create device {}", self.tunnel.name);
                Ok(None)
            }
            Err(error)
                if error.errno() == Some(libc::EOPNOTSUPP)
                    && self.args.bpf_device == DeviceChoice::Auto =>
            {
                Ok(Some(format!(
                    "the kernel refuses vxlan devices ({})",
                    chain(&error)
                )))
            }
            Err(error) if error.errno() == Some(libc::EOPNOTSUPP) => Err(StartError::NoPath {
                vxlan: chain(&error),
                bpf: "--bpf-device=vxlan forbids doing without".into(),
            }),
            Err(error) if error.errno() == Some(libc::EEXIST) => Err(StartError::Unsupported {
                origin: "this node".into(),
                reason: format!(
                    "{}: another vxlan device has the same VNI and port: remove it or choose another VNI",
                    chain(&error)
                ),
            }),
            Err(error) => Err(error.into()),
        }
    }

    /// Our veth pair has the name; a vxlan device under a passing name tells whether the kernel has learnt better since.
    async fn try_elsewhere(&self, net: &Netlink) -> Result<Option<String>, StartError> {
        let passing = Tunnel {
            name: format!("{}~", self.tunnel.name),
            mac: None,
            ..self.tunnel.clone()
        };
        match net.create_device(&passing).await {
            Ok(()) => {
                if let Some(index) = net.index(&passing.name).await? {
                    net.delete_device(index).await?;
                }
                Ok(None)
            }
            Err(error) if error.errno() == Some(libc::EOPNOTSUPP) => Ok(Some(format!(
                "the kernel refuses vxlan devices ({})",
                chain(&error)
            ))),
            Err(error) => Err(error.into()),
        }
    }
}
