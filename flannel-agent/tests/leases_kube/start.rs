//! Taking what the cluster has assigned.

use std::fs;

use flannel_agent::leases::{KubeOptions, Store};
use flannel_core::acquire::Identity;
use flannel_testkit::apiserver::Kind;
use serde_json::json;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::{
    lease_rig::{Agent, Log, PATIENCE, attrs, key},
    rig::{CONF, Cluster, offer, store, until, with_conf},
};

#[tokio::test]
async fn annotations_are_upstreams_byte_for_byte() {
    let cluster = Cluster::new(&[1]);
    let agent = cluster.agent(1).await;
    assert_eq!(agent.held.lease.key, key("10.5.1.0-24"));
    let patches = cluster.asked("PATCH", "/api/v1/nodes/n1/status");
    assert_eq!(patches.len(), 1);
    assert_eq!(
        patches[0].content_type,
        "application/strategic-merge-patch+json"
    );
    assert_eq!(
        patches[0].body,
        r#"{"metadata":{"annotations":{"flannel.alpha.coreos.com/backend-data":"{\"VNI\":1,\"VtepMAC\":\"0a:00:00:00:00:01\"}","flannel.alpha.coreos.com/backend-type":"vxlan","flannel.alpha.coreos.com/kube-subnet-manager":"true","flannel.alpha.coreos.com/public-ip":"192.168.77.1"}}}"#
    );
    agent.stop().await;
    // Nothing differs at the next start, and nothing is taken away at the end.
    cluster.api.forget_asked();
    let agent = cluster.agent(1).await;
    assert!(cluster.asked("PATCH", "").is_empty());
    agent.stop().await;
    assert_eq!(
        cluster.get("n1", "kube-subnet-manager").as_deref(),
        Some("true")
    );
    // Only what differs is sent.
    cluster.set("n1", "public-ip", Some("192.168.77.99"));
    let agent = cluster.agent(1).await;
    assert_eq!(
        cluster.asked("PATCH", "").last().expect("a patch").body,
        r#"{"metadata":{"annotations":{"flannel.alpha.coreos.com/public-ip":"192.168.77.1"}}}"#
    );
    agent.stop().await;
}

#[tokio::test]
async fn the_prefix_of_annotations_is_the_administrators() {
    let cluster = Cluster::new(&[1]);
    let options = KubeOptions {
        annotation_prefix: "example.com/net".into(),
        ..cluster.options(1)
    };
    let agent = Agent::start(&store(options), offer(1)).await;
    let annotations = cluster.api.annotations("n1");
    assert_eq!(annotations["example.com/net-public-ip"], "192.168.77.1");
    assert!(!annotations.keys().any(|key| key.starts_with("flannel")));
    agent.stop().await;
}

#[tokio::test]
async fn a_node_without_annotations_and_rights_to_get_it_is_a_node() {
    let cluster = Cluster::new(&[1]);
    cluster
        .api
        .edit_node("n1", |node| node["metadata"]["annotations"] = json!(null))
        .expect("edit");
    // As manifests up to 0.20.1 had it.
    let rules = [
        ("nodes", &["list", "watch"][..]),
        ("nodes/status", &["patch"]),
    ];
    let rules =
        rules.map(|(resource, verbs)| flannel_testkit::apiserver::Rule::core(resource, verbs));
    cluster.api.set_rules(
        &flannel_testkit::apiserver::service_account(),
        rules.to_vec(),
    );
    let agent = cluster.agent(1).await;
    assert_eq!(
        cluster.get("n1", "public-ip").as_deref(),
        Some("192.168.77.1")
    );
    agent.stop().await;
    let opened = Store::open(&cluster.config(1)).await.expect("open");
    let stored = opened
        .own_stored(&Identity::default())
        .await
        .expect("an answer");
    assert_eq!(stored.expect("a lease").attrs, attrs(1));
}

#[tokio::test]
async fn a_missing_pod_cidr_is_waited_for() {
    let log = Log::capture();
    let cluster = Cluster::new(&[]);
    cluster.allow_events();
    cluster
        .api
        .create(Kind::Node, flannel_testkit::apiserver::node("n4", &[]))
        .expect("a node");
    let opened = Store::open(&cluster.config(4)).await.expect("open");
    let cancel = CancellationToken::new();
    let told = std::sync::Mutex::new(Vec::new());
    let offered = offer(4);
    let waiting = opened.acquire_telling(&offered, &cancel, |text| {
        told.lock().expect("told").push(text.to_owned());
    });
    let given = async {
        log.until(&[
            "WARN",
            r#"failed to acquire lease: node "n4" pod cidr not assigned"#,
            "--pod-network-cidr",
        ])
        .await;
        until("an Event", || cluster.event("NoPodCIDR").is_some()).await;
        cluster
            .api
            .edit_node("n4", |node| {
                node["spec"] = json!({"podCIDR": "10.5.4.0/24", "podCIDRs": ["10.5.4.0/24"]})
            })
            .expect("edit");
    };
    let (held, ()) = timeout(PATIENCE, async { tokio::join!(waiting, given) })
        .await
        .expect("in time");
    let held = held.expect("not cancelled").expect("a lease");
    assert_eq!(held.lease.key, key("10.5.4.0-24"));
    assert_eq!(
        told.lock().expect("told")[0],
        r#"node "n4" pod cidr not assigned"#
    );
    let event = cluster.event("NoPodCIDR").expect("the Event");
    let node = cluster.api.node("n4").expect("the node");
    assert_eq!(event["involvedObject"]["uid"], node["metadata"]["uid"]);
    assert_eq!(event["reportingComponent"], "flannel-agent");
    assert_eq!(log.lines(&["Lease acquired: 10.5.4.0/24"]).len(), 1);
}

/// Waits for a lease that must not come; returns what was told.
async fn refused(cluster: &Cluster, conf: &str, reason: &str) -> String {
    let opened = Store::open(&cluster.config(1)).await.expect("open");
    let offered = with_conf(1, conf);
    let cancel = CancellationToken::new();
    let told = std::sync::Mutex::new(String::new());
    let tell = |text: &str| text.clone_into(&mut told.lock().expect("told"));
    let until = until("an Event", || cluster.event(reason).is_some());
    tokio::select! {
        held = opened.acquire_telling(&offered, &cancel, tell) => panic!("{held:?}"),
        () = until => {}
    }
    assert_eq!(cluster.get("n1", "kube-subnet-manager"), None);
    told.into_inner().expect("told")
}

#[tokio::test]
async fn nothing_is_published_under_a_pod_cidr_outside_the_network() {
    let cluster = Cluster::new(&[1]);
    cluster.allow_events();
    let conf = CONF.replace("10.5.", "10.244.");
    assert_eq!(
        refused(&cluster, &conf, "PodCIDROutsideNetwork").await,
        r#"subnet "10.244.0.0/16" specified in the flannel net config doesn't contain "10.5.1.0/24" PodCIDR of the "n1" node"#
    );
}

#[tokio::test]
async fn a_missing_family_is_named_and_waited_for() {
    let cluster = Cluster::new(&[1]);
    cluster.allow_events();
    let conf = r#"{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd00::/48","Backend":{"Type":"vxlan"}}"#;
    let told = refused(&cluster, conf, "PodCIDRFamilyMissing").await;
    assert!(
        told.starts_with("missing IPv6 address on n.Spec.PodCIDRs"),
        "{told}"
    );
}

#[tokio::test]
async fn the_nodes_name_is_found_by_the_pod() {
    let log = Log::capture();
    let cluster = Cluster::new(&[1]);
    let options = KubeOptions {
        node_name: None,
        pod_name: Some("kube-flannel-ds-x".into()),
        pod_namespace: Some("kube-flannel".into()),
        ..cluster.options(1)
    };
    let config = store(options);
    let offered = offer(1);
    let starting = Agent::start(&config, offered);
    let appearing = async {
        until("the pod was asked for", || {
            !cluster.asked("GET", "/pods/kube-flannel-ds-x").is_empty()
        })
        .await;
        let pod = json!({
            "metadata": {"name": "kube-flannel-ds-x", "namespace": "kube-flannel"},
            "spec": {"nodeName": "n1", "containers": [{"name": "a", "image": "b"}]},
        });
        cluster.api.create(Kind::Pod, pod).expect("a pod");
    };
    let (agent, ()) = tokio::join!(starting, appearing);
    assert_eq!(agent.held.lease.key, key("10.5.1.0-24"));
    assert!(
        !log.text().contains(&cluster.api.token()),
        "the token is in the log"
    );
    agent.stop().await;
}

#[tokio::test]
async fn the_url_overrides_the_kubeconfigs() {
    let cluster = Cluster::new(&[1]);
    let path = cluster.dir.path().join("kubeconfig");
    let text = cluster
        .api
        .kubeconfig()
        .replace(&cluster.api.url(), "https://127.0.0.1:1");
    fs::write(path, text).expect("kubeconfig");
    let options = KubeOptions {
        api_url: Some(cluster.api.url()),
        ..cluster.options(1)
    };
    let agent = Agent::start(&store(options), offer(1)).await;
    assert_eq!(agent.held.lease.key, key("10.5.1.0-24"));
    agent.stop().await;
}

#[tokio::test]
async fn wrong_options_are_refused_in_upstreams_words() {
    let cluster = Cluster::new(&[]);
    let good = cluster.options(1);
    let cases = [
        (
            KubeOptions {
                annotation_prefix: "org".into(),
                ..good.clone()
            },
            "Failed to create SubnetManager: error creating network manager: subnet/kube: prefix must be in a format: fqdn/[0-9a-z-_]*",
        ),
        (
            KubeOptions {
                event_queue_depth: Some("x".into()),
                ..good.clone()
            },
            "env EVENT_QUEUE_DEPTH=x format error: strconv.Atoi: parsing \"x\": invalid syntax",
        ),
        (
            KubeOptions {
                node_name: None,
                ..good.clone()
            },
            "env variables POD_NAME and POD_NAMESPACE must be set",
        ),
        (
            KubeOptions {
                kubeconfig: None,
                ..good.clone()
            },
            "Failed to create SubnetManager: fail to create kubernetes config: invalid configuration: no configuration has been provided, try setting KUBERNETES_MASTER environment variable",
        ),
        (
            KubeOptions {
                kubeconfig: Some("/nowhere/kubeconfig".into()),
                ..good
            },
            "fail to create kubernetes config: --kubeconfig-file=/nowhere/kubeconfig: failed to read kubeconfig",
        ),
    ];
    for (options, words) in cases {
        let error = Store::open(&store(options)).await.expect_err(words);
        assert!(error.chain().contains(words), "{}", error.chain());
        assert_eq!(error.kind(), flannel_agent::leases::ErrorKind::Config);
    }
}

#[tokio::test]
async fn the_network_configuration_is_a_file_that_kubernetes_swaps() {
    let cluster = Cluster::new(&[]);
    let dir = cluster.dir.path();
    let config = cluster.config(1);
    fs::remove_file(dir.join("net-conf.json")).expect("remove");
    let opened = Store::open(&config).await.expect("open");
    let error = opened.net_conf().await.expect_err("no file").chain();
    assert!(
        error.starts_with("failed to read net conf: open "),
        "{error}"
    );
    for (version, text) in [("..1", "one"), ("..2", "two")] {
        fs::create_dir(dir.join(version)).expect("version");
        fs::write(dir.join(version).join("net-conf.json"), text).expect("write");
    }
    std::os::unix::fs::symlink("..1", dir.join("..data")).expect("link");
    std::os::unix::fs::symlink("..data/net-conf.json", dir.join("net-conf.json")).expect("link");
    assert_eq!(opened.net_conf().await.expect("text"), "one");
    let swap = async {
        std::os::unix::fs::symlink("..2", dir.join("..data_tmp")).expect("link");
        fs::rename(dir.join("..data_tmp"), dir.join("..data")).expect("swap");
    };
    let (text, ()) = timeout(PATIENCE, async {
        tokio::join!(opened.net_conf_after("one"), swap)
    })
    .await
    .expect("in time");
    assert_eq!(text, "two");
}
