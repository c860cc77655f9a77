//! Deviations of the outer headers: what RFC 7348 and the kernel's receiver say something about, one at a time.

use flannel_testkit::packet::{Csum, Header as _};

use crate::cases::{List, Outcome, Received};

/// Where the outer headers begin.
const IP: usize = 14;

pub(crate) fn all<A: Received>(list: &mut List<A>) {
    list.inner("as usual", Outcome::Carried, |_, _| ());
    vxlan_header(list);
    ports(list);
    macs(list);
    for ttl in [0, 1, 255] {
        list.outer(format!("outer TTL {ttl}"), Outcome::Carried, |frame| {
            frame.ip.set_ttl(ttl);
        });
    }
    list.outer("outer DSCP", Outcome::Carried, |frame| {
        frame.ip.set_tos(0xb8);
    });
    lengths(list);
    fragments(list);
}

fn vxlan_header<A: Received>(list: &mut List<A>) {
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

fn ports<A: Received>(list: &mut List<A>) {
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
}

fn macs<A: Received>(list: &mut List<A>) {
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

fn lengths<A: Received>(list: &mut List<A>) {
    // Outer headers up to the UDP header, to its end, and to that of the VXLAN header.
    let udp = IP + A::FAMILY.header();
    let (udp_end, vxlan_end) = (udp + 8, udp + 16);
    let full = list
        .target
        .outer(list.target.inner(0, 40).bytes())
        .bytes()
        .len();
    // A packet socket sends nothing that lacks an Ethernet header.
    for len in IP..=full {
        let outcome = match len {
            _ if len == full => Outcome::Carried,
            _ if len < udp_end => Outcome::NotOurs,
            _ if len < vxlan_end => Outcome::Left("too_short"),
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
    let udp_len = (full - udp) as u16;
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
}

fn fragments<A: Received>(list: &mut List<A>) {
    // Only the first piece tells its port, so only it can be counted.
    let header = A::FAMILY.header();
    let header = if header == 20 { header } else { header + 8 };
    let mut pieces =
        |name: &str, len: usize, room: usize, csum: Csum, order: fn(&mut Vec<Vec<u8>>)| {
            list.raw(name, Outcome::Left("outer_fragment"), |target, number| {
                let mut frame = target.outer(target.inner(number, len).bytes());
                A::mark(&mut frame.ip, number);
                frame.udp_csum = csum;
                let mut frames = frame.fragments(header + room).expect("fragments");
                order(&mut frames);
                frames
            });
            list.amend(|case| case.counted = 1);
        };
    let (usual, right) = (A::CSUM, Csum::Right);
    pieces("two fragments", 400, 280, usual, |_| ());
    pieces("two fragments with checksum", 400, 280, right, |_| ());
    let name = "two fragments with a wrong checksum";
    pieces(name, 400, 280, Csum::Wrong, |_| ());
    pieces("three fragments", 400, 180, usual, |_| ());
    let name = "three fragments, last first";
    pieces(name, 400, 180, right, |frames| frames.reverse());
    pieces("fragments of 8 bytes", 40, 8, usual, |_| ());
    let name = "the first of two fragments";
    pieces(name, 400, 280, usual, |frames| frames.truncate(1));
    pieces("a fragment twice", 400, 280, usual, |frames| {
        let last = frames[1].clone();
        frames.push(last);
    });
    list.raw(
        "the second of two fragments",
        Outcome::NotOurs,
        |target, number| {
            let mut frame = target.outer(target.inner(number, 400).bytes());
            A::mark(&mut frame.ip, number);
            frame
                .fragments(header + 280)
                .expect("fragments")
                .split_off(1)
        },
    );
}
