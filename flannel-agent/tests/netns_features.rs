//! What the agent finds out about the kernel is what the tools say, nothing is left of it, and what follows is done: a program that the
//! verifier refuses, and a helper that does not work, cost their rung and not the node.

#[path = "rig/confined.rs"]
#[expect(dead_code, reason = "every agent here keeps running")]
mod confined;
mod rig;

use std::{collections::BTreeMap, fs, path::PathBuf, time::Duration};

use flannel_testkit::{
    BpfCall, Capability, Confinement, Netns, eventually,
    json::{bpftool_json, ip_json},
    privileged, traffic,
};
use rig::{PATIENCE, Rig, agent_binary, variant};
use serde_json::{Value, json};

/// Features by name, of `status` or `features`.
fn features(answer: &Value) -> BTreeMap<String, Value> {
    let rows = answer["features"].as_array().expect("a list of features");
    rows.iter()
        .map(|row| {
            let name = row["name"].as_str().expect("a name").to_owned();
            (name, row.clone())
        })
        .collect()
}

#[track_caller]
fn tried(rig: &Rig, node: usize) -> Value {
    let said = rig.cli(node, &["features", "-o", "json"]);
    serde_json::from_str(&said.stdout).unwrap_or_else(|error| panic!("{error}: {said:?}"))
}

fn cache(rig: &Rig, node: usize) -> PathBuf {
    rig.subnet_file(node)
        .with_file_name("flannel-features.json")
}

#[track_caller]
fn pings(rig: &Rig) {
    let stats =
        traffic::ping(&rig.pod(0).ns, rig.pod(1).ip, 20, Duration::from_millis(5)).expect("ping");
    assert_eq!(stats.lost, 0, "{stats:?}");
}

/// Everything that an attempt could leave in a namespace.
fn furniture(ns: &Netns) -> Value {
    let qdiscs = ns.exec(["tc", "-j", "qdisc", "show"]).expect("qdiscs");
    json!([ip_json(ns, &["link", "show"]).expect("links"), qdiscs,])
}

#[test]
fn what_is_found_is_what_the_tools_say_and_nothing_is_left() {
    if !privileged() {
        return;
    }
    let rig = Rig::new(1);
    let ns = rig.ns(0);
    let before = furniture(ns);
    let answer = tried(&rig, 0);
    assert_eq!(furniture(ns), before);
    let pins = fs::read_dir("/sys/fs/bpf").expect("the bpf file system");
    let names: Vec<_> = pins
        .filter_map(Result::ok)
        .map(|pin| pin.file_name())
        .collect();
    let left = |name: &&std::ffi::OsString| name.to_string_lossy().starts_with("flannel-try");
    assert_eq!(names.iter().find(left), None);

    let found = features(&answer);
    let is_present = |name: &str| found[name]["finding"] == "present";
    let probed = bpftool_json(ns, &["feature", "probe", "kernel"]).expect("bpftool");
    for kind in ["sched_cls", "xdp"] {
        let there = &probed["program_types"][format!("have_{kind}_prog_type")];
        assert_eq!(is_present(kind), *there, "{kind}");
    }
    for map in ["array", "percpu_array", "hash", "lru_hash"] {
        let there = &probed["map_types"][format!("have_{map}_map_type")];
        assert_eq!(is_present(map), *there, "{map}");
    }
    for (kind, helpers) in [
        (
            "sched_cls",
            &[
                "skb_load_bytes",
                "skb_store_bytes",
                "skb_pull_data",
                "get_hash_recalc",
                "get_prandom_u32",
                "get_smp_processor_id",
                "ktime_get_ns",
                "ktime_get_coarse_ns",
                "check_mtu",
                "csum_level",
                "skb_change_type",
                "redirect",
                "redirect_peer",
                "redirect_neigh",
            ][..],
        ),
        ("xdp", &["xdp_adjust_head", "xdp_adjust_meta"][..]),
    ] {
        let there = &probed["helpers"][format!("{kind}_available_helpers")];
        let there = there.as_array().expect("a list of helpers");
        for helper in helpers {
            let known = there.contains(&json!(format!("bpf_{helper}")));
            assert_eq!(is_present(helper), known, "{helper}: {}", found[*helper]);
        }
    }
    let makes = |words: &[&str]| ns.exec(words).is_ok();
    let vxlan = [
        "ip", "link", "add", "try0", "type", "vxlan", "id", "77", "dstport", "7777",
    ];
    assert_eq!(is_present("vxlan"), makes(&vxlan));
    let veth = [
        "ip", "link", "add", "try1", "type", "veth", "peer", "name", "try2",
    ];
    assert_eq!(is_present("veth"), makes(&veth));
    let clsact = ["tc", "qdisc", "add", "dev", "try1", "clsact"];
    assert_eq!(is_present("clsact"), makes(&clsact));
    let btf = fs::metadata("/sys/kernel/btf/vmlinux").is_ok();
    assert_eq!(is_present("btf"), btf);
}

struct Lacking {
    confinement: Confinement<'static>,
    /// What is absent, and a word of why.
    absent: &'static [(&'static str, &'static str)],
    rung: &'static str,
    /// A rung that is out of reach, and why.
    why_not: (&'static str, &'static str),
}

#[test]
fn what_a_machine_lacks_is_found_and_said() {
    if !privileged() {
        return;
    }
    let cases = [
        Lacking {
            confinement: Confinement {
                no_vxlan: true,
                ..Confinement::FREE
            },
            absent: &[("vxlan", "not supported")],
            rung: "L2",
            why_not: ("L0", "vxlan: "),
        },
        Lacking {
            confinement: Confinement {
                bpf: BpfCall::Fails(libc::ENOSYS),
                ..Confinement::FREE
            },
            absent: &[("bpf", "built without eBPF")],
            rung: "L0",
            why_not: ("L1", "bpf: "),
        },
        Lacking {
            confinement: Confinement {
                bpf: BpfCall::Fails(libc::EPERM),
                ..Confinement::FREE
            },
            absent: &[("bpf", "seccomp")],
            rung: "L0",
            why_not: ("L1", "bpf: "),
        },
        Lacking {
            confinement: Confinement {
                caps: Some(&[Capability::NetAdmin, Capability::NetRaw]),
                ..Confinement::FREE
            },
            absent: &[("bpf", "CAP_BPF is missing")],
            rung: "L0",
            why_not: ("L1", "CAP_BPF is missing"),
        },
    ];
    let mut rig = Rig::new(1);
    for case in cases {
        rig.start_confined(0, &[], &case.confinement);
        rig.wait_ready(0);
        let status = eventually(PATIENCE, "the rung", || {
            let status = rig.status(0);
            if status["standing"]["rung"] == case.rung {
                Ok(status)
            } else {
                Err(status["standing"].to_string())
            }
        });
        let found = features(&status);
        for (name, why) in case.absent {
            assert_eq!(found[*name]["finding"], "absent", "{}", found[*name]);
            let reason = found[*name]["reason"].as_str().expect("a reason");
            assert!(reason.contains(why), "{name}: {reason}");
        }
        let (rung, why) = case.why_not;
        let said = status["standing"]["why_not"][rung]
            .as_str()
            .expect("a reason");
        assert!(said.contains(why), "{rung}: {said}");
        // What cannot be called was not called a defect of the kernel.
        if case.absent[0].0 == "bpf" {
            assert_eq!(found["redirect_peer"]["finding"], "untried");
        }
        rig.kill_agent(0);
    }
}

/// Starts the agent anew with something changed in what its predecessor has left, and gives what it goes by.
#[track_caller]
fn restart_with(rig: &mut Rig, change: impl Fn(&mut Value)) -> Value {
    rig.kill_agent(0);
    let path = cache(rig, 0);
    let text = fs::read_to_string(&path).expect("the findings");
    let mut value: Value = serde_json::from_str(&text).expect("JSON");
    change(&mut value);
    fs::write(&path, value.to_string()).expect("write the findings");
    rig.start_agent(0, &[]);
    rig.wait_ready(0);
    rig.status(0)
}

/// A finding that is not true.
fn lie() -> Value {
    json!({"finding": "absent", "errno": 22, "reason": "as somebody wrote"})
}

#[test]
fn an_earlier_start_is_believed_as_far_as_nothing_can_have_changed() {
    if !privileged() {
        return;
    }
    let mut rig = Rig::start(1, &[]);
    let status = rig.status(0);
    assert_eq!(features(&status)["redirect_peer"]["finding"], "present");
    // In the kernel's own code: believed, and acted upon.
    let status = restart_with(&mut rig, |file| file["findings"]["redirect_peer"] = lie());
    assert_eq!(features(&status)["redirect_peer"], {
        let mut row = features(&status)["redirect_peer"].clone();
        row["finding"] = json!("absent");
        row["reason"] = json!("as somebody wrote");
        row
    });
    eventually(PATIENCE, "the fast path is off", || {
        let fast = rig.status(0)["fast_path"].clone();
        let reason = fast["reason"].as_str().unwrap_or_default().to_owned();
        (fast["mode"] == "off" && reason.contains("as somebody wrote"))
            .then_some(())
            .ok_or(reason)
    });
    assert_eq!(rig.status(0)["standing"]["rung"], "L1");
    // A module may have been loaded since, and a permission given.
    let status = restart_with(&mut rig, |file| {
        file["findings"]["vxlan"] = lie();
        file["findings"]["bpf"] = lie();
        file["findings"]["bpffs"] = lie();
    });
    for name in ["vxlan", "bpf", "bpffs"] {
        assert_eq!(features(&status)[name]["finding"], "present", "{name}");
    }
    // Another boot, another agent, another kernel, other capabilities: none of it holds.
    for part in [
        "boot",
        "agent",
        "kernel",
        "capabilities",
        "label",
        "lockdown",
        "user_namespace",
    ] {
        let status = restart_with(&mut rig, |file| {
            file["findings"]["redirect_peer"] = lie();
            file["key"][part] = json!("of another");
        });
        let found = &features(&status)["redirect_peer"];
        assert_eq!(found["finding"], "present", "{part}");
    }
    let status = restart_with(&mut rig, |file| {
        file["findings"]["redirect_peer"] = lie();
        file["key"] = Value::Null;
    });
    assert_eq!(features(&status)["redirect_peer"]["finding"], "present");
    // Half a file.
    rig.kill_agent(0);
    let path = cache(&rig, 0);
    let text = fs::read_to_string(&path).expect("the findings");
    fs::write(&path, &text[..text.len() / 2]).expect("cut the file");
    rig.start_agent(0, &[]);
    rig.wait_ready(0);
    assert_eq!(
        features(&rig.status(0))["redirect_peer"]["finding"],
        "present"
    );
    assert_eq!(fs::read_to_string(&path).expect("the findings"), text);
}

/// What the agent says of a program that the verifier refuses: one line, and where the rest is.
#[track_caller]
fn assert_refusal(rig: &Rig, said: &str, program: &str) {
    let refused = format!("the verifier refuses program {program}: R0 !read_ok");
    assert!(said.contains(&refused), "{said}");
    let dir = rig.subnet_file(0);
    let file = dir.with_file_name(format!("flannel-verifier-{program}.log"));
    assert!(said.contains(&file.display().to_string()), "{said}");
    let log = fs::read_to_string(&file).expect("the verifier's log");
    assert!(
        log.contains("R0 !read_ok") && log.lines().count() > 1,
        "{log}"
    );
}

fn node_with(broken: &[&str], flags: &[&str]) -> Rig {
    let mut rig = Rig::new(2);
    rig.start_agent(1, &[]);
    let binary = variant::broken_agent(&rig.node(0).run_dir, broken);
    rig.start_binary(0, &binary, flags, &[]);
    for node in 0..2 {
        rig.wait_ready(node);
        rig.add_pod(node);
    }
    rig.wait_converged();
    rig
}

#[test]
fn a_refused_program_of_the_stacks_path_costs_ebpf_and_not_the_node() {
    if !privileged() {
        return;
    }
    for program in ["to_overlay", "from_wire", "probe_room"] {
        let mut rig = node_with(&[program], &[]);
        pings(&rig);
        let status = rig.status(0);
        assert_eq!(status["datapath"]["mode"], "kernel", "{status}");
        assert_eq!(status["standing"]["rung"], "L0");
        let why = status["standing"]["why_not"]["L1"]
            .as_str()
            .expect("a reason");
        assert_refusal(&rig, why, program);
        let log = rig.agent(0).log();
        let complaints = confined::complaints(&log);
        assert_eq!(complaints.len(), 1, "{log}");
        assert_refusal(&rig, complaints[0], program);
        assert!(!rig.instance(0).exists(), "pins on the node");
        // The next start with a program that it takes forgets it.
        rig.kill_agent(0);
        rig.start_binary(0, agent_binary(), &[], &[]);
        rig.wait_ready(0);
        assert_eq!(rig.status(0)["datapath"]["mode"], "bpf");
        let file = format!("flannel-verifier-{program}.log");
        assert!(!rig.subnet_file(0).with_file_name(file).exists());
        pings(&rig);
    }
}

#[test]
fn a_refused_program_of_the_gate_costs_the_fast_path() {
    if !privileged() {
        return;
    }
    for program in ["from_pod", "to_pod", "from_overlay"] {
        let rig = node_with(&[program], &[]);
        pings(&rig);
        let status = eventually(PATIENCE, "L1", || {
            let status = rig.status(0);
            if status["standing"]["rung"] == "L1" {
                Ok(status)
            } else {
                Err(status["standing"].to_string())
            }
        });
        assert_eq!(status["datapath"]["mode"], "bpf", "{status}");
        let why = status["standing"]["why_not"]["L2"]
            .as_str()
            .expect("a reason");
        assert_refusal(&rig, why, program);
        assert!(rig.counters(0).encap > 0, "nothing was carried by eBPF");
    }
}

#[test]
fn a_refused_program_of_xdp_costs_xdp() {
    if !privileged() {
        return;
    }
    let both = ["xdp_decap_frags", "xdp_decap"];
    let rig = node_with(&both, &["--bpf-xdp=native"]);
    let status = eventually(PATIENCE, "no native XDP", || {
        let status = rig.status(0);
        let reason = status["datapath"]["xdp"]["reason"]
            .as_str()
            .unwrap_or_default();
        let refused = reason.contains("the verifier refuses");
        refused
            .then(|| status.clone())
            .ok_or(status["datapath"].to_string())
    });
    pings(&rig);
    assert_eq!(status["datapath"]["xdp"]["attached"], false);
    let why = status["standing"]["why_not"]["L4"]
        .as_str()
        .expect("a reason");
    assert_refusal(&rig, why, "xdp_decap");
    eventually(PATIENCE, "the fast path", || {
        let standing = rig.status(0)["standing"].clone();
        (standing["rung"] == "L2")
            .then_some(())
            .ok_or(standing.to_string())
    });
}
