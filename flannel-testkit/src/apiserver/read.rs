//! Lists, in pages and by version, and the selectors that lists and watches take.

use super::refusal::Refusal;
use super::request::{Attributes, Query};
use super::store::{Kind, Object, Store};
use hyper::body::Bytes;
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::sync::Arc;

/// Which objects a list or watch is about.
#[derive(Clone, Debug, Default)]
pub(crate) struct Selection {
    namespace: String,
    name: Option<String>,
    fields: Vec<Requirement>,
    labels: Vec<Requirement>,
}

#[derive(Clone, Debug)]
struct Requirement {
    path: String,
    /// `None`: it is there, whatever it says.
    value: Option<String>,
    wanted: bool,
}

/// The fields that may be selected by, besides `metadata.name`.
const FIELDS: [(Kind, &[&str]); 4] = [
    (Kind::Node, &["spec.unschedulable"]),
    (
        Kind::Pod,
        &["metadata.namespace", "spec.nodeName", "status.phase"],
    ),
    (
        Kind::Event,
        &[
            "metadata.namespace",
            "involvedObject.kind",
            "involvedObject.name",
            "involvedObject.namespace",
            "involvedObject.uid",
            "reason",
            "type",
            "reportingComponent",
        ],
    ),
    (Kind::NewEvent, &["metadata.namespace", "reason", "type"]),
];

impl Selection {
    pub(crate) fn read(asked: &Attributes, query: &Query) -> Result<Selection, Refusal> {
        let mut selection = Selection {
            namespace: asked.namespace.clone(),
            name: (!asked.name.is_empty()).then(|| asked.name.clone()),
            ..Selection::default()
        };
        let fields = query.get("fieldSelector").map_or("", String::as_str);
        for requirement in requirements(fields) {
            let known = FIELDS.iter().any(|(kind, fields)| {
                *kind == asked.kind && fields.contains(&requirement.path.as_str())
            });
            if !known && requirement.path != "metadata.name" {
                return Err(Refusal::bad_request(&format!(
                    "field label not supported: {}",
                    requirement.path
                )));
            }
            selection.fields.push(requirement);
        }
        let labels = query.get("labelSelector").map_or("", String::as_str);
        selection.labels = requirements(labels);
        Ok(selection)
    }

    pub(crate) fn has(&self, object: &Object) -> bool {
        let (namespace, name) = &object.key;
        if !self.namespace.is_empty() && self.namespace != *namespace
            || self.name.as_ref().is_some_and(|wanted| wanted != name)
        {
            return false;
        }
        // Most selections are by name, for which nothing is parsed.
        let by_name = |requirement: &&Requirement| requirement.path == "metadata.name";
        let mut named = self.fields.iter().filter(by_name);
        if !named
            .all(|requirement| (requirement.value.as_ref() == Some(name)) == requirement.wanted)
        {
            return false;
        }
        let mut rest = self
            .fields
            .iter()
            .filter(|requirement| !by_name(requirement))
            .peekable();
        if rest.peek().is_none() && self.labels.is_empty() {
            return true;
        }
        let value = object.value();
        let field = |path: &str| {
            let mut steps = path.split('.');
            steps.try_fold(&value, |at, step| at.get(step)).cloned()
        };
        let label = |name: &str| value["metadata"]["labels"].get(name).cloned();
        rest.all(|requirement| requirement.met(field(&requirement.path)))
            && self
                .labels
                .iter()
                .all(|requirement| requirement.met(label(&requirement.path)))
    }

    fn is_all(&self) -> bool {
        self.fields.is_empty() && self.labels.is_empty()
    }
}

impl Requirement {
    fn met(&self, have: Option<Value>) -> bool {
        let Some(value) = &self.value else {
            return have.is_some() == self.wanted;
        };
        let have = match have {
            Some(Value::String(text)) => text,
            Some(Value::Bool(flag)) => flag.to_string(),
            _ => String::new(),
        };
        (have == *value) == self.wanted
    }
}

fn requirements(text: &str) -> Vec<Requirement> {
    let parts = text.split(',').filter(|part| !part.is_empty());
    parts
        .map(|part| {
            let (path, value, wanted) = if let Some((path, value)) = part.split_once("!=") {
                (path, Some(value), false)
            } else if let Some((path, value)) = part.split_once("==").or(part.split_once('=')) {
                (path, Some(value), true)
            } else {
                (part.trim_start_matches('!'), None, !part.starts_with('!'))
            };
            Requirement {
                path: path.to_owned(),
                value: value.map(str::to_owned),
                wanted,
            }
        })
        .collect()
}

/// The answer to a list, piece by piece.
pub(crate) fn list(
    store: &Store,
    asked: &Attributes,
    query: &Query,
) -> Result<VecDeque<Bytes>, Refusal> {
    let selection = Selection::read(asked, query)?;
    let page = Page::read(query)?;
    let (revision, objects) = page.objects(store, asked.kind)?;
    let mut objects = objects
        .into_iter()
        .filter(|object| selection.has(object))
        .skip_while(|object| {
            page.after
                .as_ref()
                .is_some_and(|after| token_key(object) <= *after)
        });
    let shown: Vec<Arc<Object>> = match page.limit {
        Some(limit) => objects.by_ref().take(limit).collect(),
        None => objects.by_ref().collect(),
    };
    let remaining = objects.count();
    let mut metadata = json!({"resourceVersion": revision.to_string()});
    if remaining > 0
        && let Some(last) = shown.last()
    {
        metadata["continue"] = token(revision, &token_key(last)).into();
        if selection.is_all() {
            metadata["remainingItemCount"] = remaining.into();
        }
    }
    let head = format!(
        r#"{{"kind":"{}List","apiVersion":"{}","metadata":{metadata},"items":["#,
        asked.kind.name(),
        asked.kind.api_version()
    );
    let mut pieces = VecDeque::from([Bytes::from(head)]);
    for (number, object) in shown.iter().enumerate() {
        if number > 0 {
            pieces.push_back(Bytes::from_static(b","));
        }
        pieces.push_back(object.item(asked.kind));
    }
    pieces.push_back(Bytes::from_static(b"]}\n"));
    Ok(pieces)
}

/// What of a list is asked for.
struct Page {
    limit: Option<usize>,
    version: Version,
    /// The last object of the page before.
    after: Option<String>,
}

#[derive(Clone, Copy)]
enum Version {
    Any,
    Latest,
    NotOlderThan(u64),
    Exact(u64),
    /// A continued list whose first page was of this version, or of whatever is there now.
    Continued(Option<u64>),
}

impl Page {
    fn read(query: &Query) -> Result<Page, Refusal> {
        let text = |name: &str| query.get(name).map_or("", String::as_str);
        let limit = match text("limit") {
            "" => 0,
            limit => limit
                .parse()
                .map_err(|_| Refusal::bad_request(&format!("invalid limit: {limit}")))?,
        };
        let asked = text("resourceVersion");
        let matching = text("resourceVersionMatch");
        validate_match(asked, matching, text("continue"))?;
        if let Some((revision, key)) = read_token(text("continue"))? {
            if !asked.is_empty() && asked != "0" {
                return Err(Refusal::bad_request(
                    "specifying resource version is not allowed when using continue",
                ));
            }
            return Ok(Page {
                limit: (limit > 0).then_some(limit),
                version: Version::Continued(revision),
                after: Some(key),
            });
        }
        let number = parse_version(asked)?;
        let version = match (asked, matching) {
            ("", _) => Version::Latest,
            ("0", _) => Version::Any,
            (_, "Exact") => Version::Exact(number),
            // Before there was a choice, a page of a certain version was exact.
            (_, "") if limit > 0 => Version::Exact(number),
            _ => Version::NotOlderThan(number),
        };
        // From its cache the server gives all at once.
        let cached = matches!(version, Version::Any);
        Ok(Page {
            limit: (limit > 0 && !cached).then_some(limit),
            version,
            after: None,
        })
    }

    fn objects(&self, store: &Store, kind: Kind) -> Result<(u64, Vec<Arc<Object>>), Refusal> {
        let now = || (store.revision, store.all(kind).cloned().collect());
        match self.version {
            Version::NotOlderThan(revision) if revision > store.revision => {
                Err(Refusal::too_large(revision, store.revision))
            }
            Version::Any
            | Version::Latest
            | Version::NotOlderThan(_)
            | Version::Continued(None) => Ok(now()),
            Version::Exact(revision) => Ok((revision, store.all_at(kind, revision)?)),
            Version::Continued(Some(revision)) => {
                if revision < store.compacted {
                    let after = self.after.clone().unwrap_or_default();
                    return Err(Refusal::continue_expired(&token_without_version(&after)));
                }
                Ok((revision, store.all_at(kind, revision)?))
            }
        }
    }
}

/// What the server's validation of list options says.
fn validate_match(version: &str, matching: &str, token: &str) -> Result<(), Refusal> {
    if matching.is_empty() {
        return Ok(());
    }
    let mut causes = Vec::new();
    let mut forbid = |why: &str| causes.push(("resourceVersionMatch", format!("Forbidden: {why}")));
    if version.is_empty() {
        forbid("resourceVersionMatch is forbidden unless resourceVersion is provided");
    }
    if !token.is_empty() {
        forbid("resourceVersionMatch is forbidden when continue is provided");
    }
    if matching == "Exact" && version == "0" {
        forbid("resourceVersionMatch \"exact\" is forbidden for resourceVersion \"0\"");
    }
    if matching != "Exact" && matching != "NotOlderThan" {
        causes.push((
            "resourceVersionMatch",
            format!(
                "Unsupported value: {matching:?}: supported values: \"Exact\", \"NotOlderThan\", \"\""
            ),
        ));
    }
    if causes.is_empty() {
        return Ok(());
    }
    Err(Refusal::invalid("ListOptions", "", &causes))
}

/// The number that a resource version is; none is 0.
pub(crate) fn parse_version(text: &str) -> Result<u64, Refusal> {
    if text.is_empty() {
        return Ok(0);
    }
    text.parse().map_err(|_| {
        let cause = (
            "resourceVersion",
            format!("Invalid value: {text:?}: strconv.ParseUint: invalid syntax"),
        );
        Refusal::invalid("ListOptions", "", &[cause])
    })
}

fn token_key(object: &Object) -> String {
    let (namespace, name) = &object.key;
    format!("{namespace}/{name}")
}

/// Opaque to clients: the version and the last key, in hexadecimal so that it needs no escaping.
fn token(revision: u64, key: &str) -> String {
    use std::fmt::Write as _;
    key.bytes()
        .fold(format!("{revision:x}."), |mut text, byte| {
            let _ok = write!(text, "{byte:02x}");
            text
        })
}

fn token_without_version(key: &str) -> String {
    let token = token(0, key);
    token.trim_start_matches('0').to_owned()
}

fn read_token(text: &str) -> Result<Option<(Option<u64>, String)>, Refusal> {
    if text.is_empty() {
        return Ok(None);
    }
    let bad = || Refusal::bad_request("continue key is not valid");
    let (revision, hex) = text.split_once('.').ok_or_else(bad)?;
    let revision = match revision {
        "" => None,
        revision => Some(u64::from_str_radix(revision, 16).map_err(|_| bad())?),
    };
    let bytes: Result<Vec<u8>, _> = (0..hex.len())
        .step_by(2)
        .map(|at| hex.get(at..at + 2).ok_or_else(bad))
        .map(|pair| u8::from_str_radix(pair?, 16).map_err(|_| bad()))
        .collect();
    let key = String::from_utf8(bytes?).map_err(|_| bad())?;
    Ok(Some((revision, key)))
}
