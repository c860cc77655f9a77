//! The interfaces, and the ways to find one among them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

use super::{DefaultRoute, Family, IfaceError, Link, Note, Pattern, Reach, Routes, Uplink, Wanted};
use crate::addr::IfIndex;

/// The question, with the interfaces in the order of their indices.
pub(super) struct Table<'a> {
    links: Vec<&'a Link>,
    wanted: &'a Wanted,
    need_v4: bool,
    need_v6: bool,
}

impl<'a> Table<'a> {
    pub(super) fn new(links: &'a [Link], wanted: &'a Wanted, need_v4: bool, need_v6: bool) -> Self {
        let mut links: Vec<&Link> = links.iter().collect();
        links.sort_by_key(|link| link.index);
        Self {
            links,
            wanted,
            need_v4,
            need_v6,
        }
    }

    /// What could be asked for instead: with a hundred pods most interfaces are theirs, and have no address of use.
    fn candidates(&self) -> String {
        let addressed = |link: &&&Link| {
            let mut addrs = link.addrs.iter().map(|addr| addr.ip);
            addrs.any(|ip| is_unicast(ip) && !is_link_local(ip))
        };
        let links: Vec<&Link> = self.links.iter().filter(addressed).copied().collect();
        list(if links.is_empty() {
            &self.links
        } else {
            &links
        })
    }

    /// One value of `--iface`.
    pub(super) fn by_option(&self, iface: &str) -> Result<Uplink, IfaceError> {
        let Ok(ip) = iface.parse::<IpAddr>() else {
            let mut links = self.links.iter();
            let link = links.find(|link| link.name == iface);
            let link = link.ok_or_else(|| IfaceError::NoSuchName {
                name: iface.to_owned(),
                candidates: self.candidates(),
            })?;
            return self.uplink(link, None, None, format!("--iface {iface}"));
        };
        let (family, enabled) = match ip {
            IpAddr::V4(_) => (Family::V4, self.need_v4),
            IpAddr::V6(_) => (Family::V6, self.need_v6),
        };
        if !enabled {
            return Err(IfaceError::WrongFamily {
                ip,
                family,
                candidates: self.candidates(),
            });
        }
        let link = self.owner(ip).ok_or_else(|| IfaceError::NoSuchAddress {
            ip,
            candidates: self.candidates(),
        })?;
        // In dual stack a published IPv6 address has to agree with an IPv4 literal.
        let public_v6 = self.wanted.public_ipv6.filter(|_| self.need_v6);
        if let (IpAddr::V4(_), Some(ipv6)) = (ip, public_v6)
            && let Some(other) = self.owner(ipv6.into())
        {
            self.same("address", link, other)?;
        }
        let reason = format!("--iface {iface}");
        match ip {
            IpAddr::V4(ip) => self.uplink(link, Some(ip), None, reason),
            IpAddr::V6(ip) => self.uplink(link, None, Some(ip), reason),
        }
    }

    /// One value of `--iface-regex`: the first interface with addresses that match, else the first with such a name.
    pub(super) fn by_pattern(&self, pattern: &Pattern) -> Result<Uplink, IfaceError> {
        let reason = || format!("--iface-regex {pattern}");
        for link in &self.links {
            let v4 = usable(link, v4_of).into_iter().map(|(_, ip)| ip);
            let v6 = usable(link, v6_of).into_iter().map(|(_, ip)| ip);
            let v4 = v4
                .filter(|_| self.need_v4)
                .find(|ip| pattern.matches(&ip.to_string()));
            let v6 = v6
                .filter(|_| self.need_v6)
                .find(|ip| pattern.matches(&ip.to_string()));
            if v4.is_some() == self.need_v4
                && v6.is_some() == self.need_v6
                && let Ok(uplink) = self.uplink(link, v4, v6, reason())
            {
                return Ok(uplink);
            }
        }
        let named = self.links.iter().filter(|link| pattern.matches(&link.name));
        let mut unusable = None;
        for link in named {
            match self.uplink(link, None, None, reason()) {
                Ok(uplink) => return Ok(uplink),
                Err(error) => unusable = unusable.or(Some(error)),
            }
        }
        Err(unusable.unwrap_or_else(|| IfaceError::NoMatch {
            pattern: pattern.to_string(),
            candidates: self.candidates(),
        }))
    }

    /// `--iface-can-reach`: the interface of the kernel's way to an address, and the address it would send from.
    pub(super) fn by_reach(&self, ip: IpAddr, reach: Option<Reach>) -> Result<Uplink, IfaceError> {
        let unreachable = || IfaceError::Unreachable {
            ip,
            candidates: self.candidates(),
        };
        let reach = reach.ok_or_else(unreachable)?;
        let mut links = self.links.iter();
        let link = links.find(|link| link.index == reach.index);
        let link = link.ok_or_else(unreachable)?;
        let here = |source: &IpAddr| link.addrs.iter().any(|addr| addr.ip == *source);
        let source = reach.source.filter(here);
        self.uplink(
            link,
            source.and_then(v4_of),
            source.and_then(v6_of),
            format!("the way to {ip} is over it"),
        )
    }

    /// No `--iface`: by the public addresses, or by the default route.
    pub(super) fn without_option(
        &self,
        routes: &Routes,
        notes: &mut Vec<Note>,
    ) -> Result<Uplink, IfaceError> {
        let public4 = self.wanted.public_ip.filter(|_| self.need_v4);
        let public6 = self.wanted.public_ipv6.filter(|_| self.need_v6);
        let owner = |ip: IpAddr| {
            self.owner(ip).ok_or_else(|| IfaceError::PublicNotLocal {
                ip,
                candidates: self.candidates(),
            })
        };
        let given = [public4.map(IpAddr::V4), public6.map(IpAddr::V6)];
        let given: Vec<String> = given.iter().flatten().map(ToString::to_string).collect();
        let reason = match &given[..] {
            [one] => format!("it has the public address {one}"),
            _ => format!("it has the public addresses {}", given.join(" and ")),
        };
        if let Some(first) = given.first() {
            notes.push(Note::Info(format!("Searching for interface using {first}")));
        }
        match (public4, public6) {
            (None, None) => self.by_default_route(routes, notes),
            (Some(ip), None) => self.uplink(owner(ip.into())?, Some(ip), None, reason),
            (None, Some(ip)) => self.uplink(owner(ip.into())?, None, Some(ip), reason),
            (Some(ip), Some(ipv6)) => {
                let link = owner(ip.into())?;
                self.same("address", link, owner(ipv6.into())?)?;
                self.uplink(link, Some(ip), Some(ipv6), reason)
            }
        }
    }

    fn by_default_route(
        &self,
        routes: &Routes,
        notes: &mut Vec<Note>,
    ) -> Result<Uplink, IfaceError> {
        notes.push(Note::Info(
            "Determining IP address of default interface".to_owned(),
        ));
        let v4 = self.default(&routes.default_v4, self.need_v4)?;
        let v6 = self.default(&routes.default_v6, self.need_v6)?;
        let link = match (v4, v6) {
            (Some(v4), Some(v6)) => {
                self.same("default route", v4, v6)?;
                v4
            }
            (Some(link), None) | (None, Some(link)) => {
                if self.need_v4 && self.need_v6 {
                    let without = if v4.is_none() { Family::V4 } else { Family::V6 };
                    notes.push(Note::Warning(format!(
                        "unable to find default route for {without}: using {}, which has the other family's",
                        link.name
                    )));
                }
                link
            }
            (None, None) => return self.only_one(notes),
        };
        let uplink = self.uplink(link, None, None, "it has the default route".to_owned())?;
        notes.extend(self.neighbours(link, &uplink).map(Note::Warning));
        Ok(uplink)
    }

    /// The interface of a default route, if the family is needed and there is one.
    fn default(&self, route: &DefaultRoute, needed: bool) -> Result<Option<&'a Link>, IfaceError> {
        let find = |index: &IfIndex| self.links.iter().find(|link| link.index == *index).copied();
        match route {
            DefaultRoute::Over(index) if needed => Ok(find(index)),
            DefaultRoute::Multipath(hops) if needed => {
                let links: Vec<&Link> = hops.iter().filter_map(find).collect();
                Err(IfaceError::Multipath {
                    candidates: list(&links),
                })
            }
            DefaultRoute::None | DefaultRoute::Over(_) | DefaultRoute::Multipath(_) => Ok(None),
        }
    }

    /// Without a default route: the interface that has an address of global scope, if only one has.
    fn only_one(&self, notes: &mut Vec<Note>) -> Result<Uplink, IfaceError> {
        let global = |link: &&&Link| {
            let v4 = usable(link, v4_of).iter().any(|((local, ..), _)| !local);
            let v6 = usable(link, v6_of).iter().any(|((local, ..), _)| !local);
            link.up
                && link.mtu != 0
                && !is_of_containers(link)
                && v4 >= self.need_v4
                && v6 >= self.need_v6
        };
        let links: Vec<&Link> = self.links.iter().filter(global).copied().collect();
        let family = if self.need_v4 { Family::V4 } else { Family::V6 };
        match &links[..] {
            [link] => {
                let reason = "no other interface has an address of global scope";
                notes.push(Note::Warning(format!(
                    "unable to find default route for {family}: using {}, as {reason}; set --iface to choose",
                    list(&links)
                )));
                self.uplink(link, None, None, reason.to_owned())
            }
            [] => Err(IfaceError::NoDefaultRoute {
                family,
                found: "no interface has an address of global scope".to_owned(),
                candidates: self.candidates(),
            }),
            several => Err(IfaceError::NoDefaultRoute {
                family,
                found: format!(
                    "{} interfaces have an address of global scope",
                    several.len()
                ),
                candidates: list(several),
            }),
        }
    }

    /// Other interfaces in the network of the chosen address: which one was meant is a guess.
    fn neighbours(&self, link: &Link, uplink: &Uplink) -> Option<String> {
        let ip = (uplink.address.map(IpAddr::V4)).or(uplink.address_v6.map(IpAddr::V6))?;
        let addr = link.addrs.iter().find(|addr| addr.ip == ip)?;
        let network = IpNet::new(ip, addr.prefix_len).ok()?.trunc();
        let inside = |other: &&&Link| {
            other.index != link.index
                && other.up
                && other.addrs.iter().any(|addr| network.contains(&addr.ip))
        };
        let others: Vec<&Link> = self.links.iter().filter(inside).copied().collect();
        (!others.is_empty()).then(|| {
            format!(
                "several interfaces are in {network}: using {} ({ip}), because it has the default route, and not {}; set --iface to choose",
                link.name,
                list(&others)
            )
        })
    }

    /// The interface that has the address; of several, the first that is up.
    fn owner(&self, ip: IpAddr) -> Option<&Link> {
        let owns = |link: &&&Link| link.addrs.iter().any(|addr| addr.ip == ip);
        let owners = self.links.iter().filter(owns);
        owners.min_by_key(|link| !link.up).copied()
    }

    fn same(&self, what: &'static str, v4: &Link, v6: &Link) -> Result<(), IfaceError> {
        if v4.index == v6.index {
            return Ok(());
        }
        Err(IfaceError::Split {
            what,
            v4: v4.name.clone(),
            v6: v6.name.clone(),
            candidates: self.candidates(),
        })
    }

    /// Checks that the interface can be used, and settles the addresses that the lookup has not fixed.
    pub(super) fn uplink(
        &self,
        link: &Link,
        fixed_v4: Option<Ipv4Addr>,
        fixed_v6: Option<Ipv6Addr>,
        reason: String,
    ) -> Result<Uplink, IfaceError> {
        if !link.up {
            return Err(IfaceError::Down {
                name: link.name.clone(),
                candidates: self.candidates(),
            });
        }
        if link.mtu == 0 {
            let name = link.name.clone();
            return Err(IfaceError::NoMtu { name });
        }
        let missing = |family| IfaceError::NoAddress {
            family,
            name: link.name.clone(),
            candidates: self.candidates(),
        };
        let address = fixed_v4.or_else(|| best(link, v4_of));
        let address = address.filter(|_| self.need_v4);
        if self.need_v4 && address.is_none() {
            return Err(missing(Family::V4));
        }
        let address_v6 = fixed_v6.or_else(|| best(link, v6_of));
        let address_v6 = address_v6.filter(|_| self.need_v6);
        if self.need_v6 && address_v6.is_none() {
            return Err(missing(Family::V6));
        }
        Ok(Uplink {
            index: link.index,
            name: link.name.clone(),
            mtu: link.mtu,
            address,
            address_v6,
            public_ip: self.wanted.public_ip.filter(|_| self.need_v4).or(address),
            public_ipv6: self
                .wanted
                .public_ipv6
                .filter(|_| self.need_v6)
                .or(address_v6),
            addrs: link.addrs.iter().map(|addr| addr.ip).collect(),
            reason,
        })
    }
}

/// Interfaces with all their addresses.
fn list(links: &[&Link]) -> String {
    let links = links.iter().map(|link| {
        let addrs: Vec<String> = link.addrs.iter().map(|addr| addr.ip.to_string()).collect();
        format!("{}:[{}]", link.name, addrs.join(" "))
    });
    match links.collect::<Vec<_>>().join(", ") {
        none if none.is_empty() => "(there is no interface)".to_owned(),
        list => list,
    }
}

/// Whether it belongs to containers, to an overlay or to a tunnel, by its kind or by the name that the usual programs give: such an
/// interface has an address, and cannot be meant.
fn is_of_containers(link: &Link) -> bool {
    const KINDS: [&str; 11] = [
        "vxlan",
        "geneve",
        "dummy",
        "tun",
        "wireguard",
        "ipip",
        "sit",
        "gre",
        "gretap",
        "ip6tnl",
        "vrf",
    ];
    const NAMES: [&str; 13] = [
        "flannel", "cni", "cbr", "docker", "br-", "podman", "virbr", "lxcbr", "lxdbr", "kube",
        "cali", "cilium", "weave",
    ];
    let kind = link.kind.as_deref().unwrap_or_default();
    KINDS.contains(&kind) || NAMES.iter().any(|name| link.name.starts_with(name))
}

fn v4_of(ip: IpAddr) -> Option<Ipv4Addr> {
    match ip {
        IpAddr::V4(ip) => Some(ip),
        IpAddr::V6(_) => None,
    }
}

fn v6_of(ip: IpAddr) -> Option<Ipv6Addr> {
    match ip {
        IpAddr::V4(_) => None,
        IpAddr::V6(ip) => Some(ip),
    }
}

/// How far an address is from the best: link-local, leased, temporary.
type Rank = (bool, bool, bool);

/// The addresses of a family that a tunnel can use, in upstream's order: global before link-local, configured before leased, lasting
/// before temporary; then the kernel's.
fn usable<A>(link: &Link, of_family: impl Fn(IpAddr) -> Option<A>) -> Vec<(Rank, A)> {
    let usable = link
        .addrs
        .iter()
        .filter(|addr| !addr.deprecated && is_unicast(addr.ip));
    let mut ranked: Vec<(Rank, A)> = usable
        .filter_map(|addr| {
            let local = addr.link_local || is_link_local(addr.ip);
            let rank = (local, !addr.permanent, addr.temporary);
            Some((rank, of_family(addr.ip)?))
        })
        .collect();
    ranked.sort_by_key(|(rank, _)| *rank);
    ranked
}

fn best<A>(link: &Link, of_family: impl Fn(IpAddr) -> Option<A>) -> Option<A> {
    usable(link, of_family).into_iter().map(|(_, ip)| ip).next()
}

fn is_unicast(ip: IpAddr) -> bool {
    let broadcast = ip == IpAddr::V4(Ipv4Addr::BROADCAST);
    !(ip.is_unspecified() || ip.is_loopback() || ip.is_multicast() || broadcast)
}

fn is_link_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    }
}

#[cfg(test)]
mod tests;
