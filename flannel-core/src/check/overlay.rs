//! The tunnel device, the peers on it, and the pods' bridge.

use std::{collections::BTreeMap, net::IpAddr};

use ipnet::IpNet;

use super::{
    Encrypted, Finding, Observations, SubnetFile, Wants, encrypted, few, mtu, subnet_file,
};
use crate::{
    addr::{Family, IfIndex},
    config::{BackendKind, NetConf},
    lease::SubnetKey,
    plan::{
        Desired, Device, DeviceKind, Direct, LinkRoute, NextHop, Observed, ObservedKind, Op,
        Tunnel, peers_of, plan,
    },
};

/// The key of a node without a lease.
pub(super) const NOBODY: SubnetKey = SubnetKey { v4: None, v6: None };

/// The tunnel device, and what belongs to it.
#[derive(Clone, Debug, Default)]
pub struct Overlay {
    /// What it carries.
    pub family: Family,
    /// Name of the tunnel device.
    pub name: String,
    /// The device, if there is one of that name.
    pub device: Option<Device>,
    /// `subnet.env`.
    pub subnet_file: Option<SubnetFile>,
    /// Where it should be.
    pub subnet_path: String,
    /// The pods' bridge.
    pub bridge: Option<Bridge>,
    /// Programs that the state file says should be attached; `None` without eBPF.
    pub attached: Option<Attached>,
    /// Checksum offload of the tunnel device.
    pub offload: Offload,
    /// The wireguard devices that there should be.
    pub encrypted: Vec<Encrypted>,
    /// MTU of the way to each peer's public address, where there is a way.
    pub paths: BTreeMap<IpAddr, u32>,
    /// The interface of that way.
    pub ways: BTreeMap<IpAddr, IfIndex>,
    /// The whole of it, where it matters who is on the link.
    pub hops: BTreeMap<IpAddr, NextHop>,
    /// Routes without a tunnel.
    pub links: BTreeMap<IpNet, LinkRoute>,
}

/// The pods' bridge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bridge {
    /// `cni0`.
    pub name: String,
    /// MTU in bytes.
    pub mtu: u32,
    /// Addresses of both families, link-local ones left out.
    pub addresses: Vec<IpNet>,
    /// MTU of each port.
    pub ports: BTreeMap<String, u32>,
}

/// Which programs there should be, and which there are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attached {
    /// `tcx` or `clsact`.
    pub way: String,
    /// Hooks where a program of ours is.
    pub there: Vec<String>,
    /// Hooks where one is missing.
    pub missing: Vec<String>,
}

/// `tx-checksum-ip-generic` of the tunnel device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Offload {
    /// On.
    On,
    /// Off.
    Off,
    /// Could not be read.
    #[default]
    Unknown,
}

pub(super) fn judge(seen: &Observations) -> Vec<Finding> {
    vec![
        subnet_file::judge(seen),
        device(seen),
        entries(seen),
        datapath(seen),
        bridge(seen),
        mtu::judge(seen),
        offload(seen),
    ]
}

/// What should be: the device of the configuration, with the peers of the lease list.
fn desired(seen: &Observations, conf: &NetConf) -> Option<Desired> {
    let uplink = seen.network.uplink()?;
    let family = seen.overlay.family;
    let (network, _) = conf.range(family)?;
    let kind = conf.backend.kind;
    let own = seen.store.own(seen).map_or(NOBODY, |(key, _)| *key);
    let file = seen.overlay.subnet_file.as_ref();
    let subnet = own.subnet(family).or_else(|| file?.subnet);
    let routes = kind == BackendKind::HostGw || conf.backend.vxlan.direct_routing;
    Some(Desired {
        tunnel: match kind {
            BackendKind::Vxlan => Some(tunnel(seen, conf, network, subnet)?),
            BackendKind::HostGw | BackendKind::Wireguard | BackendKind::Alloc => None,
        },
        direct: routes.then_some(Direct {
            uplink: uplink.index,
            network,
        }),
        own: subnet.into_iter().collect(),
        peers: seen
            .store
            .list()
            .filter(|_| own.subnet(family).is_some())
            .map(|leases| peers_of(leases, &own, family, kind).0),
        bpf: None,
        pods: None,
    })
}

fn tunnel(
    seen: &Observations,
    conf: &NetConf,
    network: IpNet,
    subnet: Option<IpNet>,
) -> Option<Tunnel> {
    let uplink = seen.network.uplink()?;
    let device = seen.overlay.device.as_ref()?;
    let vxlan = &conf.backend.vxlan;
    let kind = match &device.kind {
        // eBPF alone: the name of the other end is ours to choose.
        ObservedKind::Veth { peer: Some(peer) } if seen.agent.mode == Some("bpf") => {
            DeviceKind::Veth { peer: peer.clone() }
        }
        _ => DeviceKind::Vxlan {
            vni: vxlan.vni,
            port: vxlan.port,
            lower: uplink.index,
            local: uplink.local(seen.overlay.family)?,
            learning: vxlan.learning,
            gbp: vxlan.gbp,
        },
    };
    Some(Tunnel {
        name: seen.overlay.name.clone(),
        kind,
        mtu: mtu::wanted(seen, conf, uplink.mtu).ok()?,
        // A wrong one is the lease's finding.
        mac: None,
        address: subnet.map(|subnet| subnet.network().into()),
        network,
    })
}

/// The changes that would put device and peers right, and what stands in the way.
fn differences(seen: &Observations) -> Option<(Vec<Op>, Vec<String>)> {
    let conf = seen.store.conf()?;
    let mut device = seen.overlay.device.clone();
    // Where eBPF works alone the routes say how wide the path is, which is not judged here.
    if let Some(device) = &mut device {
        for route in device.routes.values_mut() {
            route.mtu = None;
        }
    }
    let plan = plan(
        &desired(seen, &conf)?,
        &Observed {
            device,
            underlay: seen.overlay.hops.clone(),
            links: seen.overlay.links.clone(),
            ..Observed::default()
        },
    );
    Some((plan.ops, plan.problems))
}

/// That the device is somebody else's.
fn foreign<'a>(name: &str, problems: &'a [String]) -> Option<&'a str> {
    let start = format!("device {name} ");
    problems
        .iter()
        .map(String::as_str)
        .find(|text| text.starts_with(&start))
}

fn is_about_device(op: &Op) -> bool {
    matches!(
        op,
        Op::DeleteDevice { .. }
            | Op::CreateDevice(_)
            | Op::SetUp { .. }
            | Op::PutAddress { .. }
            | Op::DelAddress { .. }
    )
}

fn device(seen: &Observations) -> Finding {
    const NAME: &str = "device";
    let overlay = &seen.overlay;
    let name = &overlay.name;
    if seen.backend() == BackendKind::Wireguard {
        return encrypted::device(NAME, overlay);
    }
    if let Err(why) = seen.tunnelled() {
        return Finding::skip(NAME, why);
    }
    let Some(device) = &overlay.device else {
        return if seen.agent.known {
            Finding::fail(
                NAME,
                format!("{name} does not exist"),
                "start the agent, which makes it",
            )
        } else {
            Finding::skip(NAME, format!("{name} does not exist: the agent makes it"))
        };
    };
    if !device.up {
        return Finding::fail(
            NAME,
            format!("{name} is down, and its routes with it"),
            format!("start the agent, or ip link set {name} up"),
        );
    }
    let Some((ops, problems)) = differences(seen) else {
        return Finding::ok(
            NAME,
            format!(
                "{name} is up, MAC {}, MTU {}; without a configuration there is nothing to hold it against",
                device.mac, device.mtu
            ),
        );
    };
    if let Some(problem) = foreign(name, &problems) {
        return Finding::fail(
            NAME,
            problem,
            format!("ip link del {name}, or another VNI in the network configuration"),
        );
    }
    let wrong: Vec<&Op> = ops.iter().filter(|op| is_about_device(op)).collect();
    if !wrong.is_empty() {
        let text = few(&wrong);
        let why = if seen.agent.known {
            "start the agent, which does that"
        } else {
            "it is left over from an earlier flannel; the agent does that when it starts"
        };
        let found = format!("{name} differs from the configuration, to be done: {text}");
        return if seen.agent.known {
            Finding::fail(NAME, found, why)
        } else {
            Finding::warn(NAME, found, why)
        };
    }
    let extra: Vec<String> = device
        .addresses
        .iter()
        .filter(|address| matches!(address.addr(), IpAddr::V4(ip) if ip.is_link_local()))
        .map(ToString::to_string)
        .collect();
    if !extra.is_empty() {
        return Finding::warn(
            NAME,
            format!(
                "{name} has an address that nobody needs: {} (dhcpcd or avahi-autoipd)",
                few(&extra)
            ),
            format!(
                "write denyinterfaces flannel* to /etc/dhcpcd.conf, and ip addr del {} dev {name}",
                few(&extra)
            ),
        );
    }
    let addresses = few(&device.addresses);
    Finding::ok(
        NAME,
        format!(
            "{name} is up, {addresses}, MAC {}, MTU {}",
            device.mac, device.mtu
        ),
    )
}

fn entries(seen: &Observations) -> Finding {
    const NAME: &str = "peer-entries";
    let name = &seen.overlay.name;
    if seen.backend() == BackendKind::Alloc {
        return Finding::skip(NAME, "backend alloc: somebody else routes");
    }
    if seen.store.list().is_none() {
        return Finding::skip(NAME, "the store does not answer");
    }
    let tunnelled = seen.tunnelled().is_ok();
    if tunnelled && seen.overlay.device.is_none() {
        return Finding::skip(NAME, format!("there is no {name}"));
    }
    let Some((own, _)) = seen.store.own(seen) else {
        return Finding::skip(NAME, "this node has no lease yet");
    };
    if seen.backend() == BackendKind::Wireguard {
        return encrypted::entries(NAME, seen, own);
    }
    let device = seen.overlay.device.as_ref();
    if device.is_some_and(|device| !device.up) {
        return Finding::skip(NAME, format!("{name} is down"));
    }
    let Some((ops, problems)) = differences(seen) else {
        return Finding::skip(NAME, "there is no valid network configuration");
    };
    if ops.iter().any(|op| {
        matches!(
            op,
            Op::DeleteDevice { .. } | Op::CreateDevice(_) | Op::SetUp { .. }
        )
    }) {
        return Finding::skip(NAME, format!("{name} is to be made anew"));
    }
    if foreign(name, &problems).is_some() {
        return Finding::skip(NAME, format!("{name} is somebody else's"));
    }
    let (missing, stale): (Vec<&Op>, Vec<&Op>) = ops
        .iter()
        .filter(|op| !is_about_device(op) && !matches!(op, Op::SetMtu { .. } | Op::SetMac { .. }))
        .partition(|op| {
            matches!(
                op,
                Op::PutFdb { .. }
                    | Op::PutNeighbour { .. }
                    | Op::PutRoute { .. }
                    | Op::PutLinkRoute { .. }
            )
        });
    let fix = if seen.agent.pid.is_some() {
        "the agent puts this right within seconds; if it does not, something takes it away again: see NetworkManager and systemd-networkd"
    } else {
        "start the agent, which puts this right"
    };
    if !missing.is_empty() {
        return Finding::fail(NAME, format!("to be done: {}", few(&missing)), fix);
    }
    if !stale.is_empty() {
        return Finding::warn(
            NAME,
            format!("left over from nodes that are gone: {}", few(&stale)),
            fix,
        );
    }
    if let Some(problem) = problems.first() {
        return Finding::warn(NAME, problem.clone(), "correct the leases in the store");
    }
    Finding::ok(
        NAME,
        match device {
            Some(device) => format!(
                "routes, neighbours and forwarding entries of {} peers are in place",
                device.routes.len()
            ),
            None => format!(
                "routes to {} peers are in place",
                seen.overlay.links.values().filter(|link| link.ours).count()
            ),
        },
    )
}

fn datapath(seen: &Observations) -> Finding {
    const NAME: &str = "datapath";
    let agent = &seen.agent;
    let reason = agent.reason.as_deref().unwrap_or("unknown");
    match seen.backend() {
        BackendKind::Wireguard => {
            return Finding::ok(NAME, "the kernel's wireguard devices, as the backend asks");
        }
        BackendKind::Alloc => return Finding::skip(NAME, "backend alloc: there is no data path"),
        BackendKind::Vxlan | BackendKind::HostGw => {}
    }
    match agent.mode {
        None => Finding::skip(NAME, "the agent has never been ready here"),
        Some("kernel") if seen.node.wants == Wants::Kernel || reason == "--datapath=kernel" => {
            Finding::ok(NAME, "the kernel's device, as --datapath=kernel asks")
        }
        Some("kernel") => Finding::warn(
            NAME,
            format!("the kernel's device carries the traffic, not eBPF: {reason}"),
            "remove the obstacle and restart the agent, or run it with --datapath=kernel",
        ),
        Some(mode) => {
            let none = Attached::default();
            let attached = seen.overlay.attached.as_ref().unwrap_or(&none);
            if attached.missing.is_empty() {
                Finding::ok(
                    NAME,
                    format!("{mode}, {}: {}", attached.way, few(&attached.there)),
                )
            } else {
                Finding::warn(
                    NAME,
                    format!(
                        "programs are missing at {}: the kernel's device carries that direction",
                        few(&attached.missing)
                    ),
                    "start the agent, which attaches them",
                )
            }
        }
    }
}

fn bridge(seen: &Observations) -> Finding {
    const NAME: &str = "bridge";
    let Some(bridge) = &seen.overlay.bridge else {
        return Finding::ok(NAME, "cni0 does not exist: the first pod makes it");
    };
    let Some(subnet) = seen
        .overlay
        .subnet_file
        .as_ref()
        .and_then(|file| file.subnet)
    else {
        return Finding::skip(NAME, "there is no subnet to hold cni0 against");
    };
    let name = &bridge.name;
    let of_family = |address: &&IpNet| Family::of_net(address) == seen.overlay.family;
    let addresses: Vec<&IpNet> = bridge.addresses.iter().filter(of_family).collect();
    if addresses.is_empty() {
        return Finding::ok(NAME, format!("{name} has no address yet"));
    }
    let has = addresses.iter();
    let (mut has, addresses) = (has.copied(), few(&addresses));
    if has.any(|address| address.trunc() == subnet) {
        return Finding::ok(
            NAME,
            format!("{name} has {addresses}, {} pods", bridge.ports.len()),
        );
    }
    Finding::fail(
        NAME,
        format!("{name} has {addresses}, this node's subnet is {subnet}: no pod can be made"),
        format!("drain the node, then ip link del {name}: the next pod makes it anew"),
    )
}

fn offload(seen: &Observations) -> Finding {
    const NAME: &str = "offload";
    let name = &seen.overlay.name;
    if let Err(why) = seen.tunnelled() {
        return Finding::skip(NAME, why);
    }
    if seen.overlay.device.is_none() {
        return Finding::skip(NAME, format!("there is no {name}"));
    }
    match seen.overlay.offload {
        Offload::On => Finding::ok(
            NAME,
            format!(
                "{name} leaves checksums to hardware; if connections through Services hang for 63 s: ethtool -K {name} tx-checksum-ip-generic off"
            ),
        ),
        Offload::Off => Finding::ok(
            NAME,
            format!("{name} computes checksums itself: slower, and safe with broken hardware"),
        ),
        Offload::Unknown => Finding::skip(NAME, format!("the features of {name} cannot be read")),
    }
}
