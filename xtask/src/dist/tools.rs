//! What `dist` needs beyond a build: compilers for the other architecture, an emulator, Rust's targets.

use std::path::Path;
use std::process::Stdio;

use anyhow::{Result, bail};
use xtask::ebpf;

use super::arch::Arch;
use crate::archive;
use crate::cargo;
use crate::process;
use crate::setup::{self, Needs};

/// A thing that must be there, and Debian's package with it.
struct Needed {
    probe: String,
    package: &'static str,
}

/// What these architectures need on a machine of that one.
fn needed(arches: &[Arch], host: Option<Arch>, image: bool) -> Vec<Needed> {
    let mut all = Vec::new();
    let mut need = |probe: &str, package| {
        all.push(Needed {
            probe: probe.to_owned(),
            package,
        });
    };
    for program in ["tar", "gzip", "sha256sum", "git", "readelf"] {
        let package = match program {
            "sha256sum" => "coreutils",
            "readelf" => "binutils",
            other => other,
        };
        need(program, package);
    }
    for arch in arches.iter().filter(|arch| Some(**arch) != host) {
        let [compiler, headers] = arch.cross_packages();
        need(&format!("{}-gcc", arch.gnu()), compiler);
        need(&format!("/usr/{}/include/stdint.h", arch.gnu()), headers);
        need(arch.qemu(), "qemu-user-static");
    }
    if image {
        need("dpkg-deb", "dpkg");
        need("apt-cache", "apt");
        need(archive::KEYRING, "debian-archive-keyring");
    }
    all
}

/// Installs what is missing, having said so.
pub(super) fn ensure(root: &Path, arches: &[Arch], image: bool) -> Result<()> {
    setup::ensure(root, Needs::Build)?;
    if image && !setup::is_debian() {
        bail!(
            "the image is put together from Debian's packages, which needs apt and dpkg: build it on Debian or Ubuntu, or with \
             deploy/Containerfile"
        );
    }
    install(needed(arches, Arch::host(), image), "dist")?;
    for arch in arches {
        ensure_target(root, *arch, "dist")?;
    }
    Ok(())
}

/// Installs the compilers for architectures that this machine does not have, having said so. Returns whether it had to.
pub(crate) fn ensure_cross(root: &Path, arches: &[Arch]) -> Result<bool> {
    let foreign: Vec<Arch> = arches
        .iter()
        .copied()
        .filter(|arch| Arch::host() != Some(*arch))
        .collect();
    let mut compilers = Vec::new();
    for arch in &foreign {
        let [compiler, headers] = arch.cross_packages();
        for (probe, package) in [
            (format!("{}-gcc", arch.gnu()), compiler),
            (format!("/usr/{}/include/stdint.h", arch.gnu()), headers),
        ] {
            compilers.push(Needed { probe, package });
        }
    }
    let mut installed = install(compilers, "setup")?;
    for arch in foreign {
        installed |= ensure_target(root, arch, "setup")?;
    }
    Ok(installed)
}

/// `who` is the command that says it.
fn install(needed: Vec<Needed>, who: &str) -> Result<bool> {
    let missing = |what: &Needed| !setup::present(&what.probe);
    let absent: Vec<_> = needed.into_iter().filter(missing).collect();
    if absent.is_empty() {
        return Ok(false);
    }
    let probes: Vec<_> = absent.iter().map(|what| what.probe.as_str()).collect();
    let mut packages: Vec<_> = absent.iter().map(|what| what.package).collect();
    packages.sort_unstable();
    packages.dedup();
    eprintln!("{who}: missing: {}", probes.join(", "));
    if !setup::is_debian() {
        bail!(
            "install what these packages of Debian have, and run this again: {}",
            packages.join(" ")
        );
    }
    eprintln!(
        "{who}: will run apt-get update and install {} (a minute)",
        packages.join(" ")
    );
    setup::apt_install(&packages)?;
    if let Some(still) = absent.iter().find(|what| missing(what)) {
        bail!(
            "{} is still missing after {} was installed",
            still.probe,
            still.package
        );
    }
    Ok(true)
}

fn ensure_target(root: &Path, arch: Arch, who: &str) -> Result<bool> {
    let target = arch.target();
    let mut rustc = cargo::rustc(root);
    rustc.args(["--print", "target-libdir", "--target", target]);
    let libdir = archive::output(rustc.stdin(Stdio::null()))?;
    if Path::new(libdir.trim()).is_dir() {
        return Ok(false);
    }
    let channel = ebpf::channel(root)?;
    if !ebpf::on_search_path("rustup") {
        bail!("Rust {channel} has no {target}, and there is no rustup to add it");
    }
    eprintln!("{who}: will add the target {target} to Rust {channel} (seconds)");
    let mut rustup = process::command("rustup");
    rustup.args(["target", "add", "--toolchain", &channel, target]);
    process::run(rustup.current_dir(root).stdin(Stdio::null()))?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packages(arches: &[Arch], host: Arch, image: bool) -> Vec<&'static str> {
        let all = needed(arches, Some(host), image);
        all.into_iter().map(|what| what.package).collect()
    }

    #[test]
    fn only_the_other_architecture_needs_a_cross_compiler() {
        let native = packages(&[Arch::Amd64], Arch::Amd64, false);
        assert!(!native.iter().any(|name| name.starts_with("gcc-")));
        let both = packages(&Arch::ALL, Arch::Amd64, false);
        assert!(both.contains(&"gcc-aarch64-linux-gnu"), "{both:?}");
        assert!(both.contains(&"qemu-user-static"), "{both:?}");
        assert!(!both.contains(&"gcc-x86-64-linux-gnu"), "{both:?}");
        let turned = packages(&Arch::ALL, Arch::Arm64, true);
        assert!(turned.contains(&"gcc-x86-64-linux-gnu"), "{turned:?}");
        assert!(turned.contains(&"debian-archive-keyring"), "{turned:?}");
    }
}
