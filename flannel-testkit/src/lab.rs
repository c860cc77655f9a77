//! The lab: an underlay switch and nodes around it.

use crate::eventually::try_eventually;
use crate::family::{Families, Family, Prefix};
use crate::json::ip_json;
use crate::netns::Netns;
use crate::nics::Nics;
use crate::node::Node;
use crate::state::State;
use crate::subnet::Subnet;
use crate::{sweep, traffic};
use anyhow::Context as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// The switch's end of the wire on which the nodes' network cards are.
pub(crate) const WIRE: &str = "wire0";

/// Number of the next lab of this process.
static NEXT: AtomicU32 = AtomicU32::new(1);

/// The segmentation and checksum offloads of the uplinks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Offloads {
    /// As veth has them: packets cross unsegmented, with checksums left to a device that never comes. As the driver has them,
    /// where uplinks are network cards.
    #[default]
    Default,
    /// None on either end, as a plain NIC: every packet crosses whole, at most MTU long, checksums computed.
    Off,
}

/// What a lab looks like.
#[derive(Clone, Copy, Debug)]
pub struct LabOptions {
    /// Number of nodes, at most 200.
    pub nodes: u8,
    /// The families of the underlay, and of what the nodes' subnets are for.
    pub families: Families,
    /// Network of the pods; node `i` gets the /24 number `i + 1` of it as [`Node::subnet`].
    pub network: Subnet,
    /// The same of IPv6; node `i` gets the /64 number `i + 1` of it as [`Node::subnet_v6`].
    pub network_v6: Prefix,
    /// MTU in bytes of the uplinks and of the switch.
    pub mtu: u32,
    pub offloads: Offloads,
    /// How many of the nodes, the last ones, are on another link than the rest, behind the switch as a router: their `eth0` is in
    /// 192.168.79.0/24 and fd79::/64.
    pub far_nodes: u8,
    /// Gives each node an `eth1` in 192.168.78.0/24, on a switch of its own.
    pub second_uplink: bool,
}

impl Default for LabOptions {
    fn default() -> LabOptions {
        LabOptions {
            nodes: 2,
            families: Families::V4,
            far_nodes: 0,
            network_v6: Prefix::new(Ipv6Addr::new(0xfd00, 0x10, 0x244, 0, 0, 0, 0, 0), 48),
            network: Subnet::new(Ipv4Addr::new(10, 244, 0, 0), 16),
            mtu: 1500,
            offloads: Offloads::Default,
            second_uplink: false,
        }
    }
}

/// A set of namespaces `fe-<pid>-<lab>-<name>`. Dropping it, also in a panic, ends its processes and removes all.
#[derive(Debug)]
pub struct Lab {
    prefix: String,
    underlay: Netns,
    nodes: Vec<Node>,
    on_nics: bool,
    families: Families,
    // Last: its drop removes the run directories.
    _state: LabState,
}

#[derive(Debug)]
struct LabState {
    prefix: String,
    dir: PathBuf,
    nics: Option<Nics>,
    _state: State,
}

impl Drop for LabState {
    fn drop(&mut self) {
        sweep::sweep_prefix(&self.prefix, self.nics.as_ref());
        // What cannot be removed now goes with the process's directory.
        drop(std::fs::remove_dir_all(&self.dir));
    }
}

impl Lab {
    /// Builds the lab and returns when every node reaches the switch. The uplinks are veth pairs, unless `FLANNEL_LAB_NICS` names
    /// network cards by their MAC addresses: then see [`Lab::on_nics`].
    pub fn new(options: LabOptions) -> anyhow::Result<Lab> {
        Lab::build(options, Nics::from_env().as_ref())
    }

    /// Builds a lab whose uplinks `eth0` are network cards, which return when it is dropped: one such lab at a time. The first card
    /// is a port of the switch `br0`, through which everything on the wire can be seen; it is every node's [`Node::port`].
    pub fn on_nics(options: LabOptions, nics: &Nics) -> anyhow::Result<Lab> {
        Lab::build(options, Some(nics))
    }

    fn build(options: LabOptions, nics: Option<&Nics>) -> anyhow::Result<Lab> {
        anyhow::ensure!(options.nodes <= 200, "at most 200 nodes");
        if let Some(nics) = nics {
            anyhow::ensure!(
                usize::from(options.nodes) <= nics.nodes(),
                "{} nodes, but network cards for {} alone",
                options.nodes,
                nics.nodes()
            );
        }
        anyhow::ensure!(
            options.far_nodes <= options.nodes && (nics.is_none() || options.far_nodes == 0),
            "no room for {} nodes on another link",
            options.far_nodes
        );
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let prefix = sweep::prefix(std::process::id(), number);
        let state = State::hold()?;
        let dir = state.make_dir(&number.to_string())?;
        // From here on an early return removes what there is.
        let state = LabState {
            prefix: prefix.clone(),
            dir: dir.clone(),
            nics: nics.cloned(),
            _state: state,
        };
        let underlay = Netns::add(&format!("{prefix}underlay"))?;
        underlay.set_sysctl("net/ipv4/ip_forward", "1")?;
        let families = options.families;
        if families.has(Family::V6) {
            underlay.prepare_ipv6(true)?;
        }
        let links = [true, options.second_uplink, options.far_nodes > 0];
        for link in (0..).zip(links).filter_map(|(link, on)| on.then_some(link)) {
            add_switch(&underlay, link, &options)?;
        }
        if let Some(nics) = nics {
            nics.gather()?;
            nics.take(0, &underlay, WIRE, options.mtu)?;
            underlay.ip(&format!("link set {WIRE} master br0"))?;
        }
        let mut lab = Lab {
            prefix,
            underlay,
            nodes: Vec::new(),
            on_nics: nics.is_some(),
            families,
            _state: state,
        };
        for index in 0..options.nodes {
            let run_dir = dir.join(format!("n{index}"));
            std::fs::create_dir(&run_dir).with_context(|| format!("make {}", run_dir.display()))?;
            let ns = lab.extra(&format!("n{index}"))?;
            let node = Node::set_up((index, ns), run_dir, (&lab.underlay, nics), &options)?;
            lab.nodes.push(node);
        }
        for node in &lab.nodes {
            lab.reaches_switch(&node.ns, &node.name)?;
        }
        Ok(lab)
    }

    fn reaches_switch(&self, ns: &Netns, name: &str) -> anyhow::Result<()> {
        for family in self.families.list() {
            let what = format!("{name} reaches the switch over {family}");
            try_eventually(Duration::from_secs(10), &what, || {
                traffic::ping_once(ns, Lab::gateway(family), Duration::from_millis(500))
            })?;
        }
        Ok(())
    }

    /// Address of the switch, the nodes' default gateway; servers such as etcd may listen on it in [`Lab::underlay`].
    pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(192, 168, 77, 1);

    /// The same of IPv6.
    pub const GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 1);

    /// Address of the switch in a family.
    pub fn gateway(family: Family) -> IpAddr {
        match family {
            Family::V4 => Lab::GATEWAY.into(),
            Family::V6 => Lab::GATEWAY_V6.into(),
        }
    }

    /// The families of the underlay.
    pub fn families(&self) -> Families {
        self.families
    }

    /// Node `i`, from 0.
    #[track_caller]
    pub fn node(&self, i: usize) -> &Node {
        let all = self.nodes.len();
        self.nodes
            .get(i)
            .unwrap_or_else(|| panic!("node {i} of a lab of {all}"))
    }

    /// All nodes in order.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// Whether the uplinks are network cards.
    pub fn is_on_nics(&self) -> bool {
        self.on_nics
    }

    /// The namespace of the switch: bridge `br0` (and `br1`), one port a node ([`Node::port`]).
    pub fn underlay(&self) -> &Netns {
        &self.underlay
    }

    /// Adds a namespace that is neither node nor pod. It has nothing but a loopback, and goes with the lab.
    pub fn extra(&self, name: &str) -> anyhow::Result<Netns> {
        let ns = Netns::add(&format!("{}{name}", self.prefix))?;
        if self.families.has(Family::V6) {
            ns.prepare_ipv6(false)?;
        }
        Ok(ns)
    }

    /// Adds a host on the underlay with address 192.168.77.`host`/24, or fd77::`host`/64, or both, on `eth0`, and the switch as its
    /// gateway.
    pub fn host(&self, name: &str, host: u8) -> anyhow::Result<Netns> {
        let ns = self.extra(name)?;
        let port = format!("h{host}");
        plug_in(&self.underlay, "br0", &port, &ns, "eth0")?;
        for family in self.families.list() {
            add_address(&ns, "eth0", underlay_address(family, 0, host), family)?;
            add_default_route(&ns, Lab::gateway(family))?;
        }
        self.reaches_switch(&ns, name)?;
        Ok(ns)
    }

    /// The name prefix of everything in the lab.
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// Removes all that process `pid` made: for a signal handler's thread, with the own pid, before exit.
    pub fn sweep_pid(pid: u32) {
        sweep::sweep_pid(pid);
    }

    /// Removes all that processes which no longer run left behind, and gives their pids. [`Lab::new`] does it once a process.
    pub fn sweep_dead() -> Vec<u32> {
        sweep::sweep_dead()
    }
}

/// Whether the lab can work here. A test that gets `false` returns at once: the line on stderr says that it was
/// skipped. With `FLANNEL_TEST_REQUIRE_ROOT=1` it panics instead, so that CI cannot skip silently.
#[track_caller]
pub fn privileged() -> bool {
    if nix::unistd::geteuid().is_root() {
        return true;
    }
    let required = std::env::var("FLANNEL_TEST_REQUIRE_ROOT").is_ok_and(|value| value == "1");
    assert!(
        !required,
        "this test needs root, and FLANNEL_TEST_REQUIRE_ROOT=1"
    );
    eprintln!("skipped: this test needs root");
    false
}

fn add_switch(underlay: &Netns, uplink: u8, options: &LabOptions) -> anyhow::Result<()> {
    let mtu = options.mtu;
    // No snooping: the querier's silence must not filter a test's multicast.
    underlay.ip(&format!(
        "link add br{uplink} mtu {mtu} type bridge stp_state 0 forward_delay 0 mcast_snooping 0"
    ))?;
    let bridge = format!("br{uplink}");
    underlay.ip(&format!("link set {bridge} up"))?;
    // Whatever the nodes have: servers such as etcd are reached by it.
    let v4 = underlay_address(Family::V4, uplink, 1);
    add_address(underlay, &bridge, v4, Family::V4)?;
    if options.families.has(Family::V6) {
        let v6 = underlay_address(Family::V6, uplink, 1);
        add_address(underlay, &bridge, v6, Family::V6)?;
    }
    Ok(())
}

/// Address of a host on link `link` of the underlay: 0 is the nodes', 1 that of the second uplinks, 2 the far nodes'. Both families
/// read alike: 192.168.77.11, fd77::11.
pub(crate) fn underlay_address(family: Family, link: u8, host: u8) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::new(192, 168, 77 + link, host).into(),
        Family::V6 => {
            let digits = |value: u8| u16::from_str_radix(&value.to_string(), 16).unwrap_or(0);
            Ipv6Addr::new(0xfd00 | digits(77 + link), 0, 0, 0, 0, 0, 0, digits(host)).into()
        }
    }
}

/// Gives a device an address of the underlay, which holds at once.
pub(crate) fn add_address(
    ns: &Netns,
    ifname: &str,
    address: IpAddr,
    family: Family,
) -> anyhow::Result<()> {
    let line = match family {
        Family::V4 => format!("addr add {address}/24 brd + dev {ifname}"),
        Family::V6 => format!("addr add {address}/64 dev {ifname} nodad"),
    };
    ns.ip(&line)?;
    wait_for_address(ns, address)
}

/// Waits until an address that was just added is delivered to. With `nodad` IPv6 sends from it at once, but the route by which it
/// receives is the work of a queue (`addrconf_dad_work` in net/ipv6/addrconf.c): until then what comes for it counts as somebody else's.
pub(crate) fn wait_for_address(ns: &Netns, address: IpAddr) -> anyhow::Result<()> {
    if address.is_ipv4() {
        return Ok(());
    }
    let what = format!("{} delivers to {address}", ns.name());
    try_eventually(Duration::from_secs(10), &what, || {
        let text = address.to_string();
        let routes = ip_json(ns, &["-6", "route", "show", "table", "local", &text])?;
        let all = routes.as_array().context("routes")?;
        anyhow::ensure!(all.iter().any(|route| route["type"] == "local"), "{routes}");
        Ok(())
    })
}

/// Sends the rest of a family to a gateway.
pub(crate) fn add_default_route(ns: &Netns, gateway: IpAddr) -> anyhow::Result<()> {
    let flag = Family::of(gateway).flag();
    ns.ip(&format!("{flag} route add default via {gateway}"))
        .map(drop)
}

/// Connects `ifname` of `ns` to a new port of a bridge of the underlay.
pub(crate) fn plug_in(
    underlay: &Netns,
    bridge: &str,
    port: &str,
    ns: &Netns,
    ifname: &str,
) -> anyhow::Result<()> {
    let mac = crate::mac_text(crate::mac_for(&format!("{}/{ifname}", ns.name())));
    let mtu = crate::json::link(underlay, bridge)?["mtu"].clone();
    underlay.ip(&format!(
        "link add {port} mtu {mtu} type veth peer name {ifname} address {mac} mtu {mtu} netns {}",
        ns.name()
    ))?;
    underlay.ip(&format!("link set {port} master {bridge} up"))?;
    ns.ip(&format!("link set {ifname} up"))?;
    Ok(())
}
