//! Waiting for another network configuration.

use std::path::Path;

use futures_util::StreamExt as _;
use inotify::{EventStream, Inotify, WatchMask};
use tokio::time::sleep;
use tracing::{debug, warn};

use super::DirLeases;
use crate::leases::COALESCE;

/// Space for the events of one read.
const EVENTS: usize = 4 << 10;

/// Reads the configuration whenever its directory changes, and now and then in between, until its text is another than `known`.
pub(super) async fn after(store: &DirLeases, known: &str) -> String {
    let mut reported = None;
    loop {
        // Before the look, so that no change falls in between.
        let events = watch(store);
        match store.net_conf().await {
            Ok(text) if text != known => {
                // Somebody may be writing it at this moment.
                sleep(COALESCE).await;
                if store.net_conf().await.is_ok_and(|again| again == text) {
                    return text;
                }
                continue;
            }
            Ok(_) => reported = None,
            Err(error) => {
                let text = error.chain();
                if reported.as_ref() != Some(&text) {
                    warn!(
                        error = text,
                        "cannot read the network configuration any more, the one that was read stays in force"
                    );
                    reported = Some(text);
                }
            }
        }
        match events {
            Some(mut events) => tokio::select! {
                _ = events.next() => sleep(COALESCE).await,
                () = sleep(store.rescan) => {}
            },
            None => sleep(store.rescan).await,
        }
    }
}

/// Events of the directories in which the configuration may be. Without them the regular look is all there is.
fn watch(store: &DirLeases) -> Option<EventStream<Vec<u8>>> {
    let attach = || {
        let inotify = Inotify::init()?;
        let mask = WatchMask::CREATE | WatchMask::CLOSE_WRITE | WatchMask::MOVE | WatchMask::DELETE;
        let elsewhere = store.net_config_path.as_deref().and_then(Path::parent);
        for dir in std::iter::once(store.dir.as_path()).chain(elsewhere) {
            if let Err(error) = inotify.watches().add(dir, mask) {
                debug!(dir = %dir.display(), %error, "cannot watch");
            }
        }
        inotify.into_event_stream(vec![0; EVENTS])
    };
    attach()
        .inspect_err(|error: &std::io::Error| debug!(%error, "no inotify"))
        .ok()
}
