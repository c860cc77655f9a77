//! What our node puts on the wire, and what it makes of what others put there: it must be flannel's VXLAN to the byte.

#[path = "netns_wire/frames.rs"]
mod frames;
#[path = "netns_wire/matrix.rs"]
mod matrix;
#[path = "netns_wire/packets.rs"]
mod packets;
mod rig;
mod wire_rig;

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, Ipv6Addr, UdpSocket},
    ops::Range,
};

use flannel_common::{Direction, counter::CounterId};
use flannel_testkit::{
    Capture, Family, LabOptions, Offloads, eventually, privileged, traffic::Amount,
};
use matrix::{exchange_everything, transfer};
use nix::{
    sched::{CpuSet, sched_setaffinity},
    unistd::Pid,
};
use packets::Samples;
use rig::{Counters, PATIENCE, Rig, list};
use wire_rig::{End, kernel_end, plain_kernel_end, reasons, start_with_peer};

/// Interleaved rounds of bulk TCP, two runs each.
const ROUNDS: usize = 5;
const BULK: Amount = Amount::Bytes(32 << 20);
/// Segments of 1398 bytes that a run may send again without need: 0.1 % of it, or half a super-packet. A busy machine makes TCP's
/// timers send a few; a data path that loses anything of substance loses super-packets, 46 segments each.
const SPURIOUS: u32 = 24;

fn rig_of(family: Family, nodes: u8, offloads: Offloads) -> Rig {
    let options = LabOptions {
        nodes,
        offloads,
        ..LabOptions::default()
    };
    Rig::of(family.into(), options)
}

/// eBPF encapsulated all traffic of the node: since `before` the device has sent nothing. (What is of another family, and the
/// kernel's own router solicitations, are lost for want of a peer.) Super-packets over IPv6 are the device's: it alone can have
/// each segment's checksum filled in.
fn assert_encapsulated_by_bpf(rig: &Rig, node: usize, before: Counters) {
    let mut left = reasons(rig, node, Direction::Encap);
    for foreign in ["not_ipv4", "not_ipv6", "no_peer"] {
        left.remove(foreign);
    }
    let alone = rig.status(node)["device"]["kind"] == "veth";
    if rig.family() == Family::V6 && !alone {
        // Fragments: of their checksum the first has the whole, and none has what is summed.
        for device in ["gso", "protocol"] {
            left.remove(device);
        }
    }
    assert_eq!(
        left,
        BTreeMap::new(),
        "packets of {} that eBPF left alone",
        rig.family()
    );
    if rig.family() == Family::V4 {
        let by_device = rig.device_counters(node).encap - before.encap;
        assert_eq!(by_device, 0, "packets that the device of node {node} sent");
    }
    let sent = rig.counters(node).encap;
    let least = if rig.family() == Family::V4 { 300 } else { 100 };
    assert!(sent > least, "{sent} packets encapsulated");
}

/// Every packet passes the stack.
const OFF: &str = "--bpf-fast-path=off";
/// What the stack has let pass goes around it.
const FAST: &str = "--bpf-fast-path=established";

/// Packets of the node that went around its stack to another node and from one, none unless asked for.
fn assert_bypassed(rig: &Rig, node: usize, flags: &[&str]) {
    for id in [CounterId::FastEncap, CounterId::FastDecap] {
        let packets = rig.packets(node, id);
        assert_eq!(packets > 20, flags.contains(&FAST), "{packets} of {id:?}");
        assert!(packets > 20 || packets == 0, "{packets} of {id:?}");
    }
}

/// All traffic between a node of ours with these flags and a kernel node; then a look at who carried it.
fn with_a_kernel_node(family: Family, flags: &[&str], offloads: Offloads) {
    if !privileged() {
        return;
    }
    let mut rig = rig_of(family, 2, offloads);
    let (kernel, theirs) = kernel_end(&rig, 1);
    start_with_peer(&mut rig, 0, flags, &kernel);
    let ours = End::of(&rig, 0);
    if flags.contains(&FAST) {
        wait_for_pods(&rig, 0);
    }
    let before = rig.device_counters(0);
    let wire = Capture::start(rig.lab().underlay(), &rig.node(0).port, "udp port 8472")
        .expect("a capture of the wire");
    exchange_everything(&ours, &theirs, offloads);
    let wire = wire.stop().expect("the capture");
    match family {
        Family::V4 => matrix::check_capture(&wire, rig.node(0).ip, offloads),
        Family::V6 => matrix::check_capture(&wire, rig.node(0).ipv6, offloads),
    }

    let alone = flags.contains(&"--bpf-device=veth");
    assert_encapsulated_by_bpf(&rig, 0, before);
    let left = reasons(&rig, 0, Direction::Decap);
    let decap = rig.packets(0, CounterId::BpfDecap);
    assert_bypassed(&rig, 0, flags);
    if family == Family::V6 && !alone {
        // What the headers can prove of a checksum; the rest is the device's.
        assert!(decap > 50, "{decap} packets decapsulated, {left:?} left");
    } else if alone {
        assert_eq!(left, BTreeMap::new(), "nobody else decapsulates");
        assert!(decap > 300, "{decap} packets decapsulated");
    } else {
        // A kernel node sends UDP checksums, which no device of this lab verifies.
        let (reasons, packets): (Vec<_>, Vec<_>) = left.into_iter().unzip();
        assert_eq!(reasons, ["outer_checksum"]);
        assert!(packets[0] > 300, "{packets:?} left to the kernel");
        assert_eq!(decap, 0);
    }
}

#[test]
fn a_kernel_node_understands_us_and_we_it() {
    with_a_kernel_node(Family::V4, &["--datapath=bpf", OFF], Offloads::Default);
}

#[test]
fn a_kernel_node_and_us_without_offloads() {
    with_a_kernel_node(Family::V4, &["--datapath=bpf", OFF], Offloads::Off);
}

#[test]
fn a_kernel_node_and_us_on_clsact() {
    with_a_kernel_node(
        Family::V4,
        &["--datapath=bpf", "--bpf-attach=clsact", OFF],
        Offloads::Default,
    );
}

#[test]
fn a_kernel_node_and_us_around_the_stack() {
    with_a_kernel_node(Family::V4, &["--datapath=bpf", FAST], Offloads::Default);
}

#[test]
fn a_kernel_node_and_us_around_the_stack_without_offloads() {
    let flags = ["--datapath=bpf", "--bpf-attach=clsact", FAST];
    with_a_kernel_node(Family::V4, &flags, Offloads::Off);
}

#[test]
fn a_kernel_node_and_us_without_a_vxlan_device() {
    let flags = ["--datapath=bpf", "--bpf-device=veth", OFF];
    with_a_kernel_node(Family::V4, &flags, Offloads::Default);
}

#[test]
fn a_kernel_node_and_us_without_a_vxlan_device_without_offloads() {
    let flags = ["--datapath=bpf", "--bpf-device=veth", OFF];
    with_a_kernel_node(Family::V4, &flags, Offloads::Off);
}

#[test]
fn a_kernel_node_and_us_around_the_stack_without_a_vxlan_device() {
    let flags = ["--datapath=bpf", "--bpf-device=veth", FAST];
    with_a_kernel_node(Family::V4, &flags, Offloads::Default);
}

/// All traffic between two nodes of ours with these flags each.
fn two_of_ours(family: Family, flags: [&[&str]; 2], offloads: Offloads) {
    if !privileged() {
        return;
    }
    let mut rig = rig_of(family, 2, offloads);
    for (node, flags) in flags.into_iter().enumerate() {
        rig.start_agent(node, flags);
    }
    for node in 0..2 {
        rig.wait_ready(node);
        rig.add_pod(node);
    }
    rig.wait_converged();
    for (node, flags) in flags.into_iter().enumerate() {
        if flags.contains(&FAST) {
            wait_for_pods(&rig, node);
        }
    }
    let before = [0, 1].map(|node| rig.device_counters(node));
    exchange_everything(&End::of(&rig, 0), &End::of(&rig, 1), offloads);
    for (node, flags) in flags.into_iter().enumerate() {
        let before = before[node];
        assert_encapsulated_by_bpf(&rig, node, before);
        let mut left = reasons(&rig, node, Direction::Decap);
        let gso = left.remove("gso").unwrap_or(0);
        if family == Family::V6 && !flags.contains(&"--bpf-device=veth") {
            // What the device has encapsulated has a checksum that only the payload proves.
            for device in ["outer_checksum", "protocol"] {
                left.remove(device);
            }
        }
        assert_eq!(
            left,
            BTreeMap::new(),
            "packets that eBPF of node {node} left alone"
        );
        if family == Family::V4 && !flags.contains(&"--bpf-device=veth") {
            // Super-packets are for the kernel's device, and nothing else is.
            assert_eq!(
                rig.device_counters(node).decap - before.decap,
                gso,
                "node {node}"
            );
            assert_eq!(gso > 0, offloads == Offloads::Default);
        }
        let least = if family == Family::V4 { 300 } else { 100 };
        let counted = rig.counters(node);
        assert!(counted.decap > least, "{counted:?}");
        assert_bypassed(&rig, node, flags);
    }
}

#[test]
fn two_nodes_of_ours() {
    two_of_ours(Family::V4, [&["--datapath=bpf", OFF]; 2], Offloads::Default);
}

#[test]
fn two_nodes_of_ours_without_offloads() {
    two_of_ours(Family::V4, [&["--datapath=bpf", OFF]; 2], Offloads::Off);
}

#[test]
fn two_nodes_of_ours_around_the_stack() {
    two_of_ours(
        Family::V4,
        [&["--datapath=bpf", FAST]; 2],
        Offloads::Default,
    );
}

#[test]
fn two_nodes_of_ours_around_the_stack_without_offloads() {
    two_of_ours(Family::V4, [&["--datapath=bpf", FAST]; 2], Offloads::Off);
}

#[test]
fn two_nodes_of_ours_one_without_a_vxlan_device() {
    let alone = ["--datapath=bpf", "--bpf-device=veth", OFF];
    two_of_ours(
        Family::V4,
        [&["--datapath=bpf", FAST], &alone],
        Offloads::Default,
    );
}

#[test]
fn a_kernel_node_and_us_over_ipv6() {
    with_a_kernel_node(Family::V6, &["--datapath=bpf", OFF], Offloads::Default);
}

#[test]
fn a_kernel_node_and_us_over_ipv6_without_offloads() {
    with_a_kernel_node(Family::V6, &["--datapath=bpf", OFF], Offloads::Off);
}

#[test]
fn a_kernel_node_and_us_over_ipv6_around_the_stack_on_clsact() {
    let flags = ["--datapath=bpf", "--bpf-attach=clsact", FAST];
    with_a_kernel_node(Family::V6, &flags, Offloads::Off);
}

#[test]
fn a_kernel_node_and_us_over_ipv6_without_a_vxlan_device() {
    let flags = ["--datapath=bpf", "--bpf-device=veth", OFF];
    with_a_kernel_node(Family::V6, &flags, Offloads::Off);
}

#[test]
fn a_kernel_node_and_us_over_ipv6_around_the_stack_without_a_vxlan_device() {
    let clsact = "--bpf-attach=clsact";
    let flags = ["--datapath=bpf", "--bpf-device=veth", clsact, FAST];
    with_a_kernel_node(Family::V6, &flags, Offloads::Off);
}

#[test]
fn two_nodes_of_ours_over_ipv6_one_without_a_vxlan_device() {
    let alone = ["--datapath=bpf", "--bpf-device=veth", FAST];
    let both = [&["--datapath=bpf", OFF][..], &alone];
    two_of_ours(Family::V6, both, Offloads::Default);
}

#[test]
fn two_nodes_of_ours_over_ipv6_around_the_stack() {
    two_of_ours(
        Family::V6,
        [&["--datapath=bpf", FAST]; 2],
        Offloads::Default,
    );
}

#[test]
fn two_nodes_of_ours_over_ipv6_around_the_stack_without_offloads() {
    two_of_ours(Family::V6, [&["--datapath=bpf", FAST]; 2], Offloads::Off);
}

/// Keeps this thread and those it starts on one CPU. A veth queues packets on the CPU that sends them: a sender that moves
/// overtakes itself, on both data paths alike, and TCP sends again what was never lost.
fn stay_on_one_cpu() {
    let mut cpus = CpuSet::new();
    cpus.set(0).expect("CPU 0");
    sched_setaffinity(Pid::from_raw(0), &cpus).expect("stay on CPU 0");
}

/// The middle of the values, the upper one of two.
fn median(mut values: Vec<u32>) -> u32 {
    values.sort_unstable();
    values[values.len() / 2]
}

/// Segments sent again in bulk TCP between our node and a kernel node, against those between two kernel nodes: runs of both
/// in turn, so that both see the same machine, in both directions.
fn compare_retransmissions(offloads: Offloads, fast_path: &str) {
    if !privileged() {
        return;
    }
    let mut rig = rig_of(Family::V4, 4, offloads);
    let (kernel, theirs) = kernel_end(&rig, 1);
    start_with_peer(&mut rig, 0, &["--datapath=bpf", fast_path], &kernel);
    let ours = End::of(&rig, 0);
    let pair = [2, 3].map(|node| plain_kernel_end(&rig, node));
    pair[0]
        .0
        .connect(&pair[1].0)
        .expect("connect the kernel nodes");
    let pairs = [[&ours, &theirs], [&pair[0].1, &pair[1].1]];
    stay_on_one_cpu();
    let mut retransmits = [const { Vec::new() }; 2];
    for _round in 0..ROUNDS {
        for (pair, retransmits) in pairs.iter().zip(&mut retransmits) {
            for [from, to] in [[pair[0], pair[1]], [pair[1], pair[0]]] {
                let stats =
                    transfer(&to.pod.ns, to.address(), &from.pod.ns, BULK).expect("bulk TCP");
                retransmits.push(stats.retransmits);
            }
        }
    }
    let [ours, kernels] = retransmits.map(median);
    assert!(
        ours <= kernels + SPURIOUS,
        "{ours} segments sent again in a run of ours, {kernels} in one of the kernel's"
    );
}

#[test]
fn no_more_retransmissions_than_the_kernel() {
    compare_retransmissions(Offloads::Default, OFF);
    compare_retransmissions(Offloads::Default, FAST);
}

#[test]
fn no_more_retransmissions_than_the_kernel_without_offloads() {
    compare_retransmissions(Offloads::Off, OFF);
    compare_retransmissions(Offloads::Off, FAST);
}

/// Starts the agent of node 0 over again with other flags.
fn restart(rig: &mut Rig, flags: &[&str]) {
    assert_eq!(rig.stop_agent(0), 0);
    rig.start_agent(0, flags);
    rig.wait_ready(0);
    rig.wait_converged();
}

/// Waits until packets can go around the stack of a node for its pod.
fn wait_for_pods(rig: &Rig, node: usize) {
    eventually(PATIENCE, "the gate knows the pod", || {
        let pods = rig.map_dump(node, "pods");
        let known = list(&pods).len() == 1;
        known.then_some(()).ok_or_else(|| format!("{pods}"))
    });
}

/// Sends the same packets by the kernel's data path and with each of these flags, to one kernel node.
fn compare_frames<A: Samples>(ports: Range<u16>, all_flags: &[&[&str]]) {
    if !privileged() {
        return;
    }
    let mut rig = rig_of(A::FAMILY, 2, Offloads::Off);
    let range = format!("{} {}", ports.start, ports.end - 1);
    rig.ns(0)
        .set_sysctl("net/ipv4/ip_local_port_range", &range)
        .expect("set the port range");
    let (kernel, theirs) = kernel_end(&rig, 1);
    start_with_peer(&mut rig, 0, &["--datapath=kernel"], &kernel);
    let (dst, to) = (A::of(&theirs.pod), theirs.address());
    // Nobody reads from it; it keeps the pod's kernel from answering with errors.
    let _sink = (theirs.pod.ns).run(|| UdpSocket::bind((to, 9)).expect("a socket in the pod"));
    let host = rig.ns(0).run(|| {
        let socket = UdpSocket::bind((A::FAMILY.unspecified(), 0)).expect("a socket");
        socket.connect((to, 9)).expect("connect it");
        socket
    });
    let between = [A::of(rig.pod(0)), dst];
    let by_kernel = frames::send_all(&rig, 0, between, &host, 1);
    assert!(
        !rig.instance(0).exists(),
        "the kernel's data path has no maps"
    );
    for flags in all_flags {
        if flags.contains(&"--bpf-device=veth") {
            // An existing device is kept. The new one gets the MAC address of the lease.
            rig.ns(0)
                .ip(&format!("link del {}", rig.device()))
                .expect("remove the device");
        }
        restart(&mut rig, flags);
        let fast = flags.contains(&FAST);
        if fast {
            wait_for_pods(&rig, 0);
        }
        // The stack sees the first packet of every flow.
        let times = if fast { 2 } else { 1 };
        let before = rig.counters(0).encap;
        let around = rig.packets(0, CounterId::FastEncap);
        let by_us = frames::send_all(&rig, 0, between, &host, times);
        let carried = rig.counters(0).encap - before;
        let wanted = by_us.len() - A::LEFT_TO_KERNEL;
        assert!(
            carried >= wanted,
            "{carried} of {wanted} by eBPF with {flags:?}"
        );
        let around = rig.packets(0, CounterId::FastEncap) - around;
        if fast {
            assert!(around > 1_550, "{around} around the stack with {flags:?}");
        } else {
            assert_eq!(around, 0, "{flags:?}");
        }
        by_us.assert_equals_kernel(&by_kernel, &ports);
    }
    assert!(by_kernel.source_ports() > usize::from(ports.end - ports.start).min(1_000) / 2);
}

#[test]
fn frames_equal_the_kernels() {
    let flags = [
        &["--datapath=bpf", OFF][..],
        &["--datapath=bpf", "--bpf-attach=clsact", OFF],
        &["--datapath=bpf", FAST],
        &["--datapath=bpf", "--bpf-attach=clsact", FAST],
        &["--datapath=bpf", "--bpf-device=veth", OFF],
        &["--datapath=bpf", "--bpf-device=veth", FAST],
    ];
    compare_frames::<Ipv4Addr>(32_768..61_000, &flags);
}

#[test]
fn frames_over_ipv6_equal_the_kernels() {
    let flags = [
        &["--datapath=bpf", OFF][..],
        &["--datapath=bpf", "--bpf-attach=clsact", FAST],
    ];
    compare_frames::<Ipv6Addr>(32_768..61_000, &flags);
}

#[test]
fn source_ports_are_the_kernels_in_another_range() {
    compare_frames::<Ipv4Addr>(20_000..20_501, &[&["--datapath=bpf", FAST]]);
}
