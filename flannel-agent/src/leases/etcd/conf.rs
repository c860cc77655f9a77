//! Waiting for another network configuration.

use etcd_client::{EventType, WatchOptions, WatchStream};
use tokio::time::{Instant, sleep};
use tracing::{debug, info, warn};

use super::{EtcdLeases, PROVEN, connection::cause};
use crate::leases::{LeaseError, retry::Backoff};

/// Reads and watches `<prefix>/config` until its text is another than `known`.
///
/// Every attempt begins with a read and watches from there, so that neither a compacted history nor a store that was wiped
/// can hide a change.
pub(super) async fn after(store: &EtcdLeases, known: &str) -> String {
    let mut backoff = Backoff::new();
    let mut reported = None;
    loop {
        let begun = Instant::now();
        match look(store, known).await {
            Ok(Some(text)) => return text,
            Ok(None) => {}
            Err(error) => {
                let text = error.chain();
                if !error.is_logged() && reported.as_ref() != Some(&text) {
                    warn!(
                        error = text,
                        "cannot follow the network configuration, trying again"
                    );
                    reported = Some(text);
                }
            }
        }
        if begun.elapsed() >= PROVEN {
            backoff.reset();
            reported = None;
        }
        sleep(backoff.next_wait()).await;
    }
}

/// `None` when the watch ended without a change.
async fn look(store: &EtcdLeases, known: &str) -> Result<Option<String>, LeaseError> {
    let (text, revision) = store.read_conf().await?;
    match text {
        Some(text) if text != known => return Ok(Some(text)),
        Some(_) => {}
        None => report_missing(store),
    }
    let mut stream = open_watch(store, revision + 1).await?;
    loop {
        let response = match stream.message().await {
            Ok(Some(response)) => response,
            Ok(None) => return Ok(None),
            Err(error) => {
                debug!(
                    reason = cause(&error),
                    "the watch of the network configuration ended"
                );
                return Ok(None);
            }
        };
        if response.compact_revision() != 0 {
            return Ok(None);
        }
        if response.canceled() {
            // Also how etcd refuses a token that it no longer knows.
            store.connection.reset().await;
            return Ok(None);
        }
        // Of several changes the last one counts.
        let Some(event) = response.events().last() else {
            continue;
        };
        match (event.event_type(), event.kv()) {
            (EventType::Put, Some(kv)) => {
                let text = store.conf_text(kv)?;
                if text != known {
                    return Ok(Some(text));
                }
            }
            (EventType::Put, None) => {}
            (EventType::Delete, _) => report_missing(store),
        }
    }
}

fn report_missing(store: &EtcdLeases) {
    info!(
        key = store.key("config"),
        "the network configuration was removed, the one that was read stays in force"
    );
}

async fn open_watch(store: &EtcdLeases, from: i64) -> Result<WatchStream, LeaseError> {
    let key = store.key("config");
    store
        .connection
        .call(&format!("watch {key}"), |client| {
            let key = key.clone();
            let options = WatchOptions::new().with_start_revision(from);
            async move { client.watch_client().watch(key, Some(options)).await }
        })
        .await
}
