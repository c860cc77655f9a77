//! Furniture of a network namespace that is there for an attempt and gone with it.

use std::{
    net::{IpAddr, Ipv4Addr},
    os::fd::RawFd,
};

use flannel_core::{
    addr::{IfIndex, VtepMac},
    mark,
};
use futures_util::StreamExt as _;
use rtnetlink::{
    Error as RtError, LinkMessageBuilder, LinkUnspec, LinkVeth, LinkVxlan,
    packet_core::{
        NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
    },
    packet_route::{
        RouteNetlinkMessage,
        link::{InfoData, InfoKind, InfoVeth},
        tc::{TcAttribute, TcBpfFlags, TcFilterBpfOption, TcHandle, TcMessage, TcOption},
    },
};

use super::{Netlink, NetlinkError};

/// The near end's address, of the range kept for measurements (RFC 2544), and its prefix length.
const NEAR: (Ipv4Addr, u8) = (Ipv4Addr::new(198, 18, 0, 1), 30);
/// A neighbour behind it.
const NEIGHBOUR: (Ipv4Addr, [u8; 6]) = (Ipv4Addr::new(198, 18, 0, 2), [2, 0, 0, 0, 0, 9]);
/// Of a tunnel to that neighbour: another than that of the device which is only tried.
const TUNNEL_VNI: u32 = 2;
/// Its UDP destination port.
pub(crate) const TUNNEL_PORT: u16 = 8472;
/// `ETH_P_ALL`.
const ANY_PROTOCOL: u16 = 3;

impl Netlink {
    /// Makes a veth pair, the far end in another namespace and under the same name, and sets the near end up. Gives that.
    pub(crate) async fn make_pair(&self, name: &str, far: RawFd) -> Result<IfIndex, NetlinkError> {
        let peer = LinkUnspec::new_with_name(name).setns_by_fd(far).build();
        let pair = LinkMessageBuilder::<LinkVeth>::new_with_info_kind(InfoKind::Veth)
            .name(name)
            .set_info_data(InfoData::Veth(InfoVeth::Peer(peer)))
            .up()
            .build();
        let made = self.handle.link().add(pair).execute().await;
        made.map_err(|error| NetlinkError::new("create a veth pair", &error))?;
        self.index(name)
            .await?
            .ok_or_else(|| NetlinkError::Unexpected {
                what: "create a veth pair".into(),
                reason: "it is not there".into(),
            })
    }

    /// Gives the near end an address and a neighbour.
    pub(crate) async fn furnish(&self, near: IfIndex) -> Result<(), NetlinkError> {
        let (address, prefix) = NEAR;
        let add = self
            .handle
            .address()
            .add(near.get(), IpAddr::V4(address), prefix);
        let added = add.execute().await;
        added.map_err(|error| NetlinkError::new("add an address", &error))?;
        let (neighbour, mac) = NEIGHBOUR;
        let mac = VtepMac::from(mac);
        self.put_neighbour(near, IpAddr::V4(neighbour), mac).await
    }

    /// Makes a vxlan device that sends everything to the neighbour, from these ports, and sets it up.
    pub(crate) async fn make_tunnel(
        &self,
        name: &str,
        near: IfIndex,
        ports: (u16, u16),
    ) -> Result<IfIndex, NetlinkError> {
        let (address, _) = NEAR;
        let (neighbour, _) = NEIGHBOUR;
        let tunnel = LinkVxlan::new(name, TUNNEL_VNI)
            .dev(near.get())
            .local(address)
            .remote(neighbour)
            .port(TUNNEL_PORT)
            .port_range(ports.0, ports.1)
            .up()
            .build();
        let made = self.handle.link().add(tunnel).execute().await;
        made.map_err(|error| NetlinkError::new("create a vxlan device", &error))?;
        self.index(name)
            .await?
            .ok_or_else(|| NetlinkError::Unexpected {
                what: "create a vxlan device".into(),
                reason: "it is not there".into(),
            })
    }

    /// Hangs a program at the ingress of an interface that has no clsact qdisc yet.
    pub(crate) async fn add_filter(
        &self,
        index: IfIndex,
        program: RawFd,
    ) -> Result<(), NetlinkError> {
        let ifindex = index.get().cast_signed();
        let mut message = TcMessage::with_index(ifindex);
        message.header.parent = TcHandle::CLSACT;
        message.header.handle = TcHandle::from(0xffff_0000);
        message.attributes = vec![TcAttribute::Kind("clsact".into())];
        self.create(RouteNetlinkMessage::NewQueueDiscipline(message))
            .await
            .map_err(|error| NetlinkError::new("add a clsact qdisc", &error))?;
        let mut message = TcMessage::with_index(ifindex);
        message.header.parent = TcHandle {
            major: 0xffff,
            minor: TcHandle::MIN_INGRESS,
        };
        message.header.info = u32::from(TcHandle {
            major: mark::TC_PRIORITY,
            minor: ANY_PROTOCOL.to_be(),
        });
        message.attributes = vec![
            TcAttribute::Kind(mark::TC_KIND.into()),
            TcAttribute::Options(vec![
                TcOption::Bpf(TcFilterBpfOption::ProgFd(program.cast_unsigned())),
                TcOption::Bpf(TcFilterBpfOption::ProgName("flannel-try".into())),
                TcOption::Bpf(TcFilterBpfOption::Flags(TcBpfFlags::DirectAction)),
            ]),
        ];
        self.create(RouteNetlinkMessage::NewTrafficFilter(message))
            .await
            .map_err(|error| NetlinkError::new("add a filter with an eBPF program", &error))
    }

    async fn create(&self, message: RouteNetlinkMessage) -> Result<(), RtError> {
        let mut request = NetlinkMessage::from(message);
        request.header.flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL;
        let mut answers = self.handle.clone().request(request)?;
        while let Some(answer) = answers.next().await {
            if let NetlinkPayload::Error(error) = answer.payload
                && error.code.is_some()
            {
                return Err(RtError::NetlinkError(error));
            }
        }
        Ok(())
    }
}
