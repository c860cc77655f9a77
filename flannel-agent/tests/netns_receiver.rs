//! What a node makes of VXLAN packets, right and wrong: the same as the kernel's receiver.
//!
//! One node gets the same frames three times: with the kernel's data path, with eBPF over the kernel's device, and with eBPF
//! alone. What its inner stack and its pod see must be the same, and eBPF must count what it left alone by the right reason.

#[path = "netns_receiver/cases.rs"]
mod cases;
#[path = "netns_receiver/inner.rs"]
mod inner;
#[path = "netns_receiver/outer.rs"]
mod outer;
mod rig;
mod wire_rig;

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, UdpSocket},
    time::Duration,
};

use cases::{Case, Outcome, Target};
use flannel_common::{Direction, counter::CounterId};
use flannel_testkit::{
    Capture, LabOptions, Netns, RawSocket, Subnet, capture, eventually, mac_text, privileged,
    try_eventually,
};
use nix::{
    sched::{CpuSet, sched_setaffinity},
    unistd::Pid,
};
use rig::{DEVICE, Rig, list};
use wire_rig::{mac_of, reasons, vtep_mac};

/// The underlay carries more than the tunnel does, so that frames can be too large for the one and not for the other.
const UNDERLAY_MTU: u32 = 2_000;
const CONF: &str = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan","MTU":1500}}"#;
/// A node that is not there: its lease is, and its packets come from the test.
const PEER: Ipv4Addr = Ipv4Addr::new(192, 168, 77, 9);
const PEER_MAC: [u8; 6] = [0x02, 0xfe, 0, 0, 0, 0];
const LIMIT: Duration = Duration::from_secs(5);
/// How long the counters may take: a packet is dealt with before the call that sends it returns, unless the machine is busy.
const COUNTING: Duration = Duration::from_secs(2);

/// Every packet passes the stack.
const OFF: &str = "--bpf-fast-path=off";
/// What the stack has let pass goes around it.
const FAST: &str = "--bpf-fast-path=established";

/// Frames by the number of the case that made them.
type Seen = BTreeMap<u16, Vec<Vec<u8>>>;

/// What became of the frames of all cases.
#[derive(Debug, PartialEq)]
struct Observed {
    /// What the tunnel device handed to the stack.
    by_device: Seen,
    /// What reached the pod.
    by_pod: Seen,
}

/// Sends every case to node 0. `counted` is called for each with its frames on their way.
fn observe(rig: &Rig, target: &Target, cases: &[Case], mut counted: impl FnMut(&Case)) -> Observed {
    let pod = &rig.pod(0).ns;
    let device = start(rig.ns(0), DEVICE);
    let pod_side = start(pod, "eth0");
    let last = pod.run(|| UdpSocket::bind((target.pod, cases::SENTINEL_PORT)).expect("a socket"));
    last.set_read_timeout(Some(LIMIT)).expect("a time limit");
    let wire = RawSocket::open(rig.lab().underlay(), &rig.node(0).port).expect("a raw socket");
    for case in cases {
        for frame in &case.frames {
            wire.send(frame).expect("send to the node");
        }
        counted(case);
    }
    for frame in target.sentinel() {
        wire.send(&frame).expect("send to the node");
    }
    last.recv(&mut [0; 512]).expect("the last packet arrives");
    let [by_device, by_pod] = [device, pod_side].map(|capture| {
        let captured = capture.stop().expect("the capture");
        assert_eq!(captured.dropped, 0, "the capture is not complete");
        captured.packets
    });
    let mut observed = Observed {
        by_device: Seen::new(),
        by_pod: Seen::new(),
    };
    for packet in by_device {
        // The inner source MAC has the number. Without one it is the kernel's own, or a frame of a case that must not arrive.
        let number = match packet.data.get(6..12) {
            Some([0x02, 0xfe, 0, 0, a, b]) => u16::from_be_bytes([*a, *b]),
            _ => inner_number(&packet.data),
        };
        observed
            .by_device
            .entry(number)
            .or_default()
            .push(packet.data);
    }
    for packet in by_pod {
        let number = inner_number(&packet.data);
        observed.by_pod.entry(number).or_default().push(packet.data);
    }
    // Background: neighbour discovery, and whatever else has no number.
    observed.by_device.remove(&0);
    observed.by_pod.remove(&0);
    observed
}

fn start(ns: &Netns, ifname: &str) -> Capture {
    Capture::start_directed(ns, ifname, "", capture::Direction::In).expect("a capture")
}

/// The identification of an IPv4 packet from the peer's pods, which is the number of its case.
fn inner_number(frame: &[u8]) -> u16 {
    match (frame.get(12..14), frame.get(18..20), frame.get(26..29)) {
        (Some([0x08, 0x00]), Some([a, b]), Some([10, 244, 9])) => u16::from_be_bytes([*a, *b]),
        _ => 0,
    }
}

/// A veth queues packets on the CPU that sends them: on one CPU nothing overtakes the last packet.
fn stay_on_one_cpu() {
    let mut cpus = CpuSet::new();
    cpus.set(0).expect("CPU 0");
    sched_setaffinity(Pid::from_raw(0), &cpus).expect("stay on CPU 0");
}

/// Packets by what eBPF did with them.
fn counts(rig: &Rig) -> BTreeMap<&'static str, u64> {
    let mut counts = reasons(rig, 0, Direction::Decap);
    counts.insert(CARRIED, rig.counters(0).decap);
    counts
}

const CARRIED: &str = "carried";

/// Waits until the counters have moved by what the case says, and not by more. Else says how they are.
fn check_counts(
    rig: &Rig,
    before: &mut BTreeMap<&'static str, u64>,
    case: &Case,
    alone: bool,
) -> Result<(), String> {
    let mut want = before.clone();
    let reason = match case.outcome(alone) {
        Outcome::Carried => Some(CARRIED),
        Outcome::Left(reason) => Some(reason),
        Outcome::NotOurs => None,
    };
    if let Some(reason) = reason {
        *want.entry(reason).or_default() += case.counted;
    }
    let mut now = BTreeMap::new();
    let outcome = try_eventually(COUNTING, &case.name, || {
        now = counts(rig);
        (now == want).then_some(()).ok_or("")
    });
    let was = std::mem::replace(before, now);
    outcome.map_err(|_| format!("counters went from {was:?} to {before:?}, wanted {want:?}"))
}

/// Sends every case twice: what the stack has let pass the first time goes around it the second time, if it may.
fn observe_around(rig: &Rig, target: &Target, cases: &[Case]) -> Observed {
    eventually(LIMIT, "the gate knows the pod", || {
        let pods = rig.map_dump(0, "pods");
        let known = list(&pods).len() == 1;
        known.then_some(()).ok_or_else(|| format!("{pods}"))
    });
    eventually(
        LIMIT,
        "somebody listens for what the stack puts together",
        || {
            let sockets = rig.ns(0).exec(["ss", "-Huln", "sport", "=", "8472"]);
            let sockets = sockets.map_err(|error| format!("{error:#}"))?;
            (!sockets.trim().is_empty()).then_some(()).ok_or(sockets)
        },
    );
    observe(rig, target, cases, |_| ());
    let before = rig.packets(0, CounterId::FastDecap);
    let observed = observe(rig, target, cases, |_| ());
    let around = rig.packets(0, CounterId::FastDecap) - before;
    assert!(around > 20, "{around} packets went around the stack");
    observed
}

#[test]
fn every_frame_meets_the_kernels_fate() {
    if !privileged() {
        return;
    }
    stay_on_one_cpu();
    let options = LabOptions {
        nodes: 1,
        mtu: UNDERLAY_MTU,
        ..LabOptions::default()
    };
    let mut rig = Rig::with(options, CONF);
    rig.put_lease(
        Subnet::new(Ipv4Addr::new(10, 244, 9, 0), 24),
        PEER,
        &mac_text(PEER_MAC),
    );
    rig.start_agent(0, &["--datapath=kernel"]);
    rig.wait_ready(0);
    let pod = rig.add_pod(0);
    let target = Target {
        node: rig.node(0).ip,
        node_mac: mac_of(rig.ns(0), "eth0"),
        vtep_mac: vtep_mac(rig.ns(0)),
        pod: pod.ip,
        peer: PEER,
    };
    // Keeps the pod's kernel from answering with errors.
    let _sink = (pod.ns).run(|| UdpSocket::bind((pod.ip, cases::PORT)).expect("a socket"));
    let cases = cases::all(&target);
    let by_kernel = observe(&rig, &target, &cases, |_| ());
    let mut failures = Vec::new();

    for (flags, alone) in [
        (&["--datapath=bpf", OFF][..], false),
        (&["--datapath=bpf", "--bpf-attach=clsact", OFF], false),
        (&["--datapath=bpf", FAST], false),
        (&["--datapath=bpf", "--bpf-device=veth", OFF], true),
        (&["--datapath=bpf", "--bpf-device=veth", FAST], true),
    ] {
        assert_eq!(rig.stop_agent(0), 0);
        if alone {
            rig.ns(0)
                .ip(&format!("link del {DEVICE}"))
                .expect("remove the device");
        }
        rig.start_agent(0, flags);
        rig.wait_ready(0);
        let around = flags.contains(&FAST);
        let by_us = if around {
            observe_around(&rig, &target, &cases)
        } else {
            let mut before = counts(&rig);
            observe(&rig, &target, &cases, |case| {
                if let Err(error) = check_counts(&rig, &mut before, case, alone) {
                    failures.push(format!("{}, {flags:?}: {error}", case.name));
                }
            })
        };
        for case in &cases {
            if let Err(error) = compare(case, &by_kernel, &by_us, alone, around) {
                failures.push(format!("{}, {flags:?}: {error}", case.name));
            }
        }
    }
    assert!(
        failures.is_empty(),
        "{} failures:\n{}",
        failures.len(),
        failures.join("\n")
    );
    // The comparison is of something.
    assert!(
        by_kernel.by_pod.len() > 50,
        "{} cases reach the pod",
        by_kernel.by_pod.len()
    );
}

/// What the node saw of a case is what it saw with the kernel's data path. What goes `around` the stack is seen by the pod alone.
fn compare(
    case: &Case,
    kernel: &Observed,
    ours: &Observed,
    alone: bool,
    around: bool,
) -> Result<(), String> {
    let sides = [
        ("pod", &kernel.by_pod, &ours.by_pod),
        ("device", &kernel.by_device, &ours.by_device),
    ];
    for (place, kernel, ours) in sides.into_iter().take(if around { 1 } else { 2 }) {
        let (kernel, ours) = (kernel.get(&case.number), ours.get(&case.number));
        let want = match alone {
            // With nobody to leave it to, it is dropped.
            true if !case.same_alone() => None,
            true if case.unverified => continue,
            _ => kernel,
        };
        // Around the stack nobody looks at that before the pod, which drops it.
        let by_the_pod = around && case.name.starts_with("inner header checksum wrong");
        if ours != want && !by_the_pod {
            return Err(format!("at the {place} {ours:02x?}, wanted {want:02x?}"));
        }
    }
    Ok(())
}
