//! What only a driver of network cards shows. `FLANNEL_LAB_NICS` names the cards, as `cargo xtask test --kernel` does in its machines;
//! without them every test here fails.

#[path = "guest_nics/jumbo.rs"]
mod jumbo;
#[path = "netns_wire/matrix.rs"]
mod matrix;
#[path = "guest_nics/queues.rs"]
mod queues;
mod rig;
#[path = "guest_nics/silent.rs"]
mod silent;
mod wire_rig;

use std::{collections::BTreeMap, time::Duration};

use flannel_common::CounterId;
use flannel_testkit::{
    Capture, LabOptions, Netns, Offloads, eventually,
    json::link,
    privileged,
    traffic::{Amount, FloodPing, ping_once},
};
use rig::{NET_CONF, PATIENCE, Rig, per_cpu};
use serde_json::Value;
use wire_rig::End;

const STREAM: u64 = 1 << 20;
/// The longest frame of pods and of the wire where the MTU is the usual one.
const FRAME: u32 = 1_514;
/// `prog.attached` modes of `ip -j link`: 1 is in the driver.
const IN_DRIVER: u64 = 1;
const EVERY: Duration = Duration::from_millis(10);

/// A lab on network cards; no agent runs yet.
fn cards(offloads: Offloads, mtu: u32) -> Rig {
    assert!(privileged());
    let options = LabOptions {
        offloads,
        mtu,
        ..LabOptions::default()
    };
    let rig = Rig::with(options, NET_CONF);
    assert!(
        rig.lab().is_on_nics(),
        "FLANNEL_LAB_NICS names no network cards: run `cargo xtask test --kernel`"
    );
    rig
}

/// Two agents with these flags and a pod each, which have spoken to each other: the driver has had something to run the program on.
fn start(offloads: Offloads, flags: &[&str]) -> Rig {
    let mut rig = cards(offloads, 1_500);
    rig.start_all(flags);
    meet(&rig);
    rig
}

/// Makes sure that something went over the wire both ways.
fn meet(rig: &Rig) {
    for (from, to) in [(0, 1), (1, 0)] {
        eventually(PATIENCE, "pods reach each other", || rig.ping(from, to));
    }
}

fn counted(rig: &Rig, node: usize, counter: CounterId) -> u64 {
    per_cpu(&rig.map_dump(node, "counters")[counter as usize])
}

/// Whether the driver of the node's uplink has a program, as `ip` shows it.
fn has_program(rig: &Rig, node: usize) -> bool {
    let uplink = link(rig.ns(node), "eth0").expect("the uplink");
    uplink["xdp"]["mode"].as_u64() == Some(IN_DRIVER)
}

/// Waits until `status` says this of native XDP.
#[track_caller]
fn wait_standing(rig: &Rig, node: usize, standing: &str, attached: bool) -> Value {
    eventually(PATIENCE, standing, || {
        let xdp = rig.status(node)["datapath"]["xdp"].clone();
        if xdp["standing"] == standing && xdp["attached"] == attached {
            assert_eq!(has_program(rig, node), attached, "{xdp}");
            Ok(xdp)
        } else {
            Err(xdp.to_string())
        }
    })
}

/// Packets that an interface was to send and has not.
fn unsent(ns: &Netns, ifname: &str) -> u64 {
    let link = link(ns, ifname).expect("the interface");
    let tx = &link["stats64"]["tx"];
    tx["dropped"].as_u64().expect("tx drops") + tx["errors"].as_u64().expect("tx errors")
}

/// Packets with wrong checksums that the stack of a namespace has met, by protocol.
fn wrong_sums(ns: &Netns) -> BTreeMap<String, u64> {
    let text = ns.exec(["cat", "/proc/net/snmp"]).expect("the counters");
    let lines: Vec<&str> = text.lines().collect();
    let mut found = BTreeMap::new();
    for pair in lines.chunks(2) {
        let names = pair[0].split(' ');
        for (name, value) in names.zip(pair[1].split(' ')) {
            if name == "InCsumErrors" {
                let protocol = pair[0].split(':').next().expect("a protocol");
                found.insert(protocol.to_owned(), value.parse().expect("a number"));
            }
        }
    }
    assert!(found.contains_key("Tcp"), "{text}");
    found
}

/// Streams both ways between the first pods of the two nodes; nothing is dropped at an uplink, no checksum is wrong.
fn stream_both_ways(rig: &Rig) {
    let before: Vec<u64> = (0..2).map(|node| unsent(rig.ns(node), "eth0")).collect();
    for (from, to) in [(0, 1), (1, 0)] {
        let (client, server) = (rig.pod(from), rig.pod(to));
        let done = matrix::transfer(
            &server.ns,
            server.ip.into(),
            &client.ns,
            Amount::Bytes(STREAM),
        );
        done.unwrap_or_else(|error| panic!("from node {from}: {error:#}"));
    }
    let now: Vec<u64> = (0..2).map(|node| unsent(rig.ns(node), "eth0")).collect();
    assert_eq!(now, before, "packets not sent");
    for node in 0..2 {
        for ns in [&rig.pod(node).ns, rig.ns(node)] {
            let wrong = wrong_sums(ns);
            assert!(wrong.values().all(|count| *count == 0), "{wrong:?}");
        }
    }
}

/// Bytes of the longest packet that the pod of a node receives of a stream: what `tcpdump` shows there, GRO has merged.
fn longest_received(rig: &Rig, node: usize) -> u32 {
    let (server, client) = (rig.pod(node), rig.pod(1 - node));
    let seen = Capture::start(&server.ns, "eth0", "tcp and greater 500").expect("a capture");
    matrix::transfer(
        &server.ns,
        server.ip.into(),
        &client.ns,
        Amount::Bytes(STREAM),
    )
    .expect("a stream");
    let seen = seen.stop().expect("stop the capture");
    let lengths = seen.packets.iter().map(|packet| packet.wire_len);
    lengths.max().expect("packets")
}

fn runs_and_merges(flags: &[&str]) {
    let rig = start(Offloads::Default, flags);
    for node in 0..2 {
        // Wanted by itself: the uplink is hardware.
        wait_standing(&rig, node, "works", true);
    }
    let before = counted(&rig, 1, CounterId::XdpDecap);
    let longest = longest_received(&rig, 1);
    let stripped = counted(&rig, 1, CounterId::XdpDecap) - before;
    assert!(stripped > STREAM / 1_500, "{stripped} packets stripped");
    assert!(longest > FRAME, "the longest has {longest} bytes");
    stream_both_ways(&rig);
    assert_eq!(counted(&rig, 1, CounterId::XdpMissed), 0);
}

#[test]
fn native_xdp_runs_and_gro_merges_behind_it() {
    runs_and_merges(&["--bpf-fast-path=off"]);
}

#[test]
fn native_xdp_runs_and_gro_merges_behind_it_around_the_stack() {
    runs_and_merges(&["--bpf-fast-path=established"]);
}

/// Segmented and with all checksums computed before the driver, as another card sees it.
#[test]
fn what_is_segmented_in_software_is_right_on_the_wire() {
    for (node, fast) in [(0, "off"), (1, "established")] {
        let rig = start(
            Offloads::Off,
            &[&format!("--bpf-fast-path={fast}"), "--bpf-xdp=auto"],
        );
        let port = rig.node(0).port.clone();
        let wire = Capture::start(rig.lab().underlay(), &port, "udp port 8472").expect("a capture");
        stream_both_ways(&rig);
        let wire = wire.stop().expect("stop the capture");
        // The whole capture is looked at, and this node's frames one by one.
        matrix::check_capture(&wire, rig.node(node).ip, Offloads::Off);
    }
}

/// Everything that pods send, over cards as they are.
#[test]
fn everything_arrives() {
    for flags in [["--bpf-xdp=auto"], ["--bpf-xdp=off"]] {
        let rig = start(Offloads::Default, &flags);
        matrix::exchange_everything(&End::of(&rig, 0), &End::of(&rig, 1), Offloads::Default);
        stream_both_ways(&rig);
    }
}

/// Each offload that the driver lets one switch, off and on again: the uplink of one node after the other, with streams both ways.
#[test]
fn offloads_may_change_at_any_time() {
    let rig = start(Offloads::Default, &["--bpf-fast-path=established"]);
    for node in 0..2 {
        for feature in [
            "tx",
            "tso",
            "gso",
            "gro",
            "tx-udp_tnl-segmentation",
            "tx-udp_tnl-csum-segmentation",
        ] {
            for state in ["off", "on"] {
                // Not every driver has everything.
                let words = ["ethtool", "-K", "eth0", feature, state];
                if rig.ns(node).exec(words).is_ok() {
                    stream_both_ways(&rig);
                }
            }
        }
    }
}

/// One end is upstream flannel's: the kernel's device alone, with and without checksums outside.
#[test]
fn a_kernel_peer_is_understood() {
    let mut rig = cards(Offloads::Default, 1_500);
    let (kernel, theirs) = wire_rig::kernel_end(&rig, 1);
    wire_rig::start_with_peer(&mut rig, 0, &[], &kernel);
    rig.adopt_pod(1, theirs.pod);
    for sums in ["udpcsum", "noudpcsum"] {
        let device = &kernel.device;
        // iproute2 changes no checksum of a device that is there: another one takes its place.
        let shown = link(&kernel.ns, device).expect("the device");
        let address = shown["address"].as_str().expect("its address").to_owned();
        let (own, subnet) = (kernel.public_ip, kernel.subnet);
        for line in [
            format!("link del {device}"),
            format!(
                "link add {device} address {address} mtu 1450 type vxlan id 1 local {own} dev eth0 dstport 8472 nolearning {sums}"
            ),
            format!("addr add {}/32 dev {device}", subnet.base()),
            format!("link set {device} up"),
        ] {
            kernel
                .ns
                .ip(&line)
                .unwrap_or_else(|error| panic!("{line}: {error:#}"));
        }
        let ours = rig.node(0);
        kernel
            .add_peer(ours.subnet, wire_rig::vtep_mac(&ours.ns), ours.ip)
            .expect("tell the kernel node of ours");
        let (from, to) = (rig.pod(1), rig.pod(0));
        eventually(PATIENCE, sums, || {
            ping_once(&from.ns, to.ip, Duration::from_secs(1))
        });
        let before = counted(&rig, 0, CounterId::XdpDecap);
        stream_both_ways(&rig);
        let stripped = counted(&rig, 0, CounterId::XdpDecap) - before;
        assert_eq!(stripped > 0, sums == "noudpcsum", "{sums}: {stripped}");
    }
}

#[test]
fn xdp_comes_and_goes_without_loss() {
    let mut rig = start(Offloads::Default, &[]);
    wait_standing(&rig, 1, "works", true);
    let (a, b) = (rig.pod(0).clone(), rig.pod(1).clone());
    let ping = FloodPing::start(&a.ns, b.ip, EVERY).expect("a ping");
    let pin = rig.instance(1).join("xdp_decap").display().to_string();
    for _ in 0..3 {
        let words = ["bpftool", "link", "detach", "pinned", &pin];
        rig.ns(1).exec(words).expect("detach the program");
        wait_standing(&rig, 1, "works", true);
    }
    for flags in [&["--bpf-xdp=off"][..], &[]] {
        rig.kill_agent(1);
        rig.start_agent(1, flags);
        rig.wait_ready(1);
        let standing = if flags.is_empty() { "works" } else { "off" };
        wait_standing(&rig, 1, standing, flags.is_empty());
    }
    let ping = ping.stop().expect("stop the ping");
    assert_eq!((ping.lost, ping.duplicates), (0, 0), "{ping:?}");
}
