//! What has been read from a store so far, one entry per subnet.
//!
//! The table never forgets a lease because something could not be read: a key with a value that does not parse keeps
//! its last readable value, and keys that are no subnets are reported once and left out.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use flannel_core::{
    acquire::StoredLease,
    lease::{Lease, LeaseAttrs, SubnetKey},
};
use tokio::time::Instant;
use tracing::warn;

use super::Snapshot;

/// How long peers of a store that was replaced stay in the snapshot, so that they can publish themselves again.
const REPLACED_GRACE: Duration = Duration::from_secs(30);

/// A key and its value as stored, below `<prefix>/subnets/` or in the directory of lease files.
#[derive(Clone, Debug)]
pub(super) struct Raw {
    pub(super) name: String,
    /// Directory: or why the file could not be read.
    pub(super) value: Result<Vec<u8>, String>,
    /// etcd: the revision of the last write. Directory: a digest of the value.
    pub(super) mod_revision: i64,
    /// etcd: the lease that the key is bound to, 0 for none. Directory: 0.
    pub(super) lease_id: i64,
}

/// A subnet of which the key is readable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    /// The last readable value; `None` when there never was one. The subnet counts as taken all the same.
    pub(super) attrs: Option<LeaseAttrs>,
    /// Whether `attrs` is the value as it is now.
    pub(super) readable: bool,
    pub(super) mod_revision: i64,
    pub(super) lease_id: i64,
}

/// The unreadable keys and values that were already reported, so that each is reported once.
#[derive(Debug, Default)]
pub(super) struct Reported(Mutex<BTreeMap<String, i64>>);

impl Reported {
    fn report(&self, raw: &Raw, reason: &dyn std::fmt::Display) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if known.insert(raw.name.clone(), raw.mod_revision) != Some(raw.mod_revision) {
            warn!(
                key = raw.name,
                revision = raw.mod_revision,
                "ignoring an unreadable lease: {reason}"
            );
        }
    }

    fn forget(&self, name: &str) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.remove(name);
    }

    fn retain(&self, present: &BTreeSet<&str>) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.retain(|name, _| present.contains(name.as_str()));
    }
}

/// All leases of a store.
#[derive(Debug, Default)]
pub(super) struct Table {
    entries: BTreeMap<SubnetKey, Entry>,
    /// Peers of a store that was replaced, and until when they are kept.
    departed: Option<(BTreeMap<SubnetKey, LeaseAttrs>, Instant)>,
}

impl Table {
    /// Reads a complete list.
    pub(super) fn from_list(list: &[Raw], reported: &Reported) -> Self {
        let mut table = Table::default();
        table.replace(list, None, reported);
        table
    }

    /// Puts a complete list in place of what was known. `store_replaced` is given, with the time, when the list comes
    /// from a store without a common history (restored, wiped, created anew): leases missing there are kept for a
    /// grace period.
    pub(super) fn replace(
        &mut self,
        list: &[Raw],
        store_replaced: Option<Instant>,
        reported: &Reported,
    ) {
        let before = std::mem::take(&mut self.entries);
        for raw in list {
            if let Some(key) = read_key(raw, reported) {
                let known = before.get(&key).and_then(|entry| entry.attrs.clone());
                self.entries.insert(key, entry(raw, known, reported));
            }
        }
        reported.retain(&list.iter().map(|raw| raw.name.as_str()).collect());
        if let Some(now) = store_replaced {
            let missing: BTreeMap<_, _> = before
                .into_iter()
                .filter(|(key, _)| !self.entries.contains_key(key))
                .filter_map(|(key, entry)| Some((key, entry.attrs?)))
                .collect();
            if !missing.is_empty() {
                warn!(
                    missing = missing.len(),
                    seconds = REPLACED_GRACE.as_secs(),
                    "the lease store was replaced: peers missing in the new one are kept for a while"
                );
                self.departed = Some((missing, now + REPLACED_GRACE));
            }
        }
    }

    /// Applies one written key.
    pub(super) fn put(&mut self, raw: &Raw, reported: &Reported) {
        if let Some(key) = read_key(raw, reported) {
            let known = self.entries.remove(&key).and_then(|entry| entry.attrs);
            self.entries.insert(key, entry(raw, known, reported));
        }
    }

    /// Applies one deleted key.
    pub(super) fn remove(&mut self, name: &str, reported: &Reported) {
        reported.forget(name);
        if let Ok(key) = name.parse::<SubnetKey>() {
            self.entries.remove(&key);
        }
    }

    pub(super) fn get(&self, key: &SubnetKey) -> Option<&Entry> {
        self.entries.get(key)
    }

    /// The entries as the acquisition decision wants them. An entry without a readable value holds its subnet for
    /// nobody.
    pub(super) fn stored(&self, reserved: impl Fn(&Entry) -> bool) -> Vec<StoredLease> {
        self.entries
            .iter()
            .map(|(key, entry)| StoredLease {
                lease: Lease {
                    key: *key,
                    attrs: entry.attrs.clone().unwrap_or_default(),
                },
                reserved: reserved(entry),
                mod_revision: entry.mod_revision,
            })
            .collect()
    }

    /// When the snapshot changes without anything happening in the store.
    pub(super) fn grace_ends(&self) -> Option<Instant> {
        self.departed.as_ref().map(|(_, until)| *until)
    }

    /// The readable leases, and those of a replaced store that nobody has claimed since.
    pub(super) fn snapshot(&mut self, now: Instant) -> Snapshot {
        let mut leases: BTreeMap<SubnetKey, LeaseAttrs> = BTreeMap::new();
        if let Some((departed, until)) = &mut self.departed {
            let taken: BTreeSet<SubnetKey> = self.entries.keys().copied().collect();
            departed.retain(|key, _| !taken.iter().any(|other| overlap(key, other)));
            if departed.is_empty() || now >= *until {
                self.departed = None;
            } else {
                leases.extend(departed.iter().map(|(key, attrs)| (*key, attrs.clone())));
            }
        }
        leases.extend(
            self.entries
                .iter()
                .filter_map(|(key, entry)| Some((*key, entry.attrs.clone()?))),
        );
        Snapshot { leases }
    }
}

fn read_key(raw: &Raw, reported: &Reported) -> Option<SubnetKey> {
    match raw.name.parse() {
        Ok(key) => Some(key),
        Err(error) => {
            reported.report(raw, &error);
            None
        }
    }
}

fn entry(raw: &Raw, known: Option<LeaseAttrs>, reported: &Reported) -> Entry {
    let value = read_value(raw);
    let readable = value.is_ok();
    let attrs = match value {
        Ok(attrs) => {
            reported.forget(&raw.name);
            Some(attrs)
        }
        Err(reason) => {
            reported.report(raw, &reason);
            known
        }
    };
    Entry {
        attrs,
        readable,
        mod_revision: raw.mod_revision,
        lease_id: raw.lease_id,
    }
}

fn read_value(raw: &Raw) -> Result<LeaseAttrs, String> {
    let value = raw.value.as_ref().map_err(Clone::clone)?;
    let text = std::str::from_utf8(value).map_err(|error| error.to_string())?;
    LeaseAttrs::from_json(text).map_err(|error| error.to_string())
}

/// Whether two leases share an address in either family.
pub(super) fn overlap(a: &SubnetKey, b: &SubnetKey) -> bool {
    let v4 = match (a.v4, b.v4) {
        (Some(a), Some(b)) => a.contains(&b) || b.contains(&a),
        _ => false,
    };
    let v6 = match (a.v6, b.v6) {
        (Some(a), Some(b)) => a.contains(&b) || b.contains(&a),
        _ => false,
    };
    v4 || v6
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: &str = r#"{"PublicIP":"192.168.77.11","PublicIPv6":null,"BackendType":"host-gw"}"#;
    const B: &str = r#"{"PublicIP":"192.168.77.12","PublicIPv6":null,"BackendType":"host-gw"}"#;

    fn raw(name: &str, value: &str, mod_revision: i64) -> Raw {
        Raw {
            name: name.to_owned(),
            value: Ok(value.as_bytes().to_vec()),
            mod_revision,
            lease_id: 0,
        }
    }

    fn names(table: &mut Table, now: Instant) -> Vec<String> {
        let snapshot = table.snapshot(now);
        snapshot.leases.keys().map(ToString::to_string).collect()
    }

    #[test]
    fn nonsense_keys_are_left_out_and_bad_values_keep_the_last_good_one() {
        let reported = Reported::default();
        let list = [raw("10.5.1.0-24", A, 1), raw("stray", "1", 2)];
        let mut table = Table::from_list(&list, &reported);
        assert_eq!(names(&mut table, Instant::now()), ["10.5.1.0-24"]);
        let before = table.snapshot(Instant::now());
        table.put(&raw("10.5.1.0-24", "{", 3), &reported);
        assert_eq!(table.snapshot(Instant::now()), before);
        table.replace(&[raw("10.5.1.0-24", "[]", 4)], None, &reported);
        assert_eq!(table.snapshot(Instant::now()), before);
        table.remove("10.5.1.0-24", &reported);
        assert_eq!(table.snapshot(Instant::now()), Snapshot::default());
    }

    #[test]
    fn a_subnet_without_a_readable_value_is_taken_but_not_published() {
        let reported = Reported::default();
        let mut table = Table::from_list(&[raw("10.5.1.0-24", "{", 7)], &reported);
        assert!(table.snapshot(Instant::now()).leases.is_empty());
        let stored = table.stored(|_| false);
        assert_eq!(stored.len(), 1);
        assert_eq!(stored[0].lease.attrs, LeaseAttrs::default());
        assert_eq!(stored[0].mod_revision, 7);
    }

    #[test]
    fn each_unreadable_revision_is_reported_once() {
        let reported = Reported::default();
        let known = |reported: &Reported| reported.0.lock().unwrap().clone();
        let mut table = Table::from_list(&[raw("stray", "1", 2)], &reported);
        table.put(&raw("stray", "1", 2), &reported);
        assert_eq!(known(&reported), BTreeMap::from([("stray".to_owned(), 2)]));
        table.put(&raw("stray", "1", 3), &reported);
        assert_eq!(known(&reported), BTreeMap::from([("stray".to_owned(), 3)]));
        table.replace(&[], None, &reported);
        assert!(known(&reported).is_empty());
    }

    #[test]
    fn peers_of_a_replaced_store_stay_until_claimed_or_the_grace_ends() {
        let reported = Reported::default();
        let list = [
            raw("10.5.1.0-24", A, 1),
            raw("10.5.2.0-24", B, 1),
            raw("10.5.3.0-24", B, 1),
        ];
        let mut table = Table::from_list(&list, &reported);
        let start = Instant::now();
        table.replace(&[], Some(start), &reported);
        assert_eq!(names(&mut table, start).len(), 3);
        // Somebody else took half of the first one.
        table.put(&raw("10.5.1.128-25", B, 2), &reported);
        table.put(&raw("10.5.2.0-24", B, 3), &reported);
        assert_eq!(
            names(&mut table, start),
            ["10.5.1.128-25", "10.5.2.0-24", "10.5.3.0-24"]
        );
        let end = start + REPLACED_GRACE;
        assert_eq!(names(&mut table, end), ["10.5.1.128-25", "10.5.2.0-24"]);
        assert_eq!(table.grace_ends(), None);
    }

    #[test]
    fn overlap_in_either_family_counts() {
        let key = |text: &str| text.parse::<SubnetKey>().unwrap();
        let a = key("10.5.1.0-24&fd00::-64");
        assert!(overlap(&a, &key("10.5.0.0-16")));
        assert!(overlap(&a, &key("0.0.0.0-0&fd00::-56")));
        assert!(!overlap(&a, &key("10.5.2.0-24&fd00:0:0:1::-64")));
    }
}
