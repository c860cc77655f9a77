//! What connection tracking has of a flow that bypasses it, and what becomes of the flow when it comes back.

mod gate_rig;
mod rig;

use std::{
    net::SocketAddr,
    sync::atomic::{AtomicU16, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use flannel_testkit::{
    Family,
    conntrack::{self, Entry},
    services::Flavour,
    traffic::{TcpPair, TcpServer, Way},
    try_eventually,
};
use gate_rig::{
    DNS, Gate, Mode, Vip,
    Who::{A, A2, B},
    cases::{Case, in_all_modes, over_ipv6},
};

/// How long the tables may take to say what is expected.
const SOON: Duration = Duration::from_secs(3);

const CASES: &[Case] = &[
    ("idle connection, tables flushed, then data", idle),
    ("back to the stack after any amount", back_to_the_stack),
    ("a promoted flow is established and assured", promoted_entry),
    ("closed by FIN", closed_by_fin),
    ("closed by RST", closed_by_rst),
    ("connection tracking flushed in the middle", flushed),
    (
        "a direct connection's tuple reused by a translated one",
        tuple_reuse,
    ),
    ("the same while the direct one lives", tuple_reuse_alive),
    ("the same over UDP", tuple_reuse_udp),
    ("UDP entries live as long as fast traffic", udp_lifetime),
    ("many questions over UDP", udp_services),
    ("one-way UDP", one_way_udp),
    ("one tuple opened 60 times", reopened),
    ("half closed, then 20 MB back", half_closed),
];

in_all_modes!(CASES);
over_ipv6!(CASES);

/// A RST after more than half the sequence space: connection tracking would call it old.
#[test]
fn reset_after_two_gigabytes() {
    if !flannel_testkit::privileged() {
        return;
    }
    for (mode, flavour) in [
        (Mode::Established, Flavour::Iptables),
        (Mode::Syn, Flavour::Nftables),
    ] {
        let gate = Gate::start(mode, flavour);
        gate.clear_nattuples();
        let server = gate.serve(B);
        let mut pair = gate.connect(A, &server);
        gate.promote(&mut pair, &[0, 1]).unwrap();
        for _ in 0..5 {
            pair.send(Way::Up, 450 << 20).unwrap();
        }
        pair.reset().unwrap();
        gate.assert_no_invalid("after the reset");
        gate.gone_soon(server.address, 10).unwrap();
    }
}

impl Gate {
    /// The entries of a node that end at a server.
    fn tracked(
        &self,
        node: usize,
        server: SocketAddr,
        client: SocketAddr,
    ) -> anyhow::Result<Vec<Entry>> {
        let mut all = conntrack::list_of(self.rig.ns(node), self.family())?;
        all.retain(|entry| entry.touches(server) && entry.touches(client));
        Ok(all)
    }

    /// Nodes 0 and 1 forget whatever ends at `server` within so many seconds. The name of the state may still be another.
    fn gone_soon(&self, server: SocketAddr, seconds: u64) -> anyhow::Result<()> {
        for node in [0, 1] {
            let what = format!("node {node} is about to forget {server}");
            try_eventually(SOON, &what, || {
                let mut all = conntrack::list_of(self.rig.ns(node), self.family())?;
                all.retain(|entry| entry.touches(server) && entry.timeout > seconds);
                ensure!(all.is_empty(), "{all:?}");
                Ok(())
            })?;
        }
        Ok(())
    }
}

/// The connections that every case is about: pod to pod, and through a Service; each with its server's address.
///
/// The latter has a port of its own, an odd one, which the kernel gives nobody (`inet_hash_connect`). The gate is made to forget before
/// each case what is translated; connection tracking, which does not know direct ones in mode `syn`, would take one's port for its own.
fn both(gate: &Gate, server: &TcpServer) -> anyhow::Result<Vec<TcpPair>> {
    static NEXT: AtomicU16 = AtomicU16::new(33_001);
    let port = NEXT.fetch_add(2, Ordering::Relaxed);
    [(server.address, 0), (gate.vip(Vip::Remote), port)]
        .into_iter()
        .map(|(to, port)| TcpPair::connect_from(gate.ns(A), port, to, &[server]))
        .collect()
}

fn promote_all(gate: &Gate, pairs: &mut [TcpPair]) -> anyhow::Result<()> {
    for (at, pair) in pairs.iter_mut().enumerate() {
        // Node 0 translates for the Service: fast on node 1 alone.
        let nodes: &[usize] = if at == 0 { &[0, 1] } else { &[1] };
        gate.promote(pair, nodes)?;
    }
    Ok(())
}

fn unharmed(gate: &Gate, pairs: &[TcpPair]) -> anyhow::Result<()> {
    for pair in pairs {
        let again = pair.lost_segments()?;
        let told = || gate.ns(B).exec(["nstat", "-as"]).unwrap_or_default();
        ensure!(
            again == 0,
            "{again} segments of {} sent again; the server's pod counted {}",
            pair.local,
            told()
        );
    }
    Ok(())
}

fn idle(gate: &mut Gate) -> anyhow::Result<()> {
    let server = gate.serve(B);
    let mut pairs = both(gate, &server)?;
    promote_all(gate, &mut pairs)?;
    gate.clear_flows();
    for pair in &mut pairs {
        pair.exchange(100).context("after the flush")?;
    }
    promote_all(gate, &mut pairs)?;
    gate.kill_agents();
    for node in 0..3 {
        gate.bump_epoch(node);
    }
    for pair in &mut pairs {
        pair.send(Way::Down, 100).context("after a new epoch")?;
        pair.exchange(100).context("after a new epoch")?;
    }
    gate.start_agents();
    for pair in &mut pairs {
        pair.exchange(100).context("with new agents")?;
    }
    unharmed(gate, &pairs)
}

fn back_to_the_stack(gate: &mut Gate) -> anyhow::Result<()> {
    let server = gate.serve(B);
    for (up, down) in [
        (1, 0),
        (0, 1),
        (1, 1),
        (20_000, 0),
        (200_000, 0),
        (0, 200_000),
        (3 << 20, 3 << 20),
        (50 << 20, 0),
    ] {
        for first in [Way::Up, Way::Down] {
            let mut pairs = both(gate, &server)?;
            promote_all(gate, &mut pairs)?;
            for pair in &mut pairs {
                pair.send(Way::Up, up)?;
                pair.send(Way::Down, down)?;
            }
            gate.clear_flows();
            for pair in &mut pairs {
                pair.send(first, 1)
                    .and_then(|()| pair.exchange(10))
                    .with_context(|| format!("after {up} bytes up and {down} down"))?;
            }
            if up.max(down) < 1 << 20 {
                unharmed(gate, &pairs)?;
            }
            for pair in pairs {
                pair.close()?;
            }
        }
    }
    Ok(())
}

fn promoted_entry(gate: &mut Gate) -> anyhow::Result<()> {
    let server = gate.serve(B);
    let mut pairs = both(gate, &server)?;
    promote_all(gate, &mut pairs)?;
    for (at, pair) in pairs.iter().enumerate() {
        for node in [0, 1] {
            let entries = gate.tracked(node, server.address, pair.local)?;
            if gate.modes[node] == Mode::Syn && at == 0 {
                ensure!(entries.is_empty(), "node {node} knows {entries:?}");
                continue;
            }
            if gate.modes[node] == Mode::Syn && node == 1 {
                // The backend's node sees a plain connection between pods.
                continue;
            }
            let [entry] = &entries[..] else {
                anyhow::bail!("node {node} has {entries:?} for {}", pair.local);
            };
            ensure!(
                entry.state == "ESTABLISHED" && entry.assured && !entry.unreplied,
                "node {node} has {entry:?}"
            );
            ensure!(entry.timeout > 200, "node {node} has {entry:?}");
            ensure!(
                entry.is_translated() == (at == 1 && node == 0),
                "node {node} has {entry:?}"
            );
        }
    }
    Ok(())
}

fn closed_by_fin(gate: &mut Gate) -> anyhow::Result<()> {
    let server = gate.serve(B);
    for bytes in [1000, 3 << 20] {
        let mut pairs = both(gate, &server)?;
        promote_all(gate, &mut pairs)?;
        for mut pair in pairs {
            pair.send(Way::Up, bytes)?;
            pair.close()
                .with_context(|| format!("after {bytes} bytes"))?;
        }
        gate.gone_soon(server.address, 120)?;
    }
    Ok(())
}

fn closed_by_rst(gate: &mut Gate) -> anyhow::Result<()> {
    let server = gate.serve(B);
    for bytes in [1000, 3 << 20] {
        let mut pairs = both(gate, &server)?;
        promote_all(gate, &mut pairs)?;
        for mut pair in pairs {
            let local = pair.local;
            pair.send(Way::Up, bytes)?;
            pair.reset()
                .with_context(|| format!("after {bytes} bytes"))?;
            for node in [0, 1] {
                let what = format!("node {node} is about to forget {local}");
                try_eventually(SOON, &what, || {
                    let entries = gate.tracked(node, server.address, local)?;
                    let late = entries.iter().any(|entry| entry.timeout > 10);
                    ensure!(!late, "{entries:?}");
                    Ok(())
                })?;
            }
        }
    }
    Ok(())
}

fn flushed(gate: &mut Gate) -> anyhow::Result<()> {
    let server = gate.serve(B);
    let mut pairs = both(gate, &server)?;
    promote_all(gate, &mut pairs)?;
    for round in 0..3 {
        for node in 0..3 {
            conntrack::flush(gate.rig.ns(node))?;
        }
        for pair in &mut pairs {
            // The client first: picked up in the middle, its direction counts as the one that opened.
            pair.exchange(1000)
                .with_context(|| format!("round {round}"))?;
        }
        gate.clear_flows();
        for pair in &mut pairs {
            pair.exchange(1000)
                .with_context(|| format!("slow in round {round}"))?;
        }
    }
    Ok(())
}

/// Connection tracking takes up a connection in the middle by its data, not by its end: it may call the first FIN invalid, and the
/// connection ends all the same.
#[test]
fn closed_right_after_a_flush() {
    if !flannel_testkit::privileged() {
        return;
    }
    for mode in Mode::ALL {
        let mut gate = Gate::start(mode, Flavour::Iptables);
        gate.clear_nattuples();
        closed_after_flush(&mut gate).unwrap_or_else(|error| panic!("{mode:?}: {error:#}"));
    }
}

fn closed_after_flush(gate: &mut Gate) -> anyhow::Result<()> {
    let server = gate.serve(B);
    let mut pairs = both(gate, &server)?;
    promote_all(gate, &mut pairs)?;
    for node in 0..3 {
        conntrack::flush(gate.rig.ns(node))?;
    }
    for mut pair in pairs {
        pair.exchange(1000)?;
        pair.close()?;
    }
    Ok(())
}

fn forget(gate: &Gate, protocol: &str, client: SocketAddr) -> anyhow::Result<()> {
    for node in 0..3 {
        conntrack::delete(gate.rig.ns(node), protocol, client)?;
    }
    Ok(())
}

fn tuple_reuse(gate: &mut Gate) -> anyhow::Result<()> {
    let server = gate.serve(B);
    for port in 40_000..40_015 {
        let mut direct = TcpPair::connect_from(gate.ns(A), port, server.address, &[&server])?;
        gate.promote(&mut direct, &[0, 1])?;
        let local = direct.local;
        direct.reset()?;
        forget(gate, "tcp", local)?;
        let to = gate.vip(Vip::Remote);
        let mut pair = TcpPair::connect_from(gate.ns(A), port, to, &[&server])
            .with_context(|| format!("port {port}"))?;
        for _ in 0..5 {
            pair.exchange(500).with_context(|| format!("port {port}"))?;
        }
        pair.close()?;
    }
    Ok(())
}

fn tuple_reuse_alive(gate: &mut Gate) -> anyhow::Result<()> {
    let server = gate.serve(B);
    // In mode `syn` the gate stands back only for pairs that it has seen translated.
    TcpPair::connect(gate.ns(A), gate.vip(Vip::Remote), &[&server])?.close()?;
    for port in 41_000..41_005 {
        let mut direct = TcpPair::connect_from(gate.ns(A), port, server.address, &[&server])?;
        for _ in 0..5 {
            direct.exchange(500)?;
        }
        let to = gate.vip(Vip::Remote);
        let mut pair = TcpPair::connect_from(gate.ns(A), port, to, &[&server])
            .with_context(|| format!("port {port}"))?;
        for _ in 0..5 {
            pair.exchange(500).with_context(|| format!("port {port}"))?;
            direct
                .exchange(500)
                .with_context(|| format!("the older one of port {port}"))?;
        }
        pair.close()?;
        direct.close()?;
    }
    Ok(())
}

fn tuple_reuse_udp(gate: &mut Gate) -> anyhow::Result<()> {
    let server = gate.udp(B, DNS);
    for port in 42_000..42_012 {
        let client = gate.udp(A, port);
        for _ in 0..5 {
            client.ask(server.address, &[&server], 100)?;
        }
        forget(gate, "udp", client.address)?;
        for _ in 0..5 {
            client
                .ask(gate.vip(Vip::RemoteUdp), &[&server], 100)
                .with_context(|| format!("port {port}"))?;
        }
    }
    Ok(())
}

fn udp_lifetime(gate: &mut Gate) -> anyhow::Result<()> {
    // It takes its time, and the families share timeouts and leases.
    if gate.family() == Family::V6 {
        return Ok(());
    }
    let timeouts = [
        ("net/netfilter/nf_conntrack_udp_timeout", "1"),
        ("net/netfilter/nf_conntrack_udp_timeout_stream", "2"),
    ];
    let mut before = Vec::new();
    for (key, value) in timeouts {
        before.push((key, gate.rig.ns(0).sysctl(key)?));
        for node in 0..3 {
            gate.rig.ns(node).set_sysctl(key, value)?;
        }
    }
    gate.kill_agents();
    gate.set_lease(Duration::from_millis(400));
    let server = gate.udp(B, DNS);
    let client = gate.udp(A, 0);
    let end = Instant::now() + Duration::from_millis(3500);
    let fast = gate.fast(0);
    while Instant::now() < end {
        for _ in 0..50 {
            client.ask(server.address, &[&server], 100)?;
        }
    }
    for node in [0, 1] {
        let entries = gate.tracked(node, server.address, client.address)?;
        ensure!(
            entries.len() == 1 && !entries[0].unreplied,
            "node {node} has {entries:?}"
        );
    }
    if gate.modes[0] != Mode::Off {
        let now = gate.fast(0);
        ensure!(now.encap > fast.encap + 100, "{fast:?}, then {now:?}");
    }
    for (key, value) in before {
        for node in 0..3 {
            gate.rig.ns(node).set_sysctl(key, &value)?;
        }
    }
    gate.start_agents();
    Ok(())
}

fn udp_services(gate: &mut Gate) -> anyhow::Result<()> {
    let server = gate.udp(B, DNS);
    let vip = gate.vip(Vip::RemoteUdp);
    let client = gate.udp(A, 0);
    for _ in 0..300 {
        client.ask(vip, &[&server], 64)?;
    }
    for _ in 0..100 {
        let client = gate.udp(A, 0);
        client.ask(vip, &[&server], 64)?;
    }
    let client = gate.udp(A, 0);
    for _ in 0..50 {
        client.ask(server.address, &[&server], 64)?;
        client.ask(vip, &[&server], 64)?;
    }
    Ok(())
}

fn one_way_udp(gate: &mut Gate) -> anyhow::Result<()> {
    let server = gate.udp(B, DNS);
    // No port that connection tracking still has of a translated client, and would change: none that the kernel gives.
    let client = gate.udp(A, 20_001);
    let before = [gate.fast(0), gate.fast(1)];
    for mark in 0..100 {
        client.send(server.address, mark, 200)?;
        server.receive(mark, 200)?;
    }
    if gate.modes[0] == Mode::Off {
        return Ok(());
    }
    let now = [gate.fast(0), gate.fast(1)];
    let sent = now[0].encap - before[0].encap;
    let got = now[1].decap - before[1].decap;
    ensure!(sent >= 95 && got >= 95, "{sent} and {got} of 100 fast");
    Ok(())
}

fn reopened(gate: &mut Gate) -> anyhow::Result<()> {
    for to in [B, A2] {
        let server = gate.serve(to);
        for round in 0..60 {
            let mut pair = TcpPair::connect_from(gate.ns(A), 43_000, server.address, &[&server])
                .with_context(|| format!("round {round}"))?;
            for _ in 0..4 {
                pair.exchange(100)
                    .with_context(|| format!("round {round}"))?;
            }
            pair.reset().with_context(|| format!("round {round}"))?;
        }
    }
    Ok(())
}

fn half_closed(gate: &mut Gate) -> anyhow::Result<()> {
    let server = gate.serve(B);
    let mut pairs = both(gate, &server)?;
    promote_all(gate, &mut pairs)?;
    for mut pair in pairs {
        pair.finish(Way::Up)?;
        pair.send(Way::Down, 20 << 20)?;
        pair.finish(Way::Down)?;
    }
    Ok(())
}
