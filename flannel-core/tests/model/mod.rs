//! A model of the kernel for the planner's contracts.

use std::collections::{BTreeMap, BTreeSet};

use flannel_core::{
    addr::{IfIndex, VtepMac},
    mark,
    plan::{
        Attachment, BpfState, Desired, Device, DeviceKind, LinkRoute, Node, Observed, ObservedKind,
        Op, Records as _, Route, Settings, V4, V6,
    },
    pods::Pod,
};

use crate::situations::SUBNET_COUNT;

/// The kernel, as far as the planner's ops reach. What it does to other objects was looked up on Linux 6.18; what it would refuse
/// panics.
pub(crate) fn apply(kernel: &mut Observed, op: &Op, want: &Desired) {
    match op {
        Op::CreateDevice(tunnel) => {
            if kernel.device.is_none() {
                kernel.device = Some(Device {
                    index: IfIndex::try_from(1_000).unwrap(),
                    kind: match &tunnel.kind {
                        DeviceKind::Vxlan {
                            vni,
                            port,
                            lower,
                            local,
                            learning,
                            gbp,
                        } => ObservedKind::Vxlan {
                            vni: vni.get(),
                            port: *port,
                            lower: Some(*lower),
                            local: Some(*local),
                            learning: *learning,
                            gbp: *gbp,
                        },
                        DeviceKind::Veth { peer } => ObservedKind::Veth {
                            peer: Some(peer.clone()),
                        },
                    },
                    mtu: tunnel.mtu.get(),
                    mac: tunnel.mac.unwrap_or(VtepMac::new([0x66, 0, 0, 0, 0, 0x66])),
                    up: false,
                    addresses: BTreeSet::new(),
                    routes: BTreeMap::new(),
                    neighbours: BTreeMap::new(),
                    fdb: BTreeMap::new(),
                });
            }
        }
        Op::DeleteDevice { index, .. } => {
            if kernel
                .device
                .as_ref()
                .is_some_and(|device| device.index == *index)
            {
                kernel.device = None;
                if let Some(bpf) = &mut kernel.bpf {
                    bpf.attached
                        .retain(|_, attachment| attachment.ifindex != *index);
                }
            }
        }
        Op::StandIn(op) => {
            let mut pair = want.clone();
            let tunnel = pair.tunnel.as_mut().expect("a tunnel");
            let (name, peer) = mark::stand_in(&tunnel.name).expect("a name");
            tunnel.name = name;
            tunnel.kind = DeviceKind::Veth { peer };
            let device = kernel.stand_in.take();
            let device = std::mem::replace(&mut kernel.device, device);
            let attached = kernel.bpf.as_ref().map(|bpf| bpf.attached.clone());
            apply(kernel, op, &pair);
            if let (Some(bpf), Some(attached)) = (&mut kernel.bpf, attached) {
                if let Op::Attach { hook, .. } = op.as_ref() {
                    bpf.stand_in = bpf.attached.get(hook).copied();
                } else if matches!(op.as_ref(), Op::DeleteDevice { .. }) {
                    bpf.stand_in = None;
                }
                bpf.attached = attached;
            }
            kernel.stand_in = std::mem::replace(&mut kernel.device, device);
            if let (Op::CreateDevice(_), Some(there)) = (op.as_ref(), &mut kernel.stand_in) {
                there.index = IfIndex::try_from(2_000).unwrap();
            }
            if let (Op::PutRoute { subnet, .. }, Some(device)) = (op.as_ref(), &mut kernel.device) {
                // The kernel has one route of that destination and metric.
                device.routes.remove(subnet);
            }
        }
        Op::SetMtu { index, mtu } => device(kernel, *index).mtu = mtu.get(),
        Op::SetMac { index, mac } => {
            let device = device(kernel, *index);
            // `neigh_changeaddr`: permanent ones too. Routes and forwarding entries stay.
            if device.mac != *mac {
                device.neighbours.clear();
            }
            device.mac = *mac;
        }
        Op::SetUp { index } => device(kernel, *index).up = true,
        Op::PutAddress { index, address } => {
            device(kernel, *index).addresses.insert(*address);
        }
        Op::DelAddress { index, address } => {
            let device = device(kernel, *index);
            // `fib_disable_ip`: without an address there is no IPv4 on the device.
            if device.addresses.remove(address) && device.addresses.is_empty() {
                device.routes.clear();
                device.neighbours.clear();
            }
        }
        Op::PutFdb { mac, vtep } => {
            tunnel(kernel, true).fdb.insert(*mac, *vtep);
        }
        Op::DelFdb { mac, vtep } => {
            let fdb = &mut tunnel(kernel, true).fdb;
            if fdb.get(mac) == Some(vtep) {
                fdb.remove(mac);
            }
        }
        Op::PutNeighbour { address, mac } => {
            tunnel(kernel, false).neighbours.insert(*address, *mac);
        }
        Op::DelNeighbour { address } => {
            tunnel(kernel, false).neighbours.remove(address);
        }
        Op::PutRoute {
            subnet,
            gateway,
            mtu,
        } => {
            // A metric of zero is no metric.
            let route = Route {
                gateway: *gateway,
                mtu: mtu.filter(|mtu| *mtu != 0),
            };
            tunnel(kernel, false).routes.insert(*subnet, route);
            if let Some(there) = &mut kernel.stand_in {
                there.routes.remove(subnet);
            }
            kernel.links.remove(subnet);
        }
        Op::PutLinkRoute {
            subnet,
            gateway,
            ifindex,
            replaces,
        } => {
            // Said of somebody else's route, and once.
            if let Some((gateway, ifindex)) = replaces
                && let Some(there) = kernel.links.get(subnet).filter(|there| !there.ours)
            {
                assert_eq!((there.gateway, there.ifindex), (*gateway, *ifindex));
            }
            // The kernel has one route of that destination and metric.
            for device in kernel.device.iter_mut().chain(&mut kernel.stand_in) {
                device.routes.remove(subnet);
            }
            let route = LinkRoute {
                gateway: *gateway,
                ifindex: *ifindex,
                ours: true,
            };
            kernel.links.insert(*subnet, route);
        }
        Op::DelLinkRoute {
            subnet,
            gateway,
            ifindex,
        } => {
            let route = LinkRoute {
                gateway: *gateway,
                ifindex: *ifindex,
                ours: true,
            };
            if kernel.links.get(subnet) == Some(&route) {
                kernel.links.remove(subnet);
            }
        }
        Op::DelRoute { subnet } => {
            tunnel(kernel, false).routes.remove(subnet);
        }
        Op::PutNode { id, node } => {
            let bpf = bpf(kernel);
            assert!((1..bpf.node_capacity).contains(id), "{op}: no such entry");
            bpf.nodes.insert(*id, written_node(node));
        }
        Op::ClearNode { id } => {
            bpf(kernel).nodes.remove(id);
        }
        Op::PutSubnet { index, id } => {
            assert!(*index < SUBNET_COUNT && *id != 0, "{op}: no such entry");
            bpf(kernel).subnets.insert(*index, *id);
        }
        Op::ClearSubnet { index } => {
            bpf(kernel).subnets.remove(index);
        }
        Op::PutSettings(settings) => {
            let uplink = want.bpf.as_ref().expect("eBPF").uplink;
            bpf(kernel).settings = written_settings(settings, uplink);
        }
        Op::Attach { hook, ifindex } => {
            let bpf = bpf(kernel);
            if hook.is_per_pod() {
                let hooks = bpf.pod_hooks.entry(*ifindex).or_default();
                hooks.insert(*hook, true);
            } else {
                let attachment = Attachment {
                    ifindex: *ifindex,
                    current: true,
                };
                bpf.attached.insert(*hook, attachment);
            }
        }
        Op::Detach { hook, ifindex } => {
            let bpf = bpf(kernel);
            if let Some(hooks) = bpf.pod_hooks.get_mut(ifindex) {
                hooks.remove(hook);
                if hooks.is_empty() {
                    bpf.pod_hooks.remove(ifindex);
                }
            }
            if bpf
                .attached
                .get(hook)
                .is_some_and(|there| there.ifindex == *ifindex)
            {
                bpf.attached.remove(hook);
            }
        }
        Op::AttachXdp { ifindex } => {
            bpf(kernel).xdp = Some(Attachment {
                ifindex: *ifindex,
                current: true,
            });
        }
        Op::DetachXdp { ifindex } => {
            let bpf = bpf(kernel);
            if bpf.xdp.is_some_and(|there| there.ifindex == *ifindex) {
                bpf.xdp = None;
            }
        }
        Op::PutPod { address, pod } => {
            bpf(kernel)
                .pods
                .insert(*address, Pod::decode(&pod.encode()));
        }
        Op::DelPod { address } => {
            bpf(kernel).pods.remove(address);
        }
    }
}

fn device(kernel: &mut Observed, index: IfIndex) -> &mut Device {
    kernel
        .device
        .as_mut()
        .filter(|device| device.index == index)
        .expect("ENODEV")
}

fn tunnel(kernel: &mut Observed, fdb: bool) -> &mut Device {
    let device = kernel.device.as_mut().expect("ENODEV");
    assert!(device.up, "ENETDOWN");
    assert!(
        !fdb || matches!(device.kind, ObservedKind::Vxlan { .. }),
        "EOPNOTSUPP"
    );
    device
}

fn bpf(kernel: &mut Observed) -> &mut BpfState {
    kernel.bpf.as_mut().expect("eBPF")
}

/// What is read back of a node that was written, in whichever family's map.
fn written_node(node: &Node) -> Option<Node> {
    match V4::record(node) {
        Some(record) => V4::node(&record),
        None => V6::node(&V6::record(node)?),
    }
}

fn written_settings(settings: &Settings, uplink: IfIndex) -> Option<Settings> {
    match V4::config(settings) {
        Some(config) => V4::settings(&config, uplink),
        None => V6::settings(&V6::config(settings)?, uplink),
    }
}
