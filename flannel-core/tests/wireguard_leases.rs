//! What the leases of other nodes make of the encrypted overlay, in every mode.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
};

use flannel_core::{
    addr::Mtu,
    config::NetConf,
    key::{PublicKey, SecretKey},
    lease::{LeaseAttrs, SubnetKey},
    plan::PeerProblem,
    wireguard::{Desired, Place, desired},
};

const KEYS: [&str; 2] = [
    "AwoRGB8mLTQ7QklQV15lbHN6gYiPlp2kq7K5wMfO1dw=",
    "//////////////////////////////////////////8=",
];
const OWN: &str = "10.244.1.0-24&fd00:1::-64";

fn conf(backend: &str) -> NetConf {
    let text = format!(
        r#"{{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00::/48","Backend":{{"Type":"wireguard"{backend}}}}}"#
    );
    NetConf::parse(&text).expect("a configuration")
}

/// A lease with both families, as upstream writes it.
fn lease(v4: &str, v6: &str, key: &str) -> LeaseAttrs {
    let text = format!(
        r#"{{"PublicIP":"{v4}","PublicIPv6":"{v6}","BackendType":"wireguard","BackendData":{{"PublicKey":"{key}","Port":51820}},"BackendV6Data":{{"PublicKey":"{key}","Port":51821}}}}"#
    );
    LeaseAttrs::from_json(&text).expect("a lease")
}

fn of(
    conf: &NetConf,
    us: (Option<&str>, Option<&str>),
    public: Option<PublicKey>,
    leases: &[(&str, LeaseAttrs)],
) -> (Desired, Vec<PeerProblem>) {
    let private = SecretKey::new([7; 32]);
    let place = Place {
        conf,
        private: &private,
        public,
        mtu: Mtu::try_from(1420).expect("an MTU"),
        v4: us.0.map(|ip| ip.parse().expect("an address")),
        v6: us.1.map(|ip| ip.parse().expect("an address")),
        former: BTreeSet::default(),
    };
    let own: SubnetKey = OWN.parse().expect("a key");
    let leases: BTreeMap<SubnetKey, LeaseAttrs> = leases
        .iter()
        .map(|(key, attrs)| (key.parse().expect("a key"), attrs.clone()))
        .collect();
    desired(&place, Some(&own), Some(&leases))
}

/// Device, endpoint and networks of each peer.
fn peers(desired: &Desired) -> Vec<(String, SocketAddr, String)> {
    let of_tunnels = desired.tunnels.iter().flat_map(|(name, tunnel)| {
        tunnel.peers.iter().flatten().map(|(_, peer)| {
            let allowed: Vec<String> = peer.allowed.iter().map(ToString::to_string).collect();
            (name.clone(), peer.endpoint, allowed.join(" "))
        })
    });
    of_tunnels.collect()
}

fn peer(device: &str, endpoint: &str, allowed: &str) -> (String, SocketAddr, String) {
    let endpoint = endpoint.parse().expect("an endpoint");
    (device.into(), endpoint, allowed.into())
}

const BOTH: &str = "10.244.2.0/24 fd00:2::/64";
const KEY: &str = "10.244.2.0-24&fd00:2::-64";
const US: (Option<&str>, Option<&str>) = (Some("192.0.2.1"), Some("2001:db8::1"));

#[test]
fn a_device_for_each_family_has_a_peer_for_each() {
    let leases = [(KEY, lease("192.0.2.2", "2001:db8::2", KEYS[0]))];
    let (desired, problems) = of(&conf(""), US, None, &leases);
    assert_eq!(problems, []);
    assert_eq!(
        peers(&desired),
        [
            peer("flannel-wg", "192.0.2.2:51820", "10.244.2.0/24"),
            peer("flannel-wg-v6", "[2001:db8::2]:51821", "fd00:2::/64"),
        ]
    );
    let tunnel = &desired.tunnels["flannel-wg-v6"];
    assert_eq!(tunnel.port, 51_821);
    let addresses: Vec<String> = tunnel.addresses.iter().map(ToString::to_string).collect();
    assert_eq!(addresses, ["fd00:1::/128"]);
}

/// What upstream's `selectMode` makes of public and private addresses, and where it leaves a node without IPv4 without any.
#[test]
fn one_device_chooses_the_family_for_each_peer() {
    let private = (Some("10.0.0.1"), Some("fd99::1"));
    for (mode, us, v4, v6, wanted) in [
        ("auto", US, "192.0.2.2", "2001:db8::2", "192.0.2.2:51820"),
        ("auto", US, "10.0.0.2", "2001:db8::2", "[2001:db8::2]:51821"),
        ("auto", private, "10.0.0.2", "2001:db8::2", "10.0.0.2:51820"),
        ("auto", US, "10.0.0.2", "fd99::2", "10.0.0.2:51820"),
        (
            "auto",
            (None, Some("fd99::1")),
            "10.0.0.2",
            "fd99::2",
            "[fd99::2]:51821",
        ),
        ("auto", US, "0.0.0.0", "fd99::2", "[fd99::2]:51821"),
        ("ipv4", US, "10.0.0.2", "2001:db8::2", "10.0.0.2:51820"),
        ("ipv6", US, "192.0.2.2", "fd99::2", "[fd99::2]:51821"),
    ] {
        let conf = conf(&format!(r#","Mode":"{mode}""#));
        let leases = [(KEY, lease(v4, v6, KEYS[0]))];
        let (desired, problems) = of(&conf, us, None, &leases);
        assert_eq!(problems, []);
        assert_eq!(
            peers(&desired),
            [peer("flannel-wg", wanted, BOTH)],
            "{mode} {us:?}"
        );
    }
}

#[test]
fn releases_without_a_port_have_ours() {
    let mut attrs = lease("192.0.2.2", "2001:db8::2", KEYS[0]);
    let strip = |text: String| {
        text.replace(r#","Port":51820"#, "")
            .replace(r#","Port":51821"#, "")
    };
    attrs = LeaseAttrs::from_json(&strip(attrs.to_json())).expect("a lease");
    let ports = r#","ListenPort":7000,"ListenPortV6":7001"#;
    let (desired, _) = of(&conf(ports), US, None, &[(KEY, attrs.clone())]);
    let endpoints: Vec<String> = peers(&desired)
        .iter()
        .map(|peer| peer.1.to_string())
        .collect();
    assert_eq!(endpoints, ["192.0.2.2:7000", "[2001:db8::2]:7001"]);
    let conf = conf(&format!(r#"{ports},"Mode":"ipv6""#));
    let (desired, _) = of(&conf, US, None, &[(KEY, attrs)]);
    assert_eq!(peers(&desired)[0].1.to_string(), "[2001:db8::2]:7000");
}

#[test]
fn what_cannot_be_a_peer_is_told_and_left_out() {
    let good = lease("192.0.2.3", "2001:db8::3", KEYS[1]);
    let third = "10.244.3.0-24&fd00:3::-64";
    let vxlan = LeaseAttrs {
        backend_type: "vxlan".into(),
        ..LeaseAttrs::default()
    };
    let keyless = LeaseAttrs {
        v4: None,
        ..lease("192.0.2.2", "2001:db8::2", KEYS[0])
    };
    let own: PublicKey = KEYS[0].parse().expect("a key");
    for (key, attrs, public, needle) in [
        (KEY, vxlan, None, "its backend is \"vxlan\""),
        (KEY, keyless, None, "no BackendData"),
        (
            KEY,
            lease("127.0.0.1", "2001:db8::2", KEYS[0]),
            None,
            "not the address of a host",
        ),
        (
            "10.244.0.0-16&fd00:2::-64",
            lease("192.0.2.2", "2001:db8::2", KEYS[0]),
            None,
            "overlaps this node's",
        ),
        (
            KEY,
            lease("192.0.2.2", "2001:db8::2", KEYS[0]),
            Some(own),
            "this node's, too",
        ),
        (
            "10.244.4.0-24&fd00:4::-64",
            lease("192.0.2.2", "2001:db8::2", KEYS[1]),
            None,
            "that of 10.244.3.0-24",
        ),
    ] {
        let leases = [(key, attrs), (third, good.clone()), (OWN, good.clone())];
        let (desired, problems) = of(&conf(""), US, public, &leases);
        assert_eq!(problems.len(), 1, "{problems:?}");
        assert!(
            problems[0].to_string().contains(needle),
            "{needle}: {}",
            problems[0]
        );
        let left: Vec<String> = peers(&desired).into_iter().map(|peer| peer.2).collect();
        assert_eq!(left, ["10.244.3.0/24", "fd00:3::/64"], "{needle}");
    }
}
