//! What a node's packet filter does to traffic between pods, from chains and rules in a form that iptables and nftables share.
//!
//! Only packets of one address family from a pod to a pod count, as they pass the host: rules that name other devices, other networks
//! or the other family cannot match them,
//! and chains that are reached through such rules only are not reached. Everything else counts, whoever wrote it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;

use super::digest::Digest;

/// Where pods are: which networks and devices their packets can be matched by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The cluster network. It says which family is judged, and that the rules are to have been read for.
    pub network: IpNet,
    /// Devices that packets between pods pass as inner packets: the tunnel device, the bridges of the pods, their veths.
    pub devices: BTreeSet<String>,
    /// The node's own addresses, which no pod has: those of the tunnel device and of bridges are in the cluster network.
    pub own: BTreeSet<IpAddr>,
    /// The uplink, which sees outer packets only.
    pub uplink: String,
}

/// The chains of one node, read for one address family.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Firewall {
    /// Every chain of every table.
    pub chains: Vec<Chain>,
}

/// One chain with its rules in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chain {
    /// The table, as messages name it: `iptables table filter`, `nft table inet fw`.
    pub table: String,
    /// The chain's name.
    pub name: String,
    /// Where the kernel calls it; `None` for one that only rules jump to.
    pub base: Option<Base>,
    /// Whose it is.
    pub owner: Owner,
    /// The rules.
    pub rules: Vec<Rule>,
}

/// Where and how the kernel calls a chain.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Base {
    /// Whether packets between pods come by.
    pub in_path: bool,
    /// The one device it is called for.
    pub device: Option<String>,
    /// Whether it sees only the first packet of a connection, as address translation does.
    pub nat: bool,
    /// Whether a packet that no rule decides about is dropped.
    pub drops: bool,
}

/// Whose a chain is, by its name or its table's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Owner {
    /// Of flannel, kube-proxy or the CNI plugin for host ports: they let packets between pods through.
    Known,
    /// Of an agent that enforces policies on pods.
    Agent(&'static str),
    /// Anybody's.
    #[default]
    Foreign,
}

/// One rule.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rule {
    /// The rule for people, and for the digest: without counters.
    pub text: String,
    /// What packets it can match.
    pub scope: Scope,
    /// What it does beside jumping.
    pub statements: Vec<Statement>,
    /// Chains of the same table that it may jump to.
    pub jumps: Vec<Jump>,
    /// What its conditions are on.
    pub conditions: Conditions,
    /// Whether it cannot match a packet of an established connection.
    pub new_only: bool,
    /// Whether it lets every packet of an established connection through.
    pub accepts_established: bool,
}

/// What a rule asks of a packet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Conditions {
    /// Nothing.
    #[default]
    None,
    /// The state of its connection.
    State,
    /// Its addresses.
    Address,
    /// Anything else, or several of these.
    Other,
}

impl Conditions {
    /// One more condition.
    pub(super) fn and(&mut self, more: Self) {
        *self = match (*self, more) {
            (Self::None, one) | (one, Self::None) => one,
            (one, other) if one == other => one,
            _ => Self::Other,
        };
    }

    /// Whether only the connection's state counts.
    pub(super) fn only_state(self) -> bool {
        matches!(self, Self::None | Self::State)
    }
}

/// A chain that a rule leads to, for some packets.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Jump {
    /// The chain.
    pub target: String,
    /// What packets go there, beside what the rule itself asks.
    pub scope: Scope,
}

impl Jump {
    /// For every packet that the rule matches.
    pub fn to(target: String) -> Self {
        Self {
            target,
            scope: Scope::default(),
        }
    }
}

/// One thing a rule does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Statement {
    /// Ends the packet.
    Drop,
    /// Lets the packet through.
    Accept,
    /// Sets a mark on packet or connection.
    Mark(String),
    /// Counts by name, for somebody who reads the count.
    Account(String),
    /// Does something to, or with, every single packet.
    PerPacket(String),
    /// Hands the packet to a program.
    Queue,
    /// Translates the destination.
    TranslateDestination,
    /// Translates the source.
    TranslateSource,
    /// Anything else that a packet going around the stack would miss, and that the first packet of a connection does not.
    Other(String),
}

/// What packets a rule can match, as far as devices and addresses tell.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scope {
    /// Conditions on the device a packet came from or leaves by.
    pub devices: Vec<DeviceMatch>,
    /// Conditions on an address.
    pub networks: Vec<NetworkMatch>,
    /// Never a packet between pods of the family that the rules were read for: of the other alone, or addressed to the node itself.
    pub elsewhere: bool,
}

/// A condition on a device's name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceMatch {
    /// Names; one that ends in `*` stands for all that begin so.
    pub names: Vec<String>,
    /// Whether it must be none of them.
    pub negated: bool,
}

/// A condition on an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkMatch {
    /// The networks.
    pub networks: Vec<IpNet>,
    /// Whether it must be in none of them.
    pub negated: bool,
}

/// What the rules of a node mean for the flow gate. Each list has one line per finding, without repetitions.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Judgement {
    /// Would miss packets of established connections.
    pub per_packet: Vec<String>,
    /// Would miss whole connections, were they admitted by their first packet.
    pub filters: Vec<String>,
    /// Digest of the rules of others that packets between pods meet.
    pub digest: u64,
}

impl Scope {
    fn meets(&self, place: &Place) -> bool {
        !self.elsewhere
            && self.devices.iter().all(|wanted| wanted.meets(place))
            && self.networks.iter().all(|wanted| wanted.meets(place))
    }
}

impl DeviceMatch {
    fn meets(&self, place: &Place) -> bool {
        place
            .devices
            .iter()
            .any(|device| self.names.iter().any(|name| is_named(device, name)) != self.negated)
    }
}

impl NetworkMatch {
    fn meets(&self, place: &Place) -> bool {
        let network = &place.network;
        if self.negated {
            return !self.networks.iter().any(|net| net.contains(network));
        }
        self.networks.iter().any(|net| {
            let own = net.prefix_len() == net.max_prefix_len() && place.own.contains(&net.addr());
            !own && (net.contains(network) || network.contains(net))
        })
    }
}

impl Rule {
    /// Whether it lets everything from, or to, the network through.
    fn accepts_pods(&self, network: IpNet) -> bool {
        let covers = |condition: &NetworkMatch| {
            !condition.negated && condition.networks.iter().any(|net| net.contains(&network))
        };
        matches!(self.conditions, Conditions::None | Conditions::Address)
            && self.scope.devices.is_empty()
            && self.scope.networks.iter().all(covers)
            && self.statements == [Statement::Accept]
    }
}

fn is_named(device: &str, pattern: &str) -> bool {
    match pattern.strip_suffix('*') {
        Some(prefix) => device.starts_with(prefix),
        None => device == pattern,
    }
}

impl Firewall {
    /// Says what the rules mean for packets between pods.
    pub fn judge(&self, place: &Place) -> Judgement {
        let mut walk = Walk {
            place,
            chains: self
                .chains
                .iter()
                .map(|chain| ((chain.table.as_str(), chain.name.as_str()), chain))
                .collect(),
            seen: BTreeSet::new(),
            judgement: Judgement::default(),
            digest: Digest::default(),
            pods_accepted: false,
        };
        for chain in &self.chains {
            if let Some(base) = chain.base.as_ref().filter(|base| base.in_path) {
                walk.base(chain, base);
            }
        }
        let digest = walk.digest;
        let mut judgement = walk.judgement;
        judgement.digest = digest.value();
        judgement
    }
}

struct Walk<'a> {
    place: &'a Place,
    chains: BTreeMap<(&'a str, &'a str), &'a Chain>,
    /// Chains that were walked, with or without established connections.
    seen: BTreeSet<(&'a str, &'a str, bool)>,
    judgement: Judgement,
    digest: Digest,
    /// Whether the base chain at hand lets all packets between pods through, as flannel's rules make it do.
    pods_accepted: bool,
}

impl<'a> Walk<'a> {
    fn base(&mut self, chain: &'a Chain, base: &Base) {
        if let Some(device) = &base.device
            && !self.place.devices.contains(device)
            && self.place.uplink != *device
        {
            return;
        }
        self.pods_accepted = false;
        self.chain(chain, base.nat);
        if base.drops && !self.pods_accepted && chain.owner != Owner::Known {
            let line = format!(
                "{chain} drops by policy, and no rule lets all of {} through",
                self.place.network
            );
            self.digest.text(&line);
            note(&mut self.judgement.filters, line);
        }
    }

    /// Walks a chain in which established connections are out of the game already, or not. True if they are at its end.
    fn chain(&mut self, chain: &'a Chain, mut excused: bool) -> bool {
        if !self.seen.insert((&chain.table, &chain.name, excused)) {
            return excused;
        }
        for rule in &chain.rules {
            if !rule.scope.meets(self.place) {
                continue;
            }
            if chain.owner != Owner::Known {
                self.digest.text(&chain.table);
                self.digest.text(&chain.name);
                self.digest.text(&rule.text);
            }
            for statement in &rule.statements {
                self.statement(chain, rule, statement, excused || rule.new_only);
            }
            self.pods_accepted |= rule.accepts_pods(self.place.network);
            for jump in &rule.jumps {
                let target = self
                    .chains
                    .get(&(chain.table.as_str(), jump.target.as_str()));
                if let Some(target) = target.copied()
                    && jump.scope.meets(self.place)
                {
                    let after = self.chain(target, excused || rule.new_only);
                    excused |= after && rule.conditions.only_state() && !rule.new_only;
                }
            }
            excused |= rule.accepts_established;
        }
        excused
    }

    fn statement(&mut self, chain: &Chain, rule: &Rule, statement: &Statement, excused: bool) {
        let known = chain.owner == Owner::Known;
        let found = &mut self.judgement;
        let line = |what: &str| format!("{what} in {chain}: {}", shorten(&rule.text));
        match statement {
            Statement::Accept => {}
            Statement::Drop
            | Statement::Mark(_)
            | Statement::Account(_)
            | Statement::TranslateSource
            | Statement::Other(_)
                if known => {}
            Statement::Drop => note(&mut found.filters, line(&blame(chain, "a rule that drops"))),
            Statement::Other(what) => note(&mut found.filters, line(&blame(chain, what))),
            Statement::Queue => {
                note(&mut found.filters, line(&blame(chain, "queue")));
                if !excused {
                    note(&mut found.per_packet, line("queue"));
                }
            }
            Statement::PerPacket(what) if excused => {
                note(&mut found.filters, line(what));
            }
            Statement::PerPacket(what) => {
                note(&mut found.per_packet, line(what));
                note(&mut found.filters, line(what));
            }
            Statement::Mark(what) => {
                note(&mut found.filters, line(&blame(chain, what)));
                if !excused && chain.owner == Owner::Foreign {
                    note(&mut found.per_packet, line(what));
                }
            }
            Statement::Account(what) => {
                note(&mut found.filters, line(what));
                if !excused {
                    note(&mut found.per_packet, line(what));
                }
            }
            Statement::TranslateDestination => note(
                &mut found.filters,
                line("a translation that can match a pod's address"),
            ),
            Statement::TranslateSource => note(
                &mut found.filters,
                line("a translation of pods' source addresses"),
            ),
        }
    }
}

/// Findings per list: enough to tell, and a firewall of ten thousand rules does not fill the log.
const MOST: usize = 8;

fn note(list: &mut Vec<String>, line: String) {
    if list.len() < MOST && !list.contains(&line) {
        list.push(line);
    }
}

fn blame(chain: &Chain, what: &str) -> String {
    match chain.owner {
        Owner::Agent(agent) => format!("{agent}'s {}", what.trim_start_matches("a ")),
        Owner::Known | Owner::Foreign => what.to_owned(),
    }
}

fn shorten(text: &str) -> String {
    const LONGEST: usize = 140;
    if text.chars().count() <= LONGEST {
        return text.to_owned();
    }
    let mut short: String = text.chars().take(LONGEST).collect();
    short.push_str("...");
    short
}

impl fmt::Display for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "chain {} of {}", self.name, self.table)
    }
}

/// Whose a chain of iptables is.
pub(super) fn owner_of_chain(name: &str) -> Owner {
    const AGENTS: [(&str, &str); 8] = [
        ("cali-", "Calico"),
        ("KUBE-ROUTER-", "kube-router"),
        ("KUBE-POD-FW-", "kube-router"),
        ("KUBE-NWPLCY-", "kube-router"),
        ("CILIUM_", "Cilium"),
        ("OLD_CILIUM_", "Cilium"),
        ("WEAVE-", "Weave Net"),
        ("ANTREA-", "Antrea"),
    ];
    const EXACT: [&str; 19] = [
        "FLANNEL-FWD",
        "FLANNEL-POSTRTG",
        "KUBE-SERVICES",
        "KUBE-EXTERNAL-SERVICES",
        "KUBE-NODEPORTS",
        "KUBE-NODE-PORT",
        "KUBE-POSTROUTING",
        "KUBE-FORWARD",
        "KUBE-FIREWALL",
        "KUBE-PROXY-FIREWALL",
        "KUBE-MARK-MASQ",
        "KUBE-MARK-DROP",
        "KUBE-LOAD-BALANCER",
        "KUBE-SOURCE-RANGES-FIREWALL",
        "KUBE-IPVS-FILTER",
        "KUBE-IPVS-OUT-FILTER",
        "KUBE-PROXY-CANARY",
        "KUBE-KUBELET-CANARY",
        "KUBE-IPTABLES-HINT",
    ];
    const PREFIXES: [&str; 7] = [
        "KUBE-SVC-",
        "KUBE-SVL-",
        "KUBE-SEP-",
        "KUBE-FW-",
        "KUBE-XLB-",
        "KUBE-EXT-",
        "CNI-HOSTPORT-",
    ];
    if let Some((_, agent)) = AGENTS.iter().find(|(prefix, _)| name.starts_with(prefix)) {
        Owner::Agent(agent)
    } else if EXACT.contains(&name) || PREFIXES.iter().any(|prefix| name.starts_with(prefix)) {
        Owner::Known
    } else {
        Owner::Foreign
    }
}

/// Whose a table of nftables is.
pub(super) fn owner_of_table(name: &str) -> Owner {
    match name {
        "flannel-ipv4" | "flannel-ipv6" | "kube-proxy" | "cni_hostport" => Owner::Known,
        "calico" => Owner::Agent("Calico"),
        "kube-router" => Owner::Agent("kube-router"),
        name if name.starts_with("kube-network-policies")
            || name.starts_with("kindnet-network-policies") =>
        {
            Owner::Agent("kube-network-policies")
        }
        _ => Owner::Foreign,
    }
}
