//! Pods as they come and go: learnt from the bridge, guarded by programs on their veths, and gone from the map before their address
//! can be anybody else's.

mod rig;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use aya::programs::TcAttachType;
use flannel_testkit::{
    Family, LabOptions, Pod, eventually, json::bridge_json, mac_text, privileged, traffic,
};
use rig::{PATIENCE, Rig, hooks, list, text};
use serde_json::Value;

const GATE: &str = "--bpf-fast-path=established";
/// No container runtime of the machine itself is to be asked.
const NO_CACHE: &str = "--cni-cache-dir=/nonexistent";

/// An entry of the map `pods`.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    ifindex: u32,
    generation: u32,
    mtu: u32,
    mac: String,
    gateway_mac: String,
}

fn start(family: Family, attach: &str) -> Rig {
    Rig::start_of(family.into(), 2, &[attach, GATE, NO_CACHE])
}

/// The address of a pod of the rig.
fn ip(rig: &Rig, pod: &Pod) -> IpAddr {
    pod.address(rig.family())
}

/// The map `pods`, taken apart by the layout that `flannel-common` documents.
#[track_caller]
fn entries(rig: &Rig, node: usize) -> BTreeMap<IpAddr, Entry> {
    let dump = rig.map_dump(node, "pods");
    let bytes = |value: &Value| -> Vec<u8> {
        let digits = list(value)
            .iter()
            .map(|byte| byte.as_str().expect("a byte"));
        digits
            .map(|byte| u8::from_str_radix(byte.trim_start_matches("0x"), 16).expect("hex"))
            .collect()
    };
    list(&dump)
        .iter()
        .map(|entry| {
            let (key, value) = (bytes(&entry["key"]), bytes(&entry["value"]));
            let address = match rig.family() {
                Family::V4 => IpAddr::from(<[u8; 4]>::try_from(key).expect("an address")),
                Family::V6 => IpAddr::from(<[u8; 16]>::try_from(key).expect("an address")),
            };
            let word = |at: usize| u32::from_ne_bytes(value[at..at + 4].try_into().unwrap());
            let mac = |at: usize| mac_text(value[at..at + 6].try_into().unwrap());
            let entry = Entry {
                ifindex: word(0),
                generation: word(4),
                mtu: word(8),
                mac: mac(12),
                gateway_mac: mac(18),
            };
            (address, entry)
        })
        .collect()
}

/// MTU of the rig's pods.
fn mtu(rig: &Rig) -> u32 {
    1500 - rig.family().overhead()
}

/// What the entry of a pod must be, its generation left aside.
fn wanted(rig: &Rig, node: usize, pod: &Pod) -> Entry {
    let ns = rig.ns(node);
    let bridge = flannel_testkit::json::link(ns, "cni0").unwrap();
    Entry {
        ifindex: ns.ifindex(&pod.host_if).unwrap(),
        generation: 0,
        mtu: mtu(rig),
        mac: mac_text(pod.mac),
        gateway_mac: text(&bridge, "address").unwrap(),
    }
}

/// Whether the map has exactly these pods, and each veth exactly our two programs.
fn exactly(rig: &Rig, node: usize, pods: &[&Pod]) -> Result<BTreeMap<IpAddr, Entry>, String> {
    let found = entries(rig, node);
    let want: BTreeMap<IpAddr, Entry> = pods
        .iter()
        .map(|pod| (ip(rig, pod), wanted(rig, node, pod)))
        .collect();
    let plain: BTreeMap<IpAddr, Entry> = found
        .iter()
        .map(|(ip, entry)| {
            let generation = 0;
            (
                *ip,
                Entry {
                    generation,
                    ..entry.clone()
                },
            )
        })
        .collect();
    if plain != want {
        return Err(format!("the map has {found:?}, wanted {want:?}"));
    }
    for pod in pods {
        guarded(rig, node, pod)?;
    }
    Ok(found)
}

fn at(rig: &Rig, node: usize, pod: &Pod) -> [Vec<String>; 2] {
    [TcAttachType::Ingress, TcAttachType::Egress].map(|side| {
        let programs = hooks::programs(rig.ns(node), &pod.host_if, side);
        programs.into_iter().map(|program| program.name).collect()
    })
}

fn guarded(rig: &Rig, node: usize, pod: &Pod) -> Result<(), String> {
    let found = at(rig, node, pod);
    if found == [["from_pod"], ["to_pod"]] {
        Ok(())
    } else {
        Err(format!("on {} there are {found:?}", pod.host_if))
    }
}

#[track_caller]
fn settled(rig: &Rig, node: usize, pods: &[&Pod]) -> BTreeMap<IpAddr, Entry> {
    eventually(PATIENCE, "the map has the pods that there are", || {
        exactly(rig, node, pods)
    })
}

/// The interfaces that our pins name.
fn pinned(rig: &Rig, node: usize) -> BTreeSet<String> {
    rig::dump::pins(&rig.instance(node))
        .into_iter()
        .filter_map(|line| {
            let name = line.split(':').next()?.rsplit('/').next()?.to_owned();
            name.contains("_pod-").then_some(name)
        })
        .collect()
}

fn life(family: Family, attach: &str) {
    let mut rig = start(family, attach);
    let first = rig.pod(0).clone();
    let before = settled(&rig, 0, &[&first]);
    assert_eq!(
        hooks::programs(rig.ns(0), &rig.device(), TcAttachType::Ingress).len(),
        1
    );
    // An idle pod: its forwarding entry ages, and its neighbour is forgotten. What the kernel says for the pod (IPv6) would be heard.
    rig.ns(0)
        .exec([
            "bridge",
            "link",
            "set",
            "dev",
            &first.host_if,
            "learning",
            "off",
        ])
        .unwrap();
    rig.ns(0)
        .exec([
            "bridge",
            "fdb",
            "del",
            &mac_text(first.mac),
            "dev",
            &first.host_if,
            "master",
        ])
        .unwrap();
    let flag = family.flag();
    rig.ns(0)
        .ip(&format!("{flag} neigh flush dev cni0"))
        .unwrap();
    let second = rig.add_pod(0);
    let after = settled(&rig, 0, &[&first, &second]);
    let kept = ip(&rig, &first);
    assert_eq!(after[&kept], before[&kept]);
    let fdb = bridge_json(rig.ns(0), &["fdb", "show", "br", "cni0"]).unwrap();
    let heard = list(&fdb)
        .iter()
        .any(|entry| entry["mac"] == mac_text(first.mac).as_str() && entry["state"] != "permanent");
    assert!(!heard, "the test did not make the pod idle: {fdb}");
    rig.ns(0)
        .exec([
            "bridge",
            "link",
            "set",
            "dev",
            &first.host_if,
            "learning",
            "on",
        ])
        .unwrap();
    // It goes, and another comes with its address.
    let address = ip(&rig, &second);
    let dead = rig.ns(0).ifindex(&second.host_if).unwrap();
    second.remove().unwrap();
    settled(&rig, 0, &[&first]);
    eventually(PATIENCE, "the dead veth's pins are gone", || {
        let left = pinned(&rig, 0);
        let of_dead = left.iter().any(|name| name.ends_with(&format!("-{dead}")));
        if of_dead {
            Err(format!("{left:?}"))
        } else {
            Ok(())
        }
    });
    let subnet = rig.node(0).subnet_of(family);
    let again = rig.node(0).add_pod(subnet, 3, mtu(&rig)).unwrap();
    assert_eq!(ip(&rig, &again), address);
    let now = settled(&rig, 0, &[&first, &again]);
    assert!(now[&address].generation > after[&address].generation);
    assert_ne!(now[&address].ifindex, after[&address].ifindex);
    assert_eq!(now[&kept], before[&kept]);
    traffic::ping_once(&again.ns, ip(&rig, rig.pod(1)), PATIENCE).unwrap();
    // The next agent goes on where this one has stopped.
    rig.kill_agent(0);
    rig.start_agent(0, &[attach, GATE, NO_CACHE]);
    rig.wait_ready(0);
    assert_eq!(settled(&rig, 0, &[&first, &again]), now);
    // Without the gate nothing of it is left.
    rig.kill_agent(0);
    rig.start_agent(0, &[attach, "--bpf-fast-path=off"]);
    rig.wait_ready(0);
    eventually(PATIENCE, "the pods' programs are gone", || {
        let left = (
            exactly(&rig, 0, &[])?,
            at(&rig, 0, &first),
            pinned(&rig, 0),
            hooks::programs(rig.ns(0), &rig.device(), TcAttachType::Ingress),
        );
        let clean = left.1.concat().is_empty() && left.2.is_empty() && left.3.is_empty();
        if clean {
            Ok(())
        } else {
            Err(format!("{left:?}"))
        }
    });
    rig.ping(0, 1).unwrap();
}

#[test]
fn pods_come_and_go_by_tcx() {
    if privileged() {
        life(Family::V4, "--bpf-attach=tcx");
    }
}

#[test]
fn pods_of_ipv6_come_and_go() {
    if privileged() {
        life(Family::V6, "--bpf-attach=tcx");
    }
}

#[test]
fn pods_come_and_go_by_clsact() {
    if privileged() {
        life(Family::V4, "--bpf-attach=clsact");
    }
}

#[test]
fn programs_come_back_and_cleanup_takes_them_away() {
    if !privileged() {
        return;
    }
    for attach in ["--bpf-attach=tcx", "--bpf-attach=clsact"] {
        let mut rig = start(Family::V4, attach);
        let pod = rig.pod(0).clone();
        settled(&rig, 0, &[&pod]);
        let before = epoch(&rig);
        if attach.ends_with("tcx") {
            for name in pinned(&rig, 0) {
                let pin = rig.instance(0).join(name).display().to_string();
                let link = flannel_testkit::json::bpftool_json(
                    rig.ns(0),
                    &["link", "show", "pinned", &pin],
                )
                .unwrap();
                let id = link["id"].to_string();
                rig.ns(0)
                    .exec(["bpftool", "link", "detach", "id", &id])
                    .unwrap();
            }
        } else {
            for side in ["ingress", "egress"] {
                rig.ns(0)
                    .exec(["tc", "filter", "del", "dev", &pod.host_if, side])
                    .unwrap();
            }
        }
        assert_eq!(at(&rig, 0, &pod).concat(), Vec::<String>::new());
        eventually(PATIENCE, "the programs are back", || guarded(&rig, 0, &pod));
        // They have missed packets: what was known before counts for nothing.
        assert!(epoch(&rig) > before, "{before}");
        rig.stop_agent(0);
        let done = rig.cli(0, &["cleanup"]);
        assert_eq!(done.status.code(), Some(0), "{done:?}");
        assert_eq!(at(&rig, 0, &pod).concat(), Vec::<String>::new());
        assert!(!rig.instance(0).exists());
        let qdiscs = flannel_testkit::json::ip_json(rig.ns(0), &["link", "show"]).unwrap();
        assert!(!qdiscs.to_string().contains(rig::DEVICE));
        let tc = rig.ns(0).exec(["tc", "qdisc", "show"]).unwrap();
        assert!(!tc.contains("clsact"), "{tc}");
    }
}

/// The flow gate's epoch as the map has it.
fn epoch(rig: &Rig) -> u32 {
    let at = std::mem::offset_of!(flannel_common::Config, epoch);
    let bytes = rig.config_bytes(0)[at..at + 4].try_into().unwrap();
    u32::from_ne_bytes(bytes)
}

/// A pod that has said nothing yet: only the cache knows it.
fn silent(family: Family) {
    let options = LabOptions {
        nodes: 2,
        ..LabOptions::default()
    };
    let mut rig = Rig::of(family.into(), options);
    let cache = rig.node(0).run_dir.join("cni");
    std::fs::create_dir_all(cache.join("results")).unwrap();
    rig.start_all(&[
        "--bpf-attach=tcx",
        GATE,
        &format!("--cni-cache-dir={}", cache.display()),
    ]);
    let pod = rig.pod(0).clone();
    let before = settled(&rig, 0, &[&pod]);
    // A second veth whose pod never sends: the name that the result gives is all there is.
    let ns = rig.ns(0);
    let inside = rig.lab().extra("silent").unwrap();
    ns.ip(&format!(
        "link add vethsilent mtu 1450 type veth peer name eth0 address 02:00:00:00:77:09 mtu 1450 netns {}",
        inside.name()
    ))
    .unwrap();
    ns.set_sysctl("net/ipv6/conf/vethsilent/disable_ipv6", "1")
        .unwrap();
    inside
        .set_sysctl("net/ipv6/conf/eth0/disable_ipv6", "1")
        .unwrap();
    let subnet = rig.node(0).subnet_of(family);
    let (address, len) = (subnet.host(9), subnet.prefix_len());
    let result = serde_json::json!({"kind": "cniCacheV1", "result": {
        "cniVersion": "1.0.0",
        "interfaces": [{"name": "cni0"}, {"name": "vethsilent"}, {"name": "eth0", "mac": "02:00:00:00:77:09", "sandbox": "/run/netns/silent"}],
        "ips": [{"interface": 2, "address": format!("{address}/{len}")}],
    }});
    std::fs::write(cache.join("results/cbr0-silent-eth0"), result.to_string()).unwrap();
    ns.ip("link set vethsilent master cni0 up").unwrap();
    inside.ip("link set eth0 up").unwrap();
    let found = eventually(PATIENCE, "the silent pod is in the map", || {
        let found = entries(&rig, 0);
        match found.get(&address) {
            Some(entry) => Ok((entry.clone(), found)),
            None => Err(format!("{found:?}")),
        }
    });
    assert_eq!(found.0.mac, "02:00:00:00:77:09");
    assert_eq!(found.0.ifindex, rig.ns(0).ifindex("vethsilent").unwrap());
    let kept = ip(&rig, &pod);
    assert_eq!(found.1[&kept], before[&kept]);
}

#[test]
fn a_silent_pod_is_known_from_the_cache() {
    if privileged() {
        for family in Family::ALL {
            silent(family);
        }
    }
}

#[test]
fn many_pods_at_speed_leave_the_right_map() {
    if !privileged() {
        return;
    }
    let rig = start(Family::V4, "--bpf-attach=tcx");
    let first = rig.pod(0).clone();
    settled(&rig, 0, &[&first]);
    let subnet = rig.node(0).subnet;
    // Five addresses, each used ten times, by the next pod as soon as the one before is gone.
    let mut alive: BTreeMap<u32, Pod> = BTreeMap::new();
    for number in 0..50 {
        let host = 100 + number % 5;
        if let Some(pod) = alive.remove(&host) {
            pod.remove().unwrap();
        }
        let pod = rig.node(0).add_pod(subnet, host, 1450).unwrap();
        alive.insert(host, pod);
    }
    let mut pods: Vec<&Pod> = alive.values().collect();
    pods.push(&first);
    settled(&rig, 0, &pods);
    for pod in pods {
        traffic::ping_once(&pod.ns, ip(&rig, rig.pod(1)), PATIENCE).unwrap();
    }
    for (_, pod) in alive {
        pod.remove().unwrap();
    }
    settled(&rig, 0, &[&first]);
    eventually(PATIENCE, "one veth's pins are left", || {
        let left = pinned(&rig, 0);
        if left.len() == 2 {
            Ok(())
        } else {
            Err(format!("{left:?}"))
        }
    });
    rig.status_is_ok(0);
}
