//! The network namespaces of the test lab, named `fe-<pid>-<n>-<name>` after the process that made them.
//!
//! Other runs may be under way on the same machine: a namespace whose process lives is never ours to judge.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Stdio;

use crate::process;

/// Names of all lab namespaces.
pub(crate) fn list() -> BTreeSet<String> {
    // Without `ip` no lab can have made any.
    let output = process::command("ip")
        .args(["netns", "list"])
        .stderr(Stdio::null())
        .output();
    output.map_or_else(
        |_| BTreeSet::new(),
        |output| parse(&String::from_utf8_lossy(&output.stdout)),
    )
}

/// Those that have appeared since `before` and whose process is gone.
pub(crate) fn leaked_since(before: &BTreeSet<String>) -> Vec<String> {
    list()
        .difference(before)
        .filter(|name| !owner_lives(name))
        .cloned()
        .collect()
}

/// Ends what runs in the namespaces and removes them.
pub(crate) fn remove(names: &[String]) {
    for name in names {
        let pids = process::command("ip")
            .args(["netns", "pids", name])
            .stderr(Stdio::null())
            .output();
        let pids: Vec<u32> = pids.map_or_else(
            |_| Vec::new(),
            |output| {
                String::from_utf8_lossy(&output.stdout)
                    .lines()
                    .filter_map(|pid| pid.parse().ok())
                    .collect()
            },
        );
        if !pids.is_empty() {
            process::kill("KILL", &pids);
        }
        match process::command("ip")
            .args(["netns", "delete", name])
            .status()
        {
            Ok(status) if status.success() => eprintln!("removed namespace {name}"),
            Ok(_) | Err(_) => eprintln!("namespace {name} is left: ip netns delete {name}"),
        }
    }
}

/// Lines read `name` or `name (id: 3)`.
fn parse(list: &str) -> BTreeSet<String> {
    list.lines()
        .filter_map(|line| line.split_whitespace().next())
        .filter(|name| name.starts_with("fe-"))
        .map(str::to_owned)
        .collect()
}

fn owner_lives(name: &str) -> bool {
    owner(name).is_some_and(|pid| Path::new("/proc").join(pid.to_string()).exists())
}

fn owner(name: &str) -> Option<u32> {
    name.strip_prefix("fe-")?.split('-').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_lab_namespaces_are_listed() {
        let names = parse("fe-12-0-node1 (id: 3)\nblue\nfe-12-1-pod\n");
        assert_eq!(
            names.into_iter().collect::<Vec<_>>(),
            ["fe-12-0-node1", "fe-12-1-pod"]
        );
    }

    #[test]
    fn the_owner_is_in_the_name() {
        assert_eq!(owner("fe-4711-2-underlay"), Some(4711));
        assert_eq!(owner("fe-x"), None);
        assert!(owner_lives(&format!("fe-{}-0-x", std::process::id())));
        assert!(
            !owner_lives("fe-4194305-0-x"),
            "beyond the largest pid of Linux"
        );
    }
}
