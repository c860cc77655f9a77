//! What the maps of the gate hold, through `bpftool`.

use std::time::Duration;

use flannel_testkit::{Netns, json::bpftool_json, traffic::TcpPair};
use serde_json::Value;

use super::{Fast, Gate, Mode};
use crate::rig::list;

/// The bytes of a key or value as `bpftool` prints them.
pub(crate) fn hex_bytes(value: &Value) -> Vec<u8> {
    list(value)
        .iter()
        .map(|byte| {
            let digits = byte.as_str().expect("a byte").trim_start_matches("0x");
            u8::from_str_radix(digits, 16).expect("a byte in hex")
        })
        .collect()
}

/// Deletes every entry of the map pinned at `pin`.
#[track_caller]
pub(crate) fn clear(ns: &Netns, pin: &str) {
    let dump = bpftool_json(ns, &["map", "dump", "pinned", pin]).expect("dump a map");
    // One `bpftool` for all of them.
    let mut batch = String::new();
    for entry in list(&dump) {
        let key: Vec<String> = hex_bytes(&entry["key"])
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        for part in ["map delete pinned ", pin, " key hex ", &key.join(" "), "\n"] {
            batch.push_str(part);
        }
    }
    if batch.is_empty() {
        return;
    }
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), batch).expect("write a file");
    let path = file.path().display().to_string();
    // An entry that the kernel has evicted meanwhile makes the batch end there.
    let done = ns.exec(["bpftool", "batch", "file", &path]);
    if let Err(error) = done {
        let text = format!("{error:#}");
        assert!(text.contains("No such file"), "clear {pin}: {text}");
        clear(ns, pin);
    }
}

impl Gate {
    /// Number of entries of a hash map.
    #[track_caller]
    pub(crate) fn entries(&self, node: usize, map: &str) -> usize {
        list(&self.rig.map_dump(node, map)).len()
    }
}

impl Gate {
    /// Empties the map `flows` on every node that has it: all goes through the stack again.
    #[track_caller]
    pub(crate) fn clear_flows(&self) {
        for (node, mode) in self.modes.iter().enumerate() {
            if *mode != Mode::Off {
                self.clear_map(node, "flows");
            }
        }
    }

    /// Talks until the connection is fast on all of these nodes, and sees that it is.
    pub(crate) fn promote(&self, pair: &mut TcpPair, nodes: &[usize]) -> anyhow::Result<()> {
        for bytes in [1, 100, 1] {
            pair.exchange(bytes)?;
        }
        let before: Vec<Fast> = nodes.iter().map(|node| self.fast(*node)).collect();
        pair.exchange(100)?;
        for (node, before) in nodes.iter().zip(before) {
            let now = self.fast(*node);
            let grown = now.all() - before.all();
            let wanted = if self.modes[*node] == Mode::Off { 0 } else { 2 };
            anyhow::ensure!(
                grown >= wanted && (wanted > 0 || grown == 0),
                "{grown} packets of {} were fast on node {node}: {before:?}, then {now:?}",
                pair.local
            );
        }
        Ok(())
    }

    /// Kills every agent: they would put right what a test writes into the maps.
    pub(crate) fn kill_agents(&mut self) {
        for node in 0..self.modes.len() {
            self.rig.kill_agent(node);
        }
    }

    /// Starts every agent in its node's mode.
    pub(crate) fn start_agents(&mut self) {
        for node in 0..self.modes.len() {
            self.start_agent(node);
        }
        for node in 0..self.modes.len() {
            self.rig.wait_ready(node);
            self.wait_gate(node);
        }
    }

    /// Sets the lease on all nodes, whose agents must not run.
    pub(crate) fn set_lease(&self, lease: Duration) {
        let lease = u64::try_from(lease.as_nanos()).expect("a lease");
        for node in 0..self.modes.len() {
            self.write_config(node, self.layout().lease, &lease.to_ne_bytes());
        }
    }
}
