//! Removal of what a lab made, found by its marks alone, so that it works for a run that was killed.
//!
//! Never touches anything without the mark: namespaces by name, processes by [`OWNER_ENV`], bpffs directories by the
//! cookie of a marked namespace, files below the owner's own directory.

use crate::netns::{self, Netns};
use crate::nics::Nics;
use crate::process::{OWNER_ENV, pidfd_kill, pidfd_open};
use crate::state;
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::Duration;

/// Where agents pin their objects, one directory an instance: netns cookie, separator, VNI.
const PIN_ROOT: &str = "/sys/fs/bpf/flannel";

/// The name prefix of everything that belongs to one lab of one process.
pub(crate) fn prefix(pid: u32, lab: u32) -> String {
    format!("fe-{pid}-{lab}-")
}

/// The lab prefix in a namespace name: `fe-12-3-n0` gives `fe-12-3-`.
pub(crate) fn prefix_of(name: &str) -> &str {
    let end = name
        .match_indices('-')
        .nth(2)
        .map_or(name.len(), |(at, _)| at + 1);
    &name[..end]
}

/// Removes everything that carries `prefix`: processes first, then pins, then namespaces. Network cards return.
pub(crate) fn sweep_prefix(prefix: &str, nics: Option<&Nics>) {
    kill_marked(prefix);
    for ns in namespaces().filter(|ns| ns.name().starts_with(prefix)) {
        // An entry without a namespace mounted (left by a reboot) has no cookie and no pins.
        if let Ok(cookie) = ns.cookie() {
            remove_pins(Path::new(PIN_ROOT), cookie);
        }
        // A card that is left in there comes back as well, some time and under some name.
        if let Some(Err(err)) = nics.map(|nics| nics.take_back(&ns)) {
            eprintln!("flannel-testkit: sweep: {err:#}");
        }
        if let Err(err) = ns.delete() {
            eprintln!("flannel-testkit: sweep: {err:#}");
        }
    }
}

/// Removes all that process `pid` made, dead or alive.
pub(crate) fn sweep_pid(pid: u32) {
    sweep_prefix(&format!("fe-{pid}-"), Nics::from_env().as_ref());
    drop(fs::remove_dir_all(state::dir_of(pid)));
}

/// Removes all that processes which no longer run made; gives their pids.
pub(crate) fn sweep_dead() -> Vec<u32> {
    let named = namespaces().filter_map(|ns| owner_of(ns.name()));
    let owners: BTreeSet<u32> = state::owners().into_iter().chain(named).collect();
    let dead: Vec<u32> = owners
        .into_iter()
        .filter(|pid| !state::is_alive(*pid))
        .collect();
    for pid in &dead {
        sweep_pid(*pid);
    }
    dead
}

/// Kills the processes whose environment carries a mark that begins with `prefix`.
fn kill_marked(prefix: &str) {
    let mark = format!("{OWNER_ENV}={prefix}");
    // A killed parent may have forked meanwhile: look again until nothing is found.
    for _ in 0..10 {
        let found = processes().filter(|pid| kill_if_marked(*pid, mark.as_bytes()));
        if found.count() == 0 {
            return;
        }
    }
}

fn kill_if_marked(pid: u32, mark: &[u8]) -> bool {
    // The handle comes first: what is read after it is about this very process, not a successor of its pid.
    let Ok(pidfd) = pidfd_open(pid) else {
        return false;
    };
    let Ok(environ) = fs::read(format!("/proc/{pid}/environ")) else {
        return false;
    };
    // A zombie's environment reads as empty.
    if !environ
        .split(|byte| *byte == 0)
        .any(|var| var.starts_with(mark))
    {
        return false;
    }
    pidfd_kill(&pidfd, Duration::from_secs(5)).is_ok()
}

fn processes() -> impl Iterator<Item = u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|pid| *pid != std::process::id())
}

fn namespaces() -> impl Iterator<Item = Netns> {
    let entries = fs::read_dir(netns::DIR).into_iter().flatten().flatten();
    entries.filter_map(|entry| Some(Netns::existing(entry.file_name().to_str()?)))
}

/// The pid in a name of ours; a name of any other form gives `None`.
fn owner_of(name: &str) -> Option<u32> {
    let mut parts = name.strip_prefix("fe-")?.splitn(3, '-');
    let pid = parts.next()?.parse().ok()?;
    parts.next()?.parse::<u32>().ok()?;
    parts.next()?;
    Some(pid)
}

/// Removes the pins of one namespace's instances; the kernel then detaches and frees the programs.
fn remove_pins(root: &Path, cookie: u64) {
    let cookie = cookie.to_string();
    // The separator is the agent's choice (bpffs itself refuses dots), but never a digit.
    let is_mine = |name: &str| {
        let rest = name.strip_prefix(&cookie);
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '-', '_']))
    };
    for entry in fs::read_dir(root).into_iter().flatten().flatten() {
        if entry.file_name().to_str().is_some_and(is_mine) {
            remove_tree(&entry.path());
        }
    }
}

/// Like `remove_dir_all`, going on after an error.
fn remove_tree(dir: &Path) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_tree(&entry.path());
        } else {
            drop(fs::remove_file(entry.path()));
        }
    }
    if let Err(err) = fs::remove_dir(dir) {
        eprintln!("flannel-testkit: sweep: remove {}: {err}", dir.display());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_our_form_have_an_owner() {
        assert_eq!(owner_of("fe-12-3-n0"), Some(12));
        assert_eq!(owner_of("fe-12-3-n0p1"), Some(12));
        for other in [
            "fe-12",
            "fe-12-3",
            "fe-x-3-n0",
            "fe-12-x-n0",
            "cni-12-3-n0",
            "fe--3-n0",
        ] {
            assert_eq!(owner_of(other), None, "{other}");
        }
    }

    #[test]
    fn only_the_pins_of_the_cookie_go() {
        let root = tempfile::tempdir().unwrap();
        let path = |name: &str| root.path().join(name);
        for name in [
            "41.1/maps",
            "41-2",
            "41_200",
            "41",
            "4.1/maps",
            "411.1",
            "x41.1",
            "41x",
        ] {
            fs::create_dir_all(path(name)).unwrap();
        }
        fs::write(path("41.1/maps/nodes"), "").unwrap();
        fs::write(path("41.1/link"), "").unwrap();
        remove_pins(root.path(), 41);
        let left = fs::read_dir(root.path()).unwrap();
        let left: BTreeSet<_> = left.map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(
            left,
            ["4.1", "411.1", "x41.1", "41x"].map(Into::into).into()
        );
        remove_pins(&path("nowhere"), 41);
    }

    #[test]
    fn the_prefix_of_one_lab_is_not_that_of_another() {
        assert_eq!(prefix_of("fe-12-3-n0p1"), prefix(12, 3));
        assert!(!"fe-12-31-n0".starts_with(&prefix(12, 3)));
    }
}
