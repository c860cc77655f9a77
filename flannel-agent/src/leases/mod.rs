//! Where this node's subnet and the list of all other nodes come from: the Kubernetes API, etcd, or a directory of lease files.
//!
//! A store keeps this node's lease alive and publishes what it knows as a [`View`]. It decides nothing about the
//! kernel, and it never publishes less than it knows: an outage, a compacted history or an unreadable key leaves the
//! last complete [`Snapshot`] in force.

mod conf_file;
mod dir;
mod error;
mod etcd;
mod kube;
mod retry;
mod table;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use flannel_core::{
    acquire::{Choice, Decision, Identity},
    config::{ConfigError, NetConf},
    lease::{Lease, LeaseAttrs, SubnetKey},
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

pub use self::{
    dir::{DEFAULT_RESCAN, DirLeases, DirOptions},
    error::{ErrorKind, LeaseError},
    etcd::{DEFAULT_PREFIX, DEFAULT_RENEW_MARGIN, DEFAULT_TTL, EtcdLeases, EtcdOptions},
    kube::{DEFAULT_PATIENCE, KubeLeases, KubeOptions, NodeAddresses, Origin},
};

/// Changes that come together are read and published together.
const COALESCE: Duration = Duration::from_millis(20);

/// All that a store knows, as of one revision. Complete: never half a list. This node's own lease is included.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Snapshot {
    /// The leases by subnet.
    pub leases: BTreeMap<SubnetKey, LeaseAttrs>,
}

/// Which store to use.
#[derive(Clone, Debug)]
pub enum StoreConfig {
    /// etcd, version 3 API.
    Etcd(EtcdOptions),
    /// A directory of lease files.
    Dir(DirOptions),
    /// The Kubernetes API.
    Kube(Box<KubeOptions>),
}

/// What this node asks for and what it publishes.
#[derive(Clone, Debug, PartialEq)]
pub struct Offer {
    /// The network configuration.
    pub conf: NetConf,
    /// By what this node recognises its own lease.
    pub identity: Identity,
    /// What is published under the subnet.
    pub attrs: LeaseAttrs,
    /// The subnet held before the last restart, preferred while nobody else has it.
    pub previous: Option<SubnetKey>,
}

/// How a lease came about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The store already had a lease for our public address.
    Reused,
    /// The subnet of the time before the restart was still free.
    Previous,
    /// A free subnet was picked.
    New,
}

/// The lease of this node, and what is needed to keep it.
#[derive(Clone, Debug)]
pub struct Held {
    /// The lease as published.
    pub lease: Lease,
    /// How it came about.
    pub outcome: Outcome,
    /// Present when the lease lives in etcd.
    grip: Option<etcd::Grip>,
}

/// What a store publishes.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct View {
    /// This node's lease; while it is being replaced, the one before.
    pub own: Option<Lease>,
    /// `None` until the first complete list.
    pub snapshot: Option<Arc<Snapshot>>,
    /// Whether changes in the store are being seen at this moment.
    pub connected: bool,
    /// The last failure, cleared when it is over.
    pub last_error: Option<String>,
}

/// A lease store.
#[derive(Debug)]
pub enum Store {
    /// etcd, version 3 API.
    Etcd(EtcdLeases),
    /// A directory of lease files.
    Dir(DirLeases),
    /// The Kubernetes API.
    Kube(KubeLeases),
}

impl Store {
    /// Checks the options. Does not wait for the store: an unreachable one shows in the first request.
    pub async fn open(config: &StoreConfig) -> Result<Store, LeaseError> {
        match config {
            StoreConfig::Etcd(options) => EtcdLeases::open(options).await.map(Store::Etcd),
            StoreConfig::Dir(options) => Ok(Store::Dir(DirLeases::open(options))),
            StoreConfig::Kube(options) => KubeLeases::open(options).await.map(Store::Kube),
        }
    }

    /// Another handle to the same store, for a task that only reads.
    #[must_use]
    pub fn twin(&self) -> Store {
        match self {
            Store::Etcd(store) => Store::Etcd(store.twin()),
            Store::Dir(store) => Store::Dir(store.twin()),
            Store::Kube(store) => Store::Kube(store.twin()),
        }
    }

    /// Names the store in log lines, without secrets: `etcd http://10.0.0.1:2379 prefix /coreos.com/network`.
    pub fn describe(&self) -> String {
        match self {
            Store::Etcd(store) => store.describe(),
            Store::Dir(store) => store.describe(),
            Store::Kube(store) => store.describe(),
        }
    }

    /// Where the network configuration comes from, for a complaint about it.
    pub fn conf_origin(&self) -> String {
        match self {
            Store::Etcd(_) | Store::Dir(_) => self.describe(),
            Store::Kube(store) => store.conf_origin(),
        }
    }

    /// Reads a text of the network configuration. Where the cluster gives out subnets itself, what the text says of their range and
    /// length is not looked at.
    pub fn read_conf(&self, text: &str) -> Result<NetConf, ConfigError> {
        match self {
            Store::Etcd(_) | Store::Dir(_) => NetConf::parse(text),
            Store::Kube(_) => NetConf::parse_assigned(text),
        }
    }

    /// Reads the text of the network configuration: `<prefix>/config`, the file `<dir>/config`, or `--net-config-path`.
    pub async fn net_conf(&self) -> Result<String, LeaseError> {
        match self {
            Store::Etcd(store) => store.net_conf().await,
            Store::Dir(store) => store.net_conf().await,
            Store::Kube(store) => store.net_conf().await,
        }
    }

    /// Waits until the text of the network configuration differs from `known`, and returns it: for ever if nobody changes it. A store
    /// that cannot be reached is asked again, and a configuration that was removed is no other one. May be dropped at any time.
    pub async fn net_conf_after(&self, known: &str) -> String {
        match self {
            Store::Etcd(store) => store.net_conf_after(known).await,
            Store::Dir(store) => store.net_conf_after(known).await,
            Store::Kube(store) => store.net_conf_after(known).await,
        }
    }

    /// Looks up the lease stored for our public address, so that a new device can take over its MAC address.
    pub async fn own_stored(&self, us: &Identity) -> Result<Option<Lease>, LeaseError> {
        match self {
            Store::Etcd(store) => store.own_stored(us).await,
            Store::Dir(store) => store.own_stored(us).await,
            Store::Kube(store) => store.own_stored(us).await,
        }
    }

    /// Reads the list of all leases, once.
    pub async fn list(&self) -> Result<Snapshot, LeaseError> {
        match self {
            Store::Etcd(store) => store.snapshot().await,
            Store::Dir(store) => store.snapshot().await,
            Store::Kube(store) => store.snapshot().await,
        }
    }

    /// Takes a lease. A race lost against another node is tried again with a fresh list; every other failure,
    /// a full network included, is returned.
    pub async fn acquire(&self, offer: &Offer) -> Result<Held, LeaseError> {
        match self {
            Store::Etcd(store) => store.acquire(offer).await,
            Store::Dir(store) => store.acquire(offer).await,
            Store::Kube(store) => store.acquire(offer).await,
        }
    }

    /// Takes a lease, trying for as long as the failure is one that may go away. Each kind of trouble is one line in
    /// the log. `None` when cancelled.
    pub async fn acquire_until(
        &self,
        offer: &Offer,
        cancel: &CancellationToken,
    ) -> Option<Result<Held, LeaseError>> {
        self.acquire_telling(offer, cancel, |_trouble| {}).await
    }

    /// Like [`Store::acquire_until`], telling each trouble to whoever asks for it later.
    pub async fn acquire_telling(
        &self,
        offer: &Offer,
        cancel: &CancellationToken,
        tell: impl Fn(&str) + Send + Sync,
    ) -> Option<Result<Held, LeaseError>> {
        if let Store::Kube(store) = self {
            // Most of what it waits for comes as an event, not by asking again.
            let acquired = store.acquire_telling(offer, &tell);
            return cancel.run_until_cancelled(acquired).await.map(Ok);
        }
        cancel
            .run_until_cancelled(async {
                let mut backoff = retry::Backoff::new();
                let mut reported = None;
                loop {
                    match self.acquire(offer).await {
                        Ok(held) => return Ok(held),
                        Err(error) if error.kind() == ErrorKind::Config => return Err(error),
                        Err(error) => {
                            let text = error.chain();
                            tell(&text);
                            if !error.is_logged() && reported.as_ref() != Some(&text) {
                                tracing::warn!(error = text, "no lease yet, trying again");
                                reported = Some(text);
                            }
                        }
                    }
                    tokio::time::sleep(backoff.next_wait()).await;
                }
            })
            .await
    }

    /// Runs until cancelled: keeps the lease, publishes a changed offer under the same subnet, takes another lease
    /// when the own one is lost, and publishes what the store knows. Leaves the lease in the store at the end.
    pub async fn run(
        self,
        held: Held,
        offer: watch::Receiver<Offer>,
        out: watch::Sender<View>,
        cancel: CancellationToken,
    ) {
        let work = async {
            match &self {
                Store::Etcd(store) => store.run(held, offer, &out).await,
                Store::Dir(store) => store.run(held, offer, &out).await,
                Store::Kube(store) => store.run(held, offer, &out).await,
            }
        };
        // Every step can be cut short: the store sees whole requests only, and nothing is given back at the end.
        if cancel.run_until_cancelled(work).await.is_none() {
            tracing::debug!("lease store stopped");
        }
    }
}

/// Writes a view if it differs from the one before.
fn publish(out: &watch::Sender<View>, view: View) {
    out.send_if_modified(|current| {
        let changed = *current != view;
        if changed {
            *current = view;
        }
        changed
    });
}

/// Says in upstream's words, and in those of flannel up to 0.7.1 that scripts still look for, that there is a lease.
fn log_acquired(held: &Held, us: &Identity) {
    let key = &held.lease.key;
    let v4 = key.v4.map(|net| net.to_string());
    let v6 = key.v6.map(|net| net.to_string());
    let name = |net: Option<&String>| net.map_or("none", String::as_str).to_owned();
    let (ip, ipv6) = (name(v4.as_ref()), name(v6.as_ref()));
    let node = match (us.public_ip, us.public_ipv6) {
        (Some(ip), _) => ip.to_string(),
        (None, Some(ip)) => ip.to_string(),
        (None, None) => "unknown".to_owned(),
    };
    match held.outcome {
        Outcome::Reused => {
            tracing::info!("Found lease (ip: {ip} ipv6: {ipv6}) for current IP ({node}), reusing");
        }
        Outcome::Previous => {
            let subnet = name(v4.as_ref().or(v6.as_ref()));
            tracing::info!("Found previously leased subnet ({subnet}), reusing");
        }
        Outcome::New => {
            tracing::info!("Allocated lease (ip: {ip} ipv6: {ipv6}) to current node ({node})");
        }
    }
    let subnets: Vec<String> = v4.into_iter().chain(v6).collect();
    tracing::info!("Lease acquired: {}", subnets.join(" "));
}

/// The subnet to try for. Of several candidates one is drawn, so that nodes that start together seldom collide.
fn pick(choice: &Choice) -> Result<(SubnetKey, Outcome), LeaseError> {
    match choice {
        Choice::Reuse { key, .. } => Ok((*key, Outcome::Reused)),
        Choice::Previous { key } => Ok((*key, Outcome::Previous)),
        Choice::Pick { candidates } => candidates
            .get(retry::random_below(candidates.len()))
            .map(|key| (*key, Outcome::New))
            .ok_or(LeaseError::NoCandidate),
    }
}

/// Logs what the acquisition decision found strange, and returns it; `known` was logged before.
fn log_decision(decision: Decision, offer: &Offer, known: &[String]) -> Vec<String> {
    let mut lines = decision.warnings;
    if let Some((key, _)) = decision.drop_incompatible {
        lines.push(format!(
            "Found lease ({key}) for current IP ({}) but not compatible with current config, deleting",
            addresses(&offer.attrs)
        ));
    }
    for line in lines.iter().filter(|line| !known.contains(line)) {
        tracing::warn!("{line}");
    }
    lines
}

/// Whether a stored lease belongs to the node that `us` describes.
fn is_ours(attrs: &LeaseAttrs, us: &Identity) -> bool {
    match attrs.public_ip {
        Some(ip) => us.public_ip == Some(ip),
        None => us.public_ipv6.is_some() && attrs.public_ipv6 == us.public_ipv6,
    }
}

/// The public addresses of a lease, for a log line.
fn addresses(attrs: &LeaseAttrs) -> String {
    match (attrs.public_ip, attrs.public_ipv6) {
        (Some(v4), Some(v6)) => format!("{v4} {v6}"),
        (Some(v4), None) => v4.to_string(),
        (None, Some(v6)) => v6.to_string(),
        (None, None) => "no readable address".to_owned(),
    }
}
