//! What a node has less of than it could, and gets, or loses, while traffic runs: the vxlan module, the right to load eBPF, the bpf file
//! system. It goes up and down between its ways to carry a packet, and no packet is lost.

#[path = "rig/confined.rs"]
mod confined;
mod rig;

use std::{fs, os::unix::fs::PermissionsExt as _, path::PathBuf, process::Command, time::Duration};

use flannel_testkit::{
    BpfCall, Capability, Confinement, eventually,
    json::link,
    privileged,
    traffic::{FloodPing, TcpFlow},
};
use rig::{
    DEVICE, PATIENCE, Rig, agent_binary,
    hooks::{Hooks, hooks},
};

/// 1 kHz.
const EVERY: Duration = Duration::from_millis(1);
/// The longest time for which a stream may stand still: less than the kernel waits before it repeats a first lost segment twice.
const STALL: Duration = Duration::from_secs(1);
/// What a stream sends, in bytes a second.
const RATE: u32 = 5_000_000;
/// The time within which a node notices by itself that it could do better: the first attempts come soon, later ones every five minutes.
const NOTICED: Duration = Duration::from_mins(2);
/// Every packet over the device: past it nothing would show.
const SLOW: &str = "--bpf-fast-path=off";

const FREE: Confinement<'static> = Confinement {
    caps: None,
    bpf: BpfCall::Allowed,
    no_vxlan: false,
};
const NO_VXLAN: Confinement<'static> = Confinement {
    caps: None,
    bpf: BpfCall::Allowed,
    no_vxlan: true,
};
/// What flannel's own manifest grants.
const UPSTREAM: Confinement<'static> = Confinement {
    caps: Some(&[Capability::NetAdmin, Capability::NetRaw]),
    bpf: BpfCall::Allowed,
    no_vxlan: false,
};

/// Pings and streams between the pods of nodes 0 and 1 in both directions, and pings from node 0 itself.
struct Traffic {
    pings: Vec<FloodPing>,
    streams: Vec<TcpFlow>,
}

impl Traffic {
    fn start(rig: &Rig) -> Traffic {
        let (a, b) = (rig.pod(0), rig.pod(1));
        let ping = |ns, ip| FloodPing::start(ns, ip, EVERY).expect("a flood");
        let stream = |from: &flannel_testkit::Pod, to: &flannel_testkit::Pod| {
            TcpFlow::start_paced(&to.ns, to.ip, &from.ns, RATE).expect("a stream")
        };
        Traffic {
            pings: vec![ping(&a.ns, b.ip), ping(&b.ns, a.ip), ping(rig.ns(0), b.ip)],
            streams: vec![stream(a, b), stream(b, a)],
        }
    }

    /// No ping and no segment was lost, and nothing stood still.
    #[track_caller]
    fn assert_untouched(self) {
        let pings: Vec<_> = self
            .pings
            .into_iter()
            .map(|ping| ping.stop().expect("the account"))
            .collect();
        let streams: Vec<_> = self
            .streams
            .into_iter()
            .map(|tcp| tcp.stop().expect("the account"))
            .collect();
        for ping in pings {
            assert_eq!(ping.lost, 0, "{ping:?}");
            assert!(ping.sent > 100, "{ping:?}");
        }
        for tcp in streams {
            assert_eq!(tcp.lost, 0, "{tcp:?}");
            assert!(tcp.longest_stall <= STALL, "{tcp:?}");
        }
    }
}

/// Two nodes with a pod each that know each other; node 0 is confined.
fn two_nodes(flags: &[&str], confinement: &Confinement<'_>) -> Rig {
    let mut rig = Rig::new(2);
    rig.start_confined(0, flags, confinement);
    rig.start_agent(1, &[SLOW]);
    for node in 0..2 {
        rig.wait_ready(node);
        rig.add_pod(node);
    }
    rig.wait_converged();
    rig
}

fn restart(rig: &mut Rig, flags: &[&str], confinement: &Confinement<'_>) {
    rig.kill_agent(0);
    rig.start_confined(0, flags, confinement);
    rig.wait_ready(0);
}

/// Until node 0 has a device of that kind which is complete, nothing stands in for it any more, and its agent says the same.
#[track_caller]
fn wait_device(rig: &Rig, kind: &str, mode: &str, within: Duration) {
    eventually(
        within,
        &format!("the device is a {kind}, the mode is {mode}"),
        || {
            let device = link(rig.ns(0), DEVICE).map_err(|error| format!("{error:#}"))?;
            let status = rig.status(0);
            let is = device["linkinfo"]["info_kind"] == kind
                && link(rig.ns(0), "flannelt.1").is_err()
                && link(rig.ns(0), "flannelu.1").is_err()
                && status["datapath"]["mode"] == mode
                && status["device"]["kind"] == kind
                && status["problems"].as_array().is_some_and(Vec::is_empty);
            if !is {
                return Err(format!("{device} {status}"));
            }
            rig.converged(0)
        },
    );
}

fn the_device_changes_under_traffic(attach: &str) {
    if !privileged() {
        return;
    }
    let flags = [SLOW, attach];
    let mut rig = two_nodes(&flags, &NO_VXLAN);
    wait_device(&rig, "veth", "bpf", PATIENCE);
    let mac = link(rig.ns(0), DEVICE).expect("the device")["address"].clone();
    let traffic = Traffic::start(&rig);
    for (kind, flags, confinement) in [
        ("vxlan", &flags[..], &FREE),
        ("veth", &[SLOW, attach, "--bpf-device=veth"], &FREE),
        ("vxlan", &flags, &FREE),
    ] {
        restart(&mut rig, flags, confinement);
        wait_device(&rig, kind, "bpf", PATIENCE);
        assert_eq!(link(rig.ns(0), DEVICE).expect("the device")["address"], mac);
    }
    traffic.assert_untouched();
}

#[test]
fn the_device_changes_its_kind_without_a_gap_with_tcx() {
    the_device_changes_under_traffic("--bpf-attach=tcx");
}

#[test]
fn the_device_changes_its_kind_without_a_gap_with_clsact() {
    the_device_changes_under_traffic("--bpf-attach=clsact");
}

#[test]
fn a_capability_that_comes_and_goes_loses_nothing() {
    if !privileged() {
        return;
    }
    let mut rig = two_nodes(&[SLOW], &UPSTREAM);
    wait_device(&rig, "vxlan", "kernel", PATIENCE);
    let traffic = Traffic::start(&rig);
    for (confinement, mode) in [(&FREE, "bpf"), (&UPSTREAM, "kernel"), (&FREE, "bpf")] {
        restart(&mut rig, &[SLOW], confinement);
        wait_device(&rig, "vxlan", mode, PATIENCE);
    }
    traffic.assert_untouched();
}

#[test]
fn a_device_type_that_comes_while_running_is_taken_up_and_given_up_again() {
    if !privileged() {
        return;
    }
    let mut rig = two_nodes(&[SLOW], &NO_VXLAN);
    wait_device(&rig, "veth", "bpf", PATIENCE);
    let traffic = Traffic::start(&rig);
    rig.agent(0).know_vxlan(true);
    wait_device(&rig, "vxlan", "bpf", NOTICED);
    traffic.assert_untouched();

    // Somebody deletes the device, and the kernel makes no other: what is left carries on.
    rig.agent(0).know_vxlan(false);
    rig.ns(0)
        .ip("link del flannel.1")
        .expect("delete the device");
    wait_device(&rig, "veth", "bpf", PATIENCE);
    let reason = rig.status(0)["datapath"]["reason"].to_string();
    assert!(reason.contains("refuses vxlan devices"), "{reason}");
    let traffic = Traffic::start(&rig);
    rig.agent(0).know_vxlan(true);
    wait_device(&rig, "vxlan", "bpf", NOTICED);
    traffic.assert_untouched();
    let log = rig.agent(0).log();
    for line in [
        "the tunnel device cannot be made as it was",
        "the kernel makes vxlan devices now",
    ] {
        assert!(log.contains(line), "{log}");
    }
}

/// A program that starts the agent with a bpf file system of its own, and without the right to mount another.
fn with_own_bpffs(rig: &Rig) -> PathBuf {
    let script = rig.node(0).run_dir.join("flannel-agent.sh");
    let agent = agent_binary().display();
    let text = format!(
        "#!/bin/sh\nexec unshare -m sh -c 'umount /sys/fs/bpf; mount -t bpf bpf /sys/fs/bpf && exec setpriv --bounding-set=-sys_admin {agent} \"$@\"' sh \"$@\"\n"
    );
    fs::write(&script, text).expect("write a script");
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).expect("make it a program");
    script
}

/// Runs a command where the agent of node 0 sees the file systems.
fn beside_the_agent(rig: &mut Rig, words: &[&str]) {
    let pid = rig.agent(0).pid().to_string();
    let done = Command::new("nsenter")
        .args(["-t", &pid, "-m"])
        .args(words)
        .status()
        .expect("run nsenter");
    assert!(done.success(), "{words:?}: {done}");
}

#[test]
fn a_bpf_file_system_that_goes_and_comes_costs_ebpf_and_no_packet() {
    if !privileged() {
        return;
    }
    let mut rig = Rig::new(2);
    let binary = with_own_bpffs(&rig);
    rig.start_binary(0, &binary, &[SLOW], &[]);
    rig.start_agent(1, &[SLOW]);
    for node in 0..2 {
        rig.wait_ready(node);
        rig.add_pod(node);
    }
    rig.wait_converged();
    let mode = |rig: &Rig, wanted: &str, needle: &str| {
        eventually(NOTICED, &format!("node 0 is in mode {wanted}"), || {
            let state = rig.state(0);
            let path = &state["datapath"];
            let reason = path["reason"].as_str().unwrap_or_default();
            let attached = hooks(rig.ns(0)) != Hooks::default();
            (path["mode"] == wanted
                && reason.contains(needle)
                && attached == (wanted == "bpf")
                && state["problems"].as_array().is_some_and(Vec::is_empty))
            .then_some(())
            .ok_or_else(|| format!("{state} {attached}"))
        });
    };
    mode(&rig, "bpf", "");
    let traffic = Traffic::start(&rig);
    beside_the_agent(&mut rig, &["umount", "-l", "/sys/fs/bpf"]);
    mode(&rig, "kernel", "eBPF was given up");
    let before = rig.device_counters(0);
    eventually(PATIENCE, "the kernel's device carries the traffic", || {
        let now = rig.device_counters(0);
        let more = now.encap > before.encap + 100 && now.decap > before.decap + 100;
        more.then_some(()).ok_or_else(|| format!("{now:?}"))
    });
    beside_the_agent(&mut rig, &["mount", "-t", "bpf", "bpf", "/sys/fs/bpf"]);
    mode(&rig, "bpf", "");
    traffic.assert_untouched();
    assert!(rig.agent(0).is_running());
}
