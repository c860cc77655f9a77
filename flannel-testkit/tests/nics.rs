//! Labs on network cards. Ends of veth pairs stand for the cards here, and a bridge that floods stands for the wire.

use flannel_testkit::traffic::{self, Amount};
use flannel_testkit::{
    Capture, KernelNode, Lab, LabOptions, Netns, Nics, Offloads, eventually, json, privileged,
};
use std::time::Duration;

const SECOND: Duration = Duration::from_secs(1);
const CARDS: u8 = 3;

/// Cards in a namespace of their own.
struct Cards {
    home: Netns,
    nics: Nics,
    // Last: it holds the namespaces.
    _lab: Lab,
}

impl Cards {
    fn new() -> Cards {
        let lab = Lab::new(LabOptions {
            nodes: 0,
            ..LabOptions::default()
        })
        .unwrap();
        let (home, wire) = (lab.extra("home").unwrap(), lab.extra("wire").unwrap());
        wire.ip("link add hub type bridge ageing_time 0 mcast_snooping 0")
            .unwrap();
        wire.ip("link set hub up").unwrap();
        for card in 0..CARDS {
            wire.ip(&format!(
                "link add port{card} mtu 9000 type veth peer name enp{card} address {} netns {}",
                mac(card),
                home.name()
            ))
            .unwrap();
            wire.ip(&format!("link set port{card} master hub up"))
                .unwrap();
        }
        Cards {
            nics: Nics::new(&home, (0..CARDS).map(mac)),
            home,
            _lab: lab,
        }
    }

    /// Names and states of what is at home, as `ip` shows them.
    fn at_home(&self) -> Vec<String> {
        let links = json::ip_json(&self.home, &["link", "show"]).unwrap();
        let links = links.as_array().unwrap().iter();
        let cards = links.filter(|link| link["ifname"] != "lo");
        let mut seen: Vec<String> = cards
            .map(|link| format!("{} {}", link["ifname"], link["operstate"]).replace('"', ""))
            .collect();
        seen.sort();
        seen
    }
}

fn mac(card: u8) -> String {
    format!("52:54:00:00:79:0{card}")
}

#[test]
fn cards_are_uplinks_and_return() {
    if !privileged() {
        return;
    }
    let cards = Cards::new();
    for (mtu, offloads) in [
        (1500, Offloads::Off),
        (9000, Offloads::Default),
        (1500, Offloads::Default),
    ] {
        let options = LabOptions {
            mtu,
            offloads,
            ..LabOptions::default()
        };
        let lab = Lab::on_nics(options, &cards.nics).unwrap();
        assert!(lab.is_on_nics());
        assert_eq!(cards.at_home(), Vec::<String>::new());
        for (card, node) in (1..).zip(lab.nodes()) {
            let uplink = json::link(&node.ns, "eth0").unwrap();
            assert_eq!(uplink["address"], mac(card));
            assert_eq!(uplink["mtu"], mtu);
            let text = node
                .ns
                .exec(["ethtool", "--json", "-k", "eth0"])
                .expect("features");
            let features: serde_json::Value = serde_json::from_str(&text).unwrap();
            let is_on = features[0]["tcp-segmentation-offload"]["active"] == true;
            assert_eq!(is_on, offloads == Offloads::Default, "{features}");
        }
        let port = json::link(lab.underlay(), &lab.node(0).port).unwrap();
        assert_eq!(
            (&port["address"], &port["master"]),
            (&mac(0).into(), &"br0".into())
        );
        let wire = Capture::start(lab.underlay(), &lab.node(0).port, "udp port 8472").unwrap();
        carry(&lab, mtu - 50);
        let seen = wire.stop().unwrap().vxlan();
        let sent = seen.iter().filter(|frame| frame.ip.src == lab.node(0).ip);
        assert!(sent.count() > 5, "{seen:?}");
        lab.node(0).set_carrier(false).unwrap_err();
        drop(lab);
        // A carrier comes back a moment after its interface.
        eventually(10 * SECOND, "the cards are back", || {
            let seen = cards.at_home();
            let back = seen == ["nic0 UP", "nic1 UP", "nic2 UP"];
            back.then_some(()).ok_or_else(|| format!("{seen:?}"))
        });
    }
}

#[test]
fn a_lab_of_more_nodes_than_cards_is_refused() {
    if !privileged() {
        return;
    }
    let cards = Cards::new();
    let options = LabOptions {
        nodes: CARDS,
        ..LabOptions::default()
    };
    let error = Lab::on_nics(options, &cards.nics).unwrap_err();
    assert!(error.to_string().contains("for 2 alone"), "{error:#}");
    // The cards are where they were.
    let two = Lab::on_nics(LabOptions::default(), &cards.nics).unwrap();
    traffic::ping_once(&two.node(0).ns, two.node(1).ip, SECOND).unwrap();
}

/// Pod traffic over flannel's own devices.
fn carry(lab: &Lab, mtu: u32) {
    let kernels = [0, 1].map(|node| KernelNode::set_up(lab.node(node)).unwrap());
    kernels[0].connect(&kernels[1]).unwrap();
    let [a, b] = [0, 1].map(|node| {
        let subnet = kernels[node].subnet;
        lab.node(node).add_pod(subnet, 2, mtu).unwrap()
    });
    traffic::ping_once(&a.ns, b.ip, 5 * SECOND).unwrap();
    traffic::tcp_transfer(&b.ns, b.ip, &a.ns, Amount::Bytes(100_000)).unwrap();
}
