use super::*;

fn package(id: &str, source: Option<&str>, kind: &str) -> Value {
    let (name, version) = id.split_once('@').expect("name@version");
    json!({"id": id, "name": name, "version": version, "source": source, "license": "MIT/Apache-2.0",
           "targets": [{"kind": [kind]}]})
}

fn node(id: &str, dependencies: &[(&str, Value)]) -> Value {
    let deps: Vec<_> = dependencies
        .iter()
        .map(|(on, kind)| json!({"pkg": on, "dep_kinds": [{"kind": kind}]}))
        .collect();
    json!({"id": id, "deps": deps})
}

fn metadata() -> Value {
    let registry = Some("registry+https://example.org");
    json!({
        "packages": [
            package("flannel-agent@0.1.0", None, "bin"),
            package("flannel-cni@0.1.0", None, "bin"),
            package("flannel-ebpf@0.1.0", None, "bin"),
            package("xtask@0.1.0", None, "lib"),
            package("ring@0.17.0", registry, "lib"),
            package("cc@1.0.0", registry, "lib"),
            package("tempfile@3.0.0", registry, "lib"),
            package("serde_derive@1.0.0", registry, "proc-macro"),
            package("syn@2.0.0", registry, "lib"),
        ],
        "resolve": {"nodes": [
            node("flannel-agent@0.1.0", &[
                ("ring@0.17.0", Value::Null),
                ("serde_derive@1.0.0", Value::Null),
                ("tempfile@3.0.0", json!("dev")),
                ("xtask@0.1.0", json!("build")),
            ]),
            node("flannel-cni@0.1.0", &[]),
            node("flannel-ebpf@0.1.0", &[]),
            node("ring@0.17.0", &[("cc@1.0.0", json!("build"))]),
            node("serde_derive@1.0.0", &[("syn@2.0.0", Value::Null)]),
        ]},
    })
}

#[test]
fn what_is_linked_is_listed_and_nothing_else() {
    let crates = shipped(&metadata()).expect("read");
    let names: Vec<_> = crates.keys().map(String::as_str).collect();
    assert_eq!(
        names,
        [
            "flannel-agent@0.1.0",
            "flannel-cni@0.1.0",
            "flannel-ebpf@0.1.0",
            "ring@0.17.0"
        ]
    );
    let lock = "version = 4\n\n[[package]]\nname = \"ring\"\nversion = \"0.17.0\"\nsource = \"registry\"\nchecksum = \"00ff\"\n\
                dependencies = [\n \"cc\",\n]\n\n[[package]]\nname = \"flannel-cni\"\nversion = \"0.1.0\"\n";
    let bill = render(&crates, &checksums(lock), &Stamp::example(), Arch::Arm64);
    assert_eq!(
        bill["components"][3],
        json!({
            "type": "library",
            "bom-ref": "pkg:cargo/ring@0.17.0",
            "name": "ring",
            "version": "0.17.0",
            "purl": "pkg:cargo/ring@0.17.0",
            "licenses": [{"expression": "MIT OR Apache-2.0"}],
            "hashes": [{"alg": "SHA-256", "content": "00ff"}],
        })
    );
    assert_eq!(bill["components"][0]["type"], "application");
    assert_eq!(
        bill["dependencies"][0],
        json!({"ref": "pkg:cargo/flannel-agent@0.1.0", "dependsOn": ["pkg:cargo/ring@0.17.0"]})
    );
    assert_eq!(bill["metadata"]["timestamp"], "1970-01-01T00:00:00Z");
}

#[test]
fn metadata_without_our_crates_is_refused() {
    let why = shipped(&json!({"packages": [], "resolve": {"nodes": []}})).expect_err("empty");
    assert!(why.to_string().contains("flannel-cni"), "{why}");
}

#[test]
fn this_workspace_has_a_bill() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let bill = of_binaries(&root, Arch::Arm64, &Stamp::example()).expect("cargo metadata");
    let names: Vec<_> = bill["components"]
        .as_array()
        .expect("components")
        .iter()
        .map(|component| component["name"].as_str().expect("a name"))
        .collect();
    for name in [
        "aya",
        "aya-ebpf",
        "flannel-common",
        "ring",
        "rust-std",
        "tokio",
    ] {
        assert!(names.contains(&name), "no {name}: {names:?}");
    }
    for name in ["proptest", "tempfile", "windows-sys", "cc", "clap_derive"] {
        assert!(!names.contains(&name), "{name} is not linked");
    }
    // Every crate of a registry has its checksum, and every reference leads somewhere.
    let components = bill["components"].as_array().expect("components");
    let lacking = components.iter().find(|component| {
        component["type"] == "library"
            && component["name"] != "rust-std"
            && component["hashes"][0]["content"].as_str().map(str::len) != Some(64)
    });
    assert_eq!(lacking, None);
    let known: BTreeSet<_> = components
        .iter()
        .map(|component| component["bom-ref"].clone().to_string())
        .collect();
    assert_eq!(known.len(), components.len(), "a reference twice");
    for dependency in bill["dependencies"].as_array().expect("dependencies") {
        for on in dependency["dependsOn"].as_array().expect("a list") {
            assert!(known.contains(&on.to_string()), "{on}");
        }
    }
}

#[test]
fn an_image_has_debians_packages_too() {
    let bill = json!({"components": []});
    let packages = [Package {
        name: "kmod".to_owned(),
        version: "1:30+20221128-1".to_owned(),
        arch: "arm64".to_owned(),
        distro: "debian-12".to_owned(),
    }];
    let bill = of_image(&bill, &packages).expect("a bill");
    assert_eq!(
        bill["components"][0]["purl"],
        "pkg:deb/debian/kmod@1%3A30%2B20221128-1?arch=arm64&distro=debian-12"
    );
}
