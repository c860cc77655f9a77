//! The lab's upstream nodes are in the state that the real flanneld v0.28.9 (and v0.12.0) left: its printed output, in the files
//! beside this test, is what the same commands print here.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use flannel_testkit::{
    Families, Lab, LabOptions, Netns, Subnet, Upstream, privileged,
    upstream::{Firewall, LeaseStore, Release, UpstreamConf},
};

/// The addresses of the nodes in the samples are the lab's.
const NETWORK: &str = "10.5.0.0/16";

struct Golden {
    text: &'static str,
    subnets: [&'static str; 2],
    macs: [&'static str; 2],
    /// Subnets and MAC addresses of IPv6, where that is on.
    v6: Option<[[&'static str; 2]; 2]>,
    /// Whether a pod was there when the sample was taken.
    pod: bool,
}

#[test]
fn vxlan_with_iptables() {
    let golden = Golden {
        text: include_str!("upstream/vxlan_iptables.txt"),
        subnets: ["10.5.65.0/24", "10.5.3.0/24"],
        macs: ["4a:3f:31:1f:1d:33", "1a:cf:f4:7b:c6:ea"],
        v6: None,
        pod: true,
    };
    compare(&golden, conf());
}

#[test]
fn vxlan_with_nftables() {
    let golden = Golden {
        text: include_str!("upstream/vxlan_nftables.txt"),
        subnets: ["10.5.19.0/24", "10.5.21.0/24"],
        macs: ["12:84:17:15:d5:ff", "22:07:4b:54:7a:2b"],
        v6: None,
        pod: true,
    };
    let firewall = Firewall::Nftables;
    compare(&golden, UpstreamConf { firewall, ..conf() });
}

#[test]
fn direct_routing_with_another_vni_and_port() {
    let golden = Golden {
        text: include_str!("upstream/direct_routing.txt"),
        subnets: ["10.5.33.0/24", "10.5.34.0/24"],
        macs: ["c6:9b:fd:fc:95:38", "0e:fd:36:e4:13:e6"],
        v6: None,
        pod: true,
    };
    let direct = UpstreamConf {
        vni: 7,
        port: 4789,
        direct_routing: true,
        ..conf()
    };
    compare(&golden, direct);
}

#[test]
fn every_option_of_the_device() {
    let golden = Golden {
        text: include_str!("upstream/options.txt"),
        subnets: ["10.5.15.192/26", "10.5.10.128/26"],
        macs: ["8e:68:52:b8:ba:11", "22:15:df:b4:16:61"],
        v6: None,
        pod: false,
    };
    let options = UpstreamConf {
        gbp: true,
        learning: true,
        mtu: 1400,
        ip_masq: false,
        ..conf()
    };
    compare(&golden, options);
}

#[test]
fn version_0_12() {
    let golden = Golden {
        text: include_str!("upstream/v0_12.txt"),
        subnets: ["10.5.35.0/24", "10.5.81.0/24"],
        macs: ["6a:03:22:6b:8d:c7", "d2:e2:e0:0a:1a:b5"],
        v6: None,
        pod: false,
    };
    let release = Release::V0_12;
    compare(&golden, UpstreamConf { release, ..conf() });
}

#[test]
fn both_families_with_iptables() {
    let golden = Golden {
        text: include_str!("upstream/dual_iptables.txt"),
        subnets: ["10.5.6.0/24", "10.5.74.0/24"],
        macs: ["ae:90:b6:ed:0c:2e", "b2:dd:fe:4d:6e:7c"],
        v6: Some([
            ["fd05:0:0:13::/64", "fd05:0:0:4d::/64"],
            ["76:53:12:e2:42:3d", "96:d7:e0:3f:25:b6"],
        ]),
        pod: false,
    };
    compare(&golden, dual());
}

#[test]
fn both_families_with_nftables() {
    let golden = Golden {
        text: include_str!("upstream/dual_nftables.txt"),
        subnets: ["10.5.48.0/24", "10.5.54.0/24"],
        // The sample does not say.
        macs: ["ae:90:b6:ed:0c:2e", "b2:dd:fe:4d:6e:7c"],
        v6: Some([
            ["fd05:0:0:55::/64", "fd05:0:0:5f::/64"],
            ["76:53:12:e2:42:3d", "96:d7:e0:3f:25:b6"],
        ]),
        pod: false,
    };
    let firewall = Firewall::Nftables;
    compare(&golden, UpstreamConf { firewall, ..dual() });
}

#[test]
fn leases_with_ipv6_are_upstreams_byte_for_byte() {
    if !privileged() {
        return;
    }
    let lab = lab(Families::Dual);
    let dir = lab.node(0).run_dir.join("leases");
    let store = LeaseStore::Dir(&dir);
    let mut both = Upstream::new(lab.node(0), dual());
    both.subnet = "10.5.6.0/24".parse().unwrap();
    both.subnet_v6 = "fd05:0:0:13::/64".parse().unwrap();
    (both.mac, both.mac_v6) = (mac("ae:90:b6:ed:0c:2e"), mac("76:53:12:e2:42:3d"));
    both.start(&store).unwrap();
    let families = Families::V6;
    let alone = UpstreamConf { families, ..dual() };
    let mut alone = Upstream::new(lab.node(1), alone);
    alone.subnet_v6 = "fd05:0:0:43::/64".parse().unwrap();
    alone.mac_v6 = mac("96:d7:e0:3f:25:b7");
    alone.start(&store).unwrap();
    let want = [
        (
            "0.0.0.0-0&fd05:0:0:43::-64",
            r#"{"PublicIP":"0.0.0.0","PublicIPv6":"fd77::12","BackendType":"vxlan","BackendV6Data":{"VNI":1,"VtepMAC":"96:d7:e0:3f:25:b7"}}"#,
        ),
        (
            "10.5.6.0-24&fd05:0:0:13::-64",
            r#"{"PublicIP":"192.168.77.11","PublicIPv6":"fd77::11","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"ae:90:b6:ed:0c:2e"},"BackendV6Data":{"VNI":1,"VtepMAC":"76:53:12:e2:42:3d"}}"#,
        ),
    ];
    let want = want.map(|(key, value)| (key.to_owned(), value.to_owned()));
    assert_eq!(store.stored().unwrap(), BTreeMap::from(want));

    // Each takes its own lease again, and a node with IPv6 alone has nothing of IPv4.
    both.add_peers(&store).unwrap();
    assert!(both.start(&store).unwrap().reused && alone.start(&store).unwrap().reused);
    assert_eq!(both.subnet_v6.to_string(), "fd05:0:0:13::/64");
    assert_eq!(alone.subnet_v6.to_string(), "fd05:0:0:43::/64");
    let routes = both.ns.ip("-6 route show dev flannel-v6.1").unwrap();
    assert!(routes.contains("fd05:0:0:43::/64 via"), "{routes}");
    alone.ns.ifindex("flannel.1").unwrap_err();
    let env = std::fs::read_to_string(&alone.subnet_file).unwrap();
    let want = "FLANNEL_IPV6_NETWORK=fd05::/48\nFLANNEL_IPV6_SUBNET=fd05:0:0:43::1/64\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n";
    assert_eq!(env, want);
    assert!(
        !alone
            .ns
            .exec(["iptables-save"])
            .unwrap()
            .contains("FLANNEL")
    );
}

#[test]
fn leases_are_upstreams_byte_for_byte() {
    if !privileged() {
        return;
    }
    let lab = lab(Families::V4);
    let dir = lab.node(0).run_dir.join("leases");
    let store = LeaseStore::Dir(&dir);
    let mut node = Upstream::new(lab.node(1), conf());
    node.subnet = "10.5.3.0/24".parse().unwrap();
    node.mac = mac("1a:cf:f4:7b:c6:ea");
    node.start(&store).unwrap();
    let old = UpstreamConf {
        release: Release::V0_12,
        ..conf()
    };
    let mut older = Upstream::new(lab.node(0), old);
    older.subnet = "10.5.35.0/24".parse().unwrap();
    older.mac = mac("6a:03:22:6b:8d:c7");
    older.start(&store).unwrap();
    let want = [
        (
            "10.5.3.0-24",
            r#"{"PublicIP":"192.168.77.12","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"1a:cf:f4:7b:c6:ea"}}"#,
        ),
        (
            "10.5.35.0-24",
            r#"{"PublicIP":"192.168.77.11","BackendType":"vxlan","BackendData":{"VtepMAC":"6a:03:22:6b:8d:c7"}}"#,
        ),
    ];
    let want = want.map(|(key, value)| (key.to_owned(), value.to_owned()));
    assert_eq!(store.stored().unwrap(), BTreeMap::from(want));
}

/// Upstream's own comparison decides whether a device that is there stays.
#[test]
fn a_start_keeps_what_fits_and_replaces_what_does_not() {
    if !privileged() {
        return;
    }
    let lab = lab(Families::V4);
    let dir = lab.node(0).run_dir.join("leases");
    let store = LeaseStore::Dir(&dir);
    let mut node = Upstream::new(lab.node(0), conf());
    assert_eq!(node.start(&store).unwrap().recreated, None);
    let index = node.ns.ifindex("flannel.1").unwrap();
    node.ns.ip("link set flannel.1 mtu 1400").unwrap();
    node.ns.ip("addr add 169.254.9.9/16 dev flannel.1").unwrap();
    node.ns.ip("addr add 10.5.99.0/32 dev flannel.1").unwrap();
    let started = node.start(&store).unwrap();
    assert!(started.reused && started.recreated.is_none(), "{started:?}");
    assert_eq!(node.ns.ifindex("flannel.1").unwrap(), index);
    let shown = node.ns.ip("-4 addr show dev flannel.1").unwrap();
    assert!(
        shown.contains("mtu 1400"),
        "upstream leaves the MTU: {shown}"
    );
    assert!(
        shown.contains("169.254.9.9/16") && !shown.contains("10.5.99.0"),
        "{shown}"
    );

    node.conf.port = 4789;
    let started = node.start(&store).unwrap();
    assert_eq!(started.recreated.as_deref(), Some("port: 4789 vs 8472"));
    assert_ne!(node.ns.ifindex("flannel.1").unwrap(), index);
}

/// Of IPv6 every address that is not link-local goes, inside the network or not.
#[test]
fn a_start_keeps_no_other_address_of_ipv6() {
    if !privileged() {
        return;
    }
    let lab = lab(Families::Dual);
    let dir = lab.node(0).run_dir.join("leases");
    let store = LeaseStore::Dir(&dir);
    let mut node = Upstream::new(lab.node(0), dual());
    assert_eq!(node.start(&store).unwrap().recreated, None);
    let index = node.ns.ifindex("flannel-v6.1").unwrap();
    for address in ["fd05:0:0:99::/128", "fd99::9/64"] {
        let line = format!("addr add {address} dev flannel-v6.1 nodad");
        node.ns.ip(&line).unwrap();
    }
    let started = node.start(&store).unwrap();
    assert!(started.reused && started.recreated.is_none(), "{started:?}");
    assert_eq!(node.ns.ifindex("flannel-v6.1").unwrap(), index);
    let shown = node.ns.ip("-6 addr show dev flannel-v6.1").unwrap();
    let own = format!("{}/128", node.subnet_v6.base());
    assert!(shown.contains(&own) && shown.contains("fe80::"), "{shown}");
    assert!(!shown.contains("99::"), "{shown}");

    node.conf.port = 4789;
    let started = node.start(&store).unwrap();
    assert_eq!(started.recreated.as_deref(), Some("port: 4789 vs 8472"));
    assert_ne!(node.ns.ifindex("flannel-v6.1").unwrap(), index);
}

fn conf() -> UpstreamConf {
    UpstreamConf::new(NETWORK.parse().unwrap())
}

fn dual() -> UpstreamConf {
    let families = Families::Dual;
    UpstreamConf { families, ..conf() }
}

fn lab(families: Families) -> Lab {
    let network = NETWORK.parse().unwrap();
    let options = LabOptions {
        nodes: 2,
        families,
        network,
        ..LabOptions::default()
    };
    Lab::new(options).unwrap()
}

fn mac(text: &str) -> [u8; 6] {
    let bytes: Vec<u8> = text
        .split(':')
        .map(|byte| u8::from_str_radix(byte, 16).unwrap())
        .collect();
    bytes.try_into().unwrap()
}

/// Builds both nodes, starts node a a second time as section 1g of the sample does, and compares it both times.
#[track_caller]
fn compare(golden: &Golden, conf: UpstreamConf) {
    if !privileged() {
        return;
    }
    let lab = lab(conf.families);
    let dir = lab.node(0).run_dir.join("leases");
    let store = LeaseStore::Dir(&dir);
    let mut nodes: Vec<Upstream> = (0..2)
        .map(|index| {
            let mut node = Upstream::new(lab.node(index), conf);
            node.subnet = golden.subnets[index].parse().unwrap();
            node.mac = mac(golden.macs[index]);
            if let Some([subnets, macs]) = golden.v6 {
                node.subnet_v6 = subnets[index].parse().unwrap();
                node.mac_v6 = mac(macs[index]);
            }
            node
        })
        .collect();
    // As in the sample, node b is there first and sees node a come.
    nodes[1].start(&store).unwrap();
    nodes[0].start(&store).unwrap();
    nodes[1].add_peers(&store).unwrap();
    if golden.pod {
        let mtu = conf.mtu - 50;
        let subnet: Subnet = nodes[0].subnet;
        lab.node(0).add_pod(subnet, 2, mtu).unwrap();
    }
    // A neighbour on the underlay, so that nothing in the list depends on who has spoken.
    flannel_testkit::traffic::ping_once(
        &lab.node(0).ns,
        Ipv4Addr::new(192, 168, 77, 12),
        std::time::Duration::from_secs(2),
    )
    .unwrap();
    for when in ["first start", "second start"] {
        let mut compared = 0;
        for (command, want) in blocks(golden.text) {
            let have = run(&nodes[0], &command);
            assert_eq!(normalised(&have), normalised(&want), "{when}: {command}");
            compared += 1;
        }
        assert!(compared >= 2, "only {compared} commands in the sample");
        let started = nodes[0].start(&store).unwrap();
        assert!(started.reused && started.recreated.is_none(), "{started:?}");
    }
}

/// The commands of a sample with what they printed.
fn blocks(text: &str) -> Vec<(String, String)> {
    let mut blocks: Vec<(String, String)> = Vec::new();
    for line in text.lines() {
        match line.strip_prefix("node a# ") {
            Some(command) => blocks.push((command.to_owned(), String::new())),
            None => {
                if let Some((_, printed)) = blocks.last_mut() {
                    printed.push_str(line);
                    printed.push('\n');
                }
            }
        }
    }
    blocks
}

fn run(node: &Upstream, command: &str) -> String {
    if command.starts_with("cat ") {
        return std::fs::read_to_string(&node.subnet_file).unwrap();
    }
    let ns: &Netns = &node.ns;
    ns.exec(["sh", "-c", command]).unwrap()
}

/// Without what differs between two runs of the same program: indices, counters, comments with the time, link-local addresses,
/// what the names of pods' devices are made of, and neighbours that come and go with the traffic.
fn normalised(text: &str) -> Vec<String> {
    let fleeting = [
        "REACHABLE",
        "STALE",
        "DELAY",
        "PROBE",
        "INCOMPLETE",
        "fe80::",
        " lladdr aa:",
    ];
    text.lines()
        .map(str::trim_end)
        .filter(|line| !line.is_empty() && !line.starts_with("# "))
        .filter(|line| !fleeting.iter().any(|word| line.contains(word)))
        .map(|line| match line.split_once(": ") {
            Some((index, rest)) if index.parse::<u32>().is_ok() => rest.to_owned(),
            _ => line.split(" [").next().unwrap_or(line).to_owned(),
        })
        .collect()
}
