//! What the tests of the wire share: kernel nodes beside ours, and the reasons for which eBPF left packets alone.

#![allow(dead_code, reason = "every test binary uses a part of it")]

use std::{collections::BTreeMap, net::IpAddr};

use flannel_common::{Direction, DropReason, reason_index};
use flannel_testkit::{Family, KernelNode, Netns, Pod, json, mac_text};

use crate::rig::{DEVICE, Rig, per_cpu};

/// MTU in bytes of pods on an underlay with the usual 1500.
pub(crate) const POD_MTU: u32 = 1450;

/// The same for pods of a family.
pub(crate) fn pod_mtu(family: Family) -> u32 {
    1500 - family.overhead()
}

/// One side of the traffic: a node and a pod on it.
#[derive(Clone, Debug)]
pub(crate) struct End {
    pub(crate) family: Family,
    pub(crate) node: Netns,
    pub(crate) pod: Pod,
}

impl End {
    /// A node of ours that has a pod.
    pub(crate) fn of(rig: &Rig, node: usize) -> End {
        End {
            family: rig.family(),
            node: rig.ns(node).clone(),
            pod: rig.pod(node).clone(),
        }
    }

    /// The pod's address.
    pub(crate) fn address(&self) -> IpAddr {
        self.pod.address(self.family)
    }
}

/// Makes a node of the rig one of upstream flannel's, with a pod.
pub(crate) fn plain_kernel_end(rig: &Rig, node: usize) -> (KernelNode, End) {
    let kernel = KernelNode::set_up_family(rig.node(node), rig.family()).expect("a kernel node");
    let pod = rig
        .node(node)
        .add_pod(kernel.subnet, 2, pod_mtu(rig.family()))
        .expect("a pod on the kernel node");
    let end = End {
        family: rig.family(),
        node: kernel.ns.clone(),
        pod,
    };
    (kernel, end)
}

/// Like [`plain_kernel_end`], with a lease that our agents see.
pub(crate) fn kernel_end(rig: &Rig, node: usize) -> (KernelNode, End) {
    let (kernel, end) = plain_kernel_end(rig, node);
    rig.put_lease_of(kernel.subnet, kernel.public_ip, &mac_text(kernel.vtep_mac));
    (kernel, end)
}

/// Starts the agent and a pod of a node and connects it with a kernel node.
pub(crate) fn start_with_peer(rig: &mut Rig, node: usize, flags: &[&str], peer: &KernelNode) {
    rig.start_agent(node, flags);
    rig.wait_ready(node);
    rig.add_pod(node);
    rig.wait_converged();
    let (family, place) = (rig.family(), rig.node(node));
    let mac = mac_of(rig.ns(node), &rig.device());
    peer.add_peer(place.subnet_of(family), mac, place.address(family))
        .expect("tell the kernel node of ours");
}

/// MAC address of the tunnel device, as `ip` shows it.
pub(crate) fn vtep_mac(ns: &Netns) -> [u8; 6] {
    let link = json::link(ns, DEVICE).expect("the tunnel device");
    parse_mac(link["address"].as_str().expect("its MAC address"))
}

/// MAC address of any device.
pub(crate) fn mac_of(ns: &Netns, ifname: &str) -> [u8; 6] {
    let link = json::link(ns, ifname).expect("the device");
    parse_mac(link["address"].as_str().expect("its MAC address"))
}

fn parse_mac(text: &str) -> [u8; 6] {
    let mut mac = [0; 6];
    for (byte, digits) in mac.iter_mut().zip(text.split(':')) {
        *byte = u8::from_str_radix(digits, 16).expect("a MAC address");
    }
    mac
}

/// Packets of one direction that eBPF did not carry, by label of the reason, from the map through `bpftool`. Reasons that
/// never applied are left out.
pub(crate) fn reasons(rig: &Rig, node: usize, direction: Direction) -> BTreeMap<&'static str, u64> {
    let dump = rig.map_dump(node, "reasons");
    DropReason::ALL
        .iter()
        .map(|reason| {
            let entry = &dump[reason_index(direction, *reason) as usize];
            (reason.as_str(), per_cpu(entry))
        })
        .filter(|(_, packets)| *packets > 0)
        .collect()
}
