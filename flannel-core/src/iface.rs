//! Which interface the tunnel runs over, and which addresses it has: upstream's `ipmatch`, over a table of what the
//! kernel reports.
//!
//! Selection happens before anything is created. When nothing matches, the error lists what is there, because the
//! usual cause is a name that differs between machines.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::addr::IfIndex;

mod error;
mod follow;
mod pattern;

pub use error::{Family, IfaceError};
pub use follow::{follow, is_same};
pub use pattern::{BadPattern, Pattern};

/// A network interface as the kernel reports it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// The kernel's number.
    pub index: IfIndex,
    /// The name.
    pub name: String,
    /// MTU in bytes.
    pub mtu: u32,
    /// Whether it is administratively up.
    pub up: bool,
    /// Its addresses, in the kernel's order.
    pub addrs: Vec<LinkAddr>,
}

/// An address of an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "these are the kernel's flags, independent of each other"
)]
pub struct LinkAddr {
    /// The address.
    pub ip: IpAddr,
    /// Length of the prefix on the link.
    pub prefix_len: u8,
    /// `IFA_F_PERMANENT`: configured, not leased.
    pub permanent: bool,
    /// `IFA_F_TEMPORARY`: an IPv6 privacy address.
    pub temporary: bool,
    /// `IFA_F_DEPRECATED`: not for new connections.
    pub deprecated: bool,
    /// Scope link. Addresses in `169.254.0.0/16` and `fe80::/10` count as such without it.
    pub link_local: bool,
}

/// Where the main table's default routes lead. `None` for no such route, and for one without a single interface.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Routes {
    /// Interface of the IPv4 default route of the lowest metric.
    pub default_v4: Option<IfIndex>,
    /// Interface of the IPv6 default route of the lowest metric.
    pub default_v6: Option<IfIndex>,
}

/// What the operator asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// `--iface`: names or addresses, tried in order.
    pub ifaces: Vec<String>,
    /// `--iface-regex`: tried in order, on addresses first and then on names.
    pub patterns: Vec<Pattern>,
    /// `--iface-can-reach`.
    pub can_reach: Option<IpAddr>,
    /// `--public-ip`.
    pub public_ip: Option<Ipv4Addr>,
    /// `--public-ipv6`.
    pub public_ipv6: Option<Ipv6Addr>,
}

/// The interface the tunnel runs over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Uplink {
    /// The kernel's number.
    pub index: IfIndex,
    /// The name.
    pub name: String,
    /// MTU in bytes, never zero.
    pub mtu: u32,
    /// Its IPv4 address, present when IPv4 is needed.
    pub address: Option<Ipv4Addr>,
    /// Its IPv6 address, present when IPv6 is needed.
    pub address_v6: Option<Ipv6Addr>,
    /// The IPv4 address to publish: the one asked for, or else `address`.
    pub public_ip: Option<Ipv4Addr>,
    /// The IPv6 address to publish: the one asked for, or else `address_v6`.
    pub public_ipv6: Option<Ipv6Addr>,
    /// All addresses of the interface, in the kernel's order.
    pub addrs: Vec<IpAddr>,
    /// Why this one, for the log.
    pub reason: String,
}

impl Uplink {
    /// Source address of the tunnel's packets: the published address where the interface has it, otherwise the
    /// interface's own. Behind NAT the published one is not local, and the kernel would drop what is sent from it.
    pub fn local_v4(&self) -> Option<Ipv4Addr> {
        let here = |ip: &Ipv4Addr| self.addrs.contains(&IpAddr::V4(*ip));
        self.public_ip.filter(here).or(self.address)
    }

    /// Source address of the IPv6 tunnel's packets, by the rule of [`Uplink::local_v4`].
    pub fn local_v6(&self) -> Option<Ipv6Addr> {
        let here = |ip: &Ipv6Addr| self.addrs.contains(&IpAddr::V6(*ip));
        self.public_ipv6.filter(here).or(self.address_v6)
    }
}

/// Selects the interface the tunnel runs over.
///
/// The first of `wanted.ifaces` that can be used wins. Without any, the interface that has the public address; without
/// that either, the one of the default route.
pub fn select(
    links: &[Link],
    routes: &Routes,
    wanted: &Wanted,
    need_v4: bool,
    need_v6: bool,
) -> Result<Uplink, IfaceError> {
    if !need_v4 && !need_v6 {
        return Err(IfaceError::NoFamily);
    }
    let mut sorted: Vec<&Link> = links.iter().collect();
    sorted.sort_by_key(|link| link.index);
    let table = Table {
        links: sorted,
        wanted,
        need_v4,
        need_v6,
    };
    let mut misses = Vec::new();
    for iface in &wanted.ifaces {
        match table.by_option(iface) {
            Ok(uplink) => return Ok(uplink),
            Err(miss) => misses.push(miss),
        }
    }
    match (misses.len(), misses.pop()) {
        (_, None) => table.without_option(*routes),
        (1, Some(miss)) => Err(miss),
        (_, Some(miss)) => {
            misses.push(miss);
            Err(IfaceError::NoneMatched { misses })
        }
    }
}

/// The question, with the interfaces in the order of their indices.
struct Table<'a> {
    links: Vec<&'a Link>,
    wanted: &'a Wanted,
    need_v4: bool,
    need_v6: bool,
}

impl Table<'_> {
    fn candidates(&self) -> String {
        let links = self.links.iter().map(|link| {
            let addrs: Vec<String> = link.addrs.iter().map(|addr| addr.ip.to_string()).collect();
            format!("{}:[{}]", link.name, addrs.join(" "))
        });
        match links.collect::<Vec<_>>().join(", ") {
            none if none.is_empty() => "(there is no interface)".to_owned(),
            list => list,
        }
    }

    /// One value of `--iface`.
    fn by_option(&self, iface: &str) -> Result<Uplink, IfaceError> {
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

    /// No `--iface`: by the public addresses, or by the default route.
    fn without_option(&self, routes: Routes) -> Result<Uplink, IfaceError> {
        let public4 = self.wanted.public_ip.filter(|_| self.need_v4);
        let public6 = self.wanted.public_ipv6.filter(|_| self.need_v6);
        let owner = |ip: IpAddr| {
            self.owner(ip).ok_or_else(|| IfaceError::PublicNotLocal {
                ip,
                candidates: self.candidates(),
            })
        };
        match (public4, public6) {
            (None, None) => self.by_default_route(routes),
            (Some(ip), None) => {
                let link = owner(ip.into())?;
                self.uplink(
                    link,
                    Some(ip),
                    None,
                    format!("it has the public address {ip}"),
                )
            }
            (None, Some(ip)) => {
                let link = owner(ip.into())?;
                self.uplink(
                    link,
                    None,
                    Some(ip),
                    format!("it has the public address {ip}"),
                )
            }
            (Some(ip), Some(ipv6)) => {
                let link = owner(ip.into())?;
                self.same("address", link, owner(ipv6.into())?)?;
                let reason = format!("it has the public addresses {ip} and {ipv6}");
                self.uplink(link, Some(ip), Some(ipv6), reason)
            }
        }
    }

    fn by_default_route(&self, routes: Routes) -> Result<Uplink, IfaceError> {
        let link = |index: Option<IfIndex>, family| {
            let mut links = self.links.iter();
            let link = links.find(|link| Some(link.index) == index);
            link.ok_or_else(|| IfaceError::NoDefaultRoute {
                family,
                candidates: self.candidates(),
            })
        };
        let link = match (self.need_v4, self.need_v6) {
            (true, false) => link(routes.default_v4, Family::V4)?,
            (false, _) => link(routes.default_v6, Family::V6)?,
            (true, true) => {
                let v4 = link(routes.default_v4, Family::V4)?;
                self.same("default route", v4, link(routes.default_v6, Family::V6)?)?;
                v4
            }
        };
        self.uplink(link, None, None, "it has the default route".to_owned())
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
    fn uplink(
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
        let address = fixed_v4.or_else(|| best_v4(link));
        let address = address.filter(|_| self.need_v4);
        if self.need_v4 && address.is_none() {
            return Err(missing(Family::V4));
        }
        let address_v6 = fixed_v6.or_else(|| best_v6(link));
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

fn best_v4(link: &Link) -> Option<Ipv4Addr> {
    best(link, |ip| match ip {
        IpAddr::V4(ip) => Some(ip),
        IpAddr::V6(_) => None,
    })
}

fn best_v6(link: &Link) -> Option<Ipv6Addr> {
    best(link, |ip| match ip {
        IpAddr::V4(_) => None,
        IpAddr::V6(ip) => Some(ip),
    })
}

/// Upstream's order: global before link-local, configured before leased, lasting before temporary; then the kernel's.
fn best<A>(link: &Link, of_family: impl Fn(IpAddr) -> Option<A>) -> Option<A> {
    let usable = link
        .addrs
        .iter()
        .filter(|addr| !addr.deprecated && is_unicast(addr.ip));
    let ranked = usable.filter_map(|addr| {
        let local = addr.link_local || is_link_local(addr.ip);
        Some((
            (local, !addr.permanent, addr.temporary),
            of_family(addr.ip)?,
        ))
    });
    ranked.min_by_key(|(rank, _)| *rank).map(|(_, addr)| addr)
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
