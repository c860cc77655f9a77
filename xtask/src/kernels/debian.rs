//! Kernels from Debian's archive.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use super::Kernel;
use crate::archive::{Apt, unpack};
use crate::dist::arch::Arch;
use crate::process;

/// Names the release of a complete kernel directory; written last.
const COMPLETE: &str = "release";

/// A kernel on this machine's disk.
pub(super) struct Files {
    /// What `uname -r` will say.
    pub(super) release: String,
    pub(super) vmlinuz: PathBuf,
    /// Holds `lib/modules/<release>` with its `modules.dep`.
    pub(super) dir: PathBuf,
}

/// The kernel of a suite: the one fetched before, or the current one.
pub(super) fn fetch(dir: &Path, kernel: Kernel, arch: Arch, refresh: bool) -> Result<Files> {
    let suite = kernel.suite();
    let home = dir.join(format!("{suite}-{}", arch.name()));
    if !refresh && let Ok(release) = fs::read_to_string(home.join(COMPLETE)) {
        return Ok(Files::of(home, release));
    }
    eprintln!("fetching the kernel of Debian {suite} (20 to 60 MB)");
    let apt = Apt::new(dir, suite, arch.name())?;
    apt.update()?;
    let (release, packages) = image_of(&apt)?;
    if home.exists() {
        fs::remove_dir_all(&home).with_context(|| format!("remove {}", home.display()))?;
    }
    fs::create_dir_all(&home).with_context(|| format!("create {}", home.display()))?;
    for package in apt.download(&packages)? {
        unpack(&package, &home)?;
    }
    arrange(&home, &release)?;
    let complete = home.join(COMPLETE);
    fs::write(&complete, &release).with_context(|| format!("write {}", complete.display()))?;
    Ok(Files::of(home, release))
}

impl Files {
    fn of(dir: PathBuf, release: String) -> Self {
        Self {
            vmlinuz: dir.join("vmlinuz"),
            release,
            dir,
        }
    }
}

/// The release that the metapackage leads to, and the packages that hold it: one up to 6.x, three from 7.x on, where the
/// image itself is empty.
fn image_of(apt: &Apt) -> Result<(String, Vec<String>)> {
    let flavour = format!("cloud-{}", apt.arch());
    let meta = apt.depends(&[format!("linux-image-{flavour}")])?;
    let image = meta
        .iter()
        .find(|name| name.starts_with("linux-image-"))
        .with_context(|| format!("linux-image-{flavour} depends on no image"))?;
    let release = image.trim_start_matches("linux-image-").to_owned();
    let ending = format!("-{release}");
    let parts = apt.depends(std::slice::from_ref(image))?;
    let mut packages = vec![image.clone()];
    packages.extend(parts.into_iter().filter(|name| name.ends_with(&ending)));
    Ok((release, packages))
}

/// Gives every layout the same form: `vmlinuz` and `lib/modules/<release>`.
fn arrange(home: &Path, release: &str) -> Result<()> {
    let modules = home.join("lib/modules").join(release);
    let merged = home.join("usr/lib/modules").join(release);
    if merged.is_dir() {
        let above = home.join("lib/modules");
        fs::create_dir_all(&above).with_context(|| format!("create {}", above.display()))?;
        rename(&merged, &modules)?;
    }
    let boot = home.join("boot").join(format!("vmlinuz-{release}"));
    let image = [boot, modules.join("vmlinuz")]
        .into_iter()
        .find(|path| path.is_file())
        .with_context(|| format!("no kernel image of {release} in {}", home.display()))?;
    rename(&image, &home.join("vmlinuz"))?;
    // No package has a list of dependencies: it is made where the kernel is installed.
    process::run(process::command("depmod").arg("-b").arg(home).arg(release))
}

fn rename(from: &Path, to: &Path) -> Result<()> {
    fs::rename(from, to).with_context(|| format!("move {} to {}", from.display(), to.display()))
}
