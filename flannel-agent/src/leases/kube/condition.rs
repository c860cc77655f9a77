//! The node's condition `NetworkUnavailable`, which keeps pods away from a node without an overlay.

use std::time::Duration;

use http::Method;
use k8s_openapi::jiff::Timestamp;
use tokio::time::{Instant, sleep, sleep_until};
use tracing::{info, warn};

use super::{
    KubeLeases,
    events::{Event, seconds},
    name,
};
use crate::{
    health::{Board, Lacking, Part},
    leases::{
        ErrorKind, LeaseError,
        retry::{Backoff, jittered},
    },
};

/// How long the overlay may be down before the cluster is told: a device that somebody deleted is back sooner.
const GRACE: Duration = Duration::from_secs(3);
/// How long to wait after a refusal.
const REFUSED: Duration = Duration::from_secs(30);

/// How the node is.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Verdict {
    /// Not up yet, or only something is lacking that pods can do without.
    Open,
    /// Everything is in place.
    Up,
    /// The overlay is down, and this is what is lacking.
    Down(String),
}

fn judge(lacking: &Lacking) -> Verdict {
    if lacking.is_empty() {
        return Verdict::Up;
    }
    let needed = [Part::Uplink, Part::Lease, Part::Datapath];
    let down: Vec<String> = needed
        .iter()
        .filter_map(|part| Some(format!("{}: {}", part.as_str(), lacking.get(part)?)))
        .collect();
    if down.is_empty() {
        Verdict::Open
    } else {
        Verdict::Down(down.join("; "))
    }
}

/// Waits for the next verdict that holds for long enough, and tells Events about it.
struct Judge<'a> {
    store: &'a KubeLeases,
    lacking: tokio::sync::watch::Receiver<Lacking>,
    /// The last verdict that held. Nothing is down before it was up.
    held: Verdict,
}

impl<'a> Judge<'a> {
    fn new(store: &'a KubeLeases, board: &Board) -> Self {
        Self {
            store,
            lacking: board.watch(),
            held: Verdict::Open,
        }
    }

    /// The next verdict that is another one. Cancel-safe.
    async fn next(&mut self) -> Verdict {
        let mut down_since: Option<Instant> = None;
        loop {
            let verdict = judge(&self.lacking.borrow_and_update());
            match &verdict {
                Verdict::Up => {
                    down_since = None;
                    if self.held != Verdict::Up {
                        return self.hold(verdict);
                    }
                }
                Verdict::Open => down_since = None,
                Verdict::Down(_) if self.held == Verdict::Open => {}
                Verdict::Down(_) => {
                    let due = *down_since.get_or_insert_with(Instant::now) + GRACE;
                    if Instant::now() >= due && self.held != verdict {
                        return self.hold(verdict);
                    }
                    if self.held == Verdict::Up {
                        tokio::select! {
                            () = sleep_until(due) => {}
                            _ = self.lacking.changed() => {}
                        }
                        continue;
                    }
                }
            }
            if self.lacking.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    fn hold(&mut self, verdict: Verdict) -> Verdict {
        let event = match (&self.held, &verdict) {
            (Verdict::Down(_), Verdict::Up) => Some(Event {
                reason: "OverlayUp",
                message: "flannel's overlay network is up again on this node".into(),
                warning: false,
            }),
            (_, Verdict::Down(why)) => Some(Event::warning(
                "OverlayDown",
                format!("flannel's overlay network is down on this node: {why}"),
            )),
            _ => None,
        };
        if let Some(event) = event {
            self.store.tell(event);
        }
        self.held = verdict.clone();
        verdict
    }
}

/// Tells Events only.
pub(super) async fn announce(store: &KubeLeases, board: &Board) {
    let mut judge = Judge::new(store, board);
    loop {
        judge.next().await;
    }
}

/// Keeps the condition as the node is. At the end it stays as it is.
pub(super) async fn attend(store: &KubeLeases, board: &Board) {
    let mut judge = Judge::new(store, board);
    let mut known = store.known();
    let mut verdict = Verdict::Open;
    // The object to which what was said: another one does not have it.
    let mut said: Option<(Verdict, String)> = None;
    let mut backoff = Backoff::new();
    let mut troubled = false;
    loop {
        let uid = store
            .own_node(&known.borrow_and_update())
            .map(|node| node.uid);
        let wanted = uid
            .filter(|_| verdict != Verdict::Open)
            .map(|uid| (verdict.clone(), uid));
        if wanted.is_none() || wanted == said {
            tokio::select! {
                next = judge.next() => verdict = next,
                Ok(()) = known.changed() => {}
            }
            continue;
        }
        match set(store, &verdict).await {
            Ok(()) => {
                let (status, reason) = words(&verdict);
                info!(status, reason, "set the node condition NetworkUnavailable");
                said = wanted;
                troubled = false;
                backoff.reset();
            }
            Err(error) => {
                if !troubled {
                    warn!("CompleteLease execute error err: {}", error.chain());
                    troubled = true;
                }
                let wait = if error.kind() == ErrorKind::Refused {
                    jittered(REFUSED)
                } else {
                    backoff.next_wait()
                };
                tokio::select! {
                    next = judge.next() => verdict = next,
                    () = sleep(wait) => {}
                }
            }
        }
    }
}

fn words(verdict: &Verdict) -> (&'static str, &'static str) {
    match verdict {
        Verdict::Down(_) => ("True", "FlannelIsDown"),
        Verdict::Open | Verdict::Up => ("False", "FlannelIsUp"),
    }
}

async fn set(store: &KubeLeases, verdict: &Verdict) -> Result<(), LeaseError> {
    let node = name::find(store).await?;
    let path = format!("/api/v1/nodes/{node}/status");
    let patch = (
        "application/strategic-merge-patch+json",
        patch(verdict, Timestamp::now()),
    );
    store
        .shared
        .connection
        .send(
            "set the node condition NetworkUnavailable",
            (Method::PATCH, &path),
            patch,
        )
        .await?;
    Ok(())
}

/// The patch, byte for byte upstream's when the network is up.
fn patch(verdict: &Verdict, now: Timestamp) -> String {
    let (status, reason) = words(verdict);
    let message = match verdict {
        Verdict::Down(why) => why.as_str(),
        Verdict::Open | Verdict::Up => "Flannel is running on this node",
    };
    let (time, message) = (seconds(now), serde_json::Value::from(message));
    format!(
        r#"{{"status":{{"conditions":[{{"type":"NetworkUnavailable","status":"{status}","lastHeartbeatTime":"{time}","lastTransitionTime":"{time}","reason":"{reason}","message":{message}}}]}}}}"#
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_patch_is_upstreams() {
        let now = Timestamp::from_millisecond(1_763_677_665_999).unwrap();
        assert_eq!(
            patch(&Verdict::Up, now),
            r#"{"status":{"conditions":[{"type":"NetworkUnavailable","status":"False","lastHeartbeatTime":"2025-11-20T22:27:45Z","lastTransitionTime":"2025-11-20T22:27:45Z","reason":"FlannelIsUp","message":"Flannel is running on this node"}]}}"#
        );
        let down = patch(&Verdict::Down("datapath: \"x\"".into()), now);
        assert!(
            down.contains(r#""status":"True""#) && down.contains(r#""message":"datapath: \"x\"""#),
            "{down}"
        );
    }

    #[test]
    fn only_what_carries_packets_makes_the_overlay_down() {
        let lacking = |parts: &[Part]| -> Lacking {
            parts.iter().map(|part| (*part, "x".to_owned())).collect()
        };
        assert_eq!(judge(&lacking(&[])), Verdict::Up);
        assert_eq!(judge(&lacking(&[Part::Firewall])), Verdict::Open);
        assert_eq!(
            judge(&lacking(&[Part::Datapath, Part::Firewall])),
            Verdict::Down("datapath: x".into())
        );
    }
}
