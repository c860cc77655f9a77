//! Watches: one JSON object a line, until the time is over, somebody ends it or the history is gone.

use super::fault::{Faults, Gone, WatchEnd};
use super::read::{Selection, parse_version};
use super::refusal::Refusal;
use super::request::{Attributes, Query};
use super::serve::Shared;
use super::store::{Change, Kind, Object, Store};
use hyper::body::Bytes;
use serde_json::json;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

/// How long a watch lasts if the client does not say.
const DEFAULT_TIMEOUT: Duration = Duration::from_mins(30);

/// A watch that was accepted.
#[derive(Debug)]
pub(crate) struct Watch {
    kind: Kind,
    selection: Selection,
    /// All changes up to this revision are known to the client.
    seen: u64,
    bookmarks: bool,
    timeout: Duration,
    /// What goes out first.
    first: Vec<Bytes>,
    /// The history began too late; the error is in [`Watch::first`].
    over: bool,
    epoch: u64,
    bookmark_epoch: u64,
}

impl Watch {
    /// Decides where the watch begins.
    pub(crate) fn open(
        store: &Store,
        faults: &Faults,
        asked: &Attributes,
        query: &Query,
    ) -> Result<Watch, Refusal> {
        let text = |name: &str| query.get(name).map_or("", String::as_str);
        let flag = |name: &str| matches!(text(name), "true" | "1");
        let selection = Selection::read(asked, query)?;
        let version = parse_version(text("resourceVersion"))?;
        let streaming = streaming_list(query, faults)?;
        let timeout = match text("timeoutSeconds").parse() {
            Ok(seconds) if seconds > 0 => Duration::from_secs(seconds),
            _ => DEFAULT_TIMEOUT,
        };
        let mut watch = Watch {
            kind: asked.kind,
            selection,
            seen: version,
            bookmarks: flag("allowWatchBookmarks"),
            timeout,
            first: Vec::new(),
            over: false,
            epoch: faults.watch_epoch,
            bookmark_epoch: faults.bookmark_epoch,
        };
        // A version of the future is accepted, and what happens before it comes is never shown.
        if version == 0 || streaming {
            // Without a version the watch begins with what there is.
            watch.first = store
                .all(asked.kind)
                .filter(|object| watch.selection.has(object))
                .map(|object| line(Change::Added, asked.kind, object))
                .collect();
            watch.seen = store.revision;
            if streaming {
                watch.first.push(watch.bookmark(store.revision, true));
            }
        } else if let Err(refusal) = store.after(asked.kind, version) {
            match faults.gone {
                Gone::Status => return Err(refusal),
                Gone::Event => {
                    watch.first.push(error_line(&refusal));
                    watch.over = true;
                }
            }
        }
        Ok(watch)
    }

    fn bookmark(&self, revision: u64, initial_end: bool) -> Bytes {
        let mut metadata =
            json!({"resourceVersion": revision.to_string(), "creationTimestamp": null});
        if initial_end {
            metadata["annotations"] = json!({"k8s.io/initial-events-end": "true"});
        }
        let object = json!({
            "kind": self.kind.name(), "apiVersion": self.kind.api_version(), "metadata": metadata,
            "spec": {}, "status": {},
        });
        format!("{}\n", json!({"type": "BOOKMARK", "object": object})).into()
    }

    /// Sends until it ends. A client that has gone ends it, too.
    pub(crate) async fn run(mut self, shared: Arc<Shared>, out: mpsc::Sender<io::Result<Bytes>>) {
        let mut signal = shared.subscribe();
        let end = Instant::now() + self.timeout;
        let mut next_bookmark = Instant::now() + shared.lock().faults.bookmark_every;
        let mut lines = std::mem::take(&mut self.first);
        loop {
            for line in lines.drain(..) {
                if out.send(Ok(line)).await.is_err() {
                    return;
                }
            }
            if self.over {
                return;
            }
            let due = end.min(next_bookmark);
            // The state is looked at after the signal was marked as seen: nothing in between is missed.
            signal.mark_unchanged();
            match self.look(&shared, &mut lines) {
                Next::Wait => {}
                Next::Send => continue,
                Next::Over(WatchEnd::Clean) => return,
                Next::Over(WatchEnd::Cut) => {
                    let cut = io::Error::from(io::ErrorKind::ConnectionReset);
                    // A client that is gone needs no end.
                    let _gone = out.send(Err(cut)).await;
                    return;
                }
            }
            tokio::select! {
                changed = signal.changed() => if changed.is_err() { return },
                () = out.closed() => return,
                () = sleep_until(due) => {
                    let now = Instant::now();
                    let frozen = shared.lock().faults.hanging;
                    if now >= next_bookmark {
                        next_bookmark = now + shared.lock().faults.bookmark_every;
                        if self.bookmarks && !frozen {
                            lines.push(self.bookmark(self.seen, false));
                        }
                    }
                    if now >= end && !frozen {
                        return;
                    }
                }
            }
        }
    }

    /// Collects what has happened since the last look.
    fn look(&mut self, shared: &Shared, lines: &mut Vec<Bytes>) -> Next {
        let state = shared.lock();
        if state.faults.hanging {
            return Next::Wait;
        }
        if state.faults.watch_epoch != self.epoch {
            return Next::Over(state.faults.watch_end);
        }
        match state.store.after(self.kind, self.seen) {
            Ok(entries) => {
                for entry in entries {
                    if let Some(line) = self.line_of(&entry) {
                        lines.push(line);
                    }
                }
                // Also when nothing of this kind has happened: a compaction does not hurt a watch that has kept up.
                self.seen = self.seen.max(state.store.revision);
            }
            Err(refusal) => {
                lines.push(error_line(&refusal));
                self.over = true;
            }
        }
        if state.faults.bookmark_epoch != self.bookmark_epoch {
            self.bookmark_epoch = state.faults.bookmark_epoch;
            if self.bookmarks {
                lines.push(self.bookmark(self.seen, false));
            }
        }
        if lines.is_empty() {
            Next::Wait
        } else {
            Next::Send
        }
    }

    /// An object that begins to be, or is no longer, selected is added or deleted for this watch.
    fn line_of(&self, entry: &super::store::Entry) -> Option<Bytes> {
        let is = self.selection.has(&entry.object) && entry.change != Change::Deleted;
        let was = entry
            .before
            .as_ref()
            .is_some_and(|before| self.selection.has(before));
        let change = match (was, is) {
            (false, false) => return None,
            (false, true) => Change::Added,
            (true, true) => Change::Modified,
            (true, false) => Change::Deleted,
        };
        Some(line(change, entry.kind_as(self.kind), &entry.object))
    }
}

enum Next {
    Wait,
    Send,
    Over(WatchEnd),
}

/// Whether the watch is to begin with a list; old servers refuse that.
fn streaming_list(query: &Query, faults: &Faults) -> Result<bool, Refusal> {
    let text = |name: &str| query.get(name).map_or("", String::as_str);
    let wanted = matches!(text("sendInitialEvents"), "true" | "1");
    let matching = text("resourceVersionMatch");
    let forbid = |field, why: &str| {
        Err(Refusal::invalid(
            "ListOptions",
            "",
            &[(field, format!("Forbidden: {why}"))],
        ))
    };
    if !faults.streaming_lists {
        if query.contains_key("sendInitialEvents") {
            return forbid(
                "sendInitialEvents",
                "sendInitialEvents is forbidden for watch unless the WatchList feature gate is enabled",
            );
        }
        if !matching.is_empty() {
            return forbid(
                "resourceVersionMatch",
                "resourceVersionMatch is forbidden for watch unless sendInitialEvents is provided",
            );
        }
        return Ok(false);
    }
    if query.contains_key("sendInitialEvents") && matching != "NotOlderThan" {
        return forbid(
            "resourceVersionMatch",
            "sendInitialEvents requires setting resourceVersionMatch to NotOlderThan",
        );
    }
    Ok(wanted)
}

fn line(change: Change, kind: Kind, object: &Object) -> Bytes {
    let mut text = format!(r#"{{"type":"{}","object":"#, change.as_str()).into_bytes();
    text.extend(object.text(kind));
    text.extend(b"}\n");
    text.into()
}

fn error_line(refusal: &Refusal) -> Bytes {
    format!(r#"{{"type":"ERROR","object":{}}}{}"#, refusal.body, "\n").into()
}
