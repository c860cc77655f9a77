//! Keeping the lease and watching the others, for as long as the agent runs.

use std::{future::pending, sync::Arc};

use etcd_client::{EventType, GetOptions, WatchOptions, WatchResponse, WatchStream};
use tokio::{
    sync::watch,
    time::{Instant, sleep_until},
};
use tracing::{info, warn};

use super::{EtcdLeases, Grip, PROVEN, connection::cause, name_of, own::Verdict, raw};
use crate::leases::{
    COALESCE, Held, LeaseError, Offer, View, publish,
    retry::{Backoff, Contest},
    table::Table,
};

pub(super) struct Keeper<'a> {
    pub(super) store: &'a EtcdLeases,
    out: &'a watch::Sender<View>,
    pub(super) offer: Offer,
    pub(super) held: Held,
    pub(super) grip: Grip,
    pub(super) table: Table,
    /// Whether the table is a complete list as of `next - 1`; otherwise the next connect lists first.
    listed: bool,
    /// Whether there ever was a complete list.
    pub(super) ever_listed: bool,
    /// The first revision not seen yet.
    pub(super) next: i64,
    cluster: u64,
    stream: Option<WatchStream>,
    /// Since when the watch is confirmed by the server.
    watching: Option<Instant>,
    connect_at: Instant,
    connect_backoff: Backoff,
    watch_error: Option<String>,
    pub(super) own_error: Option<String>,
    /// The revision at which our lease was last reported lost.
    pub(super) loss_reported: Option<i64>,
    pub(super) repair_at: Option<Instant>,
    pub(super) repair_backoff: Backoff,
    pub(super) contest: Contest,
    pub(super) renew_retry: Option<Instant>,
    pub(super) renew_backoff: Backoff,
    publish_at: Option<Instant>,
}

pub(super) async fn run(
    store: &EtcdLeases,
    held: Held,
    mut offers: watch::Receiver<Offer>,
    out: &watch::Sender<View>,
) {
    let offer = offers.borrow_and_update().clone();
    let mut keeper = Keeper::new(store, held, offer, out);
    keeper.log_renewal();
    let mut offers_open = true;
    loop {
        let renew_at = keeper.renew_at();
        let grace_ends = keeper.table.grace_ends();
        let (connect_at, idle) = (keeper.connect_at, keeper.stream.is_none());
        tokio::select! {
            message = next_message(&mut keeper.stream) => keeper.received(message).await,
            () = sleep_until(connect_at), if idle => keeper.connect().await,
            () = maybe_until(renew_at) => keeper.renew_due().await,
            () = maybe_until(keeper.repair_at) => keeper.repair_at = None,
            () = maybe_until(grace_ends), if keeper.publish_at.is_none() => keeper.changed(),
            () = maybe_until(keeper.publish_at) => keeper.publish(),
            changed = offers.changed(), if offers_open => match changed {
                Ok(()) => keeper.offer = offers.borrow_and_update().clone(),
                Err(_) => offers_open = false,
            },
        }
        keeper.settle().await;
    }
}

async fn maybe_until(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => pending().await,
    }
}

/// Cancel-safe: a message is either taken from the stream or still in it.
async fn next_message(
    stream: &mut Option<WatchStream>,
) -> Result<Option<WatchResponse>, etcd_client::Error> {
    match stream {
        Some(stream) => stream.message().await,
        None => pending().await,
    }
}

impl<'a> Keeper<'a> {
    fn new(store: &'a EtcdLeases, held: Held, offer: Offer, out: &'a watch::Sender<View>) -> Self {
        let unknown = Grip {
            mod_revision: 0,
            lease: None,
        };
        let now = Instant::now();
        Keeper {
            store,
            out,
            offer,
            grip: held.grip.unwrap_or(unknown),
            held,
            table: Table::default(),
            listed: false,
            ever_listed: false,
            next: 0,
            cluster: 0,
            stream: None,
            watching: None,
            connect_at: now,
            connect_backoff: Backoff::new(),
            watch_error: None,
            own_error: None,
            loss_reported: None,
            repair_at: None,
            repair_backoff: Backoff::new(),
            contest: Contest::default(),
            renew_retry: None,
            renew_backoff: Backoff::new(),
            publish_at: Some(now),
        }
    }

    /// Asks for a publication soon.
    pub(super) fn changed(&mut self) {
        self.publish_at
            .get_or_insert_with(|| Instant::now() + COALESCE);
    }

    fn publish(&mut self) {
        self.publish_at = None;
        let snapshot = self.ever_listed.then(|| {
            let mut snapshot = self.table.snapshot(Instant::now());
            if let Verdict::Fine | Verdict::Outdated = self.verdict() {
                // Our own write may be newer than what the watch has brought.
                let own = self.held.lease.clone();
                snapshot.leases.insert(own.key, own.attrs);
            }
            Arc::new(snapshot)
        });
        publish(
            self.out,
            View {
                own: Some(self.held.lease.clone()),
                snapshot,
                connected: self.watching.is_some(),
                last_error: self.own_error.clone().or_else(|| self.watch_error.clone()),
            },
        );
    }

    /// Lists if need be, then opens the watch where the list ends.
    async fn connect(&mut self) {
        let opened = async {
            if !self.listed || !self.same_store().await? {
                self.relist().await?;
            }
            self.open_watch().await
        };
        match opened.await {
            Ok(stream) => self.stream = Some(stream),
            Err(error) => {
                let text = error.chain();
                if !error.is_logged() && self.watch_error.as_ref() != Some(&text) {
                    warn!(error = text, "cannot follow the leases, trying again");
                }
                self.disconnected(text);
            }
        }
    }

    /// Whether our key is as we wrote it. In a store that was wiped it is missing, even if by now the other nodes have brought the
    /// revisions to where they were, so that a watch from there would be granted and show none of it.
    async fn same_store(&self) -> Result<bool, LeaseError> {
        let key = self.store.key_of(&self.held.lease.key);
        let options = || Some(GetOptions::new().with_keys_only());
        let answer = self
            .store
            .connection
            .call(&format!("look up {key}"), |mut client| {
                let key = key.clone();
                async move { client.get(key, options()).await }
            })
            .await?;
        let written = answer
            .kvs()
            .first()
            .map(etcd_client::KeyValue::mod_revision);
        Ok(written == Some(self.grip.mod_revision))
    }

    async fn relist(&mut self) -> Result<(), LeaseError> {
        let listing = self.store.list().await?;
        let own = self.held.lease.key.to_string();
        let own_is_newer = listing
            .keys
            .iter()
            .any(|raw| raw.name == own && raw.mod_revision >= self.grip.mod_revision);
        let replaced = self.ever_listed
            && (listing.revision + 1 < self.next
                || listing.cluster != self.cluster
                || !own_is_newer);
        self.table.replace(
            &listing.keys,
            replaced.then(Instant::now),
            &self.store.reported,
        );
        if replaced {
            // Revisions of the former store mean nothing here.
            self.grip.mod_revision = 0;
        }
        self.next = listing.revision + 1;
        self.cluster = listing.cluster;
        self.listed = true;
        self.ever_listed = true;
        self.changed();
        Ok(())
    }

    async fn open_watch(&self) -> Result<WatchStream, LeaseError> {
        let subnets = self.store.subnets();
        let action = format!("watch {subnets}");
        let next = self.next;
        self.store
            .connection
            .call(&action, |client| {
                let subnets = subnets.clone();
                let options = WatchOptions::new()
                    .with_prefix()
                    .with_start_revision(next)
                    .with_progress_notify();
                async move {
                    let mut watches = client
                        .watch_client()
                        .max_decoding_message_size(super::MAX_MESSAGE);
                    watches.watch(subnets, Some(options)).await
                }
            })
            .await
    }

    /// The watch is over; try again soon, from where it ended.
    fn disconnected(&mut self, reason: String) {
        self.stream = None;
        if let Some(since) = self.watching.take()
            && since.elapsed() >= PROVEN
        {
            self.connect_backoff.reset();
        }
        self.connect_at = Instant::now() + self.connect_backoff.next_wait();
        self.watch_error = Some(reason);
        self.changed();
    }

    /// What is known can no longer be brought up to date by watching.
    pub(super) fn list_again(&mut self) {
        self.stream = None;
        self.listed = false;
        self.connect_at = Instant::now();
    }

    async fn received(&mut self, message: Result<Option<WatchResponse>, etcd_client::Error>) {
        let response = match message {
            Ok(Some(response)) => response,
            Ok(None) => return self.watch_closed("closed by the server"),
            Err(error) => return self.watch_closed(&cause(&error)),
        };
        if response.compact_revision() != 0 {
            info!(
                "etcd watch for {} fell behind compaction horizon (compact rev {}), re-listing and resuming",
                self.store.subnets(),
                response.compact_revision()
            );
            return self.list_again();
        }
        if response.canceled() {
            // Also how etcd refuses a token that it no longer knows.
            self.store.connection.reset().await;
            return self.watch_closed(response.cancel_reason());
        }
        let revision = response
            .header()
            .map_or(0, etcd_client::ResponseHeader::revision);
        let cluster = response
            .header()
            .map_or(self.cluster, etcd_client::ResponseHeader::cluster_id);
        if response.created() {
            if revision + 1 < self.next || cluster != self.cluster {
                // A member that lags, or another store. Only a list can tell.
                self.listed = false;
                return self.disconnected("etcd is behind what was already seen".to_owned());
            }
            self.watching.get_or_insert_with(Instant::now);
            self.watch_error = None;
            self.changed();
        } else if response.events().is_empty() {
            self.next = self.next.max(revision + 1);
        }
        self.apply(&response);
    }

    fn watch_closed(&mut self, reason: &str) {
        let error = format!("etcd watch closed: {reason}");
        if self.watching.is_some() {
            info!(
                reason,
                "etcd watch channel for {} closed, reconnecting from rev {}",
                self.store.subnets(),
                self.next
            );
        } else if self.watch_error.as_ref() != Some(&error) {
            warn!(
                reason,
                "etcd does not let us watch {}",
                self.store.subnets()
            );
        }
        self.disconnected(error);
    }

    fn apply(&mut self, response: &WatchResponse) {
        let subnets = self.store.subnets();
        let own = self.held.lease.key.to_string();
        for event in response.events() {
            let Some(kv) = event.kv() else { continue };
            match event.event_type() {
                EventType::Put => self.table.put(&raw(kv, &subnets), &self.store.reported),
                EventType::Delete => {
                    let name = name_of(kv, &subnets);
                    self.table.remove(&name, &self.store.reported);
                }
            }
            self.next = self.next.max(kv.mod_revision() + 1);
            if name_of(kv, &subnets) == own {
                // Whatever we were waiting for may be different now.
                self.repair_at = None;
            }
            self.changed();
        }
    }
}
