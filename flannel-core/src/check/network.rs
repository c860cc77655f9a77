//! The uplink, and whether it is the right one.

use std::net::IpAddr;

use ipnet::Ipv4Net;

use super::{Finding, Observations, few};
use crate::iface::{Link, Uplink};

/// Interfaces and routes.
#[derive(Clone, Debug)]
pub struct Network {
    /// The uplink that the flags lead to, or why there is none.
    pub uplink: Result<UplinkSeen, String>,
    /// All interfaces.
    pub links: Vec<Link>,
    /// Default routes: interface and metric, best first.
    pub defaults: Vec<(String, u32)>,
}

/// The uplink.
#[derive(Clone, Debug)]
pub struct UplinkSeen {
    /// As chosen.
    pub chosen: Uplink,
    /// Whether a flag names interface or address.
    pub asked_for: bool,
}

impl Network {
    /// The uplink, if there is one.
    pub fn uplink(&self) -> Option<&Uplink> {
        self.uplink.as_ref().ok().map(|seen| &seen.chosen)
    }
}

pub(super) fn judge(seen: &Observations) -> Vec<Finding> {
    vec![uplink(seen)]
}

fn uplink(seen: &Observations) -> Finding {
    const NAME: &str = "uplink";
    let network = &seen.network;
    let uplink = match &network.uplink {
        Ok(uplink) => uplink,
        Err(error) => {
            return Finding::fail(
                NAME,
                error.clone(),
                "give --iface=<name or address> of the interface that reaches the other nodes",
            );
        }
    };
    let chosen = &uplink.chosen;
    let address = chosen
        .public_ip
        .map_or("no address".into(), |ip| ip.to_string());
    let text = format!(
        "{}, public address {address}, MTU {} ({})",
        chosen.name, chosen.mtu, chosen.reason
    );
    let link = network.links.iter().find(|link| link.index == chosen.index);
    if link.is_some_and(|link| !link.up) {
        return Finding::fail(
            NAME,
            format!("{} is down", chosen.name),
            format!("ip link set {} up", chosen.name),
        );
    }
    if uplink.asked_for {
        return Finding::ok(NAME, text);
    }
    let twins = same_lan(network, chosen);
    if !twins.is_empty() {
        return Finding::warn(
            NAME,
            format!("{text}; also on its LAN: {}", few(&twins)),
            format!("say which is meant: --iface={}", chosen.name),
        );
    }
    let mut names: Vec<&str> = network
        .defaults
        .iter()
        .map(|(name, _)| name.as_str())
        .collect();
    names.dedup();
    if names.len() > 1 {
        let routes = network
            .defaults
            .iter()
            .map(|(name, metric)| format!("{name} metric {metric}"));
        return Finding::warn(
            NAME,
            format!("{text}; there are several default routes: {}", few(routes)),
            format!("say which is meant: --iface={}", chosen.name),
        );
    }
    Finding::ok(NAME, text)
}

/// Other interfaces with an address in the uplink's subnet: answers may leave by any of them.
fn same_lan(network: &Network, chosen: &Uplink) -> Vec<String> {
    let subnets = |link: &Link| -> Vec<Ipv4Net> {
        link.addrs
            .iter()
            .filter_map(|addr| match addr.ip {
                IpAddr::V4(ip) => Ipv4Net::new(ip, addr.prefix_len).ok(),
                IpAddr::V6(_) => None,
            })
            .filter(|net| net.prefix_len() < 32)
            .collect()
    };
    let own = network.links.iter().find(|link| link.index == chosen.index);
    let own: Vec<Ipv4Net> = own.map(subnets).unwrap_or_default();
    network
        .links
        .iter()
        .filter(|link| link.index != chosen.index && link.up)
        .filter(|link| {
            subnets(link).iter().any(|net| {
                own.iter()
                    .any(|own| own.contains(&net.network()) || net.contains(&own.network()))
            })
        })
        .map(|link| link.name.clone())
        .collect()
}
