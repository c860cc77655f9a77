//! Leases in etcd, version 3 API, with the keys and values of upstream flannel.
//!
//! Where upstream's behaviour loses traffic this store differs: every write of a key compares what it replaces, a
//! compacted history leads to a new complete list, one unreadable key hides nothing else, a lost lease is taken again,
//! and a reservation (a key without an etcd lease) stays one.

mod acquire;
mod conf;
mod connection;
mod keeper;
mod own;

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use etcd_client::{Client, GetOptions, KeyValue};
use flannel_core::{
    acquire::Identity,
    lease::{Lease, SubnetKey},
};
use tokio::{sync::watch, time::Instant};

use self::connection::Connection;
use super::{
    Held, LeaseError, Offer, Snapshot, View, is_ours,
    table::{Raw, Reported, Table},
};

/// flannel's default for `--etcd-prefix`.
pub const DEFAULT_PREFIX: &str = "/coreos.com/network";
/// How long a lease lives in etcd without being renewed, as upstream grants it.
pub const DEFAULT_TTL: Duration = Duration::from_hours(24);
/// flannel's default for `--subnet-lease-renew-margin`.
pub const DEFAULT_RENEW_MARGIN: Duration = Duration::from_hours(1);

/// After a watch that lasted this long the waits between reconnects start anew.
const PROVEN: Duration = Duration::from_secs(5);

/// A list of several thousand leases exceeds the 4 MiB that the client library takes by default.
const MAX_MESSAGE: usize = 256 << 20;

/// How to reach etcd and where flannel's keys are.
#[derive(Clone)]
pub struct EtcdOptions {
    /// `http://host:port` or `https://host:port`; elements may themselves be comma lists.
    pub endpoints: Vec<String>,
    /// What all keys start with; normalised as a path.
    pub prefix: String,
    /// The client's key, PEM.
    pub keyfile: Option<PathBuf>,
    /// The client's certificate, PEM.
    pub certfile: Option<PathBuf>,
    /// The certificate authorities that may sign the server's certificate, PEM; the system's when absent.
    pub cafile: Option<PathBuf>,
    /// User name for etcd's authentication.
    pub username: Option<String>,
    /// Password for etcd's authentication. Never printed.
    pub password: Option<String>,
    /// How long before its end a lease is renewed.
    pub renew_margin: Duration,
    /// How long a lease lives without being renewed: [`DEFAULT_TTL`] but in tests.
    pub ttl: Duration,
}

impl Default for EtcdOptions {
    fn default() -> Self {
        EtcdOptions {
            endpoints: vec![
                "http://127.0.0.1:4001".to_owned(),
                "http://127.0.0.1:2379".to_owned(),
            ],
            prefix: DEFAULT_PREFIX.to_owned(),
            keyfile: None,
            certfile: None,
            cafile: None,
            username: None,
            password: None,
            renew_margin: DEFAULT_RENEW_MARGIN,
            ttl: DEFAULT_TTL,
        }
    }
}

impl std::fmt::Debug for EtcdOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Endpoints may carry a password as well, in front of an `@`; such endpoints are refused later.
        let endpoints: Vec<&str> = self
            .endpoints
            .iter()
            .flat_map(|given| given.split(','))
            .map(|given| given.rsplit_once('@').map_or(given, |(_, host)| host))
            .collect();
        f.debug_struct("EtcdOptions")
            .field("endpoints", &endpoints)
            .field("prefix", &self.prefix)
            .field("keyfile", &self.keyfile)
            .field("certfile", &self.certfile)
            .field("cafile", &self.cafile)
            .field("username", &self.username)
            .field("password", &self.password.as_ref().map(|_| "<hidden>"))
            .field("renew_margin", &self.renew_margin)
            .field("ttl", &self.ttl)
            .finish()
    }
}

/// What ties this node to its key: everything needed to renew, to compare and to replace it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Grip {
    /// The revision of our last write.
    mod_revision: i64,
    /// The etcd lease that the key is bound to; `None` for a reservation, which does not expire.
    lease: Option<Granted>,
}

/// An etcd lease of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Granted {
    id: i64,
    /// How long it lives after a renewal.
    ttl: Duration,
    /// When it ends, counted from before the request, so never too late.
    expires: Instant,
}

/// A complete list of the keys below `<prefix>/subnets/`.
struct Listing {
    keys: Vec<Raw>,
    revision: i64,
    cluster: u64,
}

/// The lease store in etcd.
#[derive(Debug)]
pub struct EtcdLeases {
    connection: Arc<Connection>,
    prefix: String,
    ttl: Duration,
    renew_margin: Duration,
    reported: Reported,
    /// etcd leases of ours that perhaps no key is bound to, because an answer was lost.
    orphans: Mutex<Vec<i64>>,
}

impl EtcdLeases {
    pub(super) async fn open(options: &EtcdOptions) -> Result<Self, LeaseError> {
        Ok(EtcdLeases {
            connection: Arc::new(Connection::open(options).await?),
            prefix: clean_path(&options.prefix),
            ttl: options.ttl,
            renew_margin: options.renew_margin,
            reported: Reported::default(),
            orphans: Mutex::default(),
        })
    }

    /// Another view of the same store, over the same connection.
    pub(super) fn twin(&self) -> Self {
        EtcdLeases {
            connection: Arc::clone(&self.connection),
            prefix: self.prefix.clone(),
            ttl: self.ttl,
            renew_margin: self.renew_margin,
            reported: Reported::default(),
            orphans: Mutex::default(),
        }
    }

    pub(super) fn describe(&self) -> String {
        let endpoints = self.connection.describe();
        format!("etcd {endpoints} prefix {}", self.prefix)
    }

    pub(super) async fn net_conf(&self) -> Result<String, LeaseError> {
        let (text, _) = self.read_conf().await?;
        let key = self.key("config");
        text.ok_or(LeaseError::NoNetConf { key })
    }

    pub(super) async fn net_conf_after(&self, known: &str) -> String {
        conf::after(self, known).await
    }

    /// The network configuration, if there is one, and the revision of the store.
    async fn read_conf(&self) -> Result<(Option<String>, i64), LeaseError> {
        let key = self.key("config");
        let action = format!("read {key}");
        let answer = self
            .connection
            .call(&action, |mut client| {
                let key = key.clone();
                async move { client.get(key, None).await }
            })
            .await?;
        let revision = answer
            .header()
            .map_or(0, etcd_client::ResponseHeader::revision);
        let text = answer.kvs().first().map(|kv| self.conf_text(kv));
        Ok((text.transpose()?, revision))
    }

    fn conf_text(&self, kv: &KeyValue) -> Result<String, LeaseError> {
        String::from_utf8(kv.value().to_vec()).map_err(|_| LeaseError::NetConfText {
            location: self.key("config"),
        })
    }

    pub(super) async fn own_stored(&self, us: &Identity) -> Result<Option<Lease>, LeaseError> {
        let listing = self.list().await?;
        let table = Table::from_list(&listing.keys, &self.reported);
        let own = table
            .stored(|_| false)
            .into_iter()
            .map(|stored| stored.lease)
            .find(|lease| is_ours(&lease.attrs, us));
        Ok(own)
    }

    pub(super) async fn snapshot(&self) -> Result<Snapshot, LeaseError> {
        let listing = self.list().await?;
        Ok(Table::from_list(&listing.keys, &self.reported).snapshot(Instant::now()))
    }

    pub(super) async fn acquire(&self, offer: &Offer) -> Result<Held, LeaseError> {
        acquire::acquire(self, offer).await
    }

    pub(super) async fn run(
        &self,
        held: Held,
        offer: watch::Receiver<Offer>,
        out: &watch::Sender<View>,
    ) {
        keeper::run(self, held, offer, out).await;
    }

    /// `<prefix>/<name>`, joined as upstream joins: an empty prefix leaves no slash.
    fn key(&self, name: &str) -> String {
        match self.prefix.as_str() {
            "" => name.to_owned(),
            prefix if prefix.ends_with('/') => format!("{prefix}{name}"),
            prefix => format!("{prefix}/{name}"),
        }
    }

    /// `<prefix>/subnets/`. With its slash, so that keys such as `<prefix>/subnets-old/…` stay out.
    fn subnets(&self) -> String {
        self.key("subnets/")
    }

    fn key_of(&self, key: &SubnetKey) -> String {
        self.key(&format!("subnets/{key}"))
    }

    async fn list(&self) -> Result<Listing, LeaseError> {
        let subnets = self.subnets();
        let action = format!("list {subnets}");
        let answer = self
            .connection
            .call(&action, |client| {
                let subnets = subnets.clone();
                async move {
                    let mut kv = kv(&client);
                    kv.get(subnets, Some(GetOptions::new().with_prefix())).await
                }
            })
            .await?;
        let header = answer.header();
        Ok(Listing {
            keys: answer.kvs().iter().map(|kv| raw(kv, &subnets)).collect(),
            revision: header.map_or(0, etcd_client::ResponseHeader::revision),
            cluster: header.map_or(0, etcd_client::ResponseHeader::cluster_id),
        })
    }

    /// Asks for an etcd lease of the configured length.
    async fn grant(&self) -> Result<Granted, LeaseError> {
        let seconds = i64::try_from(self.ttl.as_secs()).unwrap_or(i64::MAX);
        let asked = Instant::now();
        let answer = self
            .connection
            .call("grant a lease", |mut client| async move {
                client.lease_grant(seconds, None).await
            })
            .await?;
        let ttl = seconds_of(answer.ttl());
        Ok(Granted {
            id: answer.id(),
            ttl,
            expires: asked + ttl,
        })
    }

    /// Gives back an etcd lease that no key of ours needs any more. If other keys are bound to it, it stays.
    /// A failure costs nothing but an unused lease until its end.
    async fn revoke_unused(&self, id: i64) {
        let action = format!("look up lease {id:x}");
        let options = || Some(etcd_client::LeaseTimeToLiveOptions::new().with_keys());
        let looked_up = self
            .connection
            .call(&action, |mut client| async move {
                client.lease_time_to_live(id, options()).await
            })
            .await;
        match looked_up {
            Ok(answer) if answer.ttl() > 0 && answer.keys().is_empty() => self.revoke(id).await,
            Ok(_) => {}
            Err(error) => tracing::debug!(error = %error.chain(), "an unused lease stays"),
        }
    }

    /// Sees to an etcd lease granted for a write that failed. Without an answer the write may have been executed:
    /// then the lease waits for [`Self::revoke_orphans`].
    async fn not_written(&self, error: &LeaseError, lease: Option<i64>) {
        if let (LeaseError::Answer { .. }, Some(id)) = (error, lease) {
            self.revoke(id).await;
        } else {
            let mut orphans = self.orphans.lock().unwrap_or_else(PoisonError::into_inner);
            orphans.extend(lease);
        }
    }

    /// Gives back what earlier failures left, now that etcd answers again.
    async fn revoke_orphans(&self) {
        let orphans = {
            let mut orphans = self.orphans.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::take(&mut *orphans)
        };
        for id in orphans {
            self.revoke_unused(id).await;
        }
    }

    /// Ends an etcd lease, and with it the keys bound to it.
    async fn revoke(&self, id: i64) {
        let action = format!("revoke lease {id:x}");
        let revoked = self
            .connection
            .call(&action, |mut client| async move {
                client.lease_revoke(id).await
            })
            .await;
        match revoked {
            Ok(_) => tracing::debug!(lease = format!("{id:x}"), "gave back an unused lease"),
            Err(error) => tracing::debug!(error = %error.chain(), "an unused lease stays"),
        }
    }
}

/// The key-value half of a client, ready for long lists.
fn kv(client: &Client) -> etcd_client::KvClient {
    client.kv_client().max_decoding_message_size(MAX_MESSAGE)
}

fn raw(kv: &KeyValue, subnets: &str) -> Raw {
    Raw {
        name: name_of(kv, subnets),
        value: Ok(kv.value().to_vec()),
        mod_revision: kv.mod_revision(),
        lease_id: kv.lease(),
    }
}

/// The part of a key below `<prefix>/subnets/`.
fn name_of(kv: &KeyValue, subnets: &str) -> String {
    let key = String::from_utf8_lossy(kv.key());
    key.strip_prefix(subnets).unwrap_or(&key).to_owned()
}

fn seconds_of(ttl: i64) -> Duration {
    Duration::from_secs(u64::try_from(ttl).unwrap_or(0))
}

/// Go's `path.Clean`, as `path.Join` applies it: no double slashes, no slash at the end, `.` and `..` resolved.
/// An empty path stays empty.
fn clean_path(path: &str) -> String {
    let rooted = path.starts_with('/');
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => match parts.last() {
                Some(&last) if last != ".." => {
                    parts.pop();
                }
                _ if rooted => {}
                _ => parts.push(part),
            },
            _ => parts.push(part),
        }
    }
    let joined = parts.join("/");
    if rooted { format!("/{joined}") } else { joined }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_are_joined_as_go_joins_paths() {
        for (given, config) in [
            ("/coreos.com/network", "/coreos.com/network/config"),
            ("/coreos.com/network/", "/coreos.com/network/config"),
            ("//coreos.com//network//", "/coreos.com/network/config"),
            ("coreos.com/network", "coreos.com/network/config"),
            ("/a/../b/./c", "/b/c/config"),
            ("/../a", "/a/config"),
            ("../a", "../a/config"),
            ("/", "/config"),
            ("", "config"),
            (".", "config"),
        ] {
            let store = EtcdLeases {
                connection: Arc::new(Connection::offline()),
                prefix: clean_path(given),
                ttl: DEFAULT_TTL,
                renew_margin: DEFAULT_RENEW_MARGIN,
                reported: Reported::default(),
                orphans: Mutex::default(),
            };
            assert_eq!(store.key("config"), config, "{given:?}");
            assert!(store.subnets().ends_with("subnets/"));
        }
    }

    #[test]
    fn options_print_without_passwords() {
        let options = EtcdOptions {
            endpoints: vec!["http://root:hunter2@etcd:2379,http://b:1".to_owned()],
            username: Some("flannel".to_owned()),
            password: Some("hunter3".to_owned()),
            ..EtcdOptions::default()
        };
        let text = format!("{options:?}");
        assert!(!text.contains("hunter"), "{text}");
        assert!(
            text.contains("etcd:2379") && text.contains("flannel"),
            "{text}"
        );
    }
}
