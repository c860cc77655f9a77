//! Archives that come out the same whenever and by whomever they are made, and the list of their checksums.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context as _, Result, bail};

use super::binaries::Binaries;
use crate::archive::output;
use crate::process;

/// What goes into a tarball as it is in the tree, beside the binaries.
const FROM_TREE: [&str; 9] = [
    "CHANGELOG.md",
    "LICENSE-APACHE",
    "LICENSE-GPL-2.0",
    "LICENSE-MIT",
    "README.md",
    "SECURITY.md",
    "deploy",
    "docs",
    "ARCHITECTURE.md",
];

/// Lays out what a tarball holds, below `dir`.
pub(super) fn stage(root: &Path, dir: &Path, binaries: &Binaries, sbom: &Path) -> Result<()> {
    empty(dir)?;
    for from in FROM_TREE {
        copy(&root.join(from), &dir.join(from))?;
    }
    let script = root.join("deploy/bin/mk-docker-opts.sh");
    for (from, to) in [
        (&binaries.agent, "bin/flannel-agent"),
        (&binaries.plugin, "cni/flannel"),
        (&script, "bin/mk-docker-opts.sh"),
        (&sbom.to_owned(), "sbom.cdx.json"),
    ] {
        copy(from, &dir.join(to))?;
    }
    Ok(())
}

/// Makes `dir` a directory with nothing in it.
pub(super) fn empty(dir: &Path) -> Result<()> {
    if dir.exists() {
        fs::remove_dir_all(dir).with_context(|| format!("remove {}", dir.display()))?;
    }
    fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))
}

/// Copies a file or a directory, making what is above it. Permissions become 0755 for directories and what can be executed, else 0644.
pub(super) fn copy(from: &Path, to: &Path) -> Result<()> {
    let both = || format!("copy {} to {}", from.display(), to.display());
    let meta = fs::metadata(from).with_context(both)?;
    if meta.is_dir() {
        for entry in fs::read_dir(from).with_context(both)? {
            let entry = entry.with_context(both)?;
            copy(&entry.path(), &to.join(entry.file_name()))?;
        }
        return Ok(());
    }
    if let Some(above) = to.parent() {
        fs::create_dir_all(above).with_context(both)?;
    }
    fs::copy(from, to).with_context(both)?;
    let executable = meta.permissions().mode() & 0o100 != 0;
    let mode = if executable { 0o755 } else { 0o644 };
    fs::set_permissions(to, fs::Permissions::from_mode(mode)).with_context(both)
}

/// Writes these entries of `dir` to a tar archive: sorted, owned by root, all of one time.
pub(super) fn tar(dir: &Path, entries: &[String], epoch: u64, to: &Path) -> Result<()> {
    let mut command = process::command("tar");
    command
        .args([
            "--create",
            "--format=gnu",
            "--sort=name",
            "--owner=0",
            "--group=0",
            "--numeric-owner",
            "--hard-dereference",
            "--mode=u=rwX,go=rX",
        ])
        .arg(format!("--mtime=@{epoch}"))
        .arg("--file")
        .arg(to)
        .arg("--directory")
        .arg(dir)
        .arg("--")
        .args(entries)
        // Sorted alike for everybody.
        .env("LC_ALL", "C");
    process::run(command.stdin(Stdio::null()))
}

/// The names in a directory, sorted.
pub(super) fn names(dir: &Path) -> Result<Vec<String>> {
    let reading = || format!("read {}", dir.display());
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).with_context(reading)? {
        let name = entry.with_context(reading)?.file_name();
        let Some(name) = name.to_str() else {
            bail!(
                "{} has a name that is not UTF-8: {}",
                dir.display(),
                name.display()
            );
        };
        names.push(name.to_owned());
    }
    names.sort();
    Ok(names)
}

/// Compresses a file to another, without name and time in it.
pub(super) fn gzip(from: &Path, to: &Path) -> Result<()> {
    let file = File::create(to).with_context(|| format!("create {}", to.display()))?;
    let mut command = process::command("gzip");
    command.args(["-9", "--no-name", "--stdout"]).arg(from);
    process::run(command.stdin(Stdio::null()).stdout(file))
}

/// The SHA-256 of a file, in hexadecimal digits.
pub(super) fn sha256(path: &Path) -> Result<String> {
    let mut command = process::command("sha256sum");
    let said = output(command.arg("--").arg(path).stdin(Stdio::null()))?;
    let digits = said.trim_start_matches('\\').get(..64).unwrap_or_default();
    if digits.len() != 64 || !digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        bail!("sha256sum says {said:?} of {}", path.display());
    }
    Ok(digits.to_owned())
}

/// Writes `SHA256SUMS` for these files of `dir`, as `sha256sum --check` reads it.
pub(super) fn write_sums(dir: &Path, files: &[PathBuf]) -> Result<()> {
    let mut lines = Vec::new();
    for file in files {
        let name = file.strip_prefix(dir).unwrap_or(file).display();
        lines.push(format!("{}  {name}\n", sha256(file)?));
    }
    lines.sort_by(|a, b| a.get(64..).cmp(&b.get(64..)));
    let path = dir.join("SHA256SUMS");
    fs::write(&path, lines.concat()).with_context(|| format!("write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use tempfile::TempDir;

    use super::*;

    fn tree() -> TempDir {
        let dir = TempDir::new().expect("a directory");
        let put = |name: &str, mode| {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().expect("a parent")).expect("a directory");
            fs::write(&path, name).expect("write");
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("permissions");
        };
        put("x/b", 0o600);
        put("x/a", 0o777);
        put("x/c/d", 0o666);
        symlink("a", dir.path().join("x/link")).expect("a link");
        dir
    }

    #[test]
    fn an_archive_depends_on_its_files_alone() {
        let (one, two) = (tree(), tree());
        let make = |dir: &TempDir| {
            let (tarball, packed) = (dir.path().join("t"), dir.path().join("t.gz"));
            tar(dir.path(), &["x".to_owned()], 1_000_000_000, &tarball).expect("tar");
            gzip(&tarball, &packed).expect("gzip");
            sha256(&packed).expect("a sum")
        };
        // Another name, time and place of the archive, another time of the files.
        let file = File::open(two.path().join("x/a")).expect("open");
        file.set_modified(std::time::SystemTime::UNIX_EPOCH)
            .expect("set the time");
        assert_eq!(make(&one), make(&two));
        let list = process::command("tar")
            .args(["--utc", "--full-time", "-tvzf"])
            .arg(one.path().join("t.gz"))
            .output()
            .expect("tar");
        let list = String::from_utf8(list.stdout).expect("UTF-8");
        let words: Vec<_> = list
            .lines()
            .map(|line| line.split_whitespace().collect::<Vec<_>>())
            .map(|words| [words[0], words[1], words[3], words[5]].join(" "))
            .collect();
        assert_eq!(
            words,
            [
                "drwxr-xr-x 0/0 2001-09-09 x/",
                "-rwxr-xr-x 0/0 2001-09-09 x/a",
                "-rw-r--r-- 0/0 2001-09-09 x/b",
                "drwxr-xr-x 0/0 2001-09-09 x/c/",
                "-rw-r--r-- 0/0 2001-09-09 x/c/d",
                "lrwxr-xr-x 0/0 2001-09-09 x/link",
            ]
        );
        fs::write(two.path().join("x/b"), "other").expect("write");
        assert_ne!(make(&one), make(&two));
    }

    #[test]
    fn sums_are_what_sha256sum_checks() {
        let dir = tree();
        let files = ["x/b", "x/a"].map(|name| dir.path().join(name));
        write_sums(dir.path(), &files).expect("write");
        let check = || {
            let mut command = process::command("sha256sum");
            command.args(["--check", "--strict", "SHA256SUMS"]);
            command.current_dir(dir.path()).output().expect("sha256sum")
        };
        let done = check();
        assert_eq!(String::from_utf8_lossy(&done.stdout), "x/a: OK\nx/b: OK\n");
        fs::write(dir.path().join("x/a"), "changed").expect("write");
        assert!(!check().status.success());
    }

    #[test]
    fn a_tarball_has_what_one_installs() {
        let dir = TempDir::new().expect("a directory");
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let any = root.join("Cargo.toml");
        let binaries = Binaries {
            agent: "/bin/true".into(),
            plugin: "/bin/true".into(),
        };
        stage(&root, &dir.path().join("s"), &binaries, &any).expect("stage");
        for (name, mode) in [
            ("bin/flannel-agent", 0o755),
            ("bin/mk-docker-opts.sh", 0o755),
            ("cni/flannel", 0o755),
            ("deploy/systemd/flannel-agent.service", 0o644),
            ("docs/release.md", 0o644),
            ("LICENSE-APACHE", 0o644),
            ("sbom.cdx.json", 0o644),
        ] {
            let path = dir.path().join("s").join(name);
            let meta = fs::metadata(&path).unwrap_or_else(|error| panic!("{name}: {error}"));
            assert_eq!(meta.permissions().mode() & 0o7777, mode, "{name}");
        }
    }
}
