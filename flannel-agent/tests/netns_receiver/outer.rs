//! Deviations of the outer headers: what RFC 7348 and the kernel's receiver say something about, one at a time.

use flannel_testkit::packet::{Csum, checksum};

use crate::cases::{List, Outcome};

/// Where the outer headers begin.
const IP: usize = 14;
const UDP: usize = 34;
/// Outer headers up to the end of the UDP header, and of the VXLAN header.
const UDP_END: usize = 42;
const VXLAN_END: usize = 50;

pub(crate) fn all(list: &mut List) {
    checksums(list);
    vxlan_header(list);
    outer_addresses(list);
    outer_ip(list);
    lengths(list);
    fragments(list);
}

fn checksums(list: &mut List) {
    list.inner("as usual", Outcome::Carried, |_, _| ());
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

fn vxlan_header(list: &mut List) {
    for vni in [0, 2, 0x0100, 0x01_0000, 0x80_0001, 0xff_ffff] {
        list.outer(format!("VNI {vni}"), Outcome::Left("other_vni"), |frame| {
            frame.vni = vni;
        });
    }
    for flags in [0x00, 0x80, 0xf7] {
        list.outer(
            format!("flags {flags:#04x}"),
            Outcome::Left("no_vni"),
            |frame| {
                frame.flags = flags;
            },
        );
    }
    for bit in (0..8).filter(|bit| *bit != 3) {
        list.outer(
            format!("reserved flag {bit}"),
            Outcome::Left("reserved"),
            |frame| {
                frame.flags |= 1 << bit;
            },
        );
    }
    for bit in 0..24 {
        list.outer(
            format!("reserved bit {bit}"),
            Outcome::Left("reserved"),
            |frame| {
                frame.reserved1[bit / 8] = 1 << (bit % 8);
            },
        );
    }
    for bit in 0..8 {
        list.outer(
            format!("reserved last bit {bit}"),
            Outcome::Left("reserved"),
            |frame| {
                frame.reserved2 = 1 << bit;
            },
        );
    }
    list.outer("group policy", Outcome::Left("reserved"), |frame| {
        frame.flags = 0x88;
        frame.reserved1 = [0x08, 0x12, 0x34];
    });
}

fn outer_addresses(list: &mut List) {
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
    for port in [0, 1, 53, 8_472, 65_535] {
        list.outer(format!("from port {port}"), Outcome::Carried, |frame| {
            frame.src_port = port;
        });
    }
    for port in [0, 4_789, 8_471, 8_473, 0x1821] {
        list.outer(format!("to port {port}"), Outcome::NotOurs, |frame| {
            frame.dst_port = port;
        });
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
    for mac in [[0xff; 6], [2, 0, 0, 0, 0, 1], [1, 0, 0x5e, 0, 0, 1]] {
        list.outer(format!("to MAC {mac:02x?}"), Outcome::NotOurs, |frame| {
            frame.dst_mac = mac;
        });
        list.amend(|case| case.for_the_stack = true);
    }
    list.raw("in a VLAN", Outcome::NotOurs, |target, number| {
        let mut frame = target.outer(target.inner(number, 40).bytes()).bytes();
        frame.splice(12..12, [0x81, 0x00, 0x00, 0x05]);
        vec![frame]
    });
}

/// Changes a byte of the outer IPv4 header and makes its checksum right again.
fn patched(list: &mut List, name: &str, outcome: Outcome, at: usize, byte: u8) {
    list.raw(name, outcome, |target, number| {
        let mut frame = target.outer(target.inner(number, 40).bytes()).bytes();
        frame[IP + at] = byte;
        frame[IP + 10..IP + 12].fill(0);
        let right = checksum(&frame[IP..UDP], 0);
        frame[IP + 10..IP + 12].copy_from_slice(&right.to_be_bytes());
        vec![frame]
    });
}

fn outer_ip(list: &mut List) {
    for ttl in [0, 1, 255] {
        list.outer(format!("outer TTL {ttl}"), Outcome::Carried, |frame| {
            frame.ip.ttl = ttl;
        });
    }
    list.outer("outer DSCP", Outcome::Carried, |frame| frame.ip.tos = 0xb8);
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

fn lengths(list: &mut List) {
    let full = list
        .target
        .outer(list.target.inner(0, 40).bytes())
        .bytes()
        .len();
    // A packet socket sends nothing that lacks an Ethernet header.
    for len in IP..=full {
        let outcome = match len {
            _ if len == full => Outcome::Carried,
            _ if len < UDP_END => Outcome::NotOurs,
            _ if len < VXLAN_END => Outcome::Left("too_short"),
            _ => Outcome::Left("length"),
        };
        list.raw(format!("first {len} bytes"), outcome, |target, number| {
            vec![
                target
                    .outer(target.inner(number, 40).bytes())
                    .truncated(len),
            ]
        });
    }
    for padding in [1, 6, 46, 200] {
        list.raw(
            format!("{padding} bytes of padding"),
            Outcome::Left("length"),
            |target, number| {
                let mut frame = target.outer(target.inner(number, 40).bytes()).bytes();
                frame.resize(frame.len() + padding, 0);
                vec![frame]
            },
        );
    }
    let udp_len = (full - UDP) as u16;
    for (len, reason) in [
        (0, "too_short"),
        (7, "too_short"),
        (8, "too_short"),
        (15, "too_short"),
        (16, "length"),
        (30, "length"),
        (udp_len - 1, "length"),
        (udp_len + 1, "length"),
        (u16::MAX, "length"),
    ] {
        list.outer(
            format!("UDP length {len}"),
            Outcome::Left(reason),
            |frame| {
                frame.udp_len = Some(len);
            },
        );
    }
    let total = (full - IP) as u16;
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

fn fragments(list: &mut List) {
    // Only the first piece tells its port, so only it can be counted.
    let mut pieces =
        |name: &str, len: usize, mtu: usize, csum: Csum, order: fn(&mut Vec<Vec<u8>>)| {
            list.raw(name, Outcome::Left("outer_fragment"), |target, number| {
                let mut frame = target.outer(target.inner(number, len).bytes());
                frame.ip.id = number;
                frame.udp_csum = csum;
                let mut frames = frame.fragments(mtu).expect("fragments");
                order(&mut frames);
                frames
            });
            list.amend(|case| case.counted = 1);
        };
    pieces("two fragments", 400, 300, Csum::Zero, |_| ());
    pieces("two fragments with checksum", 400, 300, Csum::Right, |_| ());
    pieces(
        "two fragments with a wrong checksum",
        400,
        300,
        Csum::Wrong,
        |_| (),
    );
    pieces("three fragments", 400, 200, Csum::Zero, |_| ());
    pieces(
        "three fragments, last first",
        400,
        200,
        Csum::Right,
        |frames| frames.reverse(),
    );
    pieces("fragments of 8 bytes", 40, 28, Csum::Zero, |_| ());
    pieces(
        "the first of two fragments",
        400,
        300,
        Csum::Zero,
        |frames| frames.truncate(1),
    );
    pieces("a fragment twice", 400, 300, Csum::Zero, |frames| {
        let last = frames[1].clone();
        frames.push(last);
    });
    list.raw(
        "the second of two fragments",
        Outcome::NotOurs,
        |target, number| {
            let mut frame = target.outer(target.inner(number, 400).bytes());
            frame.ip.id = number;
            frame.fragments(300).expect("fragments").split_off(1)
        },
    );
}
