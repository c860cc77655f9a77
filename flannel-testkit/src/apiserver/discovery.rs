//! What clients ask before anything else: version, groups, resources.

use serde_json::{Value, json};

/// The version that the server says it has.
pub(crate) const VERSION: &str = "v1.33.0";

/// The document at a path that is no resource.
pub(crate) fn document(path: &str) -> Option<Value> {
    let verbs = json!([
        "create", "delete", "get", "list", "patch", "update", "watch"
    ]);
    let status_verbs = json!(["get", "patch", "update"]);
    let events = json!({
        "name": "events", "singularName": "event", "namespaced": true, "kind": "Event", "verbs": verbs, "shortNames": ["ev"],
    });
    let new_version = json!({"groupVersion": "events.k8s.io/v1", "version": "v1"});
    let group = json!({
        "name": "events.k8s.io", "versions": [new_version], "preferredVersion": new_version,
    });
    Some(match path.trim_end_matches('/') {
        "/version" => json!({
            "major": "1", "minor": "33", "gitVersion": VERSION, "gitCommit": "", "gitTreeState": "clean",
            "buildDate": "2025-04-23T13:00:00Z", "goVersion": "go1.24", "compiler": "gc", "platform": "linux/amd64",
        }),
        "/api" => {
            json!({"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []})
        }
        "/apis" => json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": [group]}),
        "/apis/events.k8s.io" => {
            let mut group = group;
            group["kind"] = "APIGroup".into();
            group["apiVersion"] = "v1".into();
            group
        }
        "/api/v1" => json!({
            "kind": "APIResourceList", "groupVersion": "v1",
            "resources": [
                {
                    "name": "nodes", "singularName": "node", "namespaced": false, "kind": "Node", "verbs": verbs,
                    "shortNames": ["no"],
                },
                {
                    "name": "nodes/status", "singularName": "", "namespaced": false, "kind": "Node",
                    "verbs": status_verbs,
                },
                {
                    "name": "pods", "singularName": "pod", "namespaced": true, "kind": "Pod", "verbs": verbs,
                    "shortNames": ["po"],
                },
                events,
            ],
        }),
        "/apis/events.k8s.io/v1" => json!({
            "kind": "APIResourceList", "groupVersion": "events.k8s.io/v1", "apiVersion": "v1",
            "resources": [events],
        }),
        _ => return None,
    })
}
