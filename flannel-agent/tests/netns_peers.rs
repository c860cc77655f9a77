//! Peers that leave, move or change, and an underlay that does: the node follows within two seconds, without a gap.

mod rig;

use std::{
    collections::BTreeSet,
    net::Ipv4Addr,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use flannel_testkit::{
    Netns, Subnet, eventually,
    json::{bridge_json, ip_json, link},
    privileged,
    traffic::{self, FloodPing},
};
use rig::{DEVICE, PATIENCE, Rig, list, text};

/// How long the loop may take to follow.
const FOLLOW: Duration = Duration::from_secs(2);
const EVERY: Duration = Duration::from_millis(1);

fn flood(rig: &Rig, from: usize, to: usize) -> FloodPing {
    FloodPing::start(&rig.pod(from).ns, rig.pod(to).ip, EVERY).unwrap()
}

#[track_caller]
fn assert_nothing_lost(ping: FloodPing) {
    let stats = ping.stop().unwrap();
    assert_eq!(stats.lost, 0, "{stats:?}");
}

/// Until kernel and, with eBPF, maps of the node are what the leases say.
#[track_caller]
fn follows(rig: &Rig, node: usize, what: &str) {
    let bpf = rig.instance(node).exists();
    eventually(FOLLOW, what, || {
        rig.converged(node)?;
        if bpf { rig.maps_whole(node) } else { Ok(()) }
    });
}

/// Whether anything of node 0 still names the peer.
fn traces(rig: &Rig, subnet: Subnet, peer: &rig::Peer) -> Vec<String> {
    let ns = rig.ns(0);
    let mut all = Vec::new();
    for command in [
        "ip -j route show table all",
        "ip -j neigh show",
        "bridge -j fdb show",
    ] {
        let text = ns.exec(command.split(' ')).unwrap();
        let named = [
            format!("\"{}\"", subnet.base()),
            subnet.to_string(),
            peer.mac.clone(),
        ];
        all.extend(
            named
                .iter()
                .filter(|name| text.contains(*name))
                .map(|name| format!("{command}: {name}")),
        );
    }
    if rig.instance(0).exists() {
        all.extend(
            rig.map_peers(0)
                .get(&subnet)
                .map(|peer| format!("{peer:?}")),
        );
        // An entry that no subnet points at holds the peer's addresses no more either.
        let nodes = rig.map_dump(0, "nodes").to_string();
        let mac: Vec<String> = peer
            .mac
            .split(':')
            .map(|byte| format!("\"0x{byte}\""))
            .collect();
        if nodes.contains(&mac.join(",")) {
            all.push("map nodes".into());
        }
    }
    all
}

fn peer_leaves(flags: &[&str]) {
    if !privileged() {
        return;
    }
    let mut rig = Rig::start(3, flags);
    let (subnet, peer) = (rig.node(2).subnet, rig.lease(2));
    assert!(
        traces(&rig, subnet, &peer).len() >= 3,
        "it is there at first"
    );
    let ping = flood(&rig, 0, 1);
    rig.kill_agent(2);
    rig.remove_lease(subnet);
    eventually(FOLLOW, "nothing is left of the peer", || {
        let left = traces(&rig, subnet, &peer);
        left.is_empty().then_some(()).ok_or_else(|| left.join("; "))
    });
    follows(&rig, 0, "the other peer stays");
    // It comes back as it was.
    rig.start_agent(2, flags);
    rig.wait_ready(2);
    follows(&rig, 0, "the peer is there again");
    rig.ping(0, 2).unwrap();
    assert_nothing_lost(ping);
}

#[test]
fn a_peer_that_leaves_leaves_nothing_with_ebpf() {
    peer_leaves(&[]);
}

#[test]
fn a_peer_that_leaves_leaves_nothing_with_ebpf_alone() {
    peer_leaves(&["--bpf-device=veth"]);
}

#[test]
fn a_peer_that_leaves_leaves_nothing_on_the_kernel_path() {
    peer_leaves(&["--datapath=kernel"]);
}

/// Looks whether the way to `subnet` is complete at any moment. Gives the MAC addresses and VTEPs that it has seen, and the gaps.
fn watch_way(rig: &Rig, subnet: Subnet, stop: &AtomicBool) -> (BTreeSet<String>, Vec<String>) {
    let ns = rig.ns(0);
    let (mut seen, mut gaps) = (BTreeSet::new(), Vec::new());
    let bpf = rig.instance(0).exists();
    while !stop.load(Ordering::Relaxed) {
        let forwarding = || fdb(ns);
        let before = forwarding();
        let neighbour = ip_json(
            ns,
            &["neigh", "show", &subnet.base().to_string(), "dev", DEVICE],
        )
        .unwrap();
        let route = ip_json(ns, &["route", "show", &subnet.to_string(), "dev", DEVICE]).unwrap();
        let after = forwarding();
        match text(&neighbour[0], "lladdr") {
            None => gaps.push("no neighbour".into()),
            // The list may have changed on either side of the look at the neighbour.
            Some(mac) => match before.iter().chain(&after).find(|(entry, _)| *entry == mac) {
                Some((_, vtep)) => {
                    seen.insert(format!("{mac} {vtep}"));
                }
                None => gaps.push(format!("no forwarding entry for {mac}")),
            },
        }
        if list(&route).len() != 1 {
            gaps.push(format!("routes {route}"));
        }
        if bpf && !rig.map_peers(0).contains_key(&subnet) {
            gaps.push("no map entry".into());
        }
    }
    (seen, gaps)
}

fn fdb(ns: &Netns) -> Vec<(String, String)> {
    let all = bridge_json(ns, &["fdb", "show", "dev", DEVICE]).unwrap();
    list(&all)
        .iter()
        .filter_map(|entry| Some((text(entry, "mac")?, text(entry, "dst")?)))
        .collect()
}

fn peer_changes(flags: &[&str]) {
    if !privileged() {
        return;
    }
    let rig = Rig::start(2, flags);
    let subnet: Subnet = "10.244.77.0/24".parse().unwrap();
    let ways = [(200, 1), (200, 2), (201, 2), (202, 3), (200, 1), (203, 1)];
    let way = |(host, mac): (u8, u8)| {
        (
            Ipv4Addr::new(192, 168, 77, host),
            format!("02:00:00:00:77:{mac:02x}"),
        )
    };
    let put = |step| {
        let (public_ip, mac) = way(step);
        rig.put_lease(subnet, public_ip, &mac);
        eventually(FOLLOW, "the node follows the peer", || {
            rig.converged_kernel(0)
        });
    };
    put(ways[0]);
    if rig.instance(0).exists() {
        eventually(FOLLOW, "the maps have the peer", || {
            rig.map_peers(0).get(&subnet).cloned().ok_or("no")
        });
    }
    let ping = flood(&rig, 0, 1);
    let stop = AtomicBool::new(false);
    let (seen, gaps) = std::thread::scope(|scope| {
        let watch = scope.spawn(|| watch_way(&rig, subnet, &stop));
        for step in ways {
            put(step);
            if rig.instance(0).exists() {
                let (public_ip, mac) = way(step);
                eventually(FOLLOW, "the maps follow the peer", || {
                    let peer = rig.map_peers(0).remove(&subnet).ok_or("no entry")?;
                    let same = peer.public_ip == public_ip.to_string() && peer.mac == mac;
                    same.then_some(()).ok_or("another entry")
                });
            }
        }
        stop.store(true, Ordering::Relaxed);
        watch.join().unwrap()
    });
    assert!(gaps.is_empty(), "{gaps:?}");
    assert!(seen.len() >= 3, "the watch has seen changes: {seen:?}");
    assert_nothing_lost(ping);
}

#[test]
fn a_peer_that_changes_is_never_absent_with_ebpf() {
    peer_changes(&[]);
}

#[test]
fn a_peer_that_changes_is_never_absent_on_the_kernel_path() {
    peer_changes(&["--datapath=kernel"]);
}

/// A node that lost its device gets a new one with another MAC address, because its lease says so.
#[test]
fn a_peer_with_a_new_mac_address_is_reached_at_once() {
    if !privileged() {
        return;
    }
    let mut rig = Rig::start(3, &[]);
    let unchanged = flood(&rig, 0, 1);
    rig.stop_agent(2);
    rig.ns(2).ip("link del flannel.1").unwrap();
    let mac = "02:00:00:00:33:33";
    rig.put_lease(rig.node(2).subnet, rig.node(2).ip, mac);
    rig.start_agent(2, &[]);
    rig.wait_ready(2);
    assert_eq!(link(rig.ns(2), DEVICE).unwrap()["address"], mac);
    eventually(FOLLOW, "the changed peer answers", || rig.ping(0, 2));
    follows(&rig, 0, "node 0 has the new address");
    assert_nothing_lost(unchanged);
}

fn underlay_changes(flags: &[&str]) {
    if !privileged() {
        return;
    }
    let rig = Rig::start(2, flags);
    let peer_ip = rig.node(1).ip;
    // A change of the address is announced to the neighbours.
    rig.ns(1)
        .set_sysctl("net/ipv4/conf/eth0/arp_notify", "1")
        .unwrap();
    for key in ["all", "br0"] {
        rig.lab()
            .underlay()
            .set_sysctl(&format!("net/ipv4/conf/{key}/send_redirects"), "0")
            .unwrap();
    }
    follows(&rig, 0, "at first");

    rig.ns(1)
        .ip("link set eth0 address 02:00:00:00:11:11")
        .unwrap();
    eventually(
        FOLLOW,
        "the next hop's new MAC address is in the maps",
        || hop_is(&rig, "02:00:00:00:11:11"),
    );
    eventually(FOLLOW, "the peer answers at its new MAC address", || {
        rig.ping(0, 1)
    });
    follows(&rig, 0, "nothing else has changed");
    follows(
        &rig,
        1,
        "the changed node has its own new address as source",
    );

    // Through a gateway, and back.
    let switch = link(rig.lab().underlay(), "br0").unwrap();
    let switch = text(&switch, "address").unwrap();
    rig.ns(0)
        .ip(&format!("route add {peer_ip}/32 via 192.168.77.1 dev eth0"))
        .unwrap();
    eventually(FOLLOW, "the gateway is the next hop", || {
        hop_is(&rig, &switch)
    });
    eventually(FOLLOW, "the peer answers through the gateway", || {
        rig.ping(0, 1)
    });
    rig.ns(0).ip(&format!("route del {peer_ip}/32")).unwrap();
    eventually(FOLLOW, "the peer itself is the next hop", || {
        hop_is(&rig, "02:00:00:00:11:11")
    });

    // An entry by hand is followed, for good or ill.
    rig.ns(0)
        .ip(&format!(
            "neigh replace {peer_ip} lladdr 02:00:00:00:aa:aa dev eth0 nud permanent"
        ))
        .unwrap();
    eventually(FOLLOW, "the entry by hand is followed", || {
        hop_is(&rig, "02:00:00:00:aa:aa")
    });
    rig.ns(0)
        .ip(&format!("neigh del {peer_ip} dev eth0"))
        .unwrap();
    eventually(FOLLOW, "no stale address is left", || {
        let hop = rig.map_peers(0)[&rig.node(1).subnet].hop.clone();
        let stale = hop.is_some_and(|(mac, _)| mac == "02:00:00:00:aa:aa");
        (!stale).then_some(()).ok_or("the stale address")
    });
    eventually(FOLLOW, "the peer answers again", || rig.ping(0, 1));
    follows(&rig, 0, "the next hop is resolved again");

    // The cable.
    rig.node(0).set_carrier(false).unwrap();
    traffic::ping_once(&rig.pod(0).ns, rig.pod(1).ip, Duration::from_millis(200)).unwrap_err();
    rig.node(0).set_carrier(true).unwrap();
    eventually(FOLLOW, "the peer answers after the cable is back", || {
        rig.ping(0, 1)
    });
    follows(&rig, 0, "eBPF has the next hop again");
    let before = rig.counters(0);
    eventually(PATIENCE, "eBPF carries", || {
        rig.ping(0, 1).map_err(|error| format!("{error:#}"))?;
        let now = rig.counters(0);
        (now.encap > before.encap && now.decap > before.decap)
            .then_some(())
            .ok_or_else(|| format!("{now:?}"))
    });
}

fn hop_is(rig: &Rig, mac: &str) -> Result<(), String> {
    let peers = rig.map_peers(0);
    let hop = peers
        .get(&rig.node(1).subnet)
        .and_then(|peer| peer.hop.clone());
    let is = hop.as_ref().is_some_and(|(hop, _)| hop == mac);
    is.then_some(())
        .ok_or_else(|| format!("the next hop is {hop:?}, not {mac}"))
}

#[test]
fn the_underlay_is_followed() {
    underlay_changes(&[]);
}

#[test]
fn the_underlay_is_followed_with_ebpf_alone() {
    underlay_changes(&["--bpf-device=veth"]);
}
