//! The connection to etcd: endpoints, TLS, authentication, and what happens when an endpoint fails.
//!
//! One endpoint is in use at a time. The balancing channel of the client library would spread requests over all
//! endpoints and fail those that meet a dead one; flannel's default list contains a port that is nearly always dead.

use std::{
    future::Future,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use etcd_client::{Certificate, Client, ConnectOptions, Identity, TlsOptions};
use tokio::time::timeout;
use tracing::{debug, warn};

use super::EtcdOptions;
use crate::leases::{
    error::{LeaseError, UNAUTHENTICATED, chain},
    retry::Outage,
};

/// How long one endpoint may take to answer one request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// etcd closes connections that ping more often than every 5 s.
const KEEP_ALIVE: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(5));
/// Where Go, and so upstream, looks for the certificates of the system.
const SYSTEM_ROOTS: [&str; 6] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/pki/tls/cacert.pem",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/ssl/cert.pem",
];

/// gRPC codes that say something about the connection or the server's state, not about the request:
/// cancelled, unknown, deadline exceeded, internal, unavailable.
const TRANSPORT_CODES: [i32; 5] = [1, 2, 4, 13, 14];
const FAILED_PRECONDITION: i32 = 9;

/// The TLS files, as given on the command line.
#[derive(Clone, Debug, Default)]
struct TlsFiles {
    ca: Option<PathBuf>,
    /// Certificate and key.
    client: Option<(PathBuf, PathBuf)>,
}

/// The endpoint in use. `generation` tells a failed client from its successor.
#[derive(Default)]
struct Current {
    index: usize,
    generation: u64,
    /// Boxed, since a client is some kilobytes that every future would carry along.
    client: Option<Box<Client>>,
}

pub(super) struct Connection {
    /// Normalised URLs, `http://…` or `https://…`.
    endpoints: Vec<String>,
    user: Option<(String, String)>,
    tls: TlsFiles,
    current: tokio::sync::Mutex<Current>,
    outage: Mutex<Outage>,
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The password must not reach a log.
        f.debug_struct("Connection")
            .field("endpoints", &self.endpoints)
            .field("user", &self.user.as_ref().map(|(name, _)| name))
            .field("tls", &self.tls)
            .finish_non_exhaustive()
    }
}

impl Connection {
    /// Checks the options and reads the TLS files once, so that mistakes show at start.
    pub(super) async fn open(options: &EtcdOptions) -> Result<Self, LeaseError> {
        let client = match (&options.certfile, &options.keyfile) {
            (Some(cert), Some(key)) => Some((cert.clone(), key.clone())),
            (None, None) => None,
            (Some(_), None) => return Err(half("etcd-certfile", "etcd-keyfile")),
            (None, Some(_)) => return Err(half("etcd-keyfile", "etcd-certfile")),
        };
        let tls = TlsFiles {
            ca: options.cafile.clone(),
            client,
        };
        let user = match (&options.username, &options.password) {
            (Some(name), password) => Some((name.clone(), password.clone().unwrap_or_default())),
            (None, None) => None,
            (None, Some(_)) => return Err(LeaseError::PasswordWithoutUser),
        };
        let endpoints = options
            .endpoints
            .iter()
            .flat_map(|given| given.split(','))
            .map(str::trim)
            .filter(|given| !given.is_empty())
            .map(|given| normalise(given, tls.client.is_some()))
            .collect::<Result<Vec<_>, _>>()?;
        if endpoints.is_empty() {
            return Err(LeaseError::NoEndpoint);
        }
        let connection = Connection {
            endpoints,
            user,
            tls,
            current: tokio::sync::Mutex::default(),
            outage: Mutex::default(),
        };
        connection.check().await?;
        Ok(connection)
    }

    /// A connection to nowhere, for tests of what needs none.
    #[cfg(test)]
    pub(super) fn offline() -> Self {
        Connection {
            endpoints: Vec::new(),
            user: None,
            tls: TlsFiles::default(),
            current: tokio::sync::Mutex::default(),
            outage: Mutex::default(),
        }
    }

    /// The endpoints, for log lines.
    pub(super) fn describe(&self) -> String {
        self.endpoints.join(",")
    }

    /// Builds a client per endpoint without using it: bad URLs, PEM files and key pairs show here.
    async fn check(&self) -> Result<(), LeaseError> {
        let given = self.tls.ca.is_some() || self.tls.client.is_some();
        for endpoint in &self.endpoints {
            let plain = endpoint.starts_with("http://");
            if plain && given {
                warn!(
                    endpoint,
                    "plain http endpoint: the etcd certificates are not used"
                );
            } else if plain && self.user.is_some() {
                warn!(
                    endpoint,
                    "plain http endpoint: the etcd password is sent unencrypted"
                );
            }
            let options = self.options(endpoint).await?;
            let refused = |error: etcd_client::Error| LeaseError::Endpoint {
                endpoint: endpoint.clone(),
                reason: cause(&error),
            };
            Box::pin(Client::connect([endpoint], Some(options)))
                .await
                .map_err(refused)?;
        }
        Ok(())
    }

    /// Everything but the user, since a client with a user asks the server for a token at once. Files are read
    /// each time, so that rotated certificates are picked up.
    async fn options(&self, endpoint: &str) -> Result<ConnectOptions, LeaseError> {
        let (interval, patience) = KEEP_ALIVE;
        let options = ConnectOptions::new()
            .with_connect_timeout(CONNECT_TIMEOUT)
            .with_keep_alive(interval, patience)
            .with_keep_alive_while_idle(true)
            .with_require_leader(true)
            .with_auto_token_refresh(true);
        if endpoint.starts_with("http://") {
            return Ok(options);
        }
        let roots = match &self.tls.ca {
            Some(path) => certificates("--etcd-cafile", path).await?,
            None => system_roots(endpoint).await?,
        };
        let mut tls = TlsOptions::new().ca_certificate(Certificate::from_pem(roots));
        if let Some((cert, key)) = &self.tls.client {
            let cert = read_pem("--etcd-certfile", cert).await?;
            let key = read_pem("--etcd-keyfile", key).await?;
            tls = tls.identity(Identity::from_pem(cert, key));
        }
        Ok(options.with_tls(tls))
    }

    async fn dial(&self, endpoint: &str) -> Result<Client, Failure> {
        let options = self.options(endpoint).await.map_err(Failure::Local)?;
        let plain = options.clone();
        let Some((name, password)) = &self.user else {
            return Ok(Client::connect([endpoint], Some(plain)).await?);
        };
        let options = options.with_user(name, password);
        match Client::connect([endpoint], Some(options)).await {
            Err(etcd_client::Error::GRpcStatus(status))
                if i32::from(status.code()) == FAILED_PRECONDITION =>
            {
                // "authentication is not enabled": upstream goes on without a token too.
                debug!(
                    endpoint,
                    reason = status.message(),
                    "etcd wants no user name"
                );
                Ok(Client::connect([endpoint], Some(plain)).await?)
            }
            other => Ok(other?),
        }
    }

    /// The client in use, with its endpoint and generation.
    async fn client(&self) -> (usize, u64, Result<Box<Client>, Failure>) {
        let mut current = self.current.lock().await;
        let (index, generation) = (current.index, current.generation);
        if let Some(client) = &current.client {
            return (index, generation, Ok(client.clone()));
        }
        let endpoint = self.endpoint(index);
        let client = match timeout(REQUEST_TIMEOUT, Box::pin(self.dial(endpoint))).await {
            Ok(Ok(client)) => Box::new(client),
            Ok(Err(failure)) => return (index, generation, Err(failure)),
            Err(_) => return (index, generation, Err(Failure::Timeout)),
        };
        current.client = Some(client.clone());
        (index, generation, Ok(client))
    }

    /// Gives up the client of `generation` and turns to the next endpoint.
    async fn give_up(&self, generation: u64) {
        let mut current = self.current.lock().await;
        if current.generation == generation {
            let next = (current.index + 1) % self.endpoints.len().max(1);
            *current = Current {
                index: next,
                generation: generation + 1,
                client: None,
            };
        }
    }

    /// Drops the client, whatever its state, so that the next request connects and authenticates anew.
    pub(super) async fn reset(&self) {
        let generation = self.current.lock().await.generation;
        self.give_up(generation).await;
    }

    fn endpoint(&self, index: usize) -> &str {
        self.endpoints.get(index).map_or("", String::as_str)
    }

    /// Sends one request, to each endpoint once if need be. `action` completes the sentence "could not …".
    ///
    /// A request may have been executed although no answer came; whoever calls must be able to live with that.
    pub(super) async fn call<T, F, R>(&self, action: &str, request: F) -> Result<T, LeaseError>
    where
        F: Fn(Box<Client>) -> R,
        R: Future<Output = Result<T, etcd_client::Error>>,
    {
        let mut attempts = self.endpoints.len();
        // The first failure may only tell that the connection died since its last use. Silence is no such sign.
        let mut may_be_stale = true;
        loop {
            let (index, generation, client) = self.client().await;
            let outcome = match client {
                Err(failure) => Err(failure),
                Ok(client) => match timeout(REQUEST_TIMEOUT, Box::pin(request(client))).await {
                    Ok(outcome) => outcome.map_err(Failure::from),
                    Err(_) => Err(Failure::Timeout),
                },
            };
            let endpoint = self.endpoint(index);
            match outcome {
                Ok(value) => {
                    self.outage().recovered(endpoint);
                    return Ok(value);
                }
                Err(failure) => {
                    if failure.blames_connection() {
                        self.give_up(generation).await;
                        let silent = matches!(failure, Failure::Timeout);
                        if silent || !may_be_stale {
                            attempts = attempts.saturating_sub(1);
                        }
                        may_be_stale = false;
                    } else {
                        attempts = 0;
                    }
                    let anonymous = self.tls.client.is_none();
                    let error = failure.describe(endpoint, action, anonymous);
                    if attempts == 0 {
                        match error {
                            // The request is at fault. Whoever sent it knows what to say about it.
                            LeaseError::Answer { .. } => self.outage().recovered(endpoint),
                            _ => self.outage().failed(&error),
                        }
                        return Err(error);
                    }
                    debug!(error = %error.chain(), "trying the next etcd endpoint");
                }
            }
        }
    }

    fn outage(&self) -> std::sync::MutexGuard<'_, Outage> {
        self.outage.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Why a request brought no result.
enum Failure {
    Timeout,
    Etcd(etcd_client::Error),
    /// A file on this host.
    Local(LeaseError),
}

impl From<etcd_client::Error> for Failure {
    fn from(error: etcd_client::Error) -> Self {
        Failure::Etcd(error)
    }
}

impl Failure {
    /// Whether another endpoint, or the same one connected anew, may do better.
    fn blames_connection(&self) -> bool {
        match self {
            Failure::Local(_) => false,
            Failure::Etcd(etcd_client::Error::GRpcStatus(status)) => {
                let code = i32::from(status.code());
                TRANSPORT_CODES.contains(&code) || code == UNAUTHENTICATED
            }
            Failure::Timeout | Failure::Etcd(_) => true,
        }
    }

    fn describe(self, endpoint: &str, action: &str, anonymous: bool) -> LeaseError {
        let tls = endpoint.starts_with("https://");
        let (endpoint, action) = (endpoint.to_owned(), action.to_owned());
        match self {
            Failure::Local(error) => error,
            Failure::Timeout => LeaseError::Timeout {
                endpoint,
                action,
                timeout: REQUEST_TIMEOUT,
            },
            Failure::Etcd(etcd_client::Error::GRpcStatus(status))
                if !TRANSPORT_CODES.contains(&i32::from(status.code())) =>
            {
                LeaseError::Answer {
                    endpoint,
                    action,
                    code: i32::from(status.code()),
                    message: status.message().to_owned(),
                }
            }
            Failure::Etcd(error) => {
                let mut cause = cause(&error);
                // A server that misses a certificate closes the connection, and may do no more than that.
                if tls && anonymous && cause.contains("closed") {
                    cause.push_str(" (no client certificate was given)");
                }
                LeaseError::Unreachable {
                    endpoint,
                    action,
                    cause,
                }
            }
        }
    }
}

/// The text of a client error with its causes, which the client's own text leaves out.
pub(super) fn cause(error: &etcd_client::Error) -> String {
    match error {
        etcd_client::Error::TransportError(error) => chain(error),
        etcd_client::Error::GRpcStatus(status) => {
            let mut text = status.message().to_owned();
            let mut next = std::error::Error::source(status);
            while let Some(inner) = next {
                let line = inner.to_string();
                if !text.contains(&line) {
                    text = format!("{text}: {line}");
                }
                next = inner.source();
            }
            text
        }
        other => other.to_string(),
    }
}

fn half(given: &'static str, missing: &'static str) -> LeaseError {
    LeaseError::HalfCertificate { given, missing }
}

/// `http://` and `https://` are taken as written; without a scheme a client certificate decides.
fn normalise(given: &str, has_certificate: bool) -> Result<String, LeaseError> {
    let (scheme, rest) = match given.split_once("://") {
        Some((scheme, rest)) => (scheme.to_ascii_lowercase(), rest),
        None if has_certificate => ("https".to_owned(), given),
        None => ("http".to_owned(), given),
    };
    let shown = rest.rsplit_once('@').map_or(rest, |(_, host)| host);
    let refuse = |reason: &str| {
        Err(LeaseError::Endpoint {
            endpoint: format!("{scheme}://{shown}"),
            reason: reason.to_owned(),
        })
    };
    if shown != rest {
        return refuse("a user name belongs in --etcd-username, a password in --etcd-password");
    }
    if scheme != "http" && scheme != "https" {
        return refuse("the scheme must be http or https");
    }
    let authority = rest.trim_end_matches('/');
    if authority.is_empty() || authority.contains(['/', '?', '#', ' ']) {
        return refuse("expected http://host:port or https://host:port");
    }
    let port = authority
        .rsplit_once(':')
        .map(|(_, port)| port)
        .filter(|port| !port.ends_with(']'));
    if port.is_some_and(|port| !port.parse::<u16>().is_ok_and(|port| port > 0)) {
        return refuse("the port must be a number from 1 to 65535");
    }
    Ok(format!("{scheme}://{authority}"))
}

async fn read_pem(what: &'static str, path: &Path) -> Result<Vec<u8>, LeaseError> {
    tokio::fs::read(path)
        .await
        .map_err(|source| LeaseError::Pem {
            what,
            path: path.to_owned(),
            source,
        })
}

/// The client library takes a file without a single certificate, and then trusts nobody.
async fn certificates(what: &'static str, path: &Path) -> Result<Vec<u8>, LeaseError> {
    const BEGIN: &[u8] = b"-----BEGIN CERTIFICATE-----";
    let pem = read_pem(what, path).await?;
    if pem.windows(BEGIN.len()).any(|bytes| bytes == BEGIN) {
        return Ok(pem);
    }
    Err(LeaseError::Pem {
        what,
        path: path.to_owned(),
        source: std::io::Error::other("there is no certificate in it"),
    })
}

async fn system_roots(endpoint: &str) -> Result<Vec<u8>, LeaseError> {
    for path in SYSTEM_ROOTS {
        if let Ok(pem) = tokio::fs::read(path).await {
            return Ok(pem);
        }
    }
    Err(LeaseError::NoSystemRoots {
        endpoint: endpoint.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scheme_decides_and_certificates_decide_without_one() {
        for (given, certificate, expected) in [
            ("http://127.0.0.1:2379", true, "http://127.0.0.1:2379"),
            ("https://etcd:2379/", false, "https://etcd:2379"),
            ("HTTP://[::1]:2379", false, "http://[::1]:2379"),
            ("etcd:2379", false, "http://etcd:2379"),
            ("etcd:2379", true, "https://etcd:2379"),
        ] {
            assert_eq!(normalise(given, certificate).unwrap(), expected);
        }
    }

    #[test]
    fn bad_endpoints_are_named_without_their_password() {
        for given in [
            "unix:///run/etcd",
            "http://",
            "http://a/b",
            "http://root:hunter2@etcd:1",
        ] {
            let text = normalise(given, false).unwrap_err().to_string();
            assert!(!text.contains("hunter2"), "{text}");
            assert!(text.contains("http") || text.contains("unix"), "{text}");
        }
    }
}
