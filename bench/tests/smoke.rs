//! The benchmark as a program: two modes, some short workloads, and the file that it writes; and what the modes rest on. Needs root.

use std::{collections::BTreeSet, fs, process::Command};

use bench_lab::{
    cluster::Backend,
    mode, netfilter,
    result::Results,
    rig::{Plan, Rig, Wire},
};
use flannel_testkit::{Family, json, privileged};

const WORKLOADS: [&str; 4] = ["udp_rr", "udp64", "tcp_crr", "tcp_stream_mtu"];
const MODES: [&str; 2] = ["bpf-no-overlay", "kernel-vxlan-ct"];

#[test]
fn a_short_run_leaves_a_file_with_its_rows_and_pictures() {
    short_run("4", &[""]);
}

#[test]
fn a_short_run_over_both_families_compares_them() {
    let Some(results) = short_run("both", &["", "-v6"]) else {
        return;
    };
    assert!(results.run.beside_v6);
    for workload in WORKLOADS {
        let compared = results
            .families
            .iter()
            .find(|found| found.workload == workload);
        assert!(compared.is_some_and(|found| found.mode == MODES[0] && found.median > 0.0));
    }
}

/// Runs it, and looks for the rows of modes with each of the suffixes.
fn short_run(family: &str, suffixes: &[&str]) -> Option<Results> {
    if !privileged() {
        return None;
    }
    let dir = tempfile::tempdir().expect("a directory");
    let (file, plots) = (dir.path().join("result.json"), dir.path().join("plots"));
    let workloads = format!("{},clusterip_rr", WORKLOADS.join(","));
    let output = Command::new(env!("CARGO_BIN_EXE_bench"))
        .args(["--modes", &MODES.join(","), "--workloads", &workloads])
        .arg(format!("--family={family}"))
        .args(["--rounds=2", "--millis=20", "--json"])
        .arg(&file)
        .arg("--plot")
        .arg(&plots)
        .output()
        .expect("run it");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    let text = fs::read_to_string(&file).expect("the file");
    let results: Results = serde_json::from_str(&text).expect("JSON");
    assert_eq!(results.run.family, 4);
    for workload in WORKLOADS {
        for suffix in suffixes {
            let [of, to] = MODES.map(|mode| format!("{mode}{suffix}"));
            for mode in [&of, &to] {
                let row = results.row(workload, mode).expect(workload);
                assert!(row.median > 0.0 && row.samples == 2, "{row:?}");
            }
            let ratio = results.ratio(workload, &of, &to);
            assert!(
                ratio.is_some_and(|ratio| ratio.lo <= ratio.median && ratio.median <= ratio.hi)
            );
        }
        assert!(plots.join(format!("{workload}.svg")).exists());
        assert!(plots.join(format!("{workload}.png")).exists());
    }
    // Without rules there are no services.
    assert!(results.row("clusterip_rr", "kernel-vxlan-ct").is_some());
    assert!(results.row("clusterip_rr", "bpf-no-overlay").is_none());
    Some(results)
}

#[test]
fn a_mode_without_rules_tracks_nothing_and_one_with_rules_does() {
    if !privileged() {
        return;
    }
    let programs = [
        ("ipv4", "icmp", "iptables-save"),
        ("ipv6", "icmpv6", "ip6tables-save"),
    ];
    for (family, (table, icmp, save)) in Family::ALL.into_iter().zip(programs) {
        for (name, tracked) in [("kernel-vxlan", false), ("kernel-vxlan-ct", true)] {
            let rig = build(name, family);
            for node in rig.nodes() {
                let argv = ["conntrack", "-L", "-f", table, "-p", icmp];
                let listed = node.ns.exec(argv).expect("conntrack");
                // The pods have reached each other with a ping.
                assert_eq!(listed.contains("icmp"), tracked, "{name}: {listed}");
                let rules = node.ns.exec([save]).expect("the rules");
                let used = rules.contains(&format!("-d {}/", netfilter::service_ip(family)));
                assert_eq!(used, tracked, "{name} over {family}");
            }
        }
    }
}

#[test]
fn the_cable_cuts_packets_only_when_told_to() {
    if !privileged() {
        return;
    }
    let rig = build("host-gw", Family::V4);
    for (wire, whole) in [
        (Wire::SuperPackets, true),
        (Wire::MtuFrames, false),
        (Wire::SuperPackets, true),
    ] {
        rig.set_wire(wire).expect("set the offloads");
        for node in rig.nodes() {
            let features = node.ns.exec(["ethtool", "-k", "eth0"]).expect("ethtool");
            let on: BTreeSet<&str> = features
                .lines()
                .filter_map(|line| line.trim().split_once(": on"))
                .map(|(name, _)| name)
                .collect();
            assert_eq!(on.contains("tcp-segmentation-offload"), whole);
            assert_eq!(on.contains("generic-receive-offload"), !whole);
            // One cable, no switch.
            let link = json::link(&node.ns, "eth0").expect("the uplink");
            assert_eq!(link["linkinfo"]["info_kind"], "veth");
            assert!(link["master"].is_null());
        }
    }
}

fn build(name: &str, family: Family) -> Rig {
    let modes = mode::select(&[name.to_owned()], Backend::Vxlan, false, false).expect("a mode");
    Rig::build(modes[0], &Plan::of(family)).expect("a rig")
}
