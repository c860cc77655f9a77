//! Traffic control on the devices that packets between pods pass.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use aya::programs::{SchedClassifier, TcAttachType};
use flannel_core::{
    addr::{Family, IfIndex},
    fastpath::devices::{Device, Filter, Role},
    mark,
    plan::Hook,
};
use futures_util::TryStreamExt as _;
use ipnet::IpNet;
use rtnetlink::{
    Handle,
    packet_route::{
        link::{InfoKind, LinkAttribute, LinkInfo},
        tc::{TcAttribute, TcFilterBpfOption, TcMessage, TcOption},
    },
};

use crate::dataplane::netlink::own_address;

/// `TCA_BPF_FLAG_ACT_DIRECT` in `include/uapi/linux/pkt_cls.h`.
const DIRECT_ACTION: u32 = 1;

/// Looks at the devices of pods, their bridges (those with an address of the cluster network) and the tunnel device, and lists the
/// node's own addresses of that network's family. What cannot be read of a device is said there.
pub(super) async fn look(
    handle: &Handle,
    network: IpNet,
    tunnel: &str,
    pods: &BTreeSet<IfIndex>,
) -> Result<(BTreeMap<IfIndex, Device>, BTreeSet<IpAddr>), String> {
    let addresses = addresses(handle, Family::of_net(&network)).await?;
    let bridges = addresses
        .iter()
        .filter(|(_, address)| network.contains(address))
        .map(|(index, _)| *index)
        .collect();
    let mut devices = named(handle, &bridges, tunnel, pods).await?;
    let qdiscs = handle.qdisc().get().execute();
    let qdiscs: Vec<TcMessage> = qdiscs
        .try_collect()
        .await
        .map_err(|error| format!("list qdiscs: {error}"))?;
    for qdisc in &qdiscs {
        let device = index_of(qdisc).and_then(|index| devices.get_mut(&index));
        if let (Some(device), Some(kind)) = (device, kind_of(qdisc)) {
            device.qdiscs.push(kind.to_owned());
        }
    }
    for (index, device) in &mut devices {
        if device
            .qdiscs
            .iter()
            .any(|kind| kind == "clsact" || kind == "ingress")
        {
            filters(handle, *index, device).await;
        }
        programs(device);
    }
    Ok((
        devices,
        addresses.into_iter().map(|(_, address)| address).collect(),
    ))
}

/// The node's addresses of a family, with the interfaces that have them.
async fn addresses(handle: &Handle, family: Family) -> Result<Vec<(u32, IpAddr)>, String> {
    let messages: Vec<_> = handle
        .address()
        .get()
        .execute()
        .try_collect()
        .await
        .map_err(|error| format!("list addresses: {error}"))?;
    let own = messages.iter().filter_map(|message| {
        let address = own_address(message)?;
        (Family::of(address) == family).then_some((message.header.index, address))
    });
    Ok(own.collect())
}

/// The devices with their names: the tunnel device, those of `ours` that are bridges, and the veths on those, which
/// are the pods'. `pods` are known to be pods' otherwise.
async fn named(
    handle: &Handle,
    ours: &BTreeSet<u32>,
    tunnel: &str,
    pods: &BTreeSet<IfIndex>,
) -> Result<BTreeMap<IfIndex, Device>, String> {
    let links: Vec<_> = handle
        .link()
        .get()
        .execute()
        .try_collect()
        .await
        .map_err(|error| format!("list links: {error}"))?;
    let mut devices = BTreeMap::new();
    for link in &links {
        let (mut name, mut kind, mut on_ours) = (None, None, false);
        for attribute in &link.attributes {
            match attribute {
                LinkAttribute::IfName(text) => name = Some(text),
                LinkAttribute::Controller(bridge) => on_ours = ours.contains(bridge),
                LinkAttribute::LinkInfo(infos) => {
                    kind = infos.iter().find_map(|info| match info {
                        LinkInfo::Kind(kind) => Some(kind),
                        _ => None,
                    });
                }
                _ => {}
            }
        }
        let (Some(name), Ok(index)) = (name, IfIndex::try_from(link.header.index)) else {
            continue;
        };
        let is_bridge = kind == Some(&InfoKind::Bridge) && ours.contains(&index.get());
        let role = if name == tunnel || is_bridge {
            Role::Shared
        } else if pods.contains(&index) || (on_ours && kind == Some(&InfoKind::Veth)) {
            Role::Pod
        } else {
            continue;
        };
        let device = Device {
            name: name.clone(),
            role,
            qdiscs: Vec::new(),
            filters: Vec::new(),
            programs: Vec::new(),
            unreadable: None,
        };
        devices.insert(index, device);
    }
    Ok(devices)
}

async fn filters(handle: &Handle, index: IfIndex, device: &mut Device) {
    for side in ["ingress", "egress"] {
        let mut request = handle.traffic_filter(index.get() as i32);
        let request = match side {
            "ingress" => request.get().ingress(),
            _ => request.get().egress(),
        };
        match request.execute().try_collect::<Vec<_>>().await {
            Ok(found) => device
                .filters
                .extend(found.iter().filter_map(|filter| foreign(filter, side))),
            // An ingress qdisc has no egress, and a pod may have gone.
            Err(rtnetlink::Error::NetlinkError(message))
                if [-libc::EINVAL, -libc::ENOENT, -libc::ENODEV].contains(&message.raw_code()) => {}
            Err(error) => device.unreadable = Some(format!("list filters at {side}: {error}")),
        }
    }
}

/// A filter that is not ours. The head of a list of filters, which has no handle, says nothing that its filters do not.
fn foreign(filter: &TcMessage, side: &'static str) -> Option<Filter> {
    let kind = kind_of(filter)?;
    let priority = (filter.header.info >> 16) as u16;
    let handle: u32 = filter.header.handle.into();
    if mark::is_our_filter(kind, priority, handle) || (kind == mark::TC_KIND && handle == 0) {
        return None;
    }
    Some(Filter {
        side,
        kind: kind.to_owned(),
        direct: is_direct(filter),
    })
}

fn is_direct(filter: &TcMessage) -> bool {
    filter.attributes.iter().any(|attribute| match attribute {
        TcAttribute::Options(options) => options.iter().any(|option| {
            matches!(option, TcOption::Bpf(TcFilterBpfOption::Flags(flags)) if flags.bits() & DIRECT_ACTION != 0)
        }),
        _ => false,
    })
}

/// Programs on tcx that do not bear a name of ours. A kernel without tcx has none.
fn programs(device: &mut Device) {
    for (side, attach) in [
        ("ingress", TcAttachType::Ingress),
        ("egress", TcAttachType::Egress),
    ] {
        let Ok((_, programs)) = SchedClassifier::query_tcx(&device.name, attach) else {
            continue;
        };
        let names = programs.iter().map(|program| {
            program
                .name_as_str()
                .map_or_else(|| format!("{}", program.id()), str::to_owned)
        });
        let foreign = names.filter(|name| Hook::ALL.iter().all(|hook| hook.as_str() != name));
        device
            .programs
            .extend(foreign.map(|name| format!("{name} at {side}")));
    }
}

fn index_of(message: &TcMessage) -> Option<IfIndex> {
    IfIndex::try_from(u32::try_from(message.header.index).ok()?).ok()
}

fn kind_of(message: &TcMessage) -> Option<&str> {
    message
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            TcAttribute::Kind(name) => Some(name.as_str()),
            _ => None,
        })
}
