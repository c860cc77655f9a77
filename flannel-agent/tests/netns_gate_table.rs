//! A flow table that is far too small, agents that come and go, and nodes that change their mode under live connections.

mod gate_rig;
mod rig;

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Context as _, ensure};
use flannel_testkit::{
    Family, conntrack, eventually,
    services::Flavour,
    traffic::{TcpPair, TcpServer, Way},
};
use gate_rig::{
    Extra, Gate, LEASE, Mode, Vip,
    Who::{A, A2, B},
};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Entries of the flow table in the tests of eviction.
const ENTRIES: usize = 1024;
/// Live connections over it.
const CONNECTIONS: usize = 9_000;

/// Connections of every kind, which live as long as a test.
struct Live {
    pairs: Vec<TcpPair>,
    _servers: [TcpServer; 2],
}

impl Live {
    fn start(gate: &Gate) -> Live {
        let servers = [gate.serve(B), gate.serve(A2)];
        let [far, near] = &servers;
        let mut pairs = Vec::new();
        for _ in 0..10 {
            for (target, by) in [
                (far.address, far),
                (near.address, near),
                (gate.vip(Vip::Remote), far),
                (gate.vip(Vip::Local), near),
            ] {
                pairs.push(gate.connect_to(A, target, &[by]));
            }
        }
        Live {
            pairs,
            _servers: servers,
        }
    }

    /// Everyone talks, from either end first.
    fn talk(&mut self, when: &str) {
        for (at, pair) in self.pairs.iter_mut().enumerate() {
            let first = if at % 8 < 4 { Way::Up } else { Way::Down };
            for _ in 0..3 {
                pair.send(first, 300)
                    .and_then(|()| pair.exchange(2000))
                    .with_context(|| format!("connection {at} {when}"))
                    .unwrap();
            }
        }
    }

    /// Nothing was lost on the way.
    fn close(self) {
        let mut again = 0;
        for pair in self.pairs {
            again += pair.lost_segments().unwrap();
            pair.close().unwrap();
        }
        assert_eq!(again, 0, "segments sent again");
    }
}

fn changes_mode(flavour: Flavour, family: Family, steps: &[[Mode; 3]]) {
    if !flannel_testkit::privileged() {
        return;
    }
    let mut gate = Gate::with(steps[0], flavour, Extra::over(family));
    let mut live = Live::start(&gate);
    live.talk("at first");
    for (number, modes) in steps.iter().enumerate().skip(1) {
        for (node, mode) in modes.iter().enumerate() {
            // A crash on every other one.
            if (number + node) % 2 == 0 {
                gate.rig.kill_agent(node);
            } else {
                assert_eq!(gate.rig.stop_agent(node), 0);
            }
            live.talk(&format!(
                "without the agent of node {node}, before step {number}"
            ));
            gate.modes[node] = *mode;
            gate.start_agent(node);
            live.talk(&format!("while node {node} starts, step {number}"));
        }
        for node in 0..modes.len() {
            gate.rig.wait_ready(node);
            gate.wait_gate(node);
        }
        live.talk(&format!("in step {number}, {modes:?}"));
        if modes[0] != Mode::Off {
            let before = gate.fast(0);
            live.talk(&format!("again in step {number}"));
            let now = gate.fast(0);
            assert!(
                now.encap > before.encap + 20 && now.local > before.local + 20,
                "step {number}: {before:?}, then {now:?}"
            );
        }
    }
    live.close();
    gate.assert_no_invalid("after all steps");
}

#[test]
fn modes_change_under_live_connections_with_iptables() {
    use Mode::{Established, Off, Syn};
    changes_mode(
        Flavour::Iptables,
        Family::V4,
        &[
            [Off; 3],
            [Established; 3],
            [Syn; 3],
            [Off; 3],
            [Syn; 3],
            [Established; 3],
            [Established; 3],
            [Off, Established, Syn],
            [Off; 3],
        ],
    );
}

#[test]
fn modes_change_under_live_connections_with_nftables() {
    use Mode::{Established, Off, Syn};
    changes_mode(
        Flavour::Nftables,
        Family::V4,
        &[
            [Established; 3],
            [Off; 3],
            [Syn; 3],
            [Syn; 3],
            [Established; 3],
            [Off; 3],
            [Established; 3],
        ],
    );
}

#[test]
fn modes_change_under_live_connections_over_ipv6() {
    use Mode::{Established, Off, Syn};
    changes_mode(
        Flavour::Nftables,
        Family::V6,
        &[
            [Off; 3],
            [Syn; 3],
            [Established; 3],
            [Off, Established, Syn],
            [Off; 3],
        ],
    );
}

/// What connection tracking has not seen for long, or never, must still be able to end.
///
/// From `syn` to `off` it is not: the programs that could let a FIN pass are detached, and connection tracking calls the FIN of a
/// connection that it has never seen invalid. One that talks before it ends is picked up, as the steps above show.
fn idle_connections_end(family: Family) {
    if !flannel_testkit::privileged() {
        return;
    }
    for (from, to) in [
        (Mode::Established, Mode::Off),
        (Mode::Syn, Mode::Established),
    ] {
        let mut gate = Gate::with([from; 3], Flavour::Iptables, Extra::over(family));
        gate.clear_nattuples();
        let mut live = Live::start(&gate);
        live.talk("at first");
        let other = live.pairs.split_off(live.pairs.len() / 2);
        for node in 0..3 {
            assert_eq!(gate.rig.stop_agent(node), 0);
            gate.modes[node] = to;
        }
        gate.start_agents();
        live.close();
        for pair in other {
            let local = pair.local;
            pair.reset()
                .with_context(|| format!("{local}, {from:?} to {to:?}"))
                .unwrap();
        }
        gate.assert_no_invalid("at the end");
    }
}

#[test]
fn idle_connections_end_in_another_mode() {
    idle_connections_end(Family::V4);
}

#[test]
fn idle_connections_over_ipv6_end_in_another_mode() {
    idle_connections_end(Family::V6);
}

/// Connections that are older than any agent become fast, and connection tracking may forget them meanwhile.
fn older_than_the_gate(flavour: Flavour, family: Family) {
    if !flannel_testkit::privileged() {
        return;
    }
    let mut gate = Gate::with([Mode::Off; 3], flavour, Extra::over(family));
    let mut live = Live::start(&gate);
    live.talk("before the gate");
    for node in 0..3 {
        assert_eq!(gate.rig.stop_agent(node), 0);
        gate.modes[node] = Mode::Established;
    }
    gate.start_agents();
    live.talk("at first");
    let before = gate.fast(0);
    live.talk("with the gate");
    let now = gate.fast(0);
    assert!(
        now.encap > before.encap + 20 && now.local > before.local + 20,
        "{before:?}, then {now:?}"
    );
    for node in 0..3 {
        conntrack::flush(gate.rig.ns(node)).unwrap();
    }
    // Within a lease every connection passes the stack again, which then knows it.
    eventually(LEASE * 2, "connection tracking knows all again", || {
        // An answer would be taken for a connection of the server's, were it seen first.
        for pair in &mut live.pairs {
            pair.exchange(100)?;
        }
        let known = conntrack::list_of(gate.rig.ns(0), gate.family())?;
        let is_known = |pair: &TcpPair| known.iter().any(|entry| entry.touches(pair.local));
        let missing = live.pairs.iter().filter(|pair| !is_known(pair)).count();
        ensure!(missing == 0, "{missing} connections are unknown");
        Ok(())
    });
    live.talk("after a flush");
    live.close();
    gate.assert_no_invalid("at the end");
}

#[test]
fn flows_older_than_the_gate() {
    for flavour in Flavour::ALL {
        older_than_the_gate(flavour, Family::V4);
    }
}

#[test]
fn flows_over_ipv6_older_than_the_gate() {
    older_than_the_gate(Flavour::Iptables, Family::V6);
}

fn eviction(mode: Mode, flavour: Flavour, family: Family) {
    if !flannel_testkit::privileged() {
        return;
    }
    // Two for every connection.
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, most, most).unwrap();
    let entries = format!("--bpf-flow-entries={ENTRIES}");
    let extra = Extra {
        flags: &[&entries],
        ..Extra::over(family)
    };
    let gate = Gate::with([mode; 3], flavour, extra);
    for node in 0..3 {
        let info = gate.rig.map_info(node, "flows");
        assert_eq!(info["max_entries"], ENTRIES, "{info}");
    }
    gate.clear_nattuples();
    let server = gate.serve(B);
    let vip = gate.vip(Vip::Remote);
    let mut idle = gate.connect_to(A, vip, &[&server]);
    gate.promote(&mut idle, &[1]).unwrap();
    let mut pairs = Vec::new();
    for (target, share) in [(server.address, 4), (vip, 1)] {
        let count = CONNECTIONS / 5 * share;
        pairs.extend(TcpPair::connect_many(gate.ns(A), target, &server, count).unwrap());
    }
    // A stride that meets every connection once a round, never neighbours.
    let stride = 7919;
    let mut again: BTreeMap<usize, u32> = BTreeMap::new();
    for round in 0..2 {
        for turn in 0..pairs.len() {
            let at = (turn * stride + round) % pairs.len();
            for _ in 0..2 {
                pairs[at]
                    .exchange(200)
                    .with_context(|| format!("connection {at} in round {round}"))
                    .unwrap();
            }
        }
        gate.assert_no_invalid("after a round");
    }
    idle.exchange(500).unwrap();
    pairs.push(idle);
    for (at, pair) in pairs.iter().enumerate() {
        let count = pair.lost_segments().unwrap();
        if count > 0 {
            again.insert(at, count);
        }
    }
    assert!(again.is_empty(), "segments sent again: {again:?}");
    if mode != Mode::Off {
        assert!(gate.entries(0, "flows") <= ENTRIES);
        let fast = gate.fast(0);
        assert!(fast.encap > 1000, "{fast:?}");
    }
    for pair in pairs {
        pair.reset().unwrap();
    }
    gate.assert_no_invalid("at the end");
}

#[test]
fn a_small_table_is_only_slower_in_established() {
    eviction(Mode::Established, Flavour::Iptables, Family::V4);
}

#[test]
fn a_small_table_is_only_slower_in_syn() {
    eviction(Mode::Syn, Flavour::Nftables, Family::V4);
}

#[test]
fn a_small_table_is_only_slower_over_ipv6() {
    eviction(Mode::Established, Flavour::Nftables, Family::V6);
}

/// Without what the agent sets in the kernel the same eviction kills connections: the test sees it.
fn kills_without_the_sysctl(family: Family) {
    if !flannel_testkit::privileged() {
        return;
    }
    let outcome = || -> anyhow::Result<()> {
        let extra = Extra::over(family);
        let mut gate = Gate::with([Mode::Established; 3], Flavour::Iptables, extra);
        gate.kill_agents();
        for node in 0..3 {
            let key = "net/netfilter/nf_conntrack_tcp_be_liberal";
            gate.rig.ns(node).set_sysctl(key, "0")?;
        }
        let server = gate.serve(B);
        let mut pair = TcpPair::connect(gate.ns(A), server.address, &[&server])?;
        gate.promote(&mut pair, &[0, 1])?;
        gate.clear_flows();
        let through = pair.arrives(Way::Up, Duration::from_millis(500))?;
        ensure!(through, "a packet back on the stack was dropped");
        ensure!(gate.invalid_drops() == [0; 3], "{:?}", gate.invalid_drops());
        Ok(())
    };
    let outcome = outcome();
    let error = outcome.expect_err("strict connection tracking drops what it has not followed");
    let text = format!("{error:#}");
    assert!(text.contains("was dropped") || text.contains('['), "{text}");
}

#[test]
fn a_small_table_kills_without_the_sysctl() {
    kills_without_the_sysctl(Family::V4);
}

#[test]
fn a_small_table_kills_over_ipv6_without_the_sysctl() {
    kills_without_the_sysctl(Family::V6);
}
