//! Upstream's `TestLookupExtIface` matrix, and what it leaves out: several NICs, no default route, and ways to an address.

use super::*;
use crate::iface::{LinkAddr, Selection, choose};

fn index(value: u32) -> IfIndex {
    IfIndex::try_from(value).unwrap()
}

fn link(number: u32, name: &str, kind: Option<&str>, addrs: &[&str]) -> Link {
    let addr = |text: &&str| {
        let net: IpNet = text.parse().unwrap();
        LinkAddr {
            ip: net.addr(),
            prefix_len: net.prefix_len(),
            permanent: true,
            temporary: false,
            deprecated: false,
            link_local: is_link_local(net.addr()),
        }
    };
    Link {
        index: index(number),
        name: name.to_owned(),
        mtu: 1500,
        up: true,
        kind: kind.map(str::to_owned),
        addrs: addrs.iter().map(addr).collect(),
    }
}

fn machine() -> Vec<Link> {
    vec![
        link(1, "lo", None, &["127.0.0.1/8", "::1/128"]),
        link(
            2,
            "eth0",
            None,
            &["192.168.77.11/24", "fd77::11/64", "fe80::1/64"],
        ),
        link(3, "eth1", None, &["10.0.0.5/24", "fd88::5/64"]),
        link(4, "wlan0", None, &[]),
    ]
}

fn over(number: u32) -> DefaultRoute {
    DefaultRoute::Over(index(number))
}

#[derive(Clone, Copy, Debug)]
enum Stack {
    V4,
    V6,
    Dual,
}

impl Stack {
    fn needs(self) -> (bool, bool) {
        match self {
            Self::V4 => (true, false),
            Self::V6 => (false, true),
            Self::Dual => (true, true),
        }
    }
}

fn ask(
    links: &[Link],
    routes: &Routes,
    wanted: &Wanted,
    stack: Stack,
) -> Result<Selection, String> {
    let (v4, v6) = stack.needs();
    choose(links, routes, wanted, v4, v6).map_err(|error| error.to_string())
}

/// `iface=…`, `regex=…`, `reach=…`, `ip=…`, `ipv6=…`, separated by blanks.
fn wanted(flags: &str) -> Wanted {
    let mut wanted = Wanted::default();
    for flag in flags.split_whitespace() {
        let (name, value) = flag.split_once('=').unwrap();
        match name {
            "iface" => wanted.ifaces.push(value.to_owned()),
            "regex" => wanted.patterns.push(value.parse().unwrap()),
            "reach" => wanted.can_reach = Some(value.parse().unwrap()),
            "ip" => wanted.public_ip = Some(value.parse().unwrap()),
            "ipv6" => wanted.public_ipv6 = Some(value.parse().unwrap()),
            _ => panic!("{flag}"),
        }
    }
    wanted
}

fn warnings(selection: &Selection) -> Vec<&str> {
    let warnings = selection.notes.iter().filter_map(|note| match note {
        Note::Warning(text) => Some(text.as_str()),
        Note::Info(_) => None,
    });
    warnings.collect()
}

#[test]
fn lookup_matrix() {
    let routes = Routes {
        default_v4: over(2),
        default_v6: over(2),
        reach: Some(Reach {
            index: index(3),
            source: "10.0.0.5".parse().ok(),
        }),
    };
    for (stack, flags, expected) in [
        (Stack::V4, "", "eth0 192.168.77.11"),
        (Stack::V6, "", "eth0 fd77::11"),
        (Stack::Dual, "", "eth0 192.168.77.11 fd77::11"),
        (Stack::V4, "iface=eth1", "eth1 10.0.0.5"),
        (Stack::V6, "iface=eth1", "eth1 fd88::5"),
        (Stack::Dual, "iface=eth1", "eth1 10.0.0.5 fd88::5"),
        (Stack::V4, "iface=10.0.0.5", "eth1 10.0.0.5"),
        (Stack::V6, "iface=fd88::5", "eth1 fd88::5"),
        (Stack::Dual, "iface=10.0.0.5", "eth1 10.0.0.5 fd88::5"),
        (Stack::Dual, "iface=fd88::5", "eth1 10.0.0.5 fd88::5"),
        (
            Stack::Dual,
            "iface=10.0.0.5 ipv6=fd88::5",
            "eth1 10.0.0.5 fd88::5",
        ),
        (Stack::V4, "ip=10.0.0.5", "eth1 10.0.0.5"),
        (Stack::V6, "ipv6=fd88::5", "eth1 fd88::5"),
        (
            Stack::Dual,
            "ip=10.0.0.5 ipv6=fd88::5",
            "eth1 10.0.0.5 fd88::5",
        ),
        // On addresses first, in the order of the interfaces, anywhere in the text; then on names.
        (Stack::V4, r"regex=^10\.", "eth1 10.0.0.5"),
        (Stack::V4, "regex=0", "eth1 10.0.0.5"),
        (Stack::V4, "regex=th1", "eth1 10.0.0.5"),
        (Stack::V6, "regex=^fd8", "eth1 fd88::5"),
        (Stack::V6, "regex=^fe80", "eth0 fe80::1"),
        (Stack::Dual, r"regex=^10\.|^fd88", "eth1 10.0.0.5 fd88::5"),
        (Stack::Dual, r"regex=^eth1$", "eth1 10.0.0.5 fd88::5"),
        (Stack::V4, "regex=^ens regex=^eth1", "eth1 10.0.0.5"),
        // An interface that matches and cannot be used gives way to one that can.
        (Stack::V4, "regex=^wlan0$|^eth1$", "eth1 10.0.0.5"),
        (Stack::V4, "reach=10.0.0.77", "eth1 10.0.0.5"),
        // Each kind only when those before it find nothing.
        (
            Stack::V4,
            r"iface=ens3 iface=eth0 regex=^10\.",
            "eth0 192.168.77.11",
        ),
        (
            Stack::V4,
            r"iface=ens3 regex=^10\. reach=10.9.9.9",
            "eth1 10.0.0.5",
        ),
        (
            Stack::V4,
            "iface=ens3 regex=^ens reach=10.0.0.77",
            "eth1 10.0.0.5",
        ),
    ] {
        let found = ask(&machine(), &routes, &wanted(flags), stack);
        let uplink = found
            .unwrap_or_else(|error| panic!("{stack:?} {flags}: {error}"))
            .uplink;
        let addrs = [
            uplink.address.map(IpAddr::V4),
            uplink.address_v6.map(IpAddr::V6),
        ];
        let addrs = addrs.iter().flatten().map(|ip| format!(" {ip}"));
        assert_eq!(
            format!("{}{}", uplink.name, addrs.collect::<String>()),
            expected,
            "{stack:?} {flags}"
        );
    }
}

#[test]
fn misses_are_told_in_upstreams_words() {
    let routes = Routes::default();
    let found = ask(
        &machine(),
        &routes,
        &wanted("iface=ens3 regex=^ens iface=eth0"),
        Stack::V4,
    );
    let notes: Vec<Note> = found.unwrap().notes;
    let [Note::Info(one), Note::Info(two), Note::Info(three)] = &notes[..] else {
        panic!("{notes:?}");
    };
    assert_eq!(one, "Searching for interface using ens3");
    assert!(
        two.starts_with("Could not find valid interface matching ens3: no interface is named"),
        "{two}"
    );
    assert_eq!(three, "Searching for interface using eth0");

    let error = ask(&machine(), &routes, &wanted("regex=^ens"), Stack::V4).unwrap_err();
    assert_eq!(
        error,
        "Failed to find interface to use that matches the interfaces and/or regexes provided: could not match pattern ^ens to any of the \
         available network interfaces (eth0:[192.168.77.11 fd77::11 fe80::1], eth1:[10.0.0.5 fd88::5])"
    );
    let error = ask(&machine(), &routes, &wanted("reach=10.9.9.9"), Stack::V4).unwrap_err();
    assert!(
        error.contains("provided: no route to 10.9.9.9: set --iface to one of"),
        "{error}"
    );
}

#[test]
fn the_choice_is_announced_in_upstreams_words() {
    let lines = |flags: &str, stack| {
        let routes = Routes {
            default_v4: over(2),
            default_v6: over(2),
            reach: None,
        };
        let wanted = wanted(flags);
        let Selection { uplink, notes } = ask(&machine(), &routes, &wanted, stack).unwrap();
        let mut lines: Vec<String> = notes
            .into_iter()
            .map(|note| match note {
                Note::Info(text) | Note::Warning(text) => text,
            })
            .collect();
        lines.extend(uplink.announcement(&wanted));
        lines
    };
    assert_eq!(
        lines("", Stack::V4),
        [
            "Determining IP address of default interface",
            "Using interface with name eth0 and address 192.168.77.11",
            "Defaulting external address to interface address (192.168.77.11)",
        ]
    );
    assert_eq!(
        lines("iface=192.168.77.11 ip=203.0.113.9", Stack::V4),
        [
            "Searching for interface using 192.168.77.11",
            "Using interface with name eth0 and address 192.168.77.11",
            "Using 203.0.113.9 as external address",
        ]
    );
    assert_eq!(
        lines("iface=eth1 ipv6=2001:db8::1", Stack::Dual)[1..],
        [
            "Using interface with name eth1 and address 10.0.0.5",
            "Using interface with name eth1 and v6 address fd88::5",
            "Defaulting external address to interface address (10.0.0.5)",
            "Using 2001:db8::1 as external v6 address",
        ]
    );
}

#[test]
fn without_a_default_route_the_only_address_is_taken() {
    let containers = [
        link(5, "flannel.1", Some("vxlan"), &["10.244.1.0/32"]),
        link(6, "cni0", Some("bridge"), &["10.244.1.1/24"]),
        link(7, "docker0", Some("bridge"), &["172.17.0.1/16"]),
        link(8, "kube-ipvs0", Some("dummy"), &["10.96.0.1/32"]),
        link(9, "tun0", Some("tun"), &["10.8.0.2/24"]),
        link(10, "zeroconf", None, &["169.254.7.7/16"]),
    ];
    let mut down = link(11, "eth9", None, &["10.9.9.9/24"]);
    down.up = false;
    let mut links = vec![machine().remove(0), down, machine().remove(1)];
    links.extend(containers.clone());
    let none = Routes::default();
    let found = ask(&links, &none, &Wanted::default(), Stack::V4).unwrap();
    assert_eq!(found.uplink.name, "eth0");
    assert_eq!(
        warnings(&found),
        [
            "unable to find default route for IPv4: using eth0:[192.168.77.11 fd77::11 fe80::1], as no other interface has an address of \
             global scope; set --iface to choose"
        ]
    );
    // Neither does one count that cannot carry anything, nor, when both families are needed, one that lacks one of them.
    let mut dead = link(13, "eth7", None, &["10.7.0.1/24"]);
    dead.mtu = 0;
    let single = link(14, "eth8", None, &["10.8.0.1/24"]);
    let with = |extra: Link| [&links[..], &[extra]].concat();
    let found = ask(&with(dead), &none, &Wanted::default(), Stack::V4).unwrap();
    assert_eq!(found.uplink.name, "eth0");
    let found = ask(&with(single), &none, &Wanted::default(), Stack::Dual).unwrap();
    assert_eq!(found.uplink.name, "eth0");
    // A bridge that is a host's own is not left out.
    links.push(link(12, "br0", Some("bridge"), &["10.1.0.1/24"]));
    let error = ask(&links, &none, &Wanted::default(), Stack::V4).unwrap_err();
    assert_eq!(
        error,
        "Failed to find any valid interface to use: failed to get default interface: unable to find default route for IPv4, and 2 interfaces \
         have an address of global scope: set --iface to one of eth0:[192.168.77.11 fd77::11 fe80::1], br0:[10.1.0.1]"
    );
    let error = ask(&containers, &none, &Wanted::default(), Stack::V4).unwrap_err();
    assert!(error.contains("default route for IPv4, and no interface has an address of global scope: set --iface to one of flannel.1"), "{error}");
}

#[test]
fn default_routes_that_settle_nothing() {
    let routes = Routes {
        default_v4: DefaultRoute::Multipath(vec![index(2), index(3)]),
        ..Routes::default()
    };
    assert_eq!(
        ask(&machine(), &routes, &Wanted::default(), Stack::V4).unwrap_err(),
        "Failed to find any valid interface to use: failed to get default interface: found default route but could not determine interface: \
         it leads over several, set --iface to one of eth0:[192.168.77.11 fd77::11 fe80::1], eth1:[10.0.0.5 fd88::5]"
    );
    // Of two families one has a default route: its interface has addresses of both.
    let routes = Routes {
        default_v4: over(3),
        ..Routes::default()
    };
    let found = ask(&machine(), &routes, &Wanted::default(), Stack::Dual).unwrap();
    assert_eq!(found.uplink.name, "eth1");
    assert_eq!(
        warnings(&found),
        ["unable to find default route for IPv6: using eth1, which has the other family's"]
    );
}

#[test]
fn other_interfaces_on_the_same_lan_are_told() {
    let mut links = machine();
    links.push(link(5, "eth2", None, &["192.168.77.99/24"]));
    let mut down = link(6, "eth3", None, &["192.168.77.98/24"]);
    down.up = false;
    links.push(down);
    let routes = Routes {
        default_v4: over(5),
        ..Routes::default()
    };
    let found = ask(&links, &routes, &Wanted::default(), Stack::V4).unwrap();
    assert_eq!(found.uplink.name, "eth2");
    assert_eq!(
        warnings(&found),
        [
            "several interfaces are in 192.168.77.0/24: using eth2 (192.168.77.99), because it has the default route, and not \
             eth0:[192.168.77.11 fd77::11 fe80::1]; set --iface to choose"
        ]
    );
    // Whoever asks for one gets it without a word.
    let found = ask(&links, &routes, &wanted("iface=eth0"), Stack::V4).unwrap();
    assert_eq!(warnings(&found), Vec::<&str>::new());
}

#[test]
fn patterns_are_gos() {
    let matches = |pattern: &str, text: &str| pattern.parse::<Pattern>().unwrap().matches(text);
    assert!(matches(r"^\d+\.", "10.0.0.1"));
    assert!(!matches(r"^\d$", "\u{661}"));
    assert!(matches("^ens.$", "ens3"));
    assert!(matches("(?i)ETH", "eth0"));
    for bad in ["(", "[", "a{2,1}", "*"] {
        let error = bad.parse::<Pattern>().unwrap_err().to_string();
        assert!(
            error.starts_with("not a regular expression: ") && !error.contains('\n'),
            "{error}"
        );
    }
}
