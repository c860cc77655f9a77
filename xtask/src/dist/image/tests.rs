use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt as _;
use std::process::Stdio;

use tempfile::TempDir;

use super::*;
use crate::archive::output;
use crate::process;

fn stamp() -> Stamp {
    Stamp {
        version: "0.1.0".to_owned(),
        revision: "abc".to_owned(),
        epoch: 1_000_000_000,
    }
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// A layout for two architectures, each of a base with one file and the own files around one binary.
fn layout(dir: &Path) -> PathBuf {
    let binary = dir.join("flannel-agent");
    fs::copy("/bin/true", &binary).expect("copy");
    let binaries = Binaries {
        agent: binary.clone(),
        plugin: binary,
    };
    let platforms = Arch::ALL.map(|arch| {
        let (base, own) = (
            dir.join(format!("base-{arch}")),
            dir.join(format!("own-{arch}")),
        );
        fs::create_dir_all(base.join("etc")).expect("a directory");
        fs::write(base.join("etc/os-release"), arch.name()).expect("write");
        stage(&root(), &own, &binaries).expect("stage");
        Platform {
            arch,
            layers: vec![(base, "base"), (own, "own")],
        }
    });
    let layout = dir.join("image");
    write_layout(&layout, &stamp(), &platforms).expect("a layout");
    layout
}

fn skopeo(words: &[&str]) -> String {
    let mut command = process::command("skopeo");
    command.arg("--insecure-policy").args(words);
    output(command.stdin(Stdio::null())).expect("skopeo")
}

#[test]
fn skopeo_takes_the_layout() {
    let dir = TempDir::new().expect("a directory");
    let layout = layout(dir.path());
    let at = |tag: &str| format!("oci:{}:{tag}", layout.display());
    // Reads every blob and compares its checksum.
    let copy = format!("dir:{}", dir.path().join("copy").display());
    skopeo(&["copy", "--quiet", "--all", &at("v0.1.0"), &copy]);
    for arch in Arch::ALL {
        for words in [
            &[
                "--override-arch",
                arch.name(),
                "inspect",
                "--config",
                &at("v0.1.0"),
            ][..],
            &["inspect", "--config", &at(&format!("v0.1.0-{arch}"))],
        ] {
            let config: Value = serde_json::from_str(&skopeo(words)).expect("JSON");
            assert_eq!(config["architecture"], arch.name());
            assert_eq!(config["os"], "linux");
            assert_eq!(config["created"], "2001-09-09T01:46:40Z");
            assert_eq!(config["config"]["Entrypoint"], json!([ENTRYPOINT]));
            assert_eq!(config["config"]["Env"], json!([format!("PATH={PATH}")]));
            let labels = &config["config"]["Labels"];
            assert_eq!(labels["org.opencontainers.image.revision"], "abc");
            assert_eq!(labels["org.opencontainers.image.title"], "flannel-ebpf");
        }
    }
}

#[test]
fn skopeo_finds_a_blob_that_was_changed() {
    let dir = TempDir::new().expect("a directory");
    let layout = layout(dir.path());
    let blobs = layout.join("blobs/sha256");
    let largest = bundle::names(&blobs)
        .expect("blobs")
        .into_iter()
        .max_by_key(|name| fs::metadata(blobs.join(name)).expect("a blob").len());
    let path = blobs.join(largest.expect("a blob"));
    let mut bytes = fs::read(&path).expect("read");
    *bytes.last_mut().expect("a byte") ^= 1;
    fs::write(&path, bytes).expect("write");
    let mut command = process::command("skopeo");
    command.args(["--insecure-policy", "copy", "--quiet", "--all"]);
    command.arg(format!("oci:{}:v0.1.0", layout.display()));
    command.arg(format!("dir:{}", dir.path().join("copy").display()));
    let done = command.output().expect("skopeo");
    assert!(!done.status.success());
}

#[test]
fn layers_have_the_paths_of_flannels_image() {
    let dir = TempDir::new().expect("a directory");
    let layout = layout(dir.path());
    let to = dir.path().join("copy");
    skopeo(&[
        "copy",
        "--quiet",
        &format!("oci:{}:v0.1.0-arm64", layout.display()),
        &format!("dir:{}", to.display()),
    ]);
    let manifest = fs::read_to_string(to.join("manifest.json")).expect("a manifest");
    let manifest: Value = serde_json::from_str(&manifest).expect("JSON");
    let own = manifest["layers"][1]["digest"].as_str().expect("a digest");
    let mut list = process::command("tar");
    list.arg("-tvzf")
        .arg(to.join(own.trim_start_matches("sha256:")));
    let list = output(&mut list).expect("tar");
    let modes: BTreeMap<String, String> = list
        .lines()
        .map(|line| {
            let words: Vec<_> = line.split_whitespace().collect();
            (words[5..].join(" "), format!("{} {}", words[0], words[1]))
        })
        .collect();
    for (path, mode) in [
        ("opt/bin/flanneld", "-rwxr-xr-x 0/0"),
        ("opt/bin/flannel-agent -> flanneld", "lrwxr-xr-x 0/0"),
        ("opt/bin/install-conf -> flanneld", "lrwxr-xr-x 0/0"),
        ("opt/bin/mk-docker-opts.sh", "-rwxr-xr-x 0/0"),
        ("flannel", "-rwxr-xr-x 0/0"),
        (
            "usr/share/doc/flannel-ebpf/LICENSE-APACHE",
            "-rw-r--r-- 0/0",
        ),
    ] {
        assert_eq!(modes.get(path).map(String::as_str), Some(mode), "{path}");
    }
    let others: Vec<_> = modes
        .values()
        .filter(|mode| !mode.starts_with('l') && mode.as_bytes()[8] == b'w')
        .collect();
    assert!(others.is_empty(), "writable for anybody: {list}");
}

#[test]
fn a_layout_comes_out_the_same() {
    let (one, two) = (
        TempDir::new().expect("a directory"),
        TempDir::new().expect("a directory"),
    );
    let read = |dir: &TempDir| {
        fs::read_to_string(layout(dir.path()).join("index.json")).expect("an index")
    };
    assert_eq!(read(&one), read(&two));
}

/// Instructions of the Containerfile, continued lines joined.
fn instructions() -> Vec<(String, String)> {
    let text = fs::read_to_string(root().join("deploy/Containerfile")).expect("a Containerfile");
    let lines: Vec<_> = text.lines().filter(|line| !line.starts_with('#')).collect();
    let joined = lines.join("\n").replace("\\\n", " ");
    joined
        .lines()
        .filter_map(|line| line.split_once(' '))
        .map(|(word, rest)| {
            let rest = rest.split_whitespace().collect::<Vec<_>>().join(" ");
            (word.to_owned(), rest)
        })
        .collect()
}

#[test]
fn the_containerfile_makes_the_same_image() {
    let all = instructions();
    let of = |word: &str| -> Vec<&str> {
        let found = all.iter().filter(|(name, _)| name == word);
        found.map(|(_, rest)| rest.as_str()).collect()
    };
    assert_eq!(of("ENTRYPOINT"), [format!("[\"{ENTRYPOINT}\"]")]);
    assert_eq!(of("ENV"), [format!("PATH={PATH}")]);
    let labels = of("LABEL").join(" ");
    for (name, value) in LABELS {
        assert!(labels.contains(&format!("{name}=\"{value}\"")), "{name}");
    }
    for (name, value) in [
        ("version", "VERSION"),
        ("revision", "REVISION"),
        ("created", "CREATED"),
    ] {
        let label = format!("org.opencontainers.image.{name}=\"${{{value}}}\"");
        assert!(labels.contains(&label), "{label}");
    }
    let version = format!("VERSION={}", env!("CARGO_PKG_VERSION"));
    assert!(of("ARG").contains(&version.as_str()), "{:?}", of("ARG"));
    // The last stage is made of what --stage lays out, and the first of the whole tree.
    assert_eq!(
        of("COPY"),
        [
            ". .",
            "--from=build /out/image/rootfs/ /",
            "--from=build /out/image/own/ /"
        ]
    );
    let run = of("RUN").join("\n");
    assert!(
        run.contains("cargo xtask dist --stage --arch \"${TARGETARCH}\" --out /out"),
        "{run}"
    );
    assert!(
        run.contains("mv \"/out/${TARGETARCH}\" /out/image"),
        "{run}"
    );
    assert_eq!(
        of("FROM"),
        [
            "--platform=$BUILDPLATFORM ${RUST_IMAGE} AS build",
            "scratch"
        ]
    );
}

#[test]
fn the_containerfile_builds_with_the_pinned_compiler() {
    let text = fs::read_to_string(root().join("rust-toolchain.toml")).expect("the pin");
    let channel = text
        .lines()
        .find_map(|line| line.strip_prefix("channel = "))
        .expect("a channel");
    let image = format!(
        "RUST_IMAGE=docker.io/library/rust:{}-bookworm",
        channel.trim_matches('"')
    );
    assert!(instructions().contains(&("ARG".to_owned(), image)));
}

#[test]
fn own_files_are_usable_by_anybody() {
    let dir = TempDir::new().expect("a directory");
    let source = dir.path().join("agent");
    fs::copy("/bin/true", &source).expect("copy");
    // As an odd umask leaves it.
    fs::set_permissions(&source, fs::Permissions::from_mode(0o700)).expect("permissions");
    let binaries = Binaries {
        agent: source.clone(),
        plugin: source,
    };
    let own = dir.path().join("own");
    stage(&root(), &own, &binaries).expect("stage");
    for path in [AGENT, PLUGIN, SCRIPT, LINKS[0].0, LINKS[1].0] {
        let meta = fs::metadata(own.join(path)).expect(path);
        assert_eq!(meta.permissions().mode() & 0o7777, 0o755, "{path}");
    }
}
