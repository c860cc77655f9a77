//! The programs that forward without an overlay, on a node of the lab.

use std::net::IpAddr;

use anyhow::{Context as _, ensure};
use aya::{
    Ebpf, Pod as Plain,
    maps::{HashMap, MapData},
    programs::{SchedClassifier, TcAttachType, tc},
};
use flannel_testkit::{Netns, json};

/// What the build script made.
static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("FLANNEL_BENCH_OBJECT"));

/// Where packets to an address go, as the programs read it.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Hop {
    ifindex: u32,
    macs: [u8; 12],
}

const _: () = assert!(size_of::<Hop>() == 16);

// SAFETY: plain integers without padding, as the assertion above shows.
unsafe impl Plain for Hop {}

/// One node's programs. They end with it.
#[derive(Debug)]
pub(crate) struct Programs {
    _ebpf: Ebpf,
}

/// What one node has to know.
pub(crate) struct Node<'a> {
    /// The node, whose uplink is `eth0`.
    pub(crate) ns: &'a Netns,
    /// The node's end of the pod's veth.
    pub(crate) host_if: &'a str,
    /// The pod's address.
    pub(crate) pod_ip: IpAddr,
    /// The pod's MAC address.
    pub(crate) pod_mac: [u8; 6],
    /// The pod behind the other node.
    pub(crate) remote_ip: IpAddr,
    /// MAC address of the other node's uplink.
    pub(crate) remote_mac: [u8; 6],
}

impl Programs {
    pub(crate) fn attach(node: &Node<'_>) -> anyhow::Result<Self> {
        let mut ebpf = Ebpf::load(OBJECT).context("load the programs without overlay")?;
        let remote = Hop {
            ifindex: node.ns.ifindex("eth0")?,
            macs: macs(node.remote_mac, mac_of(node.ns, "eth0")?),
        };
        put(&mut ebpf, "remote", node.remote_ip, remote)?;
        let local = Hop {
            ifindex: node.ns.ifindex(node.host_if)?,
            macs: macs(node.pod_mac, mac_of(node.ns, "cni0")?),
        };
        put(&mut ebpf, "local", node.pod_ip, local)?;
        let names = match node.pod_ip {
            IpAddr::V4(_) => ["bench_from_pod", "bench_from_wire"],
            IpAddr::V6(_) => ["bench_from_pod6", "bench_from_wire6"],
        };
        for (name, device) in names.into_iter().zip([node.host_if, "eth0"]) {
            let program = ebpf
                .program_mut(name)
                .with_context(|| format!("no program {name}"))?;
            let program: &mut SchedClassifier = program.try_into()?;
            program.load().with_context(|| format!("load {name}"))?;
            node.ns
                .try_run(|| attach(program, device))?
                .with_context(|| format!("attach {name} to {device}"))?;
        }
        Ok(Self { _ebpf: ebpf })
    }
}

fn attach(program: &mut SchedClassifier, device: &str) -> anyhow::Result<()> {
    if program.attach(device, TcAttachType::Ingress).is_err() {
        // Before 6.6 there are no tcx links.
        tc::qdisc_add_clsact(device)?;
        program.attach(device, TcAttachType::Ingress)?;
    }
    Ok(())
}

fn put(ebpf: &mut Ebpf, name: &str, ip: IpAddr, hop: Hop) -> anyhow::Result<()> {
    match ip {
        IpAddr::V4(ip) => put_in(ebpf, name, ip.octets(), hop),
        IpAddr::V6(ip) => put_in(ebpf, &format!("{name}6"), ip.octets(), hop),
    }
}

fn put_in<K: Plain>(ebpf: &mut Ebpf, name: &str, key: K, hop: Hop) -> anyhow::Result<()> {
    let map = ebpf
        .map_mut(name)
        .with_context(|| format!("no map {name}"))?;
    let mut map: HashMap<&mut MapData, K, Hop> = HashMap::try_from(map)?;
    map.insert(key, hop, 0)
        .with_context(|| format!("write map {name}"))
}

fn macs(dst: [u8; 6], src: [u8; 6]) -> [u8; 12] {
    let mut both = [0; 12];
    both[..6].copy_from_slice(&dst);
    both[6..].copy_from_slice(&src);
    both
}

/// The MAC address of a device of a namespace.
pub(crate) fn mac_of(ns: &Netns, device: &str) -> anyhow::Result<[u8; 6]> {
    let link = json::link(ns, device)?;
    let text = link["address"].as_str().unwrap_or_default();
    let bytes: Vec<u8> = text
        .split(':')
        .filter_map(|byte| u8::from_str_radix(byte, 16).ok())
        .collect();
    let mac: Result<[u8; 6], _> = bytes.try_into();
    ensure!(mac.is_ok(), "{device} has the MAC address {text:?}");
    mac.map_err(|_| anyhow::anyhow!("not a MAC address"))
}
