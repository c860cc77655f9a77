//! Faults on demand.

use super::ApiServer;
use super::fault::{Failure, Gone, WatchEnd};
use super::tls::{Authority, Validity};
use anyhow::bail;
use std::sync::PoisonError;
use std::time::Duration;

impl ApiServer {
    /// Closes the socket and cuts all connections: who connects is refused. The objects stay.
    pub fn stop(&self) -> anyhow::Result<()> {
        self.shared.change(|state| state.faults.listening = false);
        self.cut_connections()?;
        self.wait_bound(false)
    }

    /// Opens the socket again.
    pub fn resume(&self) -> anyhow::Result<()> {
        self.shared.change(|state| state.faults.listening = true);
        self.wait_bound(true)
    }

    /// A restart of the server: all connections are cut, the objects stay.
    pub fn restart(&self) -> anyhow::Result<()> {
        self.stop()?;
        self.resume()
    }

    /// Cuts all connections, also those that hang. When it returns none of them can carry anything any more: what happens
    /// later is not told by a watch of before.
    pub fn cut_connections(&self) -> anyhow::Result<()> {
        let epoch = self.shared.change(|state| {
            state.faults.connection_epoch += 1;
            state.faults.connection_epoch
        });
        self.wait_cut(epoch)
    }

    /// Accepts connections and says nothing any more, to new and old ones; `false` ends it, and what was asked is answered.
    pub fn hang(&self, hanging: bool) {
        self.shared.change(|state| state.faults.hanging = hanging);
    }

    /// Ends all watches.
    pub fn end_watches(&self, how: WatchEnd) {
        self.shared.change(|state| {
            state.faults.watch_end = how;
            state.faults.watch_epoch += 1;
        });
    }

    /// Answers each request later by `delay`; events of watches come at once.
    pub fn delay(&self, delay: Duration) {
        self.shared.change(|state| state.faults.delay = delay);
    }

    /// Answers with a failure, besides those that were asked for before.
    pub fn fail(&self, failure: Failure) {
        self.shared
            .change(|state| state.faults.failures.push(failure));
    }

    /// Takes all failures back.
    pub fn stop_failing(&self) {
        self.shared.change(|state| state.faults.failures.clear());
    }

    /// Forgets the history: lists continue and watches begin no further back than now.
    pub fn compact(&self) {
        self.shared.change(|state| state.store.compact());
    }

    /// How a watch that begins too early is refused.
    pub fn set_gone(&self, gone: Gone) {
        self.shared.change(|state| state.faults.gone = gone);
    }

    /// Whether watches may begin with a list (`sendInitialEvents`), as newer servers allow. At first they may not.
    pub fn set_streaming_lists(&self, on: bool) {
        self.shared
            .change(|state| state.faults.streaming_lists = on);
    }

    /// How often watches that allow it get a bookmark; a minute at first. It holds for watches that begin later.
    pub fn set_bookmark_every(&self, every: Duration) {
        self.shared
            .change(|state| state.faults.bookmark_every = every);
    }

    /// Sends a bookmark to every watch that allows it, now.
    pub fn send_bookmarks(&self) {
        self.shared.change(|state| state.faults.bookmark_epoch += 1);
    }

    /// Presents a certificate that has expired, to those who connect from now on; `false` presents a new good one.
    pub fn expire_certificate(&self, expired: bool) -> anyhow::Result<()> {
        let validity = if expired {
            Validity::Expired
        } else {
            Validity::Current
        };
        self.present(validity)
    }

    /// Moves to another authority: who trusts the old one alone cannot connect any more. [`ApiServer::ca`] and kubeconfigs of
    /// later have the new one.
    pub fn change_authority(&self) -> anyhow::Result<()> {
        let authority = Authority::new("kubernetes")?;
        *self
            .authority
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = authority;
        self.present(Validity::Current)
    }

    fn present(&self, validity: Validity) -> anyhow::Result<()> {
        let std::net::IpAddr::V4(ip) = self.address.ip() else {
            bail!("an IPv4 server");
        };
        let tls = {
            let authority = self.authority.lock();
            let authority = authority.unwrap_or_else(PoisonError::into_inner);
            authority.server(ip, &self.clients, validity)?
        };
        self.shared.change(|state| state.tls = tls);
        self.cut_connections()
    }
}
