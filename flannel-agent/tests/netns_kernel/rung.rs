//! Of all ways to carry the overlay the agent takes the best that this kernel has, and says why when that is not eBPF.

use std::time::Duration;

use flannel_agent::dataplane::bpf::AttachMode;
use flannel_testkit::{
    Confinement,
    json::{ip_json, link},
    privileged,
    traffic::{self, Amount},
};

use crate::{
    confined::complaints,
    lacks,
    rig::{DEVICE, Rig},
    wire_rig::{End, kernel_end, start_with_peer},
};

/// One byte, the largest unfragmented datagram, one more, many fragments.
const SIZES: [usize; 4] = [1, 1422, 1423, 9000];

/// A way to carry the overlay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rung {
    /// eBPF, in front of a device of this kind.
    Bpf(&'static str),
    /// The kernel's device alone.
    Kernel,
    Nothing,
}

fn best() -> Rung {
    let unattachable = lacks("cls_bpf") && lacks("tcx");
    let bpf = !lacks("bpf") && !unattachable;
    match (bpf, !lacks("vxlan")) {
        (true, true) => Rung::Bpf("vxlan"),
        (true, false) => Rung::Bpf("veth"),
        (false, true) => Rung::Kernel,
        (false, false) => Rung::Nothing,
    }
}

#[test]
fn the_agent_makes_the_best_of_what_there_is() {
    if !privileged() {
        return;
    }
    match best() {
        Rung::Bpf("vxlan") => with_a_kernel_node(check_bpf),
        Rung::Bpf(_) => with_another_agent(),
        Rung::Kernel => with_a_kernel_node(check_kernel),
        Rung::Nothing => nothing(),
    }
}

/// The other end is flannel's own way of doing it, with `ip`.
fn with_a_kernel_node(check: fn(&mut Rig)) {
    let mut rig = Rig::new(2);
    let (kernel, theirs) = kernel_end(&rig, 1);
    start_with_peer(&mut rig, 0, &[], &kernel);
    exchange(&End::of(&rig, 0), &theirs);
    assert_eq!(device_kind(&rig, 0), "vxlan");
    check(&mut rig);
}

fn check_bpf(rig: &mut Rig) {
    let status = rig.status_is_ok(0);
    let path = &status["datapath"];
    assert_eq!(path["mode"], "bpf", "{status}");
    let attach = if lacks("tcx") { "clsact" } else { "tcx" };
    assert_eq!(path["attach"], attach, "{status}");
    assert_eq!(AttachMode::detect().as_str(), attach);
    let log = rig.agent(0).log();
    assert_eq!(complaints(&log), Vec::<&str>::new());
}

fn check_kernel(rig: &mut Rig) {
    let status = rig.status_is_ok(0);
    assert_eq!(status["datapath"]["mode"], "kernel", "{status}");
    let reason = status["datapath"]["reason"].as_str().expect("a reason");
    assert!(!reason.is_empty(), "{status}");
    let log = rig.agent(0).log();
    let said = complaints(&log);
    assert_eq!(said.len(), 1, "{log}");
    assert!(said[0].contains("without eBPF"), "{log}");
}

/// There is no kernel node in a kernel without the device.
fn with_another_agent() {
    let mut rig = Rig::start(2, &[]);
    exchange(&End::of(&rig, 0), &End::of(&rig, 1));
    for node in 0..2 {
        assert_eq!(device_kind(&rig, node), "veth");
        let status = rig.status_is_ok(node);
        assert_eq!(status["datapath"]["mode"], "bpf", "{status}");
        assert_eq!(status["device"]["kind"], "veth", "{status}");
        let log = rig.agent(node).log();
        let said = complaints(&log);
        assert_eq!(said.len(), 1, "{log}");
        assert!(said[0].contains("eBPF carries the overlay alone"), "{log}");
    }
}

fn nothing() {
    let mut rig = Rig::new(1);
    let look = |rig: &Rig| {
        [
            &["-d", "link"][..],
            &["-4", "addr"],
            &["-4", "route", "show", "table", "all"],
        ]
        .map(|what| ip_json(rig.ns(0), what).expect("ip"))
    };
    let before = look(&rig);
    let (code, log) = rig.run_to_end(0, &[], &Confinement::default());
    assert_eq!(code, 4, "{log}");
    let said = complaints(&log);
    assert_eq!(said.len(), 1, "{log}");
    for needle in ["vxlan", "eBPF"] {
        assert!(said[0].contains(needle), "no {needle:?} in {log}");
    }
    assert_eq!(look(&rig), before);
}

/// Pings, datagrams and streams in both directions.
fn exchange(a: &End, b: &End) {
    for (from, to) in [(a, b), (b, a)] {
        let (client, server) = (&from.pod, &to.pod);
        let what = format!("{} to {}", client.name, server.name);
        let stats = traffic::ping(&client.ns, server.ip, 20, Duration::from_millis(50));
        let stats = stats.unwrap_or_else(|error| panic!("ping, {what}: {error:#}"));
        assert_eq!(stats.lost, 0, "{what}: {stats:?}");
        traffic::udp_echo(&server.ns, server.ip, &client.ns, &SIZES)
            .unwrap_or_else(|error| panic!("UDP, {what}: {error:#}"));
        traffic::tcp_transfer(&server.ns, server.ip, &client.ns, Amount::Bytes(2 << 20))
            .unwrap_or_else(|error| panic!("TCP, {what}: {error:#}"));
    }
}

/// The kind of the node's tunnel device, as `ip` has it.
fn device_kind(rig: &Rig, node: usize) -> String {
    let link = link(rig.ns(node), DEVICE).expect("the tunnel device");
    let kind = link["linkinfo"]["info_kind"].as_str().expect("a kind");
    kind.to_owned()
}
