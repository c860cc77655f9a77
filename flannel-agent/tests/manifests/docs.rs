//! What documents, units and manifests name: flags, variables, images, files of the repository.

use std::{collections::BTreeSet, path::Path};

use regex::Regex;

use crate::manifest_rig::{REPOSITORY, files, flags, image, read, repository, variables};

/// Flags of other programs that the documents use. Whatever is not here is one of ours, or a mistake.
const FOREIGN: [(&str, &[&str]); 12] = [
    (
        "kubectl",
        &["field-selector", "from-file", "ignore-not-found"],
    ),
    ("kubeadm", &["pod-network-cidr"]),
    ("k3s", &["cluster-cidr", "flannel-backend"]),
    ("kube-controller-manager", &["allocate-node-cidrs"]),
    ("kubelet", &["node-ip"]),
    ("helm", &["create-namespace", "namespace", "set"]),
    ("etcdctl", &["cacert", "cert", "endpoints", "key"]),
    ("apt", &["reinstall"]),
    ("systemctl", &["now"]),
    ("dockerd", &["bip", "containerd", "mtu"]),
    ("cargo", &["help", "release", "test", "version"]),
    (
        "cargo xtask",
        &[
            "arch",
            "backend",
            "direct-routing",
            "family",
            "flanneld",
            "guard",
            "json",
            "keep",
            "kernel",
            "modes",
            "plot",
            "quick",
            "report",
            "service-rules",
            "store",
            "workloads",
        ],
    ),
];

/// The documents whose flags are checked.
fn texts() -> Vec<(String, String)> {
    let mut paths = vec!["README.md".to_owned()];
    paths.extend(files("docs", false));
    paths.extend(files("deploy", true));
    let wanted = |path: &String| {
        // The templates' flags are checked as they are rendered; the script is upstream's own, and the image's recipe buildah's.
        !path.contains("/templates/")
            && !path.starts_with("deploy/bin/")
            && path != "deploy/Containerfile"
            // Tools that check, push and sign.
            && path != "docs/release.md"
    };
    let paths = paths.into_iter().filter(wanted);
    paths.map(|path| (path.clone(), read(&path))).collect()
}

#[test]
fn flags_that_are_named_exist() {
    let pattern = Regex::new("(?:^|[^-a-zA-Z0-9])--([a-z][a-z0-9_-]*)").expect("an expression");
    let mut known = flags();
    assert!(known.contains("iface") && known.contains("dry-run"));
    let foreign = FOREIGN.iter().flat_map(|(_, words)| words.iter());
    let mut unused: BTreeSet<&str> = foreign.copied().collect();
    let ours = known.clone();
    known.extend(unused.iter().map(|word| (*word).to_owned()));
    let mut unknown = BTreeSet::new();
    let mut seen = 0;
    for (path, text) in texts() {
        for found in pattern.captures_iter(&text) {
            seen += 1;
            let name = found[1].trim_end_matches('-').to_owned();
            if !known.contains(&name) {
                unknown.insert(format!("{path}: --{name}"));
            }
            unused.remove(name.as_str());
        }
    }
    assert!(seen > 100, "{seen}");
    assert_eq!(unknown, BTreeSet::new());
    unused.retain(|word| !ours.contains(*word));
    assert_eq!(unused, BTreeSet::new(), "no document has them any more");
}

#[test]
fn variables_that_are_named_exist() {
    let pattern = Regex::new("FLANNELD_[A-Z0-9_]*[A-Z0-9]").expect("an expression");
    let known = variables();
    let mut seen = 0;
    for (path, text) in texts() {
        for found in pattern.find_iter(&text) {
            seen += 1;
            assert!(known.contains(found.as_str()), "{path}: {}", found.as_str());
        }
    }
    assert!(seen > 10, "{seen}");
}

#[test]
fn images_that_are_named_are_this_version() {
    let pattern = Regex::new(&format!("{}:[a-z0-9.]*[a-z0-9]", regex::escape(REPOSITORY)))
        .expect("an expression");
    let mut seen = 0;
    for (path, text) in texts() {
        for found in pattern.find_iter(&text) {
            seen += 1;
            assert_eq!(found.as_str(), image(), "{path}");
        }
    }
    assert!(seen > 5, "{seen}");
}

#[test]
fn links_and_files_that_are_named_exist() {
    let link = Regex::new(r"\]\(([^)#:]+)(?:#[^)]*)?\)").expect("an expression");
    let file = Regex::new(r"\bdeploy/[-A-Za-z0-9_./]*[A-Za-z0-9]").expect("an expression");
    for (path, text) in texts() {
        if Path::new(&path).extension().is_none_or(|kind| kind != "md") {
            continue;
        }
        let dir = path.rsplit_once('/').map_or("", |(dir, _)| dir);
        for found in link.captures_iter(&text) {
            let target = repository(dir).join(&found[1]);
            assert!(target.exists(), "{path}: {}", &found[1]);
        }
        for found in file.find_iter(&text) {
            assert!(
                repository(found.as_str()).exists(),
                "{path}: {}",
                found.as_str()
            );
        }
    }
}
