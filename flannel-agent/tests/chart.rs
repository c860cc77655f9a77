//! deploy/chart: what Helm makes of it, for the values that people set.

mod manifest_rig;
#[path = "chart/render.rs"]
mod render;
#[path = "chart/schema.rs"]
mod schema;
#[path = "chart/syntax.rs"]
mod syntax;

use manifest_rig::{
    Objects, agent, arguments, compare, container, daemonset, documents, files, image, kustomize,
    list, object, objects, parse, read, strings,
};
use render::Renderer;
use serde_json::{Value, json};

const CHART: &str = "deploy/chart/flannel-ebpf";

fn yaml(name: &str) -> Value {
    let all = documents(&read(&format!("{CHART}/{name}")));
    assert_eq!(all.len(), 1, "{name}");
    all.into_iter().next().expect("a document")
}

/// As Helm lays given values over those of the chart: maps are merged.
fn merge(into: &mut Value, given: &Value) {
    match (into, given) {
        (Value::Object(into), Value::Object(given)) => {
            for (key, value) in given {
                merge(into.entry(key).or_insert(Value::Null), value);
            }
        }
        (into, given) => *into = given.clone(),
    }
}

fn values(given: &Value) -> Value {
    let mut values = yaml("values.yaml");
    merge(&mut values, given);
    values
}

fn extension(path: &str) -> &str {
    path.rsplit_once('.').map_or("", |(_, extension)| extension)
}

/// Every template's text by its name.
fn render_all(given: &Value, namespace: &str) -> Result<Vec<(String, String)>, String> {
    let values = values(given);
    schema::check("", &schema::schema(), &values)?;
    let mut renderer = Renderer::new(&values, &yaml("Chart.yaml"), namespace);
    renderer.define(&read(&format!("{CHART}/templates/_helpers.tpl")))?;
    let mut rendered = Vec::new();
    for path in files(&format!("{CHART}/templates"), false) {
        if extension(&path) == "tpl" {
            continue;
        }
        let text = renderer
            .render(&read(&path))
            .map_err(|error| format!("{path}: {error}"))?;
        rendered.push((path, text));
    }
    Ok(rendered)
}

#[track_caller]
fn rendered(given: &Value) -> Objects {
    let all = render_all(given, "kube-flannel").unwrap_or_else(|error| panic!("{given}: {error}"));
    let texts: Vec<&str> = all
        .iter()
        .filter(|(path, _)| extension(path) == "yaml")
        .map(|(_, text)| text.as_str())
        .collect();
    objects(&texts.join("\n---\n"))
}

#[track_caller]
fn refused(given: &Value, needle: &str) {
    let said = render_all(given, "kube-flannel").expect_err("it is refused");
    assert!(said.contains(needle), "{given}: {said}");
}

fn net_conf(objects: &Objects) -> Value {
    let data = &object(objects, "ConfigMap", "kube-flannel-cfg")["data"];
    let text = data["net-conf.json"].as_str().expect("a text");
    flannel_core::config::NetConf::parse(text).unwrap_or_else(|error| panic!("{text}: {error}"));
    serde_json::from_str(text).expect("JSON")
}

/// The differences between two sets of objects.
fn differences(left: &Objects, right: &Objects) -> Vec<String> {
    let mut found = Vec::new();
    let keys = |objects: &Objects| objects.keys().cloned().collect::<Vec<_>>();
    assert_eq!(keys(left), keys(right));
    for (key, value) in left {
        compare(&key.1, value, &right[key], &mut found);
    }
    found
}

#[test]
fn by_default_it_is_the_manifest() {
    let mut manifest = objects(&read("deploy/kube-flannel.yml"));
    // Helm's business.
    let namespace = ("Namespace".to_owned(), "kube-flannel".to_owned());
    manifest.remove(&namespace).expect("a namespace");
    assert_eq!(
        differences(&rendered(&json!({})), &manifest),
        Vec::<String>::new()
    );
}

#[test]
fn without_privileges_or_with_metrics_it_is_the_overlay() {
    for (overlay, given) in [
        (
            "capabilities",
            json!({"securityContext": {"privileged": false}}),
        ),
        ("metrics", json!({"metrics": {"enabled": true}})),
    ] {
        let mut wanted = objects(&kustomize(overlay));
        // The dashboard is a file of the overlay's.
        wanted.retain(|(kind, name), _| kind != "Namespace" && name != "flannel-dashboard");
        let mut ours = rendered(&given);
        for objects in [&mut ours, &mut wanted] {
            sort_lists(objects);
        }
        assert_eq!(
            differences(&ours, &wanted),
            Vec::<String>::new(),
            "{overlay}"
        );
    }
}

#[test]
fn figures_of_peers_are_asked_for_with_metrics_alone() {
    let asked = |given: Value| -> Vec<Value> {
        let environment = |object: &Value| {
            let list = object.pointer("/spec/template/spec/containers/0/env");
            list.and_then(Value::as_array).cloned().unwrap_or_default()
        };
        let objects = rendered(&given);
        let all = objects.values().flat_map(environment);
        all.filter(|one| one["name"] == "FLANNELD_METRICS_PEERS")
            .collect()
    };
    let wanted = json!({"name": "FLANNELD_METRICS_PEERS", "value": "true"});
    let metrics =
        |enabled: bool, peers: bool| json!({"metrics": {"enabled": enabled, "peers": peers}});
    assert_eq!(asked(metrics(true, true)), [wanted]);
    assert_eq!(asked(metrics(true, false)), [Value::Null; 0]);
    assert_eq!(asked(metrics(false, true)), [Value::Null; 0]);
}

/// By name: kustomize puts what comes from a patch first.
fn sort_lists(objects: &mut Objects) {
    for object in objects.values_mut() {
        for list in ["volumeMounts", "env"] {
            let list = format!("/spec/template/spec/containers/0/{list}");
            if let Some(Value::Array(all)) = object.pointer_mut(&list) {
                all.sort_by_key(|one| one["name"].to_string());
            }
        }
    }
}

#[test]
fn versions_agree() {
    let chart = yaml("Chart.yaml");
    assert_eq!(chart["version"], env!("CARGO_PKG_VERSION"));
    let app = chart["appVersion"].as_str().expect("a version");
    assert!(image().ends_with(&format!(":{app}")), "{app}");
}

#[test]
fn upstreams_values_mean_what_they_mean_there() {
    let objects = rendered(&json!({
        "global": {"imagePullSecrets": [{"name": "registry"}]},
        "podCidr": "10.42.0.0/16",
        "flannel": {
            "image": {"repository": "registry.example/fe", "tag": "v9"},
            "image_cni": {"repository": "ghcr.io/flannel-io/flannel-cni-plugin", "tag": "v1.9.1-flannel3"},
            "cniBinDir": "/var/lib/rancher/k3s/data/cni",
            "cniConfDir": "/var/lib/rancher/k3s/agent/etc/cni/net.d",
            "enableNFTables": true,
            "args": ["--ip-masq", "--kube-subnet-mgr", "--iface=eth1"],
            "backendPort": 4789,
            "mtu": 9000,
            "vni": 1_048_577,
            "GBP": true,
            "cniConf": "{\"name\": \"cbr0\"}\n",
            "resources": {"limits": {"memory": "200Mi"}},
            "healthz": {"port": 9999, "readinessProbe": {"failureThreshold": 9}},
            "tolerations": [{"key": "x", "operator": "Exists"}],
            "nodeSelector": {"flannel": "yes"},
        },
        "datapath": {"mode": "bpf", "bpfFastPath": "syn", "bpfFlowEntries": 1_048_576},
    }));
    assert_eq!(
        net_conf(&objects),
        json!({
            "Network": "10.42.0.0/16",
            "EnableNFTables": true,
            "Backend": {"Port": 4789, "VNI": 1_048_577, "GBP": true, "MTU": 9000, "Type": "vxlan"},
        })
    );
    let data = &object(&objects, "ConfigMap", "kube-flannel-cfg")["data"];
    assert_eq!(
        data["cni-conf.json"].as_str().map(str::trim),
        Some("{\"name\": \"cbr0\"}")
    );
    let pod = &daemonset(&objects)["spec"]["template"]["spec"];
    assert_eq!(pod["imagePullSecrets"], json!([{"name": "registry"}]));
    assert_eq!(pod["nodeSelector"], json!({"flannel": "yes"}));
    assert_eq!(
        pod["tolerations"],
        json!([{"key": "x", "operator": "Exists"}])
    );
    let plugin = container(&objects, "install-cni-plugin");
    assert_eq!(
        plugin["image"],
        "ghcr.io/flannel-io/flannel-cni-plugin:v1.9.1-flannel3"
    );
    // Upstream's image has cp and no install-conf.
    assert_eq!(strings(&plugin["command"]), ["cp"]);
    assert_eq!(
        strings(&plugin["args"]),
        ["-f", "/flannel", "/opt/cni/bin/flannel"]
    );
    let agent = agent(&objects);
    assert_eq!(agent["image"], "registry.example/fe:v9");
    assert_eq!(
        agent["resources"],
        json!({"limits": {"memory": "200Mi"}, "requests": {"cpu": "100m", "memory": "50Mi"}})
    );
    assert_eq!(agent["readinessProbe"]["failureThreshold"], 9);
    assert_eq!(agent["readinessProbe"]["httpGet"]["port"], 9999);
    assert_eq!(
        arguments(agent),
        [
            "--ip-masq",
            "--kube-subnet-mgr",
            "--iface=eth1",
            "--healthz-ip=127.0.0.1",
            "--healthz-port=9999",
            "--datapath=bpf",
            "--bpf-fast-path=syn",
            "--bpf-flow-entries=1048576",
        ]
    );
    let args = parse(agent);
    assert_eq!(args.bpf_flow_entries, 1_048_576);
    let path = |name: &str| {
        let mut all = list(&pod["volumes"]).iter();
        all.find(|one| one["name"] == name)
            .map(|one| one["hostPath"]["path"].clone())
    };
    assert_eq!(
        path("cni-plugin"),
        Some(json!("/var/lib/rancher/k3s/data/cni"))
    );
    assert_eq!(
        path("cni"),
        Some(json!("/var/lib/rancher/k3s/agent/etc/cni/net.d"))
    );
}

#[test]
fn the_plugins_image_has_two_names() {
    let image = json!({"repository": "x/y", "tag": "z"});
    for given in [
        json!({"image_cni": image}),
        json!({"flannel_cni": {"image": image}}),
    ] {
        let objects = rendered(&json!({"flannel": given}));
        assert_eq!(container(&objects, "install-cni-plugin")["image"], "x/y:z");
    }
}

#[test]
fn parts_that_are_turned_off_are_not_there() {
    let objects = rendered(&json!({"flannel": {
        "skipCNIConfigInstallation": true,
        "healthz": {"port": 0},
        "tolerations": [],
        "resources": null,
    }}));
    let pod = &daemonset(&objects)["spec"]["template"]["spec"];
    assert_eq!(list(&pod["initContainers"]).len(), 1);
    assert!(list(&pod["volumes"]).iter().all(|one| one["name"] != "cni"));
    assert_eq!(pod["tolerations"], Value::Null);
    let agent = agent(&objects);
    for field in [
        "startupProbe",
        "livenessProbe",
        "readinessProbe",
        "resources",
    ] {
        assert_eq!(agent[field], Value::Null, "{field}");
    }
    assert_eq!(parse(agent).serving.healthz(), None);
}

#[test]
fn another_namespace_is_everywhere() {
    let all = render_all(&json!({}), "kube-system").expect("it renders");
    for (path, text) in all {
        assert!(
            !text.contains("namespace: kube-flannel\n"),
            "{path}: {text}"
        );
        assert!(!text.contains("-n kube-flannel "), "{path}: {text}");
        if path.ends_with("NOTES.txt") {
            assert!(
                text.contains("label --overwrite namespace kube-system "),
                "{text}"
            );
        }
    }
}

#[test]
fn what_the_agent_cannot_do_is_refused() {
    for (given, needle) in [
        (
            json!({"flannel": {"backend": "udp"}}),
            "flannel.backend=udp",
        ),
        (json!({"podCidr": ""}), "podCidr and podCidrv6 are empty"),
        (
            json!({"flannel": {"backend": "host-gw", "directRouting": true}}),
            "directRouting",
        ),
        (json!({"flannel": {"macPrefix": "0E-2A"}}), "Windows"),
        (json!({"flannel": {"psk": "x"}}), "wireguard"),
        (json!({"flannel": {"tunnelMode": "auto"}}), "wireguard"),
        (json!({"flannel": {"keepaliveInterval": 25}}), "wireguard"),
        (json!({"flannel": {"backendPortv6": 51_821}}), "wireguard"),
        (json!({"netpol": {"enabled": true}}), "netpol.enabled"),
        // By the schema.
        (json!({"flannel": {"bakend": "vxlan"}}), "/flannel/bakend"),
        (json!({"datapath": {"mode": "ebpf"}}), "/datapath/mode"),
        (json!({"flannel": {"vni": 10_000_000}}), "/flannel/vni"),
        (json!({"flannel": {"args": "--ip-masq"}}), "/flannel/args"),
        (
            json!({"flannel": {"cniBinDir": "opt"}}),
            "/flannel/cniBinDir",
        ),
    ] {
        refused(&given, needle);
    }
}

/// The agent's own reader takes what the chart makes of the values.
#[test]
fn every_backend_and_family_makes_a_configuration() {
    use flannel_core::config::{BackendKind, NetConf};
    let key = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=";
    for (given, kind, families) in [
        (json!({}), BackendKind::Vxlan, 1),
        (
            json!({"podCidrv6": "fd00:10:244::/48", "flannel": {"directRouting": true, "backendPort": 4789}}),
            BackendKind::Vxlan,
            2,
        ),
        (
            json!({"podCidr": "", "podCidrv6": "fd00:10:244::/48", "flannel": {"backend": "host-gw"}}),
            BackendKind::HostGw,
            1,
        ),
        (
            json!({"podCidrv6": "fd00:10:244::/48", "flannel": {
                "backend": "wireguard", "backendPort": 51_000, "backendPortv6": 51_001, "psk": key,
                "tunnelMode": "separate", "keepaliveInterval": 25, "mtu": 1500,
            }}),
            BackendKind::Wireguard,
            2,
        ),
        (
            json!({"flannel": {"backend": "alloc"}}),
            BackendKind::Alloc,
            1,
        ),
    ] {
        let text = net_conf(&rendered(&given)).to_string();
        let conf = NetConf::parse_assigned(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
        assert_eq!(conf.backend.kind, kind, "{text}");
        assert_eq!(conf.families().len(), families, "{text}");
        let direct = given["flannel"]["directRouting"] == true;
        assert_eq!(conf.backend.vxlan.direct_routing, direct, "{text}");
        if kind == BackendKind::Wireguard {
            let wireguard = &conf.backend.wireguard;
            assert_eq!((wireguard.port, wireguard.port_v6), (51_000, 51_001));
        }
    }
}

/// A message is of use only if the value may be set at all.
#[test]
fn the_schema_has_every_value_and_no_other() {
    let mut missing = Vec::new();
    schema::compare("", &schema::schema(), &yaml("values.yaml"), &mut missing);
    // Of upstream's chart, read to be refused with its message.
    assert_eq!(missing, ["/netpol/args", "/netpol/image"]);
}

#[test]
fn what_the_renderer_does_not_know_is_an_error() {
    let renderer = Renderer::new(&json!({"a": 1, "b": "x"}), &json!({}), "n");
    for (template, needle) in [
        ("{{ .Values.c }}", "no field .Values.c"),
        ("{{ .Values.a }}", "is written"),
        ("{{ .Values.b | upper }}", "not understood"),
        ("{{ template \"x\" . }}", "not understood"),
        ("{{ if .Values.b }}x", "has no end"),
        ("{{ .Values.b", "has no end"),
        ("x{{ end }}", "ends nothing"),
        ("{{ $x }}", "no variable"),
        ("{{ include \"x\" . }}", "no template x"),
        ("{{ block \"x\" . }}y{{ end }}", "not understood"),
        ("{{ .Values.b 1 }}", "cannot be called"),
    ] {
        let said = renderer.render(template).expect_err(template);
        assert!(
            said.contains(needle) || said.contains("ends nothing"),
            "{template}: {said}"
        );
    }
    for (template, wanted) in [
        ("a {{- .Values.b -}} c", "axc"),
        ("a\n  {{- if .Values.b }}\nb\n  {{- end }}\n", "a\nb\n"),
        ("{{/* x */}}a{{- /* y */ -}} b", "ab"),
        ("{{ .Values.b | quote | nindent 2 }}", "\n  \"x\""),
        ("{{ int .Values.a }}{{ not .Values.b }}", "1false"),
        ("{{ with .Values.b }}[{{ . }}]{{ end }}", "[x]"),
        (
            "{{ if not .Values.b }}a{{ else if .Values.a }}b{{ else }}c{{ end }}",
            "b",
        ),
        ("{{ $x := .Values.b }}{{ $x }}", "x"),
    ] {
        assert_eq!(
            renderer.render(template).as_deref(),
            Ok(wanted),
            "{template}"
        );
    }
}
