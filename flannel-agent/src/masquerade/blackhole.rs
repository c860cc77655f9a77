//! The blackhole route for the node's own subnet, for nodes without a bridge that owns it.

use std::net::{Ipv4Addr, Ipv6Addr};

use flannel_core::masquerade::iptables::Moment;
use ipnet::IpNet;
use rtnetlink::{
    RouteMessageBuilder,
    packet_route::route::{
        RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType,
    },
};

use super::{Trouble, Wanted};
use crate::dataplane::netlink::{Netlink, NetlinkError};

/// Metric of IPv6 routes for which nobody names one: `IP6_RT_PRIO_USER` in `include/uapi/linux/ipv6_route.h`.
const METRIC_V6: u32 = 1024;

/// Puts the routes back where they are missing. A subnet that another route has already is left alone; of IPv6 the bridge's route
/// is another one, and goes first. At a start those of earlier subnets go, which other nodes may have by now.
pub(super) async fn pass(wanted: &Wanted, moment: Moment) -> Vec<Trouble> {
    let mut troubles = Vec::new();
    let own: Vec<IpNet> = wanted
        .subnets()
        .into_iter()
        .map(|(subnet, _)| subnet)
        .collect();
    let earlier = wanted
        .subnets()
        .into_iter()
        .filter_map(|(_, before)| before);
    let given_up = wanted.given_up.map(|(_, subnet)| subnet);
    if moment == Moment::Start {
        for subnet in earlier.chain(given_up) {
            if !own.contains(&subnet)
                && let Err(error) = remove(subnet).await
            {
                troubles.push(Trouble::note(error.to_string()));
            }
        }
    }
    for subnet in own {
        let outcome = async { Netlink::open()?.add_blackhole(subnet).await };
        match outcome.await {
            Ok(true) => tracing::info!("add route blackhole {subnet}"),
            Ok(false) => {}
            Err(error) => troubles.push(Trouble::lack(error.to_string())),
        }
    }
    troubles
}

/// Removes the route that an earlier start has made.
async fn remove(subnet: IpNet) -> Result<(), NetlinkError> {
    let net = Netlink::open()?;
    if net.has_blackhole(subnet).await? && net.del_blackhole(subnet).await? {
        tracing::info!("delete route blackhole {subnet}");
    }
    Ok(())
}

impl Netlink {
    /// Adds a blackhole route in upstream's shape, if no route for the subnet is there. Whether it was added.
    pub(crate) async fn add_blackhole(&self, subnet: IpNet) -> Result<bool, NetlinkError> {
        let what = || format!("add route blackhole {subnet}");
        let answer = self.handle().route().add(blackhole(subnet)).execute().await;
        match answer.map_err(|error| NetlinkError::new(what(), &error)) {
            Ok(()) => Ok(true),
            Err(error) if error.errno() == Some(libc::EEXIST) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Whether a subnet has a blackhole route of upstream's shape.
    pub(crate) async fn has_blackhole(&self, subnet: IpNet) -> Result<bool, NetlinkError> {
        let (request, address) = match subnet {
            IpNet::V4(subnet) => (
                RouteMessageBuilder::<Ipv4Addr>::new().build(),
                RouteAddress::Inet(subnet.network()),
            ),
            IpNet::V6(subnet) => (
                RouteMessageBuilder::<Ipv6Addr>::new().build(),
                RouteAddress::Inet6(subnet.network()),
            ),
        };
        let routes = self.list_routes(request).await?;
        Ok(routes.iter().any(|route| {
            route.header.kind == RouteType::BlackHole
                && route.header.protocol == RouteProtocol::Boot
                && route.header.destination_prefix_length == subnet.prefix_len()
                && route
                    .attributes
                    .contains(&RouteAttribute::Destination(address.clone()))
        }))
    }

    /// Deletes the blackhole route of a subnet. Whether there was one.
    pub(crate) async fn del_blackhole(&self, subnet: IpNet) -> Result<bool, NetlinkError> {
        let what = || format!("delete route blackhole {subnet}");
        let answer = self.handle().route().del(blackhole(subnet)).execute().await;
        match answer.map_err(|error| NetlinkError::new(what(), &error)) {
            Ok(()) => Ok(true),
            Err(error) if error.errno() == Some(libc::ESRCH) => Ok(false),
            Err(error) => Err(error),
        }
    }
}

fn blackhole(subnet: IpNet) -> RouteMessage {
    match subnet {
        IpNet::V4(subnet) => RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(subnet.network(), subnet.prefix_len())
            .kind(RouteType::BlackHole)
            .protocol(RouteProtocol::Boot)
            .scope(RouteScope::Universe)
            .build(),
        // The kernel deletes a route by destination and metric, whatever its type.
        IpNet::V6(subnet) => RouteMessageBuilder::<Ipv6Addr>::new()
            .destination_prefix(subnet.network(), subnet.prefix_len())
            .priority(METRIC_V6)
            .kind(RouteType::BlackHole)
            .protocol(RouteProtocol::Boot)
            .scope(RouteScope::Universe)
            .build(),
    }
}
