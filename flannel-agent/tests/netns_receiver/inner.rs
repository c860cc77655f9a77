//! Deviations of what is inside.

use std::net::Ipv4Addr;

use flannel_testkit::packet::{Csum, Inner, L4, fragment};

use crate::cases::{List, Outcome, PEER_POD, Target};

const CARRIED: Outcome = Outcome::Carried;
const NOT_IPV4: Outcome = Outcome::Left("not_ipv4");
const TOO_SHORT: Outcome = Outcome::Left("too_short");

/// Tunnel MTU in bytes, and what injection allows beyond it: a VLAN tag.
const MTU: usize = 1_450;
const ALLOWANCE: usize = 4;
/// IPv4 and UDP header.
const HEADERS: usize = 28;

pub(crate) fn all(list: &mut List) {
    macs(list);
    types(list);
    packets(list);
    congestion(list);
    sizes(list);
}

fn macs(list: &mut List) {
    let other = Outcome::Left("other_host");
    for (mac, outcome) in [
        ([0xff; 6], CARRIED),
        ([2, 0, 0, 0, 0, 1], other),
        ([0; 6], other),
        ([0x01, 0, 0x5e, 1, 2, 3], other),
        ([0x33, 0x33, 0, 0, 0, 1], other),
    ] {
        list.inner(&format!("inner MAC {mac:02x?}"), outcome, |inner, _| {
            inner.dst_mac = mac;
        });
    }
    list.inner("one bit off the inner MAC", other, |inner, _| {
        inner.dst_mac[5] ^= 1;
    });
    list.inner(
        "inner source MAC our own",
        Outcome::Left("own_source"),
        |inner, target| {
            inner.src_mac = target.vtep_mac;
        },
    );
    for mac in [
        [0; 6],
        [0xff; 6],
        [0x01, 0, 0x5e, 0, 0, 1],
        [2, 1, 2, 3, 4, 5],
    ] {
        list.inner(
            &format!("inner source MAC {mac:02x?}"),
            CARRIED,
            |inner, _| {
                inner.src_mac = mac;
            },
        );
    }
    list.inner("broadcast", CARRIED, |inner, _| {
        inner.dst_mac = [0xff; 6];
        inner.ip.dst = Ipv4Addr::BROADCAST;
    });
}

fn types(list: &mut List) {
    for ethertype in [
        0x0806, 0x86dd, 0x8100, 0x88cc, 0x1234, 0x0026, 0x0000, 0xffff,
    ] {
        list.inner(
            &format!("inner type {ethertype:#06x}"),
            NOT_IPV4,
            |inner, _| {
                inner.ethertype = ethertype;
            },
        );
    }
    let header = |target: &Target, number: u16| target.inner(number, 0).bytes()[..14].to_vec();
    list.inner_bytes("ARP request", NOT_IPV4, |target, number| {
        let mut frame = header(target, number);
        frame[..6].fill(0xff);
        frame[12..14].copy_from_slice(&[0x08, 0x06]);
        frame.extend([0, 1, 8, 0, 6, 4, 0, 1]);
        frame.extend_from_within(6..12);
        frame.extend(PEER_POD.octets());
        frame.extend([0; 6]);
        frame.extend(target.pod.octets());
        frame
    });
    for len in [0, 1, 13, 14, 15, 33] {
        list.inner_bytes(
            &format!("inner frame of {len} bytes"),
            TOO_SHORT,
            |target, number| {
                let mut frame = target.inner(number, 40).bytes();
                frame.truncate(len);
                frame
            },
        );
    }
    list.inner_bytes("inner garbage", NOT_IPV4, |target, number| {
        let mut frame = header(target, number);
        frame.truncate(12);
        frame.extend((0..200_u8).map(|at| at.wrapping_mul(151).wrapping_add(77)));
        frame
    });
    list.inner_bytes("garbage that says it is IPv4", CARRIED, |target, number| {
        let mut frame = header(target, number);
        frame.extend((0..200_u8).map(|at| at.wrapping_mul(151).wrapping_add(77) & !3));
        frame
    });
}

fn packets(list: &mut List) {
    for ttl in [0, 1, 2, 255] {
        list.inner(&format!("inner TTL {ttl}"), CARRIED, |inner, _| {
            inner.ip.ttl = ttl;
        });
    }
    list.inner("inner header checksum wrong", CARRIED, |inner, _| {
        inner.ip.csum = Csum::Wrong;
    });
    for len in [0, 20, 67, 69, u16::MAX] {
        list.inner(&format!("inner IP length {len}"), CARRIED, |inner, _| {
            inner.ip.total_len = Some(len);
        });
    }
    list.inner("inner options", CARRIED, |inner, _| {
        inner.ip.options = vec![1, 1, 1, 0];
    });
    for src in [
        [127, 0, 0, 1],
        [224, 0, 0, 1],
        [10, 244, 1, 2],
        [8, 8, 8, 8],
    ] {
        list.inner(&format!("inner source {src:?}"), CARRIED, |inner, _| {
            inner.ip.src = src.into();
        });
    }
    for dst in [
        [10, 244, 1, 0],
        [10, 244, 1, 1],
        [10, 244, 1, 77],
        [10, 244, 9, 3],
        [127, 0, 0, 1],
        [224, 0, 0, 1],
    ] {
        list.inner(
            &format!("inner destination {dst:?}"),
            CARRIED,
            |inner, _| {
                inner.ip.dst = dst.into();
            },
        );
    }
    for csum in [Csum::Zero, Csum::Wrong] {
        list.inner(
            &format!("inner UDP checksum {csum:?}"),
            CARRIED,
            |inner, _| {
                if let L4::Udp { csum: field, .. } = &mut inner.l4 {
                    *field = csum;
                }
            },
        );
    }
    list.inner("inner TCP", CARRIED, |inner, target| {
        let tcp = Inner::tcp(PEER_POD, target.pod, 9, b"out of the blue");
        inner.l4 = tcp.l4;
    });
    list.inner("inner echo", CARRIED, |inner, target| {
        let echo = Inner::echo(PEER_POD, target.pod, 1, 1, b"are you there");
        inner.l4 = echo.l4;
    });
    for piece in 0..2 {
        list.inner_bytes(
            &format!("inner fragment {piece}"),
            CARRIED,
            |target, number| {
                let whole = target.inner(number, 400).bytes();
                fragment(&whole, 300).expect("fragments").swap_remove(piece)
            },
        );
    }
    list.inner_bytes("inner padding", CARRIED, |target, number| {
        let mut frame = target.inner(number, 0).bytes();
        frame.resize(60, 0);
        frame
    });
}

fn congestion(list: &mut List) {
    for outer in 0..4 {
        for inner in 0..4 {
            for dscp in [0x00, 0xb8] {
                let drop = outer == 3 && inner == 0;
                let outcome = if drop { Outcome::Left("ecn") } else { CARRIED };
                let name =
                    format!("congestion bits {outer} outside, {inner} inside, DSCP {dscp:#04x}");
                list.with_and_without_checksum(&name, outcome, |target, number| {
                    let mut packet = target.inner(number, 40);
                    packet.ip.tos = dscp | inner;
                    let mut frame = target.outer(packet.bytes());
                    frame.ip.tos = outer;
                    frame
                });
            }
        }
    }
}

fn sizes(list: &mut List) {
    for len in [
        MTU - 1,
        MTU,
        MTU + 1,
        MTU + ALLOWANCE,
        MTU + ALLOWANCE + 1,
        1_900,
    ] {
        let outcome = if len > MTU + ALLOWANCE {
            Outcome::Left("over_tunnel_mtu")
        } else {
            CARRIED
        };
        for dont_fragment in [false, true] {
            let name = format!("inner packet of {len} bytes, DF {dont_fragment}");
            list.inner_bytes(&name, outcome, |target, number| {
                let mut inner = target.inner(number, len - HEADERS);
                inner.ip.dont_fragment = dont_fragment;
                inner.bytes()
            });
        }
    }
}
