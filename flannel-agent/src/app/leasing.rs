//! The lease store's task: takes a lease, then keeps it over all sessions.

use tokio::{sync::watch, task::JoinHandle};
use tokio_util::sync::CancellationToken;

use super::StartError;
use crate::{
    health::{Board, Part},
    leases::{Offer, Store, View},
};

/// This node's lease, being kept.
#[derive(Debug)]
pub(super) struct Leasing {
    offers: watch::Sender<Offer>,
    views: watch::Receiver<View>,
    task: JoinHandle<()>,
}

impl Leasing {
    /// Takes a lease and goes on keeping it. `None` when cancelled.
    pub(super) async fn start(
        store: Store,
        offer: Offer,
        board: &Board,
        cancel: &CancellationToken,
    ) -> Result<Option<Self>, StartError> {
        board.lack(Part::Lease, format!("waiting for {}", store.describe()));
        let tell = |trouble: &str| board.lack(Part::Lease, trouble);
        let held = store.acquire_telling(&offer, cancel, tell).await;
        let Some(held) = held.transpose()? else {
            return Ok(None);
        };
        board.settle(Part::Lease);
        let (offers, offers_out) = watch::channel(offer);
        let (views_in, views) = watch::channel(View {
            own: Some(held.lease.clone()),
            ..View::default()
        });
        let task = tokio::spawn(store.run(held, offers_out, views_in, cancel.clone()));
        Ok(Some(Self {
            offers,
            views,
            task,
        }))
    }

    /// What the store knows.
    pub(super) fn views(&self) -> watch::Receiver<View> {
        self.views.clone()
    }

    /// Publishes something else under the same subnet, if it is something else.
    pub(super) fn offer(&self, offer: Offer) {
        self.offers.send_if_modified(|current| {
            let offer = Offer {
                previous: current.previous,
                ..offer
            };
            let changed = *current != offer;
            *current = offer;
            changed
        });
    }

    /// Waits until the store's task has ended, which cancelling makes it do.
    pub(super) async fn end(self) {
        if let Err(error) = self.task.await {
            tracing::error!(%error, "the lease store's task ended");
        }
    }
}
