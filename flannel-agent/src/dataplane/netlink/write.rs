//! Single changes. Each is idempotent: done already is done.

use std::net::{IpAddr, Ipv4Addr};

use flannel_core::{
    addr::{IfIndex, Mtu, VtepMac},
    plan::{DeviceKind, Tunnel},
};
use ipnet::{IpNet, Ipv4Net};
use rtnetlink::{
    Error as RtError, LinkMessageBuilder, LinkUnspec, LinkVeth, LinkVxlan, RouteMessageBuilder,
    packet_route::{
        AddressFamily,
        address::{AddressAttribute, AddressMessage},
        neighbour::{
            NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
        },
        route::{RouteAttribute, RouteMessage, RouteMetric, RouteProtocol},
    },
};

use super::{Netlink, NetlinkError, device::index_of};

impl Netlink {
    /// Creates the tunnel device, down. `File exists` is an error here: the planner saw no device of that name, so it is
    /// another device with the same VNI and port, or a race that the next pass sorts out.
    pub async fn create_device(&self, tunnel: &Tunnel) -> Result<(), NetlinkError> {
        let name = &tunnel.name;
        let message = match &tunnel.kind {
            DeviceKind::Vxlan {
                vni,
                port,
                lower,
                local,
                learning,
                gbp,
            } => {
                let mut builder = LinkVxlan::new(name, vni.get())
                    .dev(lower.get())
                    .port(*port)
                    .local(*local)
                    .learning(*learning)
                    // As upstream makes it. The device has no queue.
                    .txqueuelen(0)
                    .mtu(tunnel.mtu.get());
                if *gbp {
                    builder = builder.gbp();
                }
                if let Some(mac) = tunnel.mac {
                    builder = builder.address(mac.octets().to_vec());
                }
                builder.build()
            }
            DeviceKind::Veth { peer } => {
                let mut builder = LinkVeth::new(name, peer).mtu(tunnel.mtu.get());
                if let Some(mac) = tunnel.mac {
                    builder = builder.address(mac.octets().to_vec());
                }
                builder.build()
            }
        };
        let what = || match &tunnel.kind {
            DeviceKind::Vxlan { vni, port, .. } => {
                format!(
                    "create vxlan device {name} (VNI {}, port {port})",
                    vni.get()
                )
            }
            DeviceKind::Veth { peer } => format!("create veth pair {name}, {peer}"),
        };
        self.handle
            .link()
            .add(message)
            .execute()
            .await
            .map_err(|e| NetlinkError::new(what(), &e))?;
        // As upstream does: the overlay has no router to listen to. Without IPv6 there is no such file.
        let _unavailable = std::fs::write(format!("/proc/sys/net/ipv6/conf/{name}/accept_ra"), "0");
        Ok(())
    }

    /// Deletes an interface.
    pub async fn delete_device(&self, index: IfIndex) -> Result<(), NetlinkError> {
        done(
            self.handle.link().del(index.get()).execute().await,
            &[libc::ENODEV],
            || format!("delete interface {}", index.get()),
        )
    }

    /// Sets an interface's MTU in bytes.
    pub async fn set_mtu(&self, index: IfIndex, mtu: Mtu) -> Result<(), NetlinkError> {
        let message = LinkMessageBuilder::<LinkUnspec>::new()
            .index(index.get())
            .mtu(mtu.get())
            .build();
        done(self.handle.link().set(message).execute().await, &[], || {
            format!("set MTU {} on interface {}", mtu.get(), index.get())
        })
    }

    /// Sets an interface's MAC address.
    pub async fn set_mac(&self, index: IfIndex, mac: VtepMac) -> Result<(), NetlinkError> {
        let message = LinkMessageBuilder::<LinkUnspec>::new()
            .index(index.get())
            .address(mac.octets().to_vec())
            .build();
        done(self.handle.link().set(message).execute().await, &[], || {
            format!("set MAC {mac} on interface {}", index.get())
        })
    }

    /// Sets an interface up, and with a veth pair the other end too.
    pub async fn set_up(&self, index: IfIndex, kind: &DeviceKind) -> Result<(), NetlinkError> {
        if let DeviceKind::Veth { peer } = kind
            && let Some(link) = self.link_by_name(peer).await?
        {
            self.up(index_of(&link, peer)?).await?;
        }
        self.up(index).await
    }

    /// Sets an interface up.
    pub(crate) async fn up(&self, index: IfIndex) -> Result<(), NetlinkError> {
        let message = LinkMessageBuilder::<LinkUnspec>::new()
            .index(index.get())
            .up()
            .build();
        done(self.handle.link().set(message).execute().await, &[], || {
            format!("set interface {} up", index.get())
        })
    }

    /// Adds an address, without a broadcast address: `/32` has none.
    pub async fn put_address(&self, index: IfIndex, address: Ipv4Net) -> Result<(), NetlinkError> {
        let mut request = self.handle.address().add(
            index.get(),
            IpAddr::V4(address.addr()),
            address.prefix_len(),
        );
        request
            .message_mut()
            .attributes
            .retain(|attribute| !matches!(attribute, AddressAttribute::Broadcast(_)));
        done(request.execute().await, &[libc::EEXIST], || {
            format!("add address {address} to interface {}", index.get())
        })
    }

    /// Removes an address.
    pub async fn del_address(&self, index: IfIndex, address: Ipv4Net) -> Result<(), NetlinkError> {
        let mut message = AddressMessage::default();
        message.header.family = AddressFamily::Inet;
        message.header.index = index.get();
        message.header.prefix_len = address.prefix_len();
        message
            .attributes
            .push(AddressAttribute::Local(IpAddr::V4(address.addr())));
        done(
            self.handle.address().del(message).execute().await,
            &[libc::EADDRNOTAVAIL, libc::ENODEV],
            || format!("remove address {address} from interface {}", index.get()),
        )
    }

    /// Creates or replaces a forwarding entry of the vxlan device.
    pub async fn put_fdb(
        &self,
        index: IfIndex,
        mac: VtepMac,
        vtep: IpAddr,
    ) -> Result<(), NetlinkError> {
        let request = self
            .handle
            .neighbours()
            .add_bridge(index.get(), &mac.octets())
            .destination(vtep)
            .flags(NeighbourFlags::Own)
            .state(NeighbourState::Permanent)
            .replace();
        done(request.execute().await, &[], || {
            format!("set forwarding entry {mac} dst {vtep}")
        })
    }

    /// Deletes a forwarding entry.
    pub async fn del_fdb(
        &self,
        index: IfIndex,
        mac: VtepMac,
        vtep: IpAddr,
    ) -> Result<(), NetlinkError> {
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::Bridge;
        message.header.ifindex = index.get();
        message.header.flags = NeighbourFlags::Own;
        message.header.state = NeighbourState::Permanent;
        message
            .attributes
            .push(NeighbourAttribute::LinkLayerAddress(mac.octets().to_vec()));
        message
            .attributes
            .push(NeighbourAttribute::Destination(neighbour_address(vtep)));
        done(
            self.handle.neighbours().del(message).execute().await,
            &[libc::ENOENT, libc::ENODEV],
            || format!("delete forwarding entry {mac} dst {vtep}"),
        )
    }

    /// Creates or replaces a permanent neighbour.
    pub async fn put_neighbour(
        &self,
        index: IfIndex,
        address: IpAddr,
        mac: VtepMac,
    ) -> Result<(), NetlinkError> {
        let request = self
            .handle
            .neighbours()
            .add(index.get(), address)
            .link_layer_address(&mac.octets())
            .state(NeighbourState::Permanent)
            .replace();
        done(request.execute().await, &[], || {
            format!("set neighbour {address} lladdr {mac}")
        })
    }

    /// Deletes a neighbour.
    pub async fn del_neighbour(&self, index: IfIndex, address: IpAddr) -> Result<(), NetlinkError> {
        let mut message = NeighbourMessage::default();
        message.header.family = match address {
            IpAddr::V4(_) => AddressFamily::Inet,
            IpAddr::V6(_) => AddressFamily::Inet6,
        };
        message.header.ifindex = index.get();
        message
            .attributes
            .push(NeighbourAttribute::Destination(neighbour_address(address)));
        done(
            self.handle.neighbours().del(message).execute().await,
            &[libc::ENOENT, libc::ENODEV],
            || format!("delete neighbour {address}"),
        )
    }

    /// Creates or replaces a peer's route, in upstream's shape: `<subnet> via <base> dev flannel.1 onlink`, protocol boot.
    pub async fn put_route(
        &self,
        index: IfIndex,
        subnet: IpNet,
        gateway: IpAddr,
        mtu: Option<u32>,
    ) -> Result<(), NetlinkError> {
        let (IpNet::V4(subnet), IpAddr::V4(gateway)) = (subnet, gateway) else {
            return Err(NetlinkError::Unexpected {
                what: format!("set route {subnet} via {gateway}"),
                reason: "IPv6 routes are not supported yet".into(),
            });
        };
        let mut message = route(index, subnet).gateway(gateway).onlink().build();
        if let Some(mtu) = mtu {
            message
                .attributes
                .push(RouteAttribute::Metrics(vec![RouteMetric::Mtu(mtu)]));
        }
        done(
            self.handle.route().add(message).replace().execute().await,
            &[],
            || format!("set route {subnet} via {gateway}"),
        )
    }

    /// Deletes a peer's route.
    pub async fn del_route(&self, index: IfIndex, subnet: IpNet) -> Result<(), NetlinkError> {
        let IpNet::V4(subnet) = subnet else {
            return Ok(());
        };
        // Whatever protocol number it carries: the shape made it ours.
        let message: RouteMessage = route(index, subnet)
            .gateway(subnet.network())
            .onlink()
            .protocol(RouteProtocol::Unspec)
            .build();
        done(
            self.handle.route().del(message).execute().await,
            &[libc::ESRCH, libc::ENODEV],
            || format!("delete route {subnet}"),
        )
    }
}

fn route(index: IfIndex, subnet: Ipv4Net) -> RouteMessageBuilder<Ipv4Addr> {
    RouteMessageBuilder::<Ipv4Addr>::new()
        .destination_prefix(subnet.network(), subnet.prefix_len())
        .output_interface(index.get())
        .protocol(RouteProtocol::Boot)
}

fn neighbour_address(ip: IpAddr) -> NeighbourAddress {
    match ip {
        IpAddr::V4(ip) => NeighbourAddress::Inet(ip),
        IpAddr::V6(ip) => NeighbourAddress::Inet6(ip),
    }
}

/// Success, or an errno that means "already so".
fn done(
    answer: Result<(), RtError>,
    fine: &[i32],
    what: impl FnOnce() -> String,
) -> Result<(), NetlinkError> {
    match answer {
        Ok(()) => Ok(()),
        Err(RtError::NetlinkError(message)) if fine.contains(&-message.raw_code()) => Ok(()),
        Err(error) => Err(NetlinkError::new(what(), &error)),
    }
}
