//! Builders and parsers against each other, and against `etherparse`.

use super::*;
use etherparse::{NetSlice, SlicedPacket, TransportSlice, UdpHeader};

const A: Ipv4Addr = Ipv4Addr::new(192, 168, 77, 11);
const B: Ipv4Addr = Ipv4Addr::new(192, 168, 77, 12);
const POD_A: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 2);
const POD_B: Ipv4Addr = Ipv4Addr::new(10, 244, 2, 2);

#[test]
fn every_field_survives_the_round_trip() {
    let mut inner = Inner::tcp(POD_A, POD_B, 80, b"odd").with_macs([2; 6], [4; 6]);
    inner.ip.tos = 0x02;
    inner.ip.options = vec![1, 1, 1, 0];
    let mut frame = sample(inner.bytes());
    assert_eq!(Vxlan::parse(&frame.bytes()).unwrap(), frame);
    assert_eq!(frame.parse_inner().unwrap(), inner);

    frame.ip.tos = 0xb9;
    frame.ip.ttl = 3;
    frame.ip.dont_fragment = true;
    frame.ip.id = 0xbeef;
    frame.flags = 0x88;
    frame.reserved1 = [1, 2, 3];
    frame.vni = 0x00ff_ffff;
    frame.reserved2 = 9;
    frame.udp_len = Some(7);
    for (udp_csum, csum) in [(Csum::Zero, Csum::Wrong), (Csum::Wrong, Csum::Zero)] {
        frame.udp_csum = udp_csum;
        frame.ip.csum = csum;
        assert_eq!(Vxlan::parse(&frame.bytes()).unwrap(), frame);
    }
    assert_eq!(frame.ip.ecn(), 1);
}

#[test]
fn every_payload_survives_the_round_trip() {
    let mut echo = Inner::echo(POD_A, POD_B, 7, 8, b"payload");
    assert_eq!(Inner::parse(&echo.bytes()).unwrap(), echo);
    echo.l4 = L4::Raw {
        protocol: 132,
        data: vec![1, 2, 3],
    };
    assert_eq!(Inner::parse(&echo.bytes()).unwrap(), echo);
    let udp = Inner::udp(POD_A, POD_B, 53, b"");
    assert_eq!(Inner::parse(&udp.bytes()).unwrap(), udp);
}

#[test]
fn etherparse_finds_the_checksums_right() {
    for data in [&b""[..], b"x", b"some more"] {
        let frame = sample(Inner::udp(POD_A, POD_B, 53, data).bytes());
        let bytes = frame.bytes();
        let packet = SlicedPacket::from_ethernet(&bytes).unwrap();
        let Some(NetSlice::Ipv4(ip)) = &packet.net else {
            panic!("no IPv4 in {packet:?}");
        };
        let header = ip.header().to_header();
        assert_eq!(header.header_checksum, header.calc_header_checksum());
        let Some(TransportSlice::Udp(udp)) = &packet.transport else {
            panic!("no UDP in {packet:?}");
        };
        let right = UdpHeader::with_ipv4_checksum(49_152, PORT, &header, udp.payload()).unwrap();
        assert_eq!(udp.to_header(), right);
        assert_eq!(udp.payload()[..8], [8, 0, 0, 0, 0, 0, 1, 0]);
        assert_eq!(bytes.len(), OVERHEAD + ETHERNET + 28 + data.len());
    }
    let tcp = Inner::tcp(POD_A, POD_B, 80, b"odd").bytes();
    let packet = SlicedPacket::from_ethernet(&tcp).unwrap();
    let (Some(NetSlice::Ipv4(ip)), Some(TransportSlice::Tcp(tcp))) =
        (&packet.net, &packet.transport)
    else {
        panic!("no TCP over IPv4 in {packet:?}");
    };
    let header = tcp.to_header();
    let right = header.calc_checksum_ipv4(&ip.header().to_header(), tcp.payload());
    assert_eq!(header.checksum, right.unwrap());
}

#[test]
fn fragments_add_up_to_the_packet() {
    let frame = sample(vec![0x5a; 3000]);
    let pieces = frame.fragments(1500).unwrap();
    assert_eq!(pieces.len(), 3);
    let mut payload = Vec::new();
    for (index, piece) in pieces.iter().enumerate() {
        assert!(piece.len() <= ETHERNET + 1500);
        let (ip, protocol, data) = Ipv4::parse(&piece[ETHERNET..]).unwrap();
        assert_eq!((ip.csum, protocol), (Csum::Right, PROTOCOL_UDP));
        assert_eq!(usize::from(ip.fragment_offset) * 8, payload.len());
        assert_eq!(ip.more_fragments, index < 2);
        assert!(Vxlan::parse(piece).is_err());
        payload.extend_from_slice(data);
    }
    let whole = frame.bytes();
    assert_eq!(payload, whole[ETHERNET + 20..]);
    assert_eq!(frame.fragments(4000).unwrap(), [whole]);
    assert!(frame.fragments(27).is_err());
}

#[test]
fn parsers_refuse_what_is_cut_short() {
    let frame = sample(Inner::udp(POD_A, POD_B, 53, b"data").bytes());
    for len in 0..frame.bytes().len() {
        assert!(Vxlan::parse(&frame.truncated(len)).is_err(), "{len} bytes");
    }
    let tcp = Inner::tcp(POD_A, POD_B, 80, b"data").bytes();
    for len in 0..tcp.len() {
        assert!(Inner::parse(&tcp[..len]).is_err(), "{len} bytes");
    }
}

#[test]
fn a_wrong_checksum_is_never_right_nor_absent() {
    for right in 0..=u16::MAX {
        let wrong = Csum::Wrong.field(right);
        assert!(wrong != right && wrong != 0);
        assert_eq!(Csum::of(wrong, right), Csum::Wrong);
    }
}

fn sample(inner: Vec<u8>) -> Vxlan {
    Vxlan {
        dst_mac: [2, 0, 0, 0, 0, 2],
        src_mac: [2, 0, 0, 0, 0, 1],
        ..Vxlan::new(A, B, 1, inner)
    }
}

const NODE_6: [Ipv6Addr; 2] = [
    Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 0x11),
    Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 0x12),
];
const POD_6: [Ipv6Addr; 2] = [
    Ipv6Addr::new(0xfd00, 0x10, 0x244, 1, 0, 0, 0, 2),
    Ipv6Addr::new(0xfd00, 0x10, 0x244, 2, 0, 0, 0, 2),
];

#[test]
fn every_field_of_ipv6_survives_the_round_trip() {
    let [src, dst] = POD_6;
    let mut inner = Inner6::tcp(src, dst, 80, b"odd").with_macs([2; 6], [4; 6]);
    inner.ip.traffic_class = 0xb9;
    inner.ip.flow_label = 0x000a_bcde;
    inner.ip.hop_limit = 3;
    inner.ip.extensions = vec![Extension::padding(0), Extension::padding(60)];
    inner.ip.extensions[1].data.extend([0; 8]);
    let [a, b] = NODE_6;
    let mut frame = Vxlan6::new(a, b, 1, inner.bytes());
    assert_eq!(Vxlan6::read(&frame.bytes()).unwrap(), frame);
    assert_eq!(frame.parse_inner().unwrap(), inner);
    for udp_csum in [Csum::Zero, Csum::Wrong] {
        frame.udp_csum = udp_csum;
        assert_eq!(Vxlan6::read(&frame.bytes()).unwrap(), frame);
    }
    assert!(Vxlan::parse(&frame.bytes()).is_err());
    let echo = Inner6::echo(src, dst, 7, 8, b"payload");
    assert_eq!(Inner6::read(&echo.bytes()).unwrap(), echo);
    assert_eq!(
        OVERHEAD_V6,
        frame.bytes().len() - ETHERNET - inner.packet().len()
    );
}

#[test]
fn etherparse_finds_the_checksums_of_ipv6_right() {
    let [src, dst] = POD_6;
    for inner in [
        Inner6::udp(src, dst, 53, b"odd"),
        Inner6::tcp(src, dst, 53, b"even"),
        Inner6::echo(src, dst, 1, 2, b"data"),
    ] {
        let bytes = inner.bytes();
        let packet = SlicedPacket::from_ethernet(&bytes).unwrap();
        let Some(NetSlice::Ipv6(ip)) = &packet.net else {
            panic!("no IPv6 in {packet:?}");
        };
        let header = ip.header().to_header();
        let payload = ip.payload().payload;
        match packet.transport.unwrap() {
            TransportSlice::Udp(udp) => {
                let right = udp.to_header().calc_checksum_ipv6(&header, udp.payload());
                assert_eq!(udp.checksum(), right.unwrap());
            }
            TransportSlice::Tcp(tcp) => {
                let right = tcp.to_header().calc_checksum_ipv6(&header, tcp.payload());
                assert_eq!(tcp.checksum(), right.unwrap());
            }
            TransportSlice::Icmpv6(icmp) => {
                assert!(icmp.is_checksum_valid(header.source, header.destination));
                assert_eq!(payload.len(), 12);
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn fragments_of_ipv6_are_those_of_the_standard() {
    let [src, dst] = POD_6;
    let mut inner = Inner6::udp(src, dst, 53, &[7; 3_000]);
    inner.ip.extensions = vec![Extension::padding(60)];
    let whole = inner.bytes();
    assert_eq!(
        fragment_of::<Ipv6Addr>(&whole, 3_056).unwrap(),
        std::slice::from_ref(&whole)
    );
    let pieces = fragment_of::<Ipv6Addr>(&whole, 1_280).unwrap();
    assert_eq!(pieces.len(), 3);
    let mut payload = Vec::new();
    for (number, piece) in pieces.iter().enumerate() {
        assert!(piece.len() - ETHERNET <= 1_280);
        let piece = Inner6::read(piece).unwrap();
        let fragment = piece.ip.fragment.unwrap();
        assert_eq!(usize::from(fragment.offset) * 8, payload.len());
        assert_eq!(fragment.more, number < 2);
        let L4::Raw { protocol: 17, data } = piece.l4 else {
            panic!("{:?}", piece.l4);
        };
        payload.extend(data);
    }
    assert_eq!(payload, whole[ETHERNET + 48..]);
}
