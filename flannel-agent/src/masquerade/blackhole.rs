//! The blackhole route for the node's own subnet, for nodes without a bridge that owns it.

use std::net::{Ipv4Addr, Ipv6Addr};

use flannel_core::masquerade::Request;
use ipnet::{IpNet, Ipv4Net};
use rtnetlink::{
    RouteMessageBuilder,
    packet_route::route::{
        RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType,
    },
};

use super::Trouble;
use crate::dataplane::netlink::{Netlink, NetlinkError};

/// Puts the routes back where they are missing. A subnet that another route has already is left alone.
pub(super) async fn pass(requests: &[Option<Request>]) -> Vec<Trouble> {
    let mut troubles = Vec::new();
    for request in requests.iter().flatten() {
        let outcome = async { Netlink::open()?.add_blackhole(request.subnet).await };
        match outcome.await {
            Ok(true) => tracing::info!("add route blackhole {}", request.subnet),
            Ok(false) => {}
            Err(error) => troubles.push(Trouble::lack(error.to_string())),
        }
    }
    troubles
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
    pub(crate) async fn has_blackhole(&self, subnet: Ipv4Net) -> Result<bool, NetlinkError> {
        let request = RouteMessageBuilder::<Ipv4Addr>::new().build();
        let routes = self.list_routes(request).await?;
        let address = RouteAddress::Inet(subnet.network());
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
        IpNet::V6(subnet) => RouteMessageBuilder::<Ipv6Addr>::new()
            .destination_prefix(subnet.network(), subnet.prefix_len())
            .kind(RouteType::BlackHole)
            .protocol(RouteProtocol::Boot)
            .scope(RouteScope::Universe)
            .build(),
    }
}
