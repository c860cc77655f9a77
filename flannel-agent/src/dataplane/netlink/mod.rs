//! The kernel's own objects, by netlink: thin reads and single changes. It must never decide anything.

mod device;
mod direct;
mod family;
mod filters;
mod headroom;
mod monitor;
mod plain;
mod pods;
mod scratch;
mod survey;
mod underlay;
mod uplinks;
mod write;

use std::{io, sync::Arc};

use futures_util::TryStreamExt as _;
use rtnetlink::{
    Error as RtError, Handle, new_connection,
    packet_route::{link::LinkMessage, route::RouteMessage},
};
use thiserror::Error;
use tokio::sync::{Mutex, MutexGuard};

pub(crate) use family::own_address;
pub use monitor::{Change, LinkChange, NeighbourChange, watch};
pub(crate) use scratch::TUNNEL_PORT;
pub use survey::Survey;
pub use underlay::Underlay;
pub use uplinks::Uplinks;

/// A netlink request that failed.
#[derive(Debug, Error)]
pub enum NetlinkError {
    /// No socket.
    #[error("open a netlink socket")]
    Open(#[source] io::Error),
    /// The kernel refused.
    #[error("{what}: {cause}{}", advice(cause))]
    Refused {
        /// What was attempted, with its values.
        what: String,
        /// The kernel's answer.
        #[source]
        cause: io::Error,
    },
    /// The answer made no sense.
    #[error("{what}: {reason}")]
    Unexpected {
        /// What was attempted, with its values.
        what: String,
        /// What was wrong with the answer.
        reason: String,
    },
}

impl NetlinkError {
    /// The errno, where the kernel gave one.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Open(cause) | Self::Refused { cause, .. } => cause.raw_os_error(),
            Self::Unexpected { .. } => None,
        }
    }

    pub(crate) fn new(what: impl Into<String>, error: &RtError) -> Self {
        let what = what.into();
        match error {
            RtError::NetlinkError(message) => Self::Refused {
                what,
                cause: io::Error::from_raw_os_error(-message.raw_code()),
            },
            other => Self::Unexpected {
                what,
                reason: other.to_string(),
            },
        }
    }
}

/// What usually helps against an errno.
fn advice(cause: &io::Error) -> &'static str {
    match cause.raw_os_error() {
        Some(libc::EPERM) => " (the agent needs CAP_NET_ADMIN)",
        Some(libc::ENETUNREACH | libc::ENETDOWN) => " (is the interface up?)",
        _ => "",
    }
}

/// A connection to the kernel's routing netlink, in the network namespace that the process was in when it was opened.
#[derive(Clone, Debug)]
pub struct Netlink {
    handle: Handle,
    /// Held while a list is read: a socket gives one at a time, and refuses another with EBUSY (`__netlink_dump_start`).
    lists: Arc<Mutex<()>>,
}

impl Netlink {
    /// Opens a connection and drives it on the current runtime.
    pub fn open() -> Result<Self, NetlinkError> {
        let (connection, handle, _) = new_connection().map_err(NetlinkError::Open)?;
        tokio::spawn(connection);
        Ok(Self {
            handle,
            lists: Arc::default(),
        })
    }

    /// Waits until no list is being read. Take it before a list is asked for, and keep it to the list's end.
    async fn turn(&self) -> MutexGuard<'_, ()> {
        self.lists.lock().await
    }

    /// The same for another task, on a connection of its own if there can be one: on each the kernel lists one thing at a time, and
    /// answers EBUSY to whoever asks meanwhile (`__netlink_dump_start`).
    pub(crate) fn for_another_task(&self) -> Self {
        Self::open().unwrap_or_else(|_| self.clone())
    }

    /// All interfaces.
    async fn list_links(&self) -> Result<Vec<LinkMessage>, NetlinkError> {
        let _turn = self.turn().await;
        let links = self.handle.link().get().execute().try_collect().await;
        links.map_err(|error| NetlinkError::new("list links", &error))
    }

    /// All routes of the family that is asked for.
    pub(crate) async fn list_routes(
        &self,
        request: RouteMessage,
    ) -> Result<Vec<RouteMessage>, NetlinkError> {
        let _turn = self.turn().await;
        let routes = self.handle.route().get(request).execute().try_collect();
        let routes = routes.await;
        routes.map_err(|error| NetlinkError::new("list routes", &error))
    }

    /// The connection itself, for requests that live elsewhere.
    pub(crate) fn handle(&self) -> &Handle {
        &self.handle
    }
}
