//! What a node has less of than it could, and gets, or loses, while traffic runs: the vxlan module, the right to load eBPF, the bpf file
//! system. It goes up and down between its ways to carry a packet, and no packet is lost.

#[expect(dead_code, reason = "other suites read what agents say")]
#[path = "rig/confined.rs"]
mod confined;
mod rig;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use flannel_testkit::{
    Confinement, Families, Family, LabOptions, eventually,
    json::link,
    patience, privileged, put_program,
    traffic::{FloodPing, TcpFlow},
};
use rig::{
    PATIENCE, Rig, agent_binary,
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

/// Pings and streams between the pods of nodes 0 and 1 in both directions, and pings from node 0 itself.
struct Traffic {
    pings: Vec<FloodPing>,
    streams: Vec<TcpFlow>,
}

impl Traffic {
    fn start(rig: &Rig) -> Traffic {
        let (a, b) = (rig.pod(0), rig.pod(1));
        let ping = |ns, ip| FloodPing::start(ns, ip, patience(EVERY)).expect("a flood");
        let stream = |from: &flannel_testkit::Pod, to: &flannel_testkit::Pod| {
            TcpFlow::start_paced(&to.ns, to.address(rig.family()), &from.ns, RATE)
                .expect("a stream")
        };
        let [to_a, to_b] = [a, b].map(|pod| pod.address(rig.family()));
        Traffic {
            pings: vec![ping(&a.ns, to_b), ping(&b.ns, to_a), ping(rig.ns(0), to_b)],
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
    two_nodes_of(Families::V4, flags, confinement)
}

fn two_nodes_of(families: Families, flags: &[&str], confinement: &Confinement<'_>) -> Rig {
    let mut rig = Rig::of(families, LabOptions::default());
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
            let device = link(rig.ns(0), &rig.device()).map_err(|error| format!("{error:#}"))?;
            let both = rig.status(0);
            let second = &both["ipv6"];
            let is_second = rig.family() == Family::V6 && !second.is_null();
            let status = if is_second { second } else { &both };
            let stand_in = match rig.family() {
                Family::V4 => ["flannelt.1", "flannelu.1"],
                Family::V6 => ["flannelt6.1", "flannelu6.1"],
            };
            let is = device["linkinfo"]["info_kind"] == kind
                && stand_in.iter().all(|name| link(rig.ns(0), name).is_err())
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

fn the_device_changes_under_traffic(family: Family, attach: &str) {
    if !privileged() {
        return;
    }
    let flags = [SLOW, attach];
    let mut rig = two_nodes_of(family.into(), &flags, &Confinement::NO_VXLAN);
    wait_device(&rig, "veth", "bpf", PATIENCE);
    let address = |rig: &Rig| {
        let device = link(rig.ns(0), &rig.device()).expect("the device");
        device["address"].clone()
    };
    let mac = address(&rig);
    let traffic = Traffic::start(&rig);
    for (kind, flags, confinement) in [
        ("vxlan", &flags[..], &Confinement::FREE),
        (
            "veth",
            &[SLOW, attach, "--bpf-device=veth"],
            &Confinement::FREE,
        ),
        ("vxlan", &flags, &Confinement::FREE),
    ] {
        restart(&mut rig, flags, confinement);
        wait_device(&rig, kind, "bpf", PATIENCE);
        assert_eq!(address(&rig), mac);
    }
    traffic.assert_untouched();
}

#[test]
fn the_device_changes_its_kind_without_a_gap_with_tcx() {
    the_device_changes_under_traffic(Family::V4, "--bpf-attach=tcx");
}

#[test]
fn the_device_changes_its_kind_without_a_gap_with_clsact() {
    the_device_changes_under_traffic(Family::V4, "--bpf-attach=clsact");
}

#[test]
fn the_device_of_ipv6_changes_its_kind_without_a_gap_with_tcx() {
    the_device_changes_under_traffic(Family::V6, "--bpf-attach=tcx");
}

#[test]
fn the_device_of_ipv6_changes_its_kind_without_a_gap_with_clsact() {
    the_device_changes_under_traffic(Family::V6, "--bpf-attach=clsact");
}

#[test]
fn a_capability_that_comes_and_goes_loses_nothing() {
    if !privileged() {
        return;
    }
    let mut rig = two_nodes(&[SLOW], &Confinement::UPSTREAM);
    wait_device(&rig, "vxlan", "kernel", PATIENCE);
    let traffic = Traffic::start(&rig);
    for (confinement, mode) in [
        (&Confinement::FREE, "bpf"),
        (&Confinement::UPSTREAM, "kernel"),
        (&Confinement::FREE, "bpf"),
    ] {
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
    let mut rig = two_nodes_of(Families::Dual, &[SLOW], &Confinement::NO_VXLAN);
    let both = [Family::V6, Family::V4];
    let traffic = both.map(|family| {
        rig.look_at(family);
        wait_device(&rig, "veth", "bpf", PATIENCE);
        Traffic::start(&rig)
    });
    rig.agent(0).know_vxlan(true);
    for family in both {
        rig.look_at(family);
        wait_device(&rig, "vxlan", "bpf", NOTICED);
    }
    for traffic in traffic {
        traffic.assert_untouched();
    }

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
    put_program(&script, text);
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

/// Whether this machine is the test's own, a guest that is thrown away: its modules may be unloaded and its settings changed.
fn own_kernel() -> bool {
    std::env::var("FLANNEL_TEST_OWN_KERNEL").is_ok_and(|value| value == "1")
}

/// The real module, in a guest. Elsewhere, where modules and settings are everybody's, the agent is restarted instead on a kernel that
/// has learnt the device type.
#[test]
fn the_module_itself_is_loaded_later_without_a_gap() {
    if !privileged() {
        return;
    }
    if !own_kernel() {
        let mut rig = two_nodes(&[SLOW], &Confinement::NO_VXLAN);
        let traffic = Traffic::start(&rig);
        restart(&mut rig, &[SLOW], &Confinement::FREE);
        wait_device(&rig, "vxlan", "bpf", PATIENCE);
        traffic.assert_untouched();
        return;
    }
    let mut rig = Rig::new(2);
    // What else the agents and the pods need comes before.
    let others = Command::new("modprobe")
        .args(["-a", "bridge", "veth", "sch_ingress", "cls_bpf"])
        .status();
    assert!(others.expect("run modprobe").success());
    // Nothing loads it by itself: neither the kernel, nor an agent that sees no modules.
    fs::write("/proc/sys/kernel/modprobe", "/nonexistent").expect("no program to load modules");
    let unloaded = Command::new("modprobe")
        .args(["-r", "vxlan"])
        .status()
        .expect("run modprobe");
    assert!(unloaded.success() || !Path::new("/sys/module/vxlan").exists());
    let script = rig.node(0).run_dir.join("flannel-agent.sh");
    let agent = agent_binary().display();
    let text = format!(
        "#!/bin/sh\nexec unshare -m sh -c 'mount -t tmpfs none /lib/modules && exec {agent} \"$@\"' sh \"$@\"\n"
    );
    put_program(&script, text);
    rig.start_binary(0, &script, &[SLOW], &[]);
    rig.start_agent(1, &[SLOW, "--bpf-device=veth"]);
    for node in 0..2 {
        rig.wait_ready(node);
        rig.add_pod(node);
    }
    rig.wait_converged();
    wait_device(&rig, "veth", "bpf", PATIENCE);
    let traffic = Traffic::start(&rig);
    let loaded = Command::new("modprobe").arg("vxlan").status();
    assert!(loaded.expect("run modprobe").success());
    wait_device(&rig, "vxlan", "bpf", NOTICED);
    traffic.assert_untouched();
}

/// What an agent leaves that ends while the pair stands in. Made by hand: an end at that very moment would be a matter of luck.
#[test]
fn a_pair_that_is_left_over_is_taken_up_and_cleanup_knows_it() {
    if !privileged() {
        return;
    }
    let mut rig = two_nodes(&[SLOW], &Confinement::FREE);
    let leave = |rig: &Rig| {
        for command in [
            "link add flannelt.1 type veth peer name flannelu.1",
            "link set flannelu.1 up",
            "link set flannelt.1 up",
            "addr add 10.244.1.0/32 dev flannelt.1",
        ] {
            rig.ns(0).ip(command).expect("make the pair");
        }
    };
    rig.kill_agent(0);
    leave(&rig);
    // As if the routes had been turned to the pair, which has no program: the next start has to turn them back.
    rig.ns(0)
        .ip("route replace 10.244.2.0/24 via 10.244.2.0 dev flannelt.1 onlink")
        .expect("turn the route");
    rig.start_agent(0, &[SLOW]);
    rig.wait_ready(0);
    wait_device(&rig, "vxlan", "bpf", PATIENCE);
    rig.ping(0, 1).expect("a ping");

    assert_eq!(rig.stop_agent(0), 0);
    leave(&rig);
    rig.ns(0)
        .ip("link add flannelt.2 type veth peer name flannelu.2")
        .expect("a pair of another network");
    let done = rig.cli(0, &["cleanup"]);
    assert!(
        done.stdout.contains("removed device flannelt.1"),
        "{done:?}"
    );
    assert!(link(rig.ns(0), "flannelt.1").is_err() && link(rig.ns(0), "flannelu.1").is_err());
    assert!(link(rig.ns(0), "flannelt.2").is_ok());
}
