//! Requests to the Kubernetes API: where it is, who we are to it, and how long an answer may take.
//!
//! Long lists are read piece by piece, so that no more than the trimmed nodes and a few kilobytes of text are in memory at once.

use std::{
    collections::VecDeque,
    io,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use flannel_core::kube::Node;
use futures_util::{AsyncBufReadExt as _, Stream, StreamExt as _};
use http::{Method, Request, header::CONTENT_TYPE};
use kube::{Client, core::WatchEvent};
use serde::{Deserialize, de::DeserializeOwned};
use tokio::{
    sync::mpsc,
    time::{Instant, timeout},
};
use tracing::{info, warn};

use super::{
    KubeOptions,
    credentials::{configure, without_secrets},
    without_credentials,
};
use crate::leases::{LeaseError, error::chain};

/// How long a connection may take to come about.
const CONNECT: Duration = Duration::from_secs(5);
/// How long an answer may take, or the next piece of a long one.
const ANSWER: Duration = Duration::from_secs(15);
/// The least time between two looks for other credentials after a refusal.
const REFUSED_AGAIN: Duration = Duration::from_secs(1);
/// The least time between two looks for other certificates, or another address, while the API cannot be reached.
const LOST_AGAIN: Duration = Duration::from_secs(5);
/// Nobody is known by these credentials.
const UNAUTHORIZED: u16 = 401;
/// Pieces of a long answer that wait to be read.
const BACKLOG: usize = 8;

/// What a page of a list of nodes amounts to.
#[derive(Debug, Deserialize)]
pub(super) struct Page {
    pub(super) metadata: PageMeta,
    #[serde(default, deserialize_with = "or_none")]
    pub(super) items: Vec<Node>,
}

/// Go writes an empty list as null.
fn or_none<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Vec<Node>, D::Error> {
    Option::<Vec<Node>>::deserialize(deserializer).map(Option::unwrap_or_default)
}

/// Where the list stands.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct PageMeta {
    #[serde(default)]
    pub(super) resource_version: String,
    #[serde(default, rename = "continue")]
    pub(super) next: Option<String>,
}

/// A client of the API, made anew when what it was made of is refused: tokens, certificates and addresses change.
#[derive(Clone)]
pub(super) struct Connection {
    shared: Arc<Shared>,
}

struct Shared {
    options: KubeOptions,
    made: Mutex<Made>,
    renewal: tokio::sync::Mutex<Renewal>,
}

/// A client as it was made of the files at some time.
#[derive(Clone)]
struct Made {
    client: Client,
    /// The URL, without secrets.
    server: String,
    /// How many were made before.
    number: u64,
}

/// When a client was last made anew, and what hindered it.
#[derive(Default)]
struct Renewal {
    tried: Option<Instant>,
    failed: Option<String>,
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connection")
            .field("server", &self.server())
            .finish_non_exhaustive()
    }
}

impl Made {
    async fn new(options: &KubeOptions, number: u64) -> Result<Self, LeaseError> {
        let mut config = configure(options, number == 0).await?;
        config.connect_timeout = Some(CONNECT);
        // How often and how long to try is decided by those who ask.
        config.default_retry = false;
        let server = without_credentials(config.cluster_url.to_string().trim_end_matches('/'));
        let client = Client::try_from(config).map_err(|error| LeaseError::KubeConfig {
            cause: without_secrets(&error),
        })?;
        Ok(Self {
            client,
            server,
            number,
        })
    }
}

impl Connection {
    pub(super) async fn open(options: &KubeOptions) -> Result<Self, LeaseError> {
        let made = Made::new(options, 0).await?;
        let shared = Arc::new(Shared {
            options: options.clone(),
            made: Mutex::new(made),
            renewal: tokio::sync::Mutex::default(),
        });
        Ok(Self { shared })
    }

    /// The URL, without secrets.
    pub(super) fn server(&self) -> String {
        self.made().server
    }

    fn made(&self) -> Made {
        let made = self.shared.made.lock();
        made.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Makes a client of what the files say now, unless there is one that is newer than `used`, or the last attempt was less than
    /// `pause` ago. True when there is a newer one.
    async fn renew(&self, used: u64, pause: Duration) -> bool {
        let mut renewal = self.shared.renewal.lock().await;
        if self.made().number > used {
            return true;
        }
        if renewal.tried.is_some_and(|at| at.elapsed() < pause) {
            return false;
        }
        renewal.tried = Some(Instant::now());
        match Box::pin(Made::new(&self.shared.options, used + 1)).await {
            Ok(made) => {
                renewal.failed = None;
                let mut current = self
                    .shared
                    .made
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner);
                *current = made;
                true
            }
            Err(error) => {
                let text = error.chain();
                if renewal.failed.as_ref() != Some(&text) {
                    warn!(
                        "the credentials cannot be read again, going on with those from before: {text}"
                    );
                    renewal.failed = Some(text);
                }
                false
            }
        }
    }

    pub(super) async fn get<T: DeserializeOwned>(
        &self,
        action: &str,
        path: &str,
    ) -> Result<T, LeaseError> {
        let request = self.request(action, Method::GET, path, None)?;
        let text = self.call(action, request, text).await?;
        serde_json::from_str(&text).map_err(|error| self.unreadable(action, &error))
    }

    /// Sends a change, and returns the answer.
    pub(super) async fn send(
        &self,
        action: &str,
        (method, path): (Method, &str),
        (kind, body): (&'static str, String),
    ) -> Result<String, LeaseError> {
        let request = self.request(action, method, path, Some((kind, body)))?;
        self.call(action, request, text).await
    }

    /// Reads one page of a list of nodes.
    pub(super) async fn page(&self, action: &str, path: &str) -> Result<Page, LeaseError> {
        let request = self.request(action, Method::GET, path, None)?;
        let ask = |client: Client, request| async move { client.request_stream(request).await };
        let answer = self.call(action, request, ask).await?;
        let mut answer = std::pin::pin!(answer);
        let (pieces, waiting) = mpsc::channel(BACKLOG);
        let reading = tokio::task::spawn_blocking(move || {
            let reader = io::BufReader::new(Pieces {
                waiting,
                current: VecDeque::new(),
            });
            serde_json::from_reader::<_, Page>(reader)
        });
        loop {
            let piece = match timeout(ANSWER, answer.fill_buf()).await {
                Ok(Ok(piece)) => piece.to_vec(),
                Ok(Err(error)) => return Err(self.broken(action, chain(&error))),
                Err(_elapsed) => return Err(self.late(action)),
            };
            if piece.is_empty() {
                break;
            }
            answer.consume_unpin(piece.len());
            // Whoever reads has given up: it says why below.
            if pieces.send(piece).await.is_err() {
                break;
            }
        }
        drop(pieces);
        match reading.await {
            Ok(page) => page.map_err(|error| self.unreadable(action, &error)),
            Err(_stopped) => Err(LeaseError::Worker {
                action: "read a list of nodes",
            }),
        }
    }

    /// Opens a watch of nodes.
    pub(super) async fn watch(
        &self,
        action: &str,
        path: &str,
    ) -> Result<impl Stream<Item = Result<WatchEvent<Node>, LeaseError>> + use<>, LeaseError> {
        let request = self.request(action, Method::GET, path, None)?;
        let ask =
            |client: Client, request| async move { client.request_events::<Node>(request).await };
        let events = self.call(action, request, ask).await?;
        let (this, action) = (self.clone(), action.to_owned());
        Ok(events.map(move |event| event.map_err(|error| this.refused(&action, &error))))
    }

    fn request(
        &self,
        action: &str,
        method: Method,
        path: &str,
        body: Option<(&'static str, String)>,
    ) -> Result<Request<Vec<u8>>, LeaseError> {
        let mut request = Request::builder().method(method).uri(path);
        let body = body.map_or_else(Vec::new, |(kind, body)| {
            if let Some(headers) = request.headers_mut() {
                headers.insert(CONTENT_TYPE, http::HeaderValue::from_static(kind));
            }
            body.into_bytes()
        });
        request
            .body(body)
            .map_err(|error| self.broken(action, chain(&error)))
    }

    /// Asks. A refusal of our credentials counts only when those that are in the files by now are refused, too.
    async fn call<T, A: Future<Output = Result<T, kube::Error>>>(
        &self,
        action: &str,
        request: Request<Vec<u8>>,
        ask: impl Fn(Client, Request<Vec<u8>>) -> A,
    ) -> Result<T, LeaseError> {
        let made = self.made();
        let error = match self
            .once(action, Box::pin(ask(made.client, request.clone())))
            .await
        {
            Ok(answer) => return Ok(answer),
            Err(error) => error,
        };
        match &error {
            LeaseError::KubeAnswer {
                code: UNAUTHORIZED, ..
            } => {
                if !self.renew(made.number, REFUSED_AGAIN).await {
                    return Err(error);
                }
                let answer = self
                    .once(action, Box::pin(ask(self.made().client, request)))
                    .await?;
                info!(
                    server = self.server(),
                    "our credentials were refused: those that were read again are accepted"
                );
                Ok(answer)
            }
            LeaseError::KubeAnswer { .. } => Err(error),
            _ => {
                // For the next request: it may be the certificates or the address, and an old connection may be dead.
                self.renew(made.number, LOST_AGAIN).await;
                Err(error)
            }
        }
    }

    async fn once<T>(
        &self,
        action: &str,
        answer: impl Future<Output = Result<T, kube::Error>>,
    ) -> Result<T, LeaseError> {
        match timeout(ANSWER, answer).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) => Err(self.refused(action, &error)),
            Err(_elapsed) => Err(self.late(action)),
        }
    }

    fn refused(&self, action: &str, error: &kube::Error) -> LeaseError {
        match error {
            kube::Error::Api(status) => LeaseError::KubeAnswer {
                server: self.server(),
                action: action.to_owned(),
                code: status.code,
                message: if status.message.is_empty() {
                    format!("status {} {}", status.code, status.reason)
                } else {
                    status.message.clone()
                },
            },
            error => self.broken(action, without_secrets(error)),
        }
    }

    /// What an event of a watch says is wrong.
    pub(super) fn answered(&self, action: &str, code: u16, message: &str) -> LeaseError {
        LeaseError::KubeAnswer {
            server: self.server(),
            action: action.to_owned(),
            code,
            message: message.to_owned(),
        }
    }

    pub(super) fn broken(&self, action: &str, cause: String) -> LeaseError {
        LeaseError::KubeUnreachable {
            server: self.server(),
            action: action.to_owned(),
            cause,
        }
    }

    fn unreadable(&self, action: &str, error: &serde_json::Error) -> LeaseError {
        // Without the text: it may be long, and hold what is not for the log.
        self.broken(action, format!("the answer cannot be read: {error}"))
    }

    fn late(&self, action: &str) -> LeaseError {
        self.broken(action, format!("no answer within {ANSWER:?}"))
    }
}

/// The text of an answer.
async fn text(client: Client, request: Request<Vec<u8>>) -> Result<String, kube::Error> {
    client.request_text(request).await
}

/// Pieces of an answer, for a reader that blocks.
struct Pieces {
    waiting: mpsc::Receiver<Vec<u8>>,
    current: VecDeque<u8>,
}

impl io::Read for Pieces {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if self.current.is_empty() {
            match self.waiting.blocking_recv() {
                Some(piece) => self.current = piece.into(),
                None => return Ok(0),
            }
        }
        self.current.read(into)
    }
}

/// A value for the query of a URL.
pub(super) fn escape(value: &str) -> String {
    value
        .bytes()
        .map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                char::from(byte).to_string()
            }
            byte => format!("%{byte:02X}"),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn query_values_are_escaped() {
        assert_eq!(escape("eyJ2IjoibWV0=&+/"), "eyJ2IjoibWV0%3D%26%2B%2F");
    }
}
