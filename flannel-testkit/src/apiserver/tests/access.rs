//! Who may what, and faults.

use super::*;
use crate::apiserver::{Failure, Verb};
use std::time::{Duration, Instant};

#[test]
fn what_no_rule_allows_is_forbidden_in_the_servers_words() {
    let server = server();
    server.create_node("x1", "10.244.1.0/24").unwrap();
    let account = "system:serviceaccount:kube-flannel:flannel";
    let client = Client::flannel(&server);
    assert_eq!(client.get("/api/v1/nodes/x1").0, 200);
    // Manifests of flannel up to 0.20.1.
    server.set_rules(
        account,
        vec![
            Rule::core("pods", &["get"]),
            Rule::core("nodes", &["list", "watch"]),
            Rule::core("nodes/status", &["patch"]),
        ],
    );
    assert_eq!(client.get("/api/v1/nodes").0, 200);
    let cases = [
        (
            "GET",
            "/api/v1/nodes/x1",
            r#"nodes "x1" is forbidden: User "ACCOUNT" cannot get resource "nodes" in API group "" at the cluster scope"#,
        ),
        (
            "PATCH",
            "/api/v1/nodes/x1",
            r#"nodes "x1" is forbidden: User "ACCOUNT" cannot patch resource "nodes" in API group "" at the cluster scope"#,
        ),
        (
            "GET",
            "/api/v1/nodes/x1/status",
            r#"nodes "x1" is forbidden: User "ACCOUNT" cannot get resource "nodes/status" in API group "" at the cluster scope"#,
        ),
        (
            "GET",
            "/api/v1/pods",
            r#"pods is forbidden: User "ACCOUNT" cannot list resource "pods" in API group "" at the cluster scope"#,
        ),
        (
            "POST",
            "/apis/events.k8s.io/v1/namespaces/default/events",
            r#"events.events.k8s.io is forbidden: User "ACCOUNT" cannot create resource "events" in API group "events.k8s.io" in the namespace "default""#,
        ),
        (
            "GET",
            "/metrics",
            r#"forbidden: User "ACCOUNT" cannot get path "/metrics""#,
        ),
    ];
    for (method, path, text) in cases {
        let refused = client.send(method, path, JSON, "{}").object();
        let text = text.replace("ACCOUNT", account);
        assert_eq!(
            message(&refused),
            (403, "Forbidden", text.as_str()),
            "{method} {path}"
        );
    }
    let one = Rule {
        resource_names: vec!["x1".into()],
        ..Rule::core("nodes", &["get"])
    };
    server.set_rules(account, vec![one]);
    server.create_node("x2", "10.244.2.0/24").unwrap();
    assert_eq!(client.get("/api/v1/nodes/x1").0, 200);
    assert_eq!(client.get("/api/v1/nodes/x2").0, 403);
    assert_eq!(client.get("/api/v1/nodes").0, 403);
}

#[test]
fn a_manifests_role_is_understood() {
    let role = json!({"kind": "ClusterRole", "rules": [
        {"apiGroups": [""], "resources": ["nodes", "nodes/status"], "verbs": ["*"]},
    ]});
    let rules = Rule::of_role(&role).unwrap();
    let server = server();
    server.set_rules("system:serviceaccount:kube-flannel:flannel", rules);
    let client = Client::flannel(&server);
    assert_eq!(
        client
            .post("/api/v1/nodes", &json!({"metadata": {"name": "n"}}))
            .0,
        201
    );
    assert_eq!(client.get("/api/v1/pods").0, 403);
}

#[test]
fn tokens_and_certificates_say_who_it_is() {
    let server = server();
    let nobody = Client::new(&server, "");
    for public in ["/version", "/healthz", "/readyz"] {
        assert_eq!(nobody.send("GET", public, JSON, "").code, 200, "{public}");
    }
    let refused = nobody.get("/api/v1/nodes");
    assert_eq!(
        message(&refused).2,
        r#"nodes is forbidden: User "system:anonymous" cannot list resource "nodes" in API group "" at the cluster scope"#
    );
    let wrong = Client::new(&server, "wrong").get("/version");
    assert_eq!(message(&wrong), (401, "Unauthorized", "Unauthorized"));
    let client = Client::flannel(&server);
    assert_eq!(client.get("/api/v1/nodes").0, 200);
    assert_eq!(client.get("/api/v1").0, 200);
    let fresh = server.rotate_token("system:serviceaccount:kube-flannel:flannel");
    assert_eq!(client.get("/api/v1/nodes").0, 401);
    assert_eq!(Client::new(&server, &fresh).get("/api/v1/nodes").0, 200);
    assert!(server.kubeconfig().contains(&fresh));
}

#[test]
fn answers_fail_on_demand() {
    let server = server();
    let client = Client::flannel(&server);
    server.fail(Failure {
        retry_after: Some(3),
        times: Some(1),
        ..Failure::code(429)
    });
    let answer = client.send("GET", "/api/v1/nodes", JSON, "");
    assert!(
        answer.headers.contains("retry-after: 3"),
        "{}",
        answer.headers
    );
    assert_eq!(
        (answer.code, answer.text().as_str()),
        (429, "Too many requests, please try again later.\n")
    );
    server.fail(Failure {
        verb: Some(Verb::List),
        ..Failure::code(500)
    });
    let refused = client.get("/api/v1/nodes");
    assert_eq!(message(&refused).1, "InternalError");
    assert_eq!(client.get("/version").0, 200);
    server.stop_failing();
    assert_eq!(client.get("/api/v1/nodes").0, 200);
    let start = Instant::now();
    server.delay(Duration::from_millis(300));
    assert_eq!(client.get("/api/v1/nodes").0, 200);
    assert!(start.elapsed() >= Duration::from_millis(300));
    let last = server.asked().pop().unwrap();
    assert_eq!(
        (last.verb, last.path.as_str(), last.status),
        (Some(Verb::List), "/api/v1/nodes", 200)
    );
}

#[test]
fn a_server_that_hangs_answers_afterwards_and_one_that_is_down_refuses() {
    let server = server();
    let client = Client::flannel(&server);
    server.hang(true);
    let waiting = std::thread::scope(|scope| {
        let asking = scope.spawn(|| client.get("/api/v1/nodes").0);
        std::thread::sleep(Duration::from_millis(300));
        assert!(!asking.is_finished());
        server.hang(false);
        asking.join().unwrap()
    });
    assert_eq!(waiting, 200);

    let path = format!(
        "/api/v1/nodes?watch=1&resourceVersion={}",
        server.revision()
    );
    let mut watch = client.send("GET", &path, JSON, "");
    server.create_node("a", "10.244.1.0/24").unwrap();
    assert!(watch.event().is_some());
    server.stop().unwrap();
    assert!(watch.try_event().is_err(), "the connection is cut");
    let refused = client.try_send("GET", "/version", JSON, "").err().unwrap();
    assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
    server.resume().unwrap();
    assert_eq!(
        client.get("/api/v1/nodes/a").0,
        200,
        "the objects have stayed"
    );
    server.restart().unwrap();
    assert_eq!(client.get("/api/v1/nodes/a").0, 200);
}

#[test]
fn a_certificate_can_expire_and_the_authority_can_change() {
    let server = server();
    let client = Client::flannel(&server);
    let fails = |client: &Client| {
        let error = client.try_send("GET", "/version", JSON, "").err();
        error.map(|error| error.to_string()).unwrap_or_default()
    };
    server.expire_certificate(true).unwrap();
    assert!(fails(&client).contains("expired"), "{}", fails(&client));
    server.expire_certificate(false).unwrap();
    assert_eq!(fails(&client), "");
    server.change_authority().unwrap();
    let error = fails(&client);
    assert!(
        error.contains("UnknownIssuer") || error.contains("BadSignature"),
        "{error}"
    );
    assert_eq!(Client::flannel(&server).get("/version").0, 200);
}
