//! Packets that are not like others: errors, fragments, options, marks, short lives, other sizes.

mod gate_rig;
mod rig;

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use anyhow::{Context as _, ensure};
use flannel_testkit::{
    Capture, Family, Netns, RawSocket,
    json::{ip_json, link},
    packet::{icmp, inner_frame},
    send_ip,
    services::Flavour,
    set_socket_bytes, set_socket_option,
    traffic::TcpPair,
    try_eventually,
};
use gate_rig::{
    DNS, Gate, Mode,
    Who::{A, A2, B},
    cases::{Case, in_all_modes, over_ipv6},
};

/// How long an error may take to be believed.
const SOON: Duration = Duration::from_secs(2);

const CASES: &[Case] = &[
    ("fragmentation needed, says the remote node", |gate| {
        too_big(gate, Teller::Node)
    }),
    ("fragmentation needed, says the remote pod", |gate| {
        too_big(gate, Teller::Pod)
    }),
    ("port unreachable", port_unreachable),
    ("fragments among small datagrams", fragments),
    ("IP options or extension headers", options),
    ("TTL, DSCP and ECN", marks),
    ("hops of a traceroute", hops),
    ("UDP segmentation", segmentation),
    ("multicast and broadcast", groups),
    ("a path that becomes narrow", narrow_path),
];

in_all_modes!(CASES);
over_ipv6!(CASES);

/// Who sends an ICMP error.
#[derive(Clone, Copy, Debug)]
enum Teller {
    Node,
    Pod,
}

/// The MTU that the error claims: more than the least of IPv6.
const CLAIMED: u16 = 1334;

fn too_big(gate: &mut Gate, teller: Teller) -> anyhow::Result<()> {
    forget_paths(gate)?;
    let server = gate.serve(B);
    let mut pair = TcpPair::connect(gate.ns(A), server.address, &[&server])?;
    gate.promote(&mut pair, &[0, 1])?;
    // The pod believes an error only if it quotes what is not acknowledged: here what it would send next.
    let filter = format!(
        "tcp and src port {} and dst port {}",
        pair.local.port(),
        server.address.port()
    );
    let capture = Capture::start(gate.ns(A), "eth0", &filter)?;
    pair.exchange(100)?;
    let packets = capture.stop()?.packets;
    let header = gate.family().header();
    let last = packets
        .iter()
        .rfind(|packet| packet.data.len() > 130 + header)
        .context("no segment seen")?;
    let mut quoted = last.data[14..14 + header + 8].to_vec();
    let options = usize::from(last.data[14 + header + 12] >> 4) * 4;
    let payload = last.data.len() - 14 - header - options;
    let sequence = u32::from_be_bytes(quoted[header + 4..].try_into()?);
    let next = sequence.wrapping_add(u32::try_from(payload)?);
    quoted[header + 4..].copy_from_slice(&next.to_be_bytes());
    let from = match teller {
        Teller::Node => gate.tunnel_ip(1),
        Teller::Pod => gate.ip(B),
    };
    // Fragmentation needed; packet too big. The MTU ends both.
    let mut message = match gate.family() {
        Family::V4 => vec![3, 4, 0, 0, 0, 0],
        Family::V6 => vec![2, 0, 0, 0, 0, 0],
    };
    message.extend(CLAIMED.to_be_bytes());
    message.extend(quoted);
    let addresses = [from, gate.ip(A)];
    let gateway = mac_of(gate.rig.ns(1), "cni0")?;
    let macs = [gate.pod(B).mac, gateway];
    let frame = inner_frame(addresses, macs, icmp(addresses, message));
    match teller {
        Teller::Node => send_ip(gate.rig.ns(1), gate.ip(A), &frame[14..])?,
        Teller::Pod => RawSocket::open(gate.ns(B), "eth0")?.send(&frame)?,
    }
    try_eventually(SOON, "the pod learns the path's MTU", || {
        let mtu = learnt_mtu(gate.ns(A), gate.ip(B))?;
        ensure!(mtu == Some(u64::from(CLAIMED)), "it has {mtu:?}");
        Ok(())
    })?;
    pair.exchange(60_000)?;
    pair.close()?;
    forget_paths(gate)
}

fn forget_paths(gate: &Gate) -> anyhow::Result<()> {
    for who in gate_rig::Who::ALL {
        let flag = gate.family().flag();
        gate.ns(who).ip(&format!("{flag} route flush cache"))?;
    }
    Ok(())
}

fn learnt_mtu(ns: &Netns, to: IpAddr) -> anyhow::Result<Option<u64>> {
    let route = ip_json(ns, &["route", "get", &to.to_string()])?;
    Ok(route[0]["metrics"][0]["mtu"].as_u64())
}

fn mac_of(ns: &Netns, device: &str) -> anyhow::Result<[u8; 6]> {
    let link = link(ns, device)?;
    let text = link["address"].as_str().context("no MAC address")?;
    let bytes: Vec<u8> = text
        .split(':')
        .map(|byte| u8::from_str_radix(byte, 16))
        .collect::<Result<_, _>>()?;
    bytes.try_into().ok().context("a MAC address of six bytes")
}

fn port_unreachable(gate: &mut Gate) -> anyhow::Result<()> {
    let names = gate.udp(B, DNS);
    let client = gate.udp(A, 0);
    for _ in 0..5 {
        client.ask(names.address, &[&names], 100)?;
    }
    let target = names.address;
    drop(names);
    client.socket().connect(target)?;
    try_eventually(SOON, "the client is told that nobody listens", || {
        drop(client.socket().send(&[0; 10]));
        let error = client.socket().take_error()?;
        let refused =
            error.is_some_and(|error| error.kind() == std::io::ErrorKind::ConnectionRefused);
        ensure!(refused, "no error");
        Ok::<_, anyhow::Error>(())
    })
}

fn fragments(gate: &mut Gate) -> anyhow::Result<()> {
    for to in [B, A2] {
        let names = gate.udp(to, DNS);
        let client = gate.udp(A, 0);
        for _ in 0..2 {
            for bytes in [64, 4000, 64, 64, 30_000, 64, 1423, 64, 9000] {
                client
                    .ask(names.address, &[&names], bytes)
                    .with_context(|| format!("to {to:?}"))?;
            }
        }
    }
    Ok(())
}

/// No operation, four times.
const NOTHING: i32 = 0x0101_0101;
/// Destination options that are padding.
const PADDING: [u8; 8] = [0, 0, 1, 4, 0, 0, 0, 0];

fn options(gate: &mut Gate) -> anyhow::Result<()> {
    for to in [B, A2] {
        let names = gate.udp(to, DNS);
        let client = gate.udp(A, 0);
        for _ in 0..5 {
            client.ask(names.address, &[&names], 100)?;
        }
        let socket = client.socket();
        let filter = match gate.family() {
            Family::V4 => {
                set_socket_option(socket, libc::IPPROTO_IP, libc::IP_OPTIONS, NOTHING)?;
                "udp and ip[0] == 0x46"
            }
            Family::V6 => {
                set_socket_bytes(socket, libc::IPPROTO_IPV6, libc::IPV6_DSTOPTS, PADDING)?;
                "ip6[6] == 60 and ip6[40] == 17"
            }
        };
        let capture = Capture::start(gate.ns(to), "eth0", filter)?;
        for _ in 0..5 {
            client.ask(names.address, &[&names], 100)?;
        }
        let arrived = capture.stop()?.packets.len();
        ensure!(
            arrived == 5,
            "{arrived} of 5 arrived with options at {to:?}"
        );
    }
    Ok(())
}

fn marks(gate: &mut Gate) -> anyhow::Result<()> {
    for (to, ttl) in [(B, 62), (A2, 64)] {
        let names = gate.udp(to, DNS);
        let client = gate.udp(A, 0);
        for _ in 0..5 {
            client.ask(names.address, &[&names], 100)?;
        }
        let filter = format!("udp and src host {}", gate.ip(A));
        let capture = Capture::start(gate.ns(to), "eth0", &filter)?;
        // DSCP 46 with ECT(0), DSCP 10 with ECT(1), congestion experienced.
        let values = [0x00, 0xba, 0x29, 0x03];
        let (level, name) = match gate.family() {
            Family::V4 => (libc::IPPROTO_IP, libc::IP_TOS),
            Family::V6 => (libc::IPPROTO_IPV6, libc::IPV6_TCLASS),
        };
        for value in values {
            set_socket_option(client.socket(), level, name, value)?;
            client.ask(names.address, &[&names], 100)?;
        }
        let packets = capture.stop()?.packets;
        let seen: Vec<(i32, u8)> = packets
            .iter()
            .map(|packet| {
                let ip = &packet.data[14..];
                match gate.family() {
                    Family::V4 => (i32::from(ip[1]), ip[8]),
                    Family::V6 => (i32::from(ip[0] << 4 | ip[1] >> 4), ip[7]),
                }
            })
            .collect();
        let wanted: Vec<(i32, u8)> = values.iter().map(|value| (*value, ttl)).collect();
        ensure!(seen == wanted, "TOS and TTL at {to:?}: {seen:02x?}");
    }
    Ok(())
}

fn hops(gate: &mut Gate) -> anyhow::Result<()> {
    let names = gate.udp(B, DNS);
    let client = gate.udp(A, 0);
    for _ in 0..5 {
        client.ask(names.address, &[&names], 100)?;
    }
    let want = [
        (1, Some(gate.subnet(0).gateway())),
        (2, Some(gate.tunnel_ip(1))),
        (3, None),
    ];
    let (limit, (level, name), expired) = match gate.family() {
        Family::V4 => (
            "net/ipv4/icmp_ratelimit",
            (libc::IPPROTO_IP, libc::IP_TTL),
            "icmp[0] == 11",
        ),
        Family::V6 => (
            "net/ipv6/icmp/ratelimit",
            (libc::IPPROTO_IPV6, libc::IPV6_UNICAST_HOPS),
            "icmp6 and ip6[40] == 3",
        ),
    };
    for node in [0, 1] {
        gate.rig.ns(node).set_sysctl(limit, "0")?;
    }
    for (ttl, hop) in want {
        // The very flow that is fast, and one that nobody has seen before.
        for socket in [&client, &gate.udp(A, 0)] {
            set_socket_option(socket.socket(), level, name, ttl)?;
            let capture = Capture::start(gate.ns(A), "eth0", expired)?;
            socket.send(names.address, 0, 100)?;
            let arrived = names.has_some(Duration::from_millis(100))?;
            let errors = capture.stop()?.packets;
            let from = errors.first().map(|packet| sender(&packet.data));
            ensure!(
                from == hop && arrived == hop.is_none(),
                "TTL {ttl}: an error from {from:?}, arrived: {arrived}"
            );
        }
    }
    Ok(())
}

/// The source address of a frame's packet.
fn sender(frame: &[u8]) -> IpAddr {
    let source = |at: usize, len: usize| &frame[14 + at..14 + at + len];
    if frame[14] >> 4 == 6 {
        let octets: [u8; 16] = source(8, 16).try_into().expect("sixteen bytes");
        octets.into()
    } else {
        let octets: [u8; 4] = source(12, 4).try_into().expect("four bytes");
        octets.into()
    }
}

fn segmentation(gate: &mut Gate) -> anyhow::Result<()> {
    for to in [B, A2] {
        let names = gate.udp(to, DNS);
        let client = gate.udp(A, 0);
        for _ in 0..5 {
            client.ask(names.address, &[&names], 100)?;
        }
        // `UDP_SEGMENT`
        set_socket_option(client.socket(), libc::IPPROTO_UDP, 103, 1000)?;
        for _ in 0..5 {
            client.send(names.address, 0, 10_000)?;
            for part in 0..10 {
                names
                    .receive(part * 1000, 1000)
                    .with_context(|| format!("part {part} at {to:?}"))?;
            }
        }
    }
    Ok(())
}

/// The way between the nodes narrows under a fast connection: what no longer fits goes on as the kernel's device would send it.
fn narrow_path(gate: &mut Gate) -> anyhow::Result<()> {
    let server = gate.serve(B);
    let mut pair = TcpPair::connect(gate.ns(A), server.address, &[&server])?;
    gate.promote(&mut pair, &[0, 1])?;
    pair.exchange(200_000)?;
    let remote = gate.node_ip(1);
    let node = gate.rig.ns(0);
    node.ip(&format!("route add {remote} dev eth0 mtu lock 1400"))?;
    let noticed = try_eventually(SOON, "the agent knows the path", || {
        let peers = gate.rig.peers(0);
        let all = rig::list(&peers).iter();
        let mut mtus = all.filter(|peer| peer["vtep"] == remote.to_string());
        ensure!(mtus.any(|peer| peer["path_mtu"] == 1400), "{peers}");
        Ok(())
    });
    // What is longer than that on the wire would be lost on a real path.
    let port = gate.rig.node(0).port.clone();
    let filter = format!("dst host {remote} and greater 1415 and less 1600");
    let capture = Capture::start(gate.rig.lab().underlay(), &port, &filter)?;
    let exchanged = pair.exchange(200_000);
    let client = gate.udp(A, 0);
    let names = gate.udp(B, DNS);
    // The largest that fits, and what does not, into the path and into the pod's MTU.
    let header = gate.family().header() + 8;
    let inner = |mtu: u32| (mtu - gate.family().overhead()) as usize - header;
    let asked = [100, inner(1400), inner(1400) + 1, inner(1500), 5000]
        .iter()
        .try_for_each(|bytes| client.ask(names.address, &[&names], *bytes).map(drop));
    let large = capture.stop()?.packets.len();
    node.ip(&format!("route del {remote} dev eth0"))?;
    noticed?;
    exchanged?;
    asked?;
    ensure!(large == 0, "{large} packets too large for the path");
    pair.exchange(200_000)?;
    pair.close()
}

/// Groups and broadcasts are for the bridge: they reach the pods of the node, and nobody else, whatever is fast beside them.
fn groups(gate: &mut Gate) -> anyhow::Result<()> {
    const PORT: u16 = 7000;
    let pods = [A, A2, B];
    let all = pods.map(|who| gate.udp_anywhere(who, PORT));
    let near = gate.udp(A2, DNS);
    let far = gate.udp(B, DNS);
    let client = gate.udp(A, 0);
    // Enough hops for routers to let it leave the node.
    let targets: Vec<IpAddr> = match gate.family() {
        Family::V4 => {
            let group = Ipv4Addr::new(239, 1, 2, 3);
            for (end, who) in all.iter().zip(pods) {
                end.socket().join_multicast_v4(&group, &gate.pod(who).ip)?;
            }
            client.socket().set_broadcast(true)?;
            client.socket().set_multicast_loop_v4(false)?;
            client.socket().set_multicast_ttl_v4(8)?;
            let subnet = gate.rig.node(0).subnet;
            [group, subnet.host(255), Ipv4Addr::BROADCAST]
                .map(IpAddr::from)
                .into()
        }
        Family::V6 => {
            let group = Ipv6Addr::new(0xff18, 0, 0, 0, 0, 1, 2, 3);
            for (end, who) in all.iter().zip(pods) {
                let device = gate.ns(who).ifindex("eth0")?;
                end.socket().join_multicast_v6(&group, device)?;
            }
            client.socket().set_multicast_loop_v6(false)?;
            let hops = libc::IPV6_MULTICAST_HOPS;
            set_socket_option(client.socket(), libc::IPPROTO_IPV6, hops, 8)?;
            vec![group.into()]
        }
    };
    for _ in 0..3 {
        for to in &targets {
            client.ask(near.address, &[&near], 100)?;
            client.ask(far.address, &[&far], 100)?;
            client.send(SocketAddr::new(*to, PORT), 3, 700)?;
            let from = all[1].receive(3, 700).with_context(|| format!("to {to}"))?;
            // No pod's address: masqueraded where bridged packets pass the node's rules.
            let is_kept = from == client.address || *to == Ipv4Addr::BROADCAST;
            ensure!(is_kept, "{to}: seen as {from}");
            let twice = all[1].has_some(Duration::from_millis(20))?;
            let elsewhere = all[2].has_some(Duration::ZERO)?;
            ensure!(
                !twice && !elsewhere,
                "{to}: twice {twice}, elsewhere {elsewhere}"
            );
        }
    }
    all[0].take_all()
}
