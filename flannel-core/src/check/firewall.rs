//! Whether the packet filter lets overlay packets in and pods' packets through.
//!
//! Rules are followed as a packet would meet them. What a rule asks of a packet that is not known here (marks, limits, sets) may or
//! may not hold: such a rule never proves anything, it only makes what comes after it unsure.

use std::{collections::BTreeMap, net::IpAddr};

use ipnet::Ipv4Net;

use super::{
    Finding, Observations, iptables,
    network::{v4, v4_net},
    nft,
};
use crate::{addr::Family, config::BackendKind};

const NOT_FOLLOWED: &str =
    "rules for IPv6 are not followed here: see ip6tables-save and nft list ruleset";

/// The packet filter's rules, as the tools list them.
#[derive(Clone, Debug, Default)]
pub struct Rules {
    /// `iptables-save` of the legacy tables.
    pub legacy: Option<String>,
    /// `iptables-save` of the tables in nftables.
    pub compat: Option<String>,
    /// `nft -j list ruleset`.
    pub nft: Option<String>,
    /// What could not be listed, one line each.
    pub unreadable: Vec<String>,
    /// `ufw`, `firewalld`: those that are active.
    pub managers: Vec<&'static str>,
}

impl Rules {
    /// Whether kube-proxy works with iptables here.
    pub fn has_kube_proxy(&self) -> bool {
        self.legacy
            .iter()
            .chain(&self.compat)
            .any(|text| text.lines().any(|line| line.starts_with(":KUBE-SERVICES ")))
    }

    fn chains(&self) -> Vec<Chain> {
        let mut chains = Vec::new();
        if let Some(text) = &self.legacy {
            chains.extend(iptables::parse(text, "iptables-legacy"));
        }
        if let Some(text) = &self.compat {
            chains.extend(iptables::parse(text, "iptables"));
        }
        if let Some(text) = &self.nft {
            chains.extend(nft::parse(text, self.compat.is_some()));
        }
        chains
    }
}

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
    Source(Vec<Ipv4Net>),
    Destination(Vec<Ipv4Net>),
    State(Vec<String>),
    DestinationType(String),
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

/// The first packet of something new.
struct Packet<'a> {
    /// UDP port, or `None` where protocol and port may be any.
    udp: Option<u16>,
    /// `None` where it may be any.
    input: Option<&'a str>,
    output: Option<&'a str>,
    source: Option<Ipv4Net>,
    destination: Option<Ipv4Net>,
    /// Whether it is for this host.
    local: bool,
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
            Of::Protocol(names) => match packet.udp {
                Some(_) => yes(names
                    .iter()
                    .any(|name| matches!(name.as_str(), "udp" | "17" | "all"))),
                None => Holds::Perhaps,
            },
            Of::Port(ranges) => match packet.udp {
                Some(port) => yes(ranges
                    .iter()
                    .any(|(from, to)| (*from..=*to).contains(&port))),
                None => Holds::Perhaps,
            },
            Of::In(names) => interface(names, packet.input),
            Of::Out(names) => interface(names, packet.output),
            Of::Source(networks) => address(networks, packet.source),
            Of::Destination(networks) => address(networks, packet.destination),
            Of::State(states) => yes(states.iter().any(|state| state.eq_ignore_ascii_case("new"))),
            Of::DestinationType(kind) if packet.local => yes(kind.eq_ignore_ascii_case("local")),
            Of::DestinationType(_) | Of::Unknown => Holds::Perhaps,
        };
        match (self.negated, holds) {
            (true, Holds::Yes) => Holds::No,
            (true, Holds::No) => Holds::Yes,
            (_, holds) => holds,
        }
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

fn address(networks: &[Ipv4Net], actual: Option<Ipv4Net>) -> Holds {
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
struct Obstacle {
    what: String,
    /// Whether it is a chain's policy: an accepting rule anywhere in the chain would do.
    policy: bool,
    /// Whether a rule that asks for something unknown may accept the packet first.
    unsure: bool,
}

fn obstacle(chains: &[Chain], hooks: &[Hook], packet: &Packet<'_>) -> Option<Obstacle> {
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

pub(super) fn judge(seen: &Observations) -> Vec<Finding> {
    let chains = seen.rules.chains();
    vec![input(seen, &chains), forward(seen, &chains)]
}

fn unlisted(name: &'static str, rules: &Rules) -> Option<Finding> {
    let error = rules.unreadable.first()?;
    Some(Finding::warn(
        name,
        error.clone(),
        "install nft and iptables, or look yourself",
    ))
}

fn named(rules: &Rules) -> String {
    if rules.managers.is_empty() {
        String::new()
    } else {
        format!(" ({} is active)", rules.managers.join(" and "))
    }
}

fn input(seen: &Observations, chains: &[Chain]) -> Finding {
    const NAME: &str = "firewall-input";
    match seen.backend() {
        BackendKind::Vxlan | BackendKind::Wireguard => {}
        BackendKind::HostGw | BackendKind::Alloc => {
            return Finding::skip(NAME, "the backend uses no UDP port");
        }
    }
    if seen.overlay.family == Family::V6 {
        return Finding::skip(NAME, NOT_FOLLOWED);
    }
    let port = seen.port();
    let uplink = seen.network.uplink();
    let peer = super::peers::targets(seen).keys().next().copied();
    let packet = Packet {
        udp: Some(port),
        input: uplink.map(|uplink| uplink.name.as_str()),
        output: None,
        source: peer.and_then(v4),
        destination: uplink
            .and_then(crate::iface::Uplink::local_v4)
            .map(Ipv4Net::from),
        local: true,
    };
    let Some(obstacle) = obstacle(chains, &[Hook::Prerouting, Hook::Input], &packet) else {
        return unlisted(NAME, &seen.rules)
            .unwrap_or_else(|| Finding::ok(NAME, format!("no rule keeps UDP port {port} out")));
    };
    let fix = accept_port(&seen.rules, port, &obstacle);
    let managers = named(&seen.rules);
    if obstacle.unsure {
        Finding::warn(
            NAME,
            format!("may keep UDP port {port} out{managers}: {}", obstacle.what),
            fix,
        )
    } else {
        Finding::fail(
            NAME,
            format!("keeps UDP port {port} out{managers}: {}", obstacle.what),
            fix,
        )
    }
}

fn accept_port(rules: &Rules, port: u16, obstacle: &Obstacle) -> String {
    if rules.managers.contains(&"firewalld") {
        format!("firewall-cmd --permanent --add-port={port}/udp && firewall-cmd --reload")
    } else if rules.managers.contains(&"ufw") {
        format!("ufw allow {port}/udp")
    } else if let Some(nft) = nft_place(&obstacle.what) {
        format!("nft insert rule {nft} udp dport {port} accept")
    } else {
        format!("iptables -I INPUT -p udp --dport {port} -j ACCEPT")
    }
}

/// `inet t input` of `nft inet t input: …`.
fn nft_place(what: &str) -> Option<&str> {
    what.strip_prefix("nft ")?
        .split_once(": ")
        .map(|(place, _)| place)
}

fn forward(seen: &Observations, chains: &[Chain]) -> Finding {
    const NAME: &str = "firewall-forward";
    if seen.overlay.family == Family::V6 {
        return Finding::skip(NAME, NOT_FOLLOWED);
    }
    let network = seen
        .store
        .conf()
        .and_then(|conf| conf.ipv4)
        .map(|family| family.network)
        .or_else(|| v4_net(seen.overlay.subnet_file.as_ref()?.network?));
    let Some(network) = network else {
        return Finding::skip(NAME, "the network of the pods is unknown");
    };
    let subnet = seen
        .store
        .own(seen)
        .and_then(|(key, _)| key.v4)
        .or_else(|| v4_net(seen.overlay.subnet_file.as_ref()?.subnet?));
    let encrypted = seen.overlay.encrypted.first();
    let tunnel = match (seen.backend(), seen.network.uplink()) {
        // Pods' packets come and go by the uplink itself.
        (BackendKind::HostGw | BackendKind::Alloc, Some(uplink)) => uplink.name.as_str(),
        _ => encrypted.map_or(seen.overlay.name.as_str(), |device| device.name.as_str()),
    };
    let bridge = seen
        .overlay
        .bridge
        .as_ref()
        .map_or("cni0", |bridge| bridge.name.as_str());
    let base = |peer: &IpAddr| Ipv4Net::new(v4(*peer)?.addr(), subnet?.prefix_len()).ok();
    let remote = super::peers::targets(seen)
        .values()
        .next()
        .and_then(base)
        .or(Some(network));
    let own = subnet.or(Some(network));
    let ways = [
        ("to", tunnel, bridge, remote, own),
        ("from", bridge, tunnel, own, remote),
    ];
    let mut found = None;
    for (way, input, output, source, destination) in ways {
        let packet = Packet {
            udp: None,
            input: Some(input),
            output: Some(output),
            source,
            destination,
            local: false,
        };
        if let Some(obstacle) = obstacle(chains, &[Hook::Prerouting, Hook::Forward], &packet) {
            let is_sure = !obstacle.unsure;
            found = Some((way, obstacle));
            if is_sure {
                break;
            }
        }
    }
    let Some((way, obstacle)) = found else {
        return unlisted(NAME, &seen.rules).unwrap_or_else(|| {
            Finding::ok(
                NAME,
                format!("no rule keeps packets of {network} from being forwarded"),
            )
        });
    };
    let managers = named(&seen.rules);
    let fix = if let Some(place) = nft_place(&obstacle.what) {
        format!(
            "nft insert rule {place} ip daddr {network} accept; nft insert rule {place} ip saddr {network} accept"
        )
    } else {
        let chain = if chains.iter().any(|chain| chain.name == "DOCKER-USER") {
            "DOCKER-USER"
        } else {
            "FORWARD"
        };
        format!(
            "iptables -I {chain} -d {network} -j ACCEPT && iptables -I {chain} -s {network} -j ACCEPT"
        )
    };
    let what = format!("packets {way} pods{managers}: {}", obstacle.what);
    if obstacle.policy && !seen.agent.known {
        Finding::warn(
            NAME,
            format!("drops {what}"),
            format!("the agent's own rules let them pass (--iptables-forward-rules); else {fix}"),
        )
    } else if obstacle.unsure {
        Finding::warn(NAME, format!("may drop {what}"), fix)
    } else {
        Finding::fail(NAME, format!("drops {what}"), fix)
    }
}
