//! Routes to peers on the same link, over an interface that is not ours.

use std::{collections::BTreeMap, net::IpAddr};

use flannel_core::{
    addr::{Family, IfIndex},
    mark,
    plan::LinkRoute,
};
use futures_util::TryStreamExt as _;
use ipnet::IpNet;
use rtnetlink::packet_route::route::{
    RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteType,
};

use super::{
    Netlink, NetlinkError,
    family::{any_route, route_address, route_to, set_gateway},
    write::done,
};

/// Metric of a route of which nothing else was said: `IP6_RT_PRIO_USER`; IPv4 has none.
const METRIC_V6: u32 = 1024;

impl Netlink {
    /// The routes to subnets inside `network` that routes of ours would replace: those over the uplink, if it matters which there are,
    /// and what bears our mark anywhere.
    pub async fn link_routes(
        &self,
        network: IpNet,
        uplink: Option<IfIndex>,
    ) -> Result<BTreeMap<IpNet, LinkRoute>, NetlinkError> {
        let family = Family::of_net(&network);
        let mut found = BTreeMap::new();
        let over = uplink.map(|uplink| any_route(family).output_interface(uplink.get()).build());
        // Ours last: it is what we have to answer for.
        let ours = any_route(family).protocol(protocol()).build();
        for request in over.into_iter().chain([ours]) {
            let is_ours = request.header.protocol == protocol();
            for message in self.read_routes(request, network).await? {
                let read = link_route(&message, network);
                // Kernels without strict checking list them all.
                found.extend(
                    read.filter(|(_, route)| {
                        route.ours || !is_ours && Some(route.ifindex) == uplink
                    }),
                );
            }
        }
        Ok(found)
    }

    async fn read_routes(
        &self,
        request: RouteMessage,
        network: IpNet,
    ) -> Result<Vec<RouteMessage>, NetlinkError> {
        let _turn = self.turn().await;
        let routes = self.handle.route().get(request).execute();
        routes
            .try_collect()
            .await
            .map_err(|e| NetlinkError::new(format!("list routes inside {network}"), &e))
    }

    /// Creates or replaces the route to a peer on the link, in upstream's shape but for the protocol number.
    pub async fn put_link_route(
        &self,
        index: IfIndex,
        subnet: IpNet,
        gateway: IpAddr,
    ) -> Result<(), NetlinkError> {
        let request = self.handle.route().add(ours(index, subnet, gateway));
        done(request.replace().execute().await, &[], || {
            format!(
                "set route {subnet} via {gateway} on interface {}",
                index.get()
            )
        })
    }

    /// Deletes the route to a peer that was on the link. Only one that bears our mark is found.
    pub async fn del_link_route(
        &self,
        index: IfIndex,
        subnet: IpNet,
        gateway: IpAddr,
    ) -> Result<(), NetlinkError> {
        let request = self.handle.route().del(ours(index, subnet, gateway));
        done(
            request.execute().await,
            &[libc::ESRCH, libc::ENODEV],
            || {
                format!(
                    "delete route {subnet} via {gateway} on interface {}",
                    index.get()
                )
            },
        )
    }
}

fn protocol() -> RouteProtocol {
    RouteProtocol::from(mark::ROUTE_PROTOCOL)
}

fn ours(index: IfIndex, subnet: IpNet, gateway: IpAddr) -> RouteMessage {
    let builder = route_to(subnet).output_interface(index.get());
    let mut message = builder.protocol(protocol()).build();
    set_gateway(&mut message, gateway);
    message
}

/// What a route is to us; `None` for one that none of ours would replace.
fn link_route(message: &RouteMessage, network: IpNet) -> Option<(IpNet, LinkRoute)> {
    let (mut destination, mut gateway, mut oif, mut metric) = (None, None, None, None);
    let mut table = None;
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(address) => destination = route_address(address),
            RouteAttribute::Gateway(address) => gateway = route_address(address),
            RouteAttribute::Oif(index) => oif = Some(*index),
            RouteAttribute::Table(number) => table = Some(*number),
            RouteAttribute::Priority(number) => metric = Some(*number),
            _ => {}
        }
    }
    let table = table.unwrap_or(u32::from(message.header.table));
    let usual = match Family::of_net(&network) {
        Family::V4 => 0,
        Family::V6 => METRIC_V6,
    };
    let plain = message.header.kind == RouteType::Unicast
        && table == u32::from(RouteHeader::RT_TABLE_MAIN)
        && metric.unwrap_or(usual) == usual;
    let subnet = IpNet::new(destination?, message.header.destination_prefix_length).ok()?;
    if !plain || subnet == network || !network.contains(&subnet) {
        return None;
    }
    let route = LinkRoute {
        gateway: gateway?,
        ifindex: IfIndex::try_from(oif?).ok()?,
        ours: mark::is_our_route(u8::from(message.header.protocol)),
    };
    // What leads to a subnet over its own base address is the tunnel's, on whichever device.
    (route.gateway != subnet.network()).then_some((subnet, route))
}
