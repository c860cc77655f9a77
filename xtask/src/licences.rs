//! What `deny.toml` says of dependencies: their licences, which of them must not come in, and where they come from.
//!
//! The file is that of `cargo deny`, which may be run by hand; it takes minutes to build, so that it would be missing where it counts.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Stdio;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;
use spdx::{Expression, Licensee, ParseMode};

use crate::cargo;

/// What programs are released for: a dependency of another system alone is none.
const TARGETS: [&str; 2] = ["x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu"];
/// As `cargo metadata` spells the registry that every crate comes from.
const REGISTRY: &str = "registry+https://github.com/rust-lang/crates.io-index";

/// The parts of `deny.toml` that are followed.
struct Rules {
    allowed: Vec<Licensee>,
    banned: BTreeSet<String>,
}

/// Checks every dependency, of tests and build scripts too.
pub(crate) fn check(root: &Path) -> Result<()> {
    let text = fs::read_to_string(root.join("deny.toml")).context("read deny.toml")?;
    let rules = Rules::parse(&text).context("deny.toml")?;
    let mut faults = BTreeSet::new();
    for target in TARGETS {
        let packages = metadata(root, target)?;
        ensure!(!packages.is_empty(), "cargo metadata lists no packages");
        for package in &packages {
            faults.extend(rules.faults(package));
        }
    }
    for fault in &faults {
        eprintln!("{fault}");
    }
    if !faults.is_empty() {
        bail!("{} faults", faults.len());
    }
    Ok(())
}

fn metadata(root: &Path, target: &str) -> Result<Vec<Value>> {
    let mut command = cargo::command(root);
    command
        .args(["metadata", "--format-version", "1", "--all-features"])
        .args(["--locked", "--quiet", "--filter-platform", target]);
    let output = command
        .stderr(Stdio::inherit())
        .output()
        .context("start cargo metadata")?;
    if !output.status.success() {
        bail!("cargo metadata ended with {}", output.status);
    }
    let all: Value = serde_json::from_slice(&output.stdout).context("output of cargo metadata")?;
    let packages = all["packages"].as_array().context("packages")?;
    Ok(packages.clone())
}

impl Rules {
    fn parse(text: &str) -> Result<Rules> {
        let file: toml::Table = text.parse()?;
        let allowed = list(&file, "licenses", "allow")?
            .iter()
            .map(|value| {
                let name = value.as_str().context("a licence is not a string")?;
                Licensee::parse(name).with_context(|| format!("licence {name}"))
            })
            .collect::<Result<_>>()?;
        let banned = list(&file, "bans", "deny")?
            .iter()
            .map(|entry| {
                let name = entry.get("crate").and_then(toml::Value::as_str);
                Ok(name.context("an entry without `crate`")?.to_owned())
            })
            .collect::<Result<_>>()?;
        Ok(Rules { allowed, banned })
    }

    /// What is wrong with a package of `cargo metadata`.
    fn faults(&self, package: &Value) -> Vec<String> {
        let text = |key: &str| package[key].as_str().unwrap_or_default();
        let id = format!("{} {}", text("name"), text("version"));
        let mut faults = Vec::new();
        if let Err(why) = self.licence(text("license")) {
            faults.push(format!("{id}: {why}"));
        }
        if self.banned.contains(text("name")) {
            faults.push(format!("{id}: deny.toml bans it"));
        }
        match package["source"].as_str() {
            // Ours; what they depend on has a version.
            None => {
                let dependencies = package["dependencies"].as_array();
                let any = dependencies
                    .into_iter()
                    .flatten()
                    .filter(|dependency| dependency["req"] == "*" && dependency["path"].is_null());
                faults.extend(any.map(|dependency| {
                    let name = dependency["name"].as_str().unwrap_or_default();
                    format!("{id}: any version of {name} would do: name one")
                }));
            }
            Some(REGISTRY) => {}
            Some(other) => faults.push(format!("{id}: comes from {other}")),
        }
        faults
    }

    fn licence(&self, expression: &str) -> Result<(), String> {
        if expression.is_empty() {
            return Err("no licence is named".to_owned());
        }
        let parsed = Expression::parse_mode(expression, ParseMode::LAX)
            .map_err(|error| format!("licence {expression}: {error}"))?;
        let is_allowed = parsed.evaluate(|wanted| {
            self.allowed
                .iter()
                .any(|licensee| licensee.satisfies(wanted))
        });
        if is_allowed {
            Ok(())
        } else {
            Err(format!("licence {expression} is not in deny.toml"))
        }
    }
}

fn list<'a>(file: &'a toml::Table, section: &str, key: &str) -> Result<&'a Vec<toml::Value>> {
    let value = file.get(section).and_then(|section| section.get(key));
    let list = value.and_then(toml::Value::as_array);
    list.with_context(|| format!("no list {key} in [{section}]"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn rules() -> Rules {
        let text = r#"
[licenses]
allow = ["Apache-2.0", "Apache-2.0 WITH LLVM-exception", "MIT", "ISC"]
[bans]
deny = [{ crate = "openssl-sys" }]
"#;
        Rules::parse(text).expect("the rules")
    }

    fn package(name: &str, source: Option<&str>) -> Value {
        json!({ "name": name, "version": "1.0.0", "license": "MIT", "source": source, "dependencies": [] })
    }

    #[test]
    fn licences_are_judged_by_their_expression() {
        for good in [
            "MIT",
            "MIT OR Apache-2.0",
            "MIT/GPL-3.0",
            "Unlicense OR MIT",
            "(GPL-2.0 OR MIT) AND ISC",
            "Apache-2.0 WITH LLVM-exception",
        ] {
            assert_eq!(rules().licence(good), Ok(()), "{good}");
        }
        for bad in [
            "GPL-3.0",
            "MIT AND GPL-3.0",
            "MIT WITH LLVM-exception",
            "Whatever",
            "",
        ] {
            assert!(rules().licence(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn packages_are_of_the_registry_and_not_banned() {
        let of = |name: &str, source: &str| rules().faults(&package(name, Some(source)));
        assert_eq!(of("serde", REGISTRY), [""; 0]);
        assert_eq!(of("openssl-sys", REGISTRY).len(), 1);
        assert_eq!(of("serde", "git+https://example.org/serde").len(), 1);
    }

    #[test]
    fn our_own_packages_name_a_version_of_what_they_need() {
        let mut own = package("flannel-core", None);
        own["dependencies"] = json!([
            { "name": "flannel-common", "req": "*", "path": "/w/flannel-common" },
            { "name": "serde", "req": "^1.0", "path": null },
        ]);
        assert_eq!(rules().faults(&own), [""; 0]);
        own["dependencies"][1]["req"] = json!("*");
        assert_eq!(
            rules().faults(&own),
            ["flannel-core 1.0.0: any version of serde would do: name one"]
        );
    }

    #[test]
    fn a_file_without_rules_is_refused() {
        assert!(Rules::parse("[licenses]\nallow = []\n").is_err());
        assert!(Rules::parse("[licenses]\nallow = [\"Nonsense\"]\n[bans]\ndeny = []\n").is_err());
    }
}
