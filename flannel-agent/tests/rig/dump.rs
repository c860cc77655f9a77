//! Everything that a node has, in a form in which two looks can be compared.

use std::{collections::BTreeMap, fs, path::Path, process::Command};

use aya::programs::TcAttachType;
use flannel_testkit::{Netns, Node};
use serde_json::{Value, json};

use super::{
    Rig,
    hooks::{hooks, tcx},
};

/// Fields that change by themselves: counters, timers, ages, and what depends on the traffic of the moment.
const VOLATILE: [&str; 26] = [
    // Of the pods' bridge: the least of its ports, of which ours is one.
    "tso_max_size",
    "stats",
    "stats64",
    "used",
    "lastused",
    "confirmed",
    "updated",
    "refcnt",
    "probes",
    "hello_timer",
    "tcn_timer",
    "topology_change_timer",
    "gc_timer",
    "tentative",
    "forward_delay_timer",
    "message_age_timer",
    "hold_timer",
    "bytes",
    "packets",
    "drops",
    "overlimits",
    "requeues",
    "backlog",
    "qlen",
    "loaded_at",
    "pids",
];

/// One look at a node: what was asked, and the answers, line by line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Dump(BTreeMap<String, Vec<String>>);

impl Dump {
    /// Looks at devices, addresses, routes, rules, permanent neighbours, forwarding entries, qdiscs, filters, programs, firewall, and
    /// sysctls of the devices.
    pub(crate) fn of(ns: &Netns) -> Dump {
        let mut all = BTreeMap::new();
        for command in [
            "ip -j -d link show",
            "ip -j -d addr show",
            "ip -j -d route show table all",
            "ip -j -6 route show table all",
            "ip -j rule show",
            "ip -j -6 rule show",
            "ip -j neigh show nud permanent",
            "bridge -j -d fdb show",
            "tc -j qdisc show",
            "nft -j list ruleset",
            "bpftool -j net",
            "iptables-save",
        ] {
            let text = ns
                .exec(command.split(' '))
                .unwrap_or_else(|error| panic!("{command}: {error:#}"));
            all.insert(command.to_owned(), lines(&text));
        }
        for link in names(ns) {
            for side in ["ingress", "egress"] {
                let command = format!("tc -j filter show dev {link} {side}");
                let text = ns.exec(command.split(' ')).unwrap_or_default();
                all.insert(command, lines(&text));
            }
            for (what, side) in [
                ("ingress", TcAttachType::Ingress),
                ("egress", TcAttachType::Egress),
            ] {
                let programs = tcx(ns, &link, side);
                all.insert(
                    format!("tcx {link} {what}"),
                    programs
                        .iter()
                        .map(|program| format!("{program:?}"))
                        .collect(),
                );
            }
        }
        all.insert(
            "ip_forward".into(),
            vec![ns.sysctl("net/ipv4/ip_forward").unwrap_or_default()],
        );
        Dump(all)
    }

    /// The same without every line that names one of these.
    pub(crate) fn without(&self, names: &[&str]) -> Dump {
        let clean = |lines: &Vec<String>| -> Vec<String> {
            let keeps = |line: &&String| !names.iter().any(|name| line.contains(name));
            lines.iter().filter(keeps).cloned().collect()
        };
        let kept = self
            .0
            .iter()
            .filter(|(what, _)| !names.iter().any(|name| what.contains(name)));
        Dump(
            kept.map(|(what, lines)| (what.clone(), clean(lines)))
                .collect(),
        )
    }

    /// The same with every line changed in this way.
    pub(crate) fn map(&self, change: impl Fn(&str) -> String) -> Dump {
        let changed = |lines: &Vec<String>| -> Vec<String> {
            let mut lines: Vec<String> = lines.iter().map(|line| change(line)).collect();
            lines.sort();
            lines
        };
        let all = self.0.iter();
        Dump(
            all.map(|(what, lines)| (what.clone(), changed(lines)))
                .collect(),
        )
    }

    /// What these commands said alone.
    pub(crate) fn only(&self, commands: &[&str]) -> Dump {
        let kept = self
            .0
            .iter()
            .filter(|(what, _)| commands.contains(&what.as_str()));
        Dump(
            kept.map(|(what, lines)| (what.clone(), lines.clone()))
                .collect(),
        )
    }

    /// What differs; empty if nothing does.
    pub(crate) fn diff(&self, now: &Dump) -> Vec<String> {
        let mut found = Vec::new();
        let none = Vec::new();
        for what in self
            .0
            .keys()
            .chain(now.0.keys().filter(|key| !self.0.contains_key(*key)))
        {
            let (was, is) = (
                self.0.get(what).unwrap_or(&none),
                now.0.get(what).unwrap_or(&none),
            );
            found.extend(
                was.iter()
                    .filter(|line| !is.contains(line))
                    .map(|line| format!("- {what}: {line}")),
            );
            found.extend(
                is.iter()
                    .filter(|line| !was.contains(line))
                    .map(|line| format!("+ {what}: {line}")),
            );
        }
        found
    }

    /// Panics with the differences, if there are any.
    #[track_caller]
    pub(crate) fn assert_same(&self, now: &Dump, when: &str) {
        let diff = self.diff(now);
        assert!(
            diff.is_empty(),
            "{when}, this had changed:\n{}",
            diff.join("\n")
        );
    }
}

/// Everything under a directory of the BPF file system: names, and the ids of what is pinned.
pub(crate) fn pins(dir: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let Ok(entries) = fs::read_dir(dir) else {
        return found;
    };
    for path in entries.filter_map(Result::ok).map(|entry| entry.path()) {
        let name = path.display().to_string();
        if path.is_dir() {
            found.push(name);
            found.extend(pins(&path));
            continue;
        }
        let show = |kind: &str| {
            let output = Command::new("bpftool")
                .args(["-j", kind, "show", "pinned", &name])
                .output()
                .expect("run bpftool");
            let value: Option<Value> = serde_json::from_slice(&output.stdout).ok();
            value.filter(|value| value.get("id").is_some())
        };
        let what = ["map", "prog", "link"]
            .iter()
            .find_map(|kind| Some((kind, show(kind)?)));
        found.push(match what {
            Some((kind, value)) => format!("{name}: {kind} {} {}", value["id"], value["prog_id"]),
            None => format!("{name}: ?"),
        });
    }
    found.sort();
    found
}

/// The node's files that the agent writes, byte for byte.
pub(crate) fn files(node: &Node) -> BTreeMap<String, Vec<u8>> {
    ["subnet.env", "flannel-agent.json"]
        .iter()
        .filter_map(|name| Some(((*name).to_owned(), fs::read(node.run_dir.join(name)).ok()?)))
        .collect()
}

impl Rig {
    /// Everything that a node has, its pins, maps and files included.
    pub(crate) fn dump(&self, node: usize) -> Dump {
        let mut dump = Dump::of(self.ns(node));
        dump.0.insert("pins".into(), pins(&self.instance(node)));
        dump.0
            .insert("hooks".into(), vec![format!("{:?}", hooks(self.ns(node)))]);
        if self.map_pin(node, "config").exists() {
            for map in ["config", "subnets", "nodes"] {
                let entries = self.map_dump(node, map);
                dump.0
                    .insert(format!("map {map}"), lines(&entries.to_string()));
            }
        }
        let files = files(self.node(node));
        dump.0.insert(
            "files".into(),
            files
                .iter()
                .map(|(name, bytes)| format!("{name}: {}", String::from_utf8_lossy(bytes)))
                .collect(),
        );
        dump
    }
}

fn names(ns: &Netns) -> Vec<String> {
    let links = flannel_testkit::json::ip_json(ns, &["link", "show"]).expect("list links");
    super::list(&links)
        .iter()
        .filter_map(|link| super::text(link, "ifname"))
        .collect()
}

/// One line for each entry of a JSON list, sorted, without what is volatile; text as it is, without comments.
fn lines(text: &str) -> Vec<String> {
    let mut lines: Vec<String> = match serde_json::from_str::<Value>(text) {
        // All that `bpftool net` says is one entry, of lists by kind of hook.
        Ok(Value::Array(entries))
            if entries
                .iter()
                .any(|entry| entry.get("flow_dissector").is_some()) =>
        {
            let kinds = entries
                .iter()
                .flat_map(|entry| [&entry["xdp"], &entry["tc"]]);
            kinds
                .flat_map(|kind| super::list(kind).to_vec())
                .map(stable)
                .collect()
        }
        Ok(Value::Array(entries)) => entries.into_iter().map(stable).collect(),
        Ok(Value::Object(object)) => match object.get("nftables") {
            Some(Value::Array(entries)) => entries.iter().cloned().map(stable).collect(),
            _ => vec![stable(json!(object))],
        },
        Ok(other) => vec![other.to_string()],
        Err(_) => text
            .lines()
            .filter(|line| !line.starts_with('#'))
            .map(without_counters)
            .collect(),
    };
    // Routes to link-local addresses come when the kernel has made sure that nobody else has the address.
    lines.retain(|line| !line.contains(r#""dst":"fe80::"#));
    lines.sort();
    lines
}

fn stable(mut value: Value) -> String {
    strip(&mut value);
    value.to_string()
}

fn strip(value: &mut Value) {
    match value {
        Value::Object(object) => {
            object.retain(|key, _| !VOLATILE.contains(&key.as_str()));
            object.values_mut().for_each(strip);
        }
        Value::Array(entries) => entries.iter_mut().for_each(strip),
        _ => {}
    }
}

/// `iptables-save` has the counters of the policies in brackets.
fn without_counters(line: &str) -> String {
    line.split(" [").next().unwrap_or(line).to_owned()
}
