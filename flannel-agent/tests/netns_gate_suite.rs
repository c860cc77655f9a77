//! Everything that pods, nodes and clients do with each other, in every mode of the flow gate and with both kinds of rules:
//! nothing fails, and nothing is dropped as invalid.

mod gate_rig;
mod rig;

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use flannel_common::flow::mode;
use flannel_testkit::{
    Family, Netns, privileged,
    services::Flavour,
    traffic::{self, TcpPair, TcpServer, UdpEnd},
};
use gate_rig::{
    DNS, Extra, Fast, Gate, HOST_PORT, LOCAL_NODE_PORT, MAPPED, Mode, NODE_PORT, Vip,
    Who::{self, A, A2, B, B2, C},
};

/// How long one echo may take.
const ECHO: Duration = Duration::from_secs(2);

/// A client's port that the kernel chooses for no other socket. A port that a question to a Service had shortly before is another
/// one behind the stack: connection tracking tells the two flows to one backend apart by it (`nf_nat_alloc_null_binding`).
const OWN_PORT: u16 = 20_053;

/// Everything of one lab that answers.
struct Suite<'a> {
    gate: &'a Gate,
    servers: Vec<(Who, TcpServer)>,
    mapped: TcpServer,
    names: Vec<(Who, UdpEnd)>,
}

/// Which of the cases failed, and how.
type Failures = Vec<String>;

impl<'a> Suite<'a> {
    fn new(gate: &'a Gate) -> Suite<'a> {
        Suite {
            gate,
            servers: Who::ALL.map(|who| (who, gate.serve(who))).into(),
            mapped: gate.serve_at(B, MAPPED),
            names: Who::ALL.map(|who| (who, gate.udp(who, DNS))).into(),
        }
    }

    fn all(&self) -> Vec<&TcpServer> {
        self.servers.iter().map(|(_, server)| server).collect()
    }

    fn server(&self, who: Who) -> &TcpServer {
        let found = self.servers.iter().find(|(name, _)| *name == who);
        &found.expect("a server").1
    }

    fn name_server(&self, who: Who) -> &UdpEnd {
        let found = self.names.iter().find(|(name, _)| *name == who);
        &found.expect("a name server").1
    }

    /// Connects, talks for a while and closes. Gives who answered, and the client's address as the server saw it.
    fn talk(&self, from: &Netns, to: SocketAddr) -> anyhow::Result<(Who, SocketAddr)> {
        let mut pair = TcpPair::connect(from, to, &self.all())?;
        converse(&mut pair)?;
        let seen = (self.servers[pair.by].0, pair.seen);
        pair.close()?;
        Ok(seen)
    }

    /// Like [`Suite::talk`], answered by `by`.
    fn reach(&self, from: &Netns, to: SocketAddr, by: Who) -> anyhow::Result<SocketAddr> {
        let (who, seen) = self.talk(from, to)?;
        anyhow::ensure!(who == by, "{to} was answered by {who:?} instead of {by:?}");
        Ok(seen)
    }

    fn run(&self) -> Failures {
        let mut failures = Failures::new();
        for (name, case) in CASES {
            eprintln!("    {name}");
            if let Err(error) = case(self) {
                failures.push(format!("{name}: {error:#}"));
            }
        }
        failures
    }
}

/// Small messages to and fro, enough of them to be admitted by the gate and then some.
fn converse(pair: &mut TcpPair) -> anyhow::Result<()> {
    for bytes in [1, 100, 1400, 3000, 200, 1] {
        pair.exchange(bytes)?;
    }
    Ok(())
}

/// A case of the suite.
type Case = fn(&Suite<'_>) -> anyhow::Result<()>;

const CASES: &[(&str, Case)] = &[
    ("pods of two nodes, TCP", |suite| {
        let gate = suite.gate;
        for to in [B, C] {
            let seen = suite.reach(gate.ns(A), suite.server(to).address, to)?;
            same(seen.ip(), gate.ip(A))?;
        }
        Ok(())
    }),
    ("pods of one node, TCP", |suite| {
        let gate = suite.gate;
        let seen = suite.reach(gate.ns(A), suite.server(A2).address, A2)?;
        same(seen.ip(), gate.ip(A))?;
        suite.reach(gate.ns(A2), suite.server(A).address, A)?;
        Ok(())
    }),
    ("messages of 60 kB", |suite| {
        for to in [B, A2] {
            let server = suite.server(to);
            let mut pair = TcpPair::connect(suite.gate.ns(A), server.address, &[server])?;
            for _ in 0..20 {
                pair.exchange(60_000)?;
            }
            pair.close()?;
        }
        Ok(())
    }),
    ("UDP", |suite| {
        for to in [B, A2] {
            let server = suite.name_server(to);
            let client = suite.gate.udp(A, OWN_PORT);
            for bytes in [1, 100, 1400, 1422, 64] {
                let (_, seen) = client.ask(server.address, &[server], bytes)?;
                anyhow::ensure!(seen == client.address, "seen as {seen}");
            }
        }
        Ok(())
    }),
    ("ICMP echo", |suite| {
        for to in [B, A2, C] {
            let (ns, ip) = (suite.gate.ns(A), suite.gate.ip(to));
            let stats = traffic::ping(ns, ip, 20, Duration::from_millis(2))?;
            anyhow::ensure!(
                stats.lost == 0 && stats.duplicates == 0,
                "{to:?}: {stats:?}"
            );
        }
        Ok(())
    }),
    ("node to remote pod", |suite| {
        let node = suite.gate.rig.ns(0);
        traffic::ping_once(node, suite.gate.ip(B), ECHO)?;
        suite.reach(node, suite.server(B).address, B)?;
        Ok(())
    }),
    ("node to its own pod", |suite| {
        let node = suite.gate.rig.ns(0);
        traffic::ping_once(node, suite.gate.ip(A), ECHO)?;
        suite.reach(node, suite.server(A).address, A)?;
        Ok(())
    }),
    ("pod to its own node and to others", |suite| {
        let gate = suite.gate;
        for node in 0..3 {
            let subnet = gate.subnet(node);
            let mut addresses = vec![gate.node_ip(node), subnet.gateway()];
            // Of IPv6 it is any router's of the pods' link too, and those answer by another address (RFC 4443, 2.2).
            if gate.family() == Family::V4 {
                addresses.push(subnet.host(0));
            }
            for ip in addresses {
                traffic::ping_once(gate.ns(A), ip, ECHO)?;
                let server = TcpServer::listen(gate.rig.ns(node), ip, 0)?;
                let mut pair = TcpPair::connect(gate.ns(A), server.address, &[&server])?;
                converse(&mut pair)?;
                pair.close()?;
            }
        }
        Ok(())
    }),
    (
        "pod to a remote node's tunnel address, translated there",
        |suite| mapped_port(suite, suite.gate.tunnel_ip(1)),
    ),
    (
        "pod to a remote node's bridge address, translated there",
        |suite| mapped_port(suite, suite.gate.subnet(1).gateway()),
    ),
    ("host port from outside", |suite| {
        let gate = suite.gate;
        let to = SocketAddr::new(gate.node_ip(1), HOST_PORT);
        for from in [&gate.outside, gate.ns(A), gate.ns(B2), gate.rig.ns(2)] {
            let mut pair = TcpPair::connect(from, to, &[&suite.mapped])?;
            converse(&mut pair)?;
            pair.close()?;
        }
        Ok(())
    }),
    ("cluster IP of a remote backend", |suite| {
        let seen = suite.reach(suite.gate.ns(A), suite.gate.vip(Vip::Remote), B)?;
        same(seen.ip(), suite.gate.ip(A))
    }),
    ("cluster IP of a backend on the same node", |suite| {
        let seen = suite.reach(suite.gate.ns(A), suite.gate.vip(Vip::Local), A2)?;
        same(seen.ip(), suite.gate.ip(A))
    }),
    ("cluster IP of the client itself", |suite| {
        let seen = suite.reach(suite.gate.ns(A), suite.gate.vip(Vip::Own), A)?;
        anyhow::ensure!(seen.ip() != suite.gate.ip(A), "not masqueraded");
        Ok(())
    }),
    ("cluster IP of any backend, 30 times", |suite| {
        let mut answered = Vec::new();
        for _ in 0..30 {
            answered.push(suite.talk(suite.gate.ns(A), suite.gate.vip(Vip::Random))?.0);
        }
        for who in [A2, B, C] {
            anyhow::ensure!(answered.contains(&who), "{who:?} is not among {answered:?}");
        }
        Ok(())
    }),
    ("node to cluster IP", |suite| {
        for node in 0..3 {
            suite.reach(suite.gate.rig.ns(node), suite.gate.vip(Vip::Remote), B)?;
        }
        Ok(())
    }),
    ("node port through a third node", |suite| {
        suite.reach(&suite.gate.outside, node_port(suite, 2), B)?;
        Ok(())
    }),
    ("node port through the backend's node", |suite| {
        suite.reach(&suite.gate.outside, node_port(suite, 1), B)?;
        suite.reach(suite.gate.ns(B2), node_port(suite, 1), B)?;
        Ok(())
    }),
    ("node port from a pod through a third node", |suite| {
        suite.reach(suite.gate.ns(A), node_port(suite, 2), B)?;
        let to = SocketAddr::new(suite.gate.tunnel_ip(2), NODE_PORT);
        suite.reach(suite.gate.ns(A), to, B)?;
        Ok(())
    }),
    ("local node port from outside", |suite| {
        let to = SocketAddr::new(suite.gate.node_ip(1), LOCAL_NODE_PORT);
        let seen = suite.reach(&suite.gate.outside, to, B)?;
        same(seen.ip(), suite.gate.outside_ip())
    }),
    (
        "local node port from a pod, whose address is kept",
        |suite| {
            let to = SocketAddr::new(suite.gate.tunnel_ip(1), LOCAL_NODE_PORT);
            for _ in 0..21 {
                let seen = suite.reach(suite.gate.ns(A), to, B)?;
                same(seen.ip(), suite.gate.ip(A))?;
            }
            Ok(())
        },
    ),
    ("session affinity", |suite| {
        for from in [A, B2] {
            let (first, _) = suite.talk(suite.gate.ns(from), suite.gate.vip(Vip::Sticky))?;
            for _ in 0..8 {
                suite.reach(suite.gate.ns(from), suite.gate.vip(Vip::Sticky), first)?;
            }
        }
        Ok(())
    }),
    ("40 questions to a cluster IP over UDP", |suite| {
        let servers: Vec<&UdpEnd> = suite.names.iter().map(|(_, end)| end).collect();
        for _ in 0..40 {
            let client = suite.gate.udp(A, 0);
            client.ask(suite.gate.vip(Vip::Dns), &servers, 60)?;
            client.ask(suite.gate.vip(Vip::Dns), &servers, 400)?;
        }
        Ok(())
    }),
    ("fragmented UDP", |suite| {
        let server = suite.name_server(B);
        let client = suite.gate.udp(A, 0);
        for bytes in [4000, 100, 4000, 30_000, 100] {
            client.ask(server.address, &[server], bytes)?;
        }
        Ok(())
    }),
    ("fragmented ICMP", |suite| {
        for to in [B, A2] {
            traffic::ping_sized(suite.gate.ns(A), suite.gate.ip(to), 3000, false, ECHO)?;
        }
        Ok(())
    }),
];

fn mapped_port(suite: &Suite<'_>, ip: IpAddr) -> anyhow::Result<()> {
    let to = SocketAddr::new(ip, HOST_PORT);
    for _ in 0..3 {
        let mut pair = TcpPair::connect(suite.gate.ns(A), to, &[&suite.mapped])?;
        converse(&mut pair)?;
        same(pair.seen.ip(), suite.gate.ip(A))?;
        pair.close()?;
    }
    Ok(())
}

fn node_port(suite: &Suite<'_>, node: usize) -> SocketAddr {
    SocketAddr::new(suite.gate.node_ip(node), NODE_PORT)
}

fn same(have: IpAddr, want: IpAddr) -> anyhow::Result<()> {
    anyhow::ensure!(have == want, "seen as {have} instead of {want}");
    Ok(())
}

/// Two rounds, the second with what the first has left in the tables.
#[track_caller]
fn holds(gate: &Gate) {
    let suite = Suite::new(gate);
    for round in 0..2 {
        let failures = suite.run();
        assert!(
            failures.is_empty(),
            "{:?}, {:?}, round {round}: {failures:#?}",
            gate.modes,
            gate.flavour
        );
        gate.assert_no_invalid("after the suite");
    }
}

fn suite(mode: Mode, flavour: Flavour, family: Family) {
    if !privileged() {
        return;
    }
    let extra = Extra {
        family,
        ..Extra::default()
    };
    let gate = Gate::with([mode; 3], flavour, extra);
    gate.clear_nattuples();
    holds(&gate);
    for node in 0..3 {
        let fast = gate.fast(node);
        match mode {
            Mode::Off => assert_eq!(fast, Fast::default(), "node {node}"),
            Mode::Established | Mode::Auto => assert_eq!(fast.admitted, 0, "node {node}: {fast:?}"),
            Mode::Syn => assert!(fast.admitted > 0, "node {node}: {fast:?}"),
        }
        if mode != Mode::Off {
            assert!(fast.encap > 20 && fast.decap > 20, "node {node}: {fast:?}");
            assert!(fast.refuted > 0 || node == 2, "node {node}: {fast:?}");
        }
    }
    if mode != Mode::Off {
        let fast = gate.fast(0);
        assert!(fast.local > 20, "{fast:?}");
    }
}

#[test]
fn off_with_iptables() {
    suite(Mode::Off, Flavour::Iptables, Family::V4);
}

#[test]
fn off_with_nftables() {
    suite(Mode::Off, Flavour::Nftables, Family::V4);
}

#[test]
fn established_with_iptables() {
    suite(Mode::Established, Flavour::Iptables, Family::V4);
}

#[test]
fn established_with_nftables() {
    suite(Mode::Established, Flavour::Nftables, Family::V4);
}

#[test]
fn syn_with_iptables() {
    suite(Mode::Syn, Flavour::Iptables, Family::V4);
}

#[test]
fn syn_with_nftables() {
    suite(Mode::Syn, Flavour::Nftables, Family::V4);
}

#[test]
fn syn_with_iptables_over_ipv6() {
    suite(Mode::Syn, Flavour::Iptables, Family::V6);
}

fn mixed(modes: [Mode; 3], flavour: Flavour) {
    if !privileged() {
        return;
    }
    let gate = Gate::mixed(modes, flavour);
    gate.clear_nattuples();
    holds(&gate);
}

/// Nodes decide each for itself.
#[test]
fn nodes_in_different_modes() {
    use Mode::{Established, Off, Syn};
    mixed([Established, Off, Syn], Flavour::Iptables);
    mixed([Syn, Established, Off], Flavour::Nftables);
    mixed([Off, Syn, Established], Flavour::Iptables);
}

/// With flannel's own masquerade rules, as most clusters have them. Forwarded node ports that lead to another node's pod then have the
/// address of the node's tunnel device, whoever masquerades.
fn masquerading(mode: Mode, flavour: Flavour, family: Family) {
    if !privileged() {
        return;
    }
    let extra = Extra {
        flags: &["--ip-masq"],
        family,
        ..Extra::default()
    };
    let gate = Gate::with([mode; 3], flavour, extra);
    holds(&gate);
    let fast = gate.fast(0);
    assert_eq!(fast.all() > 20, mode == Mode::Auto, "{fast:?}");
}

#[test]
fn nodes_that_masquerade() {
    masquerading(Mode::Off, Flavour::Iptables, Family::V4);
    masquerading(Mode::Auto, Flavour::Iptables, Family::V4);
    masquerading(Mode::Auto, Flavour::Nftables, Family::V4);
}

#[test]
fn nodes_that_masquerade_over_ipv6() {
    masquerading(Mode::Auto, Flavour::Nftables, Family::V6);
}

/// Without the gate everything that is translated behind the bypass fails: the suite sees it.
#[test]
fn without_the_gate_the_suite_fails() {
    if !privileged() {
        return;
    }
    for flavour in Flavour::ALL {
        let mut gate = Gate::start(Mode::Established, flavour);
        for node in 0..3 {
            gate.rig.kill_agent(node);
            gate.force_mode(node, mode::UNGATED);
        }
        let suite = Suite::new(&gate);
        // Each takes until its patience ends.
        let must_fail = [
            "cluster IP of a remote backend",
            "cluster IP of any backend, 30 times",
            "40 questions to a cluster IP over UDP",
            "pod to a remote node's tunnel address, translated there",
            "pod to a remote node's bridge address, translated there",
            "local node port from a pod, whose address is kept",
        ];
        for (name, case) in CASES {
            // The bypass is the same under both kinds of rules.
            let enough = flavour == Flavour::Iptables || name.starts_with("cluster IP of a remote");
            if must_fail.contains(name) && enough {
                let outcome = case(&suite);
                assert!(
                    outcome.is_err(),
                    "{flavour:?}: {name} works without the gate"
                );
            }
        }
        let plain = CASES[0].1(&suite);
        plain.unwrap_or_else(|error| panic!("{flavour:?}: pods of two nodes: {error:#}"));
    }
}
