//! Rules that act on every packet, put in place while flows bypass them: `auto` gives the packets back.

mod gate_rig;
mod rig;

use anyhow::{Context as _, ensure};
use flannel_testkit::{
    Capture, Family,
    services::{Flavour, iptables_program},
    traffic::{TcpPair, UdpEnd, Way},
    try_eventually,
};
use gate_rig::{
    DNS, Extra, Gate, LEASE, Mode,
    Who::{A, B},
};
use rig::PATIENCE;
use serde_json::Value;

/// Datagrams of a count.
const DATAGRAMS: u64 = 40;
/// `DSCP` 10 as the rule writes it, in the byte that also holds ECN.
const MARKED: u8 = 10 << 2;

/// A rule that somebody else puts in place, and what it does to every packet.
#[derive(Clone, Copy, Debug)]
enum Rule {
    Quota,
    NamedCounter,
    Dscp,
}

impl Rule {
    /// Puts it on a node in the way of datagrams to `B`.
    fn put(self, gate: &Gate, node: usize) -> anyhow::Result<()> {
        let to = gate.ip(B);
        match self {
            Rule::Quota => {
                let line = format!("-I FORWARD -d {to} -p udp -m quota --quota 1000000000000");
                iptables(gate, node, &line).map(drop)
            }
            Rule::NamedCounter => {
                let udp = match gate.family() {
                    Family::V4 => format!("ip daddr {to} ip protocol udp"),
                    Family::V6 => format!("ip6 daddr {to} ip6 nexthdr udp"),
                };
                let table = format!(
                    "table inet accounts {{ counter pods {{}}; chain forward {{ type filter hook forward priority -5; \
                     {udp} counter name pods; }}; }}"
                );
                gate.rig.ns(node).exec(["nft", &table]).map(drop)
            }
            Rule::Dscp => {
                let line = format!("-t mangle -I FORWARD -d {to} -p udp -j DSCP --set-dscp 10");
                iptables(gate, node, &line).map(drop)
            }
        }
    }

    fn remove(self, gate: &Gate, node: usize) -> anyhow::Result<()> {
        let ns = gate.rig.ns(node);
        match self {
            Rule::Quota => iptables(gate, node, "-D FORWARD 1"),
            Rule::NamedCounter => ns.exec(["nft", "delete table inet accounts"]),
            Rule::Dscp => iptables(gate, node, "-t mangle -D FORWARD 1"),
        }
        .map(drop)
    }

    /// Packets that the rule has seen, as its own tool counts them.
    fn seen(self, gate: &Gate, node: usize) -> anyhow::Result<u64> {
        let ns = gate.rig.ns(node);
        let first = |table: &str| -> anyhow::Result<u64> {
            let text = iptables(gate, node, &format!("-t {table} -nvxL FORWARD 1"))?;
            let packets = text.split_whitespace().next().context("no rule")?;
            Ok(packets.parse()?)
        };
        match self {
            Rule::Quota => first("filter"),
            Rule::Dscp => first("mangle"),
            Rule::NamedCounter => {
                let text = ns.exec(["nft", "-j", "list", "counter", "inet", "accounts", "pods"])?;
                let all: Value = serde_json::from_str(&text)?;
                let mut found = rig::list(&all["nftables"]).iter();
                found
                    .find_map(|entry| entry["counter"]["packets"].as_u64())
                    .with_context(|| format!("no counter in {text}"))
            }
        }
    }
}

fn iptables(gate: &Gate, node: usize, line: &str) -> anyhow::Result<String> {
    let program = iptables_program(gate.family());
    let words = [program].into_iter().chain(line.split(' '));
    gate.rig.ns(node).exec(words)
}

/// The byte of a frame's packet that holds DSCP and ECN.
fn tos(family: Family, frame: &[u8]) -> u8 {
    match family {
        Family::V4 => frame[15],
        Family::V6 => frame[14] << 4 | frame[15] >> 4,
    }
}

/// A connection and datagrams, as many as are wanted, of which the server has got each.
struct Flows<'a> {
    pair: TcpPair,
    client: UdpEnd,
    server: &'a UdpEnd,
}

impl Flows<'_> {
    fn talk(&mut self, datagrams: u64) -> anyhow::Result<()> {
        for _ in 0..datagrams {
            self.client.ask(self.server.address, &[self.server], 200)?;
        }
        self.pair.send(Way::Up, 2000)?;
        self.pair.exchange(2000)
    }
}

fn sees_every_packet(gate: &Gate, rule: Rule, node: usize) -> anyhow::Result<()> {
    let server = gate.serve(B);
    let names = gate.udp(B, DNS);
    let mut flows = Flows {
        pair: gate.connect(A, &server),
        client: gate.udp(A, 0),
        server: &names,
    };
    let bypass = |flows: &mut Flows<'_>| -> anyhow::Result<u64> {
        let before = gate.fast(node).all();
        flows.talk(DATAGRAMS)?;
        Ok(gate.fast(node).all() - before)
    };
    flows.talk(3)?;
    let fast = bypass(&mut flows)?;
    ensure!(fast > DATAGRAMS, "{fast} packets were fast before the rule");

    rule.put(gate, node)?;
    try_eventually(LEASE * 2, "the node gives the packets back", || {
        flows.talk(1)?;
        gate.has_mode(node, Mode::Off).map_err(anyhow::Error::msg)
    })?;
    let before = rule.seen(gate, node)?;
    let arrivals = Capture::start(gate.ns(B), "eth0", &format!("udp dst port {DNS}"))?;
    let fast = bypass(&mut flows)?;
    ensure!(fast == 0, "{fast} packets were fast under the rule");
    let counted = rule.seen(gate, node)? - before;
    ensure!(
        counted == DATAGRAMS,
        "the rule has seen {counted} of {DATAGRAMS} packets"
    );
    let arrived = arrivals.stop()?.packets;
    let marks: Vec<u8> = arrived
        .iter()
        .map(|packet| tos(gate.family(), &packet.data))
        .collect();
    let want = if let Rule::Dscp = rule { MARKED } else { 0 };
    ensure!(
        marks.len() as u64 == DATAGRAMS && marks.iter().all(|mark| *mark == want),
        "TOS at the pod: {marks:02x?}"
    );
    // The agent acts first, and writes down what it did when it is done.
    try_eventually(PATIENCE, "the agent says so", || {
        let status = gate.rig.status(node);
        ensure!(status["fast_path"]["mode"] == "off", "{status}");
        Ok(())
    })?;

    rule.remove(gate, node)?;
    try_eventually(PATIENCE, "the gate opens again", || {
        gate.has_mode(node, Mode::Auto)
            .map_err(anyhow::Error::msg)?;
        let fast = bypass(&mut flows)?;
        ensure!(fast > DATAGRAMS, "{fast} packets were fast after the rule");
        Ok(())
    })?;
    let again = flows.pair.lost_segments()?;
    ensure!(again == 0, "{again} segments sent again");
    flows.pair.close()
}

fn accounts(flavour: Flavour, family: Family, rules: &[(Rule, usize)]) {
    if !flannel_testkit::privileged() {
        return;
    }
    let gate = Gate::with([Mode::Auto; 3], flavour, Extra::over(family));
    for (rule, node) in rules {
        sees_every_packet(&gate, *rule, *node).unwrap_or_else(|error| {
            panic!("{rule:?} on node {node}, {flavour:?}, {family}: {error:#}")
        });
    }
    gate.assert_no_invalid("at the end");
}

#[test]
fn rules_for_every_packet_see_every_packet_again() {
    let (quota, dscp) = ((Rule::Quota, 0), (Rule::Dscp, 1));
    accounts(Flavour::Iptables, Family::V4, &[quota, dscp]);
    accounts(Flavour::Nftables, Family::V4, &[(Rule::NamedCounter, 1)]);
}

#[test]
fn rules_for_every_packet_of_ipv6_see_every_packet_again() {
    let (quota, dscp) = ((Rule::Quota, 1), (Rule::Dscp, 0));
    let counter = (Rule::NamedCounter, 1);
    accounts(Flavour::Nftables, Family::V6, &[quota, counter, dscp]);
}
