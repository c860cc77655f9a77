use proptest::{collection, option, prelude::*};

use super::*;

fn index(number: u32) -> IfIndex {
    IfIndex::try_from(number).unwrap()
}

fn last_byte(address: IpAddr) -> u8 {
    match address {
        IpAddr::V4(address) => address.octets()[3],
        IpAddr::V6(address) => address.octets()[15],
    }
}

fn ip(host: u8) -> IpAddr {
    IpAddr::from([10, 5, 1, host])
}

fn mac(number: u8) -> VtepMac {
    VtepMac::new([2, 0, 0, 0, 5, number])
}

fn port(name: &str) -> Port {
    Port {
        name: name.into(),
        mtu: 1450,
        is_veth: true,
        up: true,
    }
}

/// Two pods, 10.5.1.2 behind interface 20 and 10.5.1.3 behind 21, that the bridge has heard.
fn node() -> PodSources {
    PodSources {
        bridge: Some(Bridge {
            index: index(9),
            mac: mac(100),
            mtu: 1450,
        }),
        ports: BTreeMap::from([(index(20), port("veth2")), (index(21), port("veth3"))]),
        neighbours: BTreeMap::from([(ip(2), mac(2)), (ip(3), mac(3))]),
        fdb: BTreeMap::from([(mac(2), index(20)), (mac(3), index(21))]),
        cni: Vec::new(),
        own: "10.5.1.0/24".parse().unwrap(),
    }
}

fn cni(host: u8, with: u8, host_if: &str) -> CniPod {
    CniPod {
        address: ip(host),
        mac: mac(with),
        host_interfaces: vec!["cni0".into(), host_if.into()],
    }
}

fn learn(table: &mut PodTable, sources: &PodSources) -> BTreeMap<IpAddr, Pod> {
    table.learn(sources, &BTreeSet::new()).clone()
}

/// The interfaces by address.
fn places(pods: &BTreeMap<IpAddr, Pod>) -> Vec<(u8, u32)> {
    pods.iter()
        .map(|(address, pod)| (last_byte(*address), pod.ifindex.get()))
        .collect()
}

fn fresh(sources: &PodSources) -> Vec<(u8, u32)> {
    places(&learn(&mut PodTable::default(), sources))
}

#[test]
fn what_the_bridge_has_heard() {
    let pods = learn(&mut PodTable::default(), &node());
    assert_eq!(places(&pods), [(2, 20), (3, 21)]);
    let wanted = Pod {
        ifindex: index(20),
        generation: 1,
        mtu: 1450,
        mac: mac(2),
        gateway_mac: mac(100),
    };
    assert_eq!(pods[&ip(2)], wanted);
}

#[test]
fn the_smaller_mtu_counts() {
    let mut node = node();
    node.ports.get_mut(&index(20)).unwrap().mtu = 1400;
    node.bridge.as_mut().unwrap().mtu = 1420;
    let pods = learn(&mut PodTable::default(), &node);
    assert_eq!((pods[&ip(2)].mtu, pods[&ip(3)].mtu), (1400, 1420));
}

#[test]
fn not_without_all_three_of_bridge_port_and_entry() {
    let mut no_bridge = node();
    no_bridge.bridge = None;
    assert_eq!(fresh(&no_bridge), []);
    let mut no_port = node();
    no_port.ports.remove(&index(20));
    assert_eq!(fresh(&no_port), [(3, 21)]);
    let mut no_entry = node();
    no_entry.fdb.remove(&mac(2));
    assert_eq!(fresh(&no_entry), [(3, 21)]);
}

#[test]
fn only_veths_that_are_up_and_not_excluded() {
    for spoil in [
        |port: &mut Port| port.is_veth = false,
        |port: &mut Port| port.up = false,
    ] {
        let mut node = node();
        spoil(node.ports.get_mut(&index(20)).unwrap());
        assert_eq!(fresh(&node), [(3, 21)]);
    }
    let excluded = BTreeSet::from([index(20)]);
    let mut table = PodTable::default();
    assert_eq!(places(table.learn(&node(), &excluded)), [(3, 21)]);
}

#[test]
fn only_addresses_of_pods() {
    let mut node = node();
    for address in [
        ip(0),
        ip(1),
        ip(255),
        IpAddr::from([10, 5, 2, 7]),
        IpAddr::from([172, 16, 0, 2]),
    ] {
        node.neighbours.insert(address, mac(2));
        node.cni.push(CniPod {
            address,
            ..cni(2, 2, "veth2")
        });
    }
    assert_eq!(fresh(&node), [(2, 20), (3, 21)]);
}

#[test]
fn the_cache_serves_until_the_pod_is_heard() {
    let mut silent = node();
    silent.neighbours.clear();
    silent.fdb.clear();
    silent.cni = vec![cni(2, 2, "veth2"), cni(3, 3, "veth3"), cni(4, 4, "gone")];
    assert_eq!(fresh(&silent), [(2, 20), (3, 21)]);
    // Heard elsewhere than the cache says.
    silent.neighbours.insert(ip(2), mac(3));
    silent.fdb.insert(mac(3), index(21));
    silent.cni = vec![cni(2, 2, "veth2")];
    assert_eq!(fresh(&silent), [(2, 21)]);
    // Two results name one address, and both veths are there.
    let mut disputed = node();
    disputed.neighbours.clear();
    disputed.fdb.clear();
    disputed.cni = vec![cni(2, 2, "veth2"), cni(2, 3, "veth3")];
    assert_eq!(fresh(&disputed), []);
}

#[test]
fn an_idle_pod_stays() {
    let mut table = PodTable::default();
    let before = learn(&mut table, &node());
    let mut idle = node();
    idle.fdb.clear();
    idle.neighbours.clear();
    assert_eq!(learn(&mut table, &idle), before);
    assert_eq!(learn(&mut table, &node()), before);
    // The next agent takes it over.
    let mut next = PodTable::adopt(before.clone(), 50);
    assert_eq!(learn(&mut next, &idle), before);
}

#[test]
fn a_known_pod_goes_when_another_claims_its_address_or_its_mac() {
    let mut idle = node();
    idle.fdb.remove(&mac(2));
    for claim in [
        |node: &mut PodSources| {
            node.neighbours.insert(ip(2), mac(7));
        },
        |node: &mut PodSources| {
            node.fdb.insert(mac(2), index(21));
            node.neighbours.remove(&ip(2));
        },
        |node: &mut PodSources| {
            node.neighbours.remove(&ip(2));
            node.cni = vec![cni(2, 2, "veth2"), cni(2, 9, "veth3")];
        },
        |node: &mut PodSources| {
            node.ports.remove(&index(20));
        },
    ] {
        let mut table = PodTable::default();
        learn(&mut table, &node());
        let mut now = idle.clone();
        claim(&mut now);
        assert_eq!(places(&learn(&mut table, &now)), [(3, 21)]);
    }
}

#[test]
fn one_mac_on_two_ports_is_nobodys() {
    let mut node = node();
    node.fdb.clear();
    node.neighbours.clear();
    node.cni = vec![cni(2, 2, "veth2"), cni(3, 2, "veth3")];
    assert_eq!(fresh(&node), []);
}

#[test]
fn a_pod_made_again_has_another_generation() {
    let mut table = PodTable::default();
    let before = learn(&mut table, &node());
    // The same address and MAC address on another veth: older bridge plugins make the one from the other.
    let mut moved = node();
    moved.ports.remove(&index(20));
    moved.ports.insert(index(30), port("veth9"));
    moved.fdb.insert(mac(2), index(30));
    let after = learn(&mut table, &moved);
    assert_eq!(places(&after), [(2, 30), (3, 21)]);
    assert!(after[&ip(2)].generation > before[&ip(3)].generation);
    assert_eq!(after[&ip(3)], before[&ip(3)]);
    // Gone, and back just as it was.
    assert_eq!(table.forget(index(30)), [ip(2)]);
    assert!(table.forget(index(30)).is_empty());
    let back = learn(&mut table, &moved);
    assert!(back[&ip(2)].generation > after[&ip(2)].generation);
}

proptest! {
    #[test]
    fn records_round_trip(number in 1u32..=0x7fff_ffff, generation: u32, mtu: u32, mac: [u8; 6], gateway_mac: [u8; 6]) {
        let pod = Pod { ifindex: index(number), generation, mtu, mac: mac.into(), gateway_mac: gateway_mac.into() };
        prop_assert_eq!(Pod::decode(&pod.encode()), Some(pod));
    }

    /// Whatever happens: a pod is behind a veth that is there, in our subnet, one MAC address has one place, and a generation that was
    /// given never comes again for another record.
    #[test]
    fn never_a_wrong_pod(history in collection::vec(sources(), 1..12), excluded in collection::btree_set((20u32..24).prop_map(index), 0..2)) {
        let mut table = PodTable::adopt([], 7);
        let mut given: BTreeMap<u32, (IpAddr, Pod)> = BTreeMap::new();
        let mut last: BTreeMap<IpAddr, Pod> = BTreeMap::new();
        for sources in &history {
            let pods = table.learn(sources, &excluded).clone();
            let mut places = BTreeMap::new();
            for (address, pod) in &pods {
                let port = sources.ports.get(&pod.ifindex);
                prop_assert!(port.is_some_and(|port| port.is_veth && port.up));
                prop_assert!(!excluded.contains(&pod.ifindex));
                prop_assert!(sources.own.contains(address) && *address != ip(1));
                prop_assert!(sources.fdb.get(&pod.mac).is_none_or(|port| *port == pod.ifindex));
                prop_assert_eq!(*places.entry(pod.mac).or_insert(pod.ifindex), pod.ifindex);
                match given.insert(pod.generation, (*address, *pod)) {
                    Some(same) => prop_assert!(same == (*address, *pod) && last.get(address) == Some(pod)),
                    None => prop_assert!(last.get(address) != Some(pod)),
                }
            }
            last = pods;
        }
    }
}

#[test]
fn an_empty_record_is_nobodys() {
    assert_eq!(Pod::decode(&PodRecord::default()), None);
}

fn sources() -> impl Strategy<Value = PodSources> {
    let host = || (0u8..6).prop_map(ip);
    let macs = || (1u8..5).prop_map(mac);
    let ports = || (20u32..24).prop_map(index);
    let a_port = (0u8..8).prop_map(|n| Port {
        name: String::new(),
        mtu: 1450 + u32::from(n / 6),
        is_veth: n != 6,
        up: n != 7,
    });
    let told = (0u8..6, 1u8..5, 20u32..24)
        .prop_map(|(host, with, port)| cni(host, with, &port.to_string()));
    (
        option::weighted(0.9, Just(node().bridge)),
        collection::btree_map(ports(), a_port, 0..4),
        collection::btree_map(host(), macs(), 0..6),
        collection::btree_map(macs(), ports(), 0..5),
        collection::vec(told, 0..4),
    )
        .prop_map(|(bridge, mut ports, neighbours, fdb, cni)| {
            for (index, port) in &mut ports {
                port.name = index.get().to_string();
            }
            PodSources {
                bridge: bridge.flatten(),
                ports,
                neighbours,
                fdb,
                cni,
                ..node()
            }
        })
}
