//! Devices that carry IP and nothing below it, and the routes that lead straight to them.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use flannel_core::{
    addr::{Family, IfIndex, Mtu},
    wireguard::Device,
};
use futures_util::TryStreamExt as _;
use ipnet::IpNet;
use rtnetlink::{
    LinkWireguard, RouteMessageBuilder,
    packet_route::{
        address::{AddressAttribute, AddressMessage, AddressScope},
        link::LinkFlags,
        route::{
            RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope,
        },
    },
};

use super::{
    Netlink, NetlinkError,
    device::{index_of, mtu_of},
    family::{address_family, own_address},
    underlay::kind_of,
    write::done,
};

impl Netlink {
    /// Reads the device of that name, but for what WireGuard says of it; `None` if there is none.
    pub(crate) async fn plain_device(&self, name: &str) -> Result<Option<Device>, NetlinkError> {
        let Some(link) = self.link_by_name(name).await? else {
            return Ok(None);
        };
        let index = index_of(&link, name)?;
        Ok(Some(Device {
            index,
            kind: kind_of(&link).unwrap_or_default(),
            mtu: mtu_of(&link),
            up: link.header.flags.contains(LinkFlags::Up),
            addresses: self.all_addresses(index).await?,
            routes: self.straight_routes(index).await?,
            inner: None,
        }))
    }

    /// Creates a wireguard device, down.
    pub(crate) async fn create_wireguard(&self, name: &str, mtu: Mtu) -> Result<(), NetlinkError> {
        let message = LinkWireguard::new(name).mtu(mtu.get()).build();
        let made = self.handle().link().add(message).execute().await;
        made.map_err(|e| NetlinkError::new(format!("create wireguard device {name}"), &e))
    }

    async fn all_addresses(&self, index: IfIndex) -> Result<BTreeSet<IpNet>, NetlinkError> {
        let handle = self.handle().address();
        let request = handle.get().set_link_index_filter(index.get());
        let _turn = self.turn().await;
        let messages: Vec<AddressMessage> = request.execute().try_collect().await.map_err(|e| {
            NetlinkError::new(format!("list addresses of interface {}", index.get()), &e)
        })?;
        let ours = messages.iter().filter(|message| {
            message.header.index == index.get() && message.header.scope != AddressScope::Link
        });
        Ok(ours.filter_map(address_of).collect())
    }

    /// Destinations of the routes of the main table that lead to an interface without a gateway.
    async fn straight_routes(&self, index: IfIndex) -> Result<BTreeSet<IpNet>, NetlinkError> {
        let v4 = RouteMessageBuilder::<Ipv4Addr>::new().build();
        let v6 = RouteMessageBuilder::<Ipv6Addr>::new().build();
        let mut found = BTreeSet::new();
        for request in [v4, v6] {
            let routes = self.list_routes(request).await?;
            found.extend(routes.iter().filter_map(|route| straight(route, index)));
        }
        Ok(found)
    }

    /// Adds an address of either family, without a broadcast address.
    pub(crate) async fn put_plain_address(
        &self,
        index: IfIndex,
        address: IpNet,
    ) -> Result<(), NetlinkError> {
        let handle = self.handle().address();
        let mut request = handle.add(index.get(), address.addr(), address.prefix_len());
        let attributes = &mut request.message_mut().attributes;
        attributes.retain(|attribute| !matches!(attribute, AddressAttribute::Broadcast(_)));
        done(request.execute().await, &[libc::EEXIST], || {
            format!("add address {address} to interface {}", index.get())
        })
    }

    /// Removes an address of either family.
    pub(crate) async fn del_plain_address(
        &self,
        index: IfIndex,
        address: IpNet,
    ) -> Result<(), NetlinkError> {
        let mut message = AddressMessage::default();
        message.header.index = index.get();
        message.header.prefix_len = address.prefix_len();
        message.header.family = address_family(Family::of_net(&address));
        let attribute = AddressAttribute::Local(address.addr());
        message.attributes.push(attribute);
        let answer = self.handle().address().del(message).execute().await;
        done(answer, &[libc::EADDRNOTAVAIL, libc::ENODEV], || {
            format!("remove address {address} from interface {}", index.get())
        })
    }

    /// Leads a network to an interface, in upstream's shape: scope link, protocol boot. A route of the same network over another
    /// interface is left alone, and is an error.
    pub(crate) async fn put_straight_route(
        &self,
        index: IfIndex,
        network: IpNet,
    ) -> Result<(), NetlinkError> {
        let message = route(index, network, RouteProtocol::Boot);
        let what = || format!("set route {network} dev {}", index.get());
        match self.handle().route().add(message).execute().await {
            Err(error) if NetlinkError::new("", &error).errno() == Some(libc::EEXIST) => {
                if self.straight_routes(index).await?.contains(&network) {
                    return Ok(());
                }
                Err(NetlinkError::Unexpected {
                    what: what(),
                    reason:
                        "there is a route to the same network over another interface: remove it"
                            .into(),
                })
            }
            answer => done(answer, &[], what),
        }
    }

    /// Removes such a route.
    pub(crate) async fn del_straight_route(
        &self,
        index: IfIndex,
        network: IpNet,
    ) -> Result<(), NetlinkError> {
        let message = route(index, network, RouteProtocol::Unspec);
        let answer = self.handle().route().del(message).execute().await;
        done(answer, &[libc::ESRCH, libc::ENODEV], || {
            format!("delete route {network} dev {}", index.get())
        })
    }
}

fn route(index: IfIndex, network: IpNet, protocol: RouteProtocol) -> RouteMessage {
    match network {
        IpNet::V4(network) => RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(network.network(), network.prefix_len())
            .output_interface(index.get())
            .scope(RouteScope::Link)
            .protocol(protocol)
            .build(),
        IpNet::V6(network) => RouteMessageBuilder::<Ipv6Addr>::new()
            .destination_prefix(network.network(), network.prefix_len())
            .output_interface(index.get())
            .protocol(protocol)
            .build(),
    }
}

fn address_of(message: &AddressMessage) -> Option<IpNet> {
    IpNet::new(own_address(message)?, message.header.prefix_len).ok()
}

fn straight(message: &RouteMessage, index: IfIndex) -> Option<IpNet> {
    let (mut destination, mut oif, mut table) = (None, None, None);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(ip)) => {
                destination = Some(IpAddr::V4(*ip));
            }
            RouteAttribute::Destination(RouteAddress::Inet6(ip)) => {
                destination = Some(IpAddr::V6(*ip));
            }
            RouteAttribute::Gateway(_) | RouteAttribute::Via(_) => return None,
            RouteAttribute::Oif(index) => oif = Some(*index),
            RouteAttribute::Table(number) => table = Some(*number),
            _ => {}
        }
    }
    let table = table.unwrap_or(u32::from(message.header.table));
    if table != u32::from(RouteHeader::RT_TABLE_MAIN) || oif != Some(index.get()) {
        return None;
    }
    IpNet::new(destination?, message.header.destination_prefix_length).ok()
}
