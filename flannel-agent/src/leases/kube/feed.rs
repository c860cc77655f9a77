//! The one task that lists and watches all nodes.
//!
//! What is known is replaced only by a complete list, and changed only by events of a watch that begins where that list ended.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use flannel_core::kube::Node;
use futures_util::StreamExt as _;
use kube::core::WatchEvent;
use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout_at},
};
use tracing::{debug, info};

use super::connection::{Connection, escape};
use crate::leases::{
    LeaseError,
    retry::{Backoff, Outage, random_below},
};

/// Nodes on one page of a list.
const PAGE: u32 = 500;
/// How long the server keeps a watch open, at least; client libraries have 5 to 10 minutes.
const WATCH_SECONDS: usize = 300;
/// What is added by chance, so that not all nodes come back at once.
const WATCH_SPREAD: usize = 300;
/// How much longer than the server we wait for the end of a watch.
const OVERTIME: Duration = Duration::from_secs(15);
/// Servers that send bookmarks do so every minute or so: a silence of this length means that the connection is dead.
const SILENCE: Duration = Duration::from_secs(150);
/// After a watch that lasted this long the waits between reconnects start anew.
const PROVEN: Duration = Duration::from_secs(5);
/// The server has forgotten what happened since.
const GONE: u16 = 410;

/// What is known of the cluster.
#[derive(Clone, Debug, Default)]
pub(super) struct Known {
    /// All nodes by name, trimmed.
    pub(super) nodes: BTreeMap<String, Node>,
    /// Whether the nodes are a complete list of the API's.
    pub(super) complete: bool,
    /// Whether the nodes are those of the last known state.
    pub(super) remembered: bool,
    /// Whether changes are being seen.
    pub(super) connected: bool,
    /// The last failure, until it is over.
    pub(super) error: Option<String>,
}

impl Known {
    /// Whether there is anything to go by.
    pub(super) fn is_usable(&self) -> bool {
        self.complete || self.remembered
    }
}

/// Why a watch ended.
enum Ended {
    /// The server ends every watch after a while.
    Closed,
    /// Only a new list can tell what happened.
    Gone(String),
    Failed(LeaseError),
}

/// Runs until it is aborted.
pub(super) async fn run(connection: Arc<Connection>, known: watch::Sender<Known>) {
    let feed = Feed {
        connection: &connection,
        known: &known,
    };
    let mut version: Option<String> = None;
    let mut backoff = Backoff::new();
    let mut outage = Outage::default();
    let mut paged = true;
    loop {
        let Some(from) = &mut version else {
            match list(&connection, paged).await {
                Ok((nodes, listed)) => {
                    paged = true;
                    version = Some(listed);
                    feed.replace(nodes);
                }
                Err(error) => {
                    if is_gone(&error) {
                        // The list took longer than the server remembers: at one go next time.
                        paged = false;
                    }
                    feed.failed(&error, &mut outage);
                    sleep(backoff.next_wait()).await;
                }
            }
            continue;
        };
        let begun = Instant::now();
        let ended = feed.watch(from, &mut outage).await;
        if begun.elapsed() >= PROVEN {
            backoff.reset();
        }
        match ended {
            Ended::Closed => debug!("the watch of nodes ended in due time"),
            Ended::Gone(reason) => {
                info!(reason, "the watch of nodes fell behind, listing them again");
                version = None;
            }
            Ended::Failed(error) => feed.failed(&error, &mut outage),
        }
        if begun.elapsed() < PROVEN {
            sleep(backoff.next_wait()).await;
        }
    }
}

/// Reads the list of all nodes, and the version from which it can be watched.
pub(super) async fn list(
    connection: &Connection,
    paged: bool,
) -> Result<(BTreeMap<String, Node>, String), LeaseError> {
    let mut nodes = BTreeMap::new();
    let mut next: Option<String> = None;
    loop {
        let path = match (&next, paged) {
            (Some(next), _) => format!("/api/v1/nodes?limit={PAGE}&continue={}", escape(next)),
            (None, true) => format!("/api/v1/nodes?limit={PAGE}"),
            (None, false) => "/api/v1/nodes".to_owned(),
        };
        let page = connection.page("list nodes", &path).await?;
        nodes.extend(page.items.into_iter().map(|node| (node.name.clone(), node)));
        next = page.metadata.next.filter(|next| !next.is_empty());
        if next.is_none() {
            return Ok((nodes, page.metadata.resource_version));
        }
    }
}

fn is_gone(error: &LeaseError) -> bool {
    matches!(error, LeaseError::KubeAnswer { code: GONE, .. })
}

struct Feed<'a> {
    connection: &'a Connection,
    known: &'a watch::Sender<Known>,
}

impl Feed<'_> {
    fn replace(&self, nodes: BTreeMap<String, Node>) {
        self.known.send_modify(|known| {
            known.nodes = nodes;
            known.complete = true;
            known.remembered = false;
        });
    }

    fn failed(&self, error: &LeaseError, outage: &mut Outage) {
        outage.failed(error);
        let text = error.chain();
        self.known.send_if_modified(|known| {
            let changed = known.connected || known.error.as_ref() != Some(&text);
            known.connected = false;
            known.error = Some(text);
            changed
        });
    }

    /// Watches from `version` on, which moves with what comes.
    async fn watch(&self, version: &mut String, outage: &mut Outage) -> Ended {
        const ACTION: &str = "watch nodes";
        let seconds = WATCH_SECONDS + random_below(WATCH_SPREAD);
        let path = format!(
            "/api/v1/nodes?watch=true&allowWatchBookmarks=true&timeoutSeconds={seconds}&resourceVersion={}",
            escape(version)
        );
        let events = match self.connection.watch(ACTION, &path).await {
            Ok(events) => events,
            Err(error) => return ended(error),
        };
        let mut events = std::pin::pin!(events);
        outage.recovered(&format!("kubernetes {}", self.connection.server()));
        self.known.send_if_modified(|known| {
            let changed = !known.connected || known.error.is_some();
            known.connected = true;
            known.error = None;
            changed
        });
        let end = Instant::now()
            + Duration::from_secs(u64::try_from(seconds).unwrap_or(u64::MAX))
            + OVERTIME;
        let mut bookmarked = false;
        loop {
            let patience = if bookmarked {
                end.min(Instant::now() + SILENCE)
            } else {
                end
            };
            let event = match timeout_at(patience, events.next()).await {
                Ok(Some(Ok(event))) => event,
                Ok(Some(Err(error))) => return ended(error),
                Ok(None) => return Ended::Closed,
                Err(_elapsed) => {
                    let cause = "nothing was heard for long".to_owned();
                    return Ended::Failed(self.connection.broken(ACTION, cause));
                }
            };
            match event {
                WatchEvent::Added(node) | WatchEvent::Modified(node) => {
                    version.clone_from(&node.resource_version);
                    self.put(node);
                }
                WatchEvent::Deleted(node) => {
                    version.clone_from(&node.resource_version);
                    self.known
                        .send_if_modified(|known| known.nodes.remove(&node.name).is_some());
                }
                WatchEvent::Bookmark(bookmark) => {
                    bookmarked = true;
                    *version = bookmark.metadata.resource_version;
                }
                WatchEvent::Error(status) => {
                    return ended(
                        self.connection
                            .answered(ACTION, status.code, &status.message),
                    );
                }
            }
        }
    }

    /// Takes a node in. Most changes of nodes are none to us.
    fn put(&self, node: Node) {
        self.known.send_if_modified(|known| {
            let changed = known
                .nodes
                .get(&node.name)
                .is_none_or(|before| !before.is_same(&node));
            known.nodes.insert(node.name.clone(), node);
            changed
        });
    }
}

fn ended(error: LeaseError) -> Ended {
    match &error {
        LeaseError::KubeAnswer { message, .. }
            if is_gone(&error) || message.contains("Too large resource version") =>
        {
            Ended::Gone(error.chain())
        }
        _ => Ended::Failed(error),
    }
}
