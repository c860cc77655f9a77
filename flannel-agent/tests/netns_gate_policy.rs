//! What others put between two pods while the gate is open: rules that drop, agents that judge, programs, shaping.

mod gate_rig;
mod rig;

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use flannel_common::flow::mode;
use flannel_testkit::{
    Family, Netns,
    queue::QueueAgent,
    services::{Flavour, iptables_program},
    traffic::{self, Amount, TcpPair, TcpServer, UdpEnd, Way},
    try_eventually,
};
use gate_rig::{
    DNS, Extra, Gate, LEASE, Mode, Vip,
    Who::{A, A2, B},
    cases::{Case, in_all_modes, run_over_ipv6, run_with},
};

/// How long a packet may take before it counts as dropped.
const ARRIVES: Duration = Duration::from_millis(150);
/// How long the agent may take to see that somebody filters, and to stand back in mode `syn`.
const NOTICED: Duration = Duration::from_secs(10);

const CASES: &[Case] = &[
    ("a drop rule", drop_rule),
    ("a drop rule, and nobody notices", drop_rule_unnoticed),
    ("an agent behind a queue", queue_agent),
    ("a foreign program that says OK", foreign_programs),
    ("shaping on a pod's interface", shaping),
];

in_all_modes!(CASES);

#[test]
fn established_with_nftables_over_ipv6() {
    let cases = [CASES[0], CASES[2], CASES[3]];
    run_over_ipv6(Mode::Established, Flavour::Nftables, &cases);
}

/// Peers that are routed to instead of tunnelled: what the stack sends to them is witnessed on the uplink, whose programs look at all of
/// the host's traffic.
fn routed_to(mode: Mode, flavour: Flavour, family: Family, backend: &str) {
    let extra = Extra {
        family,
        routed_by: Some(backend),
        ..Extra::default()
    };
    // By a rule that is noticed, and over IPv6 by one that is not.
    let cases = if (mode, family) == (Mode::Established, Family::V6) {
        &CASES[..2]
    } else {
        &CASES[..1]
    };
    run_with(mode, flavour, extra, cases);
}

#[test]
fn peers_on_the_link() {
    let backend = r#"{"Type":"vxlan","DirectRouting":true}"#;
    routed_to(Mode::Established, Flavour::Iptables, Family::V4, backend);
    routed_to(Mode::Syn, Flavour::Iptables, Family::V6, backend);
}

#[test]
fn peers_of_host_gw() {
    let backend = r#"{"Type":"host-gw"}"#;
    routed_to(Mode::Established, Flavour::Nftables, Family::V6, backend);
}

/// Without the gate nothing that others put in the way has any effect: the tests see it.
#[test]
fn without_the_gate_a_drop_rule_does_nothing() {
    if !flannel_testkit::privileged() {
        return;
    }
    for flavour in Flavour::ALL {
        let mut gate = Gate::start(Mode::Established, flavour);
        let server = gate.serve(B);
        let udp = gate.udp(B, DNS);
        gate.kill_agents();
        for node in 0..3 {
            gate.force_mode(node, mode::UNGATED);
        }
        let mut running = Running::start(&gate, &server, &udp).unwrap();
        let rule = Dropping::put(&gate, 1).unwrap();
        let new = blocked(&gate, &server, &udp);
        assert!(new.is_err(), "{flavour:?}: new connections are blocked");
        let old = running.stops(Duration::from_secs(1));
        assert!(old.is_err(), "{flavour:?}: running ones stop");
        rule.remove().unwrap();
    }
}

/// A rule of somebody else's.
struct Dropping {
    ns: Netns,
    flavour: Flavour,
    family: Family,
}

impl Dropping {
    /// Drops everything that a node forwards to `B`.
    fn put(gate: &Gate, node: usize) -> anyhow::Result<Dropping> {
        let (ns, family) = (gate.rig.ns(node).clone(), gate.family());
        let ip = gate.ip(B).to_string();
        match gate.flavour {
            Flavour::Iptables => {
                let program = iptables_program(family);
                ns.exec([program, "-I", "FORWARD", "-d", &ip, "-j", "DROP"])?;
            }
            Flavour::Nftables => {
                let word = match family {
                    Family::V4 => "ip",
                    Family::V6 => "ip6",
                };
                let rule = format!(
                    "table inet stranger {{ chain forward {{ type filter hook forward priority -10; {word} daddr {ip} counter drop; }}; }}"
                );
                ns.exec(["nft", &rule])?;
            }
        }
        Ok(Dropping {
            ns,
            flavour: gate.flavour,
            family,
        })
    }

    fn remove(self) -> anyhow::Result<()> {
        match self.flavour {
            Flavour::Iptables => {
                self.ns
                    .exec([iptables_program(self.family), "-D", "FORWARD", "1"])?
            }
            Flavour::Nftables => self.ns.exec(["nft", "delete table inet stranger"])?,
        };
        Ok(())
    }
}

/// A connection and datagrams that run while something is put in their way.
struct Running<'a> {
    pair: TcpPair,
    server: &'a UdpEnd,
    client: UdpEnd,
}

impl<'a> Running<'a> {
    fn start(gate: &Gate, tcp: &TcpServer, server: &'a UdpEnd) -> anyhow::Result<Running<'a>> {
        let mut pair = TcpPair::connect(gate.ns(A), tcp.address, &[tcp])?;
        gate.promote(&mut pair, &[0, 1])?;
        let client = gate.udp(A, 0);
        for _ in 0..5 {
            client.ask(server.address, &[server], 100)?;
        }
        Ok(Running {
            pair,
            server,
            client,
        })
    }

    /// Whether neither gets through any more.
    fn stopped(&mut self) -> anyhow::Result<()> {
        ensure!(
            !self.pair.arrives(Way::Up, ARRIVES)?,
            "TCP still gets through"
        );
        self.client.send(self.server.address, 0, 100)?;
        ensure!(!self.server.has_some(ARRIVES)?, "UDP still gets through");
        Ok(())
    }

    /// Both stop within `limit`, and stay so.
    fn stops(&mut self, limit: Duration) -> anyhow::Result<()> {
        try_eventually(limit, "the running flows stop", || self.stopped())?;
        for _ in 0..3 {
            self.stopped().context("some time later")?;
        }
        Ok(())
    }

    /// With nothing in the way any more both go on, and new ones come about.
    fn goes_on(mut self, gate: &Gate, tcp: &TcpServer) -> anyhow::Result<()> {
        try_eventually(Duration::from_secs(10), "all flows again", || {
            for way in [Way::Up, Way::Down] {
                ensure!(self.pair.arrives(way, ARRIVES)?, "nothing arrives {way:?}");
            }
            self.client.take_all()?;
            self.server.take_all()?;
            self.client
                .ask_within(ARRIVES, self.server.address, &[self.server], 10)
        })?;
        TcpPair::connect(gate.ns(A), tcp.address, &[tcp])?.exchange(1)
    }
}

/// New connections do not come about.
fn blocked(gate: &Gate, server: &TcpServer, udp: &UdpEnd) -> anyhow::Result<()> {
    let connect = TcpPair::connect_within(
        Duration::from_millis(300),
        gate.ns(A),
        0,
        server.address,
        &[server],
    );
    ensure!(connect.is_err(), "a new connection came about");
    let client = gate.udp(A, 0);
    client.send(udp.address, 0, 100)?;
    ensure!(!udp.has_some(ARRIVES)?, "a new datagram arrived");
    Ok(())
}

fn drop_rule(gate: &mut Gate) -> anyhow::Result<()> {
    let server = gate.serve(B);
    let udp = gate.udp(B, DNS);
    // Going back to mode `syn` takes the agent a while.
    let nodes = if gate.modes[0] == Mode::Syn {
        &[1][..]
    } else {
        &[0, 1]
    };
    for node in nodes.iter().copied() {
        let mut running = Running::start(gate, &server, &udp)?;
        let rule = Dropping::put(gate, node)?;
        let start = Instant::now();
        if gate.modes[node] == Mode::Syn {
            // It admits without asking anybody, until the agent sees that somebody wants to be asked.
            try_eventually(NOTICED, "new connections are blocked", || {
                blocked(gate, &server, &udp)
            })?;
        } else {
            blocked(gate, &server, &udp).context("at once")?;
        }
        let left = (NOTICED.max(LEASE) + ARRIVES * 2).saturating_sub(start.elapsed());
        running
            .stops(left)
            .with_context(|| format!("on node {node}"))?;
        rule.remove()?;
        running.goes_on(gate, &server)?;
        gate.wait_gate(node);
    }
    Ok(())
}

/// With agents that do not run the lease alone must do.
fn drop_rule_unnoticed(gate: &mut Gate) -> anyhow::Result<()> {
    if gate.modes[0] != Mode::Established {
        return Ok(());
    }
    let server = gate.serve(B);
    let udp = gate.udp(B, DNS);
    gate.kill_agents();
    let lease = Duration::from_millis(800);
    gate.set_lease(lease);
    for node in [0, 1] {
        let mut running = Running::start(gate, &server, &udp)?;
        let rule = Dropping::put(gate, node)?;
        blocked(gate, &server, &udp).context("at once")?;
        running
            .stops(lease + ARRIVES * 2)
            .with_context(|| format!("on node {node}"))?;
        rule.remove()?;
        running.goes_on(gate, &server)?;
    }
    gate.start_agents();
    Ok(())
}

/// It sees every packet that is forwarded, and lets pass what belongs to a known connection, until it changes its mind.
fn queue_agent(gate: &mut Gate) -> anyhow::Result<()> {
    // Its rule is the same beside either kind of rules, and the way back to `syn` is long.
    if (gate.modes[1], gate.flavour) == (Mode::Syn, Flavour::Nftables) {
        return Ok(());
    }
    let server = gate.serve(B);
    let udp = gate.udp(B, DNS);
    let ip = gate.ip(B).to_string();
    // nftables without this statement is common among kernels: the rule is made by iptables in either case.
    let rule = ["FORWARD", "-d", &ip, "-j", "NFQUEUE", "--queue-num", "7"];
    let agent = QueueAgent::start(gate.rig.ns(1), 7)?;
    let program = iptables_program(gate.family());
    gate.rig.ns(1).exec([program, "-I"].iter().chain(&rule))?;
    let mut pair = TcpPair::connect(gate.ns(A), server.address, &[&server])?;
    for _ in 0..5 {
        pair.exchange(100)?;
    }
    let mut through = TcpPair::connect(gate.ns(A), gate.vip(Vip::Remote), &[&server])?;
    through.exchange(100)?;
    let client = gate.udp(A, 0);
    for _ in 0..5 {
        client.ask(udp.address, &[&udp], 100)?;
    }
    ensure!(
        agent.judged() > 0 || gate.modes[1] == Mode::Syn,
        "it was never asked"
    );
    let mut running = Running {
        pair,
        server: &udp,
        client,
    };
    agent.set_accept(false);
    let start = Instant::now();
    if gate.modes[1] == Mode::Syn {
        try_eventually(NOTICED, "new connections are blocked", || {
            blocked(gate, &server, &udp)
        })?;
    } else {
        blocked(gate, &server, &udp).context("at once")?;
    }
    let left = (NOTICED.max(LEASE) + ARRIVES * 2).saturating_sub(start.elapsed());
    running.stops(left)?;
    gate.rig.ns(1).exec([program, "-D"].iter().chain(&rule))?;
    running.goes_on(gate, &server)?;
    try_eventually(Duration::from_secs(10), "the Service's goes on", || {
        for way in [Way::Up, Way::Down] {
            ensure!(through.arrives(way, ARRIVES)?, "nothing arrives {way:?}");
        }
        Ok(())
    })?;
    gate.wait_gate(1);
    Ok(())
}

/// Such a program overwrites the tag that the gate puts on packets.
fn foreign_programs(gate: &mut Gate) -> anyhow::Result<()> {
    let places = [
        (0, gate.pod(A).host_if.clone()),
        (1, gate.pod(B).host_if.clone()),
        (1, gate.rig.device()),
    ];
    for (node, device) in &places {
        let ns = gate.rig.ns(*node);
        // One may be there already, of the agent's.
        drop(ns.exec(["tc", "qdisc", "add", "dev", device, "clsact"]));
        for side in ["ingress", "egress"] {
            let words =
                format!("tc filter add dev {device} {side} pref 7 protocol all bpf da bytecode");
            let words: Vec<&str> = words.split_whitespace().chain(["1,6 0 0 0"]).collect();
            ns.exec(words)?;
        }
    }
    let server = gate.serve(B);
    let near = gate.serve(A2);
    let udp = gate.udp(B, DNS);
    for target in [server.address, near.address, gate.vip(Vip::Remote)] {
        let mut pair = TcpPair::connect(gate.ns(A), target, &[&server, &near])?;
        for bytes in [1, 1000, 60_000, 1] {
            pair.exchange(bytes)?;
        }
        pair.close()?;
    }
    let client = gate.udp(A, 0);
    for _ in 0..20 {
        client.ask(udp.address, &[&udp], 100)?;
        client.ask(gate.vip(Vip::RemoteUdp), &[&udp], 100)?;
    }
    for (node, device) in &places {
        let ns = gate.rig.ns(*node);
        for side in ["ingress", "egress"] {
            ns.exec(["tc", "filter", "del", "dev", device, side, "pref", "7"])?;
        }
    }
    Ok(())
}

/// Everything for a shaped pod goes through its queue, and no more than the queue lets.
fn shaping(gate: &mut Gate) -> anyhow::Result<()> {
    let device = gate.pod(B).host_if.clone();
    let node = gate.rig.ns(1);
    node.exec(
        format!("tc qdisc add dev {device} root tbf rate 400mbit burst 64kb latency 200ms")
            .split_whitespace(),
    )?;
    let queued = || -> anyhow::Result<u64> {
        let text = node.exec(["tc", "-s", "-j", "qdisc", "show", "dev", &device])?;
        let all: serde_json::Value = serde_json::from_str(&text)?;
        let tbf = rig::list(&all).iter().find(|qdisc| qdisc["kind"] == "tbf");
        tbf.and_then(|tbf| tbf["bytes"].as_u64())
            .with_context(|| format!("no tbf in {text}"))
    };
    let bytes = 4 << 20;
    for (from, what) in [(A, "another node"), (gate_rig::Who::B2, "the same node")] {
        let carried = |from: gate_rig::Who| -> anyhow::Result<u64> {
            let before = queued()?;
            traffic::tcp_transfer(gate.ns(B), gate.ip(B), gate.ns(from), Amount::Bytes(bytes))?;
            Ok(queued()? - before)
        };
        let shaped = try_eventually(NOTICED, "the agent leaves the pod to its queue", || {
            let through = carried(from)?;
            ensure!(
                through >= bytes,
                "{through} of {bytes} bytes from {what} went through the queue"
            );
            Ok::<_, anyhow::Error>(through)
        });
        shaped?;
    }
    let fast = gate.rig.status(1)["fast_path"].clone();
    let left = rig::list(&fast["excluded"]).iter();
    let mut names = left.map(|pod| pod["interface"].as_str().unwrap_or_default());
    ensure!(
        names.any(|name| name == device) || gate.modes[1] == Mode::Off,
        "{fast}"
    );
    node.exec(["tc", "qdisc", "del", "dev", &device, "root"])?;
    Ok(())
}
