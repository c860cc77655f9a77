//! Our own lease while the agent runs: whether it is still ours, renewing it, and putting it right when it is not.

use std::time::Duration;

use etcd_client::{Compare, CompareOp, PutOptions, Txn, TxnOp};
use flannel_core::lease::{LeaseAttrs, SubnetKey};
use tokio::time::Instant;
use tracing::{debug, error, info, warn};

use super::{Granted, Grip, keeper::Keeper};
use crate::leases::{
    LeaseError, Offer, addresses, error::NOT_FOUND, is_ours, retry::go_duration, table::Entry,
};

/// What the table says about our own lease.
pub(super) enum Verdict {
    /// As we wrote it, or we have not seen our last write yet.
    Fine,
    /// As we wrote it, but we want to publish something else by now.
    Outdated,
    /// The key is gone: deleted, revoked or expired.
    Lost,
    /// The key names another node.
    Taken { by: LeaseAttrs, revision: i64 },
    /// The key names us, and somebody else wrote it.
    Touched(Entry),
}

impl Keeper<'_> {
    pub(super) fn verdict(&self) -> Verdict {
        let key = &self.held.lease.key;
        if !self.ever_listed || self.grip.mod_revision >= self.next {
            return self.fine_or_outdated();
        }
        match self.table.get(key) {
            None => Verdict::Lost,
            Some(entry) if entry.mod_revision == self.grip.mod_revision => self.fine_or_outdated(),
            Some(entry) => match &entry.attrs {
                Some(attrs) if !is_ours(attrs, &self.offer.identity) => Verdict::Taken {
                    by: attrs.clone(),
                    revision: entry.mod_revision,
                },
                _ => Verdict::Touched(entry.clone()),
            },
        }
    }

    fn fine_or_outdated(&self) -> Verdict {
        if self.held.lease.attrs == self.offer.attrs {
            Verdict::Fine
        } else {
            Verdict::Outdated
        }
    }

    /// Puts our own lease right, if it is not. Waits between attempts.
    pub(super) async fn settle(&mut self) {
        if self.repair_at.is_some() {
            return;
        }
        let done = match self.verdict() {
            Verdict::Fine => {
                if self.own_error.take().is_some() {
                    self.changed();
                }
                return self.repair_backoff.reset();
            }
            Verdict::Outdated => {
                self.write_own(self.grip.mod_revision, self.grip.lease.is_none())
                    .await
            }
            Verdict::Lost => {
                if self.is_news(self.grip.mod_revision) {
                    warn!(
                        subnet = %self.held.lease.key,
                        "Lease has been revoked (deleted or expired), acquiring it again"
                    );
                }
                let previous = Some(self.held.lease.key);
                self.acquire_again(previous).await
            }
            Verdict::Taken { by, revision } => {
                if self.is_news(revision) {
                    error!(
                        subnet = %self.held.lease.key,
                        ours = addresses(&self.offer.attrs),
                        theirs = addresses(&by),
                        "another node took our subnet, acquiring another one: pods of this node keep addresses that are now routed elsewhere until they are restarted"
                    );
                }
                self.acquire_again(None).await
            }
            Verdict::Touched(entry) => self.touched(&entry).await,
        };
        match done {
            Ok(()) => self.changed(),
            Err(error) => {
                let text = error.chain();
                if !error.is_logged() && self.own_error.as_ref() != Some(&text) {
                    warn!(error = text, "our lease is not right, trying again");
                }
                self.own_error = Some(text);
                self.repair_at = Some(Instant::now() + self.repair_backoff.next_wait());
                self.changed();
            }
        }
    }

    /// Whether a loss at `revision` has not been reported yet.
    fn is_news(&mut self, revision: i64) -> bool {
        self.loss_reported.replace(revision) != Some(revision)
    }

    async fn acquire_again(&mut self, previous: Option<SubnetKey>) -> Result<(), LeaseError> {
        let offer = Offer {
            previous,
            ..self.offer.clone()
        };
        let held = self.store.acquire(&offer).await?;
        let old = self.grip.lease;
        if let Some(grip) = held.grip {
            self.grip = grip;
        }
        self.held = held;
        self.log_renewal();
        if let Some(old) = old {
            self.store.revoke_unused(old.id).await;
        }
        Ok(())
    }

    /// Somebody wrote our key in our name: an operator, our predecessor, or another node with our public address.
    async fn touched(&mut self, entry: &Entry) -> Result<(), LeaseError> {
        let same = entry.readable && entry.attrs.as_ref() == Some(&self.held.lease.attrs);
        if same && Some(entry.lease_id) == self.grip.lease.map(|granted| granted.id) {
            self.grip.mod_revision = entry.mod_revision;
            return Ok(());
        }
        if same && entry.lease_id == 0 {
            info!(subnet = %self.held.lease.key, "our lease was made a reservation: it is no longer renewed");
            let old = self.grip.lease.take();
            self.grip.mod_revision = entry.mod_revision;
            if let Some(old) = old {
                self.store.revoke_unused(old.id).await;
            }
            return Ok(());
        }
        let reserved = if entry.readable {
            // Written by hand to keep the subnet for us, with less in it than we write.
            entry.lease_id == 0
        } else {
            self.grip.lease.is_none()
        };
        if let Some(wait) = self.contest.entered(Instant::now()) {
            self.repair_at = Some(wait);
            return Ok(());
        }
        warn!(
            subnet = %self.held.lease.key,
            address = addresses(&self.offer.attrs),
            "our lease was rewritten by somebody else, restoring it: if this repeats, another node has the same public address; give each its own with --iface or --public-ip"
        );
        self.write_own(entry.mod_revision, reserved).await
    }

    /// Writes what we offer under our key if nobody wrote it since `seen`.
    async fn write_own(&mut self, seen: i64, reserved: bool) -> Result<(), LeaseError> {
        let old = self.grip.lease;
        let lease = match old {
            _ if reserved => None,
            Some(granted) if granted.expires > Instant::now() => Some(granted),
            _ => Some(self.store.grant().await?),
        };
        let fresh = lease.filter(|granted| old.is_none_or(|old| old.id != granted.id));
        let key = self.store.key_of(&self.held.lease.key);
        let options = lease.map(|granted| PutOptions::new().with_lease(granted.id));
        let txn = Txn::new()
            .when([Compare::mod_revision(key.clone(), CompareOp::Equal, seen)])
            .and_then([TxnOp::put(key.clone(), self.offer.attrs.to_json(), options)]);
        let sent = self
            .store
            .connection
            .call(&format!("write {key}"), |mut client| {
                let txn = txn.clone();
                async move { client.txn(txn).await }
            })
            .await;
        let answer = match sent {
            Ok(answer) => answer,
            Err(error) => {
                let fresh = fresh.map(|granted| granted.id);
                self.store.not_written(&error, fresh).await;
                // A write that fails because its lease is gone must not meet the same lease again.
                if let (
                    LeaseError::Answer {
                        code: NOT_FOUND, ..
                    },
                    Some(granted),
                ) = (&error, &mut self.grip.lease)
                {
                    granted.expires = Instant::now();
                }
                return Err(error);
            }
        };
        if !answer.succeeded() {
            if let Some(granted) = fresh {
                self.store.revoke(granted.id).await;
            }
            // Somebody was faster; what they wrote decides.
            self.list_again();
            self.repair_at = Some(Instant::now() + self.repair_backoff.next_wait());
            return Ok(());
        }
        self.grip = Grip {
            mod_revision: answer
                .header()
                .map_or(0, etcd_client::ResponseHeader::revision),
            lease,
        };
        self.held.lease.attrs = self.offer.attrs.clone();
        info!(subnet = %self.held.lease.key, value = self.offer.attrs.to_json(), "published our lease");
        if let Some(old) = old.filter(|old| lease.is_none_or(|granted| granted.id != old.id)) {
            self.store.revoke_unused(old.id).await;
        }
        Ok(())
    }

    /// When to renew; `None` for a reservation.
    pub(super) fn renew_at(&self) -> Option<Instant> {
        let granted = self.grip.lease?;
        let due = granted.expires - self.margin(&granted);
        Some(self.renew_retry.map_or(due, |retry| retry.max(due)))
    }

    /// The margin, if the lease is long enough to have one.
    fn margin(&self, granted: &Granted) -> Duration {
        if self.store.renew_margin < granted.ttl {
            self.store.renew_margin
        } else {
            granted.ttl / 2
        }
    }

    pub(super) fn log_renewal(&self) {
        if let Some(at) = self.renew_at() {
            let wait = at.saturating_duration_since(Instant::now());
            info!("Waiting for {} to renew lease", go_duration(wait));
        }
    }

    pub(super) async fn renew_due(&mut self) {
        let Some(granted) = self.grip.lease else {
            return;
        };
        match self.renew(granted).await {
            Ok(true) => {
                self.renew_retry = None;
                self.renew_backoff.reset();
                self.store.revoke_orphans().await;
                info!(
                    "Lease renewed, new expiration: in {}",
                    go_duration(granted.ttl)
                );
                self.log_renewal();
            }
            Ok(false) => {
                warn!(subnet = %self.held.lease.key, "our lease is not what we wrote, reading all leases again");
                self.list_again();
                self.renew_retry = Some(Instant::now() + self.renew_backoff.next_wait());
            }
            Err(error) => {
                if self.renew_retry.is_none() {
                    warn!(error = %error.chain(), "Error renewing lease, trying again");
                }
                self.renew_retry = Some(Instant::now() + self.renew_backoff.next_wait());
            }
        }
    }

    /// Renews the etcd lease, provided that the key is as we wrote it. Neither key nor value changes, so no other
    /// node has anything to do. `false` when the key or the lease is not ours any more.
    async fn renew(&mut self, granted: Granted) -> Result<bool, LeaseError> {
        let key = self.store.key_of(&self.held.lease.key);
        let txn = Txn::new().when([
            Compare::mod_revision(key.clone(), CompareOp::Equal, self.grip.mod_revision),
            Compare::lease(key.clone(), CompareOp::Equal, granted.id),
        ]);
        let checked = self
            .store
            .connection
            .call(&format!("compare {key}"), |mut client| {
                let txn = txn.clone();
                async move { client.txn(txn).await }
            })
            .await?;
        if !checked.succeeded() {
            return Ok(false);
        }
        let asked = Instant::now();
        let action = format!("renew lease {:x}", granted.id);
        let renewed = self
            .store
            .connection
            .call(&action, |mut client| async move {
                match client.lease_keep_alive(granted.id).await {
                    Ok(_) => Ok(true),
                    // The only error of this kind: the lease does not exist.
                    Err(etcd_client::Error::LeaseKeepAliveError(reason)) => {
                        debug!(reason, "etcd does not know our lease");
                        Ok(false)
                    }
                    Err(error) => Err(error),
                }
            })
            .await?;
        if renewed {
            self.grip.lease = Some(Granted {
                expires: asked + granted.ttl,
                ..granted
            });
        }
        Ok(renewed)
    }
}
