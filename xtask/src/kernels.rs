//! `cargo xtask kernels`: the agent's eBPF object on the kernels of distributions, in virtual machines without acceleration.
//!
//! For each kernel: fetch it from Debian ([`debian`]), put it with the agent, a few programs of this machine and
//! `flannel-agent/examples/kernel_probe` as `/init` into an initramfs ([`image`]), boot that in QEMU and read what
//! it says ([`guest`]). Needs no root but for the installation of packages.

mod cpio;
mod debian;
mod guest;
mod image;

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use clap::ValueEnum;

use crate::cargo;
use crate::process::{self, Reported};
use crate::setup::{self, Needs};

/// Which kernels, and how.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Only these kernels; may be repeated
    #[arg(long = "kernel", value_enum, value_name = "KERNEL")]
    kernels: Vec<Kernel>,

    /// Architecture of the machines
    #[arg(long, value_enum, default_value_t = Arch::Amd64)]
    arch: Arch,

    /// Look for newer kernel packages, instead of using those fetched before
    #[arg(long)]
    refresh: bool,
}

/// A kernel, by the series that a Debian suite has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Kernel {
    /// Of Debian 11: no tcx, and the oldest flags of `bpf_skb_adjust_room`
    #[value(name = "5.10")]
    V5_10,
    /// Of Debian 12: no tcx
    #[value(name = "6.1")]
    V6_1,
    /// Of Debian 13
    #[value(name = "6.12")]
    V6_12,
    /// Of Debian 13's backports: the newest (7.2 in November 2026)
    #[value(name = "backports", alias = "7.2")]
    Backports,
}

/// What a kernel is known to offer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Expected {
    tcx: bool,
    l2_eth: bool,
}

impl Kernel {
    const fn suite(self) -> &'static str {
        match self {
            Self::V5_10 => "bullseye",
            Self::V6_1 => "bookworm",
            Self::V6_12 => "trixie",
            Self::Backports => "trixie-backports",
        }
    }

    const fn expected(self) -> Expected {
        Expected {
            tcx: matches!(self, Self::V6_12 | Self::Backports),
            l2_eth: !matches!(self, Self::V5_10),
        }
    }
}

/// An architecture, as Debian names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Arch {
    Amd64,
}

impl Arch {
    const fn name(self) -> &'static str {
        match self {
            Self::Amd64 => "amd64",
        }
    }
}

/// What all guests run.
struct Programs {
    /// `/init`.
    probe: PathBuf,
    agent: PathBuf,
}

pub(crate) fn run(root: &Path, args: &Args) -> Result<()> {
    if !setup::is_debian() {
        bail!("the kernels come by apt from Debian: this needs Debian or Ubuntu");
    }
    if cfg!(not(target_arch = "x86_64")) {
        bail!("the machines run programs of this one: so far it must be amd64");
    }
    setup::ensure(root, Needs::Kernels)?;
    let dir = root.join("target").join("kernels");
    let kernels: &[Kernel] = if args.kernels.is_empty() {
        Kernel::value_variants()
    } else {
        &args.kernels
    };
    let programs = build(root)?;
    let base = image::base(&programs)?;
    let mut failed = 0;
    for kernel in kernels {
        if process::interrupted() {
            bail!("interrupted");
        }
        let started = Instant::now();
        let (label, outcome) = match one(&dir, *kernel, args, &base) {
            Ok(done) => done,
            Err(error) => (kernel.suite().to_owned(), Err(format!("{error:#}"))),
        };
        let seconds = started.elapsed().as_secs();
        match outcome {
            Ok(told) => println!("{label}: ok, {told}, {seconds} s"),
            Err(why) => {
                failed += 1;
                println!("{label}: FAILED, {why}, {seconds} s");
            }
        }
    }
    if failed > 0 {
        eprintln!(
            "xtask: {failed} of {} kernels failed; what the machines said is in {}",
            kernels.len(),
            dir.display()
        );
        return Err(Reported.into());
    }
    Ok(())
}

/// The name of a kernel for people, and what it said or why it failed.
type Outcome = (String, Result<String, String>);

fn one(dir: &Path, kernel: Kernel, args: &Args, base: &cpio::Archive) -> Result<Outcome> {
    let arch = args.arch;
    let files = debian::fetch(dir, kernel, arch, args.refresh)?;
    let series = series(&files.release);
    let label = format!("{series} {}", arch.name());
    let name = format!("{series}-{}", arch.name());
    let initrd = dir.join(format!("{name}.cpio"));
    let modules = image::modules(&files)?;
    let mut archive = base.clone();
    image::add_modules(&mut archive, &modules)?;
    archive.write(&initrd)?;
    let log = dir.join(format!("{name}.log"));
    let said = guest::boot(&files.vmlinuz, &initrd, &log)?;
    let outcome =
        guest::judge(&said, kernel.expected()).map_err(|why| format!("{why} ({})", log.display()));
    Ok((label, outcome))
}

/// `5.10` of `5.10.0-32-cloud-amd64`.
fn series(release: &str) -> String {
    release.split('.').take(2).collect::<Vec<_>>().join(".")
}

fn build(root: &Path) -> Result<Programs> {
    eprintln!("building the agent and the guests' program");
    let built = cargo::build(
        root,
        &[
            "build",
            "-p",
            "flannel-agent",
            "--bin",
            "flannel-agent",
            "--example",
            "kernel_probe",
        ],
    )?;
    let find = |kind: &str, target: &str| {
        built
            .iter()
            .find(|executable| executable.kind == kind && executable.target == target)
            .map(|executable| executable.path.clone())
            .with_context(|| format!("cargo built no {kind} `{target}`"))
    };
    Ok(Programs {
        probe: find("example", "kernel_probe")?,
        agent: find("bin", "flannel-agent")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_series_is_the_first_two_numbers() {
        assert_eq!(series("5.10.0-32-cloud-amd64"), "5.10");
        assert_eq!(series("7.2.12+deb13-cloud-amd64"), "7.2");
    }
}
