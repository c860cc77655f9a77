//! One pair of pods: ping, UDP, TCP, and the counters around them.

use std::time::Duration;

use anyhow::ensure;
use flannel_testkit::{
    Family,
    traffic::{Amount, ping, tcp_transfer, udp_echo},
};

use bench_lab::cluster::{Cluster, Counts};

use super::report::{Pair, Path};

const PINGS: u64 = 5;
/// One byte, an ordinary datagram, and one that is fragmented inside the tunnel.
const DATAGRAMS: [usize; 3] = [1, 1200, 8000];
/// Packets in one direction for [`PINGS`] and [`DATAGRAMS`] that eBPF can carry: 8000 bytes are six fragments at an MTU of 1450. Over
/// IPv6 fragments are the kernel's, which alone can compute the outer checksum of them.
const fn packets(family: Family) -> u64 {
    match family {
        Family::V4 => PINGS + 2 + 6,
        Family::V6 => PINGS + 2,
    }
}
/// Prefix of the names of the devices that encapsulate VXLAN.
const TUNNEL: &str = "flannel";
/// Prefix of the names of the devices that encrypt.
const WIREGUARD: &str = "flannel-wg";
/// What of a TCP transfer must have bypassed the host's stack at each of the four places: all but the handshake, the close and some.
const FAST_PACKETS: u64 = 20;
const TCP: Duration = Duration::from_millis(150);

/// Measures one pair in a family. What fails is part of the answer.
pub(crate) fn measure(cluster: &Cluster, family: Family, from: usize, to: usize) -> Pair {
    let (client, server) = (&cluster.pods[from], &cluster.pods[to]);
    let address = server.pod.address(family);
    let ends = || ends(cluster, family, client.node, server.node);
    let mut pair = Pair {
        from: client.label_in(family),
        to: server.label_in(family),
        family,
        ping: false,
        ping_ms: None,
        udp: false,
        tcp_mbps: None,
        path: if client.node == server.node {
            Path::Local
        } else {
            Path::Kernel
        },
        errors: Vec::new(),
    };
    if client.node != server.node {
        match cluster.device_to(client.node, address) {
            Ok(device) if device.starts_with(WIREGUARD) => pair.path = Path::Wireguard,
            Ok(device) if !device.starts_with(TUNNEL) => pair.path = Path::Direct,
            Ok(_) => {}
            Err(error) => pair.errors.push(format!("route: {error:#}")),
        }
    }
    let before = ends();
    match ping(&client.pod.ns, address, PINGS, Duration::from_millis(2)) {
        Ok(stats) => {
            pair.ping = stats.lost == 0;
            pair.ping_ms = Some(stats.mean_rtt.as_secs_f64() * 1e3).filter(|_| stats.received > 0);
            if stats.lost > 0 {
                pair.errors
                    .push(format!("{} of {} pings lost", stats.lost, stats.sent));
            }
        }
        Err(error) => pair.errors.push(format!("ping: {error:#}")),
    }
    match udp_echo(&server.pod.ns, address, &client.pod.ns, &DATAGRAMS) {
        Ok(()) => pair.udp = true,
        Err(error) => pair.errors.push(format!("UDP: {error:#}")),
    }
    let after = ends();
    if pair.path == Path::Kernel {
        match (before, after) {
            (Ok(before), Ok(after)) if carried(before, after) >= packets(family) => {
                pair.path = Path::Bpf;
            }
            (Ok(_), Ok(_)) => {}
            (Err(error), _) | (_, Err(error)) => pair.errors.push(format!("counters: {error:#}")),
        }
    }
    let before = ends();
    match transfer(cluster, family, from, to) {
        Ok(mbps) => pair.tcp_mbps = Some(mbps),
        Err(error) => pair.errors.push(format!("TCP: {error:#}")),
    }
    let faster = match pair.path {
        Path::Bpf => Some((Path::BpfFast, past_the_stack as fn(Ends, Ends) -> u64)),
        Path::Direct => Some((Path::DirectFast, routed_past_the_stack as _)),
        _ => None,
    };
    if let Some((path, count)) = faster
        && let (Ok(before), Ok(after)) = (before, ends())
        && count(before, after) >= FAST_PACKETS
    {
        pair.path = path;
    }
    pair
}

/// The counters at both ends of a way.
#[derive(Clone, Copy)]
struct Ends {
    client: Counts,
    server: Counts,
}

fn ends(cluster: &Cluster, family: Family, client: usize, server: usize) -> anyhow::Result<Ends> {
    Ok(Ends {
        client: cluster.counters(client, family)?,
        server: cluster.counters(server, family)?,
    })
}

/// Packets that eBPF carried at every one of the four places they pass: out of one node and into the other, there and back.
fn carried(before: Ends, after: Ends) -> u64 {
    let grown = |before: Counts, after: Counts| {
        let encap = after.encap.saturating_sub(before.encap);
        encap.min(after.decap.saturating_sub(before.decap))
    };
    grown(before.client, after.client).min(grown(before.server, after.server))
}

/// The same, past the host's stack.
fn past_the_stack(before: Ends, after: Ends) -> u64 {
    let grown = |before: Counts, after: Counts| {
        let encap = after.fast_encap.saturating_sub(before.fast_encap);
        encap.min(after.fast_decap.saturating_sub(before.fast_decap))
    };
    grown(before.client, after.client).min(grown(before.server, after.server))
}

/// The same between nodes on one link, without outer headers.
fn routed_past_the_stack(before: Ends, after: Ends) -> u64 {
    let grown = |before: Counts, after: Counts| {
        let out = after.routed_out.saturating_sub(before.routed_out);
        out.min(after.routed_in.saturating_sub(before.routed_in))
    };
    grown(before.client, after.client).min(grown(before.server, after.server))
}

fn transfer(cluster: &Cluster, family: Family, from: usize, to: usize) -> anyhow::Result<f64> {
    let (client, server) = (&cluster.pods[from].pod, &cluster.pods[to].pod);
    let address = server.address(family);
    let stats = tcp_transfer(&server.ns, address, &client.ns, Amount::For(TCP))?;
    ensure!(stats.bytes > 0, "no byte arrived");
    Ok(stats.mbps)
}
