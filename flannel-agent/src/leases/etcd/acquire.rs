//! Taking a lease: decide from a complete list, write under conditions, and start again when another node was faster.

use etcd_client::{
    Compare, CompareOp, DeleteOptions, GetOptions, PutOptions, Txn, TxnOp, TxnOpResponse,
};
use flannel_core::{
    acquire::{Choice, Decision, choose},
    lease::{Lease, SubnetKey},
};
use tracing::debug;

use super::{EtcdLeases, Granted, Grip, kv, name_of};
use crate::leases::{
    Held, LeaseError, Offer, Outcome, log_acquired, log_decision, pick,
    retry::Backoff,
    table::{Table, overlap},
};

/// What a key must be like for a write to happen.
#[derive(Clone, Copy, Debug)]
enum Guard {
    /// It does not exist.
    Absent,
    /// Nobody wrote it since.
    Unchanged(i64),
}

/// One write, decided.
#[derive(Clone, Copy, Debug)]
struct Write {
    key: SubnetKey,
    guard: Guard,
    outcome: Outcome,
    /// A reservation is written without an etcd lease, so that it stays one.
    reserved: bool,
    /// The etcd lease that the key, or the one to drop, was bound to; 0 for none.
    replaced: i64,
    /// A lease of ours that the configuration rules out, with its revision.
    drop: Option<(SubnetKey, i64)>,
}

pub(super) async fn acquire(store: &EtcdLeases, offer: &Offer) -> Result<Held, LeaseError> {
    let mut logged = Vec::new();
    let mut backoff = Backoff::new();
    loop {
        let listing = store.list().await?;
        let table = Table::from_list(&listing.keys, &store.reported);
        let stored = table.stored(|entry| entry.lease_id == 0);
        let decision = choose(&offer.conf, &offer.identity, offer.previous, &stored)
            .map_err(LeaseError::Acquire)?;
        let write = write_for(&decision, &table)?;
        logged = log_decision(decision, offer, &logged);
        if let Some(grip) = attempt(store, offer, write).await? {
            let held = Held {
                lease: Lease {
                    key: write.key,
                    attrs: offer.attrs.clone(),
                },
                outcome: write.outcome,
                grip: Some(grip),
            };
            log_acquired(&held, &offer.identity);
            if write.replaced != 0 {
                store.revoke_unused(write.replaced).await;
            }
            store.revoke_orphans().await;
            return Ok(held);
        }
        debug!(key = %write.key, "another node was faster, choosing again");
        tokio::time::sleep(backoff.next_wait()).await;
    }
}

fn write_for(decision: &Decision, table: &Table) -> Result<Write, LeaseError> {
    let (key, outcome) = pick(&decision.choice)?;
    let drop = decision.drop_incompatible;
    let (guard, reserved) = match decision.choice {
        Choice::Reuse {
            reserved,
            mod_revision,
            ..
        } => (Guard::Unchanged(mod_revision), reserved),
        Choice::Previous { .. } | Choice::Pick { .. } => (Guard::Absent, false),
    };
    let replaced = [Some(key), drop.map(|(key, _)| key)]
        .into_iter()
        .flatten()
        .find_map(|key| table.get(&key))
        .map_or(0, |entry| entry.lease_id);
    Ok(Write {
        key,
        guard,
        outcome,
        reserved,
        replaced,
        drop,
    })
}

/// Writes the key. `None` when another node was faster; nothing of ours is left behind then.
async fn attempt(
    store: &EtcdLeases,
    offer: &Offer,
    write: Write,
) -> Result<Option<Grip>, LeaseError> {
    let lease = if write.reserved {
        None
    } else {
        Some(store.grant().await?)
    };
    let id = lease.map(|granted: Granted| granted.id);
    let txn = transaction(store, offer, write, id);
    // Without the key, which is another one at the next attempt: a repeated failure has to read the same.
    let action = format!("write a lease below {}", store.subnets());
    let sent = store
        .connection
        .call(&action, |client| {
            let txn = txn.clone();
            async move { kv(&client).txn(txn).await }
        })
        .await;
    let answer = match sent {
        Ok(answer) => answer,
        Err(error) => {
            store.not_written(&error, id).await;
            return Err(error);
        }
    };
    let taken = if answer.succeeded() {
        matches!(write.guard, Guard::Absent)
            .then(|| overlapping(store, &write, &answer.op_responses()))
            .flatten()
    } else {
        Some(write.key)
    };
    let Some(other) = taken else {
        let mod_revision = answer
            .header()
            .map_or(0, etcd_client::ResponseHeader::revision);
        return Ok(Some(Grip {
            mod_revision,
            lease,
        }));
    };
    debug!(wanted = %write.key, held = %other, "the subnet is taken");
    if let Some(id) = id {
        // Ends the key too, if it was written.
        store.revoke(id).await;
    }
    Ok(None)
}

fn transaction(store: &EtcdLeases, offer: &Offer, write: Write, lease: Option<i64>) -> Txn {
    let key = store.key_of(&write.key);
    let mut when = match write.guard {
        Guard::Unchanged(revision) => {
            vec![Compare::mod_revision(
                key.clone(),
                CompareOp::Equal,
                revision,
            )]
        }
        Guard::Absent => vec![Compare::version(key.clone(), CompareOp::Equal, 0)],
    };
    let options = lease.map(|id| PutOptions::new().with_lease(id));
    let mut then = vec![TxnOp::put(key, offer.attrs.to_json(), options)];
    if let Some((old, revision)) = write.drop {
        let old = store.key_of(&old);
        when.push(Compare::mod_revision(
            old.clone(),
            CompareOp::Equal,
            revision,
        ));
        then.push(TxnOp::delete(old, None::<DeleteOptions>));
    }
    let names = GetOptions::new().with_prefix().with_keys_only();
    then.push(TxnOp::get(store.subnets(), Some(names)));
    Txn::new().when(when).and_then(then)
}

/// Another lease that shares addresses with the one just written. The key alone cannot exclude that: two dual-stack
/// keys may share one half, and other nodes may cut subnets of another size. Transactions are in order, so of two
/// such writers exactly the later one sees the other, and gives way.
fn overlapping(store: &EtcdLeases, write: &Write, answers: &[TxnOpResponse]) -> Option<SubnetKey> {
    let subnets = store.subnets();
    answers
        .iter()
        .filter_map(|answer| match answer {
            TxnOpResponse::Get(listed) => Some(listed),
            _ => None,
        })
        .flat_map(etcd_client::GetResponse::kvs)
        .filter_map(|kv| name_of(kv, &subnets).parse().ok())
        .find(|other| *other != write.key && overlap(other, &write.key))
}
