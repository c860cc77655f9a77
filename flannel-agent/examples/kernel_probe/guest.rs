//! The duties of a machine's first process.

use std::{
    fs::{self, File},
    io,
    os::fd::AsRawFd as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, ensure};
use flannel_agent::dataplane::bpf;
use nix::mount::{MsFlags, mount};

/// Where the host has put the kernel modules to load, named so that sorting gives the order.
const MODULES: &str = "/modules";

/// Type and place of the file systems that everything else expects.
const MOUNTS: [(&str, &str); 5] = [
    ("proc", "/proc"),
    ("sysfs", "/sys"),
    ("devtmpfs", "/dev"),
    ("tmpfs", "/run"),
    ("tmpfs", "/tmp"),
];

/// Mounts, loads the modules, and brings the loopback up.
pub(crate) fn set_up() -> anyhow::Result<String> {
    for (kind, place) in MOUNTS {
        fs::create_dir_all(place).with_context(|| format!("create {place}"))?;
        mount(
            Some(kind),
            place,
            Some(kind),
            MsFlags::empty(),
            None::<&str>,
        )
        .with_context(|| format!("mount {kind} on {place}"))?;
    }
    bpf::ensure_bpffs()?;
    let count = load_modules().context("load the kernel modules")?;
    let status = Command::new("ip")
        .args(["link", "set", "lo", "up"])
        .status()
        .context("run ip")?;
    ensure!(status.success(), "ip link set lo up: {status}");
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    Ok(format!("{}, {count} modules loaded", release.trim_end()))
}

fn load_modules() -> anyhow::Result<usize> {
    let entries = fs::read_dir(MODULES)?.collect::<io::Result<Vec<_>>>()?;
    let mut paths: Vec<PathBuf> = entries.into_iter().map(|entry| entry.path()).collect();
    paths.sort();
    for path in &paths {
        load_module(path).with_context(|| format!("load {}", path.display()))?;
    }
    Ok(paths.len())
}

fn load_module(path: &Path) -> io::Result<()> {
    let file = File::open(path)?;
    // SAFETY: the descriptor is open for the duration of the call, and the parameters are a terminated string.
    let answer =
        unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), c"".as_ptr(), 0) };
    match answer {
        0 => Ok(()),
        _ => match io::Error::last_os_error() {
            // Another module has asked for it by itself.
            error if error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
            error => Err(error),
        },
    }
}

/// The kernel's own account of what went wrong: not 0 after a warning or an oops.
pub(crate) fn tainted() -> String {
    fs::read_to_string("/proc/sys/kernel/tainted").map_or_else(
        |error| format!("unknown ({error})"),
        |text| text.trim_end().to_owned(),
    )
}

/// Ends the machine.
pub(crate) fn power_off() {
    // SAFETY: no pointers; nothing is mounted that could lose anything.
    let answer = unsafe { libc::reboot(libc::RB_POWER_OFF) };
    println!("power off: {answer}, {}", io::Error::last_os_error());
}
