//! The `Status` objects with which an API server refuses, in Kubernetes' own words.

use super::store::Kind;
use serde_json::{Value, json};

/// A refusal: what becomes a `Status` object, or for overload a line of text.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Refusal {
    pub(crate) code: u16,
    pub(crate) body: String,
    /// Seconds in `Retry-After`.
    pub(crate) retry_after: Option<u32>,
    pub(crate) content_type: &'static str,
}

impl Refusal {
    fn status(code: u16, reason: &str, message: &str, details: Option<Value>) -> Refusal {
        let mut status = json!({
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
            "message": message, "reason": reason, "code": code,
        });
        if let Some(details) = details {
            status["details"] = details;
        }
        Refusal {
            code,
            body: status.to_string(),
            retry_after: None,
            content_type: "application/json",
        }
    }

    pub(crate) fn unauthorized() -> Refusal {
        Refusal::status(401, "Unauthorized", "Unauthorized", None)
    }

    pub(crate) fn forbidden(message: &str, kind: &str, name: &str) -> Refusal {
        let mut details = json!({"kind": kind});
        if !name.is_empty() {
            details["name"] = name.into();
        }
        Refusal::status(403, "Forbidden", message, Some(details))
    }

    pub(crate) fn no_such_path() -> Refusal {
        let message = "the server could not find the requested resource";
        Refusal::status(404, "NotFound", message, Some(json!({})))
    }

    pub(crate) fn not_found(kind: Kind, name: &str) -> Refusal {
        Refusal::status(
            404,
            "NotFound",
            &format!("{} \"{name}\" not found", kind.qualified()),
            Some(details(kind, name)),
        )
    }

    pub(crate) fn no_namespace(name: &str) -> Refusal {
        Refusal::status(
            404,
            "NotFound",
            &format!("namespaces \"{name}\" not found"),
            Some(json!({"name": name, "kind": "namespaces"})),
        )
    }

    pub(crate) fn already_exists(kind: Kind, name: &str) -> Refusal {
        Refusal::status(
            409,
            "AlreadyExists",
            &format!("{} \"{name}\" already exists", kind.qualified()),
            Some(details(kind, name)),
        )
    }

    pub(crate) fn conflict(kind: Kind, name: &str) -> Refusal {
        Refusal::conflict_because(
            kind,
            name,
            "the object has been modified; please apply your changes to the latest version and try again",
        )
    }

    pub(crate) fn conflict_because(kind: Kind, name: &str, why: &str) -> Refusal {
        let message = format!(
            "Operation cannot be fulfilled on {} \"{name}\": {why}",
            kind.qualified()
        );
        Refusal::status(409, "Conflict", &message, Some(details(kind, name)))
    }

    pub(crate) fn invalid(kind: &str, name: &str, causes: &[(&str, String)]) -> Refusal {
        let texts: Vec<String> = causes
            .iter()
            .map(|(field, why)| format!("{field}: {why}"))
            .collect();
        let text = match &texts[..] {
            [one] => one.clone(),
            many => format!("[{}]", many.join(", ")),
        };
        let causes: Vec<Value> = causes
            .iter()
            .map(|(field, why)| json!({"reason": "FieldValueInvalid", "message": why, "field": field}))
            .collect();
        Refusal::status(
            422,
            "Invalid",
            &format!("{kind} \"{name}\" is invalid: {text}"),
            Some(json!({"name": name, "kind": kind, "causes": causes})),
        )
    }

    pub(crate) fn bad_request(message: &str) -> Refusal {
        Refusal::status(400, "BadRequest", message, None)
    }

    pub(crate) fn method_not_allowed() -> Refusal {
        let message = "the server does not allow this method on the requested resource";
        Refusal::status(405, "MethodNotAllowed", message, Some(json!({})))
    }

    pub(crate) fn not_acceptable() -> Refusal {
        let message = "only the following media types are accepted: application/json";
        Refusal::status(406, "NotAcceptable", message, Some(json!({})))
    }

    pub(crate) fn unsupported_media_type() -> Refusal {
        let message = "the body of the request was in an unknown format - accepted media types include: \
                       application/merge-patch+json, application/strategic-merge-patch+json";
        Refusal::status(415, "UnsupportedMediaType", message, Some(json!({})))
    }

    /// A watch that begins before the history does.
    pub(crate) fn watch_expired(asked: u64, oldest: u64) -> Refusal {
        let message = format!("too old resource version: {asked} ({oldest})");
        Refusal::status(410, "Expired", &message, None)
    }

    /// An exact list of a version that has been compacted.
    pub(crate) fn list_expired() -> Refusal {
        let message = "The resourceVersion for the provided list is too old.";
        Refusal::status(410, "Expired", message, None)
    }

    /// A continued list whose version has been compacted; `token` leads on, inconsistently.
    pub(crate) fn continue_expired(token: &str) -> Refusal {
        let message = "The provided continue parameter is too old to display a consistent list result. You can start a \
                       new list without the continue parameter, or use the continue token in this response to retrieve \
                       the remainder of the results. Continuing with the provided token results in an inconsistent list \
                       - objects that were created, modified, or deleted between the time the first chunk was returned \
                       and now may show up in the list.";
        let status = json!({
            "kind": "Status", "apiVersion": "v1", "metadata": {"continue": token}, "status": "Failure",
            "message": message, "reason": "Expired", "code": 410,
        });
        Refusal {
            body: status.to_string(),
            ..Refusal::list_expired()
        }
    }

    /// A version that the server has not come to yet.
    pub(crate) fn too_large(asked: u64, current: u64) -> Refusal {
        let message = format!("Too large resource version: {asked}, current: {current}");
        let cause =
            json!({"reason": "ResourceVersionTooLarge", "message": "Too large resource version"});
        let details = json!({"causes": [cause], "retryAfterSeconds": 1});
        let mut refusal = Refusal::status(504, "Timeout", &message, Some(details));
        refusal.retry_after = Some(1);
        refusal
    }

    /// What the overload filter says, as text.
    pub(crate) fn too_many_requests(retry_after: u32) -> Refusal {
        Refusal {
            code: 429,
            body: "Too many requests, please try again later.\n".into(),
            retry_after: Some(retry_after),
            content_type: "text/plain; charset=utf-8",
        }
    }

    /// An error inside the server, or one on its way to etcd.
    pub(crate) fn internal(code: u16, retry_after: Option<u32>) -> Refusal {
        let (reason, message) = match code {
            503 => (
                "ServiceUnavailable",
                "the server is currently unable to handle the request",
            ),
            504 => (
                "Timeout",
                "Timeout: request did not complete within the allotted timeout",
            ),
            _ => (
                "InternalError",
                "Internal error occurred: etcdserver: request timed out",
            ),
        };
        let mut refusal = Refusal::status(code, reason, message, None);
        refusal.retry_after = retry_after;
        refusal
    }
}

fn details(kind: Kind, name: &str) -> Value {
    let mut details = json!({"name": name, "kind": kind.plural()});
    if !kind.group().is_empty() {
        details["group"] = kind.group().into();
    }
    details
}
