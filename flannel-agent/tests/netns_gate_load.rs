//! A hundred thousand flows at a time over a flow table of a thousand.

mod gate_rig;
mod rig;

use std::net::SocketAddr;

use anyhow::{Context as _, ensure};
use flannel_testkit::{
    Family,
    services::Flavour,
    traffic::{TcpPair, UdpEnd},
};
use gate_rig::{
    Extra, Gate, Mode, Vip,
    Who::{A, B},
};

/// Entries of the flow table.
const ENTRIES: usize = 1024;
/// Sockets of the client, and of the server; every pair of them is a flow.
const SOCKETS: u16 = 317;

/// Every flow asks, and is answered untranslated: `asks` times in a row, so that it is fast unless the table has no room.
fn everyone(clients: &[UdpEnd], servers: &[UdpEnd], asks: usize) -> anyhow::Result<()> {
    // Half of them on each of two threads, which is also how they meet in the table.
    std::thread::scope(|scope| {
        let (low, high) = servers.split_at(servers.len() / 2);
        let (first, second) = clients.split_at(clients.len() / 2);
        let halves = [
            [(first, low), (first, high)],
            [(second, high), (second, low)],
        ];
        let work = halves.map(|half| {
            scope.spawn(move || {
                half.into_iter()
                    .try_for_each(|(clients, servers)| some(clients, servers, asks))
            })
        });
        work.into_iter()
            .try_for_each(|half| half.join().expect("the thread"))
    })
}

fn some(clients: &[UdpEnd], servers: &[UdpEnd], asks: usize) -> anyhow::Result<()> {
    for server in servers {
        for client in clients {
            for _ in 0..asks {
                let (_, seen) = client.ask(server.address, &[server], 32)?;
                ensure!(seen == client.address, "seen as {seen}");
            }
        }
    }
    Ok(())
}

/// Connections that connection tracking of a node knows.
fn tracked(gate: &Gate, node: usize) -> u64 {
    let count = gate.rig.ns(node).sysctl("net/netfilter/nf_conntrack_count");
    count.expect("the count").parse().expect("a number")
}

fn hundred_thousand(mode: Mode, flavour: Flavour, family: Family) {
    if !flannel_testkit::privileged() {
        return;
    }
    let entries = format!("--bpf-flow-entries={ENTRIES}");
    let extra = Extra {
        flags: &[&entries],
        ..Extra::over(family)
    };
    let gate = Gate::with([mode; 3], flavour, extra);
    // However long the machine takes for all of them, none is to be forgotten meanwhile.
    for node in 0..3 {
        for key in ["udp_timeout", "udp_timeout_stream"] {
            let key = format!("net/netfilter/nf_conntrack_{key}");
            gate.rig.ns(node).set_sysctl(&key, "600").unwrap();
        }
    }
    gate.clear_nattuples();
    let server = gate.serve(B);
    let mut idle: Vec<TcpPair> = [server.address, gate.vip(Vip::Remote)]
        .iter()
        .map(|to| gate.connect_to(A, *to, &[&server]))
        .collect();
    for pair in &mut idle {
        for _ in 0..4 {
            pair.exchange(200).unwrap();
        }
    }
    let servers: Vec<UdpEnd> = (0..SOCKETS).map(|at| gate.udp(B, 20_000 + at)).collect();
    let clients: Vec<UdpEnd> = (0..SOCKETS).map(|_| gate.udp(A, 0)).collect();
    let before = gate.fast(0);
    everyone(&clients, &servers, 2).unwrap();
    let known = tracked(&gate, 0);
    let flows = u64::from(SOCKETS) * u64::from(SOCKETS);
    assert!(known >= flows, "{known} of {flows} flows are alive");
    assert_eq!(gate.rig.map_info(0, "flows")["max_entries"], ENTRIES);
    let held = gate.entries(0, "flows");
    assert!((ENTRIES / 2..=ENTRIES).contains(&held), "{held} entries");
    let fast = gate.fast(0).encap - before.encap;
    assert!(fast > flows / 2, "{fast} packets were fast");
    // All but the last thousand have been evicted: again, and what was silent meanwhile too.
    everyone(&clients, &servers, 1).unwrap();
    for pair in idle {
        idle_goes_on(pair, server.address).unwrap();
    }
    gate.assert_no_invalid("at the end");
}

fn idle_goes_on(mut pair: TcpPair, server: SocketAddr) -> anyhow::Result<()> {
    pair.exchange(60_000)
        .with_context(|| format!("a silent connection to {server}"))?;
    let again = pair.lost_segments()?;
    ensure!(again == 0, "{again} segments sent again");
    pair.close()
}

#[test]
fn in_established() {
    hundred_thousand(Mode::Established, Flavour::Iptables, Family::V4);
}

#[test]
fn in_syn() {
    hundred_thousand(Mode::Syn, Flavour::Nftables, Family::V4);
}

#[test]
fn in_established_over_ipv6() {
    hundred_thousand(Mode::Established, Flavour::Nftables, Family::V6);
}
