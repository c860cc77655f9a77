//! The device that makes room in front of what pods send (`flannel_core::headroom`).

use flannel_core::{
    addr::{IfIndex, Vni},
    headroom::{MAC, There, Wanted},
    mark,
};
use rtnetlink::{
    LinkVxlan,
    packet_route::link::{InfoData, InfoKind, InfoVxlan, LinkAttribute, LinkInfo, LinkMessage},
};

use super::{
    Netlink, NetlinkError,
    device::{index_of, mtu_of},
};

/// `GSO_LEGACY_MAX_SIZE` in `include/linux/netdevice.h`.
const LEGACY_MAX_SIZE: u32 = 65_536;

impl Netlink {
    /// Looks for the device. One of another kind or making that has its name is not seen.
    pub async fn headroom(&self, vni: Vni) -> Result<Option<There>, NetlinkError> {
        let name = mark::headroom_name(vni);
        let Some(link) = self.link_by_name(&name).await? else {
            return Ok(None);
        };
        let kind = match vxlan_id(&link) {
            Some(_) => mark::KIND_VXLAN,
            None => "",
        };
        if !mark::is_our_headroom(&name, kind, vxlan_id(&link), vni) {
            return Ok(None);
        }
        let bridge = link
            .attributes
            .iter()
            .find_map(|attribute| match attribute {
                LinkAttribute::Controller(index) => IfIndex::try_from(*index).ok(),
                _ => None,
            });
        Ok(Some(There {
            index: index_of(&link, &name)?,
            bridge,
            mtu: mtu_of(&link),
        }))
    }

    /// Whether an interface sends packets above 64 KiB (BIG TCP). A bridge with the device among its ports could not any more: it takes the
    /// smallest `tso_max_size` of them (`br_set_gso_limits` in `net/bridge/br_if.c`).
    pub async fn is_big_tcp(&self, index: IfIndex) -> Result<bool, NetlinkError> {
        let link = self.link_by_index(index.get()).await?;
        Ok(link.is_some_and(|link| {
            link.attributes.iter().any(|attribute| match attribute {
                LinkAttribute::GsoMaxSize(bytes) => *bytes > LEGACY_MAX_SIZE,
                _ => false,
            })
        }))
    }

    /// Makes the device: down, and a port of the bridge.
    pub async fn create_headroom(
        &self,
        vni: Vni,
        port: u16,
        wanted: Wanted,
    ) -> Result<(), NetlinkError> {
        let name = mark::headroom_name(vni);
        let message = LinkVxlan::new(&name, mark::headroom_vni(vni))
            .port(port)
            .learning(false)
            .mtu(wanted.mtu)
            .address(MAC.to_vec())
            .controller(wanted.bridge.get())
            .build();
        self.handle
            .link()
            .add(message)
            .execute()
            .await
            .map_err(|error| {
                NetlinkError::new(
                    format!(
                        "create {name} as a port of interface {}",
                        wanted.bridge.get()
                    ),
                    &error,
                )
            })
    }
}

fn vxlan_id(link: &LinkMessage) -> Option<u32> {
    let infos = link
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::LinkInfo(infos) => Some(infos),
            _ => None,
        })?;
    if !infos.contains(&LinkInfo::Kind(InfoKind::Vxlan)) {
        return None;
    }
    infos.iter().find_map(|info| match info {
        LinkInfo::Data(InfoData::Vxlan(data)) => data.iter().find_map(|data| match data {
            InfoVxlan::Id(id) => Some(*id),
            _ => None,
        }),
        _ => None,
    })
}
