//! A node that upstream flannel v0.28.9 runs on: the state it leaves in the kernel, in its files and in the lease store, and what it
//! does to that state when it is started again.
//!
//! Upstream has a device, addresses, rules and peers of each family that is on, which share the lease and `subnet.env`.
//!
//! [`Upstream::start`] is one start of `flanneld`: device, lease, address, firewall, `subnet.env`, peers, each put there or found
//! and left alone as upstream does it. Called again it plays the start that hands a node back. The golden tests of this crate
//! compare the outcome with what the real program printed.

mod firewall;
mod store;

pub use self::firewall::Firewall;
pub use self::store::LeaseStore;

use crate::family::{Families, Family, Prefix};
use crate::json::{self, ip_json};
use crate::lab::wait_for_address;
use crate::netns::Netns;
use crate::node::{Node, mac_for, mac_text};
use crate::subnet::Subnet;
use anyhow::{Context as _, bail, ensure};
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
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
    /// `EnableIPv4` and `EnableIPv6`.
    pub families: Families,
    pub network: Subnet,
    pub network_v6: Prefix,
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
    /// Upstream's defaults for a network, with `--ip-masq` as in every manifest. Where IPv6 is turned on its network is fd05::/48.
    pub fn new(network: Subnet) -> UpstreamConf {
        UpstreamConf {
            families: Families::V4,
            network,
            network_v6: Prefix::new(Ipv6Addr::new(0xfd05, 0, 0, 0, 0, 0, 0, 0), 48),
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
        let mut conf = json!({"Backend": backend});
        if self.families.has(Family::V4) {
            conf["Network"] = self.network.to_string().into();
        } else {
            conf["EnableIPv4"] = false.into();
        }
        if self.families.has(Family::V6) {
            conf["EnableIPv6"] = true.into();
            conf["IPv6Network"] = self.network_v6.to_string().into();
        }
        if self.firewall == Firewall::Nftables {
            conf["EnableNFTables"] = true.into();
        }
        conf.to_string()
    }

    /// `flannel.<vni>` or `flannel-v6.<vni>`.
    pub fn device(&self, family: Family) -> String {
        family.device(self.vni)
    }

    /// The network of a family.
    pub fn network_of(&self, family: Family) -> Prefix {
        match family {
            Family::V4 => self.network.into(),
            Family::V6 => self.network_v6,
        }
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
    pub public_ipv6: Ipv6Addr,
    /// The subnet it takes if the store has no lease of it.
    pub subnet: Subnet,
    /// The same of IPv6.
    pub subnet_v6: Prefix,
    /// The MAC address of a device that it makes; upstream draws one.
    pub mac: [u8; 6],
    /// The same of IPv6's device.
    pub mac_v6: [u8; 6],
    pub conf: UpstreamConf,
    /// `subnet.env`.
    pub subnet_file: PathBuf,
    run_dir: PathBuf,
}

impl Upstream {
    /// A node that prefers its [`Node::subnet`] and [`Node::subnet_v6`]. Nothing is changed before [`Upstream::start`].
    pub fn new(node: &Node, conf: UpstreamConf) -> Upstream {
        let mac = |family| mac_for(&format!("{}/{}", node.ns.name(), conf.device(family)));
        Upstream {
            ns: node.ns.clone(),
            public_ip: node.ip,
            public_ipv6: node.ipv6,
            subnet: node.subnet,
            subnet_v6: node.subnet_v6,
            mac: mac(Family::V4),
            mac_v6: mac(Family::V6),
            conf,
            subnet_file: node.run_dir.join("subnet.env"),
            run_dir: node.run_dir.clone(),
        }
    }

    /// The address that peers reach it by.
    pub fn address(&self, family: Family) -> IpAddr {
        match family {
            Family::V4 => self.public_ip.into(),
            Family::V6 => self.public_ipv6.into(),
        }
    }

    /// The subnet of a family.
    pub fn subnet_of(&self, family: Family) -> Prefix {
        match family {
            Family::V4 => self.subnet.into(),
            Family::V6 => self.subnet_v6,
        }
    }

    /// Takes this subnet, in its family.
    pub fn set_subnet(&mut self, subnet: Prefix) {
        match subnet.as_subnet() {
            Some(subnet) => self.subnet = subnet,
            None => self.subnet_v6 = subnet,
        }
    }

    /// Starts: brings everything into upstream's state, from whatever state it is in.
    pub fn start(&mut self, store: &LeaseStore<'_>) -> anyhow::Result<Started> {
        let families = self.conf.families.list();
        let mut recreated = None;
        let mut macs = Vec::new();
        for family in &families {
            let why = self.ensure_device(*family)?;
            recreated = recreated.or(why);
            macs.push(self.device_mac(*family)?);
        }
        let reused = self.find_lease(store)?;
        store.put(&self.lease_key(), &self.lease()?)?;
        for (family, mac) in families.iter().zip(macs) {
            let device = self.conf.device(*family);
            self.ensure_address(*family)?;
            self.ns.ip(&format!("link set {device} up"))?;
            let now = self.device_mac(*family)?;
            ensure!(
                now == mac,
                "{device}'s mac address wanted: {mac}, but got: {now}"
            );
        }
        self.conf.firewall.start(self)?;
        self.write_subnet_file()?;
        self.add_peers(store)?;
        for family in families {
            wait_for_address(&self.ns, self.subnet_of(family).base())?;
        }
        Ok(Started { recreated, reused })
    }

    /// Takes the subnets of the lease that is this node's already, which is known by its address; gives whether there is one.
    ///
    /// Without IPv4 that is the IPv6 address, as if the node's podCIDR said so: in etcd upstream looks for the IPv4 address alone,
    /// 0.0.0.0 then, and all nodes take the first one's subnet.
    fn find_lease(&mut self, store: &LeaseStore<'_>) -> anyhow::Result<bool> {
        let families = self.conf.families.list();
        let name = public_ip_field(families[0]);
        let ip = self.address(families[0]).to_string();
        let leases = store.leases()?;
        let Some((subnets, _)) = leases.into_iter().find(|(_, lease)| lease[name] == ip) else {
            return Ok(false);
        };
        let had = subnets.iter().map(|subnet| subnet.family());
        ensure!(
            had.eq(families),
            "upstream would delete the lease of {subnets:?} and take other subnets"
        );
        for subnet in subnets {
            self.set_subnet(subnet);
        }
        Ok(true)
    }

    /// Follows the store as a running `flanneld` does: every lease of another node is an event that programs it again.
    pub fn add_peers(&self, store: &LeaseStore<'_>) -> anyhow::Result<()> {
        for (subnets, lease) in store.leases()? {
            for subnet in subnets {
                let family = subnet.family();
                let ours = subnet == self.subnet_of(family) || !self.conf.families.has(family);
                if !ours && lease["BackendType"] == "vxlan" {
                    self.add_peer(subnet, &lease)?;
                }
            }
        }
        Ok(())
    }

    /// What upstream programs for a subnet of a lease: neighbour, forwarding entry, route, or with `DirectRouting` a route alone.
    pub fn add_peer(&self, subnet: impl Into<Prefix>, lease: &Value) -> anyhow::Result<()> {
        let subnet = subnet.into();
        let family = subnet.family();
        let field = |value: &Value| value.as_str().map(str::to_owned);
        let name = public_ip_field(family);
        let public_ip = field(&lease[name]).with_context(|| format!("a lease without {name}"))?;
        if self.conf.direct_routing && self.on_link(&public_ip)? {
            let line = format!("route replace {subnet} via {public_ip}");
            return self.ns.ip(&line).map(drop);
        }
        let data = match family {
            Family::V4 => "BackendData",
            Family::V6 => "BackendV6Data",
        };
        let mac = field(&lease[data]["VtepMAC"]).context("a lease without VtepMAC")?;
        let (device, base) = (self.conf.device(family), subnet.base());
        let neighbour = format!("neigh replace {base} lladdr {mac} dev {device} nud permanent");
        self.ns.ip(&neighbour)?;
        let forward =
            format!("bridge fdb replace {mac} dev {device} dst {public_ip} self permanent");
        self.ns.exec(forward.split(' '))?;
        let route = format!("route replace {subnet} via {base} dev {device} onlink");
        self.ns.ip(&route).map(drop)
    }

    /// The last part of the key of the node's lease.
    pub fn lease_key(&self) -> String {
        let v4 = self.subnet.lease_key();
        let v6 = self.subnet_v6.lease_key();
        match self.conf.families {
            Families::V4 => v4,
            Families::V6 => format!("0.0.0.0-0&{v6}"),
            Families::Dual => format!("{v4}&{v6}"),
        }
    }

    /// The value of the node's lease, byte for byte, with the MAC addresses that the devices have.
    pub fn lease(&self) -> anyhow::Result<String> {
        let Upstream {
            public_ip,
            public_ipv6,
            ..
        } = self;
        let vni = self.conf.vni;
        let data = |family| -> anyhow::Result<String> {
            let mac = self.device_mac(family)?;
            Ok(match self.conf.release {
                Release::Current => format!(r#"{{"VNI":{vni},"VtepMAC":"{mac}"}}"#),
                Release::V0_12 => format!(r#"{{"VtepMAC":"{mac}"}}"#),
            })
        };
        let kind = r#""BackendType":"vxlan""#;
        Ok(match (self.conf.families, self.conf.release) {
            (Families::V4, Release::Current) => format!(
                r#"{{"PublicIP":"{public_ip}","PublicIPv6":null,{kind},"BackendData":{}}}"#,
                data(Family::V4)?
            ),
            (Families::V4, Release::V0_12) => format!(
                r#"{{"PublicIP":"{public_ip}",{kind},"BackendData":{}}}"#,
                data(Family::V4)?
            ),
            (_, Release::V0_12) => bail!("v0.12.0 knows no IPv6"),
            (Families::V6, _) => format!(
                r#"{{"PublicIP":"0.0.0.0","PublicIPv6":"{public_ipv6}",{kind},"BackendV6Data":{}}}"#,
                data(Family::V6)?
            ),
            (Families::Dual, _) => format!(
                r#"{{"PublicIP":"{public_ip}","PublicIPv6":"{public_ipv6}",{kind},"BackendData":{},"BackendV6Data":{}}}"#,
                data(Family::V4)?,
                data(Family::V6)?
            ),
        })
    }

    /// The MAC address that a device has, as in the lease.
    pub fn device_mac(&self, family: Family) -> anyhow::Result<String> {
        let link = json::link(&self.ns, &self.conf.device(family))?;
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

    fn create_device(&self, family: Family) -> anyhow::Result<()> {
        let UpstreamConf { vni, port, mtu, .. } = self.conf;
        let on = |option: bool, yes: &'static str, no: &'static str| if option { yes } else { no };
        let port = if port == 0 { KERNEL_PORT } else { port };
        let device = self.conf.device(family);
        let mac = match family {
            Family::V4 => self.mac,
            Family::V6 => self.mac_v6,
        };
        self.ns.ip(&format!(
            "link add {device} address {} mtu {} txqueuelen 0 type vxlan id {vni} local {} dev eth0 dstport {port} {} \
             noudp6zerocsumtx noudp6zerocsumrx {}",
            mac_text(mac),
            // Of IPv6 too; there the kernel makes it as much less as it must.
            mtu - OVERHEAD,
            self.address(family),
            on(self.conf.learning, "learning", "nolearning"),
            on(self.conf.gbp, "gbp", ""),
        ))?;
        self.ns
            .set_sysctl(&format!("net/ipv6/conf/{device}/accept_ra"), "0")
    }

    /// `LinkAdd`, and on `EEXIST` a comparison: the device that is there stays as it is, MTU and MAC included, or is replaced.
    fn ensure_device(&self, family: Family) -> anyhow::Result<Option<String>> {
        let device = self.conf.device(family);
        if self.ns.ifindex(&device).is_err() {
            self.create_device(family)?;
            return Ok(None);
        }
        let why = self.incompatibility(family, &json::link(&self.ns, &device)?);
        if why.is_some() {
            self.ns.ip(&format!("link del {device}"))?;
            self.create_device(family)?;
        }
        Ok(why)
    }

    /// What upstream's comparison finds first. It knows neither MTU nor MAC nor learning.
    fn incompatibility(&self, family: Family, link: &Value) -> Option<String> {
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
        let local = match family {
            Family::V4 => &data["local"],
            Family::V6 => &data["local6"],
        };
        let address = self.address(family);
        if local.is_string() && *local != address.to_string() {
            return Some(format!("vtep (external) IP: {address} vs {local}"));
        }
        if self.conf.port != 0 && data["port"] != self.conf.port {
            return Some(format!("port: {} vs {}", self.conf.port, data["port"]));
        }
        let gbp = data["gbp"] == true;
        (gbp != self.conf.gbp).then(|| format!("gbp: {} vs {gbp}", self.conf.gbp))
    }

    /// The device's address comes; other addresses inside the network go, and of IPv6 all others that are not link-local.
    fn ensure_address(&self, family: Family) -> anyhow::Result<()> {
        let device = self.conf.device(family);
        let own = Prefix::new(
            self.subnet_of(family).base(),
            match family {
                Family::V4 => 32,
                Family::V6 => 128,
            },
        );
        let network = self.conf.network_of(family);
        let have = ip_json(&self.ns, &[family.flag(), "addr", "show", "dev", &device])?;
        let mut there = false;
        for address in have[0]["addr_info"].as_array().into_iter().flatten() {
            let text = address["local"].as_str().context("an address")?;
            let (ip, len): (IpAddr, _) = (text.parse()?, &address["prefixlen"]);
            let goes = match family {
                Family::V4 => network.contains(ip),
                Family::V6 => address["scope"] != "link",
            };
            if ip == own.base() && *len == own.prefix_len() {
                there = true;
            } else if goes {
                self.ns.ip(&format!("addr del {ip}/{len} dev {device}"))?;
            }
        }
        if !there {
            self.ns.ip(&format!("addr add {own} dev {device}"))?;
        }
        Ok(())
    }

    fn write_subnet_file(&self) -> anyhow::Result<()> {
        let mut text = String::new();
        for family in self.conf.families.list() {
            let infix = match family {
                Family::V4 => "",
                Family::V6 => "IPV6_",
            };
            let (network, subnet) = (self.conf.network_of(family), self.subnet_of(family));
            let (gateway, len) = (subnet.gateway(), subnet.prefix_len());
            writeln!(text, "FLANNEL_{infix}NETWORK={network}")?;
            writeln!(text, "FLANNEL_{infix}SUBNET={gateway}/{len}")?;
        }
        writeln!(text, "FLANNEL_MTU={}", self.conf.mtu - OVERHEAD)?;
        writeln!(text, "FLANNEL_IPMASQ={}", self.conf.ip_masq)?;
        let scratch = self.scratch(".subnet.env", &text)?;
        fs::rename(scratch, &self.subnet_file)
            .with_context(|| format!("put {} in place", self.subnet_file.display()))
    }
}

/// Where a lease has a node's address.
fn public_ip_field(family: Family) -> &'static str {
    match family {
        Family::V4 => "PublicIP",
        Family::V6 => "PublicIPv6",
    }
}
