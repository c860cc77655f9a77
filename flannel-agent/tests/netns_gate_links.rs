//! Other labs: uplinks without offloads, stacked ones, pods of other sizes, super-packets beyond 64 kB.

mod gate_rig;
mod rig;

use anyhow::{Context as _, ensure};
use flannel_testkit::{
    Capture, Direction, Family, LabOptions, Node, Offloads, Pod,
    services::{Flavour, iptables_program},
    set_socket_option,
    traffic::{self, Amount, TcpPair, TcpServer, UdpEnd},
};
use gate_rig::{
    DNS, Extra, Gate, Mode, Vip,
    Who::{A, A2, B, B2},
};
use rtnetlink::{LinkMessageBuilder, LinkUnspec, packet_route::link::LinkAttribute};

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
    for bytes in [1, 1000, 1372, 1373, 1422, 1423, 5000] {
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

fn other_lab(extra: Extra<'_>) {
    if !flannel_testkit::privileged() {
        return;
    }
    for mode in Mode::ALL {
        let gate = Gate::with([mode; 3], Flavour::Iptables, extra);
        usual(&gate).unwrap_or_else(|error| panic!("{mode:?}: {error:#}"));
        gate.assert_no_invalid("at the end");
    }
}

#[test]
fn uplinks_without_offloads() {
    other_lab(Extra {
        lab: LabOptions {
            offloads: Offloads::Off,
            ..LabOptions::default()
        },
        ..Extra::default()
    });
}

#[test]
fn smaller_pods() {
    other_lab(Extra {
        pod_mtu: Some(1400),
        ..Extra::default()
    });
}

#[test]
fn jumbo_frames() {
    other_lab(Extra {
        lab: LabOptions {
            mtu: 9001,
            ..LabOptions::default()
        },
        ..Extra::default()
    });
}

/// A device on top of the node's NIC, as its uplink.
fn stacked(kind: &str) {
    /// Where a frame's IPv4 header begins.
    const PLAIN: usize = 14;
    let prepare = |node: &Node| {
        let [.., last] = node.ip.octets();
        for line in [
            format!("addr add 192.168.79.{last}/24 dev up0"),
            "link set up0 up".to_owned(),
        ] {
            node.ns.ip(&line).expect("an uplink");
        }
    };
    for mode in Mode::ALL {
        let add = |node: &Node| {
            let line = format!("link add link eth0 name up0 type {kind}");
            node.ns.ip(&line).expect("an uplink");
            prepare(node);
        };
        let extra = Extra {
            flags: &["--iface=up0"],
            prepare: Some(&add),
            ..Extra::default()
        };
        let gate = Gate::with([mode; 3], Flavour::Iptables, extra);
        let port = &gate.rig.node(0).port;
        let wire = Capture::start(gate.rig.lab().underlay(), port, "").unwrap();
        let result = usual(&gate);
        let wire = wire.stop().unwrap();
        result.unwrap_or_else(|error| panic!("{kind}, {mode:?}: {error:#}"));
        gate.assert_no_invalid("at the end");
        // UDP to the overlay's port behind an IPv4 header at this place, between the uplinks' own addresses.
        let overlay = |at: usize| {
            let is = |data: &[u8]| {
                data.get(at + 9) == Some(&17)
                    && data.get(at + 12..at + 15) == Some(&[192, 168, 79])
                    && data.get(at + 22..at + 24) == Some(&8472_u16.to_be_bytes())
            };
            wire.packets
                .iter()
                .filter(|packet| is(&packet.data))
                .count()
        };
        let seen = overlay(PLAIN);
        assert!(seen > 100, "{kind}, {mode:?}: {seen} packets");
    }
}

#[test]
fn uplinks_that_share_a_nic() {
    if flannel_testkit::privileged() {
        stacked("macvlan mode bridge");
    }
}

/// Lets a device send, and merge what it receives, up to so many bytes of IPv4. Older tools cannot.
fn set_max_size(pod: &Pod, bytes: u32) {
    let index = pod.ns.ifindex("eth0").expect("the pod's device");
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
                .append_extra_attribute(LinkAttribute::GsoIpv4MaxSize(bytes))
                .append_extra_attribute(LinkAttribute::GroIpv4MaxSize(bytes))
                .build();
            let done = handle.link().set(message).execute().await;
            done.expect("set the largest size");
        });
    });
}

/// Packets so long that their header cannot say it.
#[test]
fn super_packets_beyond_64_kilobytes() {
    if !flannel_testkit::privileged() {
        return;
    }
    for mode in Mode::ALL {
        let gate = Gate::start(mode, Flavour::Iptables);
        for who in [A, A2, B] {
            set_max_size(gate.pod(who), 180_000);
        }
        for (from, to) in [(A, B), (A, A2), (B, A)] {
            let node = gate.rig.ns(from.node());
            let device = &gate.pod(from).host_if;
            let long = Capture::start(node, device, "tcp and greater 65600").unwrap();
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

/// A network behind a pod whose device on the way there segments nothing.
#[test]
fn a_pod_that_forwards() {
    if !flannel_testkit::privileged() {
        return;
    }
    for mode in Mode::ALL {
        let gate = Gate::start(mode, Flavour::Nftables);
        forwards(&gate).unwrap_or_else(|error| panic!("{mode:?}: {error:#}"));
        gate.assert_no_invalid("at the end");
    }
}

fn forwards(gate: &Gate) -> anyhow::Result<()> {
    let nested = gate.rig.lab().extra("nested")?;
    let router = gate.ns(B);
    let name = nested.name().to_owned();
    router.ip(&format!(
        "link add inner mtu 1450 type veth peer name eth0 mtu 1450 netns {name}"
    ))?;
    router.ip("addr add 172.30.0.1/24 dev inner")?;
    router.ip("link set inner up")?;
    nested.ip("addr add 172.30.0.2/24 dev eth0")?;
    // An address of the pods' own network, which the pod answers for.
    let routed = gate.subnet(1).host(77);
    nested.ip(&format!("addr add {routed}/32 dev eth0"))?;
    nested.ip("link set eth0 up")?;
    nested.ip("route add default via 172.30.0.1")?;
    router.ip(&format!("route add {routed}/32 dev inner"))?;
    router.set_sysctl("net/ipv4/ip_forward", "1")?;
    router.set_sysctl("net/ipv4/conf/eth0/proxy_arp", "1")?;
    let plain = "ethtool -K inner tx off sg off tso off gso off tx-udp-segmentation off";
    router.exec(plain.split(' '))?;
    for protocol in ["tcp", "udp"] {
        let line = format!("-t nat -A PREROUTING -i eth0 -p {protocol} -j DNAT --to 172.30.0.2");
        let line = line.replace("-j", &format!("-d {} -j", gate.ip(B)));
        router.exec(
            [iptables_program(Family::V4)]
                .into_iter()
                .chain(line.split(' ')),
        )?;
    }
    let seen = Capture::start_directed(&nested, "eth0", "greater 1465", Direction::In)?;
    let inside = "172.30.0.2".parse()?;
    for (from, behind) in [(A, inside), (B2, inside), (A, routed), (B2, routed)] {
        let what = || format!("{from:?} to {behind}");
        let translated = behind == inside;
        let server = TcpServer::listen(&nested, behind, 8081)?;
        let names = UdpEnd::bind(&nested, behind, DNS)?;
        let to = if translated { gate.ip(B) } else { routed };
        let target = std::net::SocketAddr::new(to, 8081);
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
        let target = std::net::SocketAddr::new(to, DNS);
        for bytes in [1, 100, 1422, 5000] {
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
