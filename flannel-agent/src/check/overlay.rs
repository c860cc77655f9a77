//! The tunnel device, and what belongs to it.

use std::{
    fs, io,
    net::{IpAddr, Ipv4Addr},
    os::fd::AsRawFd as _,
};

use flannel_core::{
    check::{Attached, Observations, Offload, Overlay, SubnetFile},
    plan::{Device, Hook},
};

use crate::{
    cli::Args,
    dataplane::{
        bpf::{AttachMode, Instance},
        netlink::{Netlink, NetlinkError},
    },
    state::{Mode, State},
};

/// Looks.
pub(super) async fn look(
    net: &Netlink,
    args: &Args,
    state: Option<&State>,
    name: String,
) -> Result<Overlay, NetlinkError> {
    let device = net.device(&name).await?;
    let path = args.subnet_file.display().to_string();
    let attached = match (state, &device) {
        (Some(state), Some(device)) if state.datapath.mode == Mode::Bpf => {
            Some(attached(net, state, device).await?)
        }
        _ => None,
    };
    Ok(Overlay {
        offload: device.as_ref().map_or(Offload::Unknown, |_| offload(&name)),
        device,
        subnet_file: fs::read_to_string(&args.subnet_file)
            .ok()
            .map(|text| SubnetFile::parse(&path, &text)),
        subnet_path: path,
        attached,
        name,
        ..Overlay::default()
    })
}

/// The programs that must be there with eBPF, whatever else is.
async fn attached(net: &Netlink, state: &State, device: &Device) -> Result<Attached, NetlinkError> {
    let way = state.datapath.attach.clone().unwrap_or_default();
    let mut found = Attached {
        way,
        ..Attached::default()
    };
    let instance = Instance::of(state.vni).ok();
    for (hook, index) in [
        (Hook::ToOverlay, device.index),
        (Hook::FromWire, state.uplink_index),
    ] {
        let there = if found.way == AttachMode::Clsact.as_str() {
            net.filter_program(hook, index).await?.is_some()
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

/// Adds how the kernel reaches each peer.
pub(super) async fn add_paths(
    net: &Netlink,
    seen: &mut Observations,
    peers: impl Iterator<Item = Ipv4Addr>,
) -> Result<(), NetlinkError> {
    let local = seen
        .network
        .uplink()
        .and_then(flannel_core::iface::Uplink::local_v4);
    let Some(local) = local else { return Ok(()) };
    let found = net.underlay(local, peers.map(IpAddr::V4)).await?;
    for (peer, way) in found.next_hops {
        if let IpAddr::V4(peer) = peer {
            seen.overlay.paths.insert(peer, way.mtu);
            seen.overlay.ways.insert(peer, way.ifindex);
        }
    }
    Ok(())
}

/// `ETHTOOL_GTXCSUM` and `struct ethtool_value` in `include/uapi/linux/ethtool.h`.
const GET_TX_CHECKSUM: u32 = 0x16;
/// `SIOCETHTOOL` in `include/uapi/linux/sockios.h`: the C libraries do not agree on its type.
const SIOCETHTOOL: libc::Ioctl = 0x8946;

#[repr(C)]
struct EthtoolValue {
    command: u32,
    data: u32,
}

/// The checksum offload of a device.
#[expect(unsafe_code, reason = "no safe wrapper knows this ioctl")]
fn offload(name: &str) -> Offload {
    let Ok(socket) = std::net::UdpSocket::bind("0.0.0.0:0") else {
        return Offload::Unknown;
    };
    let mut value = EthtoolValue {
        command: GET_TX_CHECKSUM,
        data: 0,
    };
    // SAFETY: a plain C struct for which all zeros is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request
        .ifr_name
        .iter_mut()
        .take(libc::IFNAMSIZ - 1)
        .zip(name.bytes())
    {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_data = (&raw mut value).cast();
    // SAFETY: the request and the value that it points at live through the call, and the kernel writes no more than the value.
    let answer = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL, &raw mut request) };
    if answer != 0 {
        tracing::debug!(error = %io::Error::last_os_error(), name, "read the features of a device");
        return Offload::Unknown;
    }
    if value.data == 0 {
        Offload::Off
    } else {
        Offload::On
    }
}
