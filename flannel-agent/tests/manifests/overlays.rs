//! deploy/kustomize, as kubectl renders it.

use serde_json::{Value, json};

use crate::manifest_rig::{
    Objects, UPSTREAM, agent, container, daemonset, image, kustomizations, kustomize, list, object,
    objects, parse, read, strings, variables,
};

fn rendered(name: &str) -> Objects {
    objects(&kustomize(name))
}

#[test]
fn the_base_is_the_manifest() {
    let (base, manifest) = (
        read("deploy/kustomize/base/kube-flannel.yml"),
        read("deploy/kube-flannel.yml"),
    );
    assert!(
        base == manifest,
        "copy deploy/kube-flannel.yml over the base's"
    );
    assert_eq!(rendered("base"), objects(&manifest));
}

#[test]
fn every_directory_renders_and_its_flags_exist() {
    let names = kustomizations();
    assert_eq!(
        names,
        [
            "base",
            "capabilities",
            "etcd",
            "metrics",
            "on-delete",
            "raspberry-pi",
            "selector-app"
        ]
    );
    for name in names {
        let objects = rendered(&name);
        for container_name in ["install-cni-plugin", "install-cni", "kube-flannel"] {
            let container = container(&objects, container_name);
            assert_eq!(container["image"], image(), "{name}");
        }
        let args = parse(agent(&objects));
        let serves = args.serving.healthz().expect("it serves health");
        assert!(serves.ip().is_loopback(), "{name}");
        let known = variables();
        for variable in list(&agent(&objects)["env"]) {
            let variable = variable["name"].as_str().expect("a name");
            assert!(
                ["NODE_NAME", "POD_NAME", "POD_NAMESPACE", "HOST_IP"].contains(&variable)
                    || known.contains(variable),
                "{name}: {variable}"
            );
        }
    }
}

#[test]
fn capabilities_instead_of_privileges() {
    let objects = rendered("capabilities");
    assert_eq!(
        agent(&objects)["securityContext"],
        json!({
            "privileged": false,
            "allowPrivilegeEscalation": false,
            "capabilities": {"drop": ["ALL"], "add": ["NET_ADMIN", "NET_RAW", "BPF", "PERFMON"]},
            "appArmorProfile": {"type": "Unconfined"},
        })
    );
    // The API refuses Bidirectional without privileges.
    let mounts = list(&agent(&objects)["volumeMounts"]);
    let propagations: Vec<&Value> = mounts
        .iter()
        .map(|mount| &mount["mountPropagation"])
        .filter(|how| !how.is_null())
        .collect();
    assert_eq!(propagations, ["HostToContainer"]);
    assert_eq!(
        mounts.len(),
        list(&agent(&rendered("base"))["volumeMounts"]).len()
    );
}

#[test]
fn with_etcd_nothing_is_asked_of_the_kubernetes_api() {
    let objects = rendered("etcd");
    let role = object(&objects, "ClusterRole", "flannel");
    assert_eq!(list(&role["rules"]), [] as [Value; 0]);
    let pod = &daemonset(&objects)["spec"]["template"]["spec"];
    assert_eq!(pod["automountServiceAccountToken"], false);
    let args = parse(agent(&objects));
    assert!(!args.kube.kube_subnet_mgr);
    let options = args.etcd.options();
    for file in [&options.cafile, &options.certfile, &options.keyfile] {
        let file = file.as_deref().expect("a file");
        assert!(file.starts_with("/etc/flannel/etcd"), "{}", file.display());
    }
    let volume = list(&pod["volumes"])
        .iter()
        .find(|volume| volume["name"] == "etcd-tls");
    assert_eq!(
        volume.expect("the volume")["secret"],
        json!({"secretName": "flannel-etcd-tls", "defaultMode": 0o400})
    );
    let endpoints = list(&agent(&objects)["env"])
        .iter()
        .find(|one| one["name"] == "FLANNELD_ETCD_ENDPOINTS");
    let endpoints = endpoints.expect("endpoints")["value"].as_str();
    for endpoint in endpoints.expect("a value").split(',') {
        assert!(endpoint.starts_with("https://192.0.2."), "{endpoint}");
    }
}

#[test]
fn metrics_are_where_they_are_looked_for() {
    let objects = rendered("metrics");
    let template = &daemonset(&objects)["spec"]["template"];
    let port = &agent(&objects)["ports"][0]["containerPort"];
    let annotations = &template["metadata"]["annotations"];
    assert_eq!(annotations["prometheus.io/port"], port.to_string());
    let mut env = list(&agent(&objects)["env"]).iter();
    let address = env.find(|one| one["name"] == "FLANNELD_METRICS_ADDR");
    let address = address.expect("an address");
    assert_eq!(address["value"], format!("$(HOST_IP):{port}"));
    let dashboard = object(&objects, "ConfigMap", "flannel-dashboard");
    assert_eq!(dashboard["metadata"]["labels"]["grafana_dashboard"], "1");
}

#[test]
fn a_raspberry_pi_remembers_fewer_flows() {
    let objects = rendered("raspberry-pi");
    let args = parse(agent(&objects));
    assert!(args.kube.kube_subnet_mgr && args.firewall.ip_masq);
    assert_eq!(args.bpf_flow_entries, 32_768);
    assert_eq!(
        agent(&objects)["resources"],
        json!({"requests": {"cpu": "50m", "memory": "50Mi"}})
    );
}

#[test]
fn nodes_change_when_somebody_says_so() {
    let objects = rendered("on-delete");
    let strategy = &daemonset(&objects)["spec"]["updateStrategy"];
    assert_eq!(strategy, &json!({"type": "OnDelete"}));
    // The pods are the same, so that going back to rolling updates restarts none.
    let base = rendered("base");
    let template = |objects| daemonset(objects)["spec"]["template"].clone();
    assert_eq!(template(&objects), template(&base));
}

#[test]
fn both_of_upstreams_selectors_are_served() {
    let upstream = objects(UPSTREAM);
    let released = &daemonset(&upstream)["spec"]["selector"];
    assert_eq!(&daemonset(&rendered("base"))["spec"]["selector"], released);
    let other = rendered("selector-app");
    let tree = json!({"matchLabels": {"app": "flannel"}});
    assert_eq!(daemonset(&other)["spec"]["selector"], tree);
    // Only that.
    let mut same = daemonset(&other).clone();
    same["spec"]["selector"] = released.clone();
    assert_eq!(&same, daemonset(&rendered("base")));
    let labels = &daemonset(&other)["spec"]["template"]["metadata"]["labels"];
    assert_eq!(labels["app"], "flannel");
    assert_eq!(
        strings(&object(&other, "ClusterRole", "flannel")["rules"][0]["verbs"]),
        ["get"]
    );
}
