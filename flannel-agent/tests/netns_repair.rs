//! Whatever somebody breaks of ours is whole again within two seconds, and peers notice as little as can be.

mod rig;

use std::{fmt::Write as _, time::Duration};

use flannel_testkit::{eventually, json::link, privileged, try_eventually};
use rig::{DEVICE, PATIENCE, Rig, hooks, text};

/// How long the loop may take to mend anything.
const REPAIR: Duration = Duration::from_secs(2);
const UP: u64 = 1;

/// Something that goes wrong, by its name.
type Damage = (&'static str, fn(&Rig));

/// Breaks things with `ip` on node 0.
fn ip(rig: &Rig, line: &str) {
    rig.ns(0).ip(line).unwrap();
}

fn bridge(rig: &Rig, line: &str) {
    let words = std::iter::once("bridge").chain(line.split_whitespace());
    rig.ns(0).exec(words).unwrap();
}

/// Whether node 0 has everything, and nothing that it should not have.
fn whole(rig: &Rig) -> Result<(), String> {
    let device = link(rig.ns(0), DEVICE).map_err(|error| format!("{error:#}"))?;
    let lease = rig.lease(0);
    let flags = device["flags"].as_array().into_iter().flatten();
    let mac = text(&device, "address");
    if mac.as_ref() != Some(&lease.mac) || device["mtu"] != 1450 {
        return Err(format!(
            "MAC {mac:?}, MTU {}; published is {}",
            device["mtu"], lease.mac
        ));
    }
    if flags.filter(|flag| *flag == "UP").count() as u64 != UP {
        return Err(format!("the device is down: {}", device["flags"]));
    }
    let addresses =
        flannel_testkit::json::ip_json(rig.ns(0), &["-4", "addr", "show", "dev", DEVICE])
            .map_err(|error| format!("{error:#}"))?;
    let addresses: Vec<String> = addresses[0]["addr_info"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|address| {
            format!(
                "{}/{}",
                address["local"].as_str().unwrap_or_default(),
                address["prefixlen"]
            )
        })
        .collect();
    if addresses != ["10.244.1.0/32"] {
        return Err(format!("its addresses are {addresses:?}"));
    }
    rig.converged(0)?;
    if rig.instance(0).exists() {
        rig.maps_whole(0)?;
        hooks::hooks(rig.ns(0)).one_each()?;
    }
    for peer in 1..=2 {
        rig.ping(0, peer).map_err(|error| format!("{error:#}"))?;
    }
    Ok(())
}

/// Breaks one thing after the other, and reports all that were not mended in time.
fn mends(flags: &[&str], damages: &[Damage]) {
    if !privileged() {
        return;
    }
    let rig = Rig::start(3, flags);
    eventually(PATIENCE, "the node is whole at first", || whole(&rig));
    let published = rig.lease(0);
    let mut failures = Vec::new();
    for (name, damage) in damages {
        damage(&rig);
        if let Err(error) = try_eventually(REPAIR, name, || whole(&rig)) {
            failures.push(format!("{error:#}"));
            // The next one starts from a whole node again, if it ever gets there.
            drop(try_eventually(Duration::from_secs(15), name, || {
                whole(&rig)
            }));
        }
        assert_eq!(
            rig.lease(0),
            published,
            "{name}: what peers know has changed"
        );
    }
    assert!(
        failures.is_empty(),
        "not mended in {REPAIR:?}:\n{}",
        failures.join("\n")
    );
}

const DEVICE_DAMAGES: [Damage; 8] = [
    ("the device is deleted", |rig| ip(rig, "link del flannel.1")),
    ("the device is set down", |rig| {
        ip(rig, "link set flannel.1 down");
    }),
    ("the address is removed", |rig| {
        ip(rig, "addr del 10.244.1.0/32 dev flannel.1");
    }),
    ("all addresses are removed", |rig| {
        ip(rig, "addr flush dev flannel.1");
    }),
    ("an older lease's address is there", |rig| {
        ip(rig, "addr add 10.244.9.0/32 dev flannel.1");
    }),
    ("the MTU is lower", |rig| {
        ip(rig, "link set flannel.1 mtu 1200");
    }),
    ("the MAC address is another", |rig| {
        ip(rig, "link set flannel.1 address 02:00:00:00:00:99");
    }),
    ("the device is deleted twice", |rig| {
        ip(rig, "link del flannel.1");
        eventually(REPAIR, "the device is there", || rig.ns(0).ifindex(DEVICE));
        ip(rig, "link del flannel.1");
    }),
];

const PEER_DAMAGES: [Damage; 9] = [
    ("a route is deleted", |rig| {
        ip(rig, "route del 10.244.2.0/24");
    }),
    ("all routes are deleted", |rig| {
        ip(rig, "route flush dev flannel.1");
    }),
    ("a route has lost its gateway", |rig| {
        ip(rig, "route replace 10.244.2.0/24 dev flannel.1");
    }),
    ("a route leads elsewhere", |rig| {
        ip(rig, "route replace 10.244.2.0/24 via 192.168.77.1 dev eth0");
    }),
    (
        "a route is deleted while another table has the same",
        |rig| {
            ip(
                rig,
                "route add 10.244.2.0/24 via 10.244.2.0 dev flannel.1 onlink table 100",
            );
            ip(rig, "route del 10.244.2.0/24 table main");
        },
    ),
    ("a neighbour is deleted", |rig| {
        ip(rig, "neigh del 10.244.2.0 dev flannel.1");
    }),
    ("a neighbour has another MAC address", |rig| {
        ip(
            rig,
            "neigh replace 10.244.2.0 lladdr 02:00:00:00:00:98 dev flannel.1 nud permanent",
        );
    }),
    ("all neighbours are flushed", |rig| {
        ip(rig, "neigh flush dev flannel.1 nud permanent");
    }),
    ("a peer is there that nobody has leased", |rig| {
        ip(
            rig,
            "neigh add 10.244.9.0 lladdr 02:00:00:00:00:97 dev flannel.1 nud permanent",
        );
        ip(
            rig,
            "route add 10.244.9.0/24 via 10.244.9.0 dev flannel.1 onlink",
        );
    }),
];

const FDB_DAMAGES: [Damage; 3] = [
    ("a forwarding entry is deleted", |rig| {
        let mac = rig.lease(1).mac;
        bridge(rig, &format!("fdb del {mac} dev flannel.1"));
    }),
    ("a forwarding entry leads elsewhere", |rig| {
        let mac = rig.lease(1).mac;
        bridge(
            rig,
            &format!("fdb replace {mac} dev flannel.1 dst 192.168.77.200 self permanent"),
        );
    }),
    (
        "a forwarding entry is there that nobody has leased",
        |rig| {
            bridge(
                rig,
                "fdb add 02:00:00:00:00:96 dev flannel.1 dst 192.168.77.200 self permanent",
            );
        },
    ),
];

const PAIR_DAMAGES: [Damage; 3] = [
    ("the MTU is higher", |rig| {
        ip(rig, "link set flannel.1 mtu 1500");
    }),
    ("the other end is deleted", |rig| {
        ip(rig, "link del flannelp.1");
    }),
    ("the other end is set down", |rig| {
        ip(rig, "link set flannelp.1 down");
    }),
];

const MAP_DAMAGES: [Damage; 9] = [
    ("config is zero", |rig| {
        rig.map_write(0, "config", 0, &[0; 80]);
    }),
    ("config is garbage", |rig| {
        rig.map_write(0, "config", 0, &[0xa5; 80]);
    }),
    ("a subnet leads nowhere", |rig| {
        rig.map_write(0, "subnets", 2, &[0; 4]);
    }),
    ("a subnet leads to an empty entry", |rig| {
        rig.map_write(0, "subnets", 2, &300_u32.to_ne_bytes());
    }),
    ("a subnet leads beyond the map", |rig| {
        rig.map_write(0, "subnets", 2, &[0xff; 4]);
    }),
    ("two subnets have each other's node", |rig| {
        let peers = rig.map_peers(0);
        let ids: Vec<u32> = peers.values().map(|peer| peer.id).collect();
        rig.map_write(0, "subnets", 2, &ids[1].to_ne_bytes());
        rig.map_write(0, "subnets", 3, &ids[0].to_ne_bytes());
    }),
    ("a node is zero", |rig| {
        let id = rig.map_peers(0)[&rig.node(1).subnet].id;
        rig.map_write(0, "nodes", id, &[0; 80]);
    }),
    ("a node is garbage", |rig| {
        let id = rig.map_peers(0)[&rig.node(1).subnet].id;
        rig.map_write(0, "nodes", id, &[0xa5; 80]);
    }),
    ("everything in the maps is zero", |rig| {
        for peer in rig.map_peers(0).values() {
            rig.map_write(0, "nodes", peer.id, &[0; 80]);
        }
        for subnet in 0..4 {
            rig.map_write(0, "subnets", subnet, &[0; 4]);
        }
        rig.map_write(0, "config", 0, &[0; 80]);
    }),
];

/// Everything at once, in an order in which each is possible.
const ALL: [Damage; 1] = [("everything at once", |rig| {
    ip(rig, "route flush dev flannel.1");
    ip(rig, "neigh flush dev flannel.1 nud permanent");
    ip(rig, "addr flush dev flannel.1");
    ip(rig, "link set flannel.1 down");
    ip(rig, "link set flannel.1 mtu 1300");
})];

/// Notifications about things that are none of ours, so many that they hide those that are.
const NOISE: [Damage; 1] = [(
    "a neighbour is changed again and again among many others",
    |rig| {
        let mut batch = String::new();
        for host in 0..4000 {
            let (high, low) = (100 + host / 250, 1 + host % 250);
            writeln!(
                batch,
                "neigh add 10.9.{high}.{low} lladdr 02:00:00:00:01:01 dev cni0 nud permanent"
            )
            .unwrap();
            if host % 40 == 0 {
                writeln!(
                    batch,
                    "neigh replace 10.244.2.0 lladdr 02:00:00:00:02:{:02x} dev flannel.1 nud permanent",
                    host / 40
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

#[test]
fn mends_with_ebpf_by_tcx() {
    mends(
        &["--bpf-attach=tcx"],
        &[
            &DEVICE_DAMAGES[..],
            &PEER_DAMAGES,
            &FDB_DAMAGES,
            &MAP_DAMAGES,
            &ALL,
            &NOISE,
        ]
        .concat(),
    );
}

#[test]
fn mends_with_ebpf_by_clsact() {
    mends(
        &["--bpf-attach=clsact"],
        &[&DEVICE_DAMAGES[..], &ALL].concat(),
    );
}

#[test]
fn mends_with_ebpf_alone() {
    mends(
        &["--bpf-device=veth"],
        &[
            &DEVICE_DAMAGES[..],
            &PEER_DAMAGES,
            &PAIR_DAMAGES,
            &MAP_DAMAGES,
            &ALL,
        ]
        .concat(),
    );
}

#[test]
fn mends_on_the_kernel_path() {
    mends(
        &["--datapath=kernel"],
        &[
            &DEVICE_DAMAGES[..],
            &PEER_DAMAGES,
            &FDB_DAMAGES,
            &ALL,
            &NOISE,
        ]
        .concat(),
    );
}
