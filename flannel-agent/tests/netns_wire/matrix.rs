//! All kinds of traffic between two nodes, and what may be seen of it on the wire.

use std::{net::IpAddr, sync::mpsc, thread, time::Duration};

use anyhow::Context as _;
use flannel_testkit::{
    Captured, Family, Netns, Offloads,
    capture::tshark,
    packet::{Address, Csum, Header as _},
    patience,
    traffic::{Amount, TcpStats, ping_sized, tcp_transfer, udp_echo},
};

use crate::wire_rig::{End, pod_mtu};

/// The most that a datagram or an echo carries whole.
fn whole(family: Family) -> usize {
    // Either header has 8 bytes.
    pod_mtu(family) as usize - family.header() - 8
}

/// Payloads in bytes: one byte, the last that fits the MTU whole, the first that does not, and up to 60 kB in fragments.
fn datagrams(whole: usize) -> [usize; 10] {
    [
        1,
        2,
        17,
        512,
        whole - 1,
        whole,
        whole + 1,
        3_000,
        20_001,
        60_000,
    ]
}

fn echoes(whole: usize) -> [usize; 5] {
    [8, 56, whole, whole + 1, 9_000]
}

const STREAM: Amount = Amount::Bytes(2 << 20);
/// A stream takes some ten milliseconds, a bulk one some hundred.
const STREAM_LIMIT: Duration = Duration::from_secs(20);
const LIMIT: Duration = Duration::from_secs(3);

/// ICMP, UDP and TCP both ways, pod to pod and host to pod.
pub(crate) fn exchange_everything(a: &End, b: &End, offloads: Offloads) {
    for (from, to) in [(a, b), (b, a)] {
        exchange(&from.pod.ns, &to.pod.ns, to.address());
        exchange(&from.node, &to.pod.ns, to.address());
    }
    if offloads == Offloads::Off {
        // A pod whose own device segments and checksums nothing either.
        for end in [a, b] {
            let features = ["tx", "off", "tso", "off", "gso", "off", "sg", "off"];
            end.pod
                .ns
                .exec(["ethtool", "-K", "eth0"].iter().chain(&features))
                .expect("switch the pod's offloads off");
        }
        for (from, to) in [(a, b), (b, a)] {
            exchange(&from.pod.ns, &to.pod.ns, to.address());
        }
    }
}

/// Traffic that `client` begins.
fn exchange(client: &Netns, server: &Netns, address: IpAddr) {
    let whole = whole(Family::of(address));
    let what = format!("{} to {address} in {}", client.name(), server.name());
    for payload in echoes(whole) {
        if let Err(error) = ping_sized(client, address, payload, payload <= whole, LIMIT) {
            panic!("{what}, {payload} bytes: {error:#}");
        }
    }
    if let Err(error) = udp_echo(server, address, client, &datagrams(whole)) {
        panic!("{what}: {error:#}");
    }
    if let Err(error) = transfer(server, address, client, STREAM) {
        panic!("{what}: {error:#}");
    }
}

/// A TCP stream that may not crawl. Where only super-packets are lost TCP gets on by single segments, one a timeout, and never
/// stands still for long.
pub(crate) fn transfer(
    server: &Netns,
    address: IpAddr,
    client: &Netns,
    amount: Amount,
) -> anyhow::Result<TcpStats> {
    let (server, client) = (server.clone(), client.clone());
    let (done, outcome) = mpsc::channel();
    // Left behind if it crawls: it ends with the lab.
    thread::spawn(move || done.send(tcp_transfer(&server, address, &client, amount)));
    outcome
        .recv_timeout(patience(STREAM_LIMIT))
        .with_context(|| format!("{amount:?} not within {STREAM_LIMIT:?}"))?
}

/// Every frame of the node at `ours` is as flannel's device sends it, and `tshark` has no complaint about either side.
pub(crate) fn check_capture<A: Address>(wire: &Captured, ours: A, offloads: Offloads) {
    let family = Family::of(ours);
    let frames = wire.vxlan_of::<A>();
    let mut longest = 0;
    let mut sent = 0_u32;
    for frame in frames.iter().filter(|frame| frame.ip.source() == ours) {
        sent += 1;
        longest = longest.max(frame.inner.len());
        assert_eq!(
            (frame.flags, frame.reserved1, frame.vni, frame.reserved2),
            (8, [0; 3], 1, 0),
            "{frame:?}"
        );
        // Nothing but addresses, hops and ECN: checksum right, DF clear, no options or extensions, no flow label but the kernel's own.
        let mut usual = A::Header::usual(frame.ip.source(), frame.ip.destination());
        usual.set_tos(frame.ip.tos() & 3);
        assert_eq!(frame.ip.without_marks(), usual);
        match (family, offloads) {
            (Family::V4, _) => assert_eq!(frame.udp_csum, Csum::Zero),
            (Family::V6, Offloads::Off) => assert_eq!(frame.udp_csum, Csum::Right),
            // The kernel leaves those of super-packets to a device that never comes.
            (Family::V6, Offloads::Default) => assert_ne!(frame.udp_csum, Csum::Zero),
        }
        assert!(
            (32_768..=60_999).contains(&frame.src_port),
            "source port {}",
            frame.src_port
        );
    }
    assert!(sent > 300, "{sent} frames of ours of {}", frames.len());
    match offloads {
        // A super-packet that crosses whole.
        Offloads::Default => assert!(
            longest > 30_000,
            "the longest frame of ours has {longest} bytes"
        ),
        Offloads::Off => {
            assert_eq!(wire.dropped, 0, "the capture is not complete");
            assert!(wire.packets.iter().all(|packet| packet.wire_len <= 1_514));
            assert_eq!(wire.malformed().expect("tshark"), Vec::<String>::new());
            let checked =
                ["ip", "udp", "tcp"].map(|protocol| format!("{protocol}.check_checksum:TRUE"));
            let preferences: Vec<&str> = checked
                .iter()
                .flat_map(|preference| ["-o", preference])
                .collect();
            // The kernel writes a sum of zero as 0xffff for every protocol (`skb_checksum_help`), which is the same number.
            let bad = "ip.checksum.status == Bad || udp.checksum.status == Bad || icmp.checksum.status == Bad || icmpv6.checksum.status == Bad || \
                       (tcp.checksum.status == Bad && tcp.checksum != 0xffff)";
            assert_eq!(
                tshark(&wire.path(), &preferences, bad).expect("tshark"),
                Vec::<String>::new()
            );
        }
    }
}
