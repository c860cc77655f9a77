//! Manifests as the Kubernetes API would read them.

#![allow(dead_code, reason = "every test binary uses a part of it")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use clap::{CommandFactory as _, Parser as _};
use flannel_agent::cli::Args;
use k8s_openapi::api::{
    apps::v1::DaemonSet,
    core::v1::{ConfigMap, Namespace, ServiceAccount},
    rbac::v1::{ClusterRole, ClusterRoleBinding},
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

/// What upstream's released manifest has.
pub(crate) const UPSTREAM: &str = include_str!("../manifests/upstream.yml");
/// Ours, without its tag.
pub(crate) const REPOSITORY: &str = "ghcr.io/flannel-ebpf/flannel-ebpf";

/// Objects by kind and name.
pub(crate) type Objects = BTreeMap<(String, String), Value>;

/// The image that every manifest must name.
pub(crate) fn image() -> String {
    format!("{REPOSITORY}:v{}", env!("CARGO_PKG_VERSION"))
}

/// A path in the repository.
pub(crate) fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path)
}

#[track_caller]
pub(crate) fn read(path: &str) -> String {
    fs::read_to_string(repository(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// The files directly in a directory, and those of its directories if `deep`, in order.
#[track_caller]
pub(crate) fn files(dir: &str, deep: bool) -> Vec<String> {
    let mut found = Vec::new();
    let entries = fs::read_dir(repository(dir)).unwrap_or_else(|error| panic!("{dir}: {error}"));
    for entry in entries {
        let entry = entry.expect("an entry");
        let name = entry.file_name().into_string().expect("a name");
        let path = format!("{dir}/{name}");
        if entry.file_type().expect("a type").is_dir() {
            if deep {
                found.extend(files(&path, true));
            }
        } else {
            found.push(path);
        }
    }
    found.sort();
    found
}

/// The documents of a file, empty ones left out.
#[track_caller]
pub(crate) fn documents(text: &str) -> Vec<Value> {
    let all: Vec<Value> =
        serde_saphyr::from_multiple(text).unwrap_or_else(|error| panic!("{error}\nin\n{text}"));
    all.into_iter().filter(|one| !one.is_null()).collect()
}

/// The documents of a file as complete objects, each of which survives the API's types.
#[track_caller]
pub(crate) fn objects(text: &str) -> Objects {
    let mut found = Objects::new();
    for document in documents(text) {
        let lost = lost(&document);
        assert_eq!(lost, Vec::<String>::new(), "of {document}");
        let name = (
            text_of(&document, "/kind").to_owned(),
            text_of(&document, "/metadata/name").to_owned(),
        );
        let before = found.insert(name.clone(), document);
        assert!(before.is_none(), "{name:?} is there twice");
    }
    found
}

/// What the API's type for a document does not know of it, or understands otherwise.
#[track_caller]
pub(crate) fn lost(document: &Value) -> Vec<String> {
    let version = text_of(document, "/apiVersion");
    let again = match (version, text_of(document, "/kind")) {
        ("v1", "Namespace") => round_trip::<Namespace>(document),
        ("v1", "ServiceAccount") => round_trip::<ServiceAccount>(document),
        ("v1", "ConfigMap") => round_trip::<ConfigMap>(document),
        ("apps/v1", "DaemonSet") => round_trip::<DaemonSet>(document),
        ("rbac.authorization.k8s.io/v1", "ClusterRole") => round_trip::<ClusterRole>(document),
        ("rbac.authorization.k8s.io/v1", "ClusterRoleBinding") => {
            round_trip::<ClusterRoleBinding>(document)
        }
        other => panic!("{other:?}: add its type here"),
    };
    let again = match again {
        Ok(again) => again,
        Err(error) => return vec![error.to_string()],
    };
    let mut differences = Vec::new();
    compare("", document, &again, &mut differences);
    differences
}

fn round_trip<T: DeserializeOwned + Serialize>(document: &Value) -> serde_json::Result<Value> {
    serde_json::to_value(serde_json::from_value::<T>(document.clone())?)
}

/// The places at which two documents differ.
pub(crate) fn compare(at: &str, left: &Value, right: &Value, differences: &mut Vec<String>) {
    match (left, right) {
        (Value::Object(left), Value::Object(right)) => {
            let keys: BTreeSet<&String> = left.keys().chain(right.keys()).collect();
            for key in keys {
                let (left, right) = (left.get(key), right.get(key));
                compare(
                    &format!("{at}/{key}"),
                    left.unwrap_or(&Value::Null),
                    right.unwrap_or(&Value::Null),
                    differences,
                );
            }
        }
        (Value::Array(left), Value::Array(right)) if left.len() == right.len() => {
            for (index, (left, right)) in left.iter().zip(right).enumerate() {
                compare(&format!("{at}/{index}"), left, right, differences);
            }
        }
        _ if left == right => {}
        _ => differences.push(format!("{at}: {left} is not {right}")),
    }
}

/// A string in a document.
#[track_caller]
pub(crate) fn text_of<'a>(document: &'a Value, pointer: &str) -> &'a str {
    let found = document.pointer(pointer).and_then(Value::as_str);
    found.unwrap_or_else(|| panic!("no {pointer} in {document}"))
}

/// An object.
#[track_caller]
pub(crate) fn object<'a>(objects: &'a Objects, kind: &str, name: &str) -> &'a Value {
    let key = (kind.to_owned(), name.to_owned());
    objects
        .get(&key)
        .unwrap_or_else(|| panic!("no {key:?} in {:?}", objects.keys()))
}

/// The DaemonSet.
#[track_caller]
pub(crate) fn daemonset(objects: &Objects) -> &Value {
    object(objects, "DaemonSet", "kube-flannel-ds")
}

/// A container of the DaemonSet, of whichever kind.
#[track_caller]
pub(crate) fn container<'a>(objects: &'a Objects, name: &str) -> &'a Value {
    let pod = &daemonset(objects)["spec"]["template"]["spec"];
    let all = ["initContainers", "containers"].map(|kind| list(&pod[kind]));
    let mut all = all.into_iter().flatten();
    all.find(|one| one["name"] == name)
        .unwrap_or_else(|| panic!("no container {name} in {pod}"))
}

/// The container with the agent.
#[track_caller]
pub(crate) fn agent(objects: &Objects) -> &Value {
    container(objects, "kube-flannel")
}

/// A list of a document; what is missing is empty.
pub(crate) fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

/// The strings of a list.
#[track_caller]
pub(crate) fn strings(value: &Value) -> Vec<&str> {
    let texts = list(value).iter();
    texts.map(|one| one.as_str().expect("a string")).collect()
}

/// What the container hands to its program: the rest of its command, and its arguments.
#[track_caller]
pub(crate) fn arguments(container: &Value) -> Vec<&str> {
    let mut words = strings(&container["command"]);
    words.extend(strings(&container["args"]));
    words.into_iter().skip(1).collect()
}

/// Parses what a container hands to the agent, by the agent's own rules.
#[track_caller]
pub(crate) fn parse(container: &Value) -> Args {
    let words = arguments(container);
    let all = std::iter::once("flanneld").chain(words.iter().copied());
    Args::try_parse_from(all).unwrap_or_else(|error| panic!("{words:?}: {error}"))
}

/// Every flag of the agent and of its commands, without dashes.
pub(crate) fn flags() -> BTreeSet<String> {
    fn collect(command: &clap::Command, into: &mut BTreeSet<String>) {
        let names = command.get_arguments().filter_map(clap::Arg::get_long);
        into.extend(names.map(str::to_owned));
        for command in command.get_subcommands() {
            collect(command, into);
        }
    }
    let mut command = Args::command();
    command.build();
    let mut found = BTreeSet::new();
    collect(&command, &mut found);
    found
}

/// Every variable that the agent reads a flag from.
pub(crate) fn variables() -> BTreeSet<String> {
    let mut command = Args::command();
    command.build();
    let names = command
        .get_arguments()
        .filter_map(|flag| Some(flag.get_env()?.to_str()?.to_owned()));
    names.collect()
}

/// What kubectl makes of a directory of deploy/kustomize.
#[track_caller]
pub(crate) fn kustomize(name: &str) -> String {
    let dir = repository("deploy/kustomize").join(name);
    let output = Command::new("kubectl")
        .arg("kustomize")
        .arg(&dir)
        .output()
        .expect("kubectl, see cargo xtask setup");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{name}: {said}");
    String::from_utf8(output.stdout).expect("text")
}

/// The directories of deploy/kustomize.
pub(crate) fn kustomizations() -> Vec<String> {
    let all = files("deploy/kustomize", true);
    let names = all.iter().filter_map(|path| {
        let dir = path.strip_suffix("/kustomization.yaml")?;
        Some(dir.strip_prefix("deploy/kustomize/")?.to_owned())
    });
    names.collect()
}
