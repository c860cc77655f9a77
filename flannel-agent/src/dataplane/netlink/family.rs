//! What of netlink's messages depends on the address family.

use std::net::IpAddr;

use flannel_core::addr::Family;
use ipnet::IpNet;
use rtnetlink::{
    RouteMessageBuilder,
    packet_route::{
        AddressFamily,
        address::{AddressAttribute, AddressMessage},
        route::{RouteAddress, RouteAttribute, RouteMessage},
    },
};

/// The kernel's name for it.
pub(super) const fn address_family(family: Family) -> AddressFamily {
    match family {
        Family::V4 => AddressFamily::Inet,
        Family::V6 => AddressFamily::Inet6,
    }
}

/// A route message of that family that names nothing yet.
pub(super) fn any_route(family: Family) -> RouteMessageBuilder<IpAddr> {
    let mut builder = RouteMessageBuilder::<IpAddr>::new();
    builder.get_mut().header.address_family = address_family(family);
    builder
}

/// A route message about that destination.
pub(super) fn route_to(destination: IpNet) -> RouteMessageBuilder<IpAddr> {
    let mut builder = any_route(Family::of_net(&destination));
    let message = builder.get_mut();
    message.header.destination_prefix_length = destination.prefix_len();
    let address = as_route_address(destination.network());
    message
        .attributes
        .push(RouteAttribute::Destination(address));
    builder
}

/// Names the gateway of a route.
pub(super) fn set_gateway(message: &mut RouteMessage, gateway: IpAddr) {
    let address = as_route_address(gateway);
    message.attributes.push(RouteAttribute::Gateway(address));
}

/// An address as routes have it.
pub(super) const fn as_route_address(address: IpAddr) -> RouteAddress {
    match address {
        IpAddr::V4(address) => RouteAddress::Inet(address),
        IpAddr::V6(address) => RouteAddress::Inet6(address),
    }
}

/// An address of a route; `None` where it is none of IP.
pub(super) const fn route_address(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some(IpAddr::V4(*address)),
        RouteAddress::Inet6(address) => Some(IpAddr::V6(*address)),
        _ => None,
    }
}

/// The node's own address in a message about one.
pub(crate) fn own_address(message: &AddressMessage) -> Option<IpAddr> {
    let (mut address, mut local) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Address(ip) => address = Some(*ip),
            AddressAttribute::Local(ip) => local = Some(*ip),
            _ => {}
        }
    }
    // Without another end the kernel does not say of an IPv6 address that it is the local one.
    local.or(address)
}
