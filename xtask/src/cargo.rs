//! Running cargo, and reading from its messages what it built.

use std::env;
use std::ffi::OsString;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::process;

/// Something executable that cargo built.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Executable {
    pub(crate) package: String,
    pub(crate) version: String,
    pub(crate) manifest_dir: PathBuf,
    /// Name of the target: the binary, the library or the file below `tests/`.
    pub(crate) target: String,
    /// cargo's word: `lib`, `bin`, `test`, `bench`, `example`.
    pub(crate) kind: String,
    /// Built with the test harness.
    pub(crate) is_test: bool,
    pub(crate) path: PathBuf,
}

/// The cargo that runs us, in the workspace root.
pub(crate) fn command(root: &Path) -> Command {
    let cargo = env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
    let mut command = process::command(&cargo);
    // `cargo run` describes xtask to us; inner builds must not take that for a change of their own environment.
    for (name, _) in env::vars_os() {
        let of_xtask = name.to_str().is_some_and(|name| {
            name.starts_with("CARGO_PKG_")
                || name.starts_with("CARGO_MANIFEST_")
                || name == "CARGO_PRIMARY_PACKAGE"
        });
        if of_xtask {
            command.env_remove(&name);
        }
    }
    command.current_dir(root);
    command
}

/// The compiler that goes with it.
pub(crate) fn rustc(root: &Path) -> Command {
    let mut command = process::command("rustc");
    command.current_dir(root);
    command
}

/// Runs a building subcommand and returns the executables it made; progress and diagnostics go to stderr.
pub(crate) fn build(root: &Path, subcommand: &[&str]) -> Result<Vec<Executable>> {
    build_with(root, subcommand, &[])
}

/// Like [`build`], with variables of the environment.
pub(crate) fn build_with(
    root: &Path,
    subcommand: &[&str],
    environment: &[(String, OsString)],
) -> Result<Vec<Executable>> {
    let mut command = command(root);
    let variables = environment.iter().map(|(name, value)| (name, value));
    command
        .envs(variables)
        .args(subcommand)
        .arg("--message-format=json-render-diagnostics");
    let mut child = process::spawn(command.stdin(Stdio::null()).stdout(Stdio::piped()))?;
    let stdout = child.stdout.take().context("cargo's standard output")?;
    let mut executables = Vec::new();
    for line in BufReader::new(stdout).lines() {
        executables.extend(executable(&line.context("read cargo's messages")?));
    }
    let status = process::wait(&mut child)?;
    if !status.success() {
        bail!("cargo {} ended with {status}", subcommand.join(" "));
    }
    Ok(executables)
}

/// Reads one line of `--message-format=json`; `None` for messages about anything else.
fn executable(line: &str) -> Option<Executable> {
    let message: Value = serde_json::from_str(line).ok()?;
    let path = PathBuf::from(message.get("executable")?.as_str()?);
    let target = message.get("target")?;
    let manifest = PathBuf::from(message.get("manifest_path")?.as_str()?);
    let (package, version) = package_id(message.get("package_id")?.as_str()?)?;
    Some(Executable {
        package,
        version,
        manifest_dir: manifest.parent()?.to_owned(),
        target: target.get("name")?.as_str()?.to_owned(),
        kind: target.get("kind")?.get(0)?.as_str()?.to_owned(),
        is_test: message.get("profile")?.get("test")?.as_bool()?,
        path,
    })
}

/// Splits `path+file:///dir/name#0.1.0` or `path+file:///dir#name@0.1.0`.
fn package_id(id: &str) -> Option<(String, String)> {
    let (url, fragment) = id.rsplit_once('#')?;
    Some(match fragment.split_once('@') {
        Some((name, version)) => (name.to_owned(), version.to_owned()),
        None => (url.rsplit('/').next()?.to_owned(), fragment.to_owned()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn executables_are_read_from_messages() {
        let line = r#"{"reason":"compiler-artifact","package_id":"path+file:///w/flannel-agent#0.1.0",
            "manifest_path":"/w/flannel-agent/Cargo.toml",
            "target":{"kind":["test"],"crate_types":["bin"],"name":"netns_overlay"},
            "profile":{"opt_level":"0","test":true},"features":[],"filenames":["/t/netns_overlay-1"],
            "executable":"/t/netns_overlay-1","fresh":true}"#;
        let expected = Executable {
            package: "flannel-agent".to_owned(),
            version: "0.1.0".to_owned(),
            manifest_dir: PathBuf::from("/w/flannel-agent"),
            target: "netns_overlay".to_owned(),
            kind: "test".to_owned(),
            is_test: true,
            path: PathBuf::from("/t/netns_overlay-1"),
        };
        assert_eq!(executable(line), Some(expected));
    }

    #[test]
    fn other_messages_are_passed_over() {
        let library = r#"{"reason":"compiler-artifact","package_id":"path+file:///w/a#0.1.0","executable":null}"#;
        for line in [
            library,
            r#"{"reason":"build-finished","success":true}"#,
            "",
            "not json",
        ] {
            assert_eq!(executable(line), None, "{line}");
        }
    }

    #[test]
    fn both_forms_of_package_ids_are_known() {
        let expected = Some(("x".to_owned(), "1.2.3".to_owned()));
        assert_eq!(package_id("path+file:///w/x#1.2.3"), expected);
        assert_eq!(package_id("path+file:///w/dir#x@1.2.3"), expected);
        assert_eq!(package_id("no fragment"), None);
    }
}
