//! Kubernetes Events about this node, for those who look at it with kubectl. They are an extra: nothing waits for them, and where they
//! are forbidden nobody is told.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use flannel_core::kube::Node;
use http::Method;
use k8s_openapi::jiff::Timestamp;
use serde_json::json;
use tokio::{sync::mpsc, task::JoinHandle, time::Instant};
use tracing::debug;

use super::connection::Connection;
use crate::leases::LeaseError;

/// Who reports.
const COMPONENT: &str = "flannel-agent";
/// Where Events about nodes are, as the kubelet's.
const NAMESPACE: &str = "default";
/// Events that may wait.
const BACKLOG: usize = 16;
/// The same Event is not sent again within this time.
const REPEAT: Duration = Duration::from_mins(10);
/// How long not to try where they are forbidden.
const FORBIDDEN: Duration = Duration::from_hours(1);

/// What there is to say.
#[derive(Clone, Debug)]
pub(super) struct Event {
    /// One word in camel case, for programs.
    pub(super) reason: &'static str,
    /// For people.
    pub(super) message: String,
    /// Whether somebody should look.
    pub(super) warning: bool,
}

impl Event {
    pub(super) fn warning(reason: &'static str, message: impl Into<String>) -> Self {
        Self {
            reason,
            message: message.into(),
            warning: true,
        }
    }
}

/// Sends Events, in a task of its own.
#[derive(Debug)]
pub(super) struct Recorder {
    queue: mpsc::Sender<(String, String, Event)>,
    task: JoinHandle<()>,
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Recorder {
    pub(super) fn start(connection: Arc<Connection>) -> Self {
        let (queue, waiting) = mpsc::channel(BACKLOG);
        let task = tokio::spawn(run(connection, waiting));
        Self { queue, task }
    }

    /// Says something about a node.
    pub(super) fn tell(&self, node: &Node, event: Event) {
        let told = (node.name.clone(), node.uid.clone(), event);
        if self.queue.try_send(told).is_err() {
            debug!("an Event was dropped: too many are waiting");
        }
    }
}

async fn run(connection: Arc<Connection>, mut waiting: mpsc::Receiver<(String, String, Event)>) {
    let mut said: BTreeMap<(&'static str, String), Instant> = BTreeMap::new();
    let mut quiet_until = Instant::now();
    while let Some((node, uid, event)) = waiting.recv().await {
        let now = Instant::now();
        said.retain(|_, at| now < *at + REPEAT);
        let key = (event.reason, event.message.clone());
        if now < quiet_until || said.contains_key(&key) {
            continue;
        }
        said.insert(key, now);
        let path = format!("/api/v1/namespaces/{NAMESPACE}/events");
        let body = body(&node, &uid, &event, Timestamp::now());
        let sent = connection
            .send(
                "create an Event",
                (Method::POST, &path),
                ("application/json", body),
            )
            .await;
        if let Err(error) = sent {
            if let LeaseError::KubeAnswer {
                code: 401 | 403, ..
            } = error
            {
                quiet_until = now + FORBIDDEN;
            }
            debug!(error = error.chain(), "an Event was not sent");
        }
    }
}

fn body(node: &str, uid: &str, event: &Event, now: Timestamp) -> String {
    let time = seconds(now);
    let name = format!("{node:.200}.{:x}", now.as_nanosecond());
    json!({
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "involvedObject": {"apiVersion": "v1", "kind": "Node", "name": node, "uid": uid},
        "reason": event.reason,
        "message": event.message,
        "type": if event.warning { "Warning" } else { "Normal" },
        "firstTimestamp": time,
        "lastTimestamp": time,
        "count": 1,
        "source": {"component": COMPONENT, "host": node},
        "reportingComponent": COMPONENT,
        "reportingInstance": node,
    })
    .to_string()
}

/// A time as the API writes it.
pub(super) fn seconds(time: Timestamp) -> String {
    Timestamp::from_second(time.as_second()).map_or_else(|_| String::new(), |time| time.to_string())
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1;

    use super::*;

    #[test]
    fn an_event_is_what_the_api_takes() {
        let event = Event::warning("NoPodCIDR", "node \"a\" pod cidr not assigned");
        let now = Timestamp::from_millisecond(1_763_677_618_123).unwrap();
        let text = body("a", "62dc9128", &event, now);
        let read: v1::Event = serde_json::from_str(&text).unwrap();
        assert_eq!(read.involved_object.kind.as_deref(), Some("Node"));
        assert_eq!(read.involved_object.uid.as_deref(), Some("62dc9128"));
        assert_eq!(read.type_.as_deref(), Some("Warning"));
        assert_eq!(read.reporting_component.as_deref(), Some("flannel-agent"));
        assert!(
            text.contains(r#""firstTimestamp":"2025-11-20T22:26:58Z""#),
            "{text}"
        );
    }
}
