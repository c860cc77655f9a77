//! deploy/: every document is what the API's types say, takes upstream's place by name, and names flags, variables and images that
//! exist.

#[path = "manifests/docs.rs"]
mod docs;
mod manifest_rig;
#[path = "manifests/overlays.rs"]
mod overlays;

use std::collections::BTreeSet;

use flannel_agent::cli::Command;
use manifest_rig::{
    Objects, UPSTREAM, agent, arguments, compare, container, daemonset, documents, image, list,
    lost, object, objects, parse, read, strings, text_of,
};
use serde_json::{Value, json};

const OURS: &str = "deploy/kube-flannel.yml";

fn ours() -> Objects {
    objects(&read(OURS))
}

/// Asserts of a map that it has everything that another one has.
#[track_caller]
fn assert_contains(have: &Value, wanted: &Value, what: &str) {
    for (key, value) in wanted.as_object().expect("a map") {
        assert_eq!(&have[key], value, "{what}: {key}");
    }
}

/// Asserts of a list of objects that all of another one's are in it, by a key.
#[track_caller]
fn assert_has_all(have: &Value, wanted: &Value, key: &str) {
    for one in list(wanted) {
        let same = list(have).iter().find(|other| other[key] == one[key]);
        assert_eq!(same, Some(one), "{key} {}", one[key]);
    }
}

#[test]
fn every_document_survives_the_apis_types() {
    assert_eq!(ours().len(), 6);
    assert_eq!(objects(UPSTREAM).len(), 6);
}

#[test]
fn a_misspelt_field_is_noticed() {
    for (right, wrong, at) in [
        ("hostNetwork: true", "hostnetwork: true", "hostnetwork"),
        ("mountPropagation:", "mountpropagation:", "mountpropagation"),
        ("periodSeconds: 2\n", "periodSeconds: two\n", "two"),
        ("maxUnavailable: 1", "maxunavailable: 1", "maxunavailable"),
    ] {
        let text = read(OURS);
        let changed = text.replacen(right, wrong, 1);
        assert_ne!(text, changed, "{right}");
        let found: Vec<String> = documents(&changed).iter().flat_map(lost).collect();
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].contains(at), "{found:?}");
    }
}

#[test]
fn it_takes_upstreams_place() {
    let (ours, upstream) = (ours(), objects(UPSTREAM));
    assert_eq!(
        ours.keys().collect::<Vec<_>>(),
        upstream.keys().collect::<Vec<_>>()
    );
    for (key, wanted) in &upstream {
        let have = &ours[key];
        for field in ["apiVersion", "kind"] {
            assert_eq!(have[field], wanted[field], "{key:?}");
        }
        assert_eq!(
            have["metadata"]["namespace"],
            wanted["metadata"]["namespace"]
        );
        assert_contains(
            &have["metadata"]["labels"],
            &wanted["metadata"]["labels"],
            &format!("labels of {key:?}"),
        );
    }
    let (have, wanted) = (daemonset(&ours), daemonset(&upstream));
    // Immutable: one word more, and the apply is refused.
    assert_eq!(have["spec"]["selector"], wanted["spec"]["selector"]);
    let template = |one: &Value| one["spec"]["template"].clone();
    assert_contains(
        &template(have)["metadata"]["labels"],
        &template(wanted)["metadata"]["labels"],
        "labels of the pods",
    );
    assert_contains(
        &template(have)["metadata"]["labels"],
        &have["spec"]["selector"]["matchLabels"],
        "the selector",
    );
    let (pod, wanted) = (&template(have)["spec"], &template(wanted)["spec"]);
    for field in ["hostNetwork", "priorityClassName", "serviceAccountName"] {
        assert_eq!(pod[field], wanted[field], "{field}");
    }
    assert_has_all(&pod["volumes"], &wanted["volumes"], "name");
    for name in ["install-cni-plugin", "install-cni", "kube-flannel"] {
        let (have, wanted) = (container(&ours, name), container(&upstream, name));
        assert_has_all(&have["volumeMounts"], &wanted["volumeMounts"], "mountPath");
        assert_eq!(have["resources"], wanted["resources"], "{name}");
    }
    let (have, wanted) = (agent(&ours), agent(&upstream));
    assert_eq!(have["command"], wanted["command"]);
    let had: BTreeSet<&str> = arguments(have).into_iter().collect();
    for word in arguments(wanted) {
        assert!(had.contains(word), "{word}");
    }
    for name in ["POD_NAME", "POD_NAMESPACE"] {
        let find = |one: &Value| {
            let mut all = list(&one["env"]).iter();
            all.find(|one| one["name"] == name).cloned()
        };
        assert_eq!(find(have), find(wanted), "{name}");
    }
}

#[test]
fn the_configuration_is_upstreams() {
    let (ours, upstream) = (ours(), objects(UPSTREAM));
    for name in ["cni-conf.json", "net-conf.json"] {
        let [have, wanted]: [Value; 2] = [&ours, &upstream].map(|objects| {
            let data = &object(objects, "ConfigMap", "kube-flannel-cfg")["data"];
            serde_json::from_str(data[name].as_str().expect("a text")).expect("JSON")
        });
        assert_eq!(have, wanted, "{name}");
    }
    let data = &object(&ours, "ConfigMap", "kube-flannel-cfg")["data"];
    let text = data["net-conf.json"].as_str().expect("a text");
    flannel_core::config::NetConf::parse(text).expect("a network configuration");
}

#[test]
fn rights_are_what_the_agent_needs_and_nothing_else() {
    let ours = ours();
    assert_eq!(
        object(&ours, "ClusterRole", "flannel")["rules"],
        json!([
            {"apiGroups": [""], "resources": ["pods"], "verbs": ["get"]},
            {"apiGroups": [""], "resources": ["nodes"], "verbs": ["get", "list", "watch"]},
            {"apiGroups": [""], "resources": ["nodes/status"], "verbs": ["patch"]},
            {"apiGroups": [""], "resources": ["events"], "verbs": ["create", "patch"]},
        ])
    );
    let binding = object(&ours, "ClusterRoleBinding", "flannel");
    let upstream = objects(UPSTREAM);
    let wanted = object(&upstream, "ClusterRoleBinding", "flannel");
    for field in ["roleRef", "subjects"] {
        assert_eq!(binding[field], wanted[field], "{field}");
    }
}

#[test]
fn the_agents_container_is_fit_for_ebpf_and_for_the_kubelet() {
    let ours = ours();
    let agent = agent(&ours);
    assert_eq!(agent["securityContext"], json!({"privileged": true}));
    let mount = |path: &str| {
        let mut all = list(&agent["volumeMounts"]).iter();
        all.find(|one| one["mountPath"] == path)
            .unwrap_or_else(|| panic!("no mount at {path}"))
    };
    // What is pinned must outlive the container, and a bpffs that the agent mounts must be the node's.
    assert_eq!(mount("/sys/fs/bpf")["mountPropagation"], "Bidirectional");
    for path in ["/var/lib/cni", "/lib/modules"] {
        assert_eq!(mount(path)["readOnly"], true, "{path}");
    }
    let args = parse(agent);
    assert!(args.kube.kube_subnet_mgr && args.firewall.ip_masq);
    // The kubelet asks where the agent listens, and only this node can ask.
    let serves = args.serving.healthz().expect("it serves health");
    assert!(serves.ip().is_loopback());
    for (probe, path) in [
        ("startupProbe", "/healthz"),
        ("livenessProbe", "/healthz"),
        ("readinessProbe", "/readyz"),
    ] {
        assert_eq!(
            agent[probe]["httpGet"],
            json!({"host": serves.ip().to_string(), "port": serves.port(), "path": path}),
            "{probe}"
        );
    }
    // The paths that it reads and writes unless it is told otherwise are mounted.
    for path in [
        args.subnet_file.parent().expect("a directory"),
        args.net_config_path.parent().expect("a directory"),
        &args.cni_cache_dir,
    ] {
        let is = |one: &Value| {
            text_of(one, "/mountPath").trim_end_matches('/') == path.to_str().expect("text")
        };
        let mounts = list(&agent["volumeMounts"]);
        assert!(mounts.iter().any(is), "{}", path.display());
    }
}

#[test]
fn files_are_put_in_place_in_one_step() {
    let ours = ours();
    for (name, from, to) in [
        ("install-cni-plugin", "/flannel", "/opt/cni/bin/flannel"),
        (
            "install-cni",
            "/etc/kube-flannel/cni-conf.json",
            "/etc/cni/net.d/10-flannel.conflist",
        ),
    ] {
        let container = container(&ours, name);
        assert_eq!(strings(&container["command"]), ["/opt/bin/install-conf"]);
        assert_eq!(strings(&container["args"]), [from, to]);
    }
}

#[test]
fn nodes_of_all_kinds_get_a_pod_and_two_architectures_an_image() {
    let ours = ours();
    let pod = &daemonset(&ours)["spec"]["template"]["spec"];
    assert_eq!(
        pod["tolerations"],
        json!([
            {"operator": "Exists", "effect": "NoSchedule"},
            {"operator": "Exists", "effect": "NoExecute"},
        ])
    );
    let terms = pod.pointer(
        "/affinity/nodeAffinity/requiredDuringSchedulingIgnoredDuringExecution/nodeSelectorTerms",
    );
    assert_eq!(
        terms,
        Some(&json!([{"matchExpressions": [
            {"key": "kubernetes.io/os", "operator": "In", "values": ["linux"]},
            {"key": "kubernetes.io/arch", "operator": "In", "values": ["amd64", "arm64"]},
        ]}]))
    );
}

#[test]
fn volumes_and_mounts_fit_together() {
    let ours = ours();
    let pod = &daemonset(&ours)["spec"]["template"]["spec"];
    let names = |value: &Value| -> BTreeSet<String> {
        let all = list(value).iter();
        all.map(|one| text_of(one, "/name").to_owned()).collect()
    };
    let mut mounted = BTreeSet::new();
    for kind in ["initContainers", "containers"] {
        for container in list(&pod[kind]) {
            mounted.extend(names(&container["volumeMounts"]));
        }
    }
    assert_eq!(mounted, names(&pod["volumes"]));
}

#[test]
fn there_is_one_image() {
    let ours = ours();
    for name in ["install-cni-plugin", "install-cni", "kube-flannel"] {
        assert_eq!(container(&ours, name)["image"], image(), "{name}");
    }
    let version = image().rsplit(':').next().map(str::to_owned);
    for labels in [
        &daemonset(&ours)["metadata"]["labels"],
        &daemonset(&ours)["spec"]["template"]["metadata"]["labels"],
    ] {
        assert_eq!(
            labels["app.kubernetes.io/version"].as_str(),
            version.as_deref()
        );
    }
}

#[test]
fn cleaning_up_is_a_command_of_the_agents_with_the_same_places() {
    let cleanup = objects(&read("deploy/cleanup.yml"));
    let set = object(&cleanup, "DaemonSet", "flannel-ebpf-cleanup");
    assert_eq!(set["metadata"]["namespace"], "kube-flannel");
    let pod = &set["spec"]["template"]["spec"];
    assert_contains(
        &set["spec"]["template"]["metadata"]["labels"],
        &set["spec"]["selector"]["matchLabels"],
        "the selector",
    );
    let ours = ours();
    // Neither DaemonSet takes the other's pods.
    assert_eq!(
        set["spec"]["template"]["metadata"]["labels"]["app"],
        Value::Null
    );
    let theirs = &daemonset(&ours)["spec"]["template"];
    assert_ne!(
        theirs["metadata"]["labels"]["app.kubernetes.io/component"],
        set["spec"]["selector"]["matchLabels"]["app.kubernetes.io/component"]
    );
    for field in ["affinity", "tolerations", "hostNetwork"] {
        assert_eq!(pod[field], theirs["spec"][field], "{field}");
    }
    assert_has_all(&theirs["spec"]["volumes"], &pod["volumes"], "name");
    let container = &pod["initContainers"][0];
    for one in [container, &pod["containers"][0]] {
        assert_eq!(one["image"], image());
    }
    let args = parse(container);
    assert!(
        matches!(
            args.command,
            Some(Command::Cleanup {
                keep_device: true,
                force: false,
                dry_run: false,
                vni: None
            })
        ),
        "{:?}",
        args.command
    );
}

#[test]
fn differences_are_found_and_named() {
    let mut found = Vec::new();
    let (left, right) = (
        json!({"a": [1, {"b": 2}]}),
        json!({"a": [1, {"b": 3}], "c": 4}),
    );
    compare("", &left, &right, &mut found);
    assert_eq!(found, ["/a/1/b: 2 is not 3", "/c: null is not 4"]);
}
