//! The etcd of Debian 13 beside the system's own: the lease store is tested against both.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use crate::archive::{self, Apt};
use crate::process;

/// Debian 13, with etcd 3.5.
const SUITE: &str = "trixie";
const PACKAGE: &str = "etcd-server";

/// Where the package is unpacked. The tests look there too.
fn home(root: &Path) -> PathBuf {
    root.join("target").join("etcd-3.5")
}

/// The server.
pub(crate) fn program(root: &Path) -> PathBuf {
    home(root).join("usr/bin/etcd")
}

/// What [`fetch`] is going to do.
pub(crate) fn announcement(root: &Path) -> String {
    format!(
        "will fetch {PACKAGE} of Debian {SUITE} (about 10 MB) and unpack it to {}, beside the etcd of this system",
        home(root).display()
    )
}

/// Fetches the package by apt, which verifies it, and unpacks it. Nothing is installed.
pub(crate) fn fetch(root: &Path) -> Result<()> {
    let arch = archive::output(process::command("dpkg").arg("--print-architecture"))?;
    let apt = Apt::new(&root.join("target").join("archive"), SUITE, arch.trim())?;
    apt.update()?;
    // Moved into place when it is complete.
    let scratch = home(root).with_extension("new");
    if scratch.exists() {
        fs::remove_dir_all(&scratch).with_context(|| format!("remove {}", scratch.display()))?;
    }
    fs::create_dir_all(&scratch).with_context(|| format!("create {}", scratch.display()))?;
    for package in apt.download(&[PACKAGE.to_owned()])? {
        archive::unpack(&package, &scratch)?;
    }
    let home = home(root);
    if home.exists() {
        fs::remove_dir_all(&home).with_context(|| format!("remove {}", home.display()))?;
    }
    fs::rename(&scratch, &home).with_context(|| format!("put {} in place", home.display()))
}
