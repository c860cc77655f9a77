//! What of this workspace runs in guests: test binaries, the agent, and the first process.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc as Shared;

use anyhow::{Context as _, Result, bail};
use xtask::ebpf;

use super::cpio::Archive;
use crate::cargo::{self, Executable};
use crate::dist::arch::Arch;
use crate::process;

/// The example of flannel-testkit that is the first process.
const INIT: &str = "guest_init";

/// A program without debug information.
struct Program {
    path: String,
    content: Shared<[u8]>,
}

/// A test binary in a guest.
pub(super) struct TestBinary {
    pub(super) target: String,
    pub(super) path: String,
    pub(super) manifest_dir: PathBuf,
    pub(super) version: String,
}

/// The programs of an architecture.
pub(super) struct Programs {
    files: Vec<Program>,
    /// Where the agent is in the guest: where cargo has put it, because the tests have that path in them.
    pub(super) agent: String,
    pub(super) tests: Vec<TestBinary>,
}

/// Builds them: for this machine's architecture what its own tests use, for another one static binaries.
pub(super) fn build(root: &Path, arch: Arch, targets: &[&str], object: &Path) -> Result<Programs> {
    let is_foreign = Arch::host() != Some(arch);
    let mut environment = Vec::new();
    let mut words = Vec::new();
    if is_foreign {
        words.extend(["--target", arch.target()]);
        let upper = arch.target().replace('-', "_").to_uppercase();
        environment.extend(arch.toolchain());
        environment.extend(
            [
                (
                    format!("CARGO_TARGET_{upper}_RUSTFLAGS"),
                    "-Clinker-flavor=ld.lld",
                ),
                ("CARGO_PROFILE_DEV_STRIP".to_owned(), "symbols"),
                ("CARGO_PROFILE_DEV_DEBUG".to_owned(), "0"),
            ]
            .map(|(name, value)| (name, value.into())),
        );
    }
    // Of the whole workspace, because that decides the features of what it depends on: a choice would build all that again.
    let mut test = vec![
        "test",
        "--no-run",
        "--workspace",
        "--exclude",
        "flannel-ebpf",
    ];
    test.extend(["--example", INIT]);
    test.extend(targets.iter().flat_map(|target| ["--test", target]));
    test.extend(&words);
    let built = cargo::build_with(root, &test, &environment)?;
    let strip = is_foreign.then_some(()).map_or("strip", |()| "");
    collect(&built, targets, strip, object)
}

fn collect(built: &[Executable], targets: &[&str], strip: &str, object: &Path) -> Result<Programs> {
    let find = |kind: &str, target: &str| {
        built
            .iter()
            .find(|made| {
                made.kind == kind && made.target == target && (kind != "bin" || !made.is_test)
            })
            .with_context(|| format!("cargo built no {kind} `{target}`"))
    };
    let read = |made: &Executable, path: String| -> Result<Program> {
        let content = if strip.is_empty() {
            fs::read(&made.path).with_context(|| format!("read {}", made.path.display()))?
        } else {
            stripped(strip, &made.path)?
        };
        Ok(Program {
            path,
            content: content.into(),
        })
    };
    let agent = find("bin", "flannel-agent")?;
    let agent_path = agent.path.display().to_string();
    let of_agent = read(agent, agent_path.clone())?;
    check_object(&of_agent.content, object)?;
    let mut files = vec![of_agent, read(find("example", INIT)?, "/init".to_owned())?];
    let mut tests = Vec::new();
    for target in targets {
        let made = find("test", target)?;
        let path = format!("/guest/{target}");
        files.push(read(made, path.clone())?);
        tests.push(TestBinary {
            target: (*target).to_owned(),
            path,
            manifest_dir: made.manifest_dir.clone(),
            version: made.version.clone(),
        });
    }
    Ok(Programs {
        files,
        agent: agent_path,
        tests,
    })
}

impl Programs {
    pub(super) fn add_to(&self, archive: &mut Archive) {
        for program in &self.files {
            archive.add(program.path.clone(), Shared::clone(&program.content));
        }
    }
}

/// One eBPF object serves all architectures: every agent must have the bytes of that file in it.
fn check_object(agent: &[u8], object: &Path) -> Result<()> {
    let object_bytes = fs::read(object).with_context(|| format!("read {}", object.display()))?;
    if object_bytes.is_empty() || !contains(agent, &object_bytes) {
        bail!(
            "an agent does not have {} in it: the architectures would run different programs",
            object.display()
        );
    }
    Ok(())
}

fn contains(all: &[u8], part: &[u8]) -> bool {
    let Some((first, _)) = part.split_first_chunk::<16>() else {
        return false;
    };
    let mut starts = all
        .windows(first.len())
        .enumerate()
        .filter(|(_, bytes)| bytes == first);
    starts.any(|(at, _)| all.get(at..).is_some_and(|rest| rest.starts_with(part)))
}

/// A program without debug information, which is most of it.
fn stripped(strip: &str, program: &Path) -> Result<Vec<u8>> {
    let copy = program.with_extension("stripped");
    process::run(
        process::command(strip)
            .arg("-o")
            .arg(&copy)
            .arg(program)
            .stdin(Stdio::null()),
    )?;
    let content = fs::read(&copy).with_context(|| format!("read {}", copy.display()))?;
    fs::remove_file(&copy).with_context(|| format!("remove {}", copy.display()))?;
    Ok(content)
}

/// The object that all agents have in them.
pub(super) fn object(root: &Path) -> Result<PathBuf> {
    Ok(ebpf::build(root, &[])?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_is_found_behind_a_false_start() {
        let part = b"0123456789abcdefXY";
        let mut all = b"..0123456789abcdefZZ..".to_vec();
        assert!(!contains(&all, part));
        all.extend(part);
        assert!(contains(&all, part));
        assert!(!contains(&all, b"short"));
    }
}
