//! What a request asks for, read from its method and URL.

use super::refusal::Refusal;
use super::store::Kind;
use std::collections::BTreeMap;

/// A verb of the API, as roles name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    Get,
    List,
    Watch,
    Create,
    Update,
    Patch,
    Delete,
    DeleteCollection,
}

impl Verb {
    /// Its name in roles and in refusals.
    pub fn as_str(self) -> &'static str {
        match self {
            Verb::Get => "get",
            Verb::List => "list",
            Verb::Watch => "watch",
            Verb::Create => "create",
            Verb::Update => "update",
            Verb::Patch => "patch",
            Verb::Delete => "delete",
            Verb::DeleteCollection => "deletecollection",
        }
    }
}

/// What a request is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Attributes {
    pub(crate) kind: Kind,
    pub(crate) verb: Verb,
    /// Empty for nodes, and for all namespaces.
    pub(crate) namespace: String,
    /// Empty for a collection.
    pub(crate) name: String,
    /// Whether it is the `/status` of the object.
    pub(crate) status: bool,
}

impl Attributes {
    /// `nodes` or `nodes/status`.
    pub(crate) fn resource_text(&self) -> String {
        let suffix = if self.status { "/status" } else { "" };
        format!("{}{suffix}", self.kind.plural())
    }
}

/// A resource, or a plain path such as `/version`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    Path { path: String, verb: String },
    Resource(Attributes),
}

/// The parameters behind the question mark.
pub(crate) type Query = BTreeMap<String, String>;

/// Takes method and path apart.
pub(crate) fn target(method: &str, path: &str, query: &Query) -> Result<Target, Refusal> {
    let plain = || Target::Path {
        path: path.to_owned(),
        verb: method.to_lowercase(),
    };
    let words: Vec<&str> = path.trim_matches('/').split('/').collect();
    let (group, rest) = match &words[..] {
        ["api", "v1", rest @ ..] => ("", rest),
        ["apis", "events.k8s.io", "v1", rest @ ..] => ("events.k8s.io", rest),
        _ => return Ok(plain()),
    };
    let (namespace, rest) = match rest {
        ["namespaces", namespace, rest @ ..] => (*namespace, rest),
        rest => ("", rest),
    };
    let (plural, name, status) = match rest {
        [] if namespace.is_empty() => return Ok(plain()),
        [plural] => (*plural, "", false),
        [plural, name] => (*plural, *name, false),
        [plural, name, "status"] => (*plural, *name, true),
        _ => return Err(Refusal::no_such_path()),
    };
    let kind = Kind::find(group, plural).ok_or_else(Refusal::no_such_path)?;
    if kind.namespaced() == namespace.is_empty() && !(kind.namespaced() && name.is_empty()) {
        return Err(Refusal::no_such_path());
    }
    if status && !kind.has_status() {
        return Err(Refusal::no_such_path());
    }
    let watching = query
        .get("watch")
        .is_some_and(|value| matches!(value.as_str(), "" | "1" | "true"));
    let verb = match (method, name.is_empty()) {
        ("GET", _) if watching => Verb::Watch,
        ("GET", true) => Verb::List,
        ("GET", false) => Verb::Get,
        ("POST", true) => Verb::Create,
        ("PUT", false) => Verb::Update,
        ("PATCH", false) => Verb::Patch,
        ("DELETE", false) => Verb::Delete,
        ("DELETE", true) => Verb::DeleteCollection,
        _ => return Err(Refusal::method_not_allowed()),
    };
    Ok(Target::Resource(Attributes {
        kind,
        verb,
        namespace: namespace.to_owned(),
        name: name.to_owned(),
        status,
    }))
}

/// Reads the parameters; of a repeated one the first counts.
pub(crate) fn query(text: &str) -> Query {
    let mut query = Query::new();
    for pair in text.split('&').filter(|pair| !pair.is_empty()) {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        query.entry(decode(name)).or_insert_with(|| decode(value));
    }
    query
}

fn decode(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let hex = tail
            .get(..2)
            .and_then(|hex| std::str::from_utf8(hex).ok())
            .and_then(|hex| u8::from_str_radix(hex, 16).ok());
        match (first, hex) {
            (b'%', Some(byte)) => {
                bytes.push(byte);
                rest = &tail[2..];
            }
            (b'+', _) => {
                bytes.push(b' ');
                rest = tail;
            }
            (byte, _) => {
                bytes.push(*byte);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
