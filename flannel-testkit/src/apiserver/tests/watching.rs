//! Watches.

use super::*;
use crate::apiserver::{Gone, WatchEnd};
use std::time::Duration;

const WATCH: &str = "/api/v1/nodes?watch=1&allowWatchBookmarks=true";

#[track_caller]
fn next(answer: &mut client::Answer) -> (String, String) {
    let (kind, object) = answer.event().expect("an event");
    let name = object["metadata"]["name"].as_str();
    (kind, name.unwrap_or_default().to_owned())
}

fn from(version: u64) -> String {
    format!("{WATCH}&resourceVersion={version}")
}

#[test]
fn a_watch_shows_what_happened_since_and_what_happens() {
    let server = server();
    server.create_node("a", "10.244.1.0/24").unwrap();
    let version = server.revision();
    server.create_node("b", "10.244.2.0/24").unwrap();
    let client = Client::flannel(&server);
    let mut watch = client.send("GET", &from(version), JSON, "");
    assert_eq!(watch.code, 200);
    assert!(watch.headers.contains("transfer-encoding: chunked"));
    let (kind, object) = watch.event().unwrap();
    assert_eq!((kind.as_str(), &object["kind"]), ("ADDED", &json!("Node")));
    assert_eq!(object["metadata"]["name"], "b");
    server.annotate("a", &[("x", Some("1"))]).unwrap();
    server.delete_node("b").unwrap();
    let (kind, object) = watch.event().unwrap();
    assert_eq!(kind, "MODIFIED");
    assert_eq!(object["metadata"]["annotations"]["x"], "1");
    let (kind, object) = watch.event().unwrap();
    assert_eq!(kind, "DELETED");
    // A deleted object carries the version of its deletion, so that a watch can go on from there.
    assert_eq!(
        object["metadata"]["resourceVersion"],
        server.revision().to_string()
    );
    server.send_bookmarks();
    let (kind, object) = watch.event().unwrap();
    assert_eq!(kind, "BOOKMARK");
    assert_eq!(object["kind"], "Node");
    assert_eq!(
        object["metadata"]["resourceVersion"],
        server.revision().to_string()
    );
    // Not of this kind: nothing is shown, but the next bookmark is further on.
    server
        .create(Kind::Pod, json!({"metadata": {"name": "p"}}))
        .unwrap();
    server.send_bookmarks();
    let (_, object) = watch.event().unwrap();
    assert_eq!(
        object["metadata"]["resourceVersion"],
        server.revision().to_string()
    );
}

#[test]
fn a_watch_without_a_version_begins_with_what_there_is() {
    let server = server();
    server.create_node("a", "10.244.1.0/24").unwrap();
    server.create_node("b", "10.244.2.0/24").unwrap();
    let client = Client::flannel(&server);
    for path in [WATCH.to_owned(), from(0)] {
        let mut watch = client.send("GET", &path, JSON, "");
        let seen =
            [next(&mut watch), next(&mut watch)].map(|(kind, name)| format!("{kind} {name}"));
        assert_eq!(seen, ["ADDED a", "ADDED b"]);
        let name = server.revision().to_string();
        server.create_node(&name, "10.244.3.0/24").unwrap();
        assert_eq!(next(&mut watch), ("ADDED".to_owned(), name.clone()));
        server.delete_node(&name).unwrap();
    }
    let one = format!("{WATCH}&fieldSelector=metadata.name%3Db");
    let mut watch = client.send("GET", &one, JSON, "");
    assert_eq!(next(&mut watch).1, "b");
    server.annotate("a", &[("x", Some("1"))]).unwrap();
    server.annotate("b", &[("x", Some("1"))]).unwrap();
    assert_eq!(next(&mut watch), ("MODIFIED".to_owned(), "b".to_owned()));
}

#[test]
fn an_object_that_is_no_longer_selected_is_deleted_for_the_watch() {
    let server = server();
    server.create_node("a", "10.244.1.0/24").unwrap();
    let client = Client::flannel(&server);
    let path = format!("{}&labelSelector=zone%3D1", from(server.revision()));
    let mut watch = client.send("GET", &path, JSON, "");
    for (labels, want) in [
        (json!({"zone": "1"}), "ADDED"),
        (json!({"zone": "2"}), "DELETED"),
    ] {
        let label = |node: &mut Value| node["metadata"]["labels"] = labels;
        server.edit_node("a", label).unwrap();
        assert_eq!(next(&mut watch).0, want);
    }
}

#[test]
fn a_watch_ends_when_its_time_is_over() {
    let server = server();
    let client = Client::flannel(&server);
    let path = format!("{}&timeoutSeconds=1", from(server.revision()));
    let mut watch = client.send("GET", &path, JSON, "");
    assert!(watch.event().is_none());
    server.set_bookmark_every(Duration::from_millis(200));
    let mut watch = client.send("GET", &path, JSON, "");
    assert_eq!(next(&mut watch).0, "BOOKMARK");
    let without = path.replace("allowWatchBookmarks=true", "");
    let mut watch = client.send("GET", &without, JSON, "");
    assert!(watch.event().is_none(), "not asked for");
}

#[test]
fn a_watch_from_before_the_history_is_refused_in_both_ways() {
    let server = server();
    let old = server.revision();
    server.create_node("a", "10.244.1.0/24").unwrap();
    server.compact();
    let now = server.revision();
    let client = Client::flannel(&server);
    let text = format!("too old resource version: {old} ({now})");
    let mut watch = client.send("GET", &from(old), JSON, "");
    assert_eq!(watch.code, 200);
    let (kind, status) = watch.event().unwrap();
    assert_eq!(kind, "ERROR");
    assert_eq!(message(&(410, status)), (410, "Expired", text.as_str()));
    assert!(watch.event().is_none());
    server.set_gone(Gone::Status);
    let refused = client.get(&from(old));
    assert_eq!(message(&refused), (410, "Expired", text.as_str()));
    // From now on nothing is lost.
    let mut watch = client.send("GET", &from(now), JSON, "");
    server.delete_node("a").unwrap();
    assert_eq!(next(&mut watch).0, "DELETED");
}

#[test]
fn a_watch_that_was_stopped_for_longer_than_the_history_ends_with_an_error() {
    let server = server();
    server.create_node("a", "10.244.1.0/24").unwrap();
    let client = Client::flannel(&server);
    let mut watch = client.send("GET", &from(server.revision()), JSON, "");
    server.annotate("a", &[("x", Some("0"))]).unwrap();
    assert_eq!(next(&mut watch).0, "MODIFIED");
    server.hang(true);
    server.annotate("a", &[("x", Some("1"))]).unwrap();
    server.compact();
    server.hang(false);
    let (kind, status) = watch.event().unwrap();
    assert_eq!((kind.as_str(), &status["code"]), ("ERROR", &json!(410)));
}

#[test]
fn a_watch_of_the_future_is_blind_until_then() {
    let server = server();
    let client = Client::flannel(&server);
    let mut watch = client.send("GET", &from(server.revision() + 2), JSON, "");
    for name in ["a", "b", "c"] {
        server.create_node(name, "10.244.1.0/24").unwrap();
    }
    assert_eq!(next(&mut watch).1, "c");
}

#[test]
fn watches_end_and_break_on_demand() {
    let server = server();
    let client = Client::flannel(&server);
    let path = from(server.revision());
    let mut watch = client.send("GET", &path, JSON, "");
    server.end_watches(WatchEnd::Clean);
    assert!(watch.event().is_none());
    let mut watch = client.send("GET", &path, JSON, "");
    server.end_watches(WatchEnd::Cut);
    assert!(watch.try_event().is_err());
}

#[test]
fn streaming_lists_are_refused_or_served() {
    let server = server();
    server.create_node("a", "10.244.1.0/24").unwrap();
    let client = Client::flannel(&server);
    let path = format!(
        "{WATCH}&sendInitialEvents=true&resourceVersionMatch=NotOlderThan&resourceVersion=0"
    );
    let (code, reason, text) = {
        let refused = client.get(&path);
        let (code, reason, text) = message(&refused);
        (code, reason.to_owned(), text.to_owned())
    };
    assert_eq!((code, reason.as_str()), (422, "Invalid"));
    assert!(
        text.contains("sendInitialEvents is forbidden for watch"),
        "{text}"
    );
    server.set_streaming_lists(true);
    let mut watch = client.send("GET", &path, JSON, "");
    assert_eq!(next(&mut watch), ("ADDED".to_owned(), "a".to_owned()));
    let (kind, object) = watch.event().unwrap();
    assert_eq!(kind, "BOOKMARK");
    assert_eq!(
        object["metadata"]["annotations"],
        json!({"k8s.io/initial-events-end": "true"})
    );
    assert_eq!(
        object["metadata"]["resourceVersion"],
        server.revision().to_string()
    );
    let careless = path.replace("&resourceVersionMatch=NotOlderThan", "");
    assert_eq!(client.get(&careless).0, 422);
}

#[test]
fn what_happens_while_it_is_stopped_is_in_no_watch_of_before() {
    let server = server();
    let client = Client::flannel(&server);
    for round in 0..100 {
        let mut watch = client.send("GET", &from(server.revision()), JSON, "");
        assert_eq!(watch.code, 200);
        server.stop().unwrap();
        server.create_node(&format!("n{round}"), "").unwrap();
        let event = watch.try_event();
        assert!(event.is_err(), "round {round}: {event:?}");
        server.resume().unwrap();
    }
}
