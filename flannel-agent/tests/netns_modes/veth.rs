//! No vxlan device type: eBPF does all the work, on a veth pair that carries the device's name.

use std::{net::IpAddr, time::Duration};

use aya::programs::TcAttachType;
use flannel_testkit::{
    Confinement, Families, Family, LabOptions, RawSocket, eventually,
    json::link,
    packet::{Csum, Inner, Vxlan},
    privileged,
    traffic::{self, Amount, FloodPing, UdpEnd},
};

use crate::{
    assert_one_warning,
    confined::complaints,
    device_kind, exchange, restart,
    rig::{DEVICE, PATIENCE, Rig, hooks::programs},
    stream,
};

/// The far end of the pair that carries IPv6.
const FAR_END: &str = "flannelp6.1";

/// Node 0 lacks the device type, node 1 was told to do without, node 2 has both, node 3 has the kernel's device alone.
fn four_kinds(families: Families) -> Rig {
    let options = LabOptions {
        nodes: 4,
        ..LabOptions::default()
    };
    let mut rig = Rig::of(families, options);
    rig.start_confined(0, &[], &Confinement::NO_VXLAN);
    rig.start_agent(1, &["--bpf-device=veth"]);
    rig.start_agent(2, &[]);
    rig.start_agent(3, &["--datapath=kernel"]);
    for node in 0..4 {
        rig.wait_ready(node);
        rig.add_pod(node);
    }
    rig.wait_converged();
    rig
}

#[test]
fn without_the_device_type_the_overlay_reaches_every_kind_of_node() {
    if !privileged() {
        return;
    }
    let mut rig = four_kinds(Families::V4);
    let kinds: Vec<String> = (0..4).map(|node| device_kind(&rig, node)).collect();
    assert_eq!(kinds, ["veth", "veth", "vxlan", "vxlan"]);
    for (a, b) in [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3)] {
        exchange(&rig, a, b);
    }
    for node in [0, 1] {
        let status = rig.status(node);
        assert_eq!(status["ok"], true, "{status}");
        assert_eq!(status["device"]["kind"], "veth", "{status}");
        assert_eq!(status["datapath"]["mode"], "bpf", "{status}");
        assert_eq!(status["problems"], serde_json::json!([]), "{status}");
    }
    assert_one_warning(
        &mut rig,
        0,
        &["refuses vxlan devices", "eBPF carries the overlay alone"],
    );
    assert_one_warning(&mut rig, 1, &["--bpf-device=veth"]);
}

/// Both overlays at once, of which that over IPv6 needs a checksum of every packet.
#[test]
fn without_the_device_type_both_families_reach_every_kind_of_node() {
    if !privileged() {
        return;
    }
    let mut rig = four_kinds(Families::Dual);
    for (family, pairs) in [
        (Family::V6, &[(0, 1), (0, 2), (0, 3), (1, 3)][..]),
        (Family::V4, &[(0, 1), (0, 3)]),
    ] {
        rig.look_at(family);
        rig.wait_converged();
        let kinds: Vec<String> = (0..4).map(|node| device_kind(&rig, node)).collect();
        assert_eq!(kinds, ["veth", "veth", "vxlan", "vxlan"], "{family}");
        for (a, b) in pairs {
            exchange(&rig, *a, *b);
        }
    }
    // Many streams at a time: what the near end cuts up comes in at the far end in a burst.
    let (from, to) = (rig.pod(0).clone(), rig.pod(3).clone());
    for way in [&[][..], &["-R"]] {
        let flags: Vec<&str> = ["-n", "256M", "-P", "16"]
            .iter()
            .chain(way)
            .copied()
            .collect();
        let report = traffic::iperf3(&to.ns, to.address(Family::V6), &from.ns, &flags);
        report.unwrap_or_else(|error| panic!("iperf3 {flags:?}: {error:#}"));
    }
    for node in 0..4 {
        let status = rig.status(node);
        assert_eq!(status["ok"], true, "{status}");
        for ns in [rig.ns(node), &rig.pod(node).ns] {
            let counted = ns.exec(["cat", "/proc/net/snmp6"]).expect("counters");
            let bad = counted.lines().filter(|line| line.contains("InCsumErrors"));
            let bad: Vec<&str> = bad.filter(|line| !line.ends_with("\t0")).collect();
            assert_eq!(bad, Vec::<&str>::new(), "of node {node}");
        }
    }
    for node in [0, 1] {
        let status = rig.status(node);
        for overlay in [&status, &status["ipv6"]] {
            assert_eq!(overlay["device"]["kind"], "veth", "{status}");
            assert_eq!(overlay["problems"], serde_json::json!([]), "{status}");
        }
    }
    let log = rig.agent(0).log();
    let said = complaints(&log);
    let of_the_device = |line: &&&str| line.contains("eBPF carries the overlay alone");
    assert_eq!(
        said.iter().filter(of_the_device).count(),
        said.len(),
        "{log}"
    );
}

#[test]
fn a_node_without_the_device_type_follows_the_cluster_and_survives_its_agent() {
    if !privileged() {
        return;
    }
    let mut rig = four_kinds(Families::V4);
    // Leave, come back, come back with another address.
    let ghost = "10.244.77.0/24".parse().expect("a subnet");
    for (ip, mac) in [
        ("192.168.77.60", "02:00:00:00:77:01"),
        ("192.168.77.61", "02:00:00:00:77:02"),
    ] {
        rig.put_lease(ghost, ip.parse().expect("an address"), mac);
        eventually(PATIENCE, "the newcomer is known", || {
            let peers = rig.peers(0);
            let found = crate::list(&peers).iter().any(|peer| {
                peer["subnet"] == "10.244.77.0/24"
                    && peer["vtep"] == ip
                    && peer["path"] == "bpf"
                    && peer["kernel_complete"] == true
            });
            found.then_some(()).ok_or(format!("{peers}"))
        });
    }
    rig.remove_lease(ghost);
    rig.wait_converged();

    let before = link(rig.ns(0), DEVICE).expect("the device");
    let flood =
        FloodPing::start(&rig.pod(0).ns, rig.pod(3).ip, Duration::from_millis(1)).expect("a flood");
    restart(&mut rig, 0, &[], &Confinement::NO_VXLAN);
    rig.wait_converged();
    let stats = flood.stop().expect("the account");
    assert_eq!(stats.lost, 0, "{stats:?}");
    let after = link(rig.ns(0), DEVICE).expect("the device");
    for field in ["ifindex", "address", "mtu"] {
        assert_eq!(before[field], after[field], "{field}");
    }
    stream(&rig, 0, 3, Amount::Bytes(20 << 20));
    stream(&rig, 3, 0, Amount::Bytes(20 << 20));
}

#[test]
fn the_device_changes_its_kind_there_and_back() {
    change_kind(Family::V4);
}

#[test]
fn the_device_of_ipv6_changes_its_kind_there_and_back() {
    change_kind(Family::V6);
}

fn change_kind(family: Family) {
    if !privileged() {
        return;
    }
    let mut rig = Rig::start_of(family.into(), 2, &[]);
    let device = rig.device();
    let address = |rig: &Rig| link(rig.ns(0), &device).expect("the device")["address"].clone();
    let (mac, leases) = (address(&rig), rig.leases_of(family));
    let steps: [(&[&str], &str); 6] = [
        (&["--bpf-device=veth"], "veth"),
        (&[], "vxlan"),
        (&["--bpf-device=veth", "--bpf-attach=clsact"], "veth"),
        (&["--datapath=kernel"], "vxlan"),
        (&["--bpf-device=veth"], "veth"),
        (&["--bpf-device=vxlan"], "vxlan"),
    ];
    for (flags, kind) in steps {
        rig.kill_agent(0);
        rig.start_agent(0, flags);
        rig.wait_ready(0);
        rig.wait_converged();
        assert_eq!(device_kind(&rig, 0), kind, "{flags:?}");
        assert_eq!(rig.leases_of(family), leases, "{flags:?}");
        assert_eq!(address(&rig), mac, "{flags:?}");
        exchange(&rig, 0, 1);
        let (far, stand_ins) = match family {
            Family::V4 => ("flannelp.1", ["flannelt.1", "flannelu.1"]),
            Family::V6 => ("flannelp6.1", ["flannelt6.1", "flannelu6.1"]),
        };
        for leftover in [far, "flan-1"].into_iter().chain(stand_ins) {
            let there = link(rig.ns(0), leftover).is_ok();
            assert_eq!(there, kind == "veth" && leftover == far, "{leftover}");
        }
    }
}

/// Somebody takes away what hangs on the far end, or gives the near end its offloads back.
#[test]
fn the_far_end_is_kept_as_it_has_to_be() {
    if !privileged() {
        return;
    }
    for attach in ["tcx", "clsact"] {
        let attach_flag = format!("--bpf-attach={attach}");
        let rig = Rig::start_of(Families::V6, 2, &["--bpf-device=veth", &attach_flag]);
        let ns = rig.ns(0);
        let there = || programs(ns, FAR_END, TcAttachType::Ingress);
        let offload = || {
            let shown = ns.exec(["ethtool", "-k", "flannel-v6.1"]).expect("ethtool");
            shown.contains("tx-checksumming: on")
        };
        let is_whole = || {
            let found = there();
            let right =
                matches!(&found[..], [one] if one.name == "to_overlay" && one.attach == attach);
            (right && !offload())
                .then_some(())
                .ok_or(format!("{found:?}"))
        };
        is_whole().expect("the far end");
        if attach == "clsact" {
            ns.exec(["tc", "qdisc", "del", "dev", FAR_END, "clsact"])
                .expect("take the filter away");
            assert_eq!(there().len(), 0);
            eventually(PATIENCE, "the filter is back", is_whole);
        }
        ns.exec(["ethtool", "-K", "flannel-v6.1", "tx", "on"])
            .expect("switch offload on");
        assert!(offload());
        eventually(
            PATIENCE,
            "the near end leaves nothing to hardware",
            is_whole,
        );
        exchange(&rig, 0, 1);
    }
}

/// Nothing of the kernel's sends outer packets of IPv6 in fragments. Who does is heard: the stack puts them together for a socket of the
/// agent.
#[test]
fn outer_fragments_of_ipv6_arrive_without_a_device() {
    if !privileged() {
        return;
    }
    let rig = Rig::start_of(Families::V6, 2, &["--bpf-device=veth"]);
    rig.wait_fragments_heard(1);
    let mac = |node: usize, name: &str| {
        let link = link(rig.ns(node), name).expect("a device");
        let text = link["address"].as_str().expect("an address").to_owned();
        let bytes = text.split(':').map(|byte| u8::from_str_radix(byte, 16));
        let bytes: Result<Vec<u8>, _> = bytes.collect();
        <[u8; 6]>::try_from(bytes.expect("bytes")).expect("six of them")
    };
    let [from, to] = [0, 1].map(|node| match rig.pod(node).address(Family::V6) {
        IpAddr::V6(ip) => ip,
        IpAddr::V4(ip) => panic!("{ip}"),
    });
    let receiver = UdpEnd::bind(&rig.pod(1).ns, to, 4_000).expect("a socket");
    let wire = RawSocket::open(rig.ns(0), "eth0").expect("a raw socket");
    let data: Vec<u8> = (0..1_300_u16).map(|at| at as u8).collect();
    for csum in [Csum::Wrong, Csum::Right] {
        let macs = [0, 1].map(|node| mac(node, &rig.device()));
        let inner = Inner::udp(from, to, 4_000, &data).with_macs(macs[0], macs[1]);
        let mut frame = Vxlan::new(rig.node(0).ipv6, rig.node(1).ipv6, 1, inner.bytes());
        (frame.src_mac, frame.dst_mac) = (mac(0, "eth0"), mac(1, "eth0"));
        frame.udp_csum = csum;
        let pieces = frame.fragments(600).expect("fragments");
        assert_eq!(pieces.len(), 3);
        for piece in pieces {
            wire.send(&piece).expect("send");
        }
    }
    // Only the one with the right checksum, and that to the byte.
    let socket = receiver.socket();
    let mut buffer = [0; 2_000];
    let len = socket.recv(&mut buffer).expect("what was sent");
    assert_eq!(buffer[..len], data);
    let again = receiver
        .has_some(Duration::from_millis(200))
        .expect("a look");
    assert!(!again, "the one with a wrong checksum has arrived, too");
}
