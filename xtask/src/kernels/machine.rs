//! The virtual machines: QEMU without acceleration, all in memory. The kernel's console goes to one file, what the guest's first
//! process has to say through a port of its own to another.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use super::nics::{Cards, Wire};
use crate::dist::arch::Arch;
use crate::process;

const LOOK_EVERY: Duration = Duration::from_millis(200);

/// A machine to start.
pub(super) struct Machine<'a> {
    pub(super) arch: Arch,
    pub(super) vmlinuz: &'a Path,
    pub(super) initrd: &'a Path,
    /// What is added to the kernel's command line.
    pub(super) append: &'a str,
    /// Network cards for labs.
    pub(super) cards: Option<Cards>,
    /// Where the kernel's console goes.
    pub(super) console: PathBuf,
    /// Where the first process's words go.
    pub(super) results: PathBuf,
}

/// How a machine came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// By itself. That is no proof of anything: QEMU's exit code is 0 even after a panic.
    Ended,
    /// It ran too long, and was ended.
    TooLong,
    Interrupted,
}

/// Runs a machine to its end, calling `look` from time to time.
pub(super) fn run(machine: &Machine<'_>, limit: Duration, mut look: impl FnMut()) -> Result<End> {
    // Goes when the machine is gone.
    let wire = machine.cards.map_or(Ok(None), Cards::wire)?;
    let mut child = command(machine, wire.as_ref())?
        .spawn()
        .with_context(|| format!("start {}", program(machine.arch)))?;
    let end = Instant::now() + limit;
    loop {
        look();
        if child.try_wait().context("look after QEMU")?.is_some() {
            return Ok(End::Ended);
        }
        if process::interrupted() || Instant::now() >= end {
            stop(&mut child)?;
            return Ok(if process::interrupted() {
                End::Interrupted
            } else {
                End::TooLong
            });
        }
        thread::sleep(LOOK_EVERY);
    }
}

fn stop(child: &mut Child) -> Result<()> {
    child.kill().context("end QEMU")?;
    child.wait().context("wait for QEMU").map(drop)
}

/// The program that emulates an architecture.
pub(super) const fn program(arch: Arch) -> &'static str {
    match arch {
        Arch::Amd64 => "qemu-system-x86_64",
        Arch::Arm64 => "qemu-system-aarch64",
    }
}

fn command(machine: &Machine<'_>, wire: Option<&Wire>) -> Result<Command> {
    let console = &machine.console;
    let output = File::create(console).with_context(|| format!("create {}", console.display()))?;
    let errors = output.try_clone().context("share the console's file")?;
    // QEMU 7.2 leaves garbage in the flags after cmpxchg16b, and 6.12 falls over it: hence `cx16=off`.
    // On a busy host the kernel sees fewer ticks of its timer than it wants to before it believes that there is one, and panics.
    let (board, cpu, tty) = match machine.arch {
        Arch::Amd64 => ("pc", "Nehalem,cx16=off", "ttyS0 no_timer_check"),
        Arch::Arm64 => ("virt", "cortex-a57", "ttyAMA0"),
    };
    let processors = machine.cards.map_or(1, Cards::processors);
    let append = format!(
        "console={tty} quiet loglevel=5 panic=-1 PATH=/usr/sbin:/usr/bin:/sbin:/bin {}",
        machine.append
    );
    let program = program(machine.arch);
    let mut command = wire.map_or_else(|| process::command(program), |wire| wire.command(program));
    command
        .args(["-accel", "tcg", "-M", board, "-cpu", cpu])
        .args(["-m", "2048", "-nodefaults", "-display", "none"])
        .args(["-serial", "stdio", "-monitor", "none", "-no-reboot"])
        .args(["-device", "virtio-serial-pci"])
        .arg("-chardev")
        .arg(format!(
            "file,id=results,path={}",
            machine.results.display()
        ))
        .args(["-device", "virtserialport,chardev=results,name=results"])
        .args(["-smp", &processors.to_string()])
        .args(machine.cards.map_or_else(Vec::new, Cards::arguments))
        .arg("-kernel")
        .arg(machine.vmlinuz)
        .arg("-initrd")
        .arg(machine.initrd)
        .args(["-append", append.trim_end()])
        .stdin(Stdio::null())
        .stdout(output)
        .stderr(errors);
    Ok(command)
}
