//! The network configuration: a file that Kubernetes mounts from a ConfigMap, and swaps as a whole by a symbolic link.

use std::path::Path;

use futures_util::StreamExt as _;
use inotify::{EventStream, Inotify, WatchMask};
use tokio::time::{Duration, sleep};
use tracing::{debug, warn};

use crate::leases::{COALESCE, LeaseError};

/// Space for the events of one read.
const EVENTS: usize = 4 << 10;
/// How often the file is read without being told of a change.
const RESCAN: Duration = Duration::from_secs(10);

/// Reads the file.
pub(super) async fn read(path: &Path) -> Result<String, LeaseError> {
    tokio::fs::read_to_string(path).await.map_err(|source| {
        if source.kind() == std::io::ErrorKind::InvalidData {
            LeaseError::NetConfText {
                location: path.display().to_string(),
            }
        } else {
            LeaseError::KubeNetConf {
                path: path.to_owned(),
                source,
            }
        }
    })
}

/// Reads the file whenever its directory changes, and now and then in between, until its text is another than `known`.
pub(super) async fn after(path: &Path, known: &str) -> String {
    let mut reported = None;
    loop {
        // Before the look, so that no change falls in between.
        let events = watch(path);
        match read(path).await {
            Ok(text) if text != known => {
                // Somebody may be writing it at this moment.
                sleep(COALESCE).await;
                if read(path).await.is_ok_and(|again| again == text) {
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
                () = sleep(RESCAN) => {}
            },
            None => sleep(RESCAN).await,
        }
    }
}

/// Events of the directory: of the file, and of the link `..data` in it.
fn watch(path: &Path) -> Option<EventStream<Vec<u8>>> {
    let attach = || {
        let inotify = Inotify::init()?;
        let mask = WatchMask::CREATE | WatchMask::CLOSE_WRITE | WatchMask::MOVE | WatchMask::DELETE;
        let dir = path.parent().unwrap_or(Path::new("."));
        inotify.watches().add(dir, mask)?;
        inotify.into_event_stream(vec![0; EVENTS])
    };
    attach()
        .inspect_err(|error: &std::io::Error| debug!(%error, "no inotify"))
        .ok()
}
