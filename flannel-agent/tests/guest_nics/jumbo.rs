//! Jumbo frames: 9000 bytes on the wire, 8950 for pods.

use std::time::Duration;

use flannel_testkit::{
    Capture, Offloads, eventually,
    traffic::{ping_sized, udp_echo},
};

use crate::{
    cards, has_program,
    rig::{PATIENCE, Rig},
    stream_both_ways,
};

const MTU: u32 = 9_000;
const POD_MTU: u32 = MTU - 50;
const LIMIT: Duration = Duration::from_secs(3);

/// The largest packet crosses whole, one byte more does not, and streams use it.
fn large_frames_arrive(rig: &Rig, (from, to): (usize, usize)) {
    let largest = POD_MTU as usize - 28;
    let (a, b) = (rig.pod(from), rig.pod(to));
    eventually(PATIENCE, "the largest packet", || {
        ping_sized(&a.ns, b.ip, largest, true, LIMIT)
    });
    ping_sized(&a.ns, b.ip, largest + 1, true, LIMIT).expect_err("more than the pod's MTU");
    udp_echo(&b.ns, b.ip, &a.ns, &[1_422, 1_423, 4_000, largest, 20_000]).expect("datagrams");
}

#[test]
fn pods_use_them() {
    for flags in [["--bpf-xdp=auto"], ["--bpf-xdp=off"]] {
        let mut rig = cards(Offloads::Off, MTU);
        rig.start_all(&flags);
        assert_eq!(rig.subnet_env(0, "FLANNEL_MTU"), POD_MTU.to_string());
        for way in [(0, 1), (1, 0)] {
            large_frames_arrive(&rig, way);
        }
        let port = rig.node(0).port.clone();
        let wire = Capture::start(rig.lab().underlay(), &port, "udp port 8472").expect("a capture");
        stream_both_ways(&rig);
        let wire = wire.stop().expect("stop the capture");
        let longest = wire.packets.iter().map(|packet| packet.wire_len).max();
        assert_eq!(longest, Some(MTU + 14));
        assert_eq!(wire.malformed().expect("tshark"), Vec::<String>::new());
        for node in 0..2 {
            let xdp = rig.status_is_ok(node)["datapath"]["xdp"].clone();
            // Kernels whose driver takes no program with this MTU say so.
            let expected = match (has_program(&rig, node), flags[0]) {
                (true, _) => "works",
                (false, "--bpf-xdp=off") => "off",
                (false, _) => "refused",
            };
            assert_eq!(xdp["standing"], expected, "{xdp}");
        }
    }
}

/// A driver may take a larger MTU with a program attached with which it then drops every larger frame.
#[test]
fn the_mtu_may_grow_while_xdp_is_attached() {
    let mut rig = cards(Offloads::Default, 1_500);
    rig.start_all(&[]);
    crate::meet(&rig);
    crate::wait_standing(&rig, 1, "works", true);
    let port = rig.node(0).port.clone();
    let underlay = rig.lab().underlay();
    for (ns, device) in [
        (underlay, port.as_str()),
        (underlay, "br0"),
        (rig.ns(0), "eth0"),
        (rig.ns(1), "eth0"),
    ] {
        ns.ip(&format!("link set {device} mtu {MTU}"))
            .unwrap_or_else(|error| panic!("{device}: {error:#}"));
    }
    for node in 0..2 {
        eventually(PATIENCE, "the pods' MTU grows", || {
            let mtu = rig.subnet_env(node, "FLANNEL_MTU");
            (mtu == POD_MTU.to_string()).then_some(()).ok_or(mtu)
        });
        // Pods that begin now have it.
        let bridge = format!("link set cni0 mtu {POD_MTU}");
        rig.ns(node).ip(&bridge).expect("the pods' bridge");
        for (ns, device) in [
            (rig.ns(node), rig.pod(node).host_if.as_str()),
            (&rig.pod(node).ns, "eth0"),
        ] {
            ns.ip(&format!("link set {device} mtu {POD_MTU}"))
                .expect("the pod's interface");
        }
    }
    for way in [(0, 1), (1, 0)] {
        large_frames_arrive(&rig, way);
    }
    stream_both_ways(&rig);
}
