//! `kubectl` as a third opinion of the lab's API server, and the way to a real cluster, with that server in its place.

use flannel_testkit::apiserver::{ApiServer, Kind};
use flannel_testkit::cluster::Cluster;
use flannel_testkit::{Lab, LabOptions, Subnet, privileged, process};
use serde_json::Value;
use std::net::Ipv4Addr;
use std::process::Command;
use std::time::Duration;

fn kubectl(config: &str, words: &[&str]) -> process::Finished {
    let mut command = Command::new("kubectl");
    command.args([&format!("--kubeconfig={config}"), "--cache-dir=/dev/null"]);
    process::finish(command.args(words), Duration::from_secs(30)).unwrap()
}

#[test]
fn kubectl_takes_the_server_for_a_real_one() {
    let server = ApiServer::start(None, Ipv4Addr::LOCALHOST).unwrap();
    server.create_node("a", "10.244.1.0/24").unwrap();
    server.create_full_size_nodes(0..700);
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("config").display().to_string();
    std::fs::write(&config, server.admin_kubeconfig()).unwrap();
    let run = |words: &[&str]| {
        let done = kubectl(&config, words);
        assert!(done.status.success(), "{words:?}: {done:?}");
        done.stdout
    };
    assert!(run(&["version", "-o", "json"]).contains("v1.33.0"));
    // In pages of 500.
    let list = run(&["get", "nodes", "-o", "name"]);
    assert_eq!(list.lines().count(), 701);
    assert!(run(&["get", "nodes"]).contains("full-00699"));
    assert_eq!(
        run(&["get", "no", "a", "-o", "jsonpath={.spec.podCIDR}"]),
        "10.244.1.0/24"
    );
    run(&["annotate", "node", "a", "x=1", "y=2"]);
    run(&["annotate", "node", "a", "x-", "y=3", "--overwrite"]);
    let annotations = server.annotations("a");
    assert_eq!(annotations.get("y").map(String::as_str), Some("3"));
    assert!(!annotations.contains_key("x"));
    run(&["cordon", "a"]);
    assert_eq!(server.node("a").unwrap()["spec"]["unschedulable"], true);
    run(&["label", "node", "a", "zone=1"]);
    assert_eq!(
        run(&["get", "nodes", "-l", "zone=1", "-o", "name"]),
        "node/a\n"
    );
    run(&["delete", "node", "a"]);
    assert!(server.node("a").is_none());
    let missing = kubectl(&config, &["get", "node", "a"]);
    assert_eq!(
        missing.stderr.trim(),
        r#"Error from server (NotFound): nodes "a" not found"#
    );

    std::fs::write(&config, server.kubeconfig()).unwrap();
    let refused = kubectl(&config, &["delete", "node", "full-00001"]);
    assert_eq!(
        refused.stderr.trim(),
        r#"Error from server (Forbidden): nodes "full-00001" is forbidden: User "system:serviceaccount:kube-flannel:flannel" cannot delete resource "nodes" in API group "" at the cluster scope"#
    );
    // With a certificate instead of a token.
    let admin = flannel_testkit::apiserver::User::admin();
    let text = server.kubeconfig_with_certificate(&admin).unwrap();
    std::fs::write(&config, text).unwrap();
    run(&["delete", "node", "full-00001"]);
    assert_eq!(server.all(Kind::Node).len(), 699);
    server.rotate_token(&admin.name);
    run(&["get", "node", "full-00002"]);
}

#[test]
fn a_real_cluster_is_driven_with_kubectl_and_reached_through_the_relay() {
    if !privileged() {
        return;
    }
    let server = ApiServer::start(None, Ipv4Addr::LOCALHOST).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("config");
    std::fs::write(&config, server.admin_kubeconfig()).unwrap();
    let options = LabOptions {
        nodes: 1,
        network: Subnet::new(Ipv4Addr::new(10, 244, 0, 0), 16),
        ..LabOptions::default()
    };
    let lab = Lab::new(options).unwrap();
    let cluster = Cluster::real(lab.underlay(), Lab::GATEWAY, &config).unwrap();
    cluster.create_node("x", "10.244.1.0/24").unwrap();
    let node = cluster.node("x").unwrap().unwrap();
    assert_eq!(node["spec"]["podCIDRs"][0], "10.244.1.0/24");
    assert_eq!(node["status"]["conditions"][0]["reason"], "NoRouteCreated");
    cluster
        .annotate("x", &[("a", Some("1")), ("b", Some("2"))])
        .unwrap();
    cluster.annotate("x", &[("a", None)]).unwrap();
    assert_eq!(
        cluster.annotations("x").unwrap().get("b"),
        Some(&"2".to_owned())
    );
    assert!(!cluster.annotations("x").unwrap().contains_key("a"));
    assert!(cluster.events_about("x").unwrap().is_empty());

    // From a node, over the relay, with the name that the certificate has.
    let inside = dir.path().join("inside");
    std::fs::write(&inside, cluster.kubeconfig()).unwrap();
    let text: Value = serde_json::from_str(&cluster.kubeconfig()).unwrap();
    let url = text["clusters"][0]["cluster"]["server"].as_str().unwrap();
    assert!(url.starts_with("https://192.168.77.1:"), "{url}");
    let mut command = lab.node(0).ns.command("kubectl");
    command.args(["--cache-dir=/dev/null", "get", "nodes", "-o", "name"]);
    command.arg(format!("--kubeconfig={}", inside.display()));
    assert_eq!(
        process::succeed(&mut command, Duration::from_secs(30)).unwrap(),
        "node/x\n"
    );

    cluster.create_node("y", "10.244.2.0/24").unwrap();
    cluster.delete_node("x").unwrap();
    assert!(cluster.node("x").unwrap().is_none());
    assert_eq!(server.all(Kind::Node).len(), 1);
    drop(cluster);
    assert_eq!(
        server.all(Kind::Node).len(),
        0,
        "what a test makes goes with it"
    );
}
