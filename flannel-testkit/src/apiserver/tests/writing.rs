//! Create, patch, replace and delete.

use super::*;

const NODE: &str = "/api/v1/nodes/a";
const STATUS: &str = "/api/v1/nodes/a/status";

fn with_node() -> (ApiServer, Client) {
    let server = server();
    server.create_node("a", "10.244.1.0/24").unwrap();
    let client = Client::flannel(&server);
    (server, client)
}

/// What flanneld v0.28.9 sends (`Request Body` in its log with `-v=9`).
#[test]
fn upstreams_patches_have_upstreams_results() {
    let (server, client) = with_node();
    let patch = r#"{"metadata":{"annotations":{"flannel.alpha.coreos.com/backend-data":"{\"VNI\":1,\"VtepMAC\":\"fa:4b:f2:85:0f:4e\"}","flannel.alpha.coreos.com/backend-type":"vxlan","flannel.alpha.coreos.com/kube-subnet-manager":"true","flannel.alpha.coreos.com/public-ip":"192.168.77.11"}}}"#;
    let condition = r#"{"status":{"conditions":[{"type":"NetworkUnavailable","status":"False","lastHeartbeatTime":"2026-11-20T22:27:45Z","lastTransitionTime":"2026-11-20T22:27:45Z","reason":"FlannelIsUp","message":"Flannel is running on this node"}]}}"#;
    for text in [patch, condition] {
        let patch: Value = serde_json::from_str(text).unwrap();
        assert_eq!(client.patch(STATUS, STRATEGIC, &patch).0, 200);
    }
    let node = server.node("a").unwrap();
    // Lines of the sample.
    assert_eq!(
        node["metadata"]["annotations"].to_string(),
        r#"{"flannel.alpha.coreos.com/backend-data":"{\"VNI\":1,\"VtepMAC\":\"fa:4b:f2:85:0f:4e\"}","flannel.alpha.coreos.com/backend-type":"vxlan","flannel.alpha.coreos.com/kube-subnet-manager":"true","flannel.alpha.coreos.com/public-ip":"192.168.77.11","volumes.kubernetes.io/controller-managed-attach-detach":"true"}"#
    );
    let condition: Value = serde_json::from_str(condition).unwrap();
    assert_eq!(
        node["status"]["conditions"],
        condition["status"]["conditions"]
    );
    let managed = node["metadata"]["managedFields"].as_array().unwrap();
    let ours = &managed[1];
    assert_eq!(managed.len(), 2);
    assert_eq!(ours["subresource"], "status");
    assert_eq!(
        ours["fieldsV1"],
        json!({
            "f:metadata": {"f:annotations": {
                "f:flannel.alpha.coreos.com/backend-data": {}, "f:flannel.alpha.coreos.com/backend-type": {},
                "f:flannel.alpha.coreos.com/kube-subnet-manager": {}, "f:flannel.alpha.coreos.com/public-ip": {},
            }},
            "f:status": {"f:conditions": {r#"k:{"type":"NetworkUnavailable"}"#: {
                "f:lastHeartbeatTime": {}, "f:lastTransitionTime": {}, "f:message": {}, "f:reason": {},
                "f:status": {}, "f:type": {},
            }}},
        })
    );
}

#[test]
fn the_status_of_a_node_and_the_rest_are_written_apart() {
    let (server, client) = with_node();
    let admin = Client::admin(&server);
    let patch = json!({
        "metadata": {"annotations": {"x": "1"}, "labels": {"l": "1"}},
        "spec": {"unschedulable": true}, "status": {"phase": "Running"},
    });
    let (_, node) = client.patch(STATUS, MERGE, &patch);
    assert_eq!(node["metadata"]["annotations"]["x"], "1");
    assert!(node["spec"].get("unschedulable").is_none());
    assert_eq!(node["status"]["phase"], "Running");
    let patch = json!({
        "metadata": {"annotations": {"x": null}}, "spec": {"unschedulable": true}, "status": {"phase": "Terminated"},
    });
    let (_, node) = admin.patch(NODE, MERGE, &patch);
    assert!(node["metadata"]["annotations"].get("x").is_none());
    assert_eq!(node["spec"]["unschedulable"], true);
    assert_eq!(node["status"]["phase"], "Running");
    // The last annotation takes the map with it.
    let patch = json!({"metadata": {"annotations": null}});
    let (_, node) = admin.patch(NODE, STRATEGIC, &patch);
    assert!(node["metadata"].get("annotations").is_none(), "{node}");
    let patch = json!({"metadata": {"annotations": {"y": "1"}}});
    let (_, node) = client.patch(STATUS, STRATEGIC, &patch);
    assert_eq!(node["metadata"]["annotations"], json!({"y": "1"}));
}

#[test]
fn a_write_that_changes_nothing_makes_no_version() {
    let (server, client) = with_node();
    let patch = json!({"metadata": {"annotations": {"x": "1"}}});
    let (_, first) = client.patch(STATUS, STRATEGIC, &patch);
    let revision = server.revision();
    for how in [MERGE, STRATEGIC] {
        let (code, again) = client.patch(STATUS, how, &patch);
        assert_eq!((code, &again["metadata"]), (200, &first["metadata"]));
    }
    assert_eq!(server.revision(), revision);
}

#[test]
fn a_stale_version_or_another_uid_is_a_conflict() {
    let (server, client) = with_node();
    let stale = server.node("a").unwrap();
    server.annotate("a", &[("x", Some("1"))]).unwrap();
    let version = &stale["metadata"]["resourceVersion"];
    let patch = json!({"metadata": {"resourceVersion": version, "annotations": {"y": "1"}}});
    let text = r#"Operation cannot be fulfilled on nodes "a": the object has been modified; please apply your changes to the latest version and try again"#;
    assert_eq!(
        message(&client.patch(STATUS, MERGE, &patch)),
        (409, "Conflict", text)
    );
    let admin = Client::admin(&server);
    let (code, _) = admin.send("PUT", NODE, JSON, &stale.to_string()).object();
    assert_eq!(code, 409);
    let mut fresh = server.node("a").unwrap();
    fresh["spec"]["unschedulable"] = true.into();
    let (code, node) = admin.send("PUT", NODE, JSON, &fresh.to_string()).object();
    assert_eq!((code, &node["spec"]["unschedulable"]), (200, &json!(true)));
    let patch = json!({"metadata": {"uid": "other", "annotations": {"y": "1"}}});
    let refused = client.patch(STATUS, MERGE, &patch);
    let (code, reason, text) = message(&refused);
    assert_eq!((code, reason), (409, "Conflict"));
    assert!(
        text.contains("Precondition failed: UID in precondition: other"),
        "{text}"
    );
    let wrong = json!({"preconditions": {"uid": "other"}}).to_string();
    assert_eq!(admin.send("DELETE", NODE, JSON, &wrong).code, 409);
    let (code, status) = admin.send("DELETE", NODE, JSON, "").object();
    assert_eq!((code, &status["status"]), (200, &json!("Success")));
    assert_eq!(admin.send("DELETE", NODE, JSON, "").code, 404);
}

#[test]
fn a_node_keeps_its_subnet_and_its_identity() {
    let (server, client) = with_node();
    let admin = Client::admin(&server);
    let other = json!({"spec": {"podCIDR": "10.244.7.0/24", "podCIDRs": ["10.244.7.0/24"]}});
    let refused = admin.patch(NODE, MERGE, &other);
    let (code, reason, text) = message(&refused);
    assert_eq!((code, reason), (422, "Invalid"));
    assert_eq!(
        text,
        r#"Node "a" is invalid: spec.podCIDRs: Forbidden: node updates may not change podCIDR except from "" to valid"#
    );
    let later = json!({"metadata": {"name": "late"}});
    assert_eq!(admin.post("/api/v1/nodes", &later).0, 201);
    let (code, node) = admin.patch("/api/v1/nodes/late", MERGE, &other);
    assert_eq!(
        (code, &node["spec"]["podCIDR"]),
        (200, &json!("10.244.7.0/24"))
    );
    let patch =
        json!({"metadata": {"creationTimestamp": "2000-01-01T00:00:00Z", "annotations": {"x": 7}}});
    assert_eq!(client.patch(STATUS, MERGE, &patch).0, 400, "not a string");
    let patch = json!({"metadata": {"creationTimestamp": "2000-01-01T00:00:00Z"}});
    let (code, node) = client.patch(STATUS, MERGE, &patch);
    assert_eq!(code, 200);
    assert_ne!(
        node["metadata"]["creationTimestamp"],
        "2000-01-01T00:00:00Z"
    );
    let twice = admin.post("/api/v1/nodes", &later);
    assert_eq!(
        message(&twice),
        (409, "AlreadyExists", r#"nodes "late" already exists"#)
    );
    let uid = node["metadata"]["uid"].clone();
    server.delete_node("a").unwrap();
    let again = server.create_node("a", "10.244.1.0/24").unwrap();
    assert_ne!(again["metadata"]["uid"], uid);
}

#[test]
fn only_what_the_server_understands_is_taken() {
    let (server, client) = with_node();
    let admin = Client::admin(&server);
    let patch = json!([{"op": "add", "path": "/metadata/labels", "value": {}}]);
    let json_patch = "application/json-patch+json";
    let refused = client.patch(STATUS, json_patch, &patch);
    assert_eq!(message(&refused).0, 415);
    for (body, code) in [
        ("{", 400),
        ("[]", 400),
        (r#"{"kind":"Pod","metadata":{"name":"x"}}"#, 400),
        ("{}", 400),
    ] {
        assert_eq!(
            admin.send("POST", "/api/v1/nodes", JSON, body).code,
            code,
            "{body}"
        );
    }
    for (method, path, code) in [
        ("GET", "/api/v1/services", 404),
        ("GET", "/apis/apps/v1/daemonsets", 404),
        ("GET", "/api/v1/namespaces/default/nodes", 404),
        ("POST", NODE, 405),
        ("DELETE", "/api/v1/nodes", 405),
    ] {
        assert_eq!(
            admin.send(method, path, JSON, "").code,
            code,
            "{method} {path}"
        );
    }
}

#[test]
fn events_are_the_same_in_both_groups_and_checked() {
    let server = server();
    server.add_user(User::service_account(
        "kube-flannel",
        "flannel",
        vec![Rule {
            api_groups: vec![String::new(), "events.k8s.io".into()],
            resources: vec!["events".into()],
            verbs: vec!["create".into(), "patch".into(), "get".into(), "list".into()],
            resource_names: Vec::new(),
        }],
    ));
    let client = Client::flannel(&server);
    let new = "/apis/events.k8s.io/v1/namespaces/default/events";
    let event = json!({
        "apiVersion": "events.k8s.io/v1", "kind": "Event",
        "metadata": {"generateName": "a.", "namespace": "default"},
        "regarding": {"kind": "Node", "name": "a", "uid": "a"}, "reason": "NoPodCIDR", "note": "no podCIDR yet",
        "type": "Warning", "action": "Start", "eventTime": "2026-11-21T10:00:00.000000Z",
        "reportingController": "flannel-agent", "reportingInstance": "a",
    });
    let (code, made) = client.post(new, &event);
    assert_eq!(code, 201, "{made}");
    assert_eq!(made["note"], "no podCIDR yet");
    let name = made["metadata"]["name"].as_str().unwrap();
    assert!(name.starts_with("a."), "{name}");
    let (_, core) = client.get(&format!("/api/v1/namespaces/default/events/{name}"));
    assert_eq!(core["message"], "no podCIDR yet");
    assert_eq!(core["involvedObject"]["name"], "a");
    assert_eq!(core["reportingComponent"], "flannel-agent");
    assert_eq!(core["source"], json!({}));
    let series = json!({"series": {"count": 2, "lastObservedTime": "2026-11-21T10:01:00.000000Z"}});
    let (code, patched) = client.patch(&format!("{new}/{name}"), MERGE, &series);
    assert_eq!((code, &patched["series"]["count"]), (200, &json!(2)));

    for (field, value) in [
        ("eventTime", Value::Null),
        ("reportingController", Value::Null),
        ("reportingInstance", Value::Null),
        ("action", Value::Null),
        ("note", "x".repeat(1025).into()),
        ("type", "Error".into()),
        (
            "regarding",
            json!({"kind": "Pod", "name": "p", "namespace": "other"}),
        ),
    ] {
        let mut bad = event.clone();
        bad[field] = value;
        let refused = client.post(new, &bad);
        assert_eq!(
            (refused.0, &refused.1["reason"]),
            (422, &json!("Invalid")),
            "{field}"
        );
    }
    // An old event of a node in another namespace than "default".
    let old = json!({
        "metadata": {"name": "n.1"}, "involvedObject": {"kind": "Node", "name": "a"}, "reason": "X", "message": "x",
        "type": "Normal",
    });
    let path = "/api/v1/namespaces/kube-flannel/events";
    let refused = client.post(path, &old);
    assert_eq!(
        message(&refused).2,
        r#"Event "n.1" is invalid: involvedObject.namespace: Invalid value: "": does not match event.namespace"#
    );
    assert_eq!(
        client.post("/api/v1/namespaces/default/events", &old).0,
        201
    );
    let nowhere = client.post("/api/v1/namespaces/nowhere/events", &old);
    assert_eq!(
        message(&nowhere),
        (404, "NotFound", r#"namespaces "nowhere" not found"#)
    );
    assert_eq!(server.all(Kind::Event).len(), 2);
}
