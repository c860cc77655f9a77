//! Watching the directory and keeping our file in it, for as long as the agent runs.

use std::{future::pending, path::Path, sync::Arc};

use flannel_core::lease::{LeaseAttrs, SubnetKey};
use futures_util::StreamExt as _;
use inotify::{EventMask, EventOwned, EventStream, Inotify, WatchMask};
use tokio::{
    sync::watch,
    time::{Instant, sleep_until},
};
use tracing::{error, info, warn};

use super::{DirLeases, blocking, failed, files};
use crate::leases::{
    COALESCE, Held, LeaseError, Offer, View, addresses, is_ours, publish,
    retry::{Backoff, Contest, Outage},
    table::Table,
};

/// Space for the events of one read.
const EVENTS: usize = 16 << 10;

type Events = EventStream<Vec<u8>>;

/// What the directory says about our own lease.
enum Verdict {
    Fine,
    /// As we wrote it, but we want to publish something else by now.
    Outdated,
    /// The file is gone.
    Lost,
    /// The file names another node.
    Taken {
        by: LeaseAttrs,
        revision: i64,
    },
    /// The file names us, and somebody else wrote it.
    Touched,
}

struct Keeper<'a> {
    store: &'a DirLeases,
    out: &'a watch::Sender<View>,
    offer: Offer,
    held: Held,
    table: Table,
    ever_listed: bool,
    events: Option<Events>,
    /// The directory that is watched and was listed last.
    dir: Option<files::DirId>,
    scan_at: Instant,
    backoff: Backoff,
    outage: Outage,
    scan_error: Option<String>,
    own_error: Option<String>,
    loss_reported: Option<i64>,
    contest: Contest,
}

pub(super) async fn run(
    store: &DirLeases,
    held: Held,
    mut offers: watch::Receiver<Offer>,
    out: &watch::Sender<View>,
) {
    let offer = offers.borrow_and_update().clone();
    let mut keeper = Keeper {
        store,
        out,
        offer,
        held,
        table: Table::default(),
        ever_listed: false,
        events: None,
        dir: None,
        scan_at: Instant::now(),
        backoff: Backoff::new(),
        outage: Outage::default(),
        scan_error: None,
        own_error: None,
        loss_reported: None,
        contest: Contest::default(),
    };
    let mut offers_open = true;
    loop {
        let scan_at = match keeper.table.grace_ends() {
            Some(end) => keeper.scan_at.min(end),
            None => keeper.scan_at,
        };
        tokio::select! {
            event = next_event(&mut keeper.events) => keeper.received(event),
            () = sleep_until(scan_at) => keeper.look().await,
            changed = offers.changed(), if offers_open => match changed {
                Ok(()) => {
                    keeper.offer = offers.borrow_and_update().clone();
                    keeper.look().await;
                }
                Err(_) => offers_open = false,
            },
        }
    }
}

/// Cancel-safe: an event is either taken from the stream or still in it.
async fn next_event(events: &mut Option<Events>) -> Option<std::io::Result<EventOwned>> {
    match events {
        Some(events) => events.next().await,
        None => pending().await,
    }
}

/// Watches the directory, and tells which one it is.
fn attach(path: &Path) -> std::io::Result<(Inotify, files::DirId)> {
    let inotify = Inotify::init()?;
    let mask = WatchMask::CREATE
        | WatchMask::CLOSE_WRITE
        | WatchMask::MOVE
        | WatchMask::DELETE
        | WatchMask::ATTRIB
        | WatchMask::DELETE_SELF
        | WatchMask::MOVE_SELF
        | WatchMask::ONLYDIR;
    inotify.watches().add(path, mask)?;
    let id = files::identity(path)?;
    Ok((inotify, id))
}

impl Keeper<'_> {
    fn received(&mut self, event: Option<std::io::Result<EventOwned>>) {
        let gone =
            EventMask::DELETE_SELF | EventMask::MOVE_SELF | EventMask::IGNORED | EventMask::UNMOUNT;
        if let Some(Ok(event)) = &event
            && event.mask.contains(EventMask::DELETE_SELF)
        {
            // Whatever is there next is another directory, even if it has the same inode.
            self.dir = None;
        }
        match event {
            Some(Ok(event)) if !event.mask.intersects(gone) => {
                let scratch = event
                    .name
                    .is_some_and(|name| name.to_string_lossy().starts_with('.'));
                if scratch {
                    return;
                }
            }
            // The directory went away, or the events did. The next look finds out.
            _ => self.events = None,
        }
        self.scan_at = self.scan_at.min(Instant::now() + COALESCE);
    }

    /// Reads the directory, puts our own file right and publishes.
    async fn look(&mut self) {
        self.scan_at = Instant::now() + self.store.rescan;
        match self.scan().await {
            Ok(()) => {
                self.outage.recovered(&self.store.describe());
                self.scan_error = None;
                self.settle().await;
            }
            Err(error) => {
                self.outage.failed(&error);
                self.scan_error = Some(error.chain());
                self.events = None;
                self.scan_at = Instant::now() + self.backoff.next_wait();
            }
        }
        if self.scan_error.is_none() && self.own_error.is_none() {
            self.backoff.reset();
        }
        self.publish();
    }

    /// Watch first, then list, so that no change falls in between.
    async fn scan(&mut self) -> Result<(), LeaseError> {
        let path = self.store.subnets();
        let here = blocking("look at", path.clone(), files::identity).await?;
        if self.events.is_none() || self.dir != Some(here) {
            let (inotify, id) = blocking("watch", path.clone(), attach).await?;
            let events = inotify
                .into_event_stream(vec![0; EVENTS])
                .map_err(failed("watch", &path))?;
            self.events = Some(events);
            self.read(id).await
        } else {
            self.read(here).await
        }
    }

    async fn read(&mut self, id: files::DirId) -> Result<(), LeaseError> {
        let list = self.store.scan().await?;
        let replaced = self.ever_listed && self.dir != Some(id);
        self.table
            .replace(&list, replaced.then(Instant::now), &self.store.reported);
        self.dir = Some(id);
        self.ever_listed = true;
        Ok(())
    }

    fn verdict(&self) -> Verdict {
        let ours = Ok(self.held.lease.attrs.to_json().into_bytes());
        match self.table.get(&self.held.lease.key) {
            None => Verdict::Lost,
            Some(entry) if entry.mod_revision == files::digest(&ours) => {
                if self.held.lease.attrs == self.offer.attrs {
                    Verdict::Fine
                } else {
                    Verdict::Outdated
                }
            }
            Some(entry) => match &entry.attrs {
                Some(attrs) if !is_ours(attrs, &self.offer.identity) => Verdict::Taken {
                    by: attrs.clone(),
                    revision: entry.mod_revision,
                },
                _ => Verdict::Touched,
            },
        }
    }

    /// Puts our own file right, if it is not.
    async fn settle(&mut self) {
        let subnet = self.held.lease.key;
        let first = self.own_error.is_none();
        let done = match self.verdict() {
            Verdict::Fine => {
                self.own_error = None;
                self.loss_reported = None;
                return;
            }
            Verdict::Outdated => self.write().await,
            Verdict::Lost => {
                if self.is_news(0) {
                    warn!(%subnet, "our lease file was removed, acquiring it again");
                }
                self.acquire_again(Some(subnet)).await
            }
            Verdict::Taken { by, revision } => {
                if self.is_news(revision) {
                    error!(
                        %subnet,
                        ours = addresses(&self.offer.attrs),
                        theirs = addresses(&by),
                        "another node took our subnet, acquiring another one: pods of this node keep addresses that are now routed elsewhere until they are restarted"
                    );
                }
                self.acquire_again(None).await
            }
            Verdict::Touched => {
                if let Some(later) = self.contest.entered(Instant::now()) {
                    self.scan_at = self.scan_at.min(later);
                    return;
                }
                warn!(
                    %subnet,
                    address = addresses(&self.offer.attrs),
                    "our lease file was rewritten by somebody else, restoring it: if this repeats, another node has the same public address; give each its own with --iface or --public-ip"
                );
                self.write().await
            }
        };
        // The directory is read again at once: only what is in it counts.
        match done.and(self.scan().await) {
            Ok(()) => self.own_error = None,
            Err(error) => {
                if first {
                    warn!(error = %error.chain(), "no lease, trying again");
                }
                self.own_error = Some(error.chain());
                self.scan_at = Instant::now() + self.backoff.next_wait();
            }
        }
    }

    /// Whether a loss, to the file with this digest or to none, has not been reported yet.
    fn is_news(&mut self, digest: i64) -> bool {
        self.loss_reported.replace(digest) != Some(digest)
    }

    async fn write(&mut self) -> Result<(), LeaseError> {
        self.store
            .replace(&self.held.lease.key, &self.offer)
            .await?;
        self.held.lease.attrs = self.offer.attrs.clone();
        info!(subnet = %self.held.lease.key, value = self.offer.attrs.to_json(), "published our lease");
        Ok(())
    }

    async fn acquire_again(&mut self, previous: Option<SubnetKey>) -> Result<(), LeaseError> {
        let offer = Offer {
            previous,
            ..self.offer.clone()
        };
        self.held = self.store.acquire(&offer).await?;
        Ok(())
    }

    fn publish(&mut self) {
        let snapshot = self
            .ever_listed
            .then(|| Arc::new(self.table.snapshot(Instant::now())));
        let last_error = self.own_error.clone().or_else(|| self.scan_error.clone());
        publish(
            self.out,
            View {
                own: Some(self.held.lease.clone()),
                snapshot,
                connected: self.scan_error.is_none(),
                last_error,
            },
        );
    }
}
