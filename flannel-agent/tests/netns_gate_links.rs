//! Other labs: uplinks without offloads, stacked ones, pods of other sizes, super-packets beyond 64 kB.

mod gate_rig;
mod rig;

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use anyhow::{Context as _, ensure};
use flannel_testkit::{
    Capture, Direction, Family, LabOptions, Netns, Node, Offloads, Pod,
    json::link,
    services::{Flavour, iptables_program},
    set_socket_option,
    traffic::{self, Amount, TcpPair, TcpServer, UdpEnd},
    try_eventually,
};
use gate_rig::{
    DNS, Extra, Gate, Mode, Vip,
    Who::{A, A2, B, B2},
};
use rig::PATIENCE;
use rtnetlink::{LinkMessageBuilder, LinkUnspec, packet_route::link::LinkAttribute};

/// MTU of pods that are smaller than they need be.
const SMALL: u32 = 1400;

/// What pods usually do.
fn usual(gate: &Gate) -> anyhow::Result<()> {
    let server = gate.serve(B);
    let near = gate.serve(A2);
    let names = gate.udp(B, DNS);
    for target in [
        server.address,
        near.address,
        gate.vip(Vip::Remote),
        gate.vip(Vip::Local),
    ] {
        let mut pair = TcpPair::connect(gate.ns(A), target, &[&server, &near])?;
        for bytes in [1, 1000, 60_000, 2 << 20, 1] {
            pair.exchange(bytes)
                .with_context(|| format!("{bytes} bytes to {target}"))?;
        }
        pair.close()?;
    }
    let client = gate.udp(A, 0);
    // The largest that fits into the MTU of a small pod and of a usual one, and what does not.
    let header = gate.family().header() + 8;
    let (small, whole) = (SMALL as usize - header, gate.pod_mtu() as usize - header);
    let mut datagrams = vec![1, 1000, small, small + 1, whole, whole + 1, 5000];
    // What a pod cuts its node puts together for connection tracking. Over IPv6 the kernel then cuts it for the tunnel's MTU, which is no
    // good for a pod with less: the other node may not cut it again.
    let mtu = link(gate.ns(B), "eth0")?["mtu"]
        .as_u64()
        .context("no MTU")?;
    if gate.family() == Family::V6 && mtu < u64::from(gate.pod_mtu()) {
        datagrams.retain(|bytes| (bytes + header) as u64 <= mtu);
    }
    for bytes in datagrams {
        client.ask(names.address, &[&names], bytes)?;
        client.ask(gate.vip(Vip::RemoteUdp), &[&names], bytes)?;
    }
    drop((server, near));
    traffic::tcp_transfer(gate.ns(B), gate.ip(B), gate.ns(A), Amount::Bytes(20 << 20))?;
    let fast = gate.fast(0);
    let bypass = fast.encap > 50 && fast.local > 10;
    ensure!(bypass || gate.modes[0] == Mode::Off, "{fast:?}");
    Ok(())
}

fn other_lab(extra: Extra<'_>, modes: &[Mode]) {
    if !flannel_testkit::privileged() {
        return;
    }
    for mode in modes {
        let gate = Gate::with([*mode; 3], Flavour::Iptables, extra);
        let what = (mode, extra.family);
        usual(&gate).unwrap_or_else(|error| panic!("{what:?}: {error:#}"));
        gate.assert_no_invalid("at the end");
    }
}

fn without_offloads(family: Family) -> Extra<'static> {
    Extra {
        lab: LabOptions {
            offloads: Offloads::Off,
            ..LabOptions::default()
        },
        ..Extra::over(family)
    }
}

#[test]
fn uplinks_without_offloads() {
    other_lab(without_offloads(Family::V4), &Mode::ALL);
}

#[test]
fn uplinks_without_offloads_over_ipv6() {
    other_lab(without_offloads(Family::V6), &[Mode::Established]);
}

fn with_small_pods(family: Family) -> Extra<'static> {
    Extra {
        pod_mtu: Some(SMALL),
        ..Extra::over(family)
    }
}

#[test]
fn smaller_pods() {
    other_lab(with_small_pods(Family::V4), &Mode::ALL);
}

#[test]
fn smaller_pods_over_ipv6() {
    other_lab(with_small_pods(Family::V6), &[Mode::Syn]);
}

fn with_jumbo_frames(family: Family) -> Extra<'static> {
    Extra {
        lab: LabOptions {
            mtu: 9001,
            ..LabOptions::default()
        },
        ..Extra::over(family)
    }
}

#[test]
fn jumbo_frames() {
    other_lab(with_jumbo_frames(Family::V4), &Mode::ALL);
}

#[test]
fn jumbo_frames_over_ipv6() {
    other_lab(with_jumbo_frames(Family::V6), &[Mode::Established]);
}

/// Whether a frame is the overlay's, between the uplinks that [`stacked`] makes.
fn is_of_stacked(family: Family, frame: &[u8]) -> bool {
    /// Where the IP header begins.
    const IP: usize = 14;
    /// UDP.
    const PROTOCOL: u8 = 17;
    // Offsets of the protocol and of the source, and the network of that.
    let (protocol, source, network): (usize, usize, &[u8]) = match family {
        Family::V4 => (9, 12, &[192, 168, 79]),
        Family::V6 => (6, 8, &[0xfd, 0x79]),
    };
    let port = IP + family.header() + 2;
    frame.get(IP + protocol) == Some(&PROTOCOL)
        && frame.get(IP + source..IP + source + network.len()) == Some(network)
        && frame.get(port..port + 2) == Some(&8472_u16.to_be_bytes())
}

/// A device on top of the node's NIC, as its uplink.
fn stacked(kind: &str, family: Family, modes: &[Mode]) {
    if !flannel_testkit::privileged() {
        return;
    }
    let prepare = |node: &Node| {
        let [.., last] = node.ip.octets();
        let address = match family {
            Family::V4 => format!("192.168.79.{last}/24"),
            Family::V6 => format!("fd79::{last}/64 nodad"),
        };
        for line in [
            format!("link add link eth0 name up0 type {kind}"),
            format!("addr add {address} dev up0"),
            "link set up0 up".to_owned(),
        ] {
            node.ns.ip(&line).expect("an uplink");
        }
    };
    let extra = Extra {
        flags: &["--iface=up0"],
        prepare: Some(&prepare),
        ..Extra::over(family)
    };
    for mode in modes {
        let gate = Gate::with([*mode; 3], Flavour::Iptables, extra);
        let port = &gate.rig.node(0).port;
        let wire = Capture::start(gate.rig.lab().underlay(), port, "").unwrap();
        let result = usual(&gate);
        let wire = wire.stop().unwrap();
        result.unwrap_or_else(|error| panic!("{kind}, {mode:?}: {error:#}"));
        gate.assert_no_invalid("at the end");
        let all = wire.packets.iter();
        let seen = all
            .filter(|packet| is_of_stacked(family, &packet.data))
            .count();
        assert!(seen > 100, "{kind}, {mode:?}: {seen} packets");
    }
}

#[test]
fn uplinks_that_share_a_nic() {
    stacked("macvlan mode bridge", Family::V4, &Mode::ALL);
}

#[test]
fn uplinks_that_share_a_nic_over_ipv6() {
    stacked("macvlan mode bridge", Family::V6, &[Mode::Syn]);
}

/// Lets a device send, and merge what it receives, up to so many bytes. Older tools cannot.
fn set_max_size(pod: &Pod, family: Family, bytes: u32) {
    let index = pod.ns.ifindex("eth0").expect("the pod's device");
    let [send, merge] = match family {
        Family::V4 => [
            LinkAttribute::GsoIpv4MaxSize(bytes),
            LinkAttribute::GroIpv4MaxSize(bytes),
        ],
        Family::V6 => [
            LinkAttribute::GsoMaxSize(bytes),
            LinkAttribute::GroMaxSize(bytes),
        ],
    };
    pod.ns.run(|| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime");
        runtime.block_on(async {
            let (connection, handle, _) = rtnetlink::new_connection().expect("netlink");
            tokio::spawn(connection);
            let message = LinkMessageBuilder::<LinkUnspec>::new()
                .index(index)
                .append_extra_attribute(send)
                .append_extra_attribute(merge)
                .build();
            let done = handle.link().set(message).execute().await;
            done.expect("set the largest size");
        });
    });
}

/// Length of the extension header that says how long a packet is whose own header cannot.
const JUMBO: u32 = 8;

/// Packets so long that their header cannot say it.
fn super_packets(family: Family, modes: &[Mode]) {
    if !flannel_testkit::privileged() {
        return;
    }
    // Those of IPv6 may have an extension header that says it, in front of TCP's. Segments do not have it, but the kernel counts it when
    // it asks whether they fit into an MTU (`skb_gso_network_seglen`), and forwards none of them between devices of one MTU.
    let (filter, pod_mtu) = match family {
        Family::V4 => ("tcp and greater 65600", None),
        Family::V6 => {
            let mtu = 1500 - family.overhead() - JUMBO;
            ("ip6 and greater 65600", Some(mtu))
        }
    };
    let extra = Extra {
        pod_mtu,
        ..Extra::over(family)
    };
    for mode in modes {
        let gate = Gate::with([*mode; 3], Flavour::Iptables, extra);
        for who in [A, A2, B] {
            set_max_size(gate.pod(who), family, 180_000);
        }
        for (from, to) in [(A, B), (A, A2), (B, A)] {
            let node = gate.rig.ns(from.node());
            let device = &gate.pod(from).host_if;
            let long = Capture::start(node, device, filter).unwrap();
            let amount = Amount::Bytes(60 << 20);
            let stats = traffic::tcp_transfer(gate.ns(to), gate.ip(to), gate.ns(from), amount)
                .unwrap_or_else(|error| panic!("{mode:?}, {from:?} to {to:?}: {error:#}"));
            let long = long.stop().unwrap().packets.len();
            assert!(
                long > 10,
                "{mode:?}, {from:?} to {to:?}: {long} long packets"
            );
            // What loses them loses all of them, and each is 45 segments: a queue that overflows loses some.
            assert!(
                stats.retransmits < 10_000,
                "{mode:?}, {from:?} to {to:?}: {stats:?}"
            );
        }
        usual(&gate).unwrap_or_else(|error| panic!("{mode:?}: {error:#}"));
        gate.assert_no_invalid("at the end");
    }
}

#[test]
fn super_packets_beyond_64_kilobytes() {
    super_packets(Family::V4, &Mode::ALL);
}

#[test]
fn super_packets_beyond_64_kilobytes_over_ipv6() {
    super_packets(Family::V6, &[Mode::Established]);
}

/// A network behind a pod whose device on the way there segments nothing.
fn a_router(family: Family, modes: &[Mode]) {
    if !flannel_testkit::privileged() {
        return;
    }
    for mode in modes {
        let gate = Gate::with([*mode; 3], Flavour::Nftables, Extra::over(family));
        forwards(&gate).unwrap_or_else(|error| panic!("{mode:?}: {error:#}"));
        gate.assert_no_invalid("at the end");
    }
}

#[test]
fn a_pod_that_forwards() {
    a_router(Family::V4, &Mode::ALL);
}

#[test]
fn a_pod_that_forwards_over_ipv6() {
    a_router(Family::V6, &[Mode::Established]);
}

/// Lets a pod forward, and answer for an address that it does not have.
fn make_router(gate: &Gate, router: &Netns, answers_for: IpAddr) -> anyhow::Result<()> {
    match gate.family() {
        Family::V4 => {
            router.set_sysctl("net/ipv4/ip_forward", "1")?;
            router.set_sysctl("net/ipv4/conf/eth0/proxy_arp", "1")
        }
        Family::V6 => {
            router.set_sysctl("net/ipv6/conf/all/forwarding", "1")?;
            // Which a host's default route does not outlive.
            let gateway = gate.subnet(1).gateway();
            router.ip(&format!("route replace default via {gateway}"))?;
            router.set_sysctl("net/ipv6/conf/eth0/proxy_ndp", "1")?;
            router.set_sysctl("net/ipv6/neigh/eth0/proxy_delay", "0")?;
            let line = format!("neigh add proxy {answers_for} dev eth0");
            router.ip(&line).map(drop)
        }
    }
}

/// What is behind a pod.
struct Nested {
    ns: Netns,
    /// An address that the pod translates its own to.
    inside: IpAddr,
    /// One of the pods' own network, which the pod answers for.
    routed: IpAddr,
}

impl Nested {
    fn behind(gate: &Gate, router: &Netns) -> anyhow::Result<Nested> {
        let ns = gate.rig.lab().extra("nested")?;
        let (mtu, name) = (gate.pod_mtu(), ns.name());
        router.ip(&format!(
            "link add inner mtu {mtu} type veth peer name eth0 mtu {mtu} netns {name}"
        ))?;
        let (own, inside, len, whole): (IpAddr, IpAddr, _, _) = match gate.family() {
            Family::V4 => ("172.30.0.1".parse()?, "172.30.0.2".parse()?, 24, 32),
            Family::V6 => ("fd30::1".parse()?, "fd30::2".parse()?, 64, 128),
        };
        router.ip(&format!("addr add {own}/{len} dev inner"))?;
        router.ip("link set inner up")?;
        ns.ip(&format!("addr add {inside}/{len} dev eth0"))?;
        let routed = gate.subnet(1).host(77);
        ns.ip(&format!("addr add {routed}/{whole} dev eth0"))?;
        ns.ip("link set eth0 up")?;
        ns.ip(&format!("route add default via {own}"))?;
        router.ip(&format!("route add {routed}/{whole} dev inner"))?;
        make_router(gate, router, routed)?;
        for ip in [inside, routed] {
            try_eventually(PATIENCE, "the router reaches what is behind it", || {
                traffic::ping_once(router, ip, Duration::from_millis(500))
            })?;
        }
        Ok(Nested { ns, inside, routed })
    }
}

fn forwards(gate: &Gate) -> anyhow::Result<()> {
    let router = gate.ns(B);
    let nested = Nested::behind(gate, router)?;
    let (inside, routed) = (nested.inside, nested.routed);
    let nested = &nested.ns;
    let plain = "ethtool -K inner tx off sg off tso off gso off tx-udp-segmentation off";
    router.exec(plain.split(' '))?;
    for protocol in ["tcp", "udp"] {
        let own = gate.ip(B);
        let line =
            format!("-t nat -A PREROUTING -i eth0 -p {protocol} -d {own} -j DNAT --to {inside}");
        let program = iptables_program(gate.family());
        router.exec([program].into_iter().chain(line.split(' ')))?;
    }
    let filter = format!("greater {}", 14 + gate.pod_mtu() + 1);
    let seen = Capture::start_directed(nested, "eth0", &filter, Direction::In)?;
    for (from, behind) in [(A, inside), (B2, inside), (A, routed), (B2, routed)] {
        let what = || format!("{from:?} to {behind}");
        let translated = behind == inside;
        let server = TcpServer::listen(nested, behind, 8081)?;
        let names = UdpEnd::bind(nested, behind, DNS)?;
        let to = if translated { gate.ip(B) } else { routed };
        let target = SocketAddr::new(to, 8081);
        let mut pair = TcpPair::connect(gate.ns(from), target, &[&server]).with_context(what)?;
        let fast = || gate.fast(0).encap + gate.fast(1).local;
        let before = fast();
        for bytes in [1, 1000, 60_000, 4 << 20, 60_000, 1] {
            pair.exchange(bytes).with_context(what)?;
        }
        let grown = fast() - before;
        ensure!(
            grown > 50 || !translated || gate.modes[0] == Mode::Off,
            "{}: {grown} packets were fast",
            what()
        );
        // Super-packets that could not be segmented would all have to be sent again. Some of the 6,000 segments are lost in the bursts
        // that a device without offloads gets.
        let again = pair.lost_segments()?;
        ensure!(again < 1_500, "{}: {again} segments sent again", what());
        pair.close()?;
        let client = gate.udp(from, 0);
        let target = SocketAddr::new(to, DNS);
        let whole = gate.pod_mtu() as usize - gate.family().header() - 8;
        for bytes in [1, 100, whole, 5000] {
            client.ask(target, &[&names], bytes).with_context(what)?;
        }
        // `UDP_SEGMENT`
        set_socket_option(client.socket(), libc::IPPROTO_UDP, 103, 1000)?;
        client.send(target, 0, 10_000)?;
        for part in 0..10 {
            names.receive(part * 1000, 1000).with_context(what)?;
        }
    }
    let large = seen.stop()?.packets.len();
    ensure!(large == 0, "{large} packets larger than the device's MTU");
    Ok(())
}
