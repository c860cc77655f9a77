//! An agent among 5 000 nodes of the size that kubelets make them, on the lab's own server.

use super::*;
use std::collections::BTreeSet;
use std::fs;

const NODES: u32 = 5000;
/// What the agent may need, in KiB.
const LIMIT: u64 = 60 * 1024;

#[test]
fn five_thousand_full_size_nodes_of_the_labs_server_fit_into_60_mb() {
    if !privileged() {
        return;
    }
    let wide = r#"{"Network":"10.0.0.0/8","Backend":{"Type":"vxlan"}}"#;
    let mut rig = KubeRig::new(1, wide);
    rig.api().create_full_size_nodes(0..NODES);
    rig.create_node(0);
    rig.start_agent(0, &["--datapath=kernel"]);
    rig.wait_ready(0);
    let peers = |rig: &KubeRig| {
        let routes =
            flannel_testkit::json::ip_json(rig.ns(0), &["route", "show", "dev", rig::DEVICE]);
        let routes = routes.map_err(|error| format!("{error:#}"))?;
        let all: BTreeSet<String> = rig::list(&routes)
            .iter()
            .filter_map(|route| rig::text(route, "dst"))
            .collect();
        Ok::<_, String>(all)
    };
    let wait = |rig: &KubeRig, count: usize| {
        eventually(4 * PATIENCE, "all nodes have a route", || {
            let have = peers(rig)?;
            (have.len() == count)
                .then_some(())
                .ok_or(have.len().to_string())
        });
    };
    wait(&rig, NODES as usize);
    let first = memory(&mut rig);
    // Twice as much comes by at once: every node posts its status, and the list is read a second time.
    for number in 0..NODES {
        let beat = |node: &mut Value| {
            node["status"]["conditions"][4]["lastHeartbeatTime"] = json!("2026-11-21T10:00:00Z")
        };
        rig.api()
            .edit_node(&format!("full-{number:05}"), beat)
            .unwrap();
    }
    rig.api().stop().unwrap();
    rig.api().delete_node("full-00007").unwrap();
    rig.api().compact();
    rig.api().resume().unwrap();
    wait(&rig, NODES as usize - 1);
    let after = memory(&mut rig);
    let asked = rig.api().asked();
    let lists = asked
        .iter()
        .filter(|one| one.path == "/api/v1/nodes" && !one.query.contains("watch"));
    eprintln!("{first}, then {after}; {} lists", lists.count());
    assert!(after.peak < LIMIT, "{after}");
    rig.all_run();
}

/// What a process needs, in KiB.
struct Memory {
    now: u64,
    peak: u64,
    anonymous: u64,
}

impl std::fmt::Display for Memory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Memory {
            now,
            peak,
            anonymous,
        } = self;
        write!(
            f,
            "VmRSS {now} kB (RssAnon {anonymous} kB), VmHWM {peak} kB"
        )
    }
}

fn memory(rig: &mut KubeRig) -> Memory {
    let pid = rig.agent(0).pid();
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        let digits = line.unwrap_or_default().trim_start_matches(':').trim();
        digits.trim_end_matches(" kB").parse().unwrap()
    };
    Memory {
        now: field("VmRSS"),
        peak: field("VmHWM"),
        anonymous: field("RssAnon"),
    }
}
