//! Why no interface was selected: one line each, with the value and what there is to choose from.

use std::net::IpAddr;

use thiserror::Error;

pub use crate::addr::Family;

/// Why no interface was selected. `candidates` lists all interfaces as `name:[addresses]`.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum IfaceError {
    /// Neither family is needed.
    #[error("none defined stack: neither IPv4 nor IPv6 is enabled in the network config")]
    NoFamily,
    /// No interface has the name.
    #[error("no interface is named {name:?}: set --iface to one of {candidates}")]
    NoSuchName {
        /// The name asked for.
        name: String,
        /// What is there.
        candidates: String,
    },
    /// No interface has the address.
    #[error("no interface has the address {ip}: set --iface to one of {candidates}")]
    NoSuchAddress {
        /// The address asked for.
        ip: IpAddr,
        /// What is there.
        candidates: String,
    },
    /// An address of a family that is not enabled cannot name the interface.
    #[error(
        "interface address {ip} is {family}, which the network config does not enable: set --iface to a name or to an address of the other family; the interfaces are {candidates}"
    )]
    WrongFamily {
        /// The address asked for.
        ip: IpAddr,
        /// Its family.
        family: Family,
        /// What is there.
        candidates: String,
    },
    /// The published address is not local, and nothing else names the interface.
    #[error(
        "error looking up interface {ip}: no interface with given IP found: if that public address is translated on the way, set --iface \
         too, to one of {candidates}"
    )]
    PublicNotLocal {
        /// The address asked for.
        ip: IpAddr,
        /// What is there.
        candidates: String,
    },
    /// Nothing was asked for, the machine has no default route, and nothing else tells which interface is meant.
    #[error(
        "failed to get default interface: unable to find default route for {family}, and {found}: set --iface to one of {candidates}"
    )]
    NoDefaultRoute {
        /// The family without one.
        family: Family,
        /// What else was looked for.
        found: String,
        /// What is there.
        candidates: String,
    },
    /// The default route leads over several interfaces.
    #[error(
        "failed to get default interface: found default route but could not determine interface: it leads over several, set --iface to \
         one of {candidates}"
    )]
    Multipath {
        /// Where it leads.
        candidates: String,
    },
    /// No interface matches a regular expression.
    #[error(
        "could not match pattern {pattern} to any of the available network interfaces ({candidates})"
    )]
    NoMatch {
        /// The expression.
        pattern: String,
        /// What is there.
        candidates: String,
    },
    /// There is no way to the address that must be reachable.
    #[error("no route to {ip}: set --iface to one of {candidates}")]
    Unreachable {
        /// The address.
        ip: IpAddr,
        /// What is there.
        candidates: String,
    },
    /// The two families point to different interfaces, and the tunnel runs over one.
    #[error(
        "v6 {what} interface {v6} must be the same with v4 {what} interface {v4}: set --iface to one of {candidates}"
    )]
    Split {
        /// `address` or `default route`.
        what: &'static str,
        /// Name of the interface for IPv4.
        v4: String,
        /// Name of the interface for IPv6.
        v6: String,
        /// What is there.
        candidates: String,
    },
    /// The interface carries nothing.
    #[error(
        "interface {name} is down: bring it up with \"ip link set {name} up\", or set --iface to one of {candidates}"
    )]
    Down {
        /// The interface.
        name: String,
        /// What is there.
        candidates: String,
    },
    /// The interface has no MTU to derive the tunnel's from.
    #[error(
        "failed to determine MTU for {name} interface: it is 0, set one with \"ip link set {name} mtu 1500\""
    )]
    NoMtu {
        /// The interface.
        name: String,
    },
    /// The interface has no usable address.
    #[error(
        "failed to find {family} address for interface {name}: give it one, or set --iface to one of {candidates}"
    )]
    NoAddress {
        /// The family without one.
        family: Family,
        /// The interface.
        name: String,
        /// What is there.
        candidates: String,
    },
    /// Some were asked for, and each failed.
    #[error(
        "Failed to find interface to use that matches the interfaces and/or regexes provided: {}",
        misses.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
    )]
    NoneMatched {
        /// One error for each, in the order given.
        misses: Vec<IfaceError>,
    },
    /// None was asked for, and none could be found.
    #[error("Failed to find any valid interface to use: {0}")]
    NoneFound(Box<IfaceError>),
}
