//! Flags about the interface that carries the overlay, and about the addresses to publish.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use clap::{ArgAction, Args as Group};
use flannel_core::iface::{Pattern, Wanted};

/// Flags about the interface that carries the overlay.
#[derive(Clone, Debug, Group)]
#[command(next_help_heading = "Interface")]
pub struct UplinkArgs {
    /// Interface, by name or address, that carries the overlay. May be repeated: the first that exists is taken. Default: the one
    /// of the default route.
    #[arg(long, env = "FLANNELD_IFACE", value_name = "NAME|IP", action = ArgAction::Append)]
    pub iface: Vec<String>,

    /// Interface with an address, else with a name, in which this regular expression is found. May be repeated; used when no
    /// --iface matches.
    #[arg(long, env = "FLANNELD_IFACE_REGEX", value_name = "REGEX", action = ArgAction::Append)]
    pub iface_regex: Vec<Pattern>,

    /// Interface over which the kernel would send to this address; used when neither --iface nor --iface-regex matches.
    #[arg(
        long,
        env = "FLANNELD_IFACE_CAN_REACH",
        value_name = "IP",
        value_parser = ip
    )]
    pub iface_can_reach: Option<IpAddr>,

    /// IPv4 address at which other nodes reach this one. Default: the address of the interface.
    #[arg(long, env = "FLANNELD_PUBLIC_IP", value_name = "IP", value_parser = ipv4)]
    pub public_ip: Option<Ipv4Addr>,

    /// IPv6 address at which other nodes reach this one. Default: the address of the interface.
    #[arg(
        long = "public-ipv6",
        env = "FLANNELD_PUBLIC_IPV6",
        value_name = "IP",
        value_parser = ipv6
    )]
    pub public_ipv6: Option<Ipv6Addr>,
}

impl UplinkArgs {
    /// Which uplink the flags ask for.
    pub fn wanted(&self) -> Wanted {
        Wanted {
            ifaces: self.iface.clone(),
            patterns: self.iface_regex.clone(),
            can_reach: self.iface_can_reach,
            public_ip: self.public_ip,
            public_ipv6: self.public_ipv6,
        }
    }
}

fn ip(text: &str) -> Result<IpAddr, &'static str> {
    text.parse()
        .map_err(|_| "write an address such as 192.168.1.1")
}

fn ipv4(text: &str) -> Result<Ipv4Addr, &'static str> {
    text.parse()
        .map_err(|_| "write an IPv4 address such as 192.168.1.10")
}

fn ipv6(text: &str) -> Result<Ipv6Addr, &'static str> {
    text.parse()
        .map_err(|_| "write an IPv6 address such as 2001:db8::10")
}
