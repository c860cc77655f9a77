//! Layouts of the map values.

use crate::{header, header_v6};

/// Version of every layout in this crate. It is part of the pin path, so an agent never reads another version's maps.
pub const LAYOUT_VERSION: u32 = 3;

/// How many seconds the maps are believed after the agent has last said, in the map `alive`, that it keeps them. Longer than a restart or
/// an upgrade takes; after that the kernel's tables are followed, which another program may keep by then.
pub const TRUST: u64 = 60;

/// Index into the array `nodes`. Zero means "no node".
pub type NodeId = u32;

/// Bits of [`Config::flags`].
pub mod config_flags {
    /// `to_overlay` may encapsulate.
    pub const ENCAP: u32 = 1 << 0;
    /// `from_wire` may decapsulate.
    pub const DECAP: u32 = 1 << 1;
    /// There is no kernel vxlan device: what eBPF cannot carry is dropped, not passed on.
    pub const ALONE: u32 = 1 << 2;
    /// GRO super-packets may be decapsulated: the kernel clears their tunnel state, or there is no other way.
    pub const DECAP_GSO: u32 = 1 << 3;
    /// `xdp_decap` may strip the outer headers: `from_wire` is in place to take what it leaves.
    pub const XDP: u32 = 1 << 4;
    /// Some peers are on the same link and get packets as they are, and so they send them: `from_wire` looks at plain packets too.
    pub const ROUTED: u32 = 1 << 5;
}

/// What the programs may call on this kernel: bits of the global `KERNEL_HELPERS`, which is set before loading.
pub mod helper_flags {
    /// `bpf_ktime_get_coarse_ns` (kernel 5.11).
    pub const COARSE_CLOCK: u32 = 1 << 0;
    /// `bpf_check_mtu` (kernel 5.12). Without it no connection is admitted by its SYN.
    pub const CHECK_MTU: u32 = 1 << 1;
}

/// What `xdp_decap` puts in front of a frame, as XDP metadata: the frame was inside a packet of the overlay.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BareMark {
    /// [`BARE_MAGIC`] or [`BARE_MAGIC_V6`].
    pub magic: u32,
}

/// Value of [`BareMark::magic`] in the overlay of IPv4.
pub const BARE_MAGIC: u32 = 0xf1a0_dec0;

/// The same in that of IPv6: each `from_wire` leaves the other's frames to the other.
pub const BARE_MAGIC_V6: u32 = 0xf1a0_dec6;

/// Bits of [`NodeRecord::flags`].
pub mod node_flags {
    /// The header is complete but for the outer MAC addresses.
    pub const VALID: u32 = 1 << 0;
    /// The outer MAC addresses are those of the current next hop.
    pub const NEXT_HOP: u32 = 1 << 1;
    /// The peer is on the link: packets of pods go there as they are, with the first Ethernet header of the record.
    pub const ROUTED: u32 = 1 << 2;
}

/// The one entry of the array `config`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Config {
    /// [`LAYOUT_VERSION`] of the agent that wrote it; zero before the first write.
    pub layout: u32,
    /// [`config_flags`].
    pub flags: u32,
    /// First address of the cluster network, as a number.
    pub network: u32,
    /// Bits of host part in a node's subnet: index = (address - network) >> shift.
    pub subnet_shift: u32,
    /// Number of subnets in the network; indexes from here on are not ours.
    pub subnet_count: u32,
    /// Interface index of `flannel.<vni>`.
    pub tunnel_ifindex: u32,
    /// MTU of `flannel.<vni>` in bytes.
    pub tunnel_mtu: u32,
    /// Flags for `bpf_skb_adjust_room` when encapsulating, as this kernel accepts them and [`room_flags`] unpacks them.
    pub encap_flags: u32,
    /// Flags for `bpf_skb_adjust_room` when decapsulating.
    pub decap_flags: u32,
    /// The last four bytes of the VXLAN header: VNI and a zero byte.
    pub vni: [u8; 4],
    /// Our VTEP address on the underlay.
    pub local: [u8; 4],
    /// UDP destination port of the overlay.
    pub port: [u8; 2],
    /// MAC address of `flannel.<vni>`, as published.
    pub own_mac: [u8; 6],
    /// Lowest UDP source port (`net.ipv4.ip_local_port_range`).
    pub source_port_min: u16,
    /// Highest source port minus lowest.
    pub source_port_span: u16,
    /// The flow gate's mode, see [`crate::flow::mode`].
    pub mode: u32,
    /// Entries of `flows` with another epoch count for nothing.
    pub epoch: u32,
    /// Index of this node's own subnet in `subnets` (where it is empty); `u32::MAX` while there is none.
    pub own_index: u32,
    /// Slots of `ring` for one CPU, as a power of two, see [`crate::flow::ring_shift`].
    pub ring_shift: u32,
    /// How long a flow may bypass the stack after the stack has passed one of its packets, in nanoseconds.
    pub lease: u64,
}

const _: () = assert!(size_of::<Config>() == 80);

/// The one entry of the array `config` of the IPv6 programs. Fields are those of [`Config`] where nothing else is said.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "the same fields as in `Config`")]
pub struct ConfigV6 {
    pub layout: u32,
    pub flags: u32,
    /// First address of the cluster network, as two numbers, the upper half first.
    pub network: [u64; 2],
    /// Mask of the cluster network's prefix, likewise.
    pub network_mask: [u64; 2],
    pub subnet_shift: u32,
    /// Number of subnets in the network: a power of two.
    pub subnet_count: u32,
    pub tunnel_ifindex: u32,
    pub tunnel_mtu: u32,
    pub encap_flags: u32,
    pub decap_flags: u32,
    pub vni: [u8; 4],
    pub local: [u8; 16],
    pub port: [u8; 2],
    pub own_mac: [u8; 6],
    pub source_port_min: u16,
    pub source_port_span: u16,
    pub mode: u32,
    pub epoch: u32,
    pub own_index: u32,
    pub ring_shift: u32,
    /// Zero.
    pub reserved: u32,
    pub lease: u64,
}

const _: () = assert!(size_of::<ConfigV6>() == 128);

/// Flags of `bpf_skb_adjust_room` (`include/uapi/linux/bpf.h`) as the maps carry them, see [`room_flags`].
pub mod room {
    /// `BPF_F_ADJ_ROOM_FIXED_GSO`.
    pub const FIXED_GSO: u32 = 1 << 0;
    /// `BPF_F_ADJ_ROOM_ENCAP_L3_IPV4`.
    pub const ENCAP_L3_IPV4: u32 = 1 << 1;
    /// `BPF_F_ADJ_ROOM_ENCAP_L3_IPV6`.
    pub const ENCAP_L3_IPV6: u32 = 1 << 2;
    /// `BPF_F_ADJ_ROOM_ENCAP_L4_UDP`.
    pub const ENCAP_L4_UDP: u32 = 1 << 4;
    /// `BPF_F_ADJ_ROOM_NO_CSUM_RESET`.
    pub const NO_CSUM_RESET: u32 = 1 << 5;
    /// `BPF_F_ADJ_ROOM_ENCAP_L2_ETH`, which 5.10 does not know.
    pub const ENCAP_L2_ETH: u32 = 1 << 6;
    /// `BPF_F_ADJ_ROOM_DECAP_L4_UDP`: clears the tunnel's GSO state on decapsulation; seen from 7.3 on.
    pub const DECAP_L4_UDP: u32 = 1 << 10;
    /// `BPF_F_ADJ_ROOM_ENCAP_L2(14)`: the inner Ethernet header. Not 22: counting the VXLAN header too breaks segmentation.
    pub const ENCAP_L2_14: u32 = 14 << 24;
    /// What every kernel takes for encapsulation.
    pub const ENCAP: u32 = FIXED_GSO | ENCAP_L3_IPV4 | ENCAP_L4_UDP | NO_CSUM_RESET | ENCAP_L2_14;
    /// The same with an outer IPv6 header.
    pub const ENCAP_V6: u32 = ENCAP ^ ENCAP_L3_IPV4 ^ ENCAP_L3_IPV6;
    /// What every kernel takes for decapsulation.
    pub const DECAP: u32 = FIXED_GSO | NO_CSUM_RESET;
}

/// The 64-bit flags of `bpf_skb_adjust_room` from the 32 bits that the maps carry: the upper eight are the length of the inner
/// link header, which the helper wants at bit 56 (`BPF_ADJ_ROOM_ENCAP_L2_SHIFT`).
#[inline(always)]
pub const fn room_flags(compact: u32) -> u64 {
    (compact & 0x00ff_ffff) as u64 | ((compact >> 24) as u64) << 56
}

/// One entry of the array `nodes`: everything needed to send to one peer.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeRecord {
    /// Outer Ethernet, IPv4, UDP, VXLAN and inner Ethernet header, see [`crate::OuterV4`].
    pub header: [u8; header::HEADER_LEN],
    /// Interface index of the uplink towards the peer.
    pub ifindex: u32,
    /// [`node_flags`].
    pub flags: u32,
    /// Path MTU of the underlay towards the peer, in bytes of outer IP packet.
    pub path_mtu: u32,
    /// One's complement sum of the outer IPv4 header as it stands in `header`.
    pub ip_sum: u32,
}

const _: () = assert!(size_of::<NodeRecord>() == 80);

impl Default for NodeRecord {
    fn default() -> Self {
        Self {
            header: [0; header::HEADER_LEN],
            ifindex: 0,
            flags: 0,
            path_mtu: 0,
            ip_sum: 0,
        }
    }
}

/// One entry of the array `nodes` of the IPv6 programs. Fields are those of [`NodeRecord`] where nothing else is said.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the same fields as in `NodeRecord`")]
pub struct NodeRecordV6 {
    /// Outer Ethernet, IPv6, UDP, VXLAN and inner Ethernet header, see [`crate::OuterV6`].
    pub header: [u8; header_v6::HEADER_LEN],
    pub ifindex: u32,
    pub flags: u32,
    pub path_mtu: u32,
    /// One's complement sum of what the outer UDP checksum covers and no packet changes, see [`crate::OuterV6::build`].
    pub udp_sum: u32,
    /// Zero.
    pub reserved: u32,
}

const _: () = assert!(size_of::<NodeRecordV6>() == 104);

impl Default for NodeRecordV6 {
    fn default() -> Self {
        Self {
            header: [0; header_v6::HEADER_LEN],
            ifindex: 0,
            flags: 0,
            path_mtu: 0,
            udp_sum: 0,
            reserved: 0,
        }
    }
}

/// Value of the hash `pods`, by pod address in network order: a pod of this node that packets may be handed to directly.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PodRecord {
    /// Interface index of the host's end of its veth pair.
    pub ifindex: u32,
    /// Changes with every change of the record, and with every new owner of the address; never repeats.
    pub generation: u32,
    /// Bytes of IP packet that reach it: the smaller MTU of the bridge and of the veth.
    pub mtu: u32,
    /// The pod's MAC address.
    pub mac: [u8; 6],
    /// MAC address of its gateway: the bridge.
    pub gateway_mac: [u8; 6],
}

const _: () = assert!(size_of::<PodRecord>() == 24);

/// Index of the subnet that holds `address` in the array `subnets`; `None` outside the network.
#[inline(always)]
pub const fn subnet_index(config: &Config, address: [u8; 4]) -> Option<u32> {
    let offset = u32::from_be_bytes(address).wrapping_sub(config.network);
    let index = offset >> (config.subnet_shift & 31);
    if index < config.subnet_count {
        Some(index)
    } else {
        None
    }
}

/// Index of the subnet that holds the IPv6 `address` in the array `subnets`; `None` outside the network.
///
/// In halves of 64 bits: the BPF target has no shifts of 128.
#[inline(always)]
pub const fn subnet_index_v6(config: &ConfigV6, address: [u8; 16]) -> Option<u32> {
    let (high, low) = halves(address);
    if high & config.network_mask[0] != config.network[0]
        || low & config.network_mask[1] != config.network[1]
    {
        return None;
    }
    let shift = config.subnet_shift & 127;
    let number = if shift >= 64 {
        high >> (shift - 64)
    } else if shift == 0 {
        low
    } else {
        low >> shift | high << (64 - shift)
    };
    // A configuration that was never written has no subnets.
    let count = config.subnet_count;
    if count == 0 {
        return None;
    }
    Some(number as u32 & (count - 1))
}

/// The halves of an IPv6 address as numbers.
#[inline(always)]
pub const fn halves(address: [u8; 16]) -> (u64, u64) {
    let number = u128::from_be_bytes(address);
    ((number >> 64) as u64, number as u64)
}

#[cfg(feature = "user")]
mod pod {
    // SAFETY: repr(C), made of integers and byte arrays only, without padding (the size asserts above).
    unsafe impl aya::Pod for super::Config {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::NodeRecord {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::ConfigV6 {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::NodeRecordV6 {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::PodRecord {}
    // SAFETY: as above, with either kind of address.
    unsafe impl<A: aya::Pod> aya::Pod for crate::flow::FlowKey<A> {}
    // SAFETY: as above.
    unsafe impl aya::Pod for crate::flow::Flow {}
    // SAFETY: as above.
    unsafe impl<A: aya::Pod> aya::Pod for crate::flow::NatKey<A> {}
    // SAFETY: as above.
    unsafe impl<A: aya::Pod> aya::Pod for crate::flow::LastSighting<A> {}
    // SAFETY: two u64.
    unsafe impl aya::Pod for crate::counter::Counter {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn config() -> Config {
        Config {
            network: u32::from_be_bytes([10, 5, 0, 0]),
            subnet_shift: 8,
            subnet_count: 256,
            ..Config::default()
        }
    }

    #[test]
    fn room_flags_put_the_length_on_top() {
        assert_eq!(room_flags(14 << 24 | 0x73), 14 << 56 | 0x73);
        assert_eq!(room_flags(0x21), 0x21);
    }

    #[test]
    fn index_counts_subnets() {
        assert_eq!(subnet_index(&config(), [10, 5, 0, 0]), Some(0));
        assert_eq!(subnet_index(&config(), [10, 5, 3, 9]), Some(3));
        assert_eq!(subnet_index(&config(), [10, 5, 255, 255]), Some(255));
    }

    fn config_v6(network: u128, prefix: u32, subnet_len: u32) -> ConfigV6 {
        let mask = u128::MAX.checked_shl(128 - prefix).unwrap_or(0);
        let halves = |number: u128| [(number >> 64) as u64, number as u64];
        ConfigV6 {
            network: halves(network & mask),
            network_mask: halves(mask),
            subnet_shift: 128 - subnet_len,
            subnet_count: 1 << (subnet_len - prefix),
            ..ConfigV6::default()
        }
    }

    proptest! {
        // In halves as in one: with the subnets' bits above, below and across the middle.
        #[test]
        fn ipv6_index_is_that_of_whole_numbers(
            network in any::<u128>(),
            prefix in 1u32..=124,
            bits in 1u32..=20,
            address in any::<u128>(),
            inside in any::<bool>(),
        ) {
            let subnet_len = (prefix + bits).min(128);
            let config = config_v6(network, prefix, subnet_len);
            let mask = u128::MAX << (128 - prefix);
            let address = if inside { network & mask | address & !mask } else { address };
            let expected = (address & mask == network & mask)
                .then(|| (address & !mask).checked_shr(128 - subnet_len).unwrap_or(0) as u32);
            prop_assert_eq!(subnet_index_v6(&config, address.to_be_bytes()), expected);
        }
    }

    #[test]
    fn ipv6_index_counts_subnets() {
        let network =
            u128::from_be_bytes([0xfd, 0, 0x12, 0x34, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        let config = config_v6(network, 48, 64);
        let address = |subnet: u16, host: u8| {
            let mut bytes = network.to_be_bytes();
            bytes[6..8].copy_from_slice(&subnet.to_be_bytes());
            bytes[15] = host;
            bytes
        };
        assert_eq!(subnet_index_v6(&config, address(0, 0)), Some(0));
        assert_eq!(subnet_index_v6(&config, address(0xabcd, 9)), Some(0xabcd));
        let mut other = address(1, 1);
        other[5] = 1;
        assert_eq!(subnet_index_v6(&config, other), None);
        assert_eq!(subnet_index_v6(&ConfigV6::default(), [0; 16]), None);
    }

    #[test]
    fn index_ends_with_the_network() {
        assert_eq!(subnet_index(&config(), [10, 6, 0, 0]), None);
        assert_eq!(subnet_index(&config(), [10, 4, 255, 255]), None);
        assert_eq!(subnet_index(&config(), [0, 0, 0, 0]), None);
        assert_eq!(subnet_index(&Config::default(), [10, 5, 0, 1]), None);
    }
}
