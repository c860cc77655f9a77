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
