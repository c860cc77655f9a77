//! Events: stored as the core group has them, shown by both groups, checked as the real server checks them.

use super::refusal::Refusal;
use serde_json::{Map, Value, json};

/// Names in the core group and in `events.k8s.io/v1`.
const NAMES: [(&str, &str); 8] = [
    ("involvedObject", "regarding"),
    ("message", "note"),
    ("source", "deprecatedSource"),
    ("firstTimestamp", "deprecatedFirstTimestamp"),
    ("lastTimestamp", "deprecatedLastTimestamp"),
    ("count", "deprecatedCount"),
    ("reportingComponent", "reportingController"),
    ("reportingInstance", "reportingInstance"),
];

/// An event as `events.k8s.io/v1` shows it.
pub(crate) fn to_new(event: Value) -> Value {
    rename(event, |name| {
        let pair = NAMES.iter().find(|(core, _)| *core == name);
        pair.map(|(_, new)| *new)
    })
}

/// An event of `events.k8s.io/v1` as it is stored.
pub(crate) fn to_core(event: Value) -> Value {
    rename(event, |name| {
        let pair = NAMES.iter().find(|(_, new)| *new == name);
        pair.map(|(core, _)| *core)
    })
}

fn rename(event: Value, to: impl Fn(&str) -> Option<&'static str>) -> Value {
    let Value::Object(fields) = event else {
        return event;
    };
    let fields = fields.into_iter();
    let renamed: Map<String, Value> = fields
        .map(|(name, value)| (to(&name).map_or(name, str::to_owned), value))
        .collect();
    Value::Object(renamed)
}

/// Fills in what the real server always shows.
pub(crate) fn complete(event: &mut Value) {
    for (name, value) in [
        ("involvedObject", json!({})),
        ("source", json!({})),
        ("firstTimestamp", Value::Null),
        ("lastTimestamp", Value::Null),
        ("eventTime", Value::Null),
        ("reportingComponent", json!("")),
        ("reportingInstance", json!("")),
    ] {
        if event.get(name).is_none() {
            event[name] = value;
        }
    }
}

/// Checks a stored event. `new` says that it came through `events.k8s.io/v1`, which asks for more.
pub(crate) fn validate(event: &Value, new: bool) -> Result<(), Refusal> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let namespace = text(&event["metadata"]["namespace"]);
    let involved = text(&event["involvedObject"]["namespace"]);
    let timed = event["eventTime"].is_string();
    let field = |core: &'static str, name: &'static str| if new { name } else { core };
    let mut causes: Vec<(&str, String)> = Vec::new();
    // What concerns an object without namespace belongs into "default"; newer events may be in kube-system.
    let agrees = if involved.is_empty() {
        namespace == "default" || timed && namespace == "kube-system"
    } else {
        involved == namespace
    };
    if !agrees {
        causes.push((
            field("involvedObject.namespace", "regarding.namespace"),
            format!("Invalid value: {involved:?}: does not match event.namespace"),
        ));
    }
    if new && !timed {
        causes.push(("eventTime", "Required value".into()));
    }
    if new || timed {
        let required = [
            (
                "reportingComponent",
                field("reportingController", "reportingController"),
            ),
            ("reportingInstance", "reportingInstance"),
            ("action", "action"),
            ("reason", "reason"),
        ];
        for (name, shown) in required {
            if text(&event[name]).is_empty() {
                causes.push((shown, "Required value".into()));
            }
        }
        if text(&event["reportingInstance"]).len() > 128 {
            causes.push((
                "reportingInstance",
                "can have at most 128 characters".into(),
            ));
        }
        if text(&event["message"]).len() > 1024 {
            causes.push((
                field("message", "note"),
                "can have at most 1024 characters".into(),
            ));
        }
        let kind = text(&event["type"]);
        if kind != "Normal" && kind != "Warning" {
            causes.push((
                "type",
                format!("Invalid value: {kind:?}: has invalid value: {kind}"),
            ));
        }
    }
    if causes.is_empty() {
        return Ok(());
    }
    Err(Refusal::invalid(
        "Event",
        &text(&event["metadata"]["name"]),
        &causes,
    ))
}
