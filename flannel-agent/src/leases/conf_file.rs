//! Waiting for another network configuration in a file.

use std::{path::Path, time::Duration};

use futures_util::StreamExt as _;
use inotify::{EventStream, Inotify, WatchMask};
use tokio::time::sleep;
use tracing::{debug, warn};

use super::{COALESCE, LeaseError};

/// Space for the events of one read.
const EVENTS: usize = 4 << 10;

/// Reads the configuration whenever one of these directories changes, and every `rescan`, until its text is another than `known`.
/// A directory, and not the file: Kubernetes swaps the link `..data` beside a mounted file, and others rename a new file over the old.
pub(super) async fn after<R>(
    dirs: &[&Path],
    rescan: Duration,
    read: impl Fn() -> R,
    known: &str,
) -> String
where
    R: Future<Output = Result<String, LeaseError>>,
{
    let mut reported = None;
    loop {
        // Before the look, so that no change falls in between.
        let events = watch(dirs);
        match read().await {
            Ok(text) if text != known => {
                // Somebody may be writing it at this moment.
                sleep(COALESCE).await;
                if read().await.is_ok_and(|again| again == text) {
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
                () = sleep(rescan) => {}
            },
            None => sleep(rescan).await,
        }
    }
}

/// Events of the directories. Without them the regular look is all there is.
fn watch(dirs: &[&Path]) -> Option<EventStream<Vec<u8>>> {
    let attach = || {
        let inotify = Inotify::init()?;
        let mask = WatchMask::CREATE | WatchMask::CLOSE_WRITE | WatchMask::MOVE | WatchMask::DELETE;
        for dir in dirs {
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
