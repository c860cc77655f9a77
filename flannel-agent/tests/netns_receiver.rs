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
#[path = "netns_receiver/v4.rs"]
mod v4;
#[path = "netns_receiver/v6.rs"]
mod v6;
mod wire_rig;

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket},
    time::Duration,
};

use cases::{Case, Outcome, Received, Target};
use flannel_common::{Direction, counter::CounterId};
use flannel_testkit::{
    Capture, LabOptions, Netns, Prefix, RawSocket, capture, eventually, mac_text, privileged,
    try_eventually,
};
use nix::{
    sched::{CpuSet, sched_setaffinity},
    unistd::Pid,
};
use rig::{Rig, list, net_conf};
use wire_rig::{mac_of, reasons};

/// The underlay carries more than the tunnel does, so that frames can be too large for the one and not for the other.
const UNDERLAY_MTU: u32 = 2_000;
/// Of a node that is not there: its lease is, and its packets come from the test.
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
fn observe<A: Received>(
    rig: &Rig,
    target: &Target<A>,
    cases: &[Case],
    mut counted: impl FnMut(&Case),
) -> Observed {
    let pod = &rig.pod(0).ns;
    let device = start(rig.ns(0), &rig.device());
    let pod_side = start(pod, "eth0");
    let last: (IpAddr, u16) = (target.pod.into(), cases::SENTINEL_PORT);
    let last = pod.run(|| UdpSocket::bind(last).expect("a socket"));
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
            _ => A::number(&packet.data),
        };
        observed
            .by_device
            .entry(number)
            .or_default()
            .push(packet.data);
    }
    for packet in by_pod {
        let number = A::number(&packet.data);
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
fn observe_around<A: Received>(rig: &Rig, target: &Target<A>, cases: &[Case]) -> Observed {
    eventually(LIMIT, "the gate knows the pod", || {
        let pods = rig.map_dump(0, "pods");
        let known = list(&pods).len() == 1;
        known.then_some(()).ok_or_else(|| format!("{pods}"))
    });
    rig.wait_fragments_heard(0);
    observe(rig, target, cases, |_| ());
    let before = rig.packets(0, CounterId::FastDecap);
    let observed = observe(rig, target, cases, |_| ());
    let around = rig.packets(0, CounterId::FastDecap) - before;
    assert!(around > 20, "{around} packets went around the stack");
    observed
}

#[test]
fn every_frame_meets_the_kernels_fate() {
    meets::<Ipv4Addr>(&[
        (&["--datapath=bpf", OFF], false),
        (&["--datapath=bpf", "--bpf-attach=clsact", OFF], false),
        (&["--datapath=bpf", FAST], false),
        (&["--datapath=bpf", "--bpf-device=veth", OFF], true),
        (&["--datapath=bpf", "--bpf-device=veth", FAST], true),
    ]);
}

#[test]
fn every_frame_of_ipv6_meets_the_kernels_fate() {
    meets::<Ipv6Addr>(&[
        (&["--datapath=bpf", OFF], false),
        (&["--datapath=bpf", FAST], false),
    ]);
}

/// With each of these flags, and whether eBPF is alone with them.
fn meets<A: Received>(ways: &[(&[&str], bool)]) {
    if !privileged() {
        return;
    }
    stay_on_one_cpu();
    let options = LabOptions {
        nodes: 1,
        families: A::FAMILY.into(),
        mtu: UNDERLAY_MTU,
        ..LabOptions::default()
    };
    let conf = net_conf(A::FAMILY.into());
    let conf = conf.replace(r#""vxlan""#, r#""vxlan","MTU":1500"#);
    let mut rig = Rig::with(options, &conf);
    let peers = match A::PEER_POD.into() {
        IpAddr::V4(pod) => Prefix::new(pod, 24),
        IpAddr::V6(pod) => Prefix::new(pod, 64),
    };
    rig.put_lease_of(peers, A::PEER, &mac_text(PEER_MAC));
    rig.start_agent(0, &["--datapath=kernel"]);
    rig.wait_ready(0);
    let pod = rig.add_pod(0);
    let device = rig.device();
    let target = Target::<A> {
        node: A::at(rig.node(0)),
        node_mac: mac_of(rig.ns(0), "eth0"),
        vtep_mac: mac_of(rig.ns(0), &device),
        pod: A::of(&pod),
    };
    // Keeps the pod's kernel from answering with errors.
    let sink = (target.pod.into(), cases::PORT);
    let _sink = (pod.ns).run(|| UdpSocket::bind(sink).expect("a socket"));
    let cases = cases::all(&target);
    let by_kernel = observe(&rig, &target, &cases, |_| ());
    let mut failures = Vec::new();

    for (flags, alone) in ways.iter().copied() {
        assert_eq!(rig.stop_agent(0), 0);
        if alone {
            rig.ns(0)
                .ip(&format!("link del {device}"))
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
