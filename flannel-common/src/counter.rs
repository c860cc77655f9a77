//! Counters and reasons: one list serves as map index, metric label and policy.

/// The way a packet goes, seen from this node.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Direction {
    /// Leaving through the tunnel (`to_overlay`).
    Encap = 0,
    /// Arriving from the wire (`from_wire`).
    Decap = 1,
}

impl Direction {
    /// Both directions, in index order.
    pub const ALL: [Self; 2] = [Self::Encap, Self::Decap];

    /// The metric label.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Encap => "encap",
            Self::Decap => "decap",
        }
    }
}

/// Index into the per-CPU map `counters`.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum CounterId {
    /// Packets that eBPF encapsulated and sent to the underlay.
    BpfEncap = 0,
    /// Packets that eBPF decapsulated and handed to the stack.
    BpfDecap = 1,
    /// Packets from a pod that bypassed the stack on their way to another node. Not among [`CounterId::BpfEncap`].
    FastEncap = 2,
    /// Packets from another node that bypassed the stack on their way to a pod. Not among [`CounterId::BpfDecap`].
    FastDecap = 3,
    /// Packets between two pods of this node that bypassed the stack.
    FastLocal = 4,
    /// Packets that the gate could have let pass, and sent through the stack with a tag.
    GateTagged = 5,
    /// Packets found untouched behind the stack.
    GateConfirmed = 6,
    /// Packets found behind the stack that did not enter it so: translated, or from elsewhere.
    GateRefuted = 7,
    /// Connections admitted by their first SYN.
    GateAdmitted = 8,
    /// Packets from the wire that native XDP stripped of their outer headers. They count again where they go on.
    XdpDecap = 9,
    /// Packets that native XDP should have stripped, and that reached the hook behind it whole. Counted while XDP is wanted. A driver that takes the program and never runs it shows here.
    XdpMissed = 10,
    /// Packets from a pod that bypassed the stack on their way to a node on the same link, without outer headers. Not among
    /// [`CounterId::FastEncap`].
    FastRoutedOut = 11,
    /// Packets from a node on the same link, without outer headers, that bypassed the stack on their way to a pod. Not among
    /// [`CounterId::FastDecap`].
    FastRoutedIn = 12,
}

impl CounterId {
    /// Number of entries of the map.
    pub const COUNT: u32 = 16;
}

/// One entry of `counters`, per CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counter {
    /// Packets; a GSO super-packet counts once.
    pub packets: u64,
    /// Bytes of inner Ethernet frame.
    pub bytes: u64,
}

const _: () = assert!(size_of::<Counter>() == 16);

macro_rules! drop_reasons {
    ($($(#[$doc:meta])* $name:ident = $label:literal,)*) => {
        /// Why eBPF did not carry a packet of the overlay. With a kernel vxlan device the packet then goes on, unchanged, to
        /// that device, which decides as it always did; without one it is dropped.
        #[repr(u32)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub enum DropReason { $($(#[$doc])* $name,)* }

        impl DropReason {
            /// Every reason, in index order.
            pub const ALL: &'static [Self] = &[$(Self::$name),*];

            /// The metric label.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$name => $label),* }
            }
        }
    };
}

drop_reasons! {
    /// The agent has not switched this direction on yet, or the configuration map is unreadable.
    Disabled = "disabled",
    /// Too short for the headers it claims to have.
    TooShort = "too_short",
    /// The inner packet is not IPv4 (ARP, IPv6, anything else).
    NotIpv4 = "not_ipv4",
    /// The inner packet is not IPv6 (anything else on the tunnel of IPv6).
    NotIpv6 = "not_ipv6",
    /// An inner protocol whose checksum says nothing about the outer one, which IPv6 needs: the kernel's device sums up.
    Protocol = "protocol",
    /// The destination is in no peer's subnet.
    NoPeer = "no_peer",
    /// The inner MAC addresses are not those of this VTEP and the peer's.
    ForeignMac = "foreign_mac",
    /// The way to the peer has no resolved next hop at the moment.
    NoNextHop = "no_next_hop",
    /// Larger than the path to the peer carries: the kernel answers with an ICMP error or fragments.
    OverPathMtu = "over_path_mtu",
    /// A super-packet whose outer length would not fit 16 bits.
    TooLong = "too_long",
    /// The kernel refused to make or remove header room (`bpf_skb_adjust_room`).
    AdjustRoom = "adjust_room",
    /// Writing to the packet failed: it goes on as it was.
    Store = "store",
    /// Outer fragment: the kernel reassembles.
    OuterFragment = "outer_fragment",
    /// Outer IPv4 header with options.
    OuterOptions = "outer_options",
    /// Outer IPv4 header with a wrong checksum.
    OuterHeader = "outer_header",
    /// IPv4, UDP and frame lengths do not agree.
    Length = "length",
    /// Outer UDP checksum present and not verified by the device: the kernel verifies.
    OuterChecksum = "outer_checksum",
    /// VXLAN header without the I flag.
    NoVni = "no_vni",
    /// VXLAN header with a reserved bit set, or one of an extension that is off.
    Reserved = "reserved",
    /// Another network's VNI.
    OtherVni = "other_vni",
    /// Inner source is this node's own VTEP MAC.
    OwnSource = "own_source",
    /// Inner destination is another VTEP's MAC, or a multicast one.
    OtherHost = "other_host",
    /// A GRO super-packet, on a kernel that cannot clear its tunnel state.
    Gso = "gso",
    /// Larger than the tunnel device accepts.
    OverTunnelMtu = "over_tunnel_mtu",
    /// Congestion marked on a packet that is not ECN-capable (RFC 6040).
    Ecn = "ecn",
    /// Outer source that no other host can have (loopback, multicast, broadcast, our own): the kernel calls it martian.
    OuterSource = "outer_source",
    /// No agent has kept the maps for [`crate::map::TRUST`]: the kernel's device may know better.
    Stale = "stale",
    /// A helper failed half-way, and what was done could not be undone either: the packet is dropped, with a kernel vxlan device too.
    Torn = "torn",
}

/// Number of entries of the per-CPU map `reasons`.
pub const REASON_ENTRIES: u32 = 64;

const _: () = assert!(DropReason::ALL.len() as u32 <= REASON_ENTRIES / 2);

/// Index of a reason in the map `reasons`: one half for each direction.
#[inline(always)]
pub const fn reason_index(direction: Direction, reason: DropReason) -> u32 {
    direction as u32 * (REASON_ENTRIES / 2) + reason as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn labels_and_indexes_are_unique() {
        let labels: BTreeSet<_> = DropReason::ALL.iter().map(|r| r.as_str()).collect();
        assert_eq!(labels.len(), DropReason::ALL.len());
        let mut indexes = BTreeSet::new();
        for direction in Direction::ALL {
            for reason in DropReason::ALL {
                let index = reason_index(direction, *reason);
                assert!(index < REASON_ENTRIES);
                assert!(indexes.insert(index));
            }
        }
    }

    #[test]
    fn all_is_in_index_order() {
        for (at, reason) in DropReason::ALL.iter().enumerate() {
            assert_eq!(*reason as usize, at);
        }
    }
}
