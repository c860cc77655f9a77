//! `/metrics` of a running agent, against the kernel's own figures and the documentation.

use std::{
    collections::BTreeSet,
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
};

use flannel_testkit::{eventually, http, privileged};
use serde_json::Value;

use crate::rig::{DEVICE, PATIENCE, Rig};

const FLAG: &str = "--metrics-addr=127.0.0.1:9476";

fn scrape(rig: &Rig, node: usize) -> String {
    let address = SocketAddr::from(([127, 0, 0, 1], 9476));
    let answer = http::get(rig.ns(node), address, "/metrics", PATIENCE).expect("an answer");
    assert_eq!(answer.status, 200);
    assert!(
        answer
            .headers
            .contains("content-type: application/openmetrics-text; version=1.0.0; charset=utf-8"),
        "{}",
        answer.headers
    );
    assert!(answer.body.ends_with("# EOF\n"), "{}", answer.body);
    answer.body
}

/// The value of a series, written as in the text.
fn value(text: &str, series: &str) -> Option<f64> {
    text.lines()
        .find_map(|line| line.strip_prefix(series)?.strip_prefix(' '))
        .and_then(|value| value.parse().ok())
}

#[track_caller]
fn wait_for(rig: &Rig, series: &str, wanted: f64) {
    eventually(PATIENCE, series, || {
        let text = scrape(rig, 0);
        match value(&text, series) {
            Some(found) if (found - wanted).abs() < 0.5 => Ok(()),
            found => Err(format!("{found:?}, not {wanted}")),
        }
    });
}

#[test]
fn figures_are_the_kernels() {
    if !privileged() {
        return;
    }
    let rig = Rig::start(2, &["--bpf-fast-path=off", FLAG]);
    wait_for(&rig, "flannel_ready", 1.0);
    wait_for(&rig, "flannel_peers", 1.0);
    let before = scrape(&rig, 0);
    for (series, wanted) in [
        ("flannel_readiness_pending{part=\"lease\"}", 0.0),
        ("flannel_store_connected", 1.0),
        ("flannel_datapath_mode{mode=\"bpf\"}", 1.0),
        ("flannel_datapath_mode{mode=\"kernel\"}", 0.0),
        ("flannel_datapath_rung{rung=\"L1\"}", 1.0),
        ("flannel_datapath_rung{rung=\"L0\"}", 0.0),
        ("flannel_fast_path_mode{mode=\"off\"}", 1.0),
        ("flannel_bpf_map_entries{map=\"subnets\"}", 1.0),
        ("flannel_bpf_map_capacity{map=\"subnets\"}", 256.0),
    ] {
        assert_eq!(value(&before, series), Some(wanted), "{series}\n{before}");
    }
    let hook =
        format!("flannel_bpf_program_attached{{interface=\"{DEVICE}\",hook=\"to_overlay\"}}");
    assert_eq!(value(&before, &hook), Some(1.0), "{before}");

    let encap = "flannel_datapath_packets_total{direction=\"encap\",path=\"stack\"}";
    let first = value(&before, encap).expect("a counter");
    let target = rig.pod(1).ip.to_string();
    rig.pod(0)
        .ns
        .exec(["ping", "-q", "-c", "25", "-i", "0.01", &target])
        .expect("pings");
    let after = scrape(&rig, 0);
    let sent = value(&after, encap).expect("a counter") - first;
    // Neighbours may have been asked for besides.
    assert!((25.0..35.0).contains(&sent), "{sent} packets\n{after}");

    let pid = rig.agents[&0].pid();
    let statm = fs::read_to_string(format!("/proc/{pid}/statm")).expect("statm");
    let pages: f64 = statm
        .split(' ')
        .nth(1)
        .expect("pages")
        .parse()
        .expect("a number");
    let resident = value(&after, "process_resident_memory_bytes").expect("a gauge");
    let ratio = resident / (pages * 4096.0);
    assert!((0.5..2.0).contains(&ratio), "{resident} for {pages} pages");

    // A device that is in the way is counted as repaired.
    let made = "flannel_reconcile_ops_total{op=\"set_up\",outcome=\"done\"}";
    let first = value(&after, made).unwrap_or_default();
    rig.ns(0)
        .exec(["ip", "link", "set", DEVICE, "down"])
        .expect("ip");
    wait_for(&rig, made, first + 1.0);
}

#[test]
fn what_is_lacking_is_told() {
    let Some(mut rig) = super::unconfigured() else {
        return;
    };
    rig.start_agent(0, &[FLAG]);
    eventually(PATIENCE, "the endpoint", || {
        let address = SocketAddr::from(([127, 0, 0, 1], 9476));
        http::get(rig.ns(0), address, "/metrics", PATIENCE).map_err(|error| error.to_string())
    });
    wait_for(
        &rig,
        "flannel_readiness_pending{part=\"network-config\"}",
        1.0,
    );
    wait_for(&rig, "flannel_readiness_pending{part=\"uplink\"}", 0.0);
    wait_for(&rig, "flannel_ready", 0.0);
    let listening = rig.ns(0).exec(["ss", "-Hltn"]).expect("ss");
    assert!(listening.contains("127.0.0.1:9476"), "{listening}");
    assert_eq!(listening.lines().count(), 1, "{listening}");
}

/// Names as in an exposition: those of counters end in `_total`, those of histograms have three endings.
fn exposed(text: &str) -> BTreeSet<String> {
    text.lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.split(['{', ' ']).next())
        .map(|name| {
            ["_bucket", "_sum", "_count"]
                .iter()
                .find_map(|end| name.strip_suffix(end))
                .unwrap_or(name)
                .to_owned()
        })
        .collect()
}

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn documented() -> BTreeSet<String> {
    let text = fs::read_to_string(repository().join("docs/metrics.md")).expect("the documentation");
    text.lines()
        .filter_map(|line| line.strip_prefix("| `")?.split_once('`'))
        .map(|(name, _)| name.to_owned())
        .collect()
}

/// Names of metrics within queries of PromQL.
fn queried(text: &str) -> BTreeSet<String> {
    text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_')
        .filter(|word| word.starts_with("flannel_") || word.starts_with("process_"))
        .map(|name| name.strip_suffix("_bucket").unwrap_or(name).to_owned())
        .collect()
}

#[test]
fn every_metric_is_documented_and_every_query_answered() {
    if !privileged() {
        return;
    }
    let documented = documented();
    let rig = Rig::start(2, &[FLAG]);
    wait_for(&rig, "flannel_peers", 1.0);
    let with_kernel = exposed(&scrape(&rig, 0));
    drop(rig);
    let rig = Rig::start(2, &["--bpf-device=veth", FLAG]);
    wait_for(&rig, "flannel_peers", 1.0);
    let alone = exposed(&scrape(&rig, 0));
    let all: BTreeSet<String> = with_kernel.union(&alone).cloned().collect();
    // One of a kind with labels has no series before its first packet; those of peers are wireguard's (`guest_wireguard`).
    let quiet = [
        "flannel_datapath_passed_total",
        "flannel_datapath_drops_total",
        "flannel_peer_bytes_total",
        "flannel_peer_last_handshake_timestamp_seconds",
    ]
    .map(str::to_owned);
    let all: BTreeSet<String> = all.into_iter().chain(quiet).collect();
    assert_eq!(all, documented);

    let overlay = repository().join("deploy/kustomize/metrics");
    let dashboard = fs::read_to_string(overlay.join("dashboard.json")).expect("the dashboard");
    serde_json::from_str::<Value>(&dashboard).expect("JSON");
    let rules = fs::read_to_string(overlay.join("rules.yaml")).expect("the alert rules");
    for (file, text) in [("dashboard.json", dashboard), ("rules.yaml", rules)] {
        let asked = queried(&text);
        assert!(asked.len() > 4, "{file}: {asked:?}");
        let unknown: Vec<_> = asked.difference(&documented).collect();
        assert!(unknown.is_empty(), "{file} asks for {unknown:?}");
    }
}
