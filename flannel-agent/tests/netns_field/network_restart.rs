//! Somebody sets the node's network up anew while traffic flows.

use std::{net::SocketAddr, time::Duration};

use flannel_testkit::{
    LabOptions, eventually,
    json::{ip_json, link},
    privileged,
    traffic::{FloodPing, TcpPair, TcpServer},
};

use crate::{
    PORT, assert_lossless,
    rig::{DEVICE, NET_CONF, PATIENCE, Rig, text},
    serve, wait_mended,
};

/// A MAC address of udev's making.
const UDEVS: &str = "02:00:00:00:00:99";

/// What a restart of the network does to the node, by its name.
const WAYS: [(&str, &[&str]); 4] = [
    (
        "everything on the device is flushed and it is set down",
        &[
            "route flush dev flannel.1",
            "neigh flush dev flannel.1 nud permanent",
            "addr flush dev flannel.1",
            "link set flannel.1 down",
        ],
    ),
    ("the device is deleted", &["link del flannel.1"]),
    ("the device is set down", &["link set flannel.1 down"]),
    (
        "the uplink is set up anew",
        &[
            "addr flush dev eth0",
            "link set eth0 down",
            "link set eth0 up",
            "addr add {address}/24 dev eth0",
            "route add default via 192.168.77.1 dev eth0",
        ],
    ),
];

#[test]
fn the_overlay_outlives_a_restart_of_the_network() {
    if !privileged() {
        return;
    }
    for flags in [&[][..], &["--datapath=kernel"], &["--bpf-device=veth"]] {
        let mut rig = Rig::start(2, flags);
        let (pid, lease, address) = (rig.agent(0).pid(), rig.lease(0), rig.node(0).ip);
        let server = serve(&rig, 1);
        let mut connection =
            TcpPair::connect(&rig.pod(0).ns, server.address, &[&server]).expect("connect");
        connection.exchange(1000).expect("an exchange");
        for (name, lines) in WAYS {
            let flood =
                FloodPing::start(&rig.pod(1).ns, rig.pod(0).ip, Duration::from_millis(2)).unwrap();
            for line in lines {
                let line = line.replace("{address}", &address.to_string());
                rig.ns(0).ip(&line).unwrap();
            }
            wait_mended(&rig, &format!("{flags:?}: {name}"));
            flood.stop().unwrap();
            assert_lossless(&rig, name);
            connection
                .exchange(100_000)
                .unwrap_or_else(|error| panic!("{flags:?}: {name}: {error:#}"));
            let addresses = ip_json(rig.ns(0), &["-4", "addr", "show", "dev", DEVICE]).unwrap();
            assert_eq!(
                addresses[0]["addr_info"][0]["local"], "10.244.1.0",
                "{name}: {addresses}"
            );
        }
        assert_eq!(rig.lease(0), lease, "what peers know has changed");
        assert!(rig.agent(0).is_running() && rig.agent(0).pid() == pid);
    }
}

/// udev's `MACAddressPolicy=persistent` strikes right after the device is there.
#[test]
fn a_mac_address_of_udevs_right_after_creation_is_put_right() {
    if !privileged() {
        return;
    }
    for flags in [&[][..], &["--datapath=kernel"]] {
        let mut rig = Rig::new(2);
        let script = format!("until ip link set {DEVICE} address {UDEVS} 2>/dev/null; do :; done");
        let mut udev = rig.ns(0).command("sh");
        let mut udev = udev.args(["-c", &script]).spawn().expect("run sh");
        rig.start_all(flags);
        assert!(udev.wait().expect("udev's end").success());
        let published = rig.lease(0).mac;
        let has_published = |rig: &Rig| {
            wait_mended(rig, "the pods reach each other");
            eventually(PATIENCE, "the MAC address is the published one", || {
                let device = link(rig.ns(0), DEVICE).map_err(|error| format!("{error:#}"))?;
                let mac = text(&device, "address");
                (mac.as_ref() == Some(&published))
                    .then_some(())
                    .ok_or(format!("{mac:?}, published is {published}"))
            });
        };
        has_published(&rig);
        // And when the device comes again.
        rig.ns(0).ip(&format!("link del {DEVICE}")).unwrap();
        rig.ns(0).exec(["sh", "-c", &script]).unwrap();
        has_published(&rig);
        assert_eq!(rig.lease(0).mac, published);
        rig.wait_converged();
    }
}

/// The commands of a guide that gives flannel's subnet to Docker: its engine stopped, the table `nat` emptied, its bridge set down,
/// and all of it started again.
#[test]
fn masquerade_outlives_the_restart_of_a_container_engine() {
    if !privileged() {
        return;
    }
    for program in ["iptables-nft", "iptables-legacy"] {
        let mut rig = Rig::with(
            LabOptions {
                nodes: 2,
                ..LabOptions::default()
            },
            NET_CONF,
        );
        for node in 0..2 {
            // A rule says which variant the node uses.
            rig.ns(node)
                .exec([program, "-A", "INPUT", "-i", "lo", "-j", "ACCEPT"])
                .unwrap();
        }
        rig.start_all(&["--ip-masq"]);
        let outside = rig.lab().host("outside", 200).expect("a host outside");
        let server = TcpServer::listen(&outside, [192, 168, 77, 200], PORT).unwrap();
        let seen = |rig: &Rig| -> anyhow::Result<SocketAddr> {
            let within = Duration::from_secs(1);
            let pair =
                TcpPair::connect_within(within, &rig.pod(0).ns, 0, server.address, &[&server])?;
            Ok(pair.seen)
        };
        let masqueraded = |rig: &Rig| {
            let seen = seen(rig).map_err(|error| format!("{error:#}"))?;
            (seen.ip() == rig.node(0).ip)
                .then_some(())
                .ok_or(format!("seen as {seen}"))
        };
        masqueraded(&rig).expect("masqueraded at first");
        let save = format!("{program}-save");
        let rules = |rig: &Rig| {
            let saved = rig.ns(0).exec([&save, "-t", "nat"]).expect("list rules");
            let ours: Vec<String> = saved
                .lines()
                .filter(|line| line.starts_with("-A") && line.contains("flanneld"))
                .map(str::to_owned)
                .collect();
            ours
        };
        let before = rules(&rig);
        assert!(before.len() > 5, "{before:?}");
        rig.ns(0).exec([program, "-t", "nat", "-F"]).unwrap();
        assert_eq!(rules(&rig), [""; 0]);
        rig.ns(0).ip("link set cni0 down").unwrap();
        rig.ns(0).ip("link set cni0 up").unwrap();
        eventually(PATIENCE, "pods are masqueraded again", || masqueraded(&rig));
        assert_eq!(rules(&rig), before, "{program}");
        wait_mended(&rig, "the pods reach each other");
    }
}

/// A file that pods cannot be started without.
#[test]
fn a_subnet_file_that_was_deleted_is_written_again() {
    if !privileged() {
        return;
    }
    let rig = Rig::start(2, &[]);
    let file = rig.subnet_file(0);
    let before = std::fs::read_to_string(&file).unwrap();
    std::fs::remove_file(&file).unwrap();
    let text = eventually(PATIENCE, "the file is there", || {
        std::fs::read_to_string(&file)
    });
    assert_eq!(text, before);
}
