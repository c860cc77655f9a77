//! Programs of other Debian releases, unpacked beside the system's own: what the tests compare with, or want in two versions.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use crate::archive::{self, Apt};
use crate::process;

/// A package of another release.
#[derive(Debug)]
pub(crate) struct Borrowed {
    suite: &'static str,
    package: &'static str,
    /// Below `target`. The tests look there too.
    home: &'static str,
    /// In the package.
    program: &'static str,
    megabytes: u32,
}

/// All of them.
pub(crate) const ALL: [Borrowed; 2] = [
    // The lease store is tested against both 3.4 and this 3.5.
    Borrowed {
        suite: "trixie",
        package: "etcd-server",
        home: "etcd-3.5",
        program: "usr/bin/etcd",
        megabytes: 10,
    },
    // The last release with upstream's flannel plugin, 0.9.0.
    Borrowed {
        suite: "bullseye",
        package: "containernetworking-plugins",
        home: "cni-0.9",
        program: "usr/lib/cni/flannel",
        megabytes: 8,
    },
];

impl Borrowed {
    /// For people: what it is in a word.
    pub(crate) fn name(&self) -> &'static str {
        self.home
    }

    fn home(&self, root: &Path) -> PathBuf {
        root.join("target").join(self.home)
    }

    /// The packages that have not been fetched yet.
    pub(crate) fn absent(root: &Path) -> Vec<&'static Self> {
        let is_absent = |one: &&Self| !one.home(root).join(one.program).exists();
        ALL.iter().filter(is_absent).collect()
    }

    /// What [`Borrowed::fetch`] is going to do.
    pub(crate) fn announcement(&self, root: &Path) -> String {
        format!(
            "will fetch {} of Debian {} (about {} MB) and unpack it to {}, beside what this system has",
            self.package,
            self.suite,
            self.megabytes,
            self.home(root).display()
        )
    }

    /// Fetches the package by apt, which verifies it, and unpacks it. Nothing is installed.
    pub(crate) fn fetch(&self, root: &Path) -> Result<()> {
        let arch = archive::output(process::command("dpkg").arg("--print-architecture"))?;
        let apt = Apt::new(
            &root.join("target").join("archive"),
            self.suite,
            arch.trim(),
        )?;
        apt.update()?;
        // Moved into place when it is complete.
        let home = self.home(root);
        let scratch = home.with_extension("new");
        if scratch.exists() {
            fs::remove_dir_all(&scratch)
                .with_context(|| format!("remove {}", scratch.display()))?;
        }
        fs::create_dir_all(&scratch).with_context(|| format!("create {}", scratch.display()))?;
        for package in apt.download(&[self.package.to_owned()])? {
            archive::unpack(&package, &scratch)?;
        }
        if home.exists() {
            fs::remove_dir_all(&home).with_context(|| format!("remove {}", home.display()))?;
        }
        fs::rename(&scratch, &home).with_context(|| format!("put {} in place", home.display()))
    }
}
