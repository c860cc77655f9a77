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
mod table;

pub use error::{Family, IfaceError};
pub use follow::{follow, is_same};
pub use pattern::{BadPattern, Pattern};
use table::Table;

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
    /// What the kernel calls its kind, such as `bridge`; `None` for hardware.
    pub kind: Option<String>,
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

/// Where routes lead.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Routes {
    /// The main table's IPv4 default route of the lowest metric.
    pub default_v4: DefaultRoute,
    /// The main table's IPv6 default route of the lowest metric.
    pub default_v6: DefaultRoute,
    /// The kernel's way to the address of [`Wanted::can_reach`]; `None` if there is none, or no such address.
    pub reach: Option<Reach>,
}

/// Where a default route leads.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum DefaultRoute {
    /// There is none.
    #[default]
    None,
    /// Over one interface.
    Over(IfIndex),
    /// Over several, none of which is the one.
    Multipath(Vec<IfIndex>),
}

/// The kernel's way to an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reach {
    /// The interface it would send over.
    pub index: IfIndex,
    /// The address it would send from.
    pub source: Option<IpAddr>,
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

    /// Source address of the tunnel's packets in a family.
    pub fn local(&self, family: Family) -> Option<IpAddr> {
        match family {
            Family::V4 => self.local_v4().map(IpAddr::V4),
            Family::V6 => self.local_v6().map(IpAddr::V6),
        }
    }

    /// The address that other nodes send to, in a family.
    pub fn public(&self, family: Family) -> Option<IpAddr> {
        match family {
            Family::V4 => self.public_ip.map(IpAddr::V4),
            Family::V6 => self.public_ipv6.map(IpAddr::V6),
        }
    }

    /// Source address of the IPv6 tunnel's packets, by the rule of [`Uplink::local_v4`].
    pub fn local_v6(&self) -> Option<Ipv6Addr> {
        let here = |ip: &Ipv6Addr| self.addrs.contains(&IpAddr::V6(*ip));
        self.public_ipv6.filter(here).or(self.address_v6)
    }
}

/// What was selected, and what there is to say of the way there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Selection {
    /// The interface.
    pub uplink: Uplink,
    /// In the order in which it came up.
    pub notes: Vec<Note>,
}

/// A line for the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Note {
    /// What was looked for, and not found.
    Info(String),
    /// A choice that may be wrong.
    Warning(String),
}

impl Uplink {
    /// Upstream's log lines about its choice, the one about the interface first (upstream: pkg/ipmatch).
    pub fn announcement(&self, wanted: &Wanted) -> Vec<String> {
        let name = &self.name;
        let v4 = self.address;
        let v6 = self.address_v6;
        let interface = [
            v4.map(|ip| format!("Using interface with name {name} and address {ip}")),
            v6.map(|ip| format!("Using interface with name {name} and v6 address {ip}")),
        ];
        let external = |given: bool, public: Option<IpAddr>, what: &str| {
            public.map(|ip| {
                if given {
                    format!("Using {ip} as {what}")
                } else {
                    format!("Defaulting {what} to interface address ({ip})")
                }
            })
        };
        let public = [
            external(
                wanted.public_ip.is_some(),
                self.public_ip.map(IpAddr::V4),
                "external address",
            ),
            external(
                wanted.public_ipv6.is_some(),
                self.public_ipv6.map(IpAddr::V6),
                "external v6 address",
            ),
        ];
        interface.into_iter().chain(public).flatten().collect()
    }
}

/// Selects the interface the tunnel runs over, by the rules of [`choose`].
pub fn select(
    links: &[Link],
    routes: &Routes,
    wanted: &Wanted,
    need_v4: bool,
    need_v6: bool,
) -> Result<Uplink, IfaceError> {
    choose(links, routes, wanted, need_v4, need_v6).map(|selection| selection.uplink)
}

/// Selects the interface the tunnel runs over.
///
/// The first of `wanted.ifaces`, then of `wanted.patterns`, then the way to `wanted.can_reach` that can be used wins. Without any of
/// these, the interface that has the public address; without that either, the one of the default route; without a default route, the
/// only one that has an address of global scope.
pub fn choose(
    links: &[Link],
    routes: &Routes,
    wanted: &Wanted,
    need_v4: bool,
    need_v6: bool,
) -> Result<Selection, IfaceError> {
    if !need_v4 && !need_v6 {
        return Err(IfaceError::NoFamily);
    }
    let table = Table::new(links, wanted, need_v4, need_v6);
    let options = wanted
        .ifaces
        .iter()
        .map(|iface| (iface.clone(), table.by_option(iface)));
    let patterns = wanted
        .patterns
        .iter()
        .map(|pattern| (pattern.to_string(), table.by_pattern(pattern)));
    let reach = wanted
        .can_reach
        .iter()
        .map(|ip| (ip.to_string(), table.by_reach(*ip, routes.reach)));
    let mut notes = Vec::new();
    let mut misses = Vec::new();
    for (what, found) in options.chain(patterns).chain(reach) {
        notes.push(Note::Info(format!("Searching for interface using {what}")));
        match found {
            Ok(uplink) => return Ok(Selection { uplink, notes }),
            Err(miss) => {
                notes.push(Note::Info(format!(
                    "Could not find valid interface matching {what}: {miss}"
                )));
                misses.push(miss);
            }
        }
    }
    if !misses.is_empty() {
        return Err(IfaceError::NoneMatched { misses });
    }
    let uplink = table
        .without_option(routes, &mut notes)
        .map_err(|source| IfaceError::NoneFound(Box::new(source)))?;
    Ok(Selection { uplink, notes })
}

#[cfg(test)]
mod tests;
