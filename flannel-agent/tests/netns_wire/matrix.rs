//! All kinds of traffic between two nodes, and what may be seen of it on the wire.

use std::{net::Ipv4Addr, time::Duration};

use flannel_testkit::{
    Captured, Netns, Offloads,
    packet::Csum,
    traffic::{Amount, ping_sized, tcp_transfer, udp_echo},
};

use crate::wire_rig::End;

/// Payloads in bytes: one byte, the last that fits 1450 whole, the first that does not, and up to 60 kB in fragments.
const DATAGRAMS: [usize; 10] = [1, 2, 17, 512, 1421, 1422, 1423, 3_000, 20_001, 60_000];
const ECHOES: [usize; 5] = [8, 56, 1422, 1423, 9_000];
const STREAM: Amount = Amount::Bytes(8 << 20);
const LIMIT: Duration = Duration::from_secs(3);

/// ICMP, UDP and TCP both ways, pod to pod and host to pod.
pub(crate) fn exchange_everything(a: &End, b: &End, offloads: Offloads) {
    for (from, to) in [(a, b), (b, a)] {
        exchange(&from.pod.ns, &to.pod.ns, to.pod.ip);
        exchange(&from.node, &to.pod.ns, to.pod.ip);
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
            exchange(&from.pod.ns, &to.pod.ns, to.pod.ip);
        }
    }
}

/// Traffic that `client` begins.
fn exchange(client: &Netns, server: &Netns, address: Ipv4Addr) {
    let what = format!("{} to {}", client.name(), server.name());
    for payload in ECHOES {
        if let Err(error) = ping_sized(client, address, payload, payload <= 1422, LIMIT) {
            panic!("{what}, {payload} bytes: {error:#}");
        }
    }
    if let Err(error) = udp_echo(server, address, client, &DATAGRAMS) {
        panic!("{what}: {error:#}");
    }
    if let Err(error) = tcp_transfer(server, address, client, STREAM) {
        panic!("{what}: {error:#}");
    }
}
