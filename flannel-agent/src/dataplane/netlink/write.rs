//! Single changes. Each is idempotent: done already is done.

use std::net::IpAddr;

use flannel_core::{
    addr::{Family, IfIndex, Mtu, VtepMac},
    plan::{DeviceKind, Tunnel},
};
use ipnet::IpNet;
use rtnetlink::{
    Error as RtError, LinkMessageBuilder, LinkUnspec, LinkVeth, LinkVxlan, RouteMessageBuilder,
    packet_route::{
        AddressFamily,
        address::{AddressAttribute, AddressFlags, AddressMessage},
        neighbour::{
            NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
        },
        route::{RouteAttribute, RouteMetric, RouteProtocol},
    },
};

use super::{
    Netlink, NetlinkError,
    device::index_of,
    family::{address_family, route_to, set_gateway},
};

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
                    .learning(*learning)
                    // As upstream makes it. The device has no queue.
                    .txqueuelen(0)
                    .mtu(tunnel.mtu.get());
                builder = match local {
                    IpAddr::V4(local) => builder.local(*local),
                    IpAddr::V6(local) => builder.local6(*local),
                };
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
        if let DeviceKind::Veth { peer } = &tunnel.kind {
            self.set_mtu_of(peer, tunnel.mtu).await?;
        }
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

    /// Sets the MTU in bytes of the interface of that name, such as the other end of a pair, which takes no more than its own.
    pub async fn set_mtu_of(&self, name: &str, mtu: Mtu) -> Result<(), NetlinkError> {
        match self.index(name).await? {
            Some(index) => self.set_mtu(index, mtu).await,
            None => Ok(()),
        }
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
    pub async fn put_address(&self, index: IfIndex, address: IpNet) -> Result<(), NetlinkError> {
        let mut request =
            self.handle
                .address()
                .add(index.get(), address.addr(), address.prefix_len());
        if address.addr().is_ipv6() {
            // Nobody else can have it, and until the kernel had found that out it would be of no use.
            let flags = AddressAttribute::Flags(AddressFlags::Nodad);
            request.message_mut().attributes.push(flags);
        }
        request
            .message_mut()
            .attributes
            .retain(|attribute| !matches!(attribute, AddressAttribute::Broadcast(_)));
        done(request.execute().await, &[libc::EEXIST], || {
            format!("add address {address} to interface {}", index.get())
        })
    }

    /// Removes an address.
    pub async fn del_address(&self, index: IfIndex, address: IpNet) -> Result<(), NetlinkError> {
        let mut message = AddressMessage::default();
        message.header.family = address_family(Family::of_net(&address));
        message.header.index = index.get();
        message.header.prefix_len = address.prefix_len();
        message
            .attributes
            .push(AddressAttribute::Local(address.addr()));
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
        message.header.family = address_family(Family::of(address));
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
        let mut message = route(index, subnet).onlink().build();
        set_gateway(&mut message, gateway);
        if let Some(mtu) = mtu {
            message
                .attributes
                .push(RouteAttribute::Metrics(vec![RouteMetric::Mtu(mtu)]));
        }
        let what = || format!("set route {subnet} via {gateway}");
        let put = async || {
            let request = self.handle.route().add(message.clone()).replace();
            done(request.execute().await, &[], what)
        };
        match put().await {
            // A gateway of IPv6 that another device has a way to is refused (`ip6_route_check_nh_onlink`), such as one that was routed to
            // so far. With a way of its own to the gateway the device may have the route, and the other's is replaced without a gap.
            Err(error) if gateway.is_ipv6() && error.errno() == Some(libc::EINVAL) => {
                let host = route(index, IpNet::from(gateway)).build();
                let way = || format!("set a way to {gateway} for a moment");
                let request = self.handle.route().add(host.clone()).replace();
                done(request.execute().await, &[], way)?;
                let outcome = put().await;
                let gone = self.handle.route().del(host).execute().await;
                done(gone, &[libc::ESRCH, libc::ENODEV], way)?;
                outcome
            }
            outcome => outcome,
        }
    }

    /// Deletes a peer's route.
    pub async fn del_route(&self, index: IfIndex, subnet: IpNet) -> Result<(), NetlinkError> {
        // Whatever protocol number it carries: the shape made it ours.
        let mut message = route(index, subnet)
            .onlink()
            .protocol(RouteProtocol::Unspec)
            .build();
        set_gateway(&mut message, subnet.network());
        done(
            self.handle.route().del(message).execute().await,
            &[libc::ESRCH, libc::ENODEV],
            || format!("delete route {subnet}"),
        )
    }
}

fn route(index: IfIndex, subnet: IpNet) -> RouteMessageBuilder<IpAddr> {
    route_to(subnet)
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
pub(super) fn done(
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
