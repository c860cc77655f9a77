//! Binaries: built, looked at and started once.

use std::ffi::OsString;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};
use xtask::ebpf;

use super::arch::Arch;
use super::stamp::Stamp;
use crate::archive::output;
use crate::cargo;
use crate::process;

/// What is shipped: package, binary, and what it is called where it is put.
const SHIPPED: [(&str, &str); 2] = [
    ("flannel-agent", "flannel-agent"),
    ("flannel-cni", "flannel"),
];

/// The binaries of one architecture.
#[derive(Clone, Debug)]
pub(super) struct Binaries {
    pub(super) agent: PathBuf,
    pub(super) plugin: PathBuf,
}

/// Builds both for an architecture, with an eBPF object that is the same for all, and copies them to `dir`.
pub(super) fn build(
    root: &Path,
    arch: Arch,
    stamp: &Stamp,
    object: &Path,
    dir: &Path,
) -> Result<Binaries> {
    let mut words = vec![
        "build",
        "--locked",
        "--profile",
        "dist",
        "--target",
        arch.target(),
    ];
    for (package, binary) in SHIPPED {
        words.extend(["-p", package, "--bin", binary]);
    }
    let sysroot = output(
        cargo::rustc(root)
            .args(["--print", "sysroot"])
            .stdin(Stdio::null()),
    )?;
    let built = cargo::build_with(
        root,
        &words,
        &environment(root, arch, stamp, object, Path::new(sysroot.trim())),
    )?;
    fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
    let take = |binary: &str| -> Result<PathBuf> {
        let from = built
            .iter()
            .find(|made| made.kind == "bin" && made.target == binary)
            .with_context(|| format!("cargo names no binary {binary}"))?;
        let to = dir.join(binary);
        fs::copy(&from.path, &to)
            .with_context(|| format!("copy {} to {}", from.path.display(), to.display()))?;
        Ok(to)
    };
    let [(_, agent), (_, plugin)] = SHIPPED;
    Ok(Binaries {
        agent: take(agent)?,
        plugin: take(plugin)?,
    })
}

/// The toolchain, and whatever makes a build the same wherever it is done.
fn environment(
    root: &Path,
    arch: Arch,
    stamp: &Stamp,
    object: &Path,
    sysroot: &Path,
) -> Vec<(String, OsString)> {
    let lower = arch.target().replace('-', "_");
    let mut prefixes = ebpf::source_prefixes(root, sysroot);
    let target = std::env::var_os("CARGO_TARGET_DIR").map(|dir| root.join(dir));
    prefixes.push((target.unwrap_or_else(|| root.join("target")), "/target"));
    let mut rustflags = OsString::from("-Clinker-flavor=ld.lld\x1f-Clink-arg=--build-id=sha1");
    let mut cflags = OsString::from("-ffunction-sections");
    for (prefix, stand_in) in &prefixes {
        // Where it was built is nobody's business, and would make every build another one.
        rustflags.push("\x1f--remap-path-prefix=");
        rustflags.push(prefix);
        rustflags.push(format!("={stand_in}"));
        cflags.push(" -ffile-prefix-map=");
        cflags.push(prefix);
        cflags.push(format!("={stand_in}"));
    }
    let mut all = arch.toolchain().to_vec();
    all.extend([
        (format!("CFLAGS_{lower}"), cflags),
        ("CARGO_ENCODED_RUSTFLAGS".to_owned(), rustflags),
        ("FLANNEL_EBPF_OBJECT".to_owned(), object.into()),
        (
            "FLANNEL_VERSION".to_owned(),
            stamp.long_version(arch).into(),
        ),
    ]);
    all
}

/// Refuses a binary of another architecture, one that needs a loader, and one without a build id.
pub(super) fn inspect(path: &Path, arch: Arch) -> Result<()> {
    let bytes = fs::read(path).with_context(|| format!("read {}", path.display()))?;
    let machine = bytes.get(18..20).and_then(|two| two.try_into().ok());
    let machine = machine.map(u16::from_le_bytes);
    if !bytes.starts_with(b"\x7fELF\x02\x01") || machine != Some(arch.elf_machine()) {
        bail!("{} is no binary for {arch}", path.display());
    }
    let headers = output(
        process::command("readelf")
            .args(["--wide", "--program-headers", "--sections", "--notes"])
            .arg(path)
            .stdin(Stdio::null()),
    )?;
    if headers.contains("INTERP") {
        bail!("{} is not static: it asks for a loader", path.display());
    }
    if headers.contains(" .symtab ") {
        bail!("{} is not stripped", path.display());
    }
    if !headers.contains("Build ID: ") {
        bail!("{} has no build id", path.display());
    }
    Ok(())
}

/// The SHA-256 of a file.
pub(super) fn sha256(path: &Path) -> Result<String> {
    let said = output(process::command("sha256sum").arg(path).stdin(Stdio::null()))?;
    let sum = said.split_whitespace().next();
    let sum = sum.with_context(|| format!("sha256sum says {said:?}"))?;
    Ok(sum.to_owned())
}

/// Refuses an agent that has another eBPF object in it than this one, byte for byte: that of another architecture has the same.
pub(super) fn require_object(agent: &Path, object: &Path) -> Result<()> {
    let read = |path: &Path| fs::read(path).with_context(|| format!("read {}", path.display()));
    let (binary, wanted) = (read(agent)?, read(object)?);
    if wanted.is_empty() || !binary.windows(wanted.len()).any(|part| part == wanted) {
        bail!(
            "{} has another eBPF object in it than {}",
            agent.display(),
            object.display()
        );
    }
    Ok(())
}

/// Starts the binaries, under emulation where the machine is another one.
pub(super) fn try_out(binaries: &Binaries, arch: Arch, stamp: &Stamp) -> Result<()> {
    let mut version = starting(&binaries.agent, arch);
    let said = output(version.arg("--version").stdin(Stdio::null()))?;
    let expected = format!("flannel-agent {}", stamp.long_version(arch));
    if said.trim() != expected {
        bail!("the agent says {:?} and not {expected:?}", said.trim());
    }
    install_conf(binaries, arch)?;
    let mut help = starting(&binaries.agent, arch);
    let said = output(help.arg("--help").stdin(Stdio::null()))?;
    for flag in ["--kube-subnet-mgr", "--etcd-endpoints", "install-conf"] {
        if !said.contains(flag) {
            bail!("the agent's help lacks {flag}");
        }
    }
    ask_plugin(starting(&binaries.plugin, arch))
}

/// Has the agent copy itself, as an init container has it install a CNI configuration: it reads, writes and renames.
fn install_conf(binaries: &Binaries, arch: Arch) -> Result<()> {
    let target = binaries.agent.with_file_name("install-conf.tmp");
    let mut install = starting(&binaries.agent, arch);
    output(
        install
            .arg("install-conf")
            .args([&binaries.plugin, &target])
            .stdin(Stdio::null()),
    )?;
    let same = sha256(&target)? == sha256(&binaries.plugin)?;
    fs::remove_file(&target).with_context(|| format!("remove {}", target.display()))?;
    if !same {
        bail!(
            "{} install-conf has copied something else",
            binaries.agent.display()
        );
    }
    Ok(())
}

/// Asks the CNI plugin which versions of CNI it knows, the one question that changes nothing.
fn ask_plugin(mut command: Command) -> Result<()> {
    command
        .env("CNI_COMMAND", "VERSION")
        .stdin(Stdio::piped())
        .stdout(Stdio::null());
    let mut child = process::spawn(&mut command)?;
    let mut stdin = child.stdin.take().context("the plugin's standard input")?;
    // A plugin that answers without reading has closed it.
    let _read = stdin.write_all(b"{\"cniVersion\":\"1.0.0\"}");
    drop(stdin);
    let status = process::wait(&mut child)?;
    if !status.success() {
        bail!("{} ended with {status}", process::line(&command));
    }
    Ok(())
}

/// The beginning of a command line that starts a binary of that architecture here.
pub(super) fn starting(binary: &Path, arch: Arch) -> Command {
    if Arch::host() == Some(arch) {
        return Command::new(binary);
    }
    let mut command = process::command(arch.qemu());
    command.arg(binary);
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_is_the_targets_alone() {
        let all = environment(
            Path::new("/w"),
            Arch::Arm64,
            &Stamp::example(),
            Path::new("/o"),
            Path::new("/sys"),
        );
        let of = |name: &str| {
            let found = all.iter().find(|(variable, _)| variable == name);
            found.and_then(|(_, value)| value.to_str()).expect(name)
        };
        assert_eq!(
            of("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_MUSL_LINKER"),
            "rust-lld"
        );
        assert!(of("CC_aarch64_unknown_linux_musl").ends_with("cc"));
        let flags = of("CARGO_ENCODED_RUSTFLAGS");
        assert!(
            flags.contains("--remap-path-prefix=/w=/flannel-ebpf"),
            "{flags}"
        );
        assert!(flags.contains("--build-id=sha1"), "{flags}");
        assert_eq!(of("FLANNEL_VERSION"), "0.1.0 (abc, linux/arm64)");
    }

    #[test]
    fn an_agent_with_another_object_is_refused() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = |name: &str, bytes: &[u8]| {
            let path = dir.path().join(name);
            fs::write(&path, bytes).expect("write");
            path
        };
        let object = file("object", b"eBPF object");
        let agent = file("agent", b"ELF, then eBPF object, then more");
        require_object(&agent, &object).expect("it is in there");
        let other = file("other", b"ELF, then eBPF 0bject, then more");
        let why = require_object(&other, &object).expect_err("a bit differs");
        assert!(why.to_string().contains("another eBPF object"), "{why}");
        require_object(&agent, &file("empty", b"")).expect_err("no object");
    }

    #[test]
    fn a_program_of_this_system_is_no_release() {
        let Some(host) = Arch::host() else { return };
        let shell = fs::canonicalize("/bin/sh").expect("a shell");
        let why = inspect(&shell, host).expect_err("it is linked to glibc");
        assert!(why.to_string().contains("not static"), "{why}");
        let other = Arch::ALL.into_iter().find(|arch| *arch != host);
        let why = inspect(&shell, other.expect("two")).expect_err("the wrong machine");
        assert!(why.to_string().contains("no binary for"), "{why}");
    }
}
