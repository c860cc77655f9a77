//! Requests to the Kubernetes API: where it is, who we are to it, and how long an answer may take.
//!
//! Long lists are read piece by piece, so that no more than the trimmed nodes and a few kilobytes of text are in memory at once.

use std::{collections::VecDeque, io, time::Duration};

use flannel_core::kube::Node;
use futures_util::{AsyncBufReadExt as _, Stream, StreamExt as _};
use http::{Method, Request, header::CONTENT_TYPE};
use kube::{
    Client, Config,
    config::{KubeConfigOptions, Kubeconfig, KubeconfigError},
    core::WatchEvent,
};
use serde::{Deserialize, de::DeserializeOwned};
use tokio::{sync::mpsc, time::timeout};
use tracing::warn;

use super::{KubeOptions, without_credentials};
use crate::leases::{LeaseError, error::chain};

/// How long a connection may take to come about.
const CONNECT: Duration = Duration::from_secs(5);
/// How long an answer may take, or the next piece of a long one.
const ANSWER: Duration = Duration::from_secs(15);
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

/// A client of the API.
#[derive(Clone)]
pub(super) struct Connection {
    client: Client,
    server: String,
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connection")
            .field("server", &self.server)
            .finish_non_exhaustive()
    }
}

impl Connection {
    pub(super) async fn open(options: &KubeOptions) -> Result<Self, LeaseError> {
        let mut config = configure(options).await?;
        config.connect_timeout = Some(CONNECT);
        // How often and how long to try is decided by those who ask.
        config.default_retry = false;
        let server = without_credentials(config.cluster_url.to_string().trim_end_matches('/'));
        let client = Client::try_from(config).map_err(|error| LeaseError::KubeConfig {
            cause: chain(&error),
        })?;
        Ok(Self { client, server })
    }

    /// The URL, without secrets.
    pub(super) fn server(&self) -> &str {
        &self.server
    }

    pub(super) async fn get<T: DeserializeOwned>(
        &self,
        action: &str,
        path: &str,
    ) -> Result<T, LeaseError> {
        let text = self
            .call(
                action,
                self.client
                    .request_text(self.request(action, Method::GET, path, None)?),
            )
            .await?;
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
        self.call(action, self.client.request_text(request)).await
    }

    /// Reads one page of a list of nodes.
    pub(super) async fn page(&self, action: &str, path: &str) -> Result<Page, LeaseError> {
        let request = self.request(action, Method::GET, path, None)?;
        let answer = self
            .call(action, self.client.request_stream(request))
            .await?;
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
        let events = self
            .call(action, self.client.request_events::<Node>(request))
            .await?;
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

    async fn call<T>(
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
                server: self.server.clone(),
                action: action.to_owned(),
                code: status.code,
                message: if status.message.is_empty() {
                    format!("status {} {}", status.code, status.reason)
                } else {
                    status.message.clone()
                },
            },
            error => self.broken(action, chain(error)),
        }
    }

    /// What an event of a watch says is wrong.
    pub(super) fn answered(&self, action: &str, code: u16, message: &str) -> LeaseError {
        LeaseError::KubeAnswer {
            server: self.server.clone(),
            action: action.to_owned(),
            code,
            message: message.to_owned(),
        }
    }

    pub(super) fn broken(&self, action: &str, cause: String) -> LeaseError {
        LeaseError::KubeUnreachable {
            server: self.server.clone(),
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

/// The configuration by client-go's rules: a file, a URL that overrides what the file says, or the pod's service account.
async fn configure(options: &KubeOptions) -> Result<Config, LeaseError> {
    let refuse = |cause: String| LeaseError::KubeConfig { cause };
    let url = options
        .api_url
        .as_deref()
        .map(|url| {
            let with_scheme = if url.contains("://") {
                url.to_owned()
            } else {
                format!("http://{url}")
            };
            with_scheme.parse::<http::Uri>().map_err(|error| {
                refuse(format!(
                    "--kube-api-url={}: {error}: write one such as https://10.0.0.1:6443",
                    without_credentials(url)
                ))
            })
        })
        .transpose()?;
    let Some(path) = &options.kubeconfig else {
        if let Some(url) = url {
            return Ok(Config::new(url));
        }
        return Config::incluster().map_err(|error| {
            warn!(
                "Neither --kubeconfig nor --master was specified.  Using the inClusterConfig.  This might not work."
            );
            warn!(
                "error creating inClusterConfig, falling back to default config: {}",
                chain(&error)
            );
            refuse(
                "invalid configuration: no configuration has been provided, try setting KUBERNETES_MASTER environment variable: \
                 name one with --kubeconfig-file, or run in a pod with a service account"
                    .to_owned(),
            )
        });
    };
    let told = |error: &KubeconfigError| {
        refuse(format!(
            "--kubeconfig-file={}: {}",
            path.display(),
            chain(error)
        ))
    };
    let mut kubeconfig = Kubeconfig::read_from(path).map_err(|error| told(&error))?;
    if let Some(url) = url {
        for named in &mut kubeconfig.clusters {
            named.cluster.get_or_insert_default().server = Some(url.to_string());
        }
    }
    Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default())
        .await
        .map_err(|error| told(&error))
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
