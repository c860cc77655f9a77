use proptest::prelude::*;

use super::*;

fn index(value: u32) -> IfIndex {
    IfIndex::try_from(value).unwrap()
}

fn addr(text: &str) -> LinkAddr {
    LinkAddr {
        ip: text.parse().unwrap(),
        prefix_len: 24,
        permanent: true,
        temporary: false,
        deprecated: false,
        link_local: false,
    }
}

fn link(number: u32, name: &str, addrs: &[&str]) -> Link {
    Link {
        index: index(number),
        name: name.to_owned(),
        mtu: 1500,
        up: true,
        kind: None,
        addrs: addrs.iter().map(|text| addr(text)).collect(),
    }
}

/// Given out of order: the table sorts by index.
fn machine() -> Vec<Link> {
    vec![
        link(3, "eth1", &["10.0.0.5", "fd88::5"]),
        link(1, "lo", &["127.0.0.1", "::1"]),
        link(2, "eth0", &["192.168.77.11", "fd77::11", "fe80::1"]),
    ]
}

const LISTED: &str = "eth0:[192.168.77.11 fd77::11 fe80::1], eth1:[10.0.0.5 fd88::5]";

const NONE_FOUND: &str = "Failed to find any valid interface to use: ";
const NONE_MATCHED: &str =
    "Failed to find interface to use that matches the interfaces and/or regexes provided: ";

fn routes(v4: u32, v6: u32) -> Routes {
    let over = |value| IfIndex::try_from(value).map_or(DefaultRoute::None, DefaultRoute::Over);
    Routes {
        default_v4: over(v4),
        default_v6: over(v6),
        reach: None,
    }
}

fn wanted(ifaces: &[&str], public_ip: &str, public_ipv6: &str) -> Wanted {
    Wanted {
        ifaces: ifaces.iter().map(ToString::to_string).collect(),
        public_ip: public_ip.parse().ok(),
        public_ipv6: public_ipv6.parse().ok(),
        ..Wanted::default()
    }
}

fn v4(wanted: &Wanted) -> Result<Uplink, IfaceError> {
    select(&machine(), &routes(2, 3), wanted, true, false)
}

fn dual(wanted: &Wanted) -> Result<Uplink, IfaceError> {
    select(&machine(), &routes(2, 2), wanted, true, true)
}

fn ip(text: &str) -> Option<Ipv4Addr> {
    text.parse().ok()
}

fn ipv6(text: &str) -> Option<Ipv6Addr> {
    text.parse().ok()
}

#[test]
fn by_default_route() {
    let uplink = v4(&wanted(&[], "", "")).unwrap();
    let expected = Uplink {
        index: index(2),
        name: "eth0".to_owned(),
        mtu: 1500,
        address: ip("192.168.77.11"),
        address_v6: None,
        public_ip: ip("192.168.77.11"),
        public_ipv6: None,
        addrs: machine()[2].addrs.iter().map(|addr| addr.ip).collect(),
        reason: "it has the default route".to_owned(),
    };
    assert_eq!(uplink, expected);
    assert_eq!(uplink.local_v4(), ip("192.168.77.11"));
}

#[test]
fn by_name_and_by_address() {
    for (ifaces, name, address) in [
        (vec!["eth1"], "eth1", "10.0.0.5"),
        (vec!["10.0.0.5"], "eth1", "10.0.0.5"),
        (vec!["ens3", "10.9.9.9", "eth1", "eth0"], "eth1", "10.0.0.5"),
    ] {
        let uplink = v4(&wanted(&ifaces, "", "")).unwrap();
        assert_eq!(
            (uplink.name.as_str(), uplink.address),
            (name, ip(address)),
            "{ifaces:?}"
        );
    }
}

#[test]
fn an_address_given_is_the_one_used() {
    let mut links = machine();
    links[2].addrs.push(addr("192.168.77.99"));
    let uplink = select(
        &links,
        &routes(2, 0),
        &wanted(&["192.168.77.99"], "", ""),
        true,
        false,
    )
    .unwrap();
    assert_eq!(
        (uplink.address, uplink.public_ip),
        (ip("192.168.77.99"), ip("192.168.77.99"))
    );
}

#[test]
fn by_public_address() {
    let uplink = v4(&wanted(&[], "10.0.0.5", "")).unwrap();
    assert_eq!(
        (uplink.name.as_str(), uplink.public_ip),
        ("eth1", ip("10.0.0.5"))
    );
    assert_eq!(
        v4(&wanted(&[], "198.51.100.7", ""))
            .unwrap_err()
            .to_string(),
        format!(
            "Failed to find any valid interface to use: error looking up interface 198.51.100.7: no interface with given IP found: \
             if that public address is translated on the way, set --iface too, to one of {LISTED}"
        )
    );
}

#[test]
fn a_public_address_that_is_not_local_is_published_but_not_sent_from() {
    let uplink = v4(&wanted(&["eth0"], "198.51.100.7", "")).unwrap();
    assert_eq!(uplink.public_ip, ip("198.51.100.7"));
    assert_eq!(uplink.local_v4(), ip("192.168.77.11"));
    let uplink = dual(&wanted(&["eth0"], "", "2001:db8::7")).unwrap();
    assert_eq!(
        (uplink.public_ipv6, uplink.local_v6()),
        (ipv6("2001:db8::7"), ipv6("fd77::11"))
    );

    // A second address of the interface is local, though not the one the interface would choose.
    let mut links = machine();
    links[2].addrs.push(addr("192.168.77.99"));
    let uplink = select(
        &links,
        &routes(2, 0),
        &wanted(&["eth0"], "192.168.77.99", ""),
        true,
        false,
    )
    .unwrap();
    assert_eq!(
        (uplink.address, uplink.local_v4()),
        (ip("192.168.77.11"), ip("192.168.77.99"))
    );
}

#[test]
fn address_order() {
    let plain = addr("192.0.2.1");
    let order = |addrs: &[LinkAddr]| {
        let eth = Link {
            addrs: addrs.to_vec(),
            ..link(2, "eth0", &[])
        };
        select(&[eth], &routes(2, 2), &Wanted::default(), true, false)
            .ok()
            .and_then(|uplink| uplink.address)
    };
    let leased = LinkAddr {
        permanent: false,
        ..addr("192.0.2.2")
    };
    let temporary = LinkAddr {
        temporary: true,
        ..addr("192.0.2.3")
    };
    let local = LinkAddr {
        link_local: true,
        ..addr("192.0.2.4")
    };
    let zeroconf = addr("169.254.1.1");
    let deprecated = LinkAddr {
        deprecated: true,
        ..addr("192.0.2.6")
    };
    assert_eq!(
        order(&[zeroconf, local, leased, temporary, plain, addr("192.0.2.9")]),
        ip("192.0.2.1")
    );
    assert_eq!(order(&[zeroconf, leased, temporary]), ip("192.0.2.3"));
    assert_eq!(order(&[zeroconf, leased]), ip("192.0.2.2"));
    assert_eq!(order(&[zeroconf, local]), ip("169.254.1.1"));
    assert_eq!(order(&[local]), ip("192.0.2.4"));
    assert_eq!(order(&[deprecated]), None);
    assert_eq!(
        order(&[
            addr("127.0.0.1"),
            addr("224.0.0.1"),
            addr("0.0.0.0"),
            addr("fd00::1")
        ]),
        None
    );
}

#[test]
fn dual_stack_needs_one_interface_for_both() {
    let uplink = dual(&wanted(&[], "", "")).unwrap();
    assert_eq!(
        (uplink.address, uplink.address_v6),
        (ip("192.168.77.11"), ipv6("fd77::11"))
    );
    let uplink = dual(&wanted(&[], "10.0.0.5", "fd88::5")).unwrap();
    assert_eq!(
        (uplink.name.as_str(), uplink.public_ipv6),
        ("eth1", ipv6("fd88::5"))
    );
    // Upstream crashes on this one.
    let uplink = dual(&wanted(&["fd88::5"], "", "")).unwrap();
    assert_eq!(
        (uplink.address, uplink.address_v6),
        (ip("10.0.0.5"), ipv6("fd88::5"))
    );

    for (wanted, lead) in [
        (wanted(&[], "192.168.77.11", "fd88::5"), NONE_FOUND),
        (wanted(&["192.168.77.11"], "", "fd88::5"), NONE_MATCHED),
    ] {
        assert_eq!(
            dual(&wanted).unwrap_err().to_string(),
            format!(
                "{lead}v6 address interface eth1 must be the same with v4 address interface eth0: set --iface to one of {LISTED}"
            )
        );
    }
    let error = select(&machine(), &routes(2, 3), &Wanted::default(), true, true).unwrap_err();
    assert!(error.to_string().starts_with(
        "Failed to find any valid interface to use: v6 default route interface eth1 must be the same with v4 default route interface eth0"
    ));
}

#[test]
fn ipv6_only() {
    let v6 = |wanted: &Wanted, routes| select(&machine(), &routes, wanted, false, true);
    let uplink = v6(&Wanted::default(), routes(2, 3)).unwrap();
    assert_eq!(
        (uplink.name.as_str(), uplink.address, uplink.address_v6),
        ("eth1", None, ipv6("fd88::5"))
    );
    // A public IPv4 address means nothing here.
    let uplink = v6(&wanted(&[], "192.168.77.11", "fd77::11"), routes(0, 0)).unwrap();
    assert_eq!((uplink.name.as_str(), uplink.public_ip), ("eth0", None));
    assert_eq!(uplink.local_v6(), ipv6("fd77::11"));
    let error = v6(&wanted(&["10.0.0.5"], "", ""), routes(2, 3)).unwrap_err();
    assert!(
        matches!(&error, IfaceError::NoneMatched { misses } if matches!(misses[..], [IfaceError::WrongFamily { .. }])),
        "{error}"
    );
}

#[test]
fn errors_name_the_value_and_list_the_interfaces() {
    let message = |wanted: &Wanted| v4(wanted).unwrap_err().to_string();
    assert_eq!(
        message(&wanted(&["ens3"], "", "")),
        format!("{NONE_MATCHED}no interface is named \"ens3\": set --iface to one of {LISTED}")
    );
    assert_eq!(
        message(&wanted(&["10.9.9.9"], "", "")),
        format!(
            "{NONE_MATCHED}no interface has the address 10.9.9.9: set --iface to one of {LISTED}"
        )
    );
    assert_eq!(
        message(&wanted(&["ens3", "lo"], "", "")),
        format!(
            "{NONE_MATCHED}no interface is named \"ens3\": set --iface to one of {LISTED}; \
             failed to find IPv4 address for interface lo: give it one, or set --iface to one of {LISTED}"
        )
    );
    let error = select(&machine(), &routes(0, 0), &Wanted::default(), true, false).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!(
            "{NONE_FOUND}failed to get default interface: unable to find default route for IPv4, and 2 interfaces have an address of \
             global scope: set --iface to one of eth0:[192.168.77.11 fd77::11 fe80::1], eth1:[10.0.0.5 fd88::5]"
        )
    );
    let error = select(&[], &routes(2, 0), &Wanted::default(), true, false).unwrap_err();
    assert!(
        error
            .to_string()
            .ends_with("set --iface to one of (there is no interface)")
    );
    assert_eq!(
        select(&[], &routes(0, 0), &Wanted::default(), false, false),
        Err(IfaceError::NoFamily)
    );
}

#[test]
fn unusable_interfaces() {
    let select = |link: Link| {
        select(&[link], &routes(2, 0), &Wanted::default(), true, false)
            .unwrap_err()
            .to_string()
    };
    let eth0 = link(2, "eth0", &["192.0.2.1"]);
    assert_eq!(
        select(Link {
            up: false,
            ..eth0.clone()
        }),
        "Failed to find any valid interface to use: interface eth0 is down: bring it up with \"ip link set eth0 up\", or set --iface to one of eth0:[192.0.2.1]"
    );
    assert_eq!(
        select(Link {
            mtu: 0,
            ..eth0.clone()
        }),
        "Failed to find any valid interface to use: failed to determine MTU for eth0 interface: it is 0, set one with \"ip link set eth0 mtu 1500\""
    );
    assert_eq!(
        select(Link {
            addrs: vec![],
            ..eth0
        }),
        "Failed to find any valid interface to use: failed to find IPv4 address for interface eth0: give it one, or set --iface to one of eth0:[]"
    );
}

#[test]
fn of_two_owners_the_one_that_is_up() {
    let mut links = vec![
        link(2, "eth0", &["192.0.2.1"]),
        link(3, "eth1", &["192.0.2.1"]),
    ];
    let name = |links: &[Link]| {
        select(
            links,
            &routes(0, 0),
            &wanted(&["192.0.2.1"], "", ""),
            true,
            false,
        )
        .unwrap()
        .name
    };
    assert_eq!(name(&links), "eth0");
    links[0].up = false;
    assert_eq!(name(&links), "eth1");
}

prop_compose! {
    fn any_link()(
        number in 1u32..6,
        up: bool,
        mtu in prop_oneof![Just(0u32), Just(1500)],
        addrs in proptest::collection::vec((any::<IpAddr>(), any::<[bool; 4]>()), 0..4),
    ) -> Link {
        let addrs = addrs.into_iter().map(|(ip, [permanent, temporary, deprecated, link_local])| {
            LinkAddr { ip, prefix_len: 24, permanent, temporary, deprecated, link_local }
        });
        Link { index: index(number), name: format!("eth{number}"), mtu, up, kind: None, addrs: addrs.collect() }
    }
}

proptest! {
    #[test]
    fn an_uplink_is_usable_and_sends_from_its_own_address(
        links in proptest::collection::vec(any_link(), 0..5),
        default_v4 in 0u32..7,
        default_v6 in 0u32..7,
        ifaces in proptest::collection::vec("eth[0-6]|10\\.0\\.0\\.[0-9]|.*", 0..3),
        public_ip: Option<Ipv4Addr>,
        need_v4: bool,
        need_v6: bool,
    ) {
        let wanted = Wanted { ifaces, public_ip, ..Wanted::default() };
        if let Ok(uplink) = select(&links, &routes(default_v4, default_v6), &wanted, need_v4, need_v6) {
            let link = links.iter().find(|link| link.index == uplink.index && link.up && link.mtu != 0);
            prop_assert!(link.is_some());
            prop_assert_eq!(uplink.address.is_some(), need_v4);
            prop_assert_eq!(uplink.address_v6.is_some(), need_v6);
            prop_assert_eq!(uplink.public_ip.is_some(), need_v4);
            let here = |ip: IpAddr| uplink.addrs.contains(&ip);
            prop_assert!(uplink.local_v4().is_none_or(|ip| here(ip.into())));
            prop_assert!(uplink.local_v6().is_none_or(|ip| here(ip.into())));
        }
    }
}
