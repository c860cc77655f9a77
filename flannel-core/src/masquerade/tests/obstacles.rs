//! What stops pods' forwarded packets, as Docker, ufw and firewalld leave it.

use super::super::iptables::{Dump, FILTER, Moment, plan};
use super::super::obstacle::{in_iptables, in_nftables};
use super::ours;

fn found(forward: &str, policy: &str, chains: &str) -> Option<String> {
    let text = format!(
        "*filter\n:FORWARD {policy} [0:0]\n:FLANNEL-FWD - [0:0]\n{chains}{forward}\
         -A FLANNEL-FWD -s 10.5.0.0/16 -m comment --comment \"flanneld forward\" -j ACCEPT\n\
         -A FLANNEL-FWD -d 10.5.0.0/16 -m comment --comment \"flanneld forward\" -j ACCEPT\nCOMMIT\n"
    );
    let dump = Dump::parse(&text);
    in_iptables(dump.table(FILTER), &ours().network, "iptables-nft")
}

const JUMP: &str = "-A FORWARD -m comment --comment \"flanneld forward\" -j FLANNEL-FWD\n";

#[test]
fn what_comes_behind_ours_is_no_obstacle() {
    assert_eq!(found(JUMP, "DROP", ""), None);
    assert_eq!(
        found(&format!("{JUMP}-A FORWARD -j DROP\n"), "DROP", ""),
        None
    );
    assert_eq!(found("", "ACCEPT", ""), None);
    let docker = ":DOCKER-USER - [0:0]\n-A DOCKER-USER -j RETURN\n";
    let forward = format!("-A FORWARD -j DOCKER-USER\n-A FORWARD -o docker0 -j DROP\n{JUMP}");
    assert_eq!(found(&forward, "DROP", docker), None);
}

#[test]
fn what_drops_is_named_with_what_helps() {
    let docker = ":DOCKER-USER - [0:0]\n-A DOCKER-USER -j RETURN\n";
    let forward = format!("-A FORWARD -j DOCKER-USER\n-A FORWARD -j DROP\n{JUMP}");
    assert_eq!(
        found(&forward, "ACCEPT", docker).unwrap(),
        "iptables-nft: the rule `-A FORWARD -j DROP` drops forwarded packets of pods before anything accepts them. It is Docker's; to \
         let them pass: iptables-nft -I DOCKER-USER -s 10.5.0.0/16 -j ACCEPT; iptables-nft -I DOCKER-USER -d 10.5.0.0/16 -j ACCEPT"
    );
    let ufw = ":ufw-before-forward - [0:0]\n:ufw-reject-forward - [0:0]\n-A ufw-reject-forward -j REJECT --reject-with icmp-port-unreachable\n";
    let forward =
        format!("-A FORWARD -j ufw-before-forward\n-A FORWARD -j ufw-reject-forward\n{JUMP}");
    let said = found(&forward, "DROP", ufw).unwrap();
    assert!(
        said.contains("`-A ufw-reject-forward -j REJECT --reject-with icmp-port-unreachable`"),
        "{said}"
    );
    assert!(said.contains("ufw route allow from 10.5.0.0/16"), "{said}");
    let said = found("", "DROP", "").unwrap();
    assert!(said.contains("the policy DROP of chain FORWARD"), "{said}");
    assert!(
        said.contains("iptables-nft -I FORWARD -d 10.5.0.0/16 -j ACCEPT"),
        "{said}"
    );
}

#[test]
fn following_the_advice_ends_it() {
    let docker = ":DOCKER-USER - [0:0]\n\
         -A DOCKER-USER -d 10.5.0.0/16 -j ACCEPT\n-A DOCKER-USER -s 10.5.0.0/16 -j ACCEPT\n-A DOCKER-USER -j RETURN\n";
    let forward = format!("-A FORWARD -j DOCKER-USER\n-A FORWARD -j DROP\n{JUMP}");
    assert_eq!(found(&forward, "DROP", docker), None);
    // One half is not enough.
    let half = docker.replace("-A DOCKER-USER -s 10.5.0.0/16 -j ACCEPT\n", "");
    assert!(found(&forward, "DROP", &half).is_some());
}

#[test]
fn chains_that_lead_in_circles_end() {
    let dump = Dump::parse(
        "*filter\n:A - [0:0]\n:B - [0:0]\n-A FORWARD -j A\n-A A -j B\n-A B -j A\nCOMMIT\n",
    );
    assert_eq!(
        in_iptables(dump.table(FILTER), &ours().network, "iptables"),
        None
    );
    assert!(!plan(&dump, &ours(), Moment::Start).is_empty());
}

#[test]
fn chains_of_nftables_that_drop() {
    let chain = |family: &str, policy: &str| {
        format!(
            r#"{{"chain":{{"family":"{family}","table":"filter","name":"forward","handle":1,"type":"filter","hook":"forward","prio":0,"policy":"{policy}"}}}}"#
        )
    };
    let listed = |objects: &str| format!(r#"{{"nftables":[{objects}]}}"#);
    let network = ours().network;
    let said = in_nftables(&listed(&chain("inet", "drop")), &network);
    assert_eq!(
        said,
        [
            "nftables: the policy drop of chain inet filter forward drops forwarded packets of pods. To let them pass: nft insert rule \
             inet filter forward ip saddr 10.5.0.0/16 accept; nft insert rule inet filter forward ip daddr 10.5.0.0/16 accept"
        ]
    );
    for objects in [chain("inet", "accept"), chain("ip6", "drop")] {
        assert_eq!(
            in_nftables(&listed(&objects), &network),
            Vec::<String>::new()
        );
    }
    let rule = r#"{"rule":{"family":"inet","table":"filter","chain":"forward","expr":[{"match":{"right":{"prefix":{"addr":"10.5.0.0","len":16}}}}]}}"#;
    let knowing = format!("{},{rule}", chain("inet", "drop"));
    assert_eq!(
        in_nftables(&listed(&knowing), &network),
        Vec::<String>::new()
    );
    assert_eq!(in_nftables("no JSON", &network), Vec::<String>::new());
}
