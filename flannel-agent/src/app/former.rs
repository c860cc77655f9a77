//! What another backend, or the same one with other families, has left on this node: routes to peers are narrower than the one to the
//! whole network, and would take packets past the encryption; the other way round a device without peers would swallow what no other
//! route leads away.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use flannel_core::{
    addr::{Family, IfIndex},
    config::BackendKind,
    mark::{self, Overlay},
    plan::ObservedKind,
};
use ipnet::IpNet;

use super::session::Setting;
use crate::{
    datapath,
    dataplane::netlink::Netlink,
    files,
    state::{Bare, State},
    telemetry::chain,
};

/// Takes away what an earlier agent of this node, or an upstream flannel, has left that this setting does not use: tunnel devices that an
/// agent has noted, those of the configured number with an address in one of the networks, programs, and routes that bear our mark.
pub(super) async fn retire(net: &Netlink, subnet_file: &Path, setting: &Setting) {
    let conf = &setting.conf;
    let (kind, vni) = (conf.backend.kind, conf.backend.vxlan.vni);
    let networks: BTreeSet<IpNet> = conf
        .families()
        .into_iter()
        .filter_map(|family| Some(conf.range(family)?.0))
        .collect();
    let has_programs = matches!(kind, BackendKind::Vxlan | BackendKind::HostGw);
    let families = conf.families();
    let used: BTreeSet<Overlay> = families
        .into_iter()
        .filter(|_| has_programs)
        .map(|family| Overlay { family, vni })
        .collect();
    let first = State::read(subnet_file).ok().flatten();
    let second = State::read_second(subnet_file).ok().flatten();
    let noted: BTreeMap<Overlay, IfIndex> = first
        .iter()
        .chain(&second)
        .map(|state| (state.overlay(), state.uplink_index))
        .collect();
    let usual = Family::ALL.map(|family| Overlay { family, vni });
    let all: BTreeSet<Overlay> = noted.keys().copied().chain(usual).collect();
    for overlay in all {
        if let Some(uplink) = noted.get(&overlay)
            && !used.contains(&overlay)
        {
            datapath::retire_programs(net, overlay, *uplink).await;
            if kind != BackendKind::Vxlan {
                datapath::retire_headroom(net, overlay.vni).await;
            }
        }
        if kind != BackendKind::Vxlan || !used.contains(&overlay) {
            remove_tunnel(net, overlay, noted.contains_key(&overlay), &networks).await;
        }
    }
    for state in first.iter().chain(&second) {
        if !used.contains(&state.overlay()) {
            remove_routes(net, state.network).await;
        }
    }
    if !has_programs {
        for network in &networks {
            remove_routes(net, *network).await;
        }
        if first.is_some() || second.is_some() {
            files::forget(&State::path(subnet_file));
            files::forget(&State::second_path(subnet_file));
        }
    }
    if kind != BackendKind::Wireguard {
        remove_encrypted(net, subnet_file).await;
    }
    if kind != BackendKind::Alloc {
        files::forget(&Bare::path(subnet_file, BackendKind::Alloc));
    }
}

async fn remove_tunnel(net: &Netlink, overlay: Overlay, noted: bool, networks: &BTreeSet<IpNet>) {
    let name = overlay.device();
    let Ok(Some(device)) = net.device(&name, overlay.family).await else {
        return;
    };
    let (kind, vni) = match &device.kind {
        ObservedKind::Vxlan { vni, .. } => (mark::KIND_VXLAN, Some(*vni)),
        ObservedKind::Veth { .. } if noted => (mark::KIND_VETH, None),
        ObservedKind::Veth { .. } | ObservedKind::Other(_) => return,
    };
    let inside = |address: &IpNet| {
        let mut networks = networks.iter();
        networks.any(|network| network.contains(&address.addr()))
    };
    let ours =
        overlay.is_our_device(&name, kind, vni) && (noted || device.addresses.iter().any(inside));
    if ours {
        delete(net, &name).await;
    }
}

/// The routes to peers on the link.
async fn remove_routes(net: &Netlink, network: IpNet) {
    let routes = match net.link_routes(network, None).await {
        Ok(routes) => routes,
        Err(error) => {
            tracing::warn!(error = chain(&error), "look for routes of another backend");
            return;
        }
    };
    for (subnet, route) in routes.into_iter().filter(|(_, route)| route.ours) {
        let done = net
            .del_link_route(route.ifindex, subnet, route.gateway)
            .await;
        match done {
            Ok(()) => tracing::info!("delete route {subnet} of another backend"),
            Err(error) => tracing::warn!(error = chain(&error), "delete route {subnet}"),
        }
    }
}

/// The devices of an agent that had the backend wireguard.
async fn remove_encrypted(net: &Netlink, subnet_file: &Path) {
    let Ok(Some(state)) = Bare::read_of(subnet_file, BackendKind::Wireguard) else {
        return;
    };
    for name in &state.devices {
        if let Ok(Some(device)) = net.plain_device(name).await
            && mark::is_our_wireguard(name, &device.kind)
        {
            delete(net, name).await;
        }
    }
    files::forget(&Bare::path(subnet_file, BackendKind::Wireguard));
}

async fn delete(net: &Netlink, name: &str) {
    let Ok(Some(index)) = net.index(name).await else {
        return;
    };
    match net.delete_device(index).await {
        Ok(()) => tracing::info!("delete device {name} of an earlier overlay"),
        Err(error) => tracing::warn!(error = chain(&error), "delete device {name}"),
    }
}
