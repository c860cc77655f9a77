//! The tunnel device, and what belongs to it.

use std::{collections::BTreeSet, fs, net::IpAddr};

use flannel_core::{
    check::{Attached, Encrypted, Observations, Offload, Overlay, SubnetFile, targets},
    config::BackendKind,
    mark,
    plan::{Device, Hook},
};
use tokio::time::Instant;

use super::probe;
use crate::{
    cli::Args,
    dataplane::{
        bpf::{AttachMode, Instance},
        netlink::{Netlink, NetlinkError},
        offload,
    },
    state::{Bare, Mode, State},
    wireguard,
};

/// Looks.
pub(super) async fn look(
    net: &Netlink,
    args: &Args,
    state: Option<&State>,
    of: mark::Overlay,
) -> Result<Overlay, NetlinkError> {
    let (name, family) = (of.device(), of.family);
    // Where packets are routed to all peers, one of that name is somebody else's.
    let tunnelled = state.is_none_or(State::is_tunnelled);
    let device = if tunnelled {
        net.device(&name, family).await?
    } else {
        None
    };
    let path = args.subnet_file.display().to_string();
    let attached = match state {
        Some(state) if state.datapath.mode == Mode::Bpf && (device.is_some() || !tunnelled) => {
            Some(attached(net, state, device.as_ref()).await?)
        }
        _ => None,
    };
    Ok(Overlay {
        family,
        offload: device.as_ref().map_or(Offload::Unknown, |_| offload(&name)),
        device,
        subnet_file: fs::read_to_string(&args.subnet_file)
            .ok()
            .map(|text| SubnetFile::parse(&path, &text, family)),
        subnet_path: path,
        attached,
        name,
        ..Overlay::default()
    })
}

/// The programs that must be there with eBPF, whatever else is.
async fn attached(
    net: &Netlink,
    state: &State,
    device: Option<&Device>,
) -> Result<Attached, NetlinkError> {
    let way = state.datapath.attach.clone().unwrap_or_default();
    let mut found = Attached {
        way,
        ..Attached::default()
    };
    let instance = Instance::of(state.overlay()).ok();
    for hook in state.base_hooks().iter().copied() {
        let tunnel = device.map(|device| device.index);
        let on_uplink = (hook == Hook::FromWire).then_some(state.uplink_index);
        let Some(index) = on_uplink.or(tunnel) else {
            continue;
        };
        let there = if found.way == AttachMode::Clsact.as_str() {
            net.filter_program(hook, index, state.overlay())
                .await?
                .is_some()
        } else {
            instance
                .as_ref()
                .is_some_and(|instance| instance.is_attached(hook, index))
        };
        let list = if there {
            &mut found.there
        } else {
            &mut found.missing
        };
        list.push(hook.as_str().to_owned());
    }
    Ok(found)
}

/// The wireguard devices that the agent has noted.
pub(super) async fn encrypted(net: &Netlink, state: &Bare) -> Result<Vec<Encrypted>, NetlinkError> {
    let mut found = Vec::new();
    for name in &state.devices {
        let name = name.clone();
        found.push(match wireguard::look(net, &name).await? {
            Some(device) => Encrypted {
                name,
                mtu: device.mtu,
                up: device.up.then_some(()).ok_or_else(|| "is down".to_owned()),
                allowed: match device.inner {
                    Ok(inner) => {
                        let peers = inner.peers.into_values();
                        Ok(peers.flat_map(|peer| peer.allowed).collect())
                    }
                    Err(error) => Err(error.to_string()),
                },
            },
            None => Encrypted {
                name,
                mtu: 0,
                up: Err("does not exist, or is of another kind".into()),
                allowed: Ok(BTreeSet::new()),
            },
        });
    }
    Ok(found)
}

/// Adds how the kernel reaches each peer, and what becomes of packets to it.
pub(super) async fn look_at_peers(
    net: &Netlink,
    seen: &mut Observations,
    ask: bool,
    deadline: Instant,
) -> Result<(), NetlinkError> {
    let peers = targets(seen);
    add_paths(net, seen, peers.keys().copied()).await?;
    if ask {
        seen.probes = Some(probe::all(&peers, seen.device_mtu(), deadline).await);
    }
    Ok(())
}

async fn add_paths(
    net: &Netlink,
    seen: &mut Observations,
    peers: impl Iterator<Item = IpAddr>,
) -> Result<(), NetlinkError> {
    let family = seen.overlay.family;
    let uplink = seen.network.uplink();
    let local = uplink.and_then(|uplink| uplink.local(family));
    let Some(local) = local else { return Ok(()) };
    let found = net.underlay(local, peers).await?;
    let conf = seen.store.conf().filter(|conf| {
        conf.backend.vxlan.direct_routing || conf.backend.kind == BackendKind::HostGw
    });
    let network = conf.and_then(|conf| conf.range(family));
    if let (Some((network, _)), Some(uplink)) = (network, seen.network.uplink()) {
        seen.overlay.links = net.link_routes(network, Some(uplink.index)).await?;
        seen.overlay.hops = found.next_hops.clone();
        // How wide the path is, is another finding.
        for hop in seen.overlay.hops.values_mut() {
            hop.mtu = u32::MAX;
        }
    }
    for (peer, way) in found.next_hops {
        seen.overlay.paths.insert(peer, way.mtu);
        seen.overlay.ways.insert(peer, way.ifindex);
    }
    Ok(())
}

/// The checksum offload of a device.
fn offload(name: &str) -> Offload {
    match offload::leaves_checksums(name) {
        Ok(true) => Offload::On,
        Ok(false) => Offload::Off,
        Err(error) => {
            tracing::debug!(%error, name, "read the features of a device");
            Offload::Unknown
        }
    }
}
