//! All interfaces of the namespace at once, for `check`.

use std::{collections::BTreeMap, net::Ipv4Addr};

use flannel_core::{
    addr::Family,
    check::{Bridge, OtherVxlan},
    config::DEFAULT_PORT,
};
use rtnetlink::{
    LinkVxlan, RouteMessageBuilder,
    packet_route::{
        link::{InfoData, InfoVxlan, LinkAttribute, LinkInfo, LinkMessage},
        route::{RouteAttribute, RouteHeader},
    },
};

use super::{
    Netlink, NetlinkError,
    device::{index_of, mtu_of, name_of},
};

/// What `check` needs of interfaces and routes beyond the tunnel's own.
#[derive(Debug, Default)]
pub struct Survey {
    /// All vxlan devices.
    pub vxlans: Vec<OtherVxlan>,
    /// The pods' bridge.
    pub bridge: Option<Bridge>,
    /// IPv4 default routes of the main table: interface and metric, best first.
    pub defaults: Vec<(String, u32)>,
}

impl Netlink {
    /// Looks at all interfaces. `bridge` is the name of the pods' bridge.
    pub async fn survey(&self, bridge: &str) -> Result<Survey, NetlinkError> {
        let links = self.list_links().await?;
        let mut survey = Survey::default();
        let mut names = BTreeMap::new();
        for link in &links {
            let Some(name) = name_of(link) else { continue };
            names.insert(link.header.index, name.clone());
            survey.vxlans.extend(vxlan(link, &name));
            if name == bridge {
                let index = index_of(link, &name)?;
                survey.bridge = Some(Bridge {
                    name,
                    mtu: mtu_of(link),
                    addresses: {
                        let mut all = self.addresses(index, Family::V4).await?;
                        all.extend(self.addresses(index, Family::V6).await?);
                        all.into_iter().collect()
                    },
                    ports: links
                        .iter()
                        .filter(|port| {
                            controller(port) == Some(index.get()) && vxlan(port, "").is_none()
                        })
                        .filter_map(|port| Some((name_of(port)?, mtu_of(port))))
                        .collect(),
                });
            }
        }
        survey.defaults = self.default_routes(&names).await?;
        Ok(survey)
    }

    /// Makes a vxlan device, for a namespace that is about to end.
    pub async fn try_vxlan(&self, name: &str) -> Result<(), NetlinkError> {
        let message = LinkVxlan::new(name, 1).port(DEFAULT_PORT).build();
        let made = self.handle.link().add(message).execute().await;
        made.map_err(|e| NetlinkError::new("create a vxlan device", &e))
    }

    async fn default_routes(
        &self,
        names: &BTreeMap<u32, String>,
    ) -> Result<Vec<(String, u32)>, NetlinkError> {
        let request = RouteMessageBuilder::<Ipv4Addr>::new().build();
        let routes = self.list_routes(request).await?;
        let mut found: Vec<(u32, String)> = routes
            .iter()
            .filter(|route| {
                route.header.destination_prefix_length == 0
                    && route.header.table == RouteHeader::RT_TABLE_MAIN
            })
            .filter_map(|route| {
                let mut interface = None;
                let mut metric = 0;
                for attribute in &route.attributes {
                    match attribute {
                        RouteAttribute::Oif(index) => interface = names.get(index).cloned(),
                        RouteAttribute::Priority(priority) => metric = *priority,
                        _ => {}
                    }
                }
                Some((metric, interface?))
            })
            .collect();
        found.sort();
        Ok(found
            .into_iter()
            .map(|(metric, name)| (name, metric))
            .collect())
    }
}

/// What a vxlan device asks of its port.
fn vxlan(link: &LinkMessage, name: &str) -> Option<OtherVxlan> {
    let infos = link
        .attributes
        .iter()
        .filter_map(|attribute| match attribute {
            LinkAttribute::LinkInfo(infos) => Some(infos),
            _ => None,
        });
    let data = infos.flatten().find_map(|info| match info {
        LinkInfo::Data(InfoData::Vxlan(data)) => Some(data),
        _ => None,
    })?;
    let mut found = OtherVxlan {
        name: name.to_owned(),
        vni: 0,
        port: 0,
        external: false,
    };
    for attribute in data {
        match attribute {
            InfoVxlan::Id(vni) => found.vni = *vni,
            InfoVxlan::Port(port) => found.port = *port,
            InfoVxlan::CollectMetadata(external) => found.external = *external,
            // Over IPv6 it has another socket.
            InfoVxlan::Local6(_) | InfoVxlan::Group6(_) => return None,
            _ => {}
        }
    }
    Some(found)
}

/// The bridge or bond that an interface is a port of.
fn controller(link: &LinkMessage) -> Option<u32> {
    link.attributes
        .iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::Controller(index) => Some(*index),
            _ => None,
        })
}
