//! `flannel-agent check` on nodes of a lab: with the daemon up, down and never started, and with one thing broken at a time.

#[path = "netns_check/families.rs"]
mod families;
#[path = "netns_check/faults.rs"]
mod faults;
#[path = "netns_check/firewall.rs"]
mod firewall;
#[path = "netns_check/firewall_v6.rs"]
mod firewall_v6;
#[path = "netns_check/node.rs"]
mod node;
#[path = "netns_check/port.rs"]
mod port;
#[path = "netns_check/store.rs"]
mod store;
#[path = "netns_check/upstream.rs"]
mod upstream;

mod rig;
mod takeover_rig;

use std::collections::BTreeMap;

use flannel_testkit::{eventually, json, privileged, process, process::Finished};
use rig::{DEVICE, PATIENCE, Rig, agent_binary};
use serde_json::Value;

/// The checks by name: status, what was found, what to do.
pub(crate) type Findings = BTreeMap<String, (String, String, String)>;

/// Runs `check` on a node with these words, and gives its answer with the exit code.
#[track_caller]
pub(crate) fn check_with(rig: &Rig, node: usize, words: &[&str]) -> (Findings, i32) {
    let all: Vec<&str> = ["check", "-o", "json"]
        .iter()
        .chain(words)
        .copied()
        .collect();
    let done = rig.cli(node, &all);
    (findings(&done), done.status.code().unwrap_or(-1))
}

/// Runs `check` on a node as an operator would.
#[track_caller]
pub(crate) fn check(rig: &Rig, node: usize) -> (Findings, i32) {
    check_with(rig, node, &[])
}

#[track_caller]
pub(crate) fn findings(done: &Finished) -> Findings {
    let report: Value = serde_json::from_str(&done.stdout)
        .unwrap_or_else(|error| panic!("{error}: {:?} {:?}", done.stdout, done.stderr));
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    report["checks"]
        .as_array()
        .expect("checks")
        .iter()
        .map(|one| {
            let said = (text(&one["status"]), text(&one["found"]), text(&one["fix"]));
            (text(&one["name"]), said)
        })
        .collect()
}

/// The names of the checks that ended so.
pub(crate) fn ended(findings: &Findings, status: &str) -> Vec<String> {
    findings
        .iter()
        .filter(|(_, (ended, ..))| ended == status)
        .map(|(name, _)| name.clone())
        .collect()
}

/// Asserts that exactly this check fails, that its line has `found`, and that its fix has `fix`.
#[track_caller]
pub(crate) fn assert_fails(answer: &(Findings, i32), name: &str, found: &str, fix: &str) {
    let (findings, code) = answer;
    assert_eq!(ended(findings, "FAIL"), [name], "{findings:#?}");
    assert_eq!(*code, 1, "{findings:#?}");
    assert_line(findings, name, found, fix);
}

/// Asserts that this check, and no other but `besides`, warns, that none fails, and what it says.
#[track_caller]
pub(crate) fn assert_warns(
    answer: &(Findings, i32),
    name: &str,
    found: &str,
    fix: &str,
    besides: &[&str],
) {
    let (findings, code) = answer;
    assert_eq!(ended(findings, "FAIL"), [""; 0], "{findings:#?}");
    assert_eq!(*code, 0, "{findings:#?}");
    let warned: Vec<String> = ended(findings, "WARN")
        .into_iter()
        .filter(|name| !besides.contains(&name.as_str()))
        .collect();
    assert_eq!(warned, [name], "{findings:#?}");
    assert_line(findings, name, found, fix);
}

#[track_caller]
fn assert_line(findings: &Findings, name: &str, found: &str, fix: &str) {
    let (_, says, advises) = &findings[name];
    assert!(says.contains(found), "{name}: {says:?} lacks {found:?}");
    assert!(advises.contains(fix), "{name}: {advises:?} lacks {fix:?}");
}

/// Asserts that nothing fails and nothing warns but what is named.
#[track_caller]
pub(crate) fn assert_healthy(answer: &(Findings, i32), warns: &[&str]) {
    let (findings, code) = answer;
    assert_eq!(ended(findings, "FAIL"), [""; 0], "{findings:#?}");
    assert_eq!(ended(findings, "WARN"), warns, "{findings:#?}");
    assert_eq!(*code, 0);
}

#[test]
fn a_healthy_node_passes_and_every_question_is_answered() {
    if !privileged() {
        return;
    }
    let rig = Rig::start(3, &[]);
    for node in 0..3 {
        let answer = check(&rig, node);
        assert_healthy(&answer, &[]);
        assert_eq!(
            ended(&answer.0, "SKIP"),
            ["certificates"],
            "{:#?}",
            answer.0
        );
    }
    let (findings, _) = check(&rig, 0);
    assert!(
        findings["underlay"].1.starts_with("2 of 2 peers answer"),
        "{findings:#?}"
    );
    assert!(
        findings["overlay"]
            .1
            .starts_with("2 of 2 reachable peers answer"),
        "{findings:#?}"
    );
    assert_eq!(
        findings["path-mtu"].1,
        "packets of 1450 bytes pass to 2 peers"
    );
    assert_eq!(findings["port"].1, "UDP port 8472 belongs to flannel.1");
    assert!(
        findings["datapath"]
            .1
            .starts_with("bpf, tcx: to_overlay, from_wire"),
        "{findings:#?}"
    );
    assert!(
        findings["store"].1.contains("the running agent's flags"),
        "{findings:#?}"
    );
    let version = format!("running, version {}", env!("CARGO_PKG_VERSION"));
    assert!(findings["agent"].1.starts_with(&version), "{findings:#?}");

    let (findings, code) = check_with(&rig, 0, &["--no-peers"]);
    assert_eq!(code, 0);
    assert_eq!(
        ended(&findings, "SKIP"),
        ["certificates", "overlay", "path-mtu", "underlay"]
    );
}

#[test]
fn every_way_to_carry_packets_passes() {
    if !privileged() {
        return;
    }
    for (flags, says) in [
        (&["--datapath=kernel"][..], "as --datapath=kernel asks"),
        (
            &["--bpf-attach=clsact"],
            "bpf, clsact: to_overlay, from_wire",
        ),
        (&["--bpf-device=veth"], "bpf, tcx: to_overlay, from_wire"),
        (&["--bpf-xdp=native"], "bpf, tcx: to_overlay, from_wire"),
    ] {
        let mut rig = Rig::start(2, flags);
        let answer = check(&rig, 0);
        assert_healthy(&answer, &[]);
        assert!(answer.0["datapath"].1.contains(says), "{:#?}", answer.0);
        rig.stop_agent(0);
        assert_healthy(&check(&rig, 0), &["agent"]);
    }
}

#[test]
fn a_node_whose_agent_is_down_is_judged_by_what_it_left() {
    if !privileged() {
        return;
    }
    let mut rig = Rig::start(2, &[]);
    assert_eq!(rig.stop_agent(0), 0);
    let answer = check(&rig, 0);
    assert_healthy(&answer, &["agent"]);
    let (findings, _) = &answer;
    assert!(
        findings["agent"].1.starts_with("not running"),
        "{findings:#?}"
    );
    assert!(
        findings["store"].1.contains("what the agent left"),
        "{findings:#?}"
    );
    assert!(findings["overlay"].1.starts_with("1 of 1"), "{findings:#?}");
}

#[test]
fn a_node_where_it_never_ran_is_told_what_it_has() {
    if !privileged() {
        return;
    }
    let mut rig = Rig::new(2);
    rig.start_agent(1, &[]);
    rig.wait_ready(1);
    let dir = format!("--lease-dir={}", rig.lease_dir().display());
    let behind = check_with(&rig, 0, &[&dir]);
    assert_healthy(&behind, &[]);
    let (findings, _) = &behind;
    assert!(
        findings["underlay"].1.starts_with("1 of 1 peers answer"),
        "{findings:#?}"
    );
    assert_eq!(findings["device"].0, "SKIP");
    assert_eq!(findings["port"].1, "UDP port 8472 is free");
    // The daemon's flags are understood before the command as well.
    let done = rig.cli(0, &[&dir, "check", "-ojson"]);
    let before: Vec<_> = findings_without_times(self::findings(&done));
    assert_eq!(before, findings_without_times(behind.0));
}

/// Round trips differ each time.
fn findings_without_times(findings: Findings) -> Vec<(String, String)> {
    findings
        .into_iter()
        .map(|(name, (status, ..))| (name, status))
        .collect()
}

#[test]
fn the_answer_has_two_forms_and_usage_errors_are_told_apart() {
    if !privileged() {
        return;
    }
    let rig = Rig::new(1);
    let dir = format!("--lease-dir={}", rig.lease_dir().display());
    let done = rig.cli(0, &["check", "-o", "json", &dir]);
    let report: Value = serde_json::from_str(&done.stdout).expect("JSON");
    let keys = |value: &Value| -> Vec<String> {
        let object = value.as_object().expect("an object");
        object.keys().cloned().collect()
    };
    assert_eq!(keys(&report), ["checks", "summary"]);
    assert_eq!(keys(&report["summary"]), ["fail", "ok", "skip", "warn"]);
    let mut counted: BTreeMap<String, u64> = BTreeMap::new();
    for one in report["checks"].as_array().expect("checks") {
        assert_eq!(keys(one), ["fix", "found", "name", "status"]);
        let status = one["status"].as_str().expect("a status");
        assert_eq!(
            one["fix"].is_string(),
            matches!(status, "WARN" | "FAIL"),
            "{one}"
        );
        let found = one["found"].as_str().expect("what was found");
        assert!(!found.is_empty() && !found.contains('\n'), "{one}");
        *counted.entry(status.to_lowercase()).or_default() += 1;
    }
    for (status, count) in &counted {
        assert_eq!(report["summary"][status], *count, "{report}");
    }

    let done = rig.cli(0, &["check", &dir]);
    assert_eq!(done.status.code(), Some(0), "{done:?}");
    assert!(!done.stdout.contains('\x1b'), "{done:?}");
    let column = |line: &str| line.find("kernel").or(line.find("uplink"));
    let lines: Vec<&str> = done.stdout.lines().collect();
    assert_eq!(column(lines[0]), Some(6), "{lines:#?}");
    let total = report["checks"].as_array().map_or(0, Vec::len);
    assert!(
        lines
            .last()
            .is_some_and(|line| line.starts_with(&format!("{total} checks: "))),
        "{lines:#?}"
    );
    assert_eq!(done.stderr, "");

    for wrong in [
        &["check", "--timeout=0"][..],
        &["check", "--no-such-flag"],
        &["check", "-o", "yaml"],
        &["check", "--etcd-endpoints"],
    ] {
        let done = rig.cli(0, wrong);
        assert_eq!(done.status.code(), Some(2), "{wrong:?} {done:?}");
        assert_eq!(done.stderr.lines().count(), 1, "{done:?}");
    }
}

/// Everything of a namespace that `check` could disturb, counters left out.
fn dump(rig: &Rig, node: usize) -> Vec<String> {
    let ns = rig.ns(node);
    // The kernel is done with what it does by itself.
    eventually(PATIENCE, "all addresses are settled", || {
        let addresses = json::ip_json(ns, &["addr"])
            .map_err(|error| error.to_string())?
            .to_string();
        if addresses.contains("tentative") {
            return Err(addresses);
        }
        Ok(())
    });
    let mut all: Vec<String> = [
        &["-j", "-d", "link"][..],
        &["-j", "addr"],
        &["-j", "route", "show", "table", "all"],
        &["-j", "rule"],
        &["-j", "neigh", "show", "nud", "permanent"],
    ]
    .iter()
    .map(|words| {
        let mut answer = json::ip_json(ns, words).expect("ip");
        without_timers(&mut answer);
        answer.to_string()
    })
    .collect();
    let mut run = |program: &str, words: &[&str]| {
        let text = process::succeed(ns.command(program).args(words), PATIENCE).expect(program);
        all.push(text);
    };
    run("bridge", &["-j", "fdb", "show"]);
    run("nft", &["-j", "-s", "list", "ruleset"]);
    run("iptables-legacy-save", &[]);
    run("bpftool", &["-j", "net"]);
    run(
        "sysctl",
        &["net.ipv4.ip_forward", "net.ipv4.conf.all.rp_filter"],
    );
    // The file system belongs to the whole machine, the directory to the node.
    let pins = rig.instance(node);
    if pins.exists() {
        let pins = pins.display().to_string();
        run("ls", &["-lR", "--time-style=full-iso", &pins]);
    }
    run("cat", &["/proc/self/net/ip_tables_names"]);
    run(
        "find",
        &[
            &rig.lease_dir().display().to_string(),
            "-newermt",
            "@0",
            "-printf",
            "%p %T@\n",
        ],
    );
    all
}

/// A bridge tells the hundredths of seconds since its last round.
fn without_timers(value: &mut Value) {
    match value {
        Value::Array(all) => all.iter_mut().for_each(without_timers),
        Value::Object(object) => {
            object.retain(|key, _| !key.ends_with("_timer"));
            object.values_mut().for_each(without_timers);
        }
        _ => {}
    }
}

#[test]
fn nothing_on_the_node_is_changed() {
    if !privileged() {
        return;
    }
    let mut rig = Rig::start(2, &[]);
    let before = dump(&rig, 0);
    check(&rig, 0);
    assert_eq!(dump(&rig, 0), before);
    rig.stop_agent(0);
    let before = dump(&rig, 0);
    check(&rig, 0);
    assert_eq!(dump(&rig, 0), before);

    let fresh = Rig::new(1);
    let before = dump(&fresh, 0);
    let dir = format!("--lease-dir={}", fresh.lease_dir().display());
    check_with(&fresh, 0, &[&dir]);
    assert_eq!(dump(&fresh, 0), before);
    assert!(json::link(fresh.ns(0), DEVICE).is_err());
    assert!(!fresh.state_file(0).exists());
    assert!(agent_binary().exists());
}
