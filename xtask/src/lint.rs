//! `cargo xtask lint`

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use xtask::ebpf;

use crate::cargo;
use crate::licences;
use crate::named_tests;
use crate::process::{self, Reported};
use crate::setup::{self, Needs};

type Check = fn(&Path) -> Result<()>;

const CHECKS: [(&str, Check); 8] = [
    ("format", format),
    ("tree", tree),
    ("tests named in docs", named_tests::check),
    ("dependencies", dependencies),
    ("clippy, eBPF", |root| {
        ebpf::clippy(root).map_err(Into::into)
    }),
    ("clippy, host", clippy),
    ("docs", docs),
    ("licences", licences::check),
];

/// What flannel-core must not come to depend on: it decides, and never acts.
const NOT_IN_CORE: [&str; 8] = [
    "aya",
    "etcd-client",
    "k8s-openapi",
    "kube",
    "netlink-",
    "nix",
    "rtnetlink",
    "tokio",
];

const MAX_LINES: usize = 600;

/// Spelt in halves, so that this file does not contain what it looks for.
const LEFTOVERS: [&str; 4] = [
    concat!("TO", "DO"),
    concat!("FIX", "ME"),
    concat!("XX", "X"),
    concat!("db", "g!("),
];

/// Runs every check, so that one run shows everything that is wrong.
pub(crate) fn run(root: &Path) -> Result<()> {
    setup::ensure(root, Needs::Build)?;
    let mut failed = Vec::new();
    for (name, check) in CHECKS {
        eprintln!("lint: {name}");
        let start = Instant::now();
        let result = check(root);
        let seconds = start.elapsed().as_secs_f64();
        if process::interrupted() {
            return Err(Reported.into());
        }
        match result {
            Ok(()) => eprintln!("lint: {name}: ok ({seconds:.1} s)"),
            Err(error) => {
                eprintln!("lint: {name}: FAILED ({seconds:.1} s): {error:#}");
                failed.push(name);
            }
        }
    }
    if failed.is_empty() {
        println!("lint: {} checks passed", CHECKS.len());
        return Ok(());
    }
    eprintln!(
        "lint: {} of {} checks failed: {}",
        failed.len(),
        CHECKS.len(),
        failed.join("; ")
    );
    Err(Reported.into())
}

fn format(root: &Path) -> Result<()> {
    process::run(cargo::command(root).args(["fmt", "--all", "--check"]))
        .context("run `cargo fmt --all`")
}

fn clippy(root: &Path) -> Result<()> {
    let args = [
        "clippy",
        "--workspace",
        "--exclude",
        "flannel-ebpf",
        "--all-targets",
        "--",
        "-D",
        "warnings",
    ];
    process::run(cargo::command(root).args(args))
}

fn docs(root: &Path) -> Result<()> {
    let args = [
        "doc",
        "--no-deps",
        "-p",
        "flannel-common",
        "-p",
        "flannel-core",
    ];
    process::run(
        cargo::command(root)
            .args(args)
            .env("RUSTDOCFLAGS", "-D warnings"),
    )
}

fn dependencies(root: &Path) -> Result<()> {
    let mut command = cargo::command(root);
    command.args([
        "tree",
        "-p",
        "flannel-core",
        "--edges",
        "normal,build",
        "--prefix",
        "none",
        "--format",
        "{p}",
    ]);
    let output = command
        .stderr(Stdio::inherit())
        .output()
        .context("start cargo tree")?;
    if !output.status.success() {
        bail!("cargo tree ended with {}", output.status);
    }
    let found = forbidden(&String::from_utf8_lossy(&output.stdout));
    if !found.is_empty() {
        bail!(
            "flannel-core depends on {}: it decides and must not act",
            found.join(", ")
        );
    }
    Ok(())
}

/// The packages of `cargo tree --prefix none` that [`NOT_IN_CORE`] names; an entry ending in `-` names a family.
fn forbidden(tree: &str) -> Vec<String> {
    let names = tree
        .lines()
        .filter_map(|line| line.split_whitespace().next());
    let named = |name: &str| {
        NOT_IN_CORE.iter().any(|banned| {
            if banned.ends_with('-') {
                name.starts_with(banned)
            } else {
                name == *banned
            }
        })
    };
    let mut found: Vec<_> = names
        .filter(|name| named(name))
        .map(str::to_owned)
        .collect();
    found.sort();
    found.dedup();
    found
}

fn tree(root: &Path) -> Result<()> {
    let mut files = Vec::new();
    sources(root, &mut files)?;
    let mut faults = Vec::new();
    for path in &files {
        let text = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
        let name = path
            .strip_prefix(root)
            .unwrap_or(path)
            .display()
            .to_string();
        faults.extend(hygiene(&name, &text));
    }
    for fault in &faults {
        eprintln!("{fault}");
    }
    if !faults.is_empty() {
        bail!("{} faults", faults.len());
    }
    Ok(())
}

/// Collects Rust sources, manifests and scripts below `dir`.
fn sources(dir: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let reading = || format!("read {}", dir.display());
    for entry in fs::read_dir(dir).with_context(reading)? {
        let entry = entry.with_context(reading)?;
        let path = entry.path();
        let name = entry.file_name();
        let kind = entry.file_type().with_context(reading)?;
        if kind.is_dir() && name != "target" && name != ".git" {
            sources(&path, files)?;
        } else if kind.is_file()
            && (name == "run"
                || path
                    .extension()
                    .is_some_and(|e| e == "rs" || e == "toml" || e == "sh"))
        {
            files.push(path);
        }
    }
    files.sort();
    Ok(())
}

fn hygiene(name: &str, text: &str) -> Vec<String> {
    let mut faults = Vec::new();
    let lines = text.lines().count();
    let is_rust = Path::new(name)
        .extension()
        .is_some_and(|extension| extension == "rs");
    if is_rust && lines > MAX_LINES {
        faults.push(format!(
            "{name}: {lines} lines, more than {MAX_LINES}: split it"
        ));
    }
    for (number, line) in (1..).zip(text.lines()) {
        for leftover in LEFTOVERS.iter().filter(|leftover| has_word(line, leftover)) {
            faults.push(format!(
                "{name}:{number}: {leftover}: do it, or open an issue"
            ));
        }
    }
    faults
}

fn has_word(line: &str, word: &str) -> bool {
    line.match_indices(word).any(|(at, _)| {
        let before = line.get(..at).and_then(|text| text.chars().next_back());
        let after = line
            .get(at + word.len()..)
            .and_then(|text| text.chars().next());
        let in_word = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_');
        !in_word(before) && (word.ends_with('(') || !in_word(after))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leftovers_are_found_as_words() {
        let [todo, fixme, _, dbg] = LEFTOVERS;
        let text =
            format!("// {todo}: x\nlet a = {dbg}1);\n// {fixme}\nlet my_{todo} = {todo}S;\n");
        let faults = hygiene("a.rs", &text);
        assert_eq!(faults.len(), 3, "{faults:?}");
        assert!(faults[0].starts_with("a.rs:1: "), "{faults:?}");
    }

    #[test]
    fn long_rust_files_are_faults_and_long_manifests_are_not() {
        let long = "\n".repeat(MAX_LINES + 1);
        assert_eq!(
            hygiene("a.rs", &long),
            ["a.rs: 601 lines, more than 600: split it"]
        );
        assert!(hygiene("Cargo.toml", &long).is_empty());
        assert!(hygiene("a.rs", &"\n".repeat(MAX_LINES)).is_empty());
    }

    #[test]
    fn acting_crates_are_recognised() {
        let tree = "flannel-core v0.1.0 (/w)\nipnet v2.12.0\nnetlink-sys v0.9.0\ntokio v1.54.0\nayah v1.0.0\n";
        assert_eq!(forbidden(tree), ["netlink-sys", "tokio"]);
    }
}
