//! The daemon from start to stop: flags, uplink, configuration, lease, and then one session after another.
//!
//! Nothing on the node is changed before all that can be checked has been checked, and nothing is taken away at the end.

mod alloc;
mod ascent;
mod cluster;
mod error;
mod follow;
mod former;
mod leasing;
mod session;
mod wireguard;

use std::{collections::BTreeMap, path::Path, time::Duration};

use flannel_core::{
    addr::{Family, VtepMac},
    config::{BackendKind, ConfigError, NetConf},
    iface::{self, Note, Selection, Uplink},
    lease::SubnetKey,
    mark,
    plan::{Desired, ObservedKind},
    subnet_env,
};
use ipnet::IpNet;
use tokio::{sync::watch, time::sleep};
use tokio_util::sync::CancellationToken;

use crate::{
    bridge_netfilter,
    cli::Args,
    cni_socket,
    dataplane::netlink::Netlink,
    device::Up,
    files,
    health::{self, Board, Part, Pulse},
    leases::{ErrorKind, Store},
    metrics::{self, Metrics},
    notify,
    preflight::Capabilities,
    reconcile::{Calls, Readiness},
    telemetry::{chain, one_line},
};

use ascent::Ascent;
pub use error::StartError;
use leasing::Leasing;
use session::{Ended, Node, Setting};

/// How long to wait before asking a store again that has no configuration yet, or no answer: upstream's second.
const STORE_RETRY: Duration = Duration::from_secs(1);
/// How long to wait before a node that could not be set up anew is tried again.
const SET_UP_RETRY: Duration = Duration::from_secs(2);

/// Runs until cancelled.
pub async fn run(args: &Args, cancel: CancellationToken) -> Result<(), StartError> {
    let (board, pulse) = (Board::default(), Pulse::default());
    // First of all: whoever probes us wants to know what we are waiting for.
    if let Some(address) = args.serving.healthz() {
        health::serve(address, board.clone(), cancel.clone());
    }
    let metrics = Metrics::new(args.serving.metrics_peers);
    if let Some(address) = args.serving.metrics_addr {
        metrics::serve(address, metrics.clone(), board.clone(), cancel.clone());
    }
    let telling = tokio::spawn(notify::attend(&board, pulse.clone(), cancel.clone()));
    let outcome = live(args, board, pulse, metrics, cancel.clone()).await;
    cancel.cancel();
    if let Err(error) = telling.await {
        tracing::error!(%error, "the task that informs the service manager ended");
    }
    outcome
}

async fn live(
    args: &Args,
    board: Board,
    pulse: Pulse,
    metrics: Metrics,
    cancel: CancellationToken,
) -> Result<(), StartError> {
    args.check().map_err(StartError::Flags)?;
    let mut args = args.clone();
    let net = Netlink::open()?;
    let mut opened = None;
    if args.kube.kube_subnet_mgr {
        // Before the uplink is chosen: the Node object may say which address it has.
        let opening = cluster::open(&mut args, &board);
        match cancel.run_until_cancelled(opening).await.transpose()? {
            Some(found) => opened = Some(found),
            None => return Ok(()),
        }
    }
    let args = &args;
    // Most networks are of IPv4: then it is known before the configuration, which may have to be waited for.
    let early = find_uplink(args, &net, &[Family::V4]).await;
    if let Ok(Selection { uplink, notes }) = &early {
        announce_uplink(args, uplink, notes);
        board.settle(Part::Uplink);
    }
    let (store, text, conf) = match opened {
        Some(opened) => opened,
        None => match cancel.run_until_cancelled(open(args, &board)).await {
            Some(opened) => opened?,
            None => return Ok(()),
        },
    };
    let families = conf.families();
    let uplink = if families == [Family::V4] {
        early?.uplink
    } else {
        let Selection { uplink, notes } = find_uplink(args, &net, &families).await?;
        announce_uplink(args, &uplink, &notes);
        board.settle(Part::Uplink);
        uplink
    };
    let mut setting = Setting { conf, uplink };
    let origin = store.describe();
    let checked = setting.check(&origin)?;
    for warning in setting.warnings() {
        tracing::warn!("{warning}");
    }
    if !Capabilities::effective().may_configure() {
        return Err(StartError::NoPrivilege);
    }
    bridge_netfilter::ensure(&setting.conf).await;
    match setting.conf.backend.kind {
        BackendKind::Vxlan | BackendKind::HostGw => {}
        kind @ (BackendKind::Alloc | BackendKind::Wireguard) => {
            let node = Node {
                args,
                net,
                origin,
                macs: BTreeMap::new(),
                board,
                metrics,
            };
            let store = (store, text);
            return if kind == BackendKind::Alloc {
                Box::pin(alloc::run(&node, &setting, store, &cancel)).await
            } else {
                Box::pin(wireguard::live(node, store, setting, pulse, cancel)).await
            };
        }
    }
    let identity = setting.identity();
    let mut macs = BTreeMap::new();
    for (family, checked) in families.iter().zip(&checked) {
        let choosing = choose_mac(&net, &store, (&checked.device, *family), &identity);
        match cancel.run_until_cancelled(choosing).await.transpose()? {
            Some(mac) => macs.insert(*family, mac),
            None => return Ok(()),
        };
    }
    let node = Node {
        args,
        net,
        origin,
        macs,
        board,
        metrics: metrics.clone(),
    };
    let mut up = node.bring_up(&setting, None).await?;
    former::retire(&node.net, &args.subnet_file, &setting).await;
    let previous = previous_subnet(&args.subnet_file);
    let offer = setting.offer(&node.macs, previous);
    let (conf_store, attending) = (store.twin(), store.twin());
    let Some(leasing) = Leasing::start(store, offer, &node.board, &cancel).await? else {
        return Ok(());
    };
    if let Store::Kube(kube) = attending {
        tokio::spawn(kube.attend(node.board.clone(), cancel.clone()));
    }
    let mut settings = follow::start(
        &node,
        &setting,
        (conf_store, text),
        leasing.views(),
        &cancel,
    );
    let ready = Readiness::new(
        args.subnet_file.clone(),
        args.firewall.ip_masq,
        node.board.clone(),
        pulse,
        metrics,
    );
    let calls = cni_socket::serve(&args.cni_socket(), node.board.clone(), cancel.clone());
    let mut calls = Calls::split(calls, families.len());
    let mut first = true;
    let mut ascent = Ascent::default();
    loop {
        let sources = (leasing.views(), &mut settings);
        let session = node.session(
            &setting,
            up,
            (&ready, &mut calls),
            sources,
            &mut ascent,
            &cancel,
        );
        match Box::pin(session).await {
            Ok(Ended::Cancelled) => break,
            Ok(Ended::Outdated) => {}
            Err(error) if first => return Err(error),
            Err(error) => tracing::error!(error = chain(&error), "set the node up anew"),
        }
        first = false;
        let without = ascent.fallen.as_deref();
        match set_up_again(
            &node,
            (&mut setting, without),
            &mut settings,
            &leasing,
            &cancel,
        )
        .await
        {
            Some(again) => up = again,
            None => break,
        }
    }
    leasing.end().await;
    Ok(())
}

/// Opens the lease store and reads the configuration, however long that takes.
async fn open(args: &Args, board: &Board) -> Result<(Store, String, NetConf), StartError> {
    files::check_writable(&args.subnet_file)?;
    if let Some(dir) = &args.lease_dir {
        files::check_lease_dir(dir)?;
    }
    let store = Store::open(&args.store()).await?;
    tracing::info!(store = store.describe(), "lease store");
    let (text, conf) = net_conf(&store, board).await?;
    board.settle(Part::Config);
    Ok((store, text, conf))
}

/// Points the desired state at this node's own subnet.
pub(crate) fn set_own(desired: &mut Desired, key: &SubnetKey) {
    let network = desired.network();
    let own = network.and_then(|network| own_of(key, Family::of_net(&network)));
    desired.own = own.into_iter().collect();
    if let Some(tunnel) = &mut desired.tunnel {
        tunnel.address = own.map(|subnet| IpNet::from(subnet.network()));
    }
}

/// The subnet of a family.
pub(crate) fn own_of(key: &SubnetKey, family: Family) -> Option<IpNet> {
    match family {
        Family::V4 => key.v4.map(IpNet::V4),
        Family::V6 => key.v6.map(IpNet::V6),
    }
}

/// Sets the node up for the newest setting. What was in place goes on carrying traffic until that has worked. `None` when cancelled.
async fn set_up_again(
    node: &Node<'_>,
    (setting, without): (&mut Setting, Option<&str>),
    settings: &mut watch::Receiver<Setting>,
    leasing: &Leasing,
    cancel: &CancellationToken,
) -> Option<Vec<Up>> {
    let mut said = None;
    loop {
        let newest = settings.borrow_and_update().clone();
        if newest.uplink != setting.uplink {
            announce_uplink(node.args, &newest.uplink, &[]);
        }
        *setting = newest;
        match cancel
            .run_until_cancelled(node.bring_up(setting, without))
            .await?
        {
            Ok(up) => {
                leasing.offer(setting.offer(&node.macs, None));
                return Some(up);
            }
            Err(error) => {
                let text = chain(&error);
                if said.as_ref() != Some(&text) {
                    tracing::error!(error = text, "set the node up anew, trying again");
                    node.board.lack(Part::Datapath, text.clone());
                    said = Some(text);
                }
            }
        }
        tokio::select! {
            () = cancel.cancelled() => return None,
            () = sleep(SET_UP_RETRY) => {}
            Ok(()) = settings.changed() => {}
        }
    }
}

/// Which interface the flags ask for, among those that are there now, and how it was found.
pub(crate) async fn find_uplink(
    args: &Args,
    net: &Netlink,
    families: &[Family],
) -> Result<Selection, StartError> {
    let wanted = args.wanted();
    let found = net.uplinks(&wanted).await?;
    Ok(iface::choose(
        &found.links,
        &found.routes,
        &wanted,
        families.contains(&Family::V4),
        families.contains(&Family::V6),
    )?)
}

/// Says which uplink it is, in upstream's lines.
fn announce_uplink(args: &Args, uplink: &Uplink, notes: &[Note]) {
    for note in notes {
        match note {
            Note::Info(text) => tracing::info!("{}", one_line(text)),
            Note::Warning(text) => tracing::warn!("{text}"),
        }
    }
    let mut lines = uplink.announcement(&args.wanted()).into_iter();
    tracing::info!(
        mtu = uplink.mtu,
        reason = uplink.reason,
        "{}",
        lines.next().unwrap_or_default()
    );
    for line in lines {
        tracing::info!("{line}");
    }
}

/// The network configuration, as text and as read. A store that cannot be reached, or has none yet, is asked again. A wrong one in a
/// file is an error; in etcd it is waited for until somebody has mended it, as upstream does, but for a backend that is none of ours.
async fn net_conf(store: &Store, board: &Board) -> Result<(String, NetConf), StartError> {
    let mut reported = None;
    loop {
        let trouble = match store.net_conf().await {
            Ok(text) => match store.read_conf(&text) {
                Ok(conf) => {
                    for line in conf.announcement() {
                        tracing::info!("{}", one_line(&line));
                    }
                    return Ok((text, conf));
                }
                Err(source)
                    if matches!(store, Store::Dir(_) | Store::Kube(_))
                        || matches!(source, ConfigError::UnknownBackend { .. }) =>
                {
                    return Err(StartError::Config {
                        origin: store.conf_origin(),
                        source,
                    });
                }
                Err(source) => {
                    let trouble = one_line(&source.to_string());
                    if reported.as_ref() != Some(&trouble) {
                        tracing::error!(
                            store = store.describe(),
                            "Couldn't fetch network config: {trouble}; waiting until it is mended"
                        );
                    }
                    trouble
                }
            },
            Err(error) if error.kind() == ErrorKind::Retry => {
                let trouble = chain(&error);
                if !error.is_logged() && reported.as_ref() != Some(&trouble) {
                    tracing::warn!("Couldn't fetch network config: {trouble}; trying again");
                }
                trouble
            }
            Err(error) => return Err(error.into()),
        };
        board.lack(Part::Config, trouble.clone());
        reported = Some(trouble);
        sleep(STORE_RETRY).await;
    }
}

/// An existing device is adopted with its MAC, which peers know. Without one, the MAC of our stored lease saves every peer an
/// update; without that, a new one. A store that does not answer is asked again: a guess would cost every peer that update.
async fn choose_mac(
    net: &Netlink,
    store: &Store,
    (name, family): (&str, Family),
    identity: &flannel_core::acquire::Identity,
) -> Result<VtepMac, StartError> {
    let stand_in = mark::stand_in(name).map(|(name, _)| name);
    for name in std::iter::once(name).chain(stand_in.as_deref()) {
        if let Some(device) = net.device(name, family).await?
            && matches!(
                device.kind,
                ObservedKind::Vxlan { .. } | ObservedKind::Veth { .. }
            )
        {
            return Ok(device.mac);
        }
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
        sleep(STORE_RETRY).await;
    };
    let stored = stored.and_then(|lease| lease.attrs.vxlan(family));
    if let Some(data) = stored {
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
        tracing::warn!(file = %subnet_file.display(), "error reading subnet: {warning}");
    }
    let (v4, v6) = (previous.subnet, previous.ipv6_subnet);
    (v4.is_some() || v6.is_some()).then_some(SubnetKey { v4, v6 })
}
