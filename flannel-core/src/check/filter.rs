//! Rules of a packet filter, and the way of a packet through them.
//!
//! Rules are followed as a packet would meet them. What a rule asks of a packet that is not known here (marks, limits, sets) may or
//! may not hold: such a rule never proves anything, it only makes what comes after it unsure.

use std::collections::BTreeMap;

use ipnet::IpNet;

/// Where in the stack a base chain is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hook {
    Prerouting,
    Input,
    Forward,
}

/// A chain. Its rules refer to others of the same table.
#[derive(Clone, Debug)]
pub(super) struct Chain {
    /// For people: `iptables filter`, `nft inet firewalld`.
    pub(super) table: String,
    pub(super) name: String,
    /// A base chain's hook, and whether its policy is to drop.
    pub(super) base: Option<(Hook, bool)>,
    pub(super) rules: Vec<Rule>,
}

#[derive(Clone, Debug)]
pub(super) struct Rule {
    pub(super) tests: Vec<Test>,
    pub(super) action: Action,
    /// As listed.
    pub(super) text: String,
}

#[derive(Clone, Debug)]
pub(super) struct Test {
    pub(super) negated: bool,
    pub(super) of: Of,
}

/// What a rule asks of a packet.
#[derive(Clone, Debug)]
pub(super) enum Of {
    Protocol(Vec<String>),
    Port(Vec<(u16, u16)>),
    In(Vec<String>),
    Out(Vec<String>),
    Source(Vec<IpNet>),
    Destination(Vec<IpNet>),
    State(Vec<String>),
    DestinationType(String),
    /// Types of ICMPv6 messages.
    Icmp(Vec<u8>),
    HopLimit(u8),
    /// Something that holds for all packets of the family, or for none.
    Always(bool),
    Unknown,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Action {
    Accept,
    Drop,
    Jump(String),
    Goto(String),
    Return,
    Nothing,
}

/// What is in a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Payload {
    /// To this UDP port.
    Udp(u16),
    /// ICMPv6 of this type.
    Icmp(u8),
}

/// A packet, as far as it is known. `None` stands for what may be anything.
#[derive(Clone, Copy, Debug)]
pub(super) struct Packet<'a> {
    pub(super) payload: Option<Payload>,
    /// Interfaces.
    pub(super) input: Option<&'a str>,
    pub(super) output: Option<&'a str>,
    pub(super) source: Option<IpNet>,
    pub(super) destination: Option<IpNet>,
    /// What kind of address that is: `local`, `multicast`.
    pub(super) destination_type: Option<&'a str>,
    /// What connection tracking makes of it.
    pub(super) state: &'a str,
    pub(super) hop_limit: Option<u8>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Holds {
    No,
    Perhaps,
    Yes,
}

impl Test {
    fn holds(&self, packet: &Packet<'_>) -> Holds {
        let holds = match &self.of {
            Of::Protocol(names) => match packet.payload {
                Some(payload) => yes(names.iter().any(|name| payload.is_of(name))),
                None => Holds::Perhaps,
            },
            Of::Port(ranges) => match packet.payload {
                Some(Payload::Udp(port)) => yes(ranges
                    .iter()
                    .any(|(from, to)| (*from..=*to).contains(&port))),
                Some(Payload::Icmp(_)) => return Holds::No,
                None => Holds::Perhaps,
            },
            Of::Icmp(types) => match packet.payload {
                Some(Payload::Icmp(kind)) => yes(types.contains(&kind)),
                Some(Payload::Udp(_)) => return Holds::No,
                None => Holds::Perhaps,
            },
            Of::In(names) => interface(names, packet.input),
            Of::Out(names) => interface(names, packet.output),
            Of::Source(networks) => address(networks, packet.source),
            Of::Destination(networks) => address(networks, packet.destination),
            Of::State(states) => yes(states
                .iter()
                .any(|state| state.eq_ignore_ascii_case(packet.state))),
            Of::DestinationType(kind) => packet
                .destination_type
                .map_or(Holds::Perhaps, |is| yes(kind.eq_ignore_ascii_case(is))),
            Of::HopLimit(limit) => packet
                .hop_limit
                .map_or(Holds::Perhaps, |has| yes(has == *limit)),
            Of::Always(holds) => yes(*holds),
            Of::Unknown => Holds::Perhaps,
        };
        match (self.negated, holds) {
            (true, Holds::Yes) => Holds::No,
            (true, Holds::No) => Holds::Yes,
            (_, holds) => holds,
        }
    }
}

impl Payload {
    /// Whether its protocol has this name; the tools print a few.
    fn is_of(self, name: &str) -> bool {
        let names: &[&str] = match self {
            Self::Udp(_) => &["udp", "17", "all"],
            Self::Icmp(_) => &["ipv6-icmp", "icmpv6", "58", "all"],
        };
        names.contains(&name)
    }
}

const fn yes(is: bool) -> Holds {
    if is { Holds::Yes } else { Holds::No }
}

fn interface(names: &[String], actual: Option<&str>) -> Holds {
    let Some(actual) = actual else {
        return Holds::Perhaps;
    };
    yes(names
        .iter()
        .any(|name| match name.strip_suffix(['+', '*']) {
            Some(start) => actual.starts_with(start),
            None => name == actual,
        }))
}

fn address(networks: &[IpNet], actual: Option<IpNet>) -> Holds {
    if networks.iter().any(|network| network.prefix_len() == 0) {
        return Holds::Yes;
    }
    let Some(actual) = actual else {
        return Holds::Perhaps;
    };
    if networks.iter().any(|network| network.contains(&actual)) {
        Holds::Yes
    } else if networks.iter().any(|network| actual.contains(network)) {
        Holds::Perhaps
    } else {
        Holds::No
    }
}

/// What becomes of a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Fate {
    Accepted,
    /// By this rule.
    Dropped(String),
    /// It came to the chain's end.
    Through,
}

/// The way of a packet through the chains of a table.
struct Walk<'a> {
    chains: BTreeMap<&'a str, &'a Chain>,
    packet: &'a Packet<'a>,
    /// A rule before this one may have ended the walk.
    unsure: bool,
}

/// Chains may not be nested deeper than this (`NFT_JUMP_STACK_SIZE`).
const DEEPEST: usize = 16;

impl Walk<'_> {
    fn follow(&mut self, name: &str, depth: usize) -> Fate {
        let Some(chain) = self.chains.get(name).copied().filter(|_| depth < DEEPEST) else {
            return Fate::Through;
        };
        for rule in &chain.rules {
            let holds = rule
                .tests
                .iter()
                .map(|test| test.holds(self.packet))
                .min()
                .unwrap_or(Holds::Yes);
            if holds == Holds::No {
                continue;
            }
            let fate = match &rule.action {
                Action::Nothing => continue,
                Action::Accept => Fate::Accepted,
                Action::Drop => {
                    Fate::Dropped(format!("{} {}: {}", chain.table, chain.name, rule.text))
                }
                Action::Return if holds == Holds::Yes => return Fate::Through,
                Action::Return => {
                    self.unsure = true;
                    continue;
                }
                Action::Jump(target) => self.follow(target, depth + 1),
                Action::Goto(target) => match self.follow(target, depth + 1) {
                    Fate::Through if holds == Holds::Yes => return Fate::Through,
                    fate => fate,
                },
            };
            match (fate, holds) {
                (Fate::Through, _) => {}
                (fate, Holds::Yes) => return fate,
                (Fate::Accepted, _) => self.unsure = true,
                // What may be dropped, by a limit or a mark, is no fault yet.
                (Fate::Dropped(_), _) => {}
            }
        }
        Fate::Through
    }
}

/// What drops a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Obstacle {
    pub(super) what: String,
    /// Whether it is a chain's policy: an accepting rule anywhere in the chain would do.
    pub(super) policy: bool,
    /// Whether a rule that asks for something unknown may accept the packet first.
    pub(super) unsure: bool,
}

pub(super) fn obstacle(chains: &[Chain], hooks: &[Hook], packet: &Packet<'_>) -> Option<Obstacle> {
    let mut found: Option<Obstacle> = None;
    for chain in chains {
        let Some((hook, drops)) = chain.base else {
            continue;
        };
        if !hooks.contains(&hook) {
            continue;
        }
        let mut walk = Walk {
            chains: chains
                .iter()
                .filter(|other| other.table == chain.table)
                .map(|other| (other.name.as_str(), other))
                .collect(),
            packet,
            unsure: false,
        };
        let fate = walk.follow(&chain.name, 0);
        let (what, policy) = match fate {
            Fate::Dropped(rule) => (rule, false),
            Fate::Through if drops => {
                (format!("{} {}: policy DROP", chain.table, chain.name), true)
            }
            Fate::Accepted | Fate::Through => continue,
        };
        let obstacle = Obstacle {
            what,
            policy,
            unsure: walk.unsure,
        };
        if !obstacle.unsure {
            return Some(obstacle);
        }
        found.get_or_insert(obstacle);
    }
    found
}
