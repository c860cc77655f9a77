//! Bills of materials in CycloneDX's JSON: the crates that are in the binaries, and the packages that are in the image.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Stdio;

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

use super::arch::Arch;
use super::stamp::Stamp;
use crate::archive::output;
use crate::cargo;

/// What a release is made of: with these begins what is followed.
const ROOTS: [&str; 3] = ["flannel-agent", "flannel-cni", "flannel-ebpf"];

/// A crate of the graph.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Crate {
    name: String,
    version: String,
    licence: Option<String>,
    /// From a registry, and so with a checksum.
    foreign: bool,
    depends_on: BTreeSet<String>,
}

impl Crate {
    fn purl(&self) -> String {
        format!("pkg:cargo/{}@{}", self.name, self.version)
    }
}

/// A package of Debian's that is in the image.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Package {
    pub(super) name: String,
    pub(super) version: String,
    pub(super) arch: String,
    /// The release that it is of, as `debian-12`.
    pub(super) distro: String,
}

/// The bill of one architecture's binaries.
pub(super) fn of_binaries(root: &Path, arch: Arch, stamp: &Stamp) -> Result<Value> {
    let mut command = cargo::command(root);
    command.args(["metadata", "--format-version=1", "--locked"]);
    command.args(["--filter-platform", arch.target()]);
    let metadata = output(command.stdin(Stdio::null()))?;
    let metadata = serde_json::from_str(&metadata).context("read what cargo metadata says")?;
    let lock = root.join("Cargo.lock");
    let lock =
        std::fs::read_to_string(&lock).with_context(|| format!("read {}", lock.display()))?;
    let mut bill = render(&shipped(&metadata)?, &checksums(&lock), stamp, arch);
    let version = output(cargo::rustc(root).arg("--version").stdin(Stdio::null()))?;
    let version = version.split_whitespace().nth(1).unwrap_or_default();
    append(
        &mut bill,
        json!({
            "type": "library",
            "bom-ref": format!("pkg:generic/rust-std@{version}"),
            "name": "rust-std",
            "version": version,
            "description": format!("Rust's standard library for {}, with musl", arch.target()),
            "purl": format!("pkg:generic/rust-std@{version}"),
            "licenses": [{"expression": "MIT OR Apache-2.0"}],
        }),
    )?;
    Ok(bill)
}

/// The same bill with the packages of the image's base.
pub(super) fn of_image(binaries: &Value, packages: &[Package]) -> Result<Value> {
    let mut bill = binaries.clone();
    for package in packages {
        let Package {
            name,
            version,
            arch,
            distro,
        } = package;
        // In a package URL + is a character like others, and : separates nothing behind the @.
        let version_in_url = version.replace('+', "%2B").replace(':', "%3A");
        let purl = format!("pkg:deb/debian/{name}@{version_in_url}?arch={arch}&distro={distro}");
        append(
            &mut bill,
            json!({"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}),
        )?;
    }
    Ok(bill)
}

fn append(bill: &mut Value, component: Value) -> Result<()> {
    let components = bill.get_mut("components").and_then(Value::as_array_mut);
    components
        .context("a bill without components")?
        .push(component);
    Ok(())
}

/// The crates that are linked into the binaries: no tests, no build scripts, nothing of other platforms.
fn shipped(metadata: &Value) -> Result<BTreeMap<String, Crate>> {
    let text = |value: &Value, key: &str| value.get(key)?.as_str().map(str::to_owned);
    let list = |value: &Value, key: &str| -> Vec<Value> {
        let found = value.get(key).and_then(Value::as_array);
        found.cloned().unwrap_or_default()
    };
    let mut edges: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for node in list(metadata.get("resolve").unwrap_or(&Value::Null), "nodes") {
        let id = text(&node, "id").context("a node without id")?;
        let linked = |dependency: &Value| {
            let kinds = list(dependency, "dep_kinds");
            kinds.iter().any(|kind| kind["kind"].is_null())
        };
        let dependencies = list(&node, "deps");
        let linked = dependencies.iter().filter(|dep| linked(dep));
        edges.insert(id, linked.filter_map(|dep| text(dep, "pkg")).collect());
    }
    let mut known = BTreeMap::new();
    for package in list(metadata, "packages") {
        let id = text(&package, "id").context("a package without id")?;
        let is_macro = list(&package, "targets")
            .iter()
            .any(|target| target["kind"] == json!(["proc-macro"]));
        let found = Crate {
            name: text(&package, "name").context("a package without name")?,
            version: text(&package, "version").context("a package without version")?,
            licence: text(&package, "license").map(|licence| licence.replace('/', " OR ")),
            foreign: text(&package, "source").is_some(),
            depends_on: BTreeSet::new(),
        };
        known.insert(id, (found, is_macro));
    }
    let is_root = |found: &Crate| !found.foreign && ROOTS.contains(&found.name.as_str());
    let mut waiting: Vec<String> = known
        .iter()
        .filter(|(_, (found, _))| is_root(found))
        .map(|(id, _)| id.clone())
        .collect();
    if waiting.len() != ROOTS.len() {
        bail!("cargo metadata does not name all of {}", ROOTS.join(", "));
    }
    let mut shipped = BTreeMap::new();
    while let Some(id) = waiting.pop() {
        let Some((found, is_macro)) = known.get(&id) else {
            bail!("cargo metadata has no package {id}");
        };
        // A macro runs in the compiler, and so does what it depends on.
        if *is_macro || shipped.contains_key(&id) {
            continue;
        }
        let mut found = found.clone();
        found.depends_on = edges.remove(&id).unwrap_or_default();
        waiting.extend(found.depends_on.iter().cloned());
        shipped.insert(id, found);
    }
    Ok(shipped)
}

/// Name and version to SHA-256, from `Cargo.lock`.
fn checksums(lock: &str) -> BTreeMap<(String, String), String> {
    let mut sums = BTreeMap::new();
    for block in lock.split("[[package]]") {
        let value = |key: &str| {
            let mut pairs = block.lines().filter_map(|line| line.split_once(" = "));
            let (_, value) = pairs.find(|(name, _)| *name == key)?;
            Some(value.trim_matches('"').to_owned())
        };
        if let (Some(name), Some(version), Some(sum)) =
            (value("name"), value("version"), value("checksum"))
        {
            sums.insert((name, version), sum);
        }
    }
    sums
}

fn render(
    crates: &BTreeMap<String, Crate>,
    sums: &BTreeMap<(String, String), String>,
    stamp: &Stamp,
    arch: Arch,
) -> Value {
    let component = |found: &Crate| {
        let mut out = json!({
            "type": if found.foreign { "library" } else { "application" },
            "bom-ref": found.purl(),
            "name": found.name,
            "version": found.version,
            "purl": found.purl(),
        });
        if let Some(licence) = &found.licence {
            out["licenses"] = json!([{"expression": licence}]);
        }
        if let Some(sum) = sums.get(&(found.name.clone(), found.version.clone())) {
            out["hashes"] = json!([{"alg": "SHA-256", "content": sum}]);
        }
        out
    };
    let dependency = |found: &Crate| {
        let on = found.depends_on.iter().filter_map(|id| crates.get(id));
        let mut on: Vec<_> = on.map(Crate::purl).collect();
        on.sort();
        json!({"ref": found.purl(), "dependsOn": on})
    };
    let mut sorted: Vec<_> = crates.values().collect();
    sorted.sort_by_key(|found| found.purl());
    let product = format!("flannel-ebpf@{}-linux-{arch}", stamp.version);
    json!({
        "$schema": "http://cyclonedx.org/schema/bom-1.5.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {
            "timestamp": stamp.time(),
            "component": {
                "type": "application",
                "bom-ref": product,
                "name": "flannel-ebpf",
                "version": stamp.version,
                "properties": [
                    {"name": "flannel-ebpf:revision", "value": stamp.revision},
                    {"name": "flannel-ebpf:platform", "value": format!("linux/{arch}")},
                ],
            },
        },
        "components": sorted.iter().map(|found| component(found)).collect::<Vec<_>>(),
        "dependencies": sorted.iter().map(|found| dependency(found)).collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests;
