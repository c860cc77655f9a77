//! Log lines in each shape, and what a signal makes of a running agent.

use std::{fs, process::Command};

use flannel_testkit::privileged;
use regex::Regex;
use serde_json::Value;

use super::{configure, unconfigured};
use crate::rig::{NET_CONF, PATIENCE, Rig, agent_binary};

/// Lines of flanneld v0.28.9.
const UPSTREAM: &[&str] = &[
    "I1120 22:23:09.181598   15982 main.go:253] Created subnet manager: Etcd Local Manager with Previous Subnet: None",
    "W1120 22:23:09.177186   15982 registry.go:84] no certificate provided: connecting to etcd with http. This is insecure",
    "I1120 22:23:09.231889   15982 local_manager.go:209] Allocated lease (ip: 10.5.65.0/24 ipv6: ::/0) to current node (192.168.77.11) ",
];

/// What others look for, in the order in which a node comes up.
const LOOKED_FOR: &[&str] = &[
    "Using interface with name eth0 and address 192.168.77.11",
    "Defaulting external address to interface address (192.168.77.11)",
    "Found network config - Backend type: vxlan",
    "VXLAN config: VNI=1 Port=0 GBP=false Learning=false DirectRouting=false",
    "Lease acquired: 10.244.1.0/24",
    "Wrote subnet file to ",
    "flannel is ready",
    "Running backend.",
    "shutdownHandler sent cancel signal...",
    "Waiting for all goroutines to exit",
    "Exiting cleanly...",
];

fn klog() -> Regex {
    let text =
        r"^[IWE](\d{4} \d\d):\d\d:\d\d\.\d{6} ( {0,6}\d{1,7}) [a-z_]+\.(?:go|rs):\d+\] \S.*$";
    Regex::new(text).expect("an expression")
}

/// Month, day and hour where `zone` is.
fn hour(zone: &str) -> String {
    let mut date = Command::new("date");
    let output = date.env("TZ", zone).arg("+%m%d %H").output().expect("date");
    String::from_utf8(output.stdout)
        .expect("ASCII")
        .trim()
        .to_owned()
}

#[test]
fn klog_lines_have_upstreams_shape_and_words() {
    let klog = klog();
    for line in UPSTREAM {
        assert!(klog.is_match(line), "{line}");
    }
    if !privileged() {
        return;
    }
    let mut rig = Rig::new(1);
    let zone = "HERE-05:00";
    let begun = hour(zone);
    rig.start_binary(0, agent_binary(), &["-log-format=klog"], &[("TZ", zone)]);
    rig.wait_ready(0);
    let pid = rig.agent(0).pid().to_string();
    rig.agent(0).sigterm().expect("SIGTERM");
    assert_eq!(rig.agent(0).wait(PATIENCE).expect("it ends"), 0);
    let ended = hour(zone);
    let log = rig.agent(0).log();
    for line in log.lines() {
        let found = klog.captures(line).unwrap_or_else(|| panic!("{line:?}"));
        assert!([&begun, &ended].contains(&&found[1].to_owned()), "{line}");
        assert_eq!(format!("{:>7}", found[2].trim()), found[2], "{line}");
        assert_eq!(found[2].trim(), pid, "{line}");
    }
    let mut rest = log.as_str();
    for words in LOOKED_FOR {
        let at = rest.find(words);
        rest = &rest[at.unwrap_or_else(|| panic!("no {words:?}, or too early: {log}"))..];
    }
    assert!(log.contains("] flannel is ready datapath=\""), "{log}");
}

#[test]
fn json_lines_are_objects() {
    if !privileged() {
        return;
    }
    let mut rig = Rig::new(1);
    rig.start_agent(0, &["--log-format=json", "-v=1"]);
    rig.wait_ready(0);
    assert_eq!(rig.stop_agent(0), 0);
    let log = fs::read_to_string(rig.node(0).run_dir.join("agent.log")).expect("the log");
    let mut levels = Vec::new();
    for line in log.lines() {
        let value: Value =
            serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
        assert!(value["message"].is_string(), "{line}");
        assert!(value["timestamp"].is_string(), "{line}");
        levels.push(value["level"].as_str().expect("a level").to_owned());
    }
    assert!(levels.contains(&"INFO".to_owned()), "{levels:?}");
    assert!(levels.contains(&"DEBUG".to_owned()), "{levels:?}");
}

#[test]
fn rust_log_has_the_last_word() {
    let Some(mut rig) = unconfigured() else {
        return;
    };
    let env = [("RUST_LOG", "warn")];
    rig.start_binary(0, agent_binary(), &["-v=2"], &env);
    rig.agent(0)
        .wait_log("Couldn't fetch network config: ", PATIENCE)
        .expect("a warning");
    assert_eq!(rig.stop_agent(0), 0);
    let log = fs::read_to_string(rig.node(0).run_dir.join("agent.log")).expect("the log");
    assert!(!log.contains("INFO") && !log.contains("TRACE"), "{log}");
}

#[test]
fn an_agent_that_waits_ends_cleanly_too() {
    for signal in [libc::SIGTERM, libc::SIGINT] {
        let Some(mut rig) = unconfigured() else {
            return;
        };
        rig.start_agent(0, &["--log-format=klog"]);
        rig.agent(0)
            .wait_log("Couldn't fetch network config: ", PATIENCE)
            .expect("it waits");
        rig.agent(0).signal(signal).expect("a signal");
        assert_eq!(rig.agent(0).wait(PATIENCE).expect("it ends"), 0);
        let log = rig.agent(0).log();
        for words in &LOOKED_FOR[LOOKED_FOR.len() - 3..] {
            assert!(log.contains(&format!("] {words}\n")), "{words}: {log}");
        }
    }
}

#[test]
fn a_hangup_is_deadly_as_to_upstream() {
    let Some(mut rig) = unconfigured() else {
        return;
    };
    configure(&rig, NET_CONF);
    rig.start_agent(0, &[]);
    rig.wait_ready(0);
    rig.agent(0).signal(libc::SIGHUP).expect("a signal");
    assert_eq!(rig.agent(0).wait(PATIENCE).expect("it ends"), 129);
    assert!(rig.subnet_file(0).exists());
}
