//! What a receiver of IPv6 has to deal with beside what both families have. Each packet has an outer UDP checksum, and none whose
//! rightness the headers do not show is taken.

use std::net::Ipv6Addr;

use flannel_testkit::packet::{Csum, Extension, Ipv6, L4, fragment_of};

use crate::{
    cases::{List, Outcome, Received},
    inner, outer,
};

/// Where the outer headers begin.
const IP: usize = 14;
const CARRIED: Outcome = Outcome::Carried;
const CHECKSUM: Outcome = Outcome::Left("outer_checksum");
/// Tunnel MTU in bytes: one that is configured is that of the underlay, and loses as much as over IPv4.
const MTU: usize = 1_450;
/// Extension headers: hop-by-hop options, destination options.
const EXTENSIONS: [u8; 2] = [0, 60];

impl Received for Ipv6Addr {
    const PEER: Ipv6Addr = Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 9);
    const PEER_POD: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x10, 0x244, 9, 0, 0, 0, 2);
    const CSUM: Csum = Csum::Right;
    const NOT_THIS: Outcome = Outcome::Left("not_ipv6");

    fn mark(header: &mut Ipv6, number: u16) {
        header.flow_label = number.into();
    }

    fn number(frame: &[u8]) -> u16 {
        let of_peer = [0xfd, 0, 0, 0x10, 0x02, 0x44, 0, 9];
        match (frame.get(12..14), frame.get(16..18), frame.get(22..30)) {
            (Some([0x86, 0xdd]), Some([a, b]), Some(net)) if net == of_peer => {
                u16::from_be_bytes([*a, *b])
            }
            _ => 0,
        }
    }

    fn all(list: &mut List<Ipv6Addr>) {
        outer::all(list);
        checksums(list);
        outer_addresses(list);
        outer_ip(list);
        ip_lengths(list);
        inner::all(list, CHECKSUM);
        types(list);
        packets(list);
        addresses(list);
        inner::sizes(list, MTU, "", |_| ());
    }
}

fn checksums(list: &mut List<Ipv6Addr>) {
    for csum in [Csum::Wrong, Csum::Zero] {
        list.outer(format!("UDP checksum {csum:?}"), CHECKSUM, |frame| {
            frame.udp_csum = csum;
        });
        // A right one says nothing of a wrong one inside.
        let name = format!("inner UDP checksum {csum:?}");
        list.inner(&name, CHECKSUM, |inner, _| {
            if let L4::Udp { csum: field, .. } = &mut inner.l4 {
                *field = csum;
            }
        });
    }
}

fn outer_addresses(list: &mut List<Ipv6Addr>) {
    let node = list.target.node;
    let parsed = |text: &str| -> Ipv6Addr { text.parse().expect("an address") };
    for src in [
        "fd77::250",
        "2001:db8::1",
        "fe80::9",
        "::ffff:8.8.8.8",
        "::2",
    ] {
        list.outer(format!("from {src}"), CARRIED, |frame| {
            frame.ip.src = parsed(src);
        });
    }
    let own = node.to_string();
    for src in ["::1", "::", "ff02::1", "ff0e::5", &own] {
        list.outer(
            format!("from {src}"),
            Outcome::Left("outer_source"),
            |frame| {
                frame.ip.src = parsed(src);
            },
        );
    }
    for dst in [
        "fd77::12",
        "fd00:10:244:1::",
        "ff02::1",
        "ff0e::5",
        "::1",
        "fe80::9",
    ] {
        list.outer(format!("to {dst}"), Outcome::NotOurs, |frame| {
            frame.ip.dst = parsed(dst);
        });
    }
}

fn outer_ip(list: &mut List<Ipv6Addr>) {
    list.outer("outer flow label", CARRIED, |frame| {
        frame.ip.flow_label = 0x000a_bcde;
    });
    for kind in EXTENSIONS {
        let name = format!("outer extension header {kind}");
        list.outer(name, Outcome::NotOurs, |frame| {
            frame.ip.extensions = vec![Extension::padding(kind)];
        });
        list.amend(|case| case.for_the_stack = true);
    }
    for (name, at, byte) in [("version 4", 0, 0x45), ("protocol UDP-Lite", 6, 136)] {
        list.raw(
            format!("outer {name}"),
            Outcome::NotOurs,
            |target, number| {
                let mut frame = target.outer(target.inner(number, 40).bytes()).bytes();
                frame[IP + at] = byte;
                vec![frame]
            },
        );
    }
}

fn ip_lengths(list: &mut List<Ipv6Addr>) {
    let frame = list.target.outer(list.target.inner(0, 40).bytes());
    let total = (frame.bytes().len() - IP - 40) as u16;
    for len in [0, 7, 8, total - 1, total + 1, u16::MAX] {
        list.outer(
            format!("payload length {len}"),
            Outcome::Left("length"),
            |frame| {
                frame.ip.payload_len = Some(len);
            },
        );
    }
}

fn types(list: &mut List<Ipv6Addr>) {
    list.inner(
        "neighbour solicitation",
        Outcome::Left("other_host"),
        |inner, target| {
            let group = target.pod.segments();
            inner.ip.dst = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00 | group[6] & 0xff, group[7]);
            inner.dst_mac = [0x33, 0x33, 0xff, 0, 0, 2];
            inner.ip.hop_limit = 255;
        },
    );
    list.inner_bytes(
        "garbage that says it is IPv6",
        CHECKSUM,
        |target, number| {
            let mut frame = target.inner(number, 0).bytes()[..14].to_vec();
            frame.extend((0..200_u8).map(|at| at.wrapping_mul(151).wrapping_add(77) & !3));
            frame
        },
    );
}

fn packets(list: &mut List<Ipv6Addr>) {
    for len in [0, 20, 47, 49, u16::MAX] {
        list.inner(
            &format!("inner payload length {len}"),
            CHECKSUM,
            |inner, _| {
                inner.ip.payload_len = Some(len);
            },
        );
    }
    for kind in EXTENSIONS {
        let name = format!("inner extension header {kind}");
        list.inner(&name, CHECKSUM, |inner, _| {
            inner.ip.extensions = vec![Extension::padding(kind)];
        });
    }
    list.inner("inner protocol nobody knows", CHECKSUM, |inner, _| {
        inner.l4 = L4::Raw {
            protocol: 253,
            data: vec![7; 40],
        };
    });
    for piece in 0..2 {
        list.inner_bytes(
            &format!("inner fragment {piece}"),
            CHECKSUM,
            |target, number| {
                let whole = target.inner(number, 400).bytes();
                let mut pieces = fragment_of::<Ipv6Addr>(&whole, 300).expect("fragments");
                pieces.swap_remove(piece)
            },
        );
    }
    list.inner_bytes("inner padding", CHECKSUM, |target, number| {
        let mut frame = target.inner(number, 0).bytes();
        frame.resize(80, 0);
        frame
    });
}

fn addresses(list: &mut List<Ipv6Addr>) {
    let set = |text: &str| -> Ipv6Addr { text.parse().expect("an address") };
    for src in [
        "::1",
        "ff02::1",
        "fd00:10:244:1::2",
        "2001:db8::8",
        "fe80::1",
    ] {
        list.inner(&format!("inner source {src}"), CARRIED, |inner, _| {
            inner.ip.src = set(src);
        });
    }
    for dst in [
        "fd00:10:244:1::",
        "fd00:10:244:1::1",
        "fd00:10:244:1::77",
        "fd00:10:244:9::3",
        "::1",
        "ff02::1",
        "fe80::1",
    ] {
        list.inner(&format!("inner destination {dst}"), CARRIED, |inner, _| {
            inner.ip.dst = set(dst);
        });
    }
}
