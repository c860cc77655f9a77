//! Following what a setting is made from while the daemon runs: the uplink's address and MTU, and the network configuration.
//!
//! The uplink is chosen once. Afterwards its interface is followed, not the default route: a VPN that takes the default route for an
//! hour must not take the overlay with it. Only when the interface cannot carry the overlay any more is another one looked for.

use std::{sync::Arc, time::Duration};

use flannel_core::{
    addr::Family,
    config,
    iface::{self, Uplink, Wanted},
};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{Node, Setting, StartError, cluster};
use crate::{
    dataplane::netlink::{self, Change, Netlink},
    leases::{Store, View},
    telemetry::{chain, one_line},
};

/// Changes that come together are looked at together: a DHCP client removes an address before it adds the next.
const COALESCE: Duration = Duration::from_millis(500);
/// How often the uplink is looked at, whatever the notifications said.
const RESYNC: Duration = Duration::from_secs(10);
/// How long the interface may be unusable before another one takes its place.
const PATIENCE: Duration = Duration::from_secs(15);
/// Notifications that may wait.
const BACKLOG: usize = 64;

/// Starts to follow. The receiver sees every setting that is to be put in place.
pub(super) fn start(
    node: &Node<'_>,
    setting: &Setting,
    (store, text): (Store, String),
    views: watch::Receiver<View>,
    cancel: &CancellationToken,
) -> watch::Receiver<Setting> {
    let (settings, out) = watch::channel(setting.clone());
    let settings = Arc::new(settings);
    let uplink = Follower {
        wanted: node.args.wanted(),
        net: node.net.for_another_task(),
        settings: Arc::clone(&settings),
        unusable: None,
    };
    if matches!(store, Store::Kube(_)) {
        let cluster = cluster::Follower {
            views,
            settings: Arc::clone(&settings),
            board: node.board.clone(),
        };
        let cancel = cancel.clone();
        tokio::spawn(async move { cancel.run_until_cancelled(cluster.run()).await });
    }
    let conf = ConfFollower {
        store,
        known: text,
        settings,
    };
    let (one, other) = (cancel.clone(), cancel.clone());
    tokio::spawn(async move { one.run_until_cancelled(uplink.run()).await });
    tokio::spawn(async move { other.run_until_cancelled(conf.run()).await });
    out
}

/// Follows the network configuration.
#[derive(Debug)]
struct ConfFollower {
    store: Store,
    /// The text as it was last seen.
    known: String,
    settings: Arc<watch::Sender<Setting>>,
}

impl ConfFollower {
    async fn run(mut self) {
        loop {
            let text = self.store.net_conf_after(&self.known).await;
            self.take(&text, &self.store.describe());
            self.known = text;
        }
    }

    /// Applies what can be applied, and says what cannot.
    fn take(&self, text: &str, origin: &str) {
        const GOING_ON: &str = "going on with the network config as it was";
        let mut new = match self.store.read_conf(text) {
            Ok(new) => new,
            Err(error) => {
                tracing::error!(
                    error = one_line(&error.to_string()),
                    "the network config has changed and cannot be used: {GOING_ON}"
                );
                return;
            }
        };
        let setting = self.settings.borrow().clone();
        if matches!(self.store, Store::Kube(_)) {
            // Not from the text, but from the nodes.
            for family in setting.conf.families() {
                if let Some((_, len)) = setting.conf.range(family) {
                    cluster::set_len(&mut new, family, len);
                }
            }
        }
        let changed = Setting {
            conf: new,
            uplink: setting.uplink,
        };
        match config::change(&setting.conf, &changed.conf) {
            config::Change::Same => {}
            config::Change::Restart(reasons) => {
                for reason in reasons {
                    tracing::warn!(
                        "the network config has changed: {reason}: restart the agent to take it up; {GOING_ON}"
                    );
                }
            }
            config::Change::Live => match changed.check(origin) {
                Ok(_) => {
                    tracing::info!("the network config has changed: applying it");
                    for warning in changed.warnings() {
                        tracing::warn!("{warning}");
                    }
                    self.settings
                        .send_modify(|setting| setting.conf = changed.conf);
                }
                Err(error) => tracing::error!(
                    error = one_line(&chain(&error)),
                    "the network config has changed and cannot be used: {GOING_ON}"
                ),
            },
        }
    }
}

/// Follows the uplink.
#[derive(Debug)]
struct Follower {
    /// What the operator asked for.
    wanted: Wanted,
    net: Netlink,
    settings: Arc<watch::Sender<Setting>>,
    /// Since when the interface cannot be used, and why.
    unusable: Option<(Instant, String)>,
}

impl Follower {
    async fn run(mut self) {
        let (notify, mut changes) = mpsc::channel(BACKLOG);
        for family in self.settings.borrow().conf.families() {
            tokio::spawn(watch_kernel(notify.clone(), family));
        }
        loop {
            self.look().await;
            // A silent stretch, or the first notification and what comes with it.
            let news = async {
                while let Some(change) = changes.recv().await {
                    if !matches!(change, Change::Neighbour(_) | Change::Route) {
                        return;
                    }
                }
            };
            if timeout(RESYNC, news).await.is_ok() {
                sleep(COALESCE).await;
                while changes.try_recv().is_ok() {}
            }
        }
    }

    async fn look(&mut self) {
        let current = self.settings.borrow().uplink.clone();
        match self.find(&current).await {
            Ok(uplink) => {
                if self.unusable.take().is_some() {
                    tracing::info!(interface = uplink.name, "the uplink can be used again");
                }
                if !iface::is_same(&uplink, &current) {
                    self.settings.send_modify(|setting| setting.uplink = uplink);
                }
            }
            Err(error) => {
                let why = chain(&error);
                let (since, said) = self
                    .unusable
                    .take()
                    .unwrap_or_else(|| (Instant::now(), String::new()));
                if said != why {
                    tracing::warn!(
                        interface = current.name,
                        error = why,
                        "the uplink cannot be used at the moment; the data path stays as it is"
                    );
                }
                self.unusable = Some((since, why));
            }
        }
    }

    /// The uplink as it is now, or another one if it has been unusable for long.
    async fn find(&self, current: &Uplink) -> Result<Uplink, StartError> {
        let found = self.net.uplinks(&self.wanted).await?;
        let families = self.settings.borrow().conf.families();
        let followed = iface::follow(&found.links, &found.routes, &self.wanted, current);
        let given_up = self
            .unusable
            .as_ref()
            .is_some_and(|(since, _)| since.elapsed() >= PATIENCE);
        match followed {
            Err(_) if given_up => Ok(iface::select(
                &found.links,
                &found.routes,
                &self.wanted,
                families.contains(&Family::V4),
                families.contains(&Family::V6),
            )?),
            followed => Ok(followed?),
        }
    }
}

/// Keeps a notification socket open.
async fn watch_kernel(out: mpsc::Sender<Change>, family: Family) {
    while !out.is_closed() {
        if let Err(error) = netlink::watch(out.clone(), family).await {
            tracing::debug!(
                error = chain(&error),
                "the uplink's notifications are interrupted"
            );
        }
        sleep(RESYNC).await;
    }
}
