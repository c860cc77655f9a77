//! Packages from Debian's archive, by the machine's own apt with a directory of its own: signatures are checked, and nothing of
//! the machine's packages is touched.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

use crate::process;

/// What the archive is signed with.
pub(crate) const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// apt with its state below the directory that it is given. One suite each: the metapackages are named alike in all.
pub(crate) struct Apt {
    dir: PathBuf,
    arch: String,
}

impl Apt {
    pub(crate) fn new(dir: &Path, suite: &str, arch: &str) -> Result<Self> {
        let dir = dir.join("apt").join(format!("{suite}-{arch}"));
        for below in ["state/lists/partial", "cache/archives/partial"] {
            let path = dir.join(below);
            fs::create_dir_all(&path).with_context(|| format!("create {}", path.display()))?;
        }
        let apt = Self {
            dir,
            arch: arch.to_owned(),
        };
        apt.write("status", "")?;
        let mirror = mirror()?;
        apt.write(
            "sources.list",
            &format!("deb [signed-by={KEYRING}] {mirror} {suite} main\n"),
        )?;
        let at = apt.dir.display();
        // `Dir::Etc::parts` stays the machine's: it may name a proxy.
        apt.write(
            "apt.conf",
            &format!(
                "Dir::State \"{at}/state\";\n\
                 Dir::State::status \"{at}/status\";\n\
                 Dir::Cache \"{at}/cache\";\n\
                 Dir::Etc::sourcelist \"{at}/sources.list\";\n\
                 Dir::Etc::sourceparts \"/dev/null\";\n\
                 Dir::Etc::preferencesparts \"/dev/null\";\n\
                 APT::Architecture \"{}\";\n\
                 APT::Architectures {{ \"{}\"; }};\n\
                 APT::Sandbox::User \"\";\n\
                 Acquire::Languages \"none\";\n",
                apt.arch, apt.arch
            ),
        )?;
        Ok(apt)
    }

    /// With what was mended since the release, as far as this machine's apt knows where that is.
    pub(crate) fn with_updates(dir: &Path, suite: &str, arch: &str) -> Result<Self> {
        let apt = Self::new(dir, suite, arch)?;
        let targets = targets()?;
        let mirror = choose_mirror(&targets).unwrap_or_default();
        let line =
            |site: &str, suite: &str| format!("deb [signed-by={KEYRING}] {site} {suite} main\n");
        let mut sources = line(&mirror, suite) + &line(&mirror, &format!("{suite}-updates"));
        match choose_security(&targets) {
            Some(site) => sources += &line(&site, &format!("{suite}-security")),
            None => eprintln!(
                "this machine's apt has no source of security updates: those since the last point release are not taken"
            ),
        }
        apt.write("sources.list", &sources)?;
        Ok(apt)
    }

    fn write(&self, name: &str, text: &str) -> Result<()> {
        let path = self.dir.join(name);
        fs::write(&path, text).with_context(|| format!("write {}", path.display()))
    }

    fn command(&self, program: &str) -> Command {
        let mut command = process::command(program);
        command
            .env("APT_CONFIG", self.dir.join("apt.conf"))
            .env("LC_ALL", "C")
            .stdin(Stdio::null())
            .current_dir(&self.dir);
        command
    }

    pub(crate) fn arch(&self) -> &str {
        &self.arch
    }

    pub(crate) fn update(&self) -> Result<()> {
        process::run(self.command("apt-get").args(["update", "-qq"]))
    }

    /// What these packages depend on.
    pub(crate) fn depends(&self, packages: &[String]) -> Result<Vec<String>> {
        let output = output(
            self.command("apt-cache")
                .args(["depends", "--important"])
                .args(packages),
        )?;
        Ok(dependencies(&output))
    }

    /// These packages with all that they depend on, but for dependencies that are not to be followed.
    pub(crate) fn closure(&self, wanted: &[&str], not_followed: &[&str]) -> Result<Vec<String>> {
        closure(wanted, not_followed, |packages| self.depends(packages))
    }

    pub(crate) fn download(&self, packages: &[String]) -> Result<Vec<PathBuf>> {
        for old in self.packages()? {
            fs::remove_file(&old).with_context(|| format!("remove {}", old.display()))?;
        }
        process::run(
            self.command("apt-get")
                .args(["download", "-qq"])
                .args(packages),
        )?;
        self.packages()
    }

    fn packages(&self) -> Result<Vec<PathBuf>> {
        let entries = fs::read_dir(&self.dir)?.collect::<std::io::Result<Vec<_>>>()?;
        let mut paths: Vec<_> = entries.into_iter().map(|entry| entry.path()).collect();
        paths.retain(|path| path.extension().is_some_and(|end| end == "deb"));
        paths.sort();
        Ok(paths)
    }
}

/// Sorted. All of one distance are asked for at once: starting apt takes a second.
pub(crate) fn closure(
    wanted: &[&str],
    not_followed: &[&str],
    mut depends: impl FnMut(&[String]) -> Result<Vec<String>>,
) -> Result<Vec<String>> {
    let mut names = BTreeSet::new();
    let mut waiting: Vec<String> = wanted.iter().map(|name| (*name).to_owned()).collect();
    while !waiting.is_empty() {
        waiting.retain(|name| !not_followed.contains(&name.as_str()) && names.insert(name.clone()));
        if !waiting.is_empty() {
            waiting = depends(&waiting)?;
        }
    }
    Ok(names.into_iter().collect())
}

/// The packages in what `apt-cache depends` prints; not the virtual ones, in angle brackets.
fn dependencies(text: &str) -> Vec<String> {
    text.lines()
        .filter_map(|line| line.trim_start_matches([' ', '|']).split_once("epends: "))
        .map(|(_, name)| name.trim().to_owned())
        .filter(|name| !name.starts_with('<'))
        .collect()
}

/// Unpacks a package below `home`, and removes it: it is not needed again.
pub(crate) fn unpack(package: &Path, home: &Path) -> Result<()> {
    process::run(
        process::command("dpkg-deb")
            .arg("-x")
            .arg(package)
            .arg(home),
    )?;
    fs::remove_file(package).with_context(|| format!("remove {}", package.display()))
}

/// The output of a command that must succeed.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let output = command
        .stderr(Stdio::piped())
        .output()
        .with_context(|| format!("start {}", command.get_program().display()))?;
    if !output.status.success() {
        bail!(
            "{} ended with {}: {}",
            process::line(command),
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The archive that this machine gets its own packages from: it holds every suite.
fn mirror() -> Result<String> {
    let text = targets()?;
    choose_mirror(&text).with_context(|| {
        format!(
            "apt names no Debian archive, run `apt-get update`; it said: {}",
            text.trim()
        )
    })
}

/// Addresses and releases, as this machine's apt has them.
fn targets() -> Result<String> {
    let output = Command::new("apt-get")
        .args(["indextargets", "--format", "$(SITE) $(RELEASE)"])
        .stdin(Stdio::null())
        .output()
        .context("ask apt for its archive")?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Of lines with an address and a release: the first that is neither updates nor security, which lack whole suites.
fn choose_mirror(targets: &str) -> Option<String> {
    targets.lines().find_map(|line| {
        let (site, release) = line.split_once(' ')?;
        (!release.contains('-') && !site.contains("security")).then(|| site.to_owned())
    })
}

/// Of the same lines the first that is security's.
fn choose_security(targets: &str) -> Option<String> {
    targets.lines().find_map(|line| {
        let (site, release) = line.split_once(' ')?;
        release.ends_with("-security").then(|| site.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_are_read() {
        let text = "linux-image-7.2.12+deb13-cloud-amd64\n  PreDepends: linux-base\n |Depends: <dracut>\n  \
                    Depends: <linux-initramfs-tool>\n    dracut\n  Depends: linux-binary-7.2.12+deb13-cloud-amd64\n";
        assert_eq!(
            dependencies(text),
            ["linux-base", "linux-binary-7.2.12+deb13-cloud-amd64"]
        );
    }

    #[test]
    fn the_archive_itself_is_chosen() {
        let targets = "http://a/debian-security bookworm-security\nhttp://a/debian bookworm-updates\nhttp://a/debian bookworm\n";
        assert_eq!(choose_mirror(targets).as_deref(), Some("http://a/debian"));
        assert_eq!(choose_mirror(""), None);
        assert_eq!(
            choose_security(targets).as_deref(),
            Some("http://a/debian-security")
        );
        assert_eq!(choose_security("http://a/debian bookworm\n"), None);
    }
}
