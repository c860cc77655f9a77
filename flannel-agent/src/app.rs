//! The daemon from start to stop: flags, uplink, configuration, rung, device, lease, loop.
//!
//! Nothing on the node is changed before all that can be checked has been checked, and nothing is taken away at the end.

use std::{net::Ipv4Addr, path::Path, time::Duration};

use flannel_core::{
    addr::VtepMac,
    config::{self, ConfigError, NetConf},
    datagram::Receiver,
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
    cli::{Args, EXIT_KERNEL, EXIT_STORE, EXIT_USAGE},
    datapath,
    dataplane::{
        DataplaneError,
        bpf::Instance,
        fragments,
        netlink::{Netlink, NetlinkError},
    },
    device::{Site, Up},
    fastpath,
    files::{self, FileError},
    health::{self, Board, Part, Pulse},
    leases::{ErrorKind, LeaseError, Offer, Store, View},
    notify,
    preflight::Capabilities,
    reconcile::{Gatekeeper, Loop, Readiness, XdpKeeper},
    state::{Mode, State},
    telemetry::chain,
};

/// How long to wait before asking a store again that has no configuration yet, or no answer: upstream's second.
const STORE_RETRY: Duration = Duration::from_secs(1);

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
    /// Flags that ask for eBPF, and it cannot be.
    #[error("{flag} was asked for, but {reason}")]
    NoBpf {
        /// What was asked for.
        flag: &'static str,
        /// Why not.
        reason: String,
    },
    /// Flags that exclude each other.
    #[error("{0}")]
    Flags(&'static str),
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
    /// No random bytes for a MAC address.
    #[error("read /dev/urandom for a MAC address")]
    Random(#[source] std::io::Error),
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
            | Self::Flags(_)
            | Self::File(_) => EXIT_USAGE,
            Self::Lease(error) if error.kind() == ErrorKind::Config => EXIT_USAGE,
            Self::Lease(_) => EXIT_STORE,
            Self::Netlink(_)
            | Self::Dataplane(_)
            | Self::NoBpf { .. }
            | Self::NoPath { .. }
            | Self::Random(_)
            | Self::NoPrivilege => EXIT_KERNEL,
        }
    }
}

/// Runs until cancelled.
pub async fn run(args: &Args, cancel: CancellationToken) -> Result<(), StartError> {
    let (board, pulse) = (Board::default(), Pulse::default());
    // First of all: whoever probes us wants to know what we are waiting for.
    if let Some(address) = args.serving.healthz() {
        health::serve(address, board.clone(), cancel.clone());
    }
    let telling = tokio::spawn(notify::attend(&board, pulse.clone(), cancel.clone()));
    let outcome = live(args, &board, pulse, cancel.clone()).await;
    cancel.cancel();
    if let Err(error) = telling.await {
        tracing::error!(%error, "the task that informs the service manager ended");
    }
    outcome
}

async fn live(
    args: &Args,
    board: &Board,
    pulse: Pulse,
    cancel: CancellationToken,
) -> Result<(), StartError> {
    args.check().map_err(StartError::Flags)?;
    let net = Netlink::open()?;
    let uplink = choose_uplink(args, &net).await?;
    board.settle(Part::Uplink);
    files::check_writable(&args.subnet_file)?;
    if let Some(dir) = &args.lease_dir {
        files::check_lease_dir(dir)?;
    }
    let store = Store::open(&args.store()).await?;
    tracing::info!(store = store.describe(), "lease store");
    let Some(conf) = cancel
        .run_until_cancelled(net_conf(&store, board))
        .await
        .transpose()?
    else {
        return Ok(());
    };
    let family = conf
        .ipv4
        .ok_or_else(|| unsupported(&store, "EnableIPv4 is false: only IPv4 is supported yet"))?;
    let public_ip = uplink
        .public_ip
        .ok_or_else(|| unsupported(&store, "the uplink has no IPv4 address"))?;
    let local = uplink.local_v4().unwrap_or(public_ip);
    let name = mark::device_name(conf.backend.vxlan.vni);
    mark::check_name(&name)?;
    let mtu = config::tunnel_mtu(&conf, uplink.mtu).map_err(|source| StartError::Config {
        origin: store.describe(),
        source,
    })?;
    board.settle(Part::Config);
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
    let ethernet = net.is_ethernet(uplink.index).await?;
    let uplink_kind = net.kind_of(uplink.index).await?;
    let identity = Args::identity(Some(public_ip));
    let Some(mac) = cancel
        .run_until_cancelled(choose_mac(&net, &store, &name, &identity))
        .await
        .transpose()?
    else {
        return Ok(());
    };
    // Checked to the end: from here on the node is changed.
    let rung = datapath::choose(args, &conf, ethernet)?;
    let tunnel = Tunnel {
        name: name.clone(),
        kind: vxlan(&conf, &uplink, local),
        mtu,
        mac: Some(mac),
        address: None,
        network: family.network,
    };
    let site = Site {
        args,
        conf: &conf,
        uplink: &uplink,
        net: &net,
        local,
    };
    let Up {
        dataplane,
        mut desired,
        path,
    } = site.bring_up(rung, tunnel).await?;

    let previous = previous_subnet(&args.subnet_file);
    let attrs = LeaseAttrs::vxlan_v4(public_ip, conf.backend.vxlan.vni.get(), mac);
    let offer = Offer {
        conf: conf.clone(),
        identity,
        attrs,
        previous,
    };
    let tell = |trouble: &str| board.lack(Part::Lease, trouble);
    let held = store.acquire_telling(&offer, &cancel, tell).await;
    let Some(held) = held.transpose()? else {
        return Ok(());
    };
    board.settle(Part::Lease);
    board.settle(Part::Firewall);
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
        fast_path: None,
    };
    let (_offers, offers) = watch::channel(offer);
    let (views_in, views) = watch::channel(View {
        own: Some(held.lease.clone()),
        ..View::default()
    });
    let keeper = tokio::spawn(store.run(held, offers, views_in, cancel.clone()));
    datapath::retire(&net, &state).await;
    if let DeviceKind::Veth { peer } = &desired.tunnel.kind {
        let receiver = Receiver {
            vni: conf.backend.vxlan.vni,
            mac,
        };
        let port = conf.backend.vxlan.port;
        let keep = fragments::keep(net, receiver, local, port, peer.clone());
        let cancel = cancel.clone();
        tokio::spawn(async move { cancel.run_until_cancelled(keep).await });
    }
    let ready = Readiness::new(
        args.subnet_file.clone(),
        args.firewall.ip_masq,
        board.clone(),
        pulse,
    );
    let kernel_only = (state.datapath.mode == Mode::Kernel)
        .then(|| format!("eBPF is not in use: {}", state.datapath.reason));
    let xdp = XdpKeeper::new(
        args.bpf_xdp.into(),
        uplink_kind.as_deref(),
        kernel_only.clone(),
    );
    let fast_path = fastpath::Watch {
        choice: args.fast_path(conf.backend.fast_path),
        unsupported: kernel_only.or_else(|| dataplane.gate_obstacle()),
        network: family.network,
        tunnel: state.device.clone(),
        uplink: state.uplink.clone(),
        instance: Instance::of(conf.backend.vxlan.vni).ok(),
    };
    let fast_path = fast_path.start(cancel.clone()).await;
    let gate = Gatekeeper::new(fast_path, dataplane.epoch()?);
    Loop::new(dataplane, desired, views, state, ready, gate, xdp)
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
async fn net_conf(store: &Store, board: &Board) -> Result<NetConf, StartError> {
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
                board.lack(Part::Config, text.as_str());
                if !error.is_logged() && reported.as_ref() != Some(&text) {
                    tracing::warn!(error = text, "no network config yet, trying again");
                    reported = Some(text);
                }
            }
            Err(error) => return Err(error.into()),
        }
        tokio::time::sleep(STORE_RETRY).await;
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
/// update; without that, a new one. A store that does not answer is asked again: a guess would cost every peer that update.
async fn choose_mac(
    net: &Netlink,
    store: &Store,
    name: &str,
    identity: &flannel_core::acquire::Identity,
) -> Result<VtepMac, StartError> {
    if let Some(device) = net.device(name).await?
        && matches!(
            device.kind,
            ObservedKind::Vxlan { .. } | ObservedKind::Veth { .. }
        )
    {
        return Ok(device.mac);
    }
    let mut reported = false;
    let stored = loop {
        match store.own_stored(identity).await {
            Ok(stored) => break stored,
            Err(error) if error.kind() == ErrorKind::Config => return Err(error.into()),
            Err(error) => {
                if !error.is_logged() && !reported {
                    tracing::warn!(error = chain(&error), "no list of leases yet, trying again");
                    reported = true;
                }
            }
        }
        tokio::time::sleep(STORE_RETRY).await;
    };
    if let Some(data) = stored.and_then(|lease| lease.attrs.v4) {
        tracing::info!(mac = %data.mac, "the new device takes the MAC address of the stored lease");
        return Ok(data.mac);
    }
    let bytes = random_bytes().map_err(StartError::Random)?;
    Ok(VtepMac::from_random(bytes))
}

fn random_bytes() -> std::io::Result<[u8; 6]> {
    use std::io::Read as _;
    let mut bytes = [0; 6];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn previous_subnet(subnet_file: &Path) -> Option<SubnetKey> {
    let text = std::fs::read_to_string(subnet_file).ok()?;
    let previous = subnet_env::parse_previous(&text);
    for warning in &previous.warnings {
        tracing::debug!(file = %subnet_file.display(), "{warning}");
    }
    previous.subnet.map(SubnetKey::from_v4)
}
