//! Why the daemon cannot start, and with which exit code it ends then.

use flannel_core::{config::ConfigError, iface::IfaceError, mark::MarkError};
use thiserror::Error;

use crate::{
    cli::{EXIT_KERNEL, EXIT_STORE, EXIT_USAGE},
    dataplane::{DataplaneError, netlink::NetlinkError},
    files::FileError,
    leases::{ErrorKind, LeaseError},
    wireguard::WireguardError,
};

/// Why the daemon could not start.
#[derive(Debug, Error)]
pub enum StartError {
    /// The interface to use cannot be told.
    #[error(transparent)]
    Iface(#[from] IfaceError),
    /// The network configuration is wrong.
    #[error("network configuration from {origin}: {source}")]
    Config {
        /// Which store it came from.
        origin: String,
        /// What is wrong.
        source: ConfigError,
    },
    /// A configuration that this version cannot serve.
    #[error("network configuration from {origin}: {reason}")]
    Unsupported {
        /// Which store it came from.
        origin: String,
        /// What and what to do.
        reason: String,
    },
    /// A device name too long for the kernel.
    #[error(transparent)]
    Mark(#[from] MarkError),
    /// A file that must be written and cannot.
    #[error(transparent)]
    File(#[from] FileError),
    /// The lease store refuses.
    #[error(transparent)]
    Lease(#[from] LeaseError),
    /// The kernel's own objects cannot be read.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// A change to the kernel failed.
    #[error(transparent)]
    Dataplane(#[from] DataplaneError),
    /// Flags that ask for eBPF, and it cannot be.
    #[error("{flag} was asked for, but {reason}")]
    NoBpf {
        /// What was asked for.
        flag: &'static str,
        /// Why not.
        reason: String,
    },
    /// Flags that exclude each other.
    #[error("{0}")]
    Flags(&'static str),
    /// Neither vxlan nor eBPF.
    #[error("this node has no way to carry the overlay: {vxlan}; and {bpf}")]
    NoPath {
        /// Why no vxlan device, and what to do.
        vxlan: String,
        /// Why no eBPF.
        bpf: String,
    },
    /// The encrypted overlay.
    #[error(transparent)]
    Wireguard(#[from] WireguardError),
    /// No random bytes for a MAC address.
    #[error("read /dev/urandom for a MAC address")]
    Random(#[source] std::io::Error),
    /// Not even netlink.
    #[error("CAP_NET_ADMIN is missing: run as root, or add the capability")]
    NoPrivilege,
}

impl StartError {
    /// The process's exit code.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Iface(_)
            | Self::Config { .. }
            | Self::Unsupported { .. }
            | Self::Mark(_)
            | Self::Flags(_)
            | Self::File(_) => EXIT_USAGE,
            Self::Lease(error) if error.kind() == ErrorKind::Config => EXIT_USAGE,
            Self::Wireguard(error) if error.is_usage() => EXIT_USAGE,
            Self::Lease(_) => EXIT_STORE,
            Self::Netlink(_)
            | Self::Dataplane(_)
            | Self::NoBpf { .. }
            | Self::NoPath { .. }
            | Self::Wireguard(_)
            | Self::Random(_)
            | Self::NoPrivilege => EXIT_KERNEL,
        }
    }
}
