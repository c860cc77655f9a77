//! One pair of pods: ping, UDP, TCP, and the counters around them.

use std::time::Duration;

use anyhow::ensure;
use flannel_testkit::traffic::{Amount, ping, tcp_transfer, udp_echo};

use bench_lab::cluster::{Cluster, Counts};

use super::report::{Pair, Path};

const PINGS: u64 = 5;
/// One byte, an ordinary datagram, and one that is fragmented inside the tunnel.
const DATAGRAMS: [usize; 3] = [1, 1200, 8000];
/// Packets in one direction for [`PINGS`] and [`DATAGRAMS`]: 8000 bytes are six fragments at an MTU of 1450.
const PACKETS: u64 = PINGS + 2 + 6;
/// What of a TCP transfer must have bypassed the host's stack at each of the four places: all but the handshake, the close and some.
const FAST_PACKETS: u64 = 20;
const TCP: Duration = Duration::from_millis(150);

/// Measures one pair. What fails is part of the answer.
pub(crate) fn measure(cluster: &Cluster, from: usize, to: usize) -> Pair {
    let (client, server) = (&cluster.pods[from], &cluster.pods[to]);
    let mut pair = Pair {
        from: client.label.clone(),
        to: server.label.clone(),
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
    let before = ends(cluster, client.node, server.node);
    match ping(
        &client.pod.ns,
        server.pod.ip,
        PINGS,
        Duration::from_millis(2),
    ) {
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
    match udp_echo(&server.pod.ns, server.pod.ip, &client.pod.ns, &DATAGRAMS) {
        Ok(()) => pair.udp = true,
        Err(error) => pair.errors.push(format!("UDP: {error:#}")),
    }
    let after = ends(cluster, client.node, server.node);
    if client.node != server.node {
        match (before, after) {
            (Ok(before), Ok(after)) if carried(before, after) >= PACKETS => pair.path = Path::Bpf,
            (Ok(_), Ok(_)) => {}
            (Err(error), _) | (_, Err(error)) => pair.errors.push(format!("counters: {error:#}")),
        }
    }
    let before = ends(cluster, client.node, server.node);
    match transfer(cluster, from, to) {
        Ok(mbps) => pair.tcp_mbps = Some(mbps),
        Err(error) => pair.errors.push(format!("TCP: {error:#}")),
    }
    if pair.path == Path::Bpf
        && let (Ok(before), Ok(after)) = (before, ends(cluster, client.node, server.node))
        && past_the_stack(before, after) >= FAST_PACKETS
    {
        pair.path = Path::BpfFast;
    }
    pair
}

/// The counters at both ends of a way.
#[derive(Clone, Copy)]
struct Ends {
    client: Counts,
    server: Counts,
}

fn ends(cluster: &Cluster, client: usize, server: usize) -> anyhow::Result<Ends> {
    Ok(Ends {
        client: cluster.counters(client)?,
        server: cluster.counters(server)?,
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

fn transfer(cluster: &Cluster, from: usize, to: usize) -> anyhow::Result<f64> {
    let (client, server) = (&cluster.pods[from].pod, &cluster.pods[to].pod);
    let stats = tcp_transfer(&server.ns, server.ip, &client.ns, Amount::For(TCP))?;
    ensure!(stats.bytes > 0, "no byte arrived");
    Ok(stats.mbps)
}
