//! A node that upstream flannel v0.28.9 runs on: the state it leaves in the kernel, in its files and in the lease store, and what it
//! does to that state when it is started again.
//!
//! [`Upstream::start`] is one start of `flanneld`: device, lease, address, firewall, `subnet.env`, peers, each put there or found
//! and left alone as upstream does it. Called again it plays the start that hands a node back. The golden tests of this crate
//! compare the outcome with what the real program printed.

mod firewall;
mod store;

pub use self::firewall::Firewall;
pub use self::store::LeaseStore;

use crate::json::{self, ip_json};
use crate::netns::Netns;
use crate::node::{Node, mac_for, mac_text};
use crate::subnet::Subnet;
use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use std::fs;
use std::net::Ipv4Addr;
use std::path::PathBuf;

/// Bytes that upstream takes off the underlay's MTU.
const OVERHEAD: u32 = 50;
/// The kernel's port for a device that asks for none.
const KERNEL_PORT: u16 = 8472;

/// Which of upstream's lease formats a node writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Release {
    /// v0.28.9.
    Current,
    /// v0.12.0: neither `PublicIPv6` nor `VNI` in the lease, rules straight in the built-in chains.
    V0_12,
}

/// The network configuration, and the flags that matter here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is a key of the configuration or a flag of its own"
)]
pub struct UpstreamConf {
    pub network: Subnet,
    pub vni: u32,
    /// `Port`; 0 leaves it to the kernel.
    pub port: u16,
    /// `MTU`, that of the underlay.
    pub mtu: u32,
    pub gbp: bool,
    pub learning: bool,
    pub direct_routing: bool,
    pub firewall: Firewall,
    /// `--ip-masq`.
    pub ip_masq: bool,
    pub release: Release,
}

impl UpstreamConf {
    /// Upstream's defaults for a network, with `--ip-masq` as in every manifest.
    pub fn new(network: Subnet) -> UpstreamConf {
        UpstreamConf {
            network,
            vni: 1,
            port: 0,
            mtu: 1500,
            gbp: false,
            learning: false,
            direct_routing: false,
            firewall: Firewall::Iptables,
            ip_masq: true,
            release: Release::Current,
        }
    }

    /// The JSON that says so, as an operator writes it.
    pub fn net_conf(&self) -> String {
        let mut backend = serde_json::Map::new();
        backend.insert("Type".into(), "vxlan".into());
        if self.vni != 1 {
            backend.insert("VNI".into(), self.vni.into());
        }
        if self.port != 0 {
            backend.insert("Port".into(), self.port.into());
        }
        if self.mtu != 1500 {
            backend.insert("MTU".into(), self.mtu.into());
        }
        let options = [
            ("GBP", self.gbp),
            ("Learning", self.learning),
            ("DirectRouting", self.direct_routing),
        ];
        for (name, _) in options.iter().filter(|(_, on)| *on) {
            backend.insert((*name).into(), true.into());
        }
        let mut conf = json!({"Network": self.network.to_string(), "Backend": backend});
        if self.firewall == Firewall::Nftables {
            conf["EnableNFTables"] = true.into();
        }
        conf.to_string()
    }

    /// `flannel.<vni>`.
    pub fn device(&self) -> String {
        format!("flannel.{}", self.vni)
    }
}

/// What a start found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Started {
    /// Why the device that was there had to go, in upstream's words, if one had to.
    pub recreated: Option<String>,
    /// Whether the store had a lease of this node.
    pub reused: bool,
}

/// A node as upstream runs it.
#[derive(Clone, Debug)]
pub struct Upstream {
    pub ns: Netns,
    pub public_ip: Ipv4Addr,
    /// The subnet it takes if the store has no lease of it.
    pub subnet: Subnet,
    /// The MAC address of a device that it makes; upstream draws one.
    pub mac: [u8; 6],
    pub conf: UpstreamConf,
    /// `subnet.env`.
    pub subnet_file: PathBuf,
    run_dir: PathBuf,
}

impl Upstream {
    /// A node that prefers its [`Node::subnet`]. Nothing is changed before [`Upstream::start`].
    pub fn new(node: &Node, conf: UpstreamConf) -> Upstream {
        Upstream {
            ns: node.ns.clone(),
            public_ip: node.ip,
            subnet: node.subnet,
            mac: mac_for(&format!("{}/{}", node.ns.name(), conf.device())),
            conf,
            subnet_file: node.run_dir.join("subnet.env"),
            run_dir: node.run_dir.clone(),
        }
    }

    /// Starts: brings everything into upstream's state, from whatever state it is in.
    pub fn start(&mut self, store: &LeaseStore<'_>) -> anyhow::Result<Started> {
        let recreated = self.ensure_device()?;
        let device = self.conf.device();
        let mac = self.device_mac()?;
        let leases = store.leases()?;
        let own = leases
            .iter()
            .find(|(_, lease)| lease["PublicIP"] == self.public_ip.to_string());
        let reused = own.is_some();
        if let Some((subnet, _)) = own {
            self.subnet = *subnet;
        }
        store.put(self.subnet, &self.lease(&mac))?;
        self.ensure_address()?;
        self.ns.ip(&format!("link set {device} up"))?;
        let now = self.device_mac()?;
        ensure!(
            now == mac,
            "{device}'s mac address wanted: {mac}, but got: {now}"
        );
        self.conf.firewall.start(self)?;
        self.write_subnet_file()?;
        self.add_peers(store)?;
        Ok(Started { recreated, reused })
    }

    /// Follows the store as a running `flanneld` does: every lease of another node is an event that programs it again.
    pub fn add_peers(&self, store: &LeaseStore<'_>) -> anyhow::Result<()> {
        for (subnet, lease) in store.leases()? {
            if subnet != self.subnet && lease["BackendType"] == "vxlan" {
                self.add_peer(subnet, &lease)?;
            }
        }
        Ok(())
    }

    /// What upstream programs for a lease: neighbour, forwarding entry, route, or with `DirectRouting` a route alone.
    pub fn add_peer(&self, subnet: Subnet, lease: &Value) -> anyhow::Result<()> {
        let field = |value: &Value| value.as_str().map(str::to_owned);
        let public_ip = field(&lease["PublicIP"]).context("a lease without PublicIP")?;
        if self.conf.direct_routing && self.on_link(&public_ip)? {
            let line = format!("route replace {subnet} via {public_ip}");
            return self.ns.ip(&line).map(drop);
        }
        let mac = field(&lease["BackendData"]["VtepMAC"]).context("a lease without VtepMAC")?;
        let (device, base) = (self.conf.device(), subnet.base());
        let neighbour = format!("neigh replace {base} lladdr {mac} dev {device} nud permanent");
        self.ns.ip(&neighbour)?;
        let forward =
            format!("bridge fdb replace {mac} dev {device} dst {public_ip} self permanent");
        self.ns.exec(forward.split(' '))?;
        let route = format!("route replace {subnet} via {base} dev {device} onlink");
        self.ns.ip(&route).map(drop)
    }

    /// The value of the node's lease, byte for byte.
    pub fn lease(&self, mac: &str) -> String {
        let (ip, vni) = (self.public_ip, self.conf.vni);
        match self.conf.release {
            Release::Current => format!(
                r#"{{"PublicIP":"{ip}","PublicIPv6":null,"BackendType":"vxlan","BackendData":{{"VNI":{vni},"VtepMAC":"{mac}"}}}}"#
            ),
            Release::V0_12 => format!(
                r#"{{"PublicIP":"{ip}","BackendType":"vxlan","BackendData":{{"VtepMAC":"{mac}"}}}}"#
            ),
        }
    }

    /// The MAC address that the device has, as in the lease.
    pub fn device_mac(&self) -> anyhow::Result<String> {
        let link = json::link(&self.ns, &self.conf.device())?;
        let mac = link["address"].as_str().context("a device without MAC")?;
        Ok(mac.to_owned())
    }

    /// Writes a file for a program that reads one, in the node's directory.
    fn scratch(&self, name: &str, text: &str) -> anyhow::Result<String> {
        let path = self.run_dir.join(name);
        fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
        Ok(path.display().to_string())
    }

    fn on_link(&self, address: &str) -> anyhow::Result<bool> {
        let route = ip_json(&self.ns, &["route", "get", address])?;
        Ok(route[0].get("gateway").is_none())
    }

    fn create_device(&self) -> anyhow::Result<()> {
        let UpstreamConf { vni, port, mtu, .. } = self.conf;
        let on = |option: bool, yes: &'static str, no: &'static str| if option { yes } else { no };
        let port = if port == 0 { KERNEL_PORT } else { port };
        let device = self.conf.device();
        self.ns.ip(&format!(
            "link add {device} address {} mtu {} txqueuelen 0 type vxlan id {vni} local {} dev eth0 dstport {port} {} \
             noudp6zerocsumtx noudp6zerocsumrx {}",
            mac_text(self.mac),
            mtu - OVERHEAD,
            self.public_ip,
            on(self.conf.learning, "learning", "nolearning"),
            on(self.conf.gbp, "gbp", ""),
        ))?;
        self.ns
            .set_sysctl(&format!("net/ipv6/conf/{device}/accept_ra"), "0")
    }

    /// `LinkAdd`, and on `EEXIST` a comparison: the device that is there stays as it is, MTU and MAC included, or is replaced.
    fn ensure_device(&self) -> anyhow::Result<Option<String>> {
        let device = self.conf.device();
        if self.ns.ifindex(&device).is_err() {
            self.create_device()?;
            return Ok(None);
        }
        let why = self.incompatibility(&json::link(&self.ns, &device)?);
        if why.is_some() {
            self.ns.ip(&format!("link del {device}"))?;
            self.create_device()?;
        }
        Ok(why)
    }

    /// What upstream's comparison finds first. It knows neither MTU nor MAC nor learning.
    fn incompatibility(&self, link: &Value) -> Option<String> {
        let info = &link["linkinfo"];
        let data = &info["info_data"];
        if info["info_kind"] != "vxlan" {
            return Some(format!("link type: vxlan vs {}", info["info_kind"]));
        }
        if data["id"] != self.conf.vni {
            return Some(format!("vni: {} vs {}", self.conf.vni, data["id"]));
        }
        if data["link"].is_string() && data["link"] != "eth0" {
            return Some(format!(
                "vtep (external) interface: eth0 vs {}",
                data["link"]
            ));
        }
        if data["local"].is_string() && data["local"] != self.public_ip.to_string() {
            return Some(format!(
                "vtep (external) IP: {} vs {}",
                self.public_ip, data["local"]
            ));
        }
        if self.conf.port != 0 && data["port"] != self.conf.port {
            return Some(format!("port: {} vs {}", self.conf.port, data["port"]));
        }
        let gbp = data["gbp"] == true;
        (gbp != self.conf.gbp).then(|| format!("gbp: {} vs {gbp}", self.conf.gbp))
    }

    /// Addresses inside the network that differ go, then the /32 comes.
    fn ensure_address(&self) -> anyhow::Result<()> {
        let (device, base) = (self.conf.device(), self.subnet.base());
        let have = ip_json(&self.ns, &["-4", "addr", "show", "dev", &device])?;
        let mut there = false;
        for address in have[0]["addr_info"].as_array().into_iter().flatten() {
            let text = address["local"].as_str().context("an address")?;
            let (ip, len): (Ipv4Addr, _) = (text.parse()?, &address["prefixlen"]);
            if ip == base && *len == 32 {
                there = true;
            } else if self.conf.network.contains(ip) {
                self.ns.ip(&format!("addr del {ip}/{len} dev {device}"))?;
            }
        }
        if !there {
            self.ns.ip(&format!("addr add {base}/32 dev {device}"))?;
        }
        Ok(())
    }

    fn write_subnet_file(&self) -> anyhow::Result<()> {
        let text = format!(
            "FLANNEL_NETWORK={}\nFLANNEL_SUBNET={}/{}\nFLANNEL_MTU={}\nFLANNEL_IPMASQ={}\n",
            self.conf.network,
            self.subnet.gateway(),
            self.subnet.prefix_len(),
            self.conf.mtu - OVERHEAD,
            self.conf.ip_masq
        );
        let scratch = self.scratch(".subnet.env", &text)?;
        fs::rename(scratch, &self.subnet_file)
            .with_context(|| format!("put {} in place", self.subnet_file.display()))
    }
}
