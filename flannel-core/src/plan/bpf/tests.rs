use proptest::{collection, option, prelude::*};

use std::net::{Ipv4Addr, Ipv6Addr};

use flannel_common::{Config, ConfigV6, LAYOUT_VERSION, NodeRecord, NodeRecordV6};
use ipnet::{Ipv4Net, Ipv6Net};

use super::*;
use crate::plan::{GateMode, Records as _, V4, V6};

const NO_SUBNET: u32 = u32::MAX;

/// As the maps of IPv4 have them.
fn record(node: &Node) -> NodeRecord {
    V4::record(node).expect("a node of IPv4")
}

fn config(settings: &Settings) -> Config {
    V4::config(settings).expect("settings of IPv4")
}

proptest! {
    #[test]
    fn node_round_trips(node in node()) {
        prop_assert_eq!(V4::node(&record(&node)), Some(node));
    }

    /// A record that changed since it was written is another node's, or nobody's: never this node's.
    #[test]
    fn altered_node_is_rejected_or_another(node in node(), bit in 0..NODE_BITS) {
        let mut record = record(&node);
        flip_node(&mut record, bit);
        match V4::node(&record) {
            None => {}
            Some(read) => {
                prop_assert_ne!(read, node);
                prop_assert_eq!(V4::record(&read), Some(record));
            }
        }
    }

    #[test]
    fn reading_any_node_record_never_panics(header in collection::vec(any::<u8>(), 64), words: [u32; 4]) {
        let [ifindex, flags, path_mtu, ip_sum] = words;
        let record = NodeRecord { header: header.try_into().unwrap(), ifindex, flags, path_mtu, ip_sum };
        prop_assert!(V4::node(&record).is_none_or(|node| V4::record(&node) == Some(record)));
    }

    #[test]
    fn settings_round_trip(settings in settings()) {
        prop_assert_eq!(V4::settings(&config(&settings), settings.uplink), Some(settings));
    }

    #[test]
    fn altered_settings_are_rejected_or_others(settings in settings(), bit in 0..CONFIG_BITS) {
        let mut config = config(&settings);
        flip_config(&mut config, bit);
        match V4::settings(&config, settings.uplink) {
            None => {}
            Some(read) => {
                prop_assert_ne!(&read, &settings);
                prop_assert_eq!(V4::config(&read), Some(config));
            }
        }
    }

    /// Mostly near what we write, so that it gets past the version.
    #[test]
    fn reading_any_config_never_panics(settings in settings(), words: [u32; 7], bytes: [u8; 12], known: bool) {
        let [layout, flags, network, subnet_shift, subnet_count, tunnel_ifindex, tunnel_mtu] = words;
        let [a, b, c, d, e, f, g, h, ..] = bytes;
        let config = Config {
            layout: if known { LAYOUT_VERSION } else { layout },
            flags: if known { flags & 0x3f } else { flags },
            network,
            subnet_shift: if known { subnet_shift % 40 } else { subnet_shift },
            subnet_count,
            tunnel_ifindex,
            tunnel_mtu,
            vni: [a, b, c, d],
            local: [e, f, g, h],
            ..config(&settings)
        };
        let read = V4::settings(&config, settings.uplink);
        prop_assert!(read.is_none_or(|read| V4::config(&read) == Some(config)));
    }

    /// The planner and the programs count subnets alike.
    #[test]
    fn indexes_are_those_of_the_programs(settings in settings(), at: u32, wider in 0u8..4) {
        let config = config(&settings);
        let offset = at % settings.subnet_count();
        let shift = 32 - u32::from(settings.subnet_len);
        let base = number(settings.network.network()).0 as u32 + offset.checked_shl(shift).unwrap_or(0);
        let length = settings.subnet_len.saturating_sub(wider).max(settings.network.prefix_len());
        let subnet = Ipv4Net::new(base.into(), length).unwrap().trunc();
        let range = indexes(&settings, &subnet.into()).expect("a subnet of the network");
        let index = |address: Ipv4Addr| flannel_common::map::subnet_index(&config, address.octets());
        prop_assert_eq!(index(subnet.network()), Some(range.start));
        prop_assert_eq!(index(subnet.broadcast()), Some(range.end - 1));
        prop_assert!(range.contains(&offset));
    }
}

/// The same in IPv6.
fn node_v6() -> impl Strategy<Value = Node> {
    (node(), any::<u128>(), any::<u128>()).prop_map(|(node, remote, local)| Node {
        remote: Ipv6Addr::from(remote).into(),
        local: Ipv6Addr::from(local).into(),
        ..node
    })
}

/// A network of at most 2^20 subnets, wherever in the address they are.
fn settings_v6() -> impl Strategy<Value = Settings> {
    let network = (any::<u128>(), 1u8..=124, 0u8..=20).prop_map(|(address, length, bits)| {
        let network = Ipv6Net::new(address.into(), length).unwrap().trunc();
        (network, (length + bits).min(128))
    });
    (settings(), network, any::<u128>()).prop_map(|(settings, (network, subnet_len), local)| {
        Settings {
            network: network.into(),
            subnet_len,
            local: Ipv6Addr::from(local).into(),
            ..settings
        }
    })
}

proptest! {
    #[test]
    fn records_of_ipv6_round_trip(node in node_v6(), settings in settings_v6()) {
        let record = V6::record(&node).expect("a node of IPv6");
        prop_assert_eq!(V6::node(&record), Some(node));
        let config = V6::config(&settings).expect("settings of IPv6");
        prop_assert_eq!(V6::settings(&config, settings.uplink), Some(settings));
    }

    #[test]
    fn an_altered_header_of_ipv6_is_rejected_or_anothers(node in node_v6(), bit in 0usize..84 * 8) {
        let mut record = V6::record(&node).expect("a node of IPv6");
        record.header[bit / 8] ^= 1 << (bit % 8);
        if let Some(read) = V6::node(&record) {
            prop_assert_ne!(read, node);
            prop_assert_eq!(V6::record(&read), Some(record));
        }
    }

    #[test]
    fn families_have_no_records_of_each_other(node in node(), other in node_v6(), settings in settings(), others in settings_v6()) {
        prop_assert_eq!(V6::record(&node), None);
        prop_assert_eq!(V4::record(&other), None);
        prop_assert_eq!(V6::config(&settings), None);
        prop_assert_eq!(V4::config(&others), None);
    }

    /// The planner and the programs count subnets alike.
    #[test]
    fn indexes_of_ipv6_are_those_of_the_programs(settings in settings_v6(), at: u32, wider in 0u8..4) {
        let config = V6::config(&settings).expect("settings of IPv6");
        let offset = at % settings.subnet_count();
        let shift = 128 - u32::from(settings.subnet_len);
        let base = number(settings.network.network()).0 + u128::from(offset).checked_shl(shift).unwrap_or(0);
        let length = settings.subnet_len.saturating_sub(wider).max(settings.network.prefix_len());
        let subnet = Ipv6Net::new(base.into(), length).unwrap().trunc();
        let range = indexes(&settings, &subnet.into()).expect("a subnet of the network");
        let index = |address: Ipv6Addr| flannel_common::map::subnet_index_v6(&config, address.octets());
        prop_assert_eq!(index(subnet.network()), Some(range.start));
        prop_assert_eq!(index(subnet.broadcast()), Some(range.end - 1));
        prop_assert!(range.contains(&offset));
    }
}

#[test]
fn empty_entries_are_nobodys() {
    let uplink = IfIndex::try_from(2).unwrap();
    assert_eq!(V4::node(&NodeRecord::default()), None);
    assert_eq!(V4::settings(&Config::default(), uplink), None);
    assert_eq!(V6::node(&NodeRecordV6::default()), None);
    assert_eq!(V6::settings(&ConfigV6::default(), uplink), None);
}

#[test]
fn subnets_that_no_entry_can_hold() {
    let settings = Settings {
        network: "10.5.0.0/16".parse().unwrap(),
        subnet_len: 24,
        vni: 1,
        port: 8472,
        local: Ipv4Addr::new(192, 0, 2, 1).into(),
        uplink: IfIndex::try_from(2).unwrap(),
        source_port_min: 32_768,
        source_port_span: 28_231,
        encap_flags: 0,
        decap_flags: 0,
        alone: false,
        decap_gso: false,
        xdp: false,
        gate: Gate::default(),
        routed: false,
        ring_shift: 0,
        own_index: None,
        tunnel: None,
    };
    for (subnet, range) in [
        ("10.5.0.0/24", Some(0..1)),
        ("10.5.255.0/24", Some(255..256)),
        ("10.5.2.0/23", Some(2..4)),
        ("10.5.0.0/16", Some(0..256)),
        ("10.5.3.0/25", None),
        ("10.4.0.0/15", None),
        ("10.6.0.0/24", None),
        ("0.0.0.0/0", None),
        ("fd00::/64", None),
    ] {
        assert_eq!(
            indexes(&settings, &subnet.parse().unwrap()),
            range,
            "{subnet}"
        );
    }
}

fn index() -> impl Strategy<Value = IfIndex> {
    (1u32..=0x7fff_ffff).prop_map(|index| IfIndex::try_from(index).unwrap())
}

fn mac() -> impl Strategy<Value = VtepMac> {
    any::<[u8; 6]>().prop_map(VtepMac::from)
}

fn node() -> impl Strategy<Value = Node> {
    (
        (any::<u32>(), any::<u32>()),
        (mac(), mac()),
        0u32..=0x00ff_ffff,
        any::<u16>(),
        index(),
        option::of((mac(), mac())),
        (any::<u32>(), any::<bool>()),
    )
        .prop_map(
            |(
                (remote, local),
                (peer_mac, own_mac),
                vni,
                port,
                ifindex,
                hop,
                (path_mtu, routed),
            )| Node {
                remote: Ipv4Addr::from(remote).into(),
                local: Ipv4Addr::from(local).into(),
                peer_mac,
                own_mac,
                vni,
                port,
                ifindex,
                hop,
                path_mtu,
                routed,
            },
        )
}

/// A network of at least one subnet and at most 2^31.
fn settings() -> impl Strategy<Value = Settings> {
    let network = (any::<u32>(), 1u8..=32)
        .prop_flat_map(|(address, length)| (Just((address, length)), length..=32))
        .prop_map(|((address, length), subnet_len)| {
            let network = Ipv4Net::new(address.into(), length).unwrap().trunc();
            (network, subnet_len)
        });
    (
        network,
        (0u32..=0x00ff_ffff, any::<u16>(), any::<u32>()),
        index(),
        any::<(u16, u16)>(),
        any::<(u32, u32)>(),
        any::<(bool, bool, bool, bool)>(),
        option::of((index(), any::<u32>(), mac())),
        (gate(), any::<u32>(), option::of(0..NO_SUBNET)),
    )
        .prop_map(
            |(
                (network, subnet_len),
                (vni, port, local),
                uplink,
                ports,
                flags,
                able,
                tunnel,
                (gate, ring_shift, own_index),
            )| {
                Settings {
                    network: network.into(),
                    subnet_len,
                    vni,
                    port,
                    local: Ipv4Addr::from(local).into(),
                    uplink,
                    source_port_min: ports.0,
                    source_port_span: ports.1,
                    encap_flags: flags.0,
                    decap_flags: flags.1,
                    alone: able.0,
                    decap_gso: able.1,
                    xdp: able.2,
                    routed: able.3,
                    gate,
                    ring_shift,
                    own_index,
                    tunnel,
                }
            },
        )
}

fn gate() -> impl Strategy<Value = Gate> {
    let mode = (0u32..3).prop_map(|raw| GateMode::from_raw(raw).unwrap());
    (mode, any::<u32>(), any::<u32>()).prop_map(|(mode, epoch, lease_ms)| Gate {
        mode,
        epoch,
        lease_ms,
    })
}

const NODE_BITS: usize = size_of::<NodeRecord>() * 8;

fn flip_node(record: &mut NodeRecord, bit: usize) {
    let NodeRecord {
        header,
        ifindex,
        flags,
        path_mtu,
        ip_sum,
    } = record;
    let words = [ifindex, flags, path_mtu, ip_sum];
    let (byte, of_byte) = (bit / 8, 1 << (bit % 8));
    match header.get_mut(byte) {
        Some(byte) => *byte ^= of_byte,
        None => flip_word(words, bit - header.len() * 8),
    }
}

const CONFIG_BITS: usize = size_of::<Config>() * 8;

fn flip_config(config: &mut Config, bit: usize) {
    let Config {
        layout,
        flags,
        network,
        subnet_shift,
        subnet_count,
        tunnel_ifindex,
        tunnel_mtu,
        encap_flags,
        decap_flags,
        vni,
        local,
        port,
        own_mac,
        source_port_min,
        source_port_span,
        mode,
        epoch,
        own_index,
        ring_shift,
        lease,
    } = config;
    let words = [
        layout,
        flags,
        network,
        subnet_shift,
        subnet_count,
        tunnel_ifindex,
        tunnel_mtu,
        encap_flags,
        decap_flags,
        mode,
        epoch,
        own_index,
        ring_shift,
    ];
    let Some(bit) = bit.checked_sub(words.len() * 32) else {
        return flip_word(words, bit);
    };
    let bytes = vni.iter_mut().chain(local).chain(port).chain(own_mac);
    let mut places: Vec<&mut u8> = bytes.collect();
    match places.get_mut(bit / 8) {
        Some(byte) => **byte ^= 1 << (bit % 8),
        None if bit < 128 + 16 => *source_port_min ^= 1 << (bit - 128),
        None if bit < 144 + 16 => *source_port_span ^= 1 << (bit - 144),
        None => *lease ^= 1 << (bit - 160),
    }
}

fn flip_word<const N: usize>(words: [&mut u32; N], bit: usize) {
    if let Some(word) = words.into_iter().nth(bit / 32) {
        *word ^= 1 << (bit % 32);
    }
}
