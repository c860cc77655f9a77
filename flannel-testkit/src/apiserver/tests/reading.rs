//! Get, list and watch.

use super::*;

fn names(list: &Value) -> Vec<&str> {
    let items = list["items"].as_array().unwrap();
    items
        .iter()
        .map(|item| item["metadata"]["name"].as_str().unwrap())
        .collect()
}

#[test]
fn lists_come_in_pages_of_one_version() {
    let server = server();
    for name in ["a", "b", "c", "d", "e"] {
        server.create_node(name, "10.244.1.0/24").unwrap();
    }
    let client = Client::flannel(&server);
    let (code, first) = client.get("/api/v1/nodes?limit=2");
    assert_eq!((code, &first["kind"]), (200, &json!("NodeList")));
    assert_eq!(names(&first), ["a", "b"]);
    assert_eq!(first["metadata"]["remainingItemCount"], 3);
    assert!(first["items"][0].get("kind").is_none(), "as in real lists");
    let version = server.revision().to_string();
    assert_eq!(first["metadata"]["resourceVersion"], version);
    // What happens between two pages is not in the later one.
    server.delete_node("c").unwrap();
    server.create_node("d2", "10.244.9.0/24").unwrap();
    let more = |first: &Value| {
        let token = first["metadata"]["continue"].as_str().unwrap();
        client.get(&format!("/api/v1/nodes?limit=2&continue={token}"))
    };
    let (_, second) = more(&first);
    assert_eq!(names(&second), ["c", "d"]);
    assert_eq!(second["metadata"]["resourceVersion"], version);
    // After a compaction the token is refused, and the one in the refusal leads on in the present.
    server.compact();
    let gone = more(&second);
    let (code, reason, text) = message(&gone);
    assert_eq!((code, reason), (410, "Expired"));
    assert!(text.starts_with("The provided continue parameter is too old"));
    let (code, rest) = more(&gone.1);
    assert_eq!((code, names(&rest)), (200, vec!["d2", "e"]));
    assert!(rest["metadata"].get("continue").is_none());
    // From the cache everything comes at once, as for informers that list at version 0.
    let (_, all) = client.get("/api/v1/nodes?limit=2&resourceVersion=0");
    assert_eq!(names(&all), ["a", "b", "d", "d2", "e"]);
}

#[test]
fn versions_and_selectors_choose_what_a_list_shows() {
    let server = server();
    server.create_node("a", "10.244.1.0/24").unwrap();
    let before = server.revision();
    server.create_node("b", "10.244.2.0/24").unwrap();
    server.annotate("a", &[("x", Some("1"))]).unwrap();
    server.delete_node("b").unwrap();
    let now = server.revision();
    let client = Client::flannel(&server);
    let get = |query: &str| client.get(&format!("/api/v1/nodes?{query}"));

    let (_, past) = get(&format!(
        "resourceVersion={before}&resourceVersionMatch=Exact"
    ));
    assert_eq!(names(&past), ["a"]);
    assert_eq!(past["metadata"]["resourceVersion"], before.to_string());
    assert!(
        past["items"][0]["metadata"]["annotations"]
            .get("x")
            .is_none()
    );
    // With a limit and nothing else said, a version is exact, too.
    let (_, past) = get(&format!("resourceVersion={}&limit=5", before + 1));
    assert_eq!(names(&past), ["a", "b"]);
    let (_, newer) = get(&format!("resourceVersion={before}"));
    assert_eq!(newer["metadata"]["resourceVersion"], now.to_string());
    let future = get(&format!("resourceVersion={}", now + 7));
    let text = format!("Too large resource version: {}, current: {now}", now + 7);
    assert_eq!(message(&future), (504, "Timeout", text.as_str()));
    let causes = &future.1["details"]["causes"][0]["reason"];
    assert_eq!(causes, "ResourceVersionTooLarge");

    for (query, code) in [
        ("resourceVersionMatch=Exact", 422),
        ("resourceVersion=0&resourceVersionMatch=Exact", 422),
        ("resourceVersion=5&resourceVersionMatch=Perhaps", 422),
        ("resourceVersion=new", 422),
        ("continue=zz", 400),
        ("limit=many", 400),
        ("fieldSelector=spec.podCIDR%3D10.244.1.0/24", 400),
    ] {
        assert_eq!(get(query).0, code, "{query}");
    }
    server.compact();
    let gone = get(&format!(
        "resourceVersion={before}&resourceVersionMatch=Exact"
    ));
    assert_eq!((gone.0, &gone.1["reason"]), (410, &json!("Expired")));

    server.create_node("c", "10.244.3.0/24").unwrap();
    let label = |node: &mut Value| node["metadata"]["labels"] = json!({"zone": "1"});
    server.edit_node("c", label).unwrap();
    for (query, want) in [
        ("fieldSelector=metadata.name%3Dc", vec!["c"]),
        ("fieldSelector=metadata.name!%3Dc", vec!["a"]),
        ("fieldSelector=metadata.name%3D%3Dnobody", vec![]),
        ("labelSelector=zone%3D1", vec!["c"]),
        ("labelSelector=zone", vec!["c"]),
        ("labelSelector=!zone", vec!["a"]),
        ("labelSelector=zone!%3D1", vec!["a"]),
    ] {
        assert_eq!(names(&get(query).1), want, "{query}");
    }
    // A selection says nothing about how much is left.
    let (_, page) = get("labelSelector=!zone,!other&limit=1");
    assert!(page["metadata"].get("remainingItemCount").is_none());
}

#[test]
fn one_object_has_kind_uid_version_and_managers() {
    let server = server();
    let made = server.create_node("a", "10.244.1.0/24").unwrap();
    let (code, node) = Client::flannel(&server).get("/api/v1/nodes/a");
    assert_eq!(code, 200);
    assert_eq!(node["kind"], "Node");
    assert_eq!(node["apiVersion"], "v1");
    assert_eq!(node["spec"]["podCIDR"], "10.244.1.0/24");
    assert_eq!(node["spec"]["podCIDRs"], json!(["10.244.1.0/24"]));
    assert_eq!(node["metadata"]["uid"], made["metadata"]["uid"]);
    assert_eq!(node["metadata"]["uid"].as_str().unwrap().len(), 36);
    assert!(node["metadata"]["creationTimestamp"].is_string());
    let managed = &node["metadata"]["managedFields"][0];
    assert_eq!(managed["manager"], "kube-controller-manager");
    assert_eq!(managed["operation"], "Update");
    assert_eq!(managed["fieldsV1"]["f:spec"]["f:podCIDRs"], json!({}));
    let missing = Client::flannel(&server).get("/api/v1/nodes/b");
    assert_eq!(
        message(&missing),
        (404, "NotFound", r#"nodes "b" not found"#)
    );
    assert_eq!(missing.1["details"], json!({"name": "b", "kind": "nodes"}));
}

#[test]
fn five_thousand_nodes_are_listed_whole_and_in_pages() {
    let server = server();
    server.create_full_size_nodes(0..5000);
    let client = Client::flannel(&server);
    let all = client.send("GET", "/api/v1/nodes?limit=500&resourceVersion=0", JSON, "");
    let all = all.text();
    assert!(all.len() > 5000 * 13_000, "{}", all.len());
    let mut path = "/api/v1/nodes?limit=500".to_owned();
    let mut pages = Vec::new();
    loop {
        let text = client.send("GET", &path, JSON, "").text();
        // The head is enough: parsing all of it takes a debug build long.
        let (head, _) = text.split_once(r#","items":["#).unwrap();
        let head: Value = serde_json::from_str(&format!("{head}}}")).unwrap();
        pages.push(text.matches(r#""uid":"00000000-"#).count());
        let Some(token) = head["metadata"]["continue"].as_str() else {
            break;
        };
        path = format!("/api/v1/nodes?limit=500&continue={token}");
    }
    assert_eq!(pages, [500; 10]);
}
