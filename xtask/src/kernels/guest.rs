//! Booting a guest, and reading from its console how it went.

use std::fs::{self, File};
use std::path::Path;
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use super::{Expected, image};
use crate::process;

/// How the guest's program begins the lines that are for us.
const MARK: &str = "kernel_probe: ";
/// Many times what a guest needs on an idle machine (half a minute).
const LIMIT: Duration = Duration::from_mins(10);
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Boots a machine, waits for its end, and returns its console.
pub(super) fn boot(vmlinuz: &Path, initrd: &Path, log: &Path) -> Result<String> {
    let console = File::create(log).with_context(|| format!("create {}", log.display()))?;
    let errors = console.try_clone().context("share the console's file")?;
    let append = format!(
        "console=ttyS0 quiet loglevel=5 panic=-1 PATH=/usr/sbin:/usr/bin:/sbin:/bin FLANNEL_AGENT={}",
        image::AGENT
    );
    let mut command = process::command("qemu-system-x86_64");
    // QEMU 7.2 leaves garbage in the flags after cmpxchg16b, and 6.12 falls over it: hence `cx16=off`.
    command
        .args(["-accel", "tcg", "-M", "pc", "-cpu", "Nehalem,cx16=off"])
        .args(["-smp", "1", "-m", "1024", "-nodefaults", "-display", "none"])
        .args(["-serial", "stdio", "-monitor", "none", "-no-reboot"])
        .args(cards())
        .arg("-kernel")
        .arg(vmlinuz)
        .arg("-initrd")
        .arg(initrd)
        .args(["-append", &append])
        .stdin(Stdio::null())
        .stdout(console)
        .stderr(errors);
    let mut child = process::spawn(&mut command)?;
    let end = Instant::now() + LIMIT;
    while child.try_wait().context("look after QEMU")?.is_none() && Instant::now() < end {
        thread::sleep(LOOK_EVERY);
    }
    if child.try_wait().context("look after QEMU")?.is_none() {
        eprintln!("xtask: the machine still runs after {LIMIT:?}: ending it");
        child.kill().context("end QEMU")?;
    }
    process::wait(&mut child)?;
    let bytes = fs::read(log).with_context(|| format!("read {}", log.display()))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Two network cards on one wire, whose driver has native XDP.
fn cards() -> Vec<String> {
    let card = |number: u8| {
        [
            "-netdev".to_owned(),
            format!("hubport,id=card{number},hubid=0"),
            "-device".to_owned(),
            format!("virtio-net-pci,netdev=card{number},romfile=,mac=52:54:00:00:79:0{number}"),
        ]
    };
    [card(1), card(2)].concat()
}

/// What a console says: a summary, or what went wrong first. QEMU's own exit code is 0 even after a panic.
pub(super) fn judge(console: &str, expected: Expected) -> Result<String, String> {
    let lines: Vec<&str> = console
        .lines()
        .filter_map(|line| line.trim_end().split_once(MARK))
        .map(|(_, rest)| rest)
        .collect();
    if let Some(failed) = lines.iter().find_map(|line| line.strip_prefix("FAILED ")) {
        return Err(failed.to_owned());
    }
    let end = lines.iter().find_map(|line| line.strip_prefix("end "));
    match end {
        None => return Err(format!("it did not come to its end: {}", last(console))),
        Some("tainted=0") => {}
        Some(other) => return Err(format!("the kernel warned: {other}")),
    }
    let fact = |name: &str| {
        lines
            .iter()
            .filter_map(|line| line.strip_prefix("fact "))
            .find_map(|fact| fact.strip_prefix(name)?.strip_prefix(' '))
            .ok_or_else(|| format!("no word about {name}"))
    };
    let attach = fact("attach")?;
    let l2_eth = fact("l2_eth")?;
    let l4_udp = fact("decap_l4_udp")?;
    let found = Expected {
        tcx: attach == "tcx",
        l2_eth: l2_eth == "true",
    };
    if found != expected {
        return Err(format!("found {found:?}, expected {expected:?}"));
    }
    let with = |yes: bool, name: &str| {
        if yes {
            name.to_owned()
        } else {
            format!("no {name}")
        }
    };
    Ok([
        attach.to_owned(),
        with(found.l2_eth, "L2_ETH"),
        with(l4_udp == "true", "DECAP_L4_UDP"),
    ]
    .join(", "))
}

fn last(console: &str) -> &str {
    let mut lines = console.lines().rev().map(str::trim);
    lines
        .find(|line| !line.is_empty())
        .unwrap_or("it said nothing")
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEW: Expected = Expected {
        tcx: true,
        l2_eth: true,
    };
    const GOOD: &str = "[    1.0] something\r\nkernel_probe: fact attach tcx\r\nkernel_probe: fact l2_eth true\r\n\
                        kernel_probe: fact decap_l4_udp false\r\nkernel_probe: ok load: fine\r\nkernel_probe: end tainted=0\r\n";

    #[test]
    fn a_good_console_is_summed_up() {
        assert_eq!(
            judge(GOOD, NEW).as_deref(),
            Ok("tcx, L2_ETH, no DECAP_L4_UDP")
        );
    }

    #[test]
    fn everything_else_is_a_failure() {
        let old = Expected {
            tcx: false,
            l2_eth: false,
        };
        for (console, expected, why) in [
            (GOOD.replace("end tainted=0", ""), NEW, "did not come"),
            (GOOD.replace("tainted=0", "tainted=512"), NEW, "warned"),
            (GOOD.replace("ok load", "FAILED load"), NEW, "load: fine"),
            (GOOD.to_owned(), old, "expected"),
            (String::new(), NEW, "it said nothing"),
        ] {
            let error = judge(&console, expected).expect_err(why);
            assert!(error.contains(why), "{error}");
        }
    }
}
