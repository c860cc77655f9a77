//! The packets of which the two data paths' frames are compared, for each family.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::ops::Range;

use flannel_testkit::{
    Family,
    packet::{
        Address, Csum, Extension, Inner, Inner6, Ipv4, Ipv6, L4, Vxlan, fragment, fragment_of,
    },
};

use crate::wire_rig::pod_mtu;

/// What no two packets share: identification, or flow label, and fragment offset.
pub(crate) type Key = (u32, u16);

/// Of the first hop.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Macs {
    pub(crate) pod: [u8; 6],
    pub(crate) gateway: [u8; 6],
}

/// A family whose frames are compared.
pub(crate) trait Samples: Address {
    /// The bytes of a frame that need not be the same.
    const MAY_DIFFER: &'static [Range<usize>];

    /// How many of the packets are of a kind that only the kernel's device can encapsulate.
    const LEFT_TO_KERNEL: u64;

    /// Every length from 1 byte to a full tunnel, every TOS, times to live, fragments, all kinds of protocols.
    fn packets(macs: Macs, src: Self, dst: Self) -> Vec<Vec<u8>>;
    fn key(frame: &[u8]) -> Key;
    /// Checksums of the outer headers, ours and the kernel's.
    fn check_checksums(ours: &Vxlan<Self>, kernel: &Vxlan<Self>);
    fn id(ip: &Self::Header) -> Option<u16>;
}

impl Samples for Ipv4Addr {
    // Outer identification and header checksum, and the UDP checksum.
    const MAY_DIFFER: &'static [Range<usize>] = &[18..20, 24..26, 40..42];
    const LEFT_TO_KERNEL: u64 = 0;

    fn packets(macs: Macs, src: Ipv4Addr, dst: Ipv4Addr) -> Vec<Vec<u8>> {
        packets_v4(macs, src, dst)
    }

    fn key(frame: &[u8]) -> Key {
        (u32::from(word(frame, 18)), word(frame, 20) & 0x1fff)
    }

    fn check_checksums(ours: &Vxlan, kernel: &Vxlan) {
        assert_eq!((ours.ip.csum, ours.udp_csum), (Csum::Right, Csum::Zero));
        assert_eq!(
            (kernel.ip.csum, kernel.udp_csum),
            (Csum::Right, Csum::Right)
        );
    }

    fn id(ip: &Ipv4) -> Option<u16> {
        Some(ip.id)
    }
}

impl Samples for Ipv6Addr {
    const MAY_DIFFER: &'static [Range<usize>] = &[];
    // Those whose outer checksum does not follow from the inner one: fragments, extensions, unknown protocols, no checksum.
    const LEFT_TO_KERNEL: u64 = 70;

    fn packets(macs: Macs, src: Ipv6Addr, dst: Ipv6Addr) -> Vec<Vec<u8>> {
        packets_v6(macs, src, dst)
    }

    fn key(frame: &[u8]) -> Key {
        let label = u32::from(word(frame, 14) & 0xf) << 16 | u32::from(word(frame, 16));
        let is_piece = frame[20] == 44;
        (label, if is_piece { word(frame, 56) >> 3 } else { 0 })
    }

    fn check_checksums(ours: &Vxlan<Ipv6Addr>, kernel: &Vxlan<Ipv6Addr>) {
        assert_eq!((ours.udp_csum, kernel.udp_csum), (Csum::Right, Csum::Right));
    }

    fn id(_ip: &Ipv6) -> Option<u16> {
        None
    }
}

fn word(frame: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([frame[at], frame[at + 1]])
}

fn packets_v4(macs: Macs, src: Ipv4Addr, dst: Ipv4Addr) -> Vec<Vec<u8>> {
    let udp = |port: u16, len: usize| {
        let data: Vec<u8> = (0..len).map(|at| (at * 7 + len) as u8).collect();
        let mut inner = Inner::udp(src, dst, 9, &data);
        if let L4::Udp { src_port, .. } = &mut inner.l4 {
            *src_port = port;
        }
        inner
    };
    let raw = |protocol: u8, data: &[u8]| {
        let data = data.to_vec();
        Inner::new(src, dst, L4::Raw { protocol, data })
    };
    let with_ip = |mut inner: Inner, change: &dyn Fn(&mut Ipv4)| {
        change(&mut inner.ip);
        inner
    };
    let mut all: Vec<Inner> = (1..=1_422)
        .map(|len| udp(10_000 + len as u16, len))
        .collect();
    all.extend((0..=255).map(|tos| with_ip(udp(2_000, 40), &|ip| ip.tos = tos)));
    for ttl in [0, 1, 2, 3, 63, 65, 128, 254, 255] {
        all.push(with_ip(udp(2_001, 40), &|ip| ip.ttl = ttl));
    }
    for dont_fragment in [false, true] {
        all.push(with_ip(udp(2_002, 1_422), &|ip| {
            ip.dont_fragment = dont_fragment;
        }));
    }
    for csum in [Csum::Zero, Csum::Wrong] {
        let mut inner = udp(2_003, 40);
        if let L4::Udp { csum: field, .. } = &mut inner.l4 {
            *field = csum;
        }
        all.push(inner);
    }
    for options in [
        &[1, 1, 1, 0][..],
        &[148, 4, 0, 0],
        &[7, 7, 4, 0, 0, 0, 0, 0],
    ] {
        all.push(with_ip(udp(2_004, 40), &|ip| ip.options = options.to_vec()));
    }
    for len in [0, 1, 56, 1_000, 1_422] {
        all.push(Inner::echo(src, dst, 7, len as u16, &vec![0x5a; len]));
    }
    for flags in [0x02, 0x10, 0x18, 0x11, 0x04, 0xc2] {
        let mut inner = Inner::tcp(src, dst, 9, b"some data");
        if let L4::Tcp {
            flags: field,
            options,
            ..
        } = &mut inner.l4
        {
            *field = flags;
            *options = vec![2, 4, 5, 0xb4, 1, 1, 4, 2];
        }
        all.push(inner);
    }
    // An ICMP error, and protocols that nobody knows, one of them empty.
    all.push(raw(1, &[3, 1, 0, 0, 0, 0, 0, 0, 0x45, 0, 0, 20]));
    all.push(raw(253, &[0x45; 48]));
    all.push(raw(254, &[]));
    for (id, inner) in (1..).zip(&mut all) {
        inner.ip.id = id;
    }
    let mut frames: Vec<Vec<u8>> = Vec::new();
    let mut in_pieces = |len: usize, mtu: u32| {
        let mut inner = udp(2_005, len).with_macs(macs.pod, macs.gateway);
        inner.ip.id = 50_000 + frames.len() as u16;
        frames.extend(fragment(&inner.bytes(), mtu as usize).expect("fragments"));
    };
    in_pieces(1_423, pod_mtu(Family::V4));
    in_pieces(60_000, pod_mtu(Family::V4));
    in_pieces(100, 44);
    let whole = all
        .into_iter()
        .map(|inner| inner.with_macs(macs.pod, macs.gateway).bytes());
    frames.extend(whole);
    frames
}

fn packets_v6(macs: Macs, src: Ipv6Addr, dst: Ipv6Addr) -> Vec<Vec<u8>> {
    let udp = |port: u16, len: usize| {
        let data: Vec<u8> = (0..len).map(|at| (at * 7 + len) as u8).collect();
        let mut inner = Inner6::udp(src, dst, 9, &data);
        if let L4::Udp { src_port, .. } = &mut inner.l4 {
            *src_port = port;
        }
        inner
    };
    let raw = |protocol: u8, data: &[u8]| {
        let data = data.to_vec();
        Inner6::new(src, dst, L4::Raw { protocol, data })
    };
    let with_ip = |mut inner: Inner6, change: &dyn Fn(&mut Ipv6)| {
        change(&mut inner.ip);
        inner
    };
    let mut all: Vec<Inner6> = (1..=1_382)
        .map(|len| udp(10_000 + len as u16, len))
        .collect();
    all.extend((0..=255).map(|class| with_ip(udp(2_000, 40), &|ip| ip.traffic_class = class)));
    for hops in [0, 1, 2, 3, 63, 65, 128, 254, 255] {
        all.push(with_ip(udp(2_001, 40), &|ip| ip.hop_limit = hops));
    }
    // A wrong one ends with the outer checksum, which rests on it, and with the kernel's in the pod.
    let mut unsummed = udp(2_003, 40);
    if let L4::Udp { csum, .. } = &mut unsummed.l4 {
        *csum = Csum::Zero;
    }
    all.push(unsummed);
    for kinds in [&[0][..], &[60], &[0, 60]] {
        let extensions: Vec<Extension> =
            kinds.iter().map(|kind| Extension::padding(*kind)).collect();
        all.push(with_ip(udp(2_004, 40), &|ip| {
            ip.extensions.clone_from(&extensions);
        }));
    }
    for len in [0, 1, 56, 1_000, 1_382] {
        all.push(Inner6::echo(src, dst, 7, len as u16, &vec![0x5a; len]));
    }
    for flags in [0x02, 0x10, 0x18, 0x11, 0x04, 0xc2] {
        let mut inner = Inner6::tcp(src, dst, 9, b"some data");
        if let L4::Tcp {
            flags: field,
            options,
            ..
        } = &mut inner.l4
        {
            *field = flags;
            *options = vec![2, 4, 5, 0x96, 1, 1, 4, 2];
        }
        all.push(inner);
    }
    // Protocols that nobody knows, one of them empty, and nothing at all.
    all.push(raw(253, &[0x45; 48]));
    all.push(raw(254, &[]));
    all.push(raw(59, &[]));
    for (label, inner) in (1..).zip(&mut all) {
        inner.ip.flow_label = label;
    }
    let mut frames: Vec<Vec<u8>> = Vec::new();
    let mut in_pieces = |len: usize, mtu: u32| {
        let mut inner = udp(2_005, len).with_macs(macs.pod, macs.gateway);
        inner.ip.flow_label = 50_000 + frames.len() as u32;
        frames.extend(fragment_of::<Ipv6Addr>(&inner.bytes(), mtu as usize).expect("fragments"));
    };
    in_pieces(1_383, pod_mtu(Family::V6));
    in_pieces(60_000, pod_mtu(Family::V6));
    in_pieces(100, 64);
    let whole = all
        .into_iter()
        .map(|inner| inner.with_macs(macs.pod, macs.gateway).bytes());
    frames.extend(whole);
    frames
}
