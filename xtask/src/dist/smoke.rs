//! Starts the programs of an image's files once, before they are packed.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Result, bail};

use super::arch::Arch;
use super::image;
use super::stamp::Stamp;
use crate::archive::output;
use crate::process;

/// Programs that the agent and manifests use, and what each says of itself.
const PROGRAMS: [(&str, &[&str], &str); 8] = [
    ("/usr/sbin/iptables-legacy", &["--version"], "(legacy)"),
    (
        "/usr/sbin/ip6tables-legacy-restore",
        &["--version"],
        "(legacy)",
    ),
    ("/usr/sbin/iptables-restore", &["--version"], "(nf_tables)"),
    (
        "/usr/sbin/ip6tables-nft-save",
        &["--version"],
        "(nf_tables)",
    ),
    ("/bin/ip", &["-V"], "iproute2"),
    ("/bin/kmod", &["--version"], "kmod version"),
    ("/usr/bin/awk", &["BEGIN { print 2 ^ 10 }"], "1024"),
    ("/bin/uname", &["-s"], "Linux"),
];

/// Those that ask the kernel for nftables whatever they are told to do, and scripts, which start other programs. QEMU's emulation of
/// one program can do neither.
const OF_THE_KERNEL: [(&str, &[&str], &str); 5] = [
    ("/usr/sbin/iptables", &["--version"], "(nf_tables)"),
    ("/usr/sbin/ip6tables", &["--version"], "(nf_tables)"),
    ("/usr/sbin/iptables-nft", &["--version"], "(nf_tables)"),
    ("/usr/sbin/nft", &["--version"], "nftables v1."),
    ("/bin/sh", &["-c", "ip -V"], "iproute2"),
];

/// Starts each in the base, with the own files beside it; returns their names.
pub(super) fn run(base: &Path, own: &Path, arch: Arch, stamp: &Stamp) -> Result<String> {
    let mut names = Vec::new();
    let of_the_kernel = OF_THE_KERNEL.iter().filter(|_| Arch::host() == Some(arch));
    for (program, arguments, expected) in PROGRAMS.iter().chain(of_the_kernel) {
        let said = output(
            starting(base, arch, program)
                .args(*arguments)
                .stdin(Stdio::null()),
        )?;
        if !said.contains(expected) {
            bail!(
                "{program} {} of the {arch} image says {said:?} and not {expected:?}",
                arguments.join(" ")
            );
        }
        names.push(program.rsplit('/').next().unwrap_or(program));
    }
    let agent = own.join(image::AGENT);
    let said = output(super::binaries::starting(&agent, arch).arg("--version"))?;
    if !said.contains(&stamp.long_version(arch)) {
        bail!("{} of the {arch} image says {said:?}", image::AGENT);
    }
    names.push("flanneld");
    Ok(names.join(", "))
}

/// The beginning of a command line that starts a program of the base with the base's libraries: in it where the machine is the
/// same, else under emulation.
fn starting(base: &Path, arch: Arch, program: &str) -> Command {
    if Arch::host() != Some(arch) {
        let mut command = process::command(arch.qemu());
        // The name that it is called by decides what it is.
        command.args(["-L".as_ref(), base.as_os_str()]);
        command.args(["-0", program]);
        command.arg(base.join(program.trim_start_matches('/')));
        return command;
    }
    let mut command = if process::is_root() {
        process::command("chroot")
    } else {
        let mut command = process::command("unshare");
        command.args(["--map-root-user", "chroot"]);
        command
    };
    command.arg(base).arg(program);
    command
}
