//! Native XDP on the uplinks. They are veth pairs here, where it does not pay, but the driver takes it and frames arrive as on hardware: one
//! by one, with their checksums computed.

#[path = "netns_xdp/both.rs"]
mod both;
#[path = "netns_wire/matrix.rs"]
#[expect(dead_code, reason = "what is on the wire, other tests look at")]
mod matrix;
mod rig;
#[path = "netns_xdp/trial.rs"]
mod trial;
mod wire_rig;

use std::{path::Path, process::Command, time::Duration};

use flannel_common::CounterId;
use flannel_testkit::{
    Capture, LabOptions, Offloads,
    capture::tshark,
    eventually,
    json::{bpftool_json, link},
    privileged,
    traffic::{FloodPing, TcpFlow, ping},
};
use rig::{NET_CONF, PATIENCE, Rig, agent_binary, per_cpu};
use serde_json::Value;
use wire_rig::End;

const NATIVE: &str = "--bpf-xdp=native";
/// How long the loop may take to mend anything.
const REPAIR: Duration = Duration::from_secs(2);
const EVERY: Duration = Duration::from_millis(1);
/// The longest time for which a TCP stream may stand still.
const STALL: Duration = Duration::from_secs(1);
/// What the stream sends, in bytes a second. A faster one overflows the 256 entries of a veth's XDP ring, with nobody restarting anything.
const RATE: u32 = 10_000_000;
/// `prog.attached` modes of `ip -j link`: 1 is in the driver.
const IN_DRIVER: u64 = 1;

fn lab(flags: &[&str]) -> Rig {
    let mut rig = bare_lab();
    rig.start_all(flags);
    rig
}

fn bare_lab() -> Rig {
    let options = LabOptions {
        nodes: 2,
        offloads: Offloads::Off,
        ..LabOptions::default()
    };
    Rig::with(options, NET_CONF)
}

fn packets(rig: &Rig, node: usize, counter: CounterId) -> u64 {
    per_cpu(&rig.map_dump(node, "counters")[counter as usize])
}

fn stripped(rig: &Rig, node: usize) -> u64 {
    packets(rig, node, CounterId::XdpDecap)
}

fn missed(rig: &Rig, node: usize) -> u64 {
    packets(rig, node, CounterId::XdpMissed)
}

/// The program in the driver of the node's uplink, as `ip` shows it.
fn program(rig: &Rig, node: usize) -> Result<u64, String> {
    let uplink = link(rig.ns(node), "eth0").map_err(|error| format!("{error:#}"))?;
    let xdp = &uplink["xdp"];
    match (xdp["mode"].as_u64(), xdp["prog"]["id"].as_u64()) {
        (Some(IN_DRIVER), Some(id)) => Ok(id),
        _ => Err(format!("no native program: {xdp}")),
    }
}

#[track_caller]
fn wait_attached(rig: &Rig, node: usize, limit: Duration) -> u64 {
    eventually(limit, "a native program is attached", || program(rig, node))
}

/// Waits until `status` says this of native XDP.
#[track_caller]
fn wait_status(rig: &Rig, node: usize, attached: bool, words: &[&str]) -> Value {
    eventually(PATIENCE, &format!("attached {attached}, {words:?}"), || {
        let xdp = rig.status(node)["datapath"]["xdp"].clone();
        let reason = xdp["reason"].as_str().unwrap_or_default();
        if xdp["attached"] == attached && words.iter().all(|word| reason.contains(word)) {
            Ok(xdp)
        } else {
            Err(xdp.to_string())
        }
    })
}

fn pin(rig: &Rig, node: usize) -> String {
    rig.instance(node).join("xdp_decap").display().to_string()
}

fn link_id(rig: &Rig, node: usize) -> u64 {
    let shown = bpftool_json(rig.ns(node), &["link", "show", "pinned", &pin(rig, node)]);
    shown.expect("the pinned link")["id"]
        .as_u64()
        .expect("an id")
}

fn detach(rig: &Rig, node: usize, pin: &str) {
    let path = rig.instance(node).join(pin).display().to_string();
    let words = ["bpftool", "link", "detach", "pinned", &path];
    rig.ns(node).exec(words).expect("detach a link");
}

fn everything_in(mode: &str) {
    if !privileged() {
        return;
    }
    let rig = lab(&[NATIVE, &format!("--bpf-fast-path={mode}")]);
    for node in 0..2 {
        let id = wait_attached(&rig, node, PATIENCE);
        let shown = bpftool_json(rig.ns(node), &["prog", "show", "id", &id.to_string()]);
        let name = shown.expect("the program")["name"].clone();
        let name = name.as_str().expect("its name");
        assert!(name.starts_with("xdp_decap"), "{name}");
        // It is a link of ours: nobody takes it off by mistake.
        let off = rig.ns(node).ip("link set dev eth0 xdp off");
        assert!(off.is_err(), "{off:?}");
    }
    if mode != "off" {
        for node in 0..2 {
            eventually(PATIENCE, "the pod is known", || {
                let fast = rig.status(node)["fast_path"].clone();
                (fast["pods"] == 1).then_some(()).ok_or(fast.to_string())
            });
        }
    }
    matrix::exchange_everything(&End::of(&rig, 0), &End::of(&rig, 1), Offloads::Off);
    for node in 0..2 {
        let taken = stripped(&rig, node);
        let carried = rig.counters(node).decap;
        // GRO merges behind XDP: more are stripped than are received.
        assert!(taken > 300 && taken >= carried, "{taken} of {carried}");
        let fast = packets(&rig, node, CounterId::FastDecap);
        assert_eq!(fast > 0, mode != "off", "{fast} around the stack");
        let left = wire_rig::reasons(&rig, node, flannel_common::Direction::Decap);
        assert!(left.is_empty(), "not carried: {left:?}");
        wait_status(&rig, node, true, &["strips"]);
        let status = rig.status_is_ok(node);
        assert_eq!(status["datapath"]["xdp"]["wanted"], "native");
        assert!(status["counters"]["xdp"]["packets"].as_u64() >= Some(taken));
    }
}

#[test]
fn everything_arrives_through_the_stack() {
    everything_in("off");
}

#[test]
fn everything_arrives_around_the_stack() {
    everything_in("established");
}

#[test]
fn everything_arrives_admitted_by_its_first_packet() {
    everything_in("syn");
}

/// What a pod receives of pings, header by header: TOS, hop limit, length, MAC addresses, and whether the checksum is right.
fn received(flags: &[&str]) -> Vec<String> {
    let rig = lab(flags);
    let (a, b) = (rig.pod(0), rig.pod(1));
    let before = stripped(&rig, 1);
    let capture = Capture::start(&b.ns, "eth0", "icmp[0] == 8").expect("a capture");
    let ask = |tos: u8, ttl: u8, size: u16| {
        let words = format!("ping -c 1 -W 0.5 -Q {tos} -t {ttl} -s {size} {}", b.ip);
        a.ns.exec(words.split(' ')).is_ok()
    };
    for (tos, ttl) in [(0x00, 64), (0x29, 9), (0x2b, 255)] {
        for size in [0, 1422] {
            assert!(ask(tos, ttl, size), "{tos} {ttl} {size}");
        }
    }
    // Congestion on the way, also for a packet that cannot be marked and is dropped.
    let mark = "add table bridge t; add chain bridge t f { type filter hook forward priority 0; }; \
                add rule bridge t f udp dport 8472 ip ecn set ce";
    rig.lab().underlay().exec(["nft", mark]).expect("nft");
    for tos in [0x02, 0x29, 0x2a, 0x2b] {
        for size in [0, 1422] {
            assert!(ask(tos, 64, size), "{tos} {size}, marked");
        }
    }
    assert!(!ask(0x28, 64, 56));
    let captured = capture.stop().expect("stop the capture");
    let through_xdp = stripped(&rig, 1) - before;
    assert_eq!(through_xdp > 0, flags.contains(&NATIVE), "{through_xdp}");
    let fields = [
        "ip.dsfield",
        "ip.ttl",
        "ip.len",
        "eth.dst",
        "eth.src",
        "ip.checksum.status",
        "icmp.checksum.status",
        "frame.len",
    ];
    let mut words = vec!["-T", "fields", "-o", "ip.check_checksum:TRUE"];
    words.extend(fields.iter().flat_map(|field| ["-e", *field]));
    let seen = tshark(&captured.path(), &words, "icmp").expect("tshark");
    assert_eq!(seen.len(), 14, "{seen:?}");
    // MAC addresses differ from run to run.
    let mac = |ns, name| {
        let device = link(ns, name).expect("a device");
        device["address"].as_str().expect("its address").to_owned()
    };
    let (own, gateway) = (mac(&b.ns, "eth0"), mac(rig.ns(1), "cni0"));
    seen.iter()
        .map(|line| line.replace(&own, "pod").replace(&gateway, "gateway"))
        .collect()
}

#[test]
fn headers_are_as_without_it() {
    if !privileged() {
        return;
    }
    for mode in ["off", "established"] {
        let mode = format!("--bpf-fast-path={mode}");
        assert_eq!(
            received(&[NATIVE, &mode]),
            received(&["--bpf-xdp=off", &mode])
        );
    }
}

/// A VXLAN device of somebody else between the nodes.
fn foreign(rig: &Rig, name: &str, vni: u32, port: u16) {
    for node in 0..2 {
        let (own, other) = (rig.node(node).ip, rig.node(1 - node).ip);
        for line in [
            format!(
                "link add {name} type vxlan id {vni} dstport {port} local {own} remote {other} dev eth0 noudpcsum"
            ),
            format!("addr add 10.99.{vni}.{}/24 dev {name}", node + 1),
            format!("link set {name} up"),
        ] {
            rig.ns(node).ip(&line).expect("a device");
        }
    }
}

#[test]
fn what_is_not_ours_passes_as_it_is() {
    if !privileged() {
        return;
    }
    let rig = lab(&[NATIVE]);
    wait_attached(&rig, 1, PATIENCE);
    foreign(&rig, "vx9", 9, 8472);
    foreign(&rig, "vx8", 8, 4789);
    let before = stripped(&rig, 1);
    let ours: std::net::Ipv4Addr = rig.node(1).ip;
    for target in [
        "10.99.9.2".parse().expect("an address"),
        "10.99.8.2".parse().expect("an address"),
        ours,
    ] {
        for size in [56, 1400, 9_000] {
            // In fragments, inside and outside.
            let done =
                flannel_testkit::traffic::ping_sized(rig.ns(0), target, size, false, PATIENCE);
            done.unwrap_or_else(|error| panic!("{target}, {size} bytes: {error:#}"));
        }
    }
    // Pods have said nothing meanwhile.
    assert_eq!(stripped(&rig, 1), before);
    rig.ping(0, 1).expect("a ping");
    assert!(stripped(&rig, 1) > before);
}

#[test]
fn restarts_lose_nothing() {
    if !privileged() {
        return;
    }
    let mut rig = lab(&[NATIVE]);
    let (first, link) = (wait_attached(&rig, 1, PATIENCE), link_id(&rig, 1));
    let (a, b) = (rig.pod(0).clone(), rig.pod(1).clone());
    let ping = FloodPing::start(&a.ns, b.ip, EVERY).expect("a ping");
    let tcp = TcpFlow::start_paced(&b.ns, b.ip, &a.ns, RATE).expect("a stream");
    for orderly in [true, false] {
        let at = stripped(&rig, 1);
        if orderly {
            assert_eq!(rig.stop_agent(1), 0);
        } else {
            rig.kill_agent(1);
        }
        let goes_on = |rig: &Rig, what: &str| {
            let at = stripped(rig, 1);
            eventually(PATIENCE, what, || {
                let now = stripped(rig, 1);
                (now > at + 300).then_some(()).ok_or(format!("{at}, {now}"))
            });
        };
        goes_on(&rig, "it strips without an agent");
        rig.start_agent(1, &[NATIVE]);
        rig.wait_ready(1);
        goes_on(&rig, "it strips with the new agent");
        assert!(stripped(&rig, 1) > at, "the counters go on");
        assert_eq!(link_id(&rig, 1), link, "replaced in place");
        assert_ne!(program(&rig, 1), Ok(first), "the new agent's program");
    }
    let tcp = tcp.stop().expect("stop the stream");
    let ping = ping.stop().expect("stop the ping");
    assert_eq!(ping.lost, 0, "{ping:?}");
    assert!(tcp.longest_stall <= STALL, "{tcp:?}");
    // Off from one run to the next: detached, and still nothing lost.
    let ping = FloodPing::start(&a.ns, b.ip, EVERY).expect("a ping");
    assert_eq!(rig.stop_agent(1), 0);
    rig.start_agent(1, &["--bpf-xdp=off"]);
    rig.wait_ready(1);
    program(&rig, 1).expect_err("it is detached");
    assert!(!Path::new(&pin(&rig, 1)).exists());
    let ping = ping.stop().expect("stop the ping");
    assert_eq!(ping.lost, 0, "{ping:?}");
}

/// An older agent with another layout of the maps has left its programs running on them: both kinds are replaced, one after the other.
#[test]
fn another_layout_of_the_maps_loses_nothing() {
    if !privileged() {
        return;
    }
    let mut rig = lab(&[NATIVE]);
    let (first, link) = (wait_attached(&rig, 1, PATIENCE), link_id(&rig, 1));
    let flood = FloodPing::start(&rig.pod(0).ns, rig.pod(1).ip, EVERY).expect("a ping");
    assert_eq!(rig.stop_agent(1), 0);
    let maps = rig.maps_dir(1);
    std::fs::rename(&maps, rig.instance(1).join("maps-v0")).expect("rename the maps");
    rig.start_agent(1, &[NATIVE]);
    rig.wait_ready(1);
    rig.wait_converged();
    assert_ne!(program(&rig, 1), Ok(first));
    assert_eq!(link_id(&rig, 1), link);
    eventually(PATIENCE, "the new program strips", || {
        let now = stripped(&rig, 1);
        (now > 300).then_some(()).ok_or(now.to_string())
    });
    let stats = flood.stop().expect("stop the ping");
    assert_eq!(stats.lost, 0, "{stats:?}");
}

#[test]
fn by_itself_it_is_for_hardware_only() {
    if !privileged() {
        return;
    }
    let rig = lab(&[]);
    rig.ping(0, 1).expect("a ping");
    let xdp = wait_status(&rig, 0, false, &["veth"]);
    assert_eq!(xdp["wanted"], "auto");
    for node in 0..2 {
        program(&rig, node).expect_err("never on veth");
        assert!(!Path::new(&pin(&rig, node)).exists());
        assert_eq!(stripped(&rig, node), 0);
        let programs = bpftool_json(rig.ns(node), &["prog", "show"]).expect("programs");
        let of_agent = |program: &&Value| {
            let pids = program["pids"].as_array().into_iter().flatten();
            let pid = rig.state(node)["pid"].clone();
            program["type"] == "xdp" && pids.into_iter().any(|owner| owner["pid"] == pid)
        };
        let programs = rig::list(&programs);
        assert!(
            !programs.iter().any(|one| of_agent(&one)),
            "not even loaded"
        );
    }
}

#[test]
fn what_somebody_detaches_comes_back() {
    if !privileged() {
        return;
    }
    let rig = lab(&[NATIVE]);
    wait_attached(&rig, 1, PATIENCE);
    let before = link_id(&rig, 1);
    detach(&rig, 1, "xdp_decap");
    wait_attached(&rig, 1, REPAIR);
    assert_ne!(link_id(&rig, 1), before);
    std::fs::remove_file(pin(&rig, 1)).expect("remove the pin");
    eventually(REPAIR, "it is attached and pinned again", || {
        program(&rig, 1)?;
        let there = Path::new(&pin(&rig, 1)).exists();
        there.then_some(()).ok_or("no pin".to_owned())
    });
    let at = stripped(&rig, 1);
    // The program that knows stripped frames: without it they are on their own until it is back.
    detach(&rig, 1, "from_wire");
    eventually(REPAIR, "from_wire is back", || {
        rig::hooks::hooks(rig.ns(1)).are("tcx").map(drop)
    });
    let stats = ping(&rig.pod(0).ns, rig.pod(1).ip, 20, EVERY).expect("pings");
    assert_eq!(stats.lost, 0, "{stats:?}");
    assert!(stripped(&rig, 1) >= at + 20);
}

#[test]
fn another_program_in_the_driver_keeps_its_place() {
    if !privileged() {
        return;
    }
    let mut rig = lab(&[NATIVE]);
    let id = wait_attached(&rig, 1, PATIENCE);
    let strangers = "/sys/fs/bpf/".to_owned() + rig.ns(1).name();
    let ns = rig.ns(1).clone();
    let exec = |line: &str| {
        ns.exec(line.split(' '))
            .unwrap_or_else(|error| panic!("{line}: {error:#}"))
    };
    exec(&format!("bpftool prog pin id {id} {strangers}"));
    assert_eq!(rig.stop_agent(1), 0);
    assert!(rig.cli(1, &["cleanup"]).status.success());
    program(&rig, 1).expect_err("cleanup detaches it");
    exec(&format!("ip link set dev eth0 xdpdrv pinned {strangers}"));
    std::fs::remove_file(&strangers).expect("remove the pin");
    let theirs = program(&rig, 1).expect("the other program");
    rig.start_agent(1, &[NATIVE]);
    rig.wait_ready(1);
    wait_status(&rig, 1, false, &["eth0", "another XDP program"]);
    rig.wait_converged();
    rig.ping(0, 1).expect("traffic goes on");
    assert_eq!(program(&rig, 1), Ok(theirs));
    // Asked once, said once.
    ping(&rig.pod(0).ns, rig.pod(1).ip, 40, 100 * EVERY).expect("pings for some seconds");
    let log = rig.agent(1).log();
    assert_eq!(log.matches("no native XDP").count(), 1, "{log}");
}

#[test]
fn nothing_stays_without_ebpf() {
    if !privileged() {
        return;
    }
    let mut rig = lab(&[NATIVE]);
    wait_attached(&rig, 1, PATIENCE);
    assert_eq!(rig.stop_agent(1), 0);
    rig.start_agent(1, &["--datapath=kernel", NATIVE]);
    rig.wait_ready(1);
    program(&rig, 1).expect_err("detached with the rest");
    wait_status(&rig, 1, false, &["eBPF is not in use"]);
    rig.ping(0, 1).expect("a ping");
    let done = Command::new(agent_binary())
        .arg("--bpf-xdp=generic")
        .output();
    assert_eq!(done.expect("run the agent").status.code(), Some(2));
}
