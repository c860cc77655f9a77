//! Settings, nodes and addresses as the maps have them, for each family.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use flannel_common::{
    Config, ConfigV6, LAYOUT_VERSION, NodeRecord, NodeRecordV6, OuterV4, OuterV6, config_flags,
    header, header_v6, node_flags,
};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::{Gate, GateMode, Node, Settings};
use crate::addr::{IfIndex, VtepMac};

/// [`Config::own_index`] while this node has no subnet.
const NO_SUBNET: u32 = u32::MAX;
const NANOS_PER_MILLI: u64 = 1_000_000;

/// The map values of one family. What is of the other family has none.
pub trait Records {
    /// Value of the map `config`.
    type Config: Copy + Default + PartialEq;
    /// Value of the map `nodes`.
    type Node: Copy + Default + PartialEq;
    /// Key of the map `pods`.
    type Address: Copy;

    /// The value of the map `config`. The uplink is not part of it; whoever reads it back knows it from the attached program.
    fn config(settings: &Settings) -> Option<Self::Config>;

    /// Reads a value of the map `config` back. `None` if it was not written by [`Records::config`].
    fn settings(config: &Self::Config, uplink: IfIndex) -> Option<Settings>;

    /// [`Config::layout`] and [`Config::epoch`].
    fn stamp(config: &Self::Config) -> (u32, u32);

    /// The value of the map `nodes`.
    fn record(node: &Node) -> Option<Self::Node>;

    /// Reads a value of the map `nodes` back. `None` if it was not written by [`Records::record`].
    fn node(record: &Self::Node) -> Option<Node>;

    /// The key of the map `pods`.
    fn key(address: IpAddr) -> Option<Self::Address>;

    /// Reads a key back.
    fn address(key: Self::Address) -> IpAddr;
}

/// IPv4 over IPv4.
#[derive(Clone, Copy, Debug)]
pub struct V4;

/// IPv6 over IPv6.
#[derive(Clone, Copy, Debug)]
pub struct V6;

/// What both kinds of configuration have in the same form.
macro_rules! common {
    ($kind:ident, $settings:ident, $network:expr, $local:expr, { $($more:ident: $value:expr),* $(,)? }) => {{
        let (tunnel_ifindex, tunnel_mtu, own_mac) = $settings
            .tunnel
            .map_or((0, 0, [0; 6]), |(index, mtu, mac)| (index.get(), mtu, mac.octets()));
        $kind {
            layout: LAYOUT_VERSION,
            flags: flags($settings),
            network: $network,
            subnet_count: $settings.subnet_count(),
            tunnel_ifindex,
            tunnel_mtu,
            encap_flags: $settings.encap_flags,
            decap_flags: $settings.decap_flags,
            vni: header::vni_word($settings.vni),
            local: $local,
            port: $settings.port.to_be_bytes(),
            own_mac,
            source_port_min: $settings.source_port_min,
            source_port_span: $settings.source_port_span,
            mode: $settings.gate.mode.raw(),
            epoch: $settings.gate.epoch,
            own_index: $settings.own_index.unwrap_or(NO_SUBNET),
            ring_shift: $settings.ring_shift,
            lease: u64::from($settings.gate.lease_ms) * NANOS_PER_MILLI,
            $($more: $value,)*
        }
    }};
}

fn flags(settings: &Settings) -> u32 {
    let mut flags = 0;
    for (set, flag) in [
        (
            settings.tunnel.is_some(),
            config_flags::ENCAP | config_flags::DECAP,
        ),
        (settings.routed, config_flags::ROUTED),
        (settings.alone, config_flags::ALONE),
        (settings.decap_gso, config_flags::DECAP_GSO),
        (settings.xdp, config_flags::XDP),
    ] {
        if set {
            flags |= flag;
        }
    }
    flags
}

macro_rules! settings_of {
    ($config:ident, $uplink:ident, $network:expr, $local:expr, $subnet_len:expr) => {{
        let [a, b, c, _] = $config.vni;
        Settings {
            network: $network,
            subnet_len: $subnet_len,
            vni: u32::from_be_bytes([0, a, b, c]),
            port: u16::from_be_bytes($config.port),
            local: $local,
            uplink: $uplink,
            source_port_min: $config.source_port_min,
            source_port_span: $config.source_port_span,
            encap_flags: $config.encap_flags,
            decap_flags: $config.decap_flags,
            alone: $config.flags & config_flags::ALONE != 0,
            decap_gso: $config.flags & config_flags::DECAP_GSO != 0,
            xdp: $config.flags & config_flags::XDP != 0,
            gate: Gate {
                mode: GateMode::from_raw($config.mode)?,
                epoch: $config.epoch,
                lease_ms: u32::try_from($config.lease / NANOS_PER_MILLI).ok()?,
            },
            ring_shift: $config.ring_shift,
            routed: $config.flags & config_flags::ROUTED != 0,
            own_index: Some($config.own_index).filter(|index| *index != NO_SUBNET),
            tunnel: IfIndex::try_from($config.tunnel_ifindex)
                .ok()
                .map(|index| (index, $config.tunnel_mtu, VtepMac::from($config.own_mac))),
        }
    }};
}

/// The prefix length of a network whose subnets have this length and are this many.
fn prefix(subnet_len: u32, subnet_count: u32) -> Option<u8> {
    let bits = subnet_count.checked_ilog2()?;
    u8::try_from(subnet_len.checked_sub(bits)?).ok()
}

impl Records for V4 {
    type Config = Config;
    type Node = NodeRecord;
    type Address = [u8; 4];

    fn config(settings: &Settings) -> Option<Config> {
        let (IpNet::V4(network), IpAddr::V4(local)) = (settings.network, settings.local) else {
            return None;
        };
        let shift = 32u8.saturating_sub(settings.subnet_len);
        let network = u32::from(network.network());
        Some(common!(Config, settings, network, local.octets(), {
            subnet_shift: u32::from(shift),
        }))
    }

    fn settings(config: &Config, uplink: IfIndex) -> Option<Settings> {
        let subnet_len = 32u32.checked_sub(config.subnet_shift)?;
        let prefix = prefix(subnet_len, config.subnet_count)?;
        let network = Ipv4Net::new(Ipv4Addr::from(config.network), prefix).ok()?;
        let local = IpAddr::from(config.local);
        let subnet_len = u8::try_from(subnet_len).ok()?;
        let settings = settings_of!(config, uplink, network.into(), local, subnet_len);
        (Self::config(&settings)? == *config).then_some(settings)
    }

    fn stamp(config: &Config) -> (u32, u32) {
        (config.layout, config.epoch)
    }

    fn record(node: &Node) -> Option<NodeRecord> {
        let (IpAddr::V4(local), IpAddr::V4(remote)) = (node.local, node.remote) else {
            return None;
        };
        let (uplink_mac, next_hop_mac) = hop(node);
        let (header, ip_sum) = OuterV4 {
            next_hop_mac,
            uplink_mac,
            local: local.octets(),
            remote: remote.octets(),
            port: node.port,
            vni: node.vni,
            peer_mac: node.peer_mac.octets(),
            own_mac: node.own_mac.octets(),
        }
        .build();
        Some(NodeRecord {
            header,
            ifindex: node.ifindex.get(),
            flags: node_bits(node),
            path_mtu: node.path_mtu,
            ip_sum,
        })
    }

    fn node(record: &NodeRecord) -> Option<Node> {
        let bytes = &record.header;
        let offsets = Offsets {
            udp: header::UDP,
            vxlan: header::VXLAN,
            inner: header::INNER_ETH,
        };
        let local: [u8; 4] = part(bytes, header::IP + 12)?;
        let remote: [u8; 4] = part(bytes, header::IP + 16)?;
        let ends = (local.into(), remote.into());
        let way = (record.ifindex, record.path_mtu, record.flags);
        let node = offsets.node(bytes, ends, way)?;
        (Self::record(&node)? == *record).then_some(node)
    }

    fn key(address: IpAddr) -> Option<[u8; 4]> {
        match address {
            IpAddr::V4(address) => Some(address.octets()),
            IpAddr::V6(_) => None,
        }
    }

    fn address(key: [u8; 4]) -> IpAddr {
        key.into()
    }
}

impl Records for V6 {
    type Config = ConfigV6;
    type Node = NodeRecordV6;
    type Address = [u8; 16];

    fn config(settings: &Settings) -> Option<ConfigV6> {
        let (IpNet::V6(network), IpAddr::V6(local)) = (settings.network, settings.local) else {
            return None;
        };
        let shift = 128u8.saturating_sub(settings.subnet_len);
        let (first, mask) = (network.network().into(), network.netmask().into());
        Some(common!(ConfigV6, settings, halves(first), local.octets(), {
            network_mask: halves(mask),
            subnet_shift: u32::from(shift),
            reserved: 0,
        }))
    }

    fn settings(config: &ConfigV6, uplink: IfIndex) -> Option<Settings> {
        let subnet_len = 128u32.checked_sub(config.subnet_shift)?;
        let prefix = prefix(subnet_len, config.subnet_count)?;
        let [high, low] = config.network;
        let first = Ipv6Addr::from(u128::from(high) << 64 | u128::from(low));
        let network = Ipv6Net::new(first, prefix).ok()?;
        let local = IpAddr::from(config.local);
        let subnet_len = u8::try_from(subnet_len).ok()?;
        let settings = settings_of!(config, uplink, network.into(), local, subnet_len);
        (Self::config(&settings)? == *config).then_some(settings)
    }

    fn stamp(config: &ConfigV6) -> (u32, u32) {
        (config.layout, config.epoch)
    }

    fn record(node: &Node) -> Option<NodeRecordV6> {
        let (IpAddr::V6(local), IpAddr::V6(remote)) = (node.local, node.remote) else {
            return None;
        };
        let (uplink_mac, next_hop_mac) = hop(node);
        let (header, udp_sum) = OuterV6 {
            next_hop_mac,
            uplink_mac,
            local: local.octets(),
            remote: remote.octets(),
            port: node.port,
            vni: node.vni,
            peer_mac: node.peer_mac.octets(),
            own_mac: node.own_mac.octets(),
        }
        .build();
        Some(NodeRecordV6 {
            header,
            ifindex: node.ifindex.get(),
            flags: node_bits(node),
            path_mtu: node.path_mtu,
            udp_sum,
            reserved: 0,
        })
    }

    fn node(record: &NodeRecordV6) -> Option<Node> {
        let bytes = &record.header;
        let offsets = Offsets {
            udp: header_v6::UDP,
            vxlan: header_v6::VXLAN,
            inner: header_v6::INNER_ETH,
        };
        let local: [u8; 16] = part(bytes, header_v6::IP + 8)?;
        let remote: [u8; 16] = part(bytes, header_v6::IP + 24)?;
        let ends = (local.into(), remote.into());
        let way = (record.ifindex, record.path_mtu, record.flags);
        let node = offsets.node(bytes, ends, way)?;
        (Self::record(&node)? == *record).then_some(node)
    }

    fn key(address: IpAddr) -> Option<[u8; 16]> {
        match address {
            IpAddr::V6(address) => Some(address.octets()),
            IpAddr::V4(_) => None,
        }
    }

    fn address(key: [u8; 16]) -> IpAddr {
        key.into()
    }
}

fn halves(number: u128) -> [u64; 2] {
    let (high, low) = flannel_common::map::halves(number.to_be_bytes());
    [high, low]
}

/// MAC addresses of the uplink and of the next hop, zero while they are not known.
fn hop(node: &Node) -> ([u8; 6], [u8; 6]) {
    node.hop.map_or(([0; 6], [0; 6]), |(uplink, hop)| {
        (uplink.octets(), hop.octets())
    })
}

fn node_bits(node: &Node) -> u32 {
    let hop = if node.hop.is_some() {
        node_flags::NEXT_HOP
    } else {
        0
    };
    let routed = if node.routed { node_flags::ROUTED } else { 0 };
    node_flags::VALID | hop | routed
}

/// Where headers begin that are alike in both families.
struct Offsets {
    udp: usize,
    vxlan: usize,
    inner: usize,
}

impl Offsets {
    fn node(
        &self,
        header: &[u8],
        (local, remote): (IpAddr, IpAddr),
        (ifindex, path_mtu, flags): (u32, u32, u32),
    ) -> Option<Node> {
        let [a, b, c, _] = part(header, self.vxlan + 4)?;
        let mac = |at| -> Option<VtepMac> { Some(part::<6>(header, at)?.into()) };
        Some(Node {
            remote,
            local,
            peer_mac: mac(self.inner)?,
            own_mac: mac(self.inner + 6)?,
            vni: u32::from_be_bytes([0, a, b, c]),
            port: u16::from_be_bytes(part(header, self.udp + 2)?),
            ifindex: IfIndex::try_from(ifindex).ok()?,
            hop: if flags & node_flags::NEXT_HOP != 0 {
                Some((mac(6)?, mac(0)?))
            } else {
                None
            },
            path_mtu,
            routed: flags & node_flags::ROUTED != 0,
        })
    }
}

fn part<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at + N)?.try_into().ok()
}
