//! What is in a guest's initramfs: our programs, some of this machine's with the libraries they need, and kernel modules.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

use super::Programs;
use super::cpio::Archive;
use super::debian::Files;
use crate::archive::output;
use crate::process;

/// What the lab runs.
const TOOLS: [&str; 3] = ["ip", "bridge", "ethtool"];

/// Where the guest finds the agent.
pub(super) const AGENT: &str = "/bin/flannel-agent";

/// Where the guest looks for modules; it loads them in the order of their names.
const MODULES: &str = "/modules";

/// What the lab and the agent make or attach. What these depend on comes by itself.
const WANTED: [&str; 8] = [
    "veth",
    "bridge",
    "vxlan",
    "sch_ingress",
    "cls_bpf",
    "dummy",
    "virtio_pci",
    "virtio_net",
];

/// Everything but the modules.
pub(super) fn base(programs: &Programs) -> Result<Archive> {
    let mut archive = Archive::default();
    archive.add("/init", stripped(&programs.probe)?);
    archive.add(AGENT, stripped(&programs.agent)?);
    let mut libraries = BTreeSet::new();
    libraries.extend(needed(&programs.probe)?);
    libraries.extend(needed(&programs.agent)?);
    for tool in TOOLS {
        let path = process::find(tool).with_context(|| format!("no {tool} on PATH"))?;
        libraries.extend(needed(&path)?);
        archive.add_same(&path)?;
    }
    for library in libraries {
        archive.add_same(&library)?;
    }
    Ok(archive)
}

/// A program without debug information, which is most of it.
fn stripped(program: &Path) -> Result<Vec<u8>> {
    let copy = program.with_extension("stripped");
    process::run(process::command("strip").arg("-o").arg(&copy).arg(program))?;
    let content = fs::read(&copy).with_context(|| format!("read {}", copy.display()))?;
    fs::remove_file(&copy).with_context(|| format!("remove {}", copy.display()))?;
    Ok(content)
}

/// The libraries of a program and its loader, by the paths under which it looks for them.
fn needed(program: &Path) -> Result<Vec<PathBuf>> {
    let listed = output(process::command("ldd").arg(program))?;
    let (found, missing) = libraries(&listed);
    if !missing.is_empty() {
        bail!("{} lacks {}", program.display(), missing.join(", "));
    }
    Ok(found)
}

/// What `ldd` prints: `name => path (address)`, `path (address)`, `name => not found`, and the kernel's own, which has no path.
fn libraries(listed: &str) -> (Vec<PathBuf>, Vec<String>) {
    let mut found = Vec::new();
    let mut missing = Vec::new();
    for line in listed.lines().map(str::trim) {
        let (name, place) = line.split_once(" => ").unwrap_or((line, line));
        if place == "not found" {
            missing.push(name.to_owned());
        } else if place.starts_with('/') {
            let path = place.split(" (").next().unwrap_or(place);
            found.push(PathBuf::from(path));
        }
    }
    (found, missing)
}

/// The modules to load, in order.
pub(super) fn modules(files: &Files) -> Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for module in WANTED {
        let mut command = process::command("modprobe");
        command
            .args(["--show-depends", "--config", "/dev/null", "--dirname"])
            .arg(&files.dir)
            .args(["--set-version", &files.release, module]);
        for path in to_insert(&output(&mut command)?) {
            if !paths.contains(&path) {
                paths.push(path);
            }
        }
    }
    Ok(paths)
}

/// What `modprobe --show-depends` prints: `insmod path` or `builtin name`.
fn to_insert(listed: &str) -> Vec<PathBuf> {
    listed
        .lines()
        .filter_map(|line| line.trim().strip_prefix("insmod "))
        .map(PathBuf::from)
        .collect()
}

pub(super) fn add_modules(archive: &mut Archive, modules: &[PathBuf]) -> Result<()> {
    for (number, path) in modules.iter().enumerate() {
        let name = path
            .file_name()
            .and_then(|name| name.to_str())
            .with_context(|| format!("name of {}", path.display()))?;
        let target = format!("{MODULES}/{number:03}-{}", name.trim_end_matches(".xz"));
        archive.add(target, plain(path)?);
    }
    Ok(())
}

/// A module, decompressed: not every kernel can do that by itself.
fn plain(path: &Path) -> Result<Vec<u8>> {
    if path.extension().is_none_or(|end| end != "xz") {
        return fs::read(path).with_context(|| format!("read {}", path.display()));
    }
    let output = process::command("xz")
        .arg("--decompress")
        .arg("--stdout")
        .arg(path)
        .output()
        .context("start xz")?;
    if !output.status.success() {
        bail!("xz could not decompress {}", path.display());
    }
    Ok(output.stdout)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_read() {
        let listed = "\tlinux-vdso.so.1 (0x00007ffc)\n\tlibgcc_s.so.1 => /lib/x86_64-linux-gnu/libgcc_s.so.1 (0x00007f)\n\
                      \tlibx.so => not found\n\t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n";
        let (found, missing) = libraries(listed);
        assert_eq!(
            found,
            [
                PathBuf::from("/lib/x86_64-linux-gnu/libgcc_s.so.1"),
                PathBuf::from("/lib64/ld-linux-x86-64.so.2")
            ]
        );
        assert_eq!(missing, ["libx.so"]);
    }

    #[test]
    fn builtin_modules_need_no_loading() {
        let listed = "builtin udp_tunnel\ninsmod /k/lib/modules/1/kernel/vxlan.ko.xz \n";
        assert_eq!(
            to_insert(listed),
            [PathBuf::from("/k/lib/modules/1/kernel/vxlan.ko.xz")]
        );
    }
}
