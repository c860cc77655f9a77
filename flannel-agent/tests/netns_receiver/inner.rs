//! Deviations of what is inside.

use flannel_testkit::packet::{Header as _, Inner};

use crate::cases::{List, Outcome, Received, Target};

const CARRIED: Outcome = Outcome::Carried;
const TOO_SHORT: Outcome = Outcome::Left("too_short");

/// What injection allows beyond the tunnel's MTU: a VLAN tag.
const ALLOWANCE: usize = 4;

/// All that both families have. `garbage` is what becomes of an inner frame that is none.
pub(crate) fn all<A: Received>(list: &mut List<A>, garbage: Outcome) {
    macs(list);
    types(list, garbage);
    packets(list);
    congestion(list);
}

fn macs<A: Received>(list: &mut List<A>) {
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
}

fn types<A: Received>(list: &mut List<A>, garbage: Outcome) {
    // That of the other family is among them.
    let other = A::Header::ETHERTYPE ^ 0x0800 ^ 0x86dd;
    for ethertype in [
        0x0806, other, 0x8100, 0x88cc, 0x1234, 0x0026, 0x0000, 0xffff,
    ] {
        list.inner(
            &format!("inner type {ethertype:#06x}"),
            A::NOT_THIS,
            |inner, _| {
                inner.ethertype = ethertype;
            },
        );
    }
    let header = |target: &Target<A>, number: u16| target.inner(number, 0).bytes()[..14].to_vec();
    for len in [0, 1, 13, 14, 15, 13 + A::FAMILY.header()] {
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
    list.inner_bytes("inner garbage", garbage, |target, number| {
        let mut frame = header(target, number);
        frame.truncate(12);
        frame.extend((0..200_u8).map(|at| at.wrapping_mul(151).wrapping_add(77)));
        frame
    });
}

fn packets<A: Received>(list: &mut List<A>) {
    for ttl in [0, 1, 2, 255] {
        list.inner(&format!("inner TTL {ttl}"), CARRIED, |inner, _| {
            inner.ip.set_ttl(ttl);
        });
    }
    list.inner("inner TCP", CARRIED, |inner, target| {
        let tcp = Inner::tcp(A::PEER_POD, target.pod, 9, b"out of the blue");
        inner.l4 = tcp.l4;
    });
    list.inner("inner echo", CARRIED, |inner, target| {
        let echo = Inner::echo(A::PEER_POD, target.pod, 1, 1, b"are you there");
        inner.l4 = echo.l4;
    });
}

fn congestion<A: Received>(list: &mut List<A>) {
    for outer in 0..4 {
        for inner in 0..4 {
            for dscp in [0x00, 0xb8] {
                let drop = outer == 3 && inner == 0;
                let outcome = if drop { Outcome::Left("ecn") } else { CARRIED };
                let name =
                    format!("congestion bits {outer} outside, {inner} inside, DSCP {dscp:#04x}");
                list.with_and_without_checksum(&name, outcome, |target, number| {
                    let mut packet = target.inner(number, 40);
                    packet.ip.set_tos(dscp | inner);
                    let mut frame = target.outer(packet.bytes());
                    frame.ip.set_tos(outer);
                    frame
                });
            }
        }
    }
}

/// Packets of about the tunnel's MTU in bytes, with one change each.
pub(crate) fn sizes<A: Received>(
    list: &mut List<A>,
    mtu: usize,
    name: &str,
    change: impl Fn(&mut Inner<A>),
) {
    let headers = A::FAMILY.header() + 8;
    for len in [
        mtu - 1,
        mtu,
        mtu + 1,
        mtu + ALLOWANCE,
        mtu + ALLOWANCE + 1,
        1_900,
    ] {
        let outcome = if len > mtu + ALLOWANCE {
            Outcome::Left("over_tunnel_mtu")
        } else {
            CARRIED
        };
        let name = format!("inner packet of {len} bytes{name}");
        list.inner_bytes(&name, outcome, |target, number| {
            let mut inner = target.inner(number, len - headers);
            change(&mut inner);
            inner.bytes()
        });
    }
}
