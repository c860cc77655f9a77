//! Whether the packet filter lets overlay packets in and pods' packets through, in each family that the node has.

use std::net::{IpAddr, Ipv6Addr};

use ipnet::IpNet;

use super::{
    Finding, Observations,
    filter::{Chain, Hook, Obstacle, Packet, Payload, obstacle},
    iptables, nft,
};
use crate::{
    addr::Family,
    config::{BackendKind, WireguardMode},
    mark, wireguard,
};

/// The packet filter's rules for one family, as the tools list them.
#[derive(Clone, Debug, Default)]
pub struct Rules {
    /// `iptables-save` or `ip6tables-save` of the legacy tables.
    pub legacy: Option<String>,
    /// The same of the tables in nftables.
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

    fn chains(&self, family: Family) -> Vec<Chain> {
        let [legacy, compat] = match family {
            Family::V4 => ["iptables-legacy", "iptables"],
            Family::V6 => ["ip6tables-legacy", "ip6tables"],
        };
        let mut chains = Vec::new();
        if let Some(text) = &self.legacy {
            chains.extend(iptables::parse(text, legacy));
        }
        if let Some(text) = &self.compat {
            chains.extend(iptables::parse(text, compat));
        }
        if let Some(text) = &self.nft {
            chains.extend(nft::parse(text, family, self.compat.is_some()));
        }
        chains
    }
}

/// Judges the family of the node's overlay.
pub(super) fn judge(seen: &Observations) -> Vec<Finding> {
    let chains = seen.rules.chains(seen.overlay.family);
    vec![input(seen, &chains), forward(seen, &chains)]
}

/// The family, where a finding must say which it is about.
fn label(seen: &Observations) -> Option<Family> {
    let family = seen.overlay.family;
    (family == Family::V6 || seen.rules_v6.is_some()).then_some(family)
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

/// A packet that must come in.
struct Wanted<'a> {
    name: String,
    packet: Packet<'a>,
    /// Whether pods cannot talk without it.
    vital: bool,
}

/// What a neighbour sends to ask for an address, what it answers, and what a router says of a packet that is too large for it.
const SOLICITATION: u8 = 135;
const ADVERTISEMENT: u8 = 136;
const TOO_BIG: u8 = 2;

fn input(seen: &Observations, chains: &[Chain]) -> Finding {
    const NAME: &str = "firewall-input";
    let all = match wanted(seen) {
        Ok(all) => all,
        Err(why) => return Finding::skip(NAME, why),
    };
    let over = label(seen).map_or_else(String::new, |family| format!(" over {family}"));
    let hooks = [Hook::Prerouting, Hook::Input];
    let blocked: Vec<(&Wanted<'_>, Obstacle)> = all
        .iter()
        .filter_map(|wanted| Some((wanted, obstacle(chains, &hooks, &wanted.packet)?)))
        .collect();
    if blocked.is_empty() {
        let names = names(all.iter());
        return unlisted(NAME, &seen.rules)
            .unwrap_or_else(|| Finding::ok(NAME, format!("no rule keeps {names} out{over}")));
    }
    let managers = named(&seen.rules);
    let mut obstacles: Vec<&Obstacle> = Vec::new();
    for (_, obstacle) in &blocked {
        if !obstacles.contains(&obstacle) {
            obstacles.push(obstacle);
        }
    }
    let found: Vec<String> = obstacles
        .into_iter()
        .map(|by| {
            let kept = blocked.iter().filter(|(_, obstacle)| obstacle == by);
            let kept = names(kept.map(|(wanted, _)| *wanted));
            let keeps = if by.unsure { "may keep" } else { "keeps" };
            format!("{keeps} {kept} out{over}{managers}: {}", by.what)
        })
        .collect();
    let mut fixes: Vec<String> = Vec::new();
    for (wanted, obstacle) in &blocked {
        let fix = accept(seen, wanted.packet.payload, obstacle);
        if !fixes.contains(&fix) {
            fixes.push(fix);
        }
    }
    let (found, fix) = (found.join("; "), fixes.join(" && "));
    let fails = |(wanted, by): &(&Wanted<'_>, Obstacle)| wanted.vital && !by.unsure;
    if blocked.iter().any(fails) {
        Finding::fail(NAME, found, fix)
    } else {
        Finding::warn(NAME, found, fix)
    }
}

/// `a`, `a and b`, `a, b and c`, each once.
fn names<'a>(all: impl Iterator<Item = &'a Wanted<'a>>) -> String {
    let mut names: Vec<&str> = Vec::new();
    for wanted in all {
        if !names.contains(&wanted.name.as_str()) {
            names.push(&wanted.name);
        }
    }
    match names.split_last() {
        Some((last, rest)) if !rest.is_empty() => format!("{} and {last}", rest.join(", ")),
        _ => names.concat(),
    }
}

/// What must come in; else why nothing need be.
fn wanted(seen: &Observations) -> Result<Vec<Wanted<'_>>, &'static str> {
    let (backend, family) = (seen.backend(), seen.overlay.family);
    let uses_port = matches!(backend, BackendKind::Vxlan | BackendKind::Wireguard);
    if !uses_port && (family == Family::V4 || backend == BackendKind::Alloc) {
        return Err("the backend uses no UDP port");
    }
    let uplink = seen.network.uplink();
    let peer = super::peers::targets(seen).keys().next().copied();
    let local = uplink.and_then(|uplink| uplink.local(family));
    let port = seen.port();
    let packet = Packet {
        payload: Some(Payload::Udp(port)),
        input: uplink.map(|uplink| uplink.name.as_str()),
        output: None,
        source: peer.map(IpNet::from),
        destination: local.map(IpNet::from),
        destination_type: Some("local"),
        state: "new",
        hop_limit: None,
    };
    let mut all = Vec::new();
    if uses_port && goes_over(seen) {
        all.push(Wanted {
            name: format!("UDP port {port}"),
            packet,
            vital: true,
        });
    }
    if family == Family::V4 {
        return Ok(all);
    }
    if !uses_port || goes_over(seen) {
        all.extend(discovery("neighbour discovery", &packet, local));
        all.push(Wanted {
            name: "path MTU messages".into(),
            packet: Packet {
                payload: Some(Payload::Icmp(TOO_BIG)),
                source: None,
                state: "related",
                ..packet
            },
            vital: false,
        });
    }
    if let Some((bridge, gateway)) = bridge(seen) {
        let packet = Packet {
            input: Some(bridge),
            source: own_subnet(seen),
            // The bridge asks with its link-local address for whom it forwards to.
            destination: None,
            ..packet
        };
        all.extend(discovery(
            "pods' neighbour discovery",
            &packet,
            Some(gateway),
        ));
    }
    if all.is_empty() {
        return Err("WireGuard's packets go over IPv4");
    }
    Ok(all)
}

/// Neighbours ask all hosts that share the end of an address, and answer the one that has asked. Connection tracking leaves both out.
fn discovery<'a>(
    name: &str,
    packet: &Packet<'a>,
    asked_for: Option<IpAddr>,
) -> impl Iterator<Item = Wanted<'a>> {
    let packet = Packet {
        state: "untracked",
        hop_limit: Some(255),
        ..*packet
    };
    let asked = Packet {
        payload: Some(Payload::Icmp(SOLICITATION)),
        destination: asked_for.and_then(solicited),
        destination_type: Some("multicast"),
        ..packet
    };
    let answered = Packet {
        payload: Some(Payload::Icmp(ADVERTISEMENT)),
        ..packet
    };
    let name = name.to_owned();
    [asked, answered].into_iter().map(move |packet| Wanted {
        name: name.clone(),
        packet,
        vital: true,
    })
}

/// The multicast address at which a host is asked for an address.
fn solicited(address: IpAddr) -> Option<IpNet> {
    let IpAddr::V6(address) = address else {
        return None;
    };
    let [.., a, b, c] = address.octets();
    let low = u16::from_be_bytes([b, c]);
    let group = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00 | u16::from(a), low);
    Some(IpAddr::V6(group).into())
}

/// The pods' bridge, and its address of IPv6.
fn bridge(seen: &Observations) -> Option<(&str, IpAddr)> {
    let bridge = seen.overlay.bridge.as_ref()?;
    let of = |net: &&IpNet| Family::of_net(net) == Family::V6;
    let address = bridge.addresses.iter().find(of)?;
    Some((&bridge.name, address.addr()))
}

/// Whether packets to other nodes go over the family: WireGuard's one device may carry IPv6 over IPv4.
fn goes_over(seen: &Observations) -> bool {
    let Some(conf) = seen.store.conf() else {
        return true;
    };
    if seen.overlay.family == Family::V4 || conf.backend.kind != BackendKind::Wireguard {
        return true;
    }
    let mode = conf.backend.wireguard.mode;
    if mode == WireguardMode::Separate {
        return true;
    }
    let uplink = seen.network.uplink();
    let own = (
        uplink.and_then(crate::iface::Uplink::local_v4),
        uplink.and_then(crate::iface::Uplink::local_v6),
    );
    let ours = seen.store.own(seen).map(|(key, _)| *key);
    let mut others = seen
        .store
        .list()
        .into_iter()
        .flatten()
        .filter(|(key, _)| Some(**key) != ours);
    others.any(|(_, attrs)| wireguard::over(mode, own, attrs) == Family::V6)
}

/// How to let such packets in.
fn accept(seen: &Observations, payload: Option<Payload>, obstacle: &Obstacle) -> String {
    let managers = &seen.rules.managers;
    let place = nft_place(&obstacle.what);
    let Some(Payload::Udp(port)) = payload else {
        return if managers.contains(&"firewalld") {
            "firewall-cmd --permanent --add-protocol=ipv6-icmp && firewall-cmd --reload".into()
        } else if managers.contains(&"ufw") {
            "put -A ufw6-before-input -p icmpv6 -j ACCEPT first in /etc/ufw/before6.rules && ufw reload".into()
        } else if let Some(nft) = place {
            format!("nft insert rule {nft} meta l4proto ipv6-icmp accept")
        } else {
            "ip6tables -I INPUT -p ipv6-icmp -j ACCEPT".into()
        };
    };
    if managers.contains(&"firewalld") {
        format!("firewall-cmd --permanent --add-port={port}/udp && firewall-cmd --reload")
    } else if managers.contains(&"ufw") {
        format!("ufw allow {port}/udp")
    } else if let Some(nft) = place {
        format!("nft insert rule {nft} udp dport {port} accept")
    } else {
        let tool = tool(seen.overlay.family);
        format!("{tool} -I INPUT -p udp --dport {port} -j ACCEPT")
    }
}

const fn tool(family: Family) -> &'static str {
    match family {
        Family::V4 => "iptables",
        Family::V6 => "ip6tables",
    }
}

/// `inet t input` of `nft inet t input: …`.
fn nft_place(what: &str) -> Option<&str> {
    what.strip_prefix("nft ")?
        .split_once(": ")
        .map(|(place, _)| place)
}

/// This node's subnet.
fn own_subnet(seen: &Observations) -> Option<IpNet> {
    let family = seen.overlay.family;
    let own = seen.store.own(seen);
    let own = own.and_then(|(key, _)| key.subnet(family));
    let file = || seen.overlay.subnet_file.as_ref()?.subnet;
    own.or_else(|| file().filter(|net| Family::of_net(net) == family))
}

/// The interface that pods' packets from and to other nodes pass.
fn tunnel(seen: &Observations) -> &str {
    let devices = &seen.overlay.encrypted;
    let of_v6 = || {
        let name = |name: &str| name == mark::WIREGUARD_DEVICE_V6;
        devices.iter().find(|device| name(&device.name))
    };
    let encrypted = match seen.overlay.family {
        Family::V4 => None,
        Family::V6 => of_v6(),
    };
    let encrypted = encrypted.or_else(|| devices.first());
    match (seen.backend(), seen.network.uplink()) {
        // Pods' packets come and go by the uplink itself.
        (BackendKind::HostGw | BackendKind::Alloc, Some(uplink)) => &uplink.name,
        _ => encrypted.map_or(&seen.overlay.name, |device| &device.name),
    }
}

fn forward(seen: &Observations, chains: &[Chain]) -> Finding {
    const NAME: &str = "firewall-forward";
    let family = seen.overlay.family;
    let network = seen
        .store
        .conf()
        .and_then(|conf| conf.range(family))
        .map(|(network, _)| network)
        .or_else(|| {
            let network = seen.overlay.subnet_file.as_ref()?.network?;
            (Family::of_net(&network) == family).then_some(network)
        });
    let Some(network) = network else {
        return Finding::skip(NAME, "the network of the pods is unknown");
    };
    let subnet = own_subnet(seen);
    let tunnel = tunnel(seen);
    let bridge = seen
        .overlay
        .bridge
        .as_ref()
        .map_or("cni0", |bridge| bridge.name.as_str());
    let base = |peer: &IpAddr| IpNet::new(*peer, subnet?.prefix_len()).ok();
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
            payload: None,
            input: Some(input),
            output: Some(output),
            source,
            destination,
            destination_type: None,
            state: "new",
            hop_limit: None,
        };
        if let Some(obstacle) = obstacle(chains, &[Hook::Prerouting, Hook::Forward], &packet) {
            let is_sure = !obstacle.unsure;
            found = Some((way, obstacle));
            if is_sure {
                break;
            }
        }
    }
    let of = label(seen).map_or_else(String::new, |family| format!("{family} "));
    let Some((way, obstacle)) = found else {
        return unlisted(NAME, &seen.rules).unwrap_or_else(|| {
            Finding::ok(
                NAME,
                format!("no rule keeps {of}packets of {network} from being forwarded"),
            )
        });
    };
    let managers = named(&seen.rules);
    let fix = if let Some(place) = nft_place(&obstacle.what) {
        let ip = nft::protocol(family);
        format!(
            "nft insert rule {place} {ip} daddr {network} accept; nft insert rule {place} {ip} saddr {network} accept"
        )
    } else {
        let chain = if chains.iter().any(|chain| chain.name == "DOCKER-USER") {
            "DOCKER-USER"
        } else {
            "FORWARD"
        };
        let tool = tool(family);
        format!(
            "{tool} -I {chain} -d {network} -j ACCEPT && {tool} -I {chain} -s {network} -j ACCEPT"
        )
    };
    let what = format!("{of}packets {way} pods{managers}: {}", obstacle.what);
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
