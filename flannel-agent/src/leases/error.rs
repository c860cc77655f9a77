//! What can go wrong with a lease store, and what the caller can do about it.

use std::{path::PathBuf, time::Duration};

use flannel_core::{
    acquire::AcquireError,
    kube::{NodeError, PrefixError},
};

/// How a failure has to be treated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// May go away by itself: the store is unreachable, another node was faster, the network is full.
    Retry,
    /// Needs a human, but the process may stay and try slowly (exit code 3 when it ends the process).
    Refused,
    /// A flag or a file named by a flag is wrong (exit code 2).
    Config,
}

/// A failure of a lease store.
#[derive(Debug, thiserror::Error)]
pub enum LeaseError {
    /// `--etcd-endpoints` was empty.
    #[error("no etcd endpoint given: pass --etcd-endpoints=http://host:2379")]
    NoEndpoint,
    /// An endpoint is not `[http://|https://]host:port`. `endpoint` never contains a password.
    #[error("etcd endpoint {endpoint:?}: {reason}")]
    Endpoint {
        /// The endpoint, without user name and password.
        endpoint: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Only one half of the client certificate was given.
    #[error(
        "--{given} is given without --{missing}: a client certificate needs both --etcd-certfile and --etcd-keyfile"
    )]
    HalfCertificate {
        /// The flag that was given.
        given: &'static str,
        /// The flag that is missing.
        missing: &'static str,
    },
    /// A password without a user name.
    #[error("--etcd-password is given without --etcd-username: give both or neither")]
    PasswordWithoutUser,
    /// A PEM file could not be read.
    #[error("read {what} {}: {source}: name a readable PEM file", path.display())]
    Pem {
        /// The flag or role of the file.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// `https://` without `--etcd-cafile` on a host that has no certificate bundle.
    #[error("no system certificate bundle found for {endpoint}: pass --etcd-cafile")]
    NoSystemRoots {
        /// The endpoint that needs TLS.
        endpoint: String,
    },
    /// An endpoint did not answer, or could not be reached.
    #[error("etcd endpoint {endpoint}: {action}: {cause}")]
    Unreachable {
        /// The endpoint tried last.
        endpoint: String,
        /// What was attempted.
        action: String,
        /// Why, as a chain of causes.
        cause: String,
    },
    /// An endpoint took the request and gave no answer in time.
    #[error("etcd endpoint {endpoint}: {action}: no answer within {timeout:?}")]
    Timeout {
        /// The endpoint tried last.
        endpoint: String,
        /// What was attempted.
        action: String,
        /// How long the answer was waited for.
        timeout: Duration,
    },
    /// etcd answered, and the answer is no.
    #[error("etcd endpoint {endpoint}: {action}: {message}")]
    Answer {
        /// The endpoint that answered.
        endpoint: String,
        /// What was attempted.
        action: String,
        /// The gRPC status code.
        code: i32,
        /// etcd's text.
        message: String,
    },
    /// The network configuration key does not exist.
    #[error(
        "flannel config not found in etcd store. Did you create your config using etcdv3 API? (key {key})"
    )]
    NoNetConf {
        /// The key that was read.
        key: String,
    },
    /// No file with the network configuration exists.
    #[error("no network configuration: none of {tried} exists")]
    NoNetConfFile {
        /// The files that were tried.
        tried: String,
    },
    /// The network configuration is not text.
    #[error(
        "network configuration {location} is not UTF-8: write JSON such as {{\"Network\":\"10.244.0.0/16\",\"Backend\":{{\"Type\":\"vxlan\"}}}}"
    )]
    NetConfText {
        /// The key or file.
        location: String,
    },
    /// No subnet fits the configuration and the leases of the others.
    #[error("acquire a lease: {0}")]
    Acquire(AcquireError),
    /// There was nothing to choose from, and no reason.
    #[error("acquire a lease: no candidate subnet")]
    NoCandidate,
    /// The directory of lease files could not be used.
    #[error("{action} {}", path.display())]
    File {
        /// What was attempted.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// There is no way to the Kubernetes API.
    #[error("Failed to create SubnetManager: fail to create kubernetes config: {cause}")]
    KubeConfig {
        /// Why.
        cause: String,
    },
    /// `--kube-annotation-prefix` is wrong.
    #[error("Failed to create SubnetManager: error creating network manager: {0}")]
    KubePrefix(PrefixError),
    /// `EVENT_QUEUE_DEPTH` is no number.
    #[error(
        "Failed to create SubnetManager: error creating network manager: env EVENT_QUEUE_DEPTH={value} format error: strconv.Atoi: parsing {value:?}: {reason}"
    )]
    KubeQueueDepth {
        /// Its value.
        value: String,
        /// Go's reason.
        reason: &'static str,
    },
    /// Nothing says which node this is.
    #[error(
        "Failed to create SubnetManager: env variables POD_NAME and POD_NAMESPACE must be set, or NODE_NAME"
    )]
    KubeNodeUnknown,
    /// Our pod is on no node.
    #[error("node name not present in pod spec '{pod}'")]
    KubePodWithoutNode {
        /// `namespace/name`.
        pod: String,
    },
    /// There is no Node object with our name.
    #[error("node {node:?} not found")]
    KubeNoNode {
        /// Our name.
        node: String,
    },
    /// Our Node object does not say what we need.
    #[error("{0}")]
    KubeNode(Box<NodeError>),
    /// The file with the network configuration cannot be read.
    #[error(
        "failed to read net conf: open {}: {source}: mount the ConfigMap there, or name the file with --net-config-path",
        path.display()
    )]
    KubeNetConf {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The Kubernetes API cannot be reached, or broke off.
    #[error("kubernetes {server}: {action}: {cause}")]
    KubeUnreachable {
        /// Its URL, without secrets.
        server: String,
        /// What was attempted.
        action: String,
        /// Why, as a chain of causes.
        cause: String,
    },
    /// The Kubernetes API answered, and the answer is no.
    #[error("kubernetes {server}: {action}: {message}")]
    KubeAnswer {
        /// Its URL, without secrets.
        server: String,
        /// What was attempted.
        action: String,
        /// The HTTP status code.
        code: u16,
        /// The server's text.
        message: String,
    },
    /// A worker thread ended without an answer.
    #[error("{action}: the worker thread ended without an answer")]
    Worker {
        /// What was attempted.
        action: &'static str,
    },
}

/// gRPC `UNAUTHENTICATED`.
pub(super) const UNAUTHENTICATED: i32 = 16;
/// gRPC `NOT_FOUND`.
pub(super) const NOT_FOUND: i32 = 5;
const INVALID_ARGUMENT: i32 = 3;
const PERMISSION_DENIED: i32 = 7;
const FAILED_PRECONDITION: i32 = 9;

impl LeaseError {
    /// Tells what the caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            LeaseError::NoEndpoint
            | LeaseError::Endpoint { .. }
            | LeaseError::HalfCertificate { .. }
            | LeaseError::PasswordWithoutUser
            | LeaseError::Pem { .. }
            | LeaseError::NoSystemRoots { .. }
            | LeaseError::NetConfText { .. }
            | LeaseError::KubeConfig { .. }
            | LeaseError::KubePrefix(_)
            | LeaseError::KubeQueueDepth { .. }
            | LeaseError::KubeNodeUnknown
            | LeaseError::Acquire(AcquireError::NoAddress { .. }) => ErrorKind::Config,
            LeaseError::File { source, .. }
                if source.kind() == std::io::ErrorKind::IsADirectory =>
            {
                ErrorKind::Config
            }
            LeaseError::Answer { code, .. }
                if [
                    INVALID_ARGUMENT,
                    PERMISSION_DENIED,
                    FAILED_PRECONDITION,
                    UNAUTHENTICATED,
                ]
                .contains(code) =>
            {
                ErrorKind::Refused
            }
            LeaseError::File { source, .. }
                if source.kind() == std::io::ErrorKind::PermissionDenied =>
            {
                ErrorKind::Refused
            }
            LeaseError::KubeAnswer {
                code: 401 | 403, ..
            } => ErrorKind::Refused,
            LeaseError::Unreachable { .. }
            | LeaseError::Timeout { .. }
            | LeaseError::Answer { .. }
            | LeaseError::KubePodWithoutNode { .. }
            | LeaseError::KubeNoNode { .. }
            | LeaseError::KubeNode(_)
            | LeaseError::KubeNetConf { .. }
            | LeaseError::KubeUnreachable { .. }
            | LeaseError::KubeAnswer { .. }
            | LeaseError::NoNetConf { .. }
            | LeaseError::NoNetConfFile { .. }
            | LeaseError::Acquire(AcquireError::OutOfSubnets { .. })
            | LeaseError::NoCandidate
            | LeaseError::File { .. }
            | LeaseError::Worker { .. } => ErrorKind::Retry,
        }
    }

    /// Whether the connection to etcd has already logged it, as the beginning of an outage.
    pub(crate) fn is_logged(&self) -> bool {
        matches!(
            self,
            LeaseError::Unreachable { .. }
                | LeaseError::Timeout { .. }
                | LeaseError::Pem { .. }
                | LeaseError::NoSystemRoots { .. }
        )
    }

    /// The message with all its causes, for a log line.
    pub fn chain(&self) -> String {
        chain(self)
    }
}

/// An error and its sources, joined by colons; a source that the text before it already repeats is left out.
pub(super) fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let line = cause.to_string();
        if !text.contains(&line) {
            text.push_str(": ");
            text.push_str(&line);
        }
        next = cause.source();
    }
    text
}
