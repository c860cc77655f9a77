//! The tunnel device, the peers on it, and the pods' bridge.

use std::{collections::BTreeMap, net::Ipv4Addr};

use ipnet::{IpNet, Ipv4Net};

use super::{Finding, Observations, Wants, few, mtu};
use crate::{
    addr::IfIndex,
    config::{self, NetConf},
    lease::SubnetKey,
    plan::{Desired, Device, DeviceKind, Observed, ObservedKind, Op, Tunnel, peers_of, plan},
};

/// The key of a node without a lease.
pub(super) const NOBODY: SubnetKey = SubnetKey { v4: None, v6: None };

/// The tunnel device, and what belongs to it.
#[derive(Clone, Debug, Default)]
pub struct Overlay {
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
    /// MTU of the way to each peer's public address, where there is a way.
    pub paths: BTreeMap<Ipv4Addr, u32>,
    /// The interface of that way.
    pub ways: BTreeMap<Ipv4Addr, IfIndex>,
}

/// What `subnet.env` says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SubnetFile {
    /// Its path.
    pub path: String,
    /// `FLANNEL_NETWORK`.
    pub network: Option<Ipv4Net>,
    /// `FLANNEL_SUBNET`, without host bits.
    pub subnet: Option<Ipv4Net>,
    /// `FLANNEL_MTU`.
    pub mtu: Option<u32>,
}

impl SubnetFile {
    /// Reads its text.
    pub fn parse(path: &str, text: &str) -> Self {
        let value = |name: &str| {
            text.lines()
                .rev()
                .find_map(|line| line.trim().strip_prefix(name)?.strip_prefix('='))
                .map(|value| value.trim_matches(['"', '\'', ' ']))
        };
        Self {
            path: path.to_owned(),
            network: value("FLANNEL_NETWORK").and_then(|value| value.parse().ok()),
            subnet: value("FLANNEL_SUBNET")
                .and_then(|value| value.parse().ok())
                .map(|net: Ipv4Net| net.trunc()),
            mtu: value("FLANNEL_MTU").and_then(|value| value.parse().ok()),
        }
    }
}

/// The pods' bridge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bridge {
    /// `cni0`.
    pub name: String,
    /// MTU in bytes.
    pub mtu: u32,
    /// IPv4 addresses.
    pub addresses: Vec<Ipv4Net>,
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
        subnet_file(seen),
        device(seen),
        entries(seen),
        datapath(seen),
        bridge(seen),
        mtu::judge(seen),
        offload(seen),
    ]
}

fn subnet_file(seen: &Observations) -> Finding {
    const NAME: &str = "subnet-file";
    let path = &seen.overlay.subnet_path;
    let Some(file) = &seen.overlay.subnet_file else {
        return if seen.agent.known {
            Finding::fail(
                NAME,
                format!("{path} does not exist: pods cannot be made"),
                "restart the agent, which writes it once everything is in place",
            )
        } else {
            Finding::skip(
                NAME,
                format!("{path} does not exist: the agent writes it when it is ready"),
            )
        };
    };
    let (Some(subnet), Some(network), Some(mtu)) = (file.subnet, file.network, file.mtu) else {
        return Finding::fail(
            NAME,
            format!(
                "{path} lacks FLANNEL_NETWORK, FLANNEL_SUBNET or FLANNEL_MTU, or one cannot be read"
            ),
            format!("delete {path} and restart the agent, which writes it anew"),
        );
    };
    let configured = seen
        .store
        .conf()
        .and_then(|conf| conf.ipv4)
        .map(|family| family.network);
    if let Some(configured) = configured.filter(|configured| *configured != network) {
        return Finding::fail(
            NAME,
            format!("{path} says network {network}, the configuration says {configured}"),
            "restart the agent, which writes it anew; then restart the pods of the old network",
        );
    }
    Finding::ok(NAME, format!("{path}: {subnet} of {network}, MTU {mtu}"))
}

/// What should be: the device of the configuration, with the peers of the lease list.
fn desired(seen: &Observations, conf: &NetConf) -> Option<Desired> {
    let uplink = seen.network.uplink()?;
    let device = seen.overlay.device.as_ref()?;
    let family = conf.ipv4?;
    let vxlan = &conf.backend.vxlan;
    let own = seen.store.own(seen).map_or(NOBODY, |(key, _)| *key);
    let subnet = own.v4.or_else(|| seen.overlay.subnet_file.as_ref()?.subnet);
    let kind = match &device.kind {
        // eBPF alone: the name of the other end is ours to choose.
        ObservedKind::Veth { peer: Some(peer) } if seen.agent.mode == Some("bpf") => {
            DeviceKind::Veth { peer: peer.clone() }
        }
        _ => DeviceKind::Vxlan {
            vni: vxlan.vni,
            port: vxlan.port,
            lower: uplink.index,
            local: uplink.local_v4()?,
            learning: vxlan.learning,
            gbp: vxlan.gbp,
        },
    };
    Some(Desired {
        tunnel: Tunnel {
            name: seen.overlay.name.clone(),
            kind,
            mtu: config::tunnel_mtu(conf, uplink.mtu).ok()?,
            // A wrong one is the lease's finding.
            mac: None,
            address: subnet.and_then(|subnet| Ipv4Net::new(subnet.network(), 32).ok()),
            network: family.network,
        },
        own: subnet.map(IpNet::V4).into_iter().collect(),
        peers: seen
            .store
            .list()
            .filter(|_| own.v4.is_some())
            .map(|leases| peers_of(leases, &own).0),
        bpf: None,
        pods: None,
    })
}

/// The changes that would put device and peers right, and what stands in the way.
fn differences(seen: &Observations) -> Option<(Vec<Op>, Vec<String>)> {
    let conf = seen.store.conf()?;
    let mut device = seen.overlay.device.clone()?;
    // Where eBPF works alone the routes say how wide the path is, which is not judged here.
    for route in device.routes.values_mut() {
        route.mtu = None;
    }
    let plan = plan(
        &desired(seen, &conf)?,
        &Observed {
            device: Some(device),
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
        .filter(|address| address.addr().is_link_local())
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
    if seen.store.list().is_none() {
        return Finding::skip(NAME, "the store does not answer");
    }
    let Some(device) = &seen.overlay.device else {
        return Finding::skip(NAME, format!("there is no {name}"));
    };
    if seen.store.own(seen).is_none() {
        return Finding::skip(NAME, "this node has no lease yet");
    }
    if !device.up {
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
                Op::PutFdb { .. } | Op::PutNeighbour { .. } | Op::PutRoute { .. }
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
        format!(
            "routes, neighbours and forwarding entries of {} peers are in place",
            device.routes.len()
        ),
    )
}

fn datapath(seen: &Observations) -> Finding {
    const NAME: &str = "datapath";
    let agent = &seen.agent;
    let reason = agent.reason.as_deref().unwrap_or("unknown");
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
    if bridge.addresses.is_empty() {
        return Finding::ok(NAME, format!("{name} has no address yet"));
    }
    let addresses = few(&bridge.addresses);
    if bridge
        .addresses
        .iter()
        .any(|address| address.trunc() == subnet)
    {
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
