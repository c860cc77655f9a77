//! The objects by revision, as etcd keeps them: a present, and a history that can be compacted.

use super::refusal::Refusal;
use hyper::body::Bytes;
use serde_json::Value;
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

/// Past changes that are kept at most; what is older is compacted.
const HISTORY: usize = 20_000;

/// What the server serves. Events of both groups are the same objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    Node,
    Pod,
    Event,
    /// An event as `events.k8s.io/v1` shows it.
    NewEvent,
}

impl Kind {
    pub(crate) const ALL: [Kind; 4] = [Kind::Node, Kind::Pod, Kind::Event, Kind::NewEvent];

    pub(crate) fn find(group: &str, plural: &str) -> Option<Kind> {
        Kind::ALL
            .into_iter()
            .find(|kind| kind.group() == group && kind.plural() == plural)
    }

    pub(crate) fn group(self) -> &'static str {
        match self {
            Kind::Node | Kind::Pod | Kind::Event => "",
            Kind::NewEvent => "events.k8s.io",
        }
    }

    pub(crate) fn api_version(self) -> &'static str {
        match self {
            Kind::Node | Kind::Pod | Kind::Event => "v1",
            Kind::NewEvent => "events.k8s.io/v1",
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Kind::Node => "Node",
            Kind::Pod => "Pod",
            Kind::Event | Kind::NewEvent => "Event",
        }
    }

    pub(crate) fn plural(self) -> &'static str {
        match self {
            Kind::Node => "nodes",
            Kind::Pod => "pods",
            Kind::Event | Kind::NewEvent => "events",
        }
    }

    /// The plural with its group, as refusals name it.
    pub(crate) fn qualified(self) -> &'static str {
        match self {
            Kind::NewEvent => "events.events.k8s.io",
            other => other.plural(),
        }
    }

    pub(crate) fn namespaced(self) -> bool {
        self != Kind::Node
    }

    pub(crate) fn has_status(self) -> bool {
        matches!(self, Kind::Node | Kind::Pod)
    }

    /// Under which kind it is stored.
    pub(crate) fn stored(self) -> Kind {
        match self {
            Kind::NewEvent => Kind::Event,
            other => other,
        }
    }
}

/// Namespace (empty for nodes) and name.
pub(crate) type Key = (String, String);

/// One version of an object.
#[derive(Debug)]
pub(crate) struct Object {
    pub(crate) key: Key,
    pub(crate) revision: u64,
    /// JSON without `kind` and `apiVersion`, as lists show it.
    pub(crate) body: Bytes,
}

impl Object {
    /// Parsed, without `kind` and `apiVersion`.
    pub(crate) fn value(&self) -> Value {
        serde_json::from_slice(&self.body).expect("what was serialized is JSON")
    }

    /// As a single object, with `kind` and `apiVersion`.
    pub(crate) fn text(&self, kind: Kind) -> Vec<u8> {
        let mut text = format!(
            r#"{{"kind":"{}","apiVersion":"{}","#,
            kind.name(),
            kind.api_version()
        )
        .into_bytes();
        text.extend_from_slice(&self.item(kind)[1..]);
        text
    }

    /// As a list shows it.
    pub(crate) fn item(&self, kind: Kind) -> Bytes {
        match kind {
            Kind::NewEvent => super::events::to_new(self.value()).to_string().into(),
            _ => self.body.clone(),
        }
    }
}

/// What happened to an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    Added,
    Modified,
    Deleted,
}

impl Change {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Change::Added => "ADDED",
            Change::Modified => "MODIFIED",
            Change::Deleted => "DELETED",
        }
    }
}

/// One entry of the history.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub(crate) revision: u64,
    pub(crate) kind: Kind,
    pub(crate) change: Change,
    /// The new version; of a deleted one the last, with the revision of the deletion.
    pub(crate) object: Arc<Object>,
    /// What was there before.
    pub(crate) before: Option<Arc<Object>>,
}

/// All objects of all kinds, one revision after the other.
#[derive(Debug)]
pub(crate) struct Store {
    pub(crate) revision: u64,
    /// Whatever happened up to this revision has been forgotten.
    pub(crate) compacted: u64,
    objects: BTreeMap<Kind, BTreeMap<Key, Arc<Object>>>,
    history: VecDeque<Entry>,
}

impl Store {
    /// An empty store. A real one has had some revisions before anybody asks.
    pub(crate) fn new() -> Store {
        Store {
            revision: 100,
            compacted: 0,
            objects: BTreeMap::new(),
            history: VecDeque::new(),
        }
    }

    pub(crate) fn get(&self, kind: Kind, key: &Key) -> Option<&Arc<Object>> {
        self.objects.get(&kind.stored())?.get(key)
    }

    /// All objects of a kind in order.
    pub(crate) fn all(&self, kind: Kind) -> impl Iterator<Item = &Arc<Object>> {
        let objects = self.objects.get(&kind.stored());
        objects.into_iter().flat_map(BTreeMap::values)
    }

    /// The objects of a kind as they were at `revision`.
    pub(crate) fn all_at(&self, kind: Kind, revision: u64) -> Result<Vec<Arc<Object>>, Refusal> {
        if revision > self.revision {
            return Err(Refusal::too_large(revision, self.revision));
        }
        if revision < self.compacted {
            return Err(Refusal::list_expired());
        }
        let mut objects = self
            .objects
            .get(&kind.stored())
            .cloned()
            .unwrap_or_default();
        let later = self
            .history
            .iter()
            .rev()
            .take_while(|entry| entry.revision > revision);
        for entry in later.filter(|entry| entry.kind == kind.stored()) {
            let key = entry.object.key.clone();
            match &entry.before {
                Some(before) => objects.insert(key, Arc::clone(before)),
                None => objects.remove(&key),
            };
        }
        Ok(objects.into_values().collect())
    }

    /// What happened to objects of a kind after `revision`.
    pub(crate) fn after(&self, kind: Kind, revision: u64) -> Result<Vec<Entry>, Refusal> {
        if revision < self.compacted {
            return Err(Refusal::watch_expired(revision, self.compacted));
        }
        let from = self
            .history
            .partition_point(|entry| entry.revision <= revision);
        let later = self.history.range(from..);
        Ok(later
            .filter(|entry| entry.kind == kind.stored())
            .cloned()
            .collect())
    }

    /// Writes an object, whether it is there or not, under the next revision, which goes into it.
    pub(crate) fn put(&mut self, kind: Kind, mut value: Value) -> Arc<Object> {
        self.revision += 1;
        let revision = self.revision;
        value["metadata"]["resourceVersion"] = revision.to_string().into();
        let key = key_of(kind, &value);
        self.put_body(kind, key, revision, value.to_string().into())
    }

    /// Writes an object of which the text is known, with [`Store::next_revision`] in it.
    pub(crate) fn put_text(&mut self, kind: Kind, key: Key, text: String) -> Arc<Object> {
        self.revision += 1;
        self.put_body(kind, key, self.revision, text.into())
    }

    /// Which revision the next change gets.
    pub(crate) fn next_revision(&self) -> u64 {
        self.revision + 1
    }

    fn put_body(&mut self, kind: Kind, key: Key, revision: u64, body: Bytes) -> Arc<Object> {
        let object = Arc::new(Object {
            key: key.clone(),
            revision,
            body,
        });
        let objects = self.objects.entry(kind.stored()).or_default();
        let before = objects.insert(key, Arc::clone(&object));
        let change = match before {
            Some(_) => Change::Modified,
            None => Change::Added,
        };
        self.remember(kind, change, &object, before);
        object
    }

    /// Removes an object and gives its last version.
    pub(crate) fn delete(&mut self, kind: Kind, key: &Key) -> Option<Arc<Object>> {
        let objects = self.objects.get_mut(&kind.stored())?;
        let before = objects.remove(key)?;
        self.revision += 1;
        let mut value = before.value();
        value["metadata"]["resourceVersion"] = self.revision.to_string().into();
        let object = Arc::new(Object {
            key: key.clone(),
            revision: self.revision,
            body: value.to_string().into(),
        });
        self.remember(kind, Change::Deleted, &object, Some(before));
        Some(object)
    }

    /// Forgets the history, as etcd does every five minutes. The present stays.
    pub(crate) fn compact(&mut self) {
        self.compacted = self.revision;
        self.history.clear();
    }

    fn remember(
        &mut self,
        kind: Kind,
        change: Change,
        object: &Arc<Object>,
        before: Option<Arc<Object>>,
    ) {
        self.history.push_back(Entry {
            revision: object.revision,
            kind: kind.stored(),
            change,
            object: Arc::clone(object),
            before,
        });
        while self.history.len() > HISTORY {
            if let Some(entry) = self.history.pop_front() {
                self.compacted = entry.revision;
            }
        }
    }
}

/// The key that an object's metadata says.
pub(crate) fn key_of(kind: Kind, value: &Value) -> Key {
    let text = |name: &str| {
        let text = value["metadata"][name].as_str().unwrap_or_default();
        text.to_owned()
    };
    let namespace = if kind.namespaced() {
        text("namespace")
    } else {
        String::new()
    };
    (namespace, text("name"))
}

impl Entry {
    /// The kind under which a watch shows the entry.
    pub(crate) fn kind_as(&self, asked: Kind) -> Kind {
        if asked.stored() == self.kind {
            asked
        } else {
            self.kind
        }
    }
}
