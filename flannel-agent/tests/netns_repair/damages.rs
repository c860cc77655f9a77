//! What somebody breaks, in the words of `ip`, `bridge` and `bpftool`, over either family.

use std::fmt::Write as _;

use flannel_testkit::{Family, eventually};

use crate::{REPAIR, rig::Rig};

/// Something that goes wrong with the overlay that the rig looks at, by its name.
pub(crate) type Damage = (&'static str, fn(&Rig));

/// Breaks things with `ip` on node 0. In the text, `DEV` is the tunnel device, `PAIRED` the other end where it is a pair, `VIA` the
/// switch; `OWN`, `PEER` and `NOBODY` are the first addresses of the subnets of node 0, of node 1, and of no node, `/N` is their length,
/// `/H` that of one address.
pub(crate) fn ip(rig: &Rig, line: &str) {
    rig.ns(0).ip(&named(rig, line)).unwrap();
}

/// The same with `bridge`. `FAR` is an address on the underlay that no node has.
fn bridge(rig: &Rig, line: &str) {
    let line = named(rig, line);
    let words = std::iter::once("bridge").chain(line.split_whitespace());
    rig.ns(0).exec(words).unwrap();
}

pub(crate) fn named(rig: &Rig, line: &str) -> String {
    let family = rig.family();
    let (own, peer) = (rig.node(0).subnet_of(family), rig.node(1).subnet_of(family));
    let [nobody, far, all] = match family {
        Family::V4 => ["10.244.9.0", "192.168.77.200", "/32"],
        Family::V6 => ["fd00:10:244:9::", "fd77::200", "/128"],
    };
    let paired = match family {
        Family::V4 => "flannelp.1",
        Family::V6 => "flannelp6.1",
    };
    line.replace("DEV", &rig.device())
        .replace("OWN", &own.base().to_string())
        .replace("PEER", &peer.base().to_string())
        .replace("NOBODY", nobody)
        .replace("VIA", &rig.node(0).gateway(family).to_string())
        .replace("PAIRED", paired)
        .replace("FAR", far)
        .replace("/N", &format!("/{}", own.prefix_len()))
        .replace("/H", all)
}

/// Everything that leads through the device.
fn flush_routes(rig: &Rig) {
    ip(rig, &format!("{} route flush dev DEV", rig.family().flag()));
}

/// Writes an entry whose bytes are all the same.
fn fill(rig: &Rig, map: &str, key: u32, byte: u8) {
    let len = rig.map_info(0, map)["bytes_value"].as_u64();
    let len = len.and_then(|len| len.try_into().ok()).expect("a size");
    rig.map_write(0, map, key, &vec![byte; len]);
}

/// Where the map `nodes` has node 1.
fn id_of_peer(rig: &Rig) -> u32 {
    rig.map_peers_of(0)[&rig.node(1).subnet_of(rig.family())].id
}

/// A neighbour that is nobody's.
fn neighbour(family: Family, host: u32) -> String {
    match family {
        Family::V4 => format!("10.9.{}.{}", 100 + host / 250, 1 + host % 250),
        Family::V6 => format!("fd09::{:x}", 1 + host),
    }
}

pub(crate) const DEVICE_DAMAGES: [Damage; 8] = [
    ("the device is deleted", |rig| ip(rig, "link del DEV")),
    ("the device is set down", |rig| {
        ip(rig, "link set DEV down");
    }),
    ("the address is removed", |rig| {
        ip(rig, "addr del OWN/H dev DEV");
    }),
    ("all addresses are removed", |rig| {
        ip(rig, "addr flush dev DEV");
    }),
    ("an older lease's address is there", |rig| {
        ip(rig, "addr add NOBODY/H dev DEV");
    }),
    ("the MTU is lower", |rig| {
        ip(rig, "link set DEV mtu 1200");
    }),
    ("the MAC address is another", |rig| {
        ip(rig, "link set DEV address 02:00:00:00:00:99");
    }),
    ("the device is deleted twice", |rig| {
        ip(rig, "link del DEV");
        eventually(REPAIR, "the device is there", || {
            rig.ns(0).ifindex(&rig.device())
        });
        ip(rig, "link del DEV");
    }),
];

pub(crate) const PEER_DAMAGES: [Damage; 9] = [
    ("a route is deleted", |rig| {
        ip(rig, "route del PEER/N");
    }),
    ("all routes are deleted", |rig| {
        flush_routes(rig);
    }),
    ("a route has lost its gateway", |rig| {
        ip(rig, "route replace PEER/N dev DEV");
    }),
    ("a route leads elsewhere", |rig| {
        ip(rig, "route replace PEER/N via VIA dev eth0");
    }),
    (
        "a route is deleted while another table has the same",
        |rig| {
            ip(rig, "route add PEER/N via PEER dev DEV onlink table 100");
            ip(rig, "route del PEER/N table main");
        },
    ),
    ("a neighbour is deleted", |rig| {
        ip(rig, "neigh del PEER dev DEV");
    }),
    ("a neighbour has another MAC address", |rig| {
        ip(
            rig,
            "neigh replace PEER lladdr 02:00:00:00:00:98 dev DEV nud permanent",
        );
    }),
    ("all neighbours are flushed", |rig| {
        ip(rig, "neigh flush dev DEV nud permanent");
    }),
    ("a peer is there that nobody has leased", |rig| {
        ip(
            rig,
            "neigh add NOBODY lladdr 02:00:00:00:00:97 dev DEV nud permanent",
        );
        ip(rig, "route add NOBODY/N via NOBODY dev DEV onlink");
    }),
];

pub(crate) const FDB_DAMAGES: [Damage; 3] = [
    ("a forwarding entry is deleted", |rig| {
        let mac = rig.lease(1).mac;
        bridge(rig, &format!("fdb del {mac} dev DEV"));
    }),
    ("a forwarding entry leads elsewhere", |rig| {
        let mac = rig.lease(1).mac;
        bridge(
            rig,
            &format!("fdb replace {mac} dev DEV dst FAR self permanent"),
        );
    }),
    (
        "a forwarding entry is there that nobody has leased",
        |rig| {
            bridge(
                rig,
                "fdb add 02:00:00:00:00:96 dev DEV dst FAR self permanent",
            );
        },
    ),
];

pub(crate) const PAIR_DAMAGES: [Damage; 3] = [
    ("the MTU is higher", |rig| {
        ip(rig, "link set DEV mtu 1500");
    }),
    ("the other end is deleted", |rig| {
        ip(rig, "link del PAIRED");
    }),
    ("the other end is set down", |rig| {
        ip(rig, "link set PAIRED down");
    }),
];

pub(crate) const MAP_DAMAGES: [Damage; 9] = [
    ("config is zero", |rig| {
        fill(rig, "config", 0, 0);
    }),
    ("config is garbage", |rig| {
        fill(rig, "config", 0, 0xa5);
    }),
    ("a subnet leads nowhere", |rig| {
        fill(rig, "subnets", 2, 0);
    }),
    ("a subnet leads to an empty entry", |rig| {
        rig.map_write(0, "subnets", 2, &300_u32.to_ne_bytes());
    }),
    ("a subnet leads beyond the map", |rig| {
        fill(rig, "subnets", 2, 0xff);
    }),
    ("two subnets have each other's node", |rig| {
        let peers = rig.map_peers_of(0);
        let ids: Vec<u32> = peers.values().map(|peer| peer.id).collect();
        rig.map_write(0, "subnets", 2, &ids[1].to_ne_bytes());
        rig.map_write(0, "subnets", 3, &ids[0].to_ne_bytes());
    }),
    ("a node is zero", |rig| {
        let id = id_of_peer(rig);
        fill(rig, "nodes", id, 0);
    }),
    ("a node is garbage", |rig| {
        let id = id_of_peer(rig);
        fill(rig, "nodes", id, 0xa5);
    }),
    ("everything in the maps is zero", |rig| {
        for peer in rig.map_peers_of(0).values() {
            fill(rig, "nodes", peer.id, 0);
        }
        for subnet in 0..4 {
            fill(rig, "subnets", subnet, 0);
        }
        fill(rig, "config", 0, 0);
    }),
];

/// Everything at once, in an order in which each is possible.
pub(crate) const ALL: [Damage; 1] = [("everything at once", |rig| {
    flush_routes(rig);
    ip(rig, "neigh flush dev DEV nud permanent");
    ip(rig, "addr flush dev DEV");
    ip(rig, "link set DEV down");
    ip(rig, "link set DEV mtu 1300");
})];

/// Notifications about things that are none of ours, so many that they hide those that are.
pub(crate) const NOISE: [Damage; 1] = [(
    "a neighbour is changed again and again among many others",
    |rig| {
        let mut batch = String::new();
        for host in 0..4000 {
            writeln!(
                batch,
                "neigh add {} lladdr 02:00:00:00:01:01 dev cni0 nud permanent",
                neighbour(rig.family(), host)
            )
            .unwrap();
            if host % 40 == 0 {
                writeln!(
                    batch,
                    "{}",
                    named(
                        rig,
                        &format!(
                            "neigh replace PEER lladdr 02:00:00:00:02:{:02x} dev DEV nud permanent",
                            host / 40
                        )
                    )
                )
                .unwrap();
            }
        }
        let file = rig.node(0).run_dir.join("batch");
        std::fs::write(&file, batch).unwrap();
        ip(rig, &format!("-batch {}", file.display()));
        ip(rig, "neigh flush dev cni0 nud permanent");
    },
)];
