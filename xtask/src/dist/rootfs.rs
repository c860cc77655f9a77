//! The image's base: files of Debian's packages for any architecture, unpacked without running anything of theirs.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context as _, Result, bail};

use super::arch::Arch;
use super::bundle;
use super::sbom::Package;
use crate::archive::{self, Apt, output};
use crate::process;

/// Debian 12, whose iptables, nft and ip the agent is tested with.
const SUITE: &str = "bookworm";

/// What the image has, before dependencies.
const WANTED: [&str; 10] = [
    "base-files",
    "busybox-static",
    "ca-certificates",
    "dash",
    "iproute2",
    "iptables",
    "kmod",
    "mawk",
    "netbase",
    "nftables",
];

/// Dependencies that only scripts of packages need, or programs that are taken out: [`PRUNED`].
const NOT_FOLLOWED: [&str; 11] = [
    "cdebconf",
    "debconf",
    "debianutils",
    "dpkg",
    "gawk",
    "libcap2-bin",
    "libcrypt1",
    "libdb5.3",
    "libtirpc3",
    "openssl",
    "original-awk",
];

/// What is taken out again, `*` standing for one directory: documentation, what belongs to a whole system, and the programs and
/// modules that bring Kerberos, Berkeley's database and ATM.
const PRUNED: [&str; 44] = [
    "bin/ss",
    "boot",
    "etc/bindresvport.blacklist",
    "etc/ca-certificates",
    "etc/debian_version",
    "etc/default",
    "etc/dpkg",
    "etc/init.d",
    "etc/issue",
    "etc/issue.net",
    "etc/kernel",
    "etc/profile.d",
    "etc/skel",
    "etc/update-motd.d",
    "home",
    "lib/*/libmvec.so.1",
    "lib/systemd",
    "root",
    "tmp",
    "usr/games",
    "usr/include",
    "usr/lib/*/audit",
    "usr/lib/*/engines-3",
    "usr/lib/*/gconv",
    "usr/lib/*/libssl.so.3",
    "usr/lib/*/ossl-modules",
    "usr/lib/*/tc/q_atm.so",
    "usr/lib/dpkg",
    "usr/lib/systemd",
    "usr/local",
    "usr/sbin/arpd",
    "usr/sbin/update-ca-certificates",
    "usr/share/base-files",
    "usr/share/bash-completion",
    "usr/share/bug",
    "usr/share/dict",
    "usr/share/info",
    "usr/share/initramfs-tools",
    "usr/share/lintian",
    "usr/share/locale",
    "usr/share/man",
    "usr/share/misc",
    "usr/src",
    "var",
];

/// What scripts find beside Debian's own programs, all of them busybox. Not the shell: busybox's takes its own `ip` for iproute2's.
const APPLETS: [&str; 63] = [
    "[",
    "base64",
    "basename",
    "cat",
    "chmod",
    "cmp",
    "cp",
    "cut",
    "date",
    "df",
    "diff",
    "dirname",
    "dmesg",
    "du",
    "echo",
    "env",
    "expr",
    "false",
    "find",
    "grep",
    "head",
    "hostname",
    "id",
    "kill",
    "ln",
    "ls",
    "md5sum",
    "mkdir",
    "mktemp",
    "more",
    "mv",
    "nc",
    "netstat",
    "nslookup",
    "ping",
    "printf",
    "ps",
    "readlink",
    "realpath",
    "rm",
    "rmdir",
    "sed",
    "seq",
    "sha256sum",
    "sleep",
    "sort",
    "stat",
    "tail",
    "tar",
    "tee",
    "test",
    "timeout",
    "top",
    "touch",
    "tr",
    "true",
    "uname",
    "uniq",
    "vi",
    "wc",
    "wget",
    "which",
    "xargs",
];

/// Names that packages have, or that their scripts would have given.
const LINKS: [(&str, &str); 2] = [("bin/sh", "dash"), ("usr/bin/awk", "mawk")];

/// Names that Debian's alternatives would give to the variant for nftables. The agent asks the variants by their own names, too, and
/// takes that in which the node's rules are.
const IPTABLES: [&str; 6] = [
    "iptables",
    "iptables-restore",
    "iptables-save",
    "ip6tables",
    "ip6tables-restore",
    "ip6tables-save",
];

/// Makes the base of an architecture's image in `dir`, and returns what it is made of. `work` is for apt's own files.
pub(super) fn make(arch: Arch, work: &Path, dir: &Path) -> Result<Vec<Package>> {
    let apt = Apt::with_updates(work, SUITE, arch.name())?;
    apt.update()?;
    let names = apt.closure(&WANTED, &NOT_FOLLOWED)?;
    bundle::empty(dir)?;
    let mut control = BTreeMap::new();
    for package in apt.download(&names)? {
        let mut ask = process::command("dpkg-deb");
        ask.arg("--field").arg(&package).stdin(Stdio::null());
        let fields = output(&mut ask)?;
        archive::unpack(&package, dir)?;
        control.insert(field(&fields, "Package")?, fields);
    }
    if control.len() != names.len() {
        bail!(
            "apt has fetched {} packages of {}: {}",
            control.len(),
            names.len(),
            names.join(" ")
        );
    }
    arrange(dir)?;
    let release = dir.join("usr/lib/os-release");
    let release =
        fs::read_to_string(&release).with_context(|| format!("read {}", release.display()))?;
    let distro = distro(&release)?;
    let mut packages = Vec::new();
    for (name, fields) in &control {
        // Where scanners look for the packages of an image without dpkg.
        write(
            &dir.join("var/lib/dpkg/status.d").join(name),
            &format!("{}\n", fields.trim_end()),
            0o644,
        )?;
        packages.push(Package {
            name: name.clone(),
            version: field(fields, "Version")?,
            arch: field(fields, "Architecture")?,
            distro: distro.clone(),
        });
    }
    check(dir)?;
    Ok(packages)
}

/// A field of a package's control file.
fn field(fields: &str, name: &str) -> Result<String> {
    let mut pairs = fields.lines().filter_map(|line| line.split_once(": "));
    let found = pairs.find(|(key, _)| *key == name);
    let (_, value) = found.with_context(|| format!("a package without {name}"))?;
    Ok(value.trim().to_owned())
}

/// `debian-12`, from the text of os-release.
fn distro(release: &str) -> Result<String> {
    let value = |name| {
        let mut pairs = release.lines().filter_map(|line| line.split_once('='));
        let (_, value) = pairs.find(|(key, _)| *key == name)?;
        Some(value.trim_matches('"').to_owned())
    };
    let id = value("ID").zip(value("VERSION_ID"));
    let (id, version) = id.context("os-release names neither ID nor VERSION_ID")?;
    Ok(format!("{id}-{version}"))
}

/// Takes out what is not wanted and adds what the packages' scripts would have made.
fn arrange(dir: &Path) -> Result<()> {
    for pattern in PRUNED {
        for path in matching(dir, pattern)? {
            remove(&path)?;
        }
    }
    keep_copyrights(&dir.join("usr/share/doc"))?;
    certificates(dir)?;
    for applet in APPLETS {
        let link = dir.join("bin").join(applet);
        if fs::symlink_metadata(&link).is_err() {
            symlink("busybox", &link).with_context(|| format!("link {}", link.display()))?;
        }
    }
    for (link, to) in LINKS {
        let link = dir.join(link);
        if fs::symlink_metadata(&link).is_err() {
            symlink(to, &link).with_context(|| format!("link {}", link.display()))?;
        }
    }
    for name in IPTABLES {
        let link = dir.join("usr/sbin").join(name);
        let (family, rest) = name.split_at(name.find('-').unwrap_or(name.len()));
        symlink(format!("{family}-nft{rest}"), &link)
            .with_context(|| format!("link {}", link.display()))?;
    }
    for name in ["dev", "proc", "root", "run", "sys"] {
        let path = dir.join(name);
        fs::create_dir_all(&path).with_context(|| format!("create {}", path.display()))?;
    }
    for (name, text) in [
        (
            "etc/passwd",
            "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/bin/false\n",
        ),
        ("etc/group", "root:x:0:\nnogroup:x:65534:\n"),
        (
            "etc/nsswitch.conf",
            "passwd: files\ngroup: files\nhosts: files dns\nprotocols: files\nservices: files\n",
        ),
    ] {
        write(&dir.join(name), text, 0o644)?;
    }
    Ok(())
}

/// The paths of a pattern in which `*` is any one name.
fn matching(dir: &Path, pattern: &str) -> Result<Vec<PathBuf>> {
    let mut found = vec![dir.to_owned()];
    for part in pattern.split('/') {
        let mut next = Vec::new();
        for above in found {
            if part == "*" {
                if above.is_dir() {
                    let below = bundle::names(&above)?;
                    next.extend(below.iter().map(|name| above.join(name)));
                }
            } else {
                next.push(above.join(part));
            }
        }
        found = next;
    }
    found.retain(|path| fs::symlink_metadata(path).is_ok());
    Ok(found)
}

fn remove(path: &Path) -> Result<()> {
    let is_dir = fs::symlink_metadata(path).is_ok_and(|meta| meta.is_dir());
    let removed = if is_dir {
        fs::remove_dir_all(path)
    } else {
        fs::remove_file(path)
    };
    removed.with_context(|| format!("remove {}", path.display()))
}

/// Of the documentation, what licences ask to be passed on.
fn keep_copyrights(doc: &Path) -> Result<()> {
    for package in bundle::names(doc)? {
        let package = doc.join(package);
        if !fs::symlink_metadata(&package).is_ok_and(|meta| meta.is_dir()) {
            continue;
        }
        for name in bundle::names(&package)? {
            if name != "copyright" {
                remove(&package.join(name))?;
            }
        }
    }
    Ok(())
}

/// All authorities in one file, as update-ca-certificates makes it.
fn certificates(dir: &Path) -> Result<()> {
    let from = dir.join("usr/share/ca-certificates/mozilla");
    let mut bundle = String::new();
    for name in bundle::names(&from)? {
        let path = from.join(name);
        let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        bundle.push_str(text.trim_end());
        bundle.push('\n');
    }
    if !bundle.contains("BEGIN CERTIFICATE") {
        bail!("{} has no certificate", from.display());
    }
    remove(&dir.join("usr/share/ca-certificates"))?;
    write(
        &dir.join("etc/ssl/certs/ca-certificates.crt"),
        &bundle,
        0o644,
    )
}

fn write(path: &Path, text: &str, mode: u32) -> Result<()> {
    let writing = || format!("write {}", path.display());
    if let Some(above) = path.parent() {
        fs::create_dir_all(above).with_context(writing)?;
    }
    fs::write(path, text).with_context(writing)?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).with_context(writing)
}

/// Refuses a base with a library that something needs and nothing brings, and with files that anybody may write to.
fn check(dir: &Path) -> Result<()> {
    let mut files = Vec::new();
    walk(dir, &mut files)?;
    let mut present = BTreeSet::new();
    let mut needed: BTreeMap<String, PathBuf> = BTreeMap::new();
    for path in &files {
        let meta =
            fs::symlink_metadata(path).with_context(|| format!("look at {}", path.display()))?;
        present.extend(path.file_name().map(|name| name.display().to_string()));
        if meta.is_symlink() {
            continue;
        }
        if meta.permissions().mode() & 0o6002 != 0 {
            bail!(
                "{} is writable for anybody, or runs as its owner",
                path.display()
            );
        }
        if !meta.is_file() || !fs::read(path).is_ok_and(|bytes| bytes.starts_with(b"\x7fELF")) {
            continue;
        }
        let mut ask = process::command("readelf");
        ask.arg("--dynamic").arg(path).stdin(Stdio::null());
        for library in libraries(&output(&mut ask)?) {
            needed.insert(library, path.clone());
        }
    }
    let lacking: Vec<_> = needed
        .iter()
        .filter(|(library, _)| !present.contains(*library))
        .map(|(library, by)| format!("{library} (for {})", by.display()))
        .collect();
    if !lacking.is_empty() {
        bail!("the image lacks {}", lacking.join(", "));
    }
    Ok(())
}

/// The libraries in what `readelf --dynamic` prints.
fn libraries(text: &str) -> impl Iterator<Item = String> {
    text.lines()
        .filter(|line| line.contains("(NEEDED)"))
        .filter_map(|line| line.split_once('[')?.1.split_once(']'))
        .map(|(name, _)| name.to_owned())
}

fn walk(dir: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for name in bundle::names(dir)? {
        let path = dir.join(name);
        let is_dir = fs::symlink_metadata(&path).is_ok_and(|meta| meta.is_dir());
        files.push(path.clone());
        if is_dir {
            walk(&path, files)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
