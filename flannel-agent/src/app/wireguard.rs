//! The life of a node whose backend is wireguard: no eBPF, no tunnel device of ours but the kernel's own.

use std::{collections::BTreeSet, path::Path};

use flannel_core::{
    addr::Family,
    config::{BackendKind, WireguardMode, tunnel_mtu},
    key::{PublicKey, SecretKey},
    lease::{LeaseAttrs, SubnetKey, WireguardData},
    subnet_env,
};
use ipnet::IpNet;
use tokio::{sync::watch, time::sleep};
use tokio_util::sync::CancellationToken;

use super::{
    SET_UP_RETRY, StartError, announce_uplink, follow, former,
    leasing::Leasing,
    previous_subnet,
    session::{Ended, Node, Setting, another_subnet, own_subnet},
};
use crate::{
    health::{Part, Pulse},
    leases::{Offer, Store, View},
    masquerade,
    telemetry::chain,
    wireguard::{Keeper, Kernel, Site},
};

/// Runs until cancelled.
pub(super) async fn live(
    node: Node<'_>,
    (store, text): (Store, String),
    mut setting: Setting,
    pulse: Pulse,
    cancel: CancellationToken,
) -> Result<(), StartError> {
    let mut kernel = Kernel::open(node.net.for_another_task()).await?;
    let private = Kernel::private_key()?;
    let mut site = site(&node, &setting, &private)?;
    let mut public = site.bring_up(&mut kernel).await?;
    tracing::info!(key = %public, "WireGuard's public key");
    let previous = previous_subnet(&node.args.subnet_file);
    let (conf_store, attending) = (store.twin(), store.twin());
    let offer = offer(&setting, public, previous);
    let Some(leasing) = Leasing::start(store, offer, &node.board, &cancel).await? else {
        return Ok(());
    };
    if let Store::Kube(kube) = attending {
        tokio::spawn(kube.attend(node.board.clone(), cancel.clone()));
    }
    former::retire(&node.net, &node.args.subnet_file, &setting).await;
    let followed = (conf_store, text);
    let mut settings = follow::start(&node, &setting, followed, leasing.views(), &cancel);
    loop {
        let ours = (&mut kernel, public);
        let sources = (leasing.views(), &mut settings);
        let ended = session(&node, &site, ours, sources, pulse.clone(), &cancel).await;
        if ended == Ended::Cancelled {
            break;
        }
        let again = set_up_again(&node, &mut setting, &mut settings, (&mut kernel, &private));
        match cancel.run_until_cancelled(again).await {
            Some((new_site, new_public)) => (site, public) = (new_site, new_public),
            None => break,
        }
        leasing.offer(self::offer(&setting, public, None));
    }
    leasing.end().await;
    Ok(())
}

/// Keeps the node as it is to be until that changes, or until cancelled.
async fn session(
    node: &Node<'_>,
    site: &Site,
    ours: (&mut Kernel, PublicKey),
    (mut views, settings): (watch::Receiver<View>, &mut watch::Receiver<Setting>),
    pulse: Pulse,
    cancel: &CancellationToken,
) -> Ended {
    let session = cancel.child_token();
    // Its tasks end with it, however it ends.
    let _tasks = session.clone().drop_guard();
    let own = own_subnet(&views);
    if let Some(own) = &own {
        // Before `subnet.env`, as upstream has it.
        let wanted = masquerade::Wanted::from_args(node.args, &site.conf, own);
        masquerade::start(wanted, node.board.clone(), session.clone()).await;
    }
    let keeper = Keeper::new(
        node.args,
        site,
        ours,
        node.origin.clone(),
        views.clone(),
        (node.board.clone(), pulse, node.metrics.clone()),
    );
    let outdated = async {
        tokio::select! {
            Ok(()) = settings.changed() => {}
            () = another_subnet(&mut views, own) => {}
            () = session.cancelled() => {}
        }
        // The loop ends between two changes, never within one.
        session.cancel();
    };
    tokio::join!(keeper.run(session.clone()), outdated);
    if cancel.is_cancelled() {
        Ended::Cancelled
    } else {
        Ended::Outdated
    }
}

/// Sets the node up for the newest setting, however long that takes. What was in place goes on carrying traffic until then.
async fn set_up_again(
    node: &Node<'_>,
    setting: &mut Setting,
    settings: &mut watch::Receiver<Setting>,
    (kernel, private): (&mut Kernel, &SecretKey),
) -> (Site, PublicKey) {
    let mut said = None;
    loop {
        let newest = settings.borrow_and_update().clone();
        if newest.uplink != setting.uplink {
            announce_uplink(node.args, &newest.uplink, &[]);
        }
        *setting = newest;
        let trouble = match site(node, setting, private) {
            Ok(site) => match site.bring_up(kernel).await {
                Ok(public) => return (site, public),
                Err(error) => chain(&error),
            },
            Err(error) => chain(&error),
        };
        if said.as_ref() != Some(&trouble) {
            tracing::error!(error = trouble, "set the node up anew, trying again");
            node.board.lack(Part::Datapath, trouble.clone());
            said = Some(trouble);
        }
        tokio::select! {
            () = sleep(SET_UP_RETRY) => {}
            Ok(()) = settings.changed() => {}
        }
    }
}

fn site(node: &Node<'_>, setting: &Setting, private: &SecretKey) -> Result<Site, StartError> {
    setting.check(&node.origin)?;
    let mtu = tunnel_mtu(&setting.conf, setting.uplink.mtu);
    Ok(Site {
        conf: setting.conf.clone(),
        uplink: setting.uplink.clone(),
        private: private.clone(),
        mtu: mtu.map_err(|source| StartError::Config {
            origin: node.origin.clone(),
            source,
        })?,
        former: former(&node.args.subnet_file),
    })
}

/// The networks of an earlier start.
fn former(subnet_file: &Path) -> BTreeSet<IpNet> {
    let text = std::fs::read_to_string(subnet_file).unwrap_or_default();
    let previous = subnet_env::parse_previous(&text);
    let v4 = previous.network.map(IpNet::V4);
    v4.into_iter()
        .chain(previous.ipv6_network.map(IpNet::V6))
        .collect()
}

/// What this node asks for and publishes.
fn offer(setting: &Setting, public_key: PublicKey, previous: Option<SubnetKey>) -> Offer {
    let (conf, identity) = (&setting.conf, setting.identity());
    let wireguard = &conf.backend.wireguard;
    let data = |family| {
        let port = match (wireguard.mode, family) {
            (WireguardMode::Separate, Family::V6) => wireguard.port_v6,
            _ => wireguard.port,
        };
        WireguardData { public_key, port }.into()
    };
    Offer {
        conf: conf.clone(),
        identity,
        attrs: LeaseAttrs {
            public_ip: identity.public_ip,
            public_ipv6: identity.public_ipv6,
            backend_type: BackendKind::Wireguard.lease_type().to_owned(),
            v4: conf.enable_ipv4.then(|| data(Family::V4)),
            v6: conf.enable_ipv6.then(|| data(Family::V6)),
        },
        previous,
    }
}
