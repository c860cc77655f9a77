//! What a receiver of IPv4 has to deal with beside what both families have.

use std::net::Ipv4Addr;

use flannel_testkit::packet::{Csum, Ipv4, L4, checksum, fragment};

use crate::{
    cases::{List, Outcome, Received, Target},
    inner, outer,
};

/// Where the outer headers begin.
const IP: usize = 14;
const UDP: usize = 34;
const CARRIED: Outcome = Outcome::Carried;
/// Tunnel MTU in bytes.
const MTU: usize = 1_450;

impl Received for Ipv4Addr {
    const PEER: Ipv4Addr = Ipv4Addr::new(192, 168, 77, 9);
    const PEER_POD: Ipv4Addr = Ipv4Addr::new(10, 244, 9, 2);
    const CSUM: Csum = Csum::Zero;
    const NOT_THIS: Outcome = Outcome::Left("not_ipv4");

    fn mark(header: &mut Ipv4, number: u16) {
        header.id = number;
    }

    fn number(frame: &[u8]) -> u16 {
        match (frame.get(12..14), frame.get(18..20), frame.get(26..29)) {
            (Some([0x08, 0x00]), Some([a, b]), Some([10, 244, 9])) => u16::from_be_bytes([*a, *b]),
            _ => 0,
        }
    }

    fn all(list: &mut List<Ipv4Addr>) {
        outer::all(list);
        wrong_checksum(list);
        outer_addresses(list);
        outer_ip(list);
        ip_lengths(list);
        inner::all(list, Self::NOT_THIS);
        types(list);
        packets(list);
        for dont_fragment in [false, true] {
            let name = format!(", DF {dont_fragment}");
            inner::sizes(list, MTU, &name, |inner| {
                inner.ip.dont_fragment = dont_fragment;
            });
        }
    }
}

fn wrong_checksum(list: &mut List<Ipv4Addr>) {
    list.outer(
        "wrong UDP checksum",
        Outcome::Left("outer_checksum"),
        |frame| {
            frame.udp_csum = Csum::Wrong;
        },
    );
    list.amend(|case| {
        case.beyond_checksum = Outcome::Carried;
        case.unverified = true;
    });
}

fn outer_addresses(list: &mut List<Ipv4Addr>) {
    let node = list.target.node;
    for src in [
        [192, 168, 77, 250],
        [10, 1, 2, 3],
        [8, 8, 8, 8],
        [0, 1, 2, 3],
        [240, 0, 0, 1],
    ] {
        list.outer(format!("from {src:?}"), Outcome::Carried, |frame| {
            frame.ip.src = src.into();
        });
    }
    // No host has such an address: the stack drops these before anybody looks at the port.
    for src in [
        [127, 0, 0, 1],
        [0, 0, 0, 0],
        [224, 0, 0, 1],
        [239, 255, 0, 1],
        [255, 255, 255, 255],
        node.octets(),
    ] {
        list.outer(
            format!("from {src:?}"),
            Outcome::Left("outer_source"),
            |frame| {
                frame.ip.src = src.into();
            },
        );
    }
    for dst in [
        [192, 168, 77, 12],
        [192, 168, 77, 255],
        [10, 244, 1, 0],
        [255, 255, 255, 255],
        [224, 0, 0, 1],
    ] {
        list.outer(format!("to {dst:?}"), Outcome::NotOurs, |frame| {
            frame.ip.dst = dst.into();
        });
    }
}

/// Changes a byte of the outer IPv4 header and makes its checksum right again.
fn patched(list: &mut List<Ipv4Addr>, name: &str, outcome: Outcome, at: usize, byte: u8) {
    list.raw(name, outcome, |target, number| {
        let mut frame = target.outer(target.inner(number, 40).bytes()).bytes();
        frame[IP + at] = byte;
        frame[IP + 10..IP + 12].fill(0);
        let right = checksum(&frame[IP..UDP], 0);
        frame[IP + 10..IP + 12].copy_from_slice(&right.to_be_bytes());
        vec![frame]
    });
}

fn outer_ip(list: &mut List<Ipv4Addr>) {
    list.outer("outer DF", Outcome::Carried, |frame| {
        frame.ip.dont_fragment = true;
    });
    list.outer("outer identification", Outcome::Carried, |frame| {
        frame.ip.id = 0xbeef;
    });
    list.outer(
        "outer header checksum wrong",
        Outcome::Left("outer_header"),
        |frame| {
            frame.ip.csum = Csum::Wrong;
        },
    );
    list.outer(
        "outer header checksum zero",
        Outcome::Left("outer_header"),
        |frame| {
            frame.ip.csum = Csum::Zero;
        },
    );
    patched(
        list,
        "outer reserved fragment bit",
        Outcome::Carried,
        6,
        0x80,
    );
    patched(list, "outer version 6", Outcome::NotOurs, 0, 0x65);
    patched(list, "outer header of 16 bytes", Outcome::NotOurs, 0, 0x44);
    patched(list, "outer protocol UDP-Lite", Outcome::NotOurs, 9, 136);
    for options in [
        &[1, 1, 1, 0][..],
        &[148, 4, 0, 0],
        &[7, 7, 4, 0, 0, 0, 0, 0],
        &[1; 40],
    ] {
        list.outer(
            format!("outer options {options:?}"),
            Outcome::Left("outer_options"),
            |frame| frame.ip.options = options.to_vec(),
        );
    }
}

fn ip_lengths(list: &mut List<Ipv4Addr>) {
    let frame = list.target.outer(list.target.inner(0, 40).bytes());
    let total = (frame.bytes().len() - IP) as u16;
    for len in [0, 19, 20, 27, 28, total - 1, total + 1, u16::MAX] {
        list.outer(
            format!("IP length {len}"),
            Outcome::Left("length"),
            |frame| {
                frame.ip.total_len = Some(len);
            },
        );
    }
}

fn types(list: &mut List<Ipv4Addr>) {
    list.inner("broadcast", CARRIED, |inner, _| {
        inner.dst_mac = [0xff; 6];
        inner.ip.dst = Ipv4Addr::BROADCAST;
    });
    let header =
        |target: &Target<Ipv4Addr>, number: u16| target.inner(number, 0).bytes()[..14].to_vec();
    list.inner_bytes("ARP request", Ipv4Addr::NOT_THIS, |target, number| {
        let mut frame = header(target, number);
        frame[..6].fill(0xff);
        frame[12..14].copy_from_slice(&[0x08, 0x06]);
        frame.extend([0, 1, 8, 0, 6, 4, 0, 1]);
        frame.extend_from_within(6..12);
        frame.extend(Ipv4Addr::PEER_POD.octets());
        frame.extend([0; 6]);
        frame.extend(target.pod.octets());
        frame
    });
    list.inner_bytes("garbage that says it is IPv4", CARRIED, |target, number| {
        let mut frame = header(target, number);
        frame.extend((0..200_u8).map(|at| at.wrapping_mul(151).wrapping_add(77) & !3));
        frame
    });
}

fn packets(list: &mut List<Ipv4Addr>) {
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
