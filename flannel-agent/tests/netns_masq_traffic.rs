//! Masquerade as pods see it, with the agent itself: no connection fails and none leaves under another address, whatever happens to
//! the rules and to the agent.

mod masq_rig;
mod rig;

use std::{collections::BTreeSet, fs, net::IpAddr};

use flannel_testkit::{Lab, LabOptions, Netns, eventually, privileged, traffic};
use masq_rig::{Connections, LEGACY, NFT, Variant};
use rig::{NET_CONF, PATIENCE, Rig};

/// The host outside, 192.168.77.50.
const OUTSIDE: u8 = 50;
const NFT_CONF: &str =
    r#"{"Network":"10.244.0.0/16","EnableNFTables":true,"Backend":{"Type":"vxlan"}}"#;
const FLAGS: [&str; 2] = ["--ip-masq", "--iptables-resync=1"];

fn outside(lab: &Lab) -> (Netns, std::net::Ipv4Addr) {
    let host = lab.host("outside", OUTSIDE).expect("a host outside");
    (host, std::net::Ipv4Addr::new(192, 168, 77, OUTSIDE))
}

fn configure(rig: &Rig, net_conf: &str) {
    fs::write(rig.lease_dir().join("config"), net_conf).expect("write the network configuration");
}

#[test]
fn no_connection_fails_with_iptables_nft_or_nftables() {
    no_connection_fails(NFT);
}

#[test]
fn no_connection_fails_with_iptables_legacy_or_nftables() {
    no_connection_fails(LEGACY);
}

/// Agents come and go and rules change, and connections are opened all the time.
fn no_connection_fails(variant: Variant) {
    if !privileged() {
        return;
    }
    let mut rig = Rig::new(1);
    variant.make_preferred(rig.ns(0));
    rig.start_all(&FLAGS);
    let (host, address) = outside(rig.lab());
    let connections = Connections::start(&rig.pod(0).ns, &host, address);
    let ns = rig.ns(0).clone();
    connections.go_on(500);
    // Restarts, after a crash and after a stop, with and without changed flags.
    for (crash, extra) in [
        (true, None),
        (false, None),
        (true, Some("--ip-masq-fully-random-disable")),
        (false, None),
        (false, Some("--iptables-forward-rules=false")),
        (true, None),
    ] {
        if crash {
            rig.kill_agent(0);
        } else {
            assert_eq!(rig.stop_agent(0), 0);
        }
        connections.go_on(100);
        let flags: Vec<&str> = FLAGS.into_iter().chain(extra).collect();
        rig.start_agent(0, &flags);
        rig.wait_ready(0);
        let random = variant.save(&ns, 4).contains("--random-fully");
        assert_eq!(random, extra != Some("--ip-masq-fully-random-disable"));
        connections.go_on(300);
    }
    // Damage that leaves what masquerades, and its repair.
    for damage in [
        "-t nat -D FLANNEL-POSTRTG 2",
        "-t nat -D FLANNEL-POSTRTG 1",
        "-F FLANNEL-FWD",
        "-t nat -A POSTROUTING -j FLANNEL-POSTRTG",
    ] {
        let before = variant.save(&ns, 4);
        variant.run(&ns, 4, damage);
        eventually(PATIENCE, damage, || {
            let now = variant.save(&ns, 4);
            (now == before).then_some(()).ok_or(now)
        });
        connections.go_on(100);
    }
    // To nftables, with either ruleset, and back.
    for (conf, extra) in [
        (NFT_CONF, None),
        (NFT_CONF, Some("--nftables-ruleset=correct")),
        (NFT_CONF, Some("--iptables-forward-rules=false")),
        (NET_CONF, None),
    ] {
        assert_eq!(rig.stop_agent(0), 0);
        configure(&rig, conf);
        let flags: Vec<&str> = FLAGS.into_iter().chain(extra).collect();
        rig.start_agent(0, &flags);
        rig.wait_ready(0);
        connections.go_on(300);
        assert_eq!(variant.save(&ns, 4).contains("FLANNEL"), conf == NET_CONF);
        assert_eq!(masq_rig::flannels(&ns).is_empty(), conf == NET_CONF);
    }
    let outcome = connections.stop();
    let node: BTreeSet<IpAddr> = BTreeSet::from([rig.node(0).ip.into()]);
    assert_eq!(
        outcome.failures,
        Vec::<String>::new(),
        "of {}",
        outcome.opened
    );
    assert_eq!(outcome.sources, node);
    assert!(outcome.opened > 3000, "{outcome:?}");
}

#[test]
fn without_masquerade_connections_fail() {
    if !privileged() {
        return;
    }
    // Proof that the test above can fail.
    let rig = Rig::start(1, &[]);
    let (host, address) = outside(rig.lab());
    let connections = Connections::start(&rig.pod(0).ns, &host, address);
    eventually(PATIENCE, "connections fail", || {
        (connections.opened() >= 4).then_some(()).ok_or("none yet")
    });
    let outcome = connections.stop();
    assert!(!outcome.failures.is_empty(), "{outcome:?}");
}

/// A server in a pod tells from which address a connection comes.
fn source_seen(from: &Netns, to: &flannel_testkit::Pod) -> IpAddr {
    use std::io::Read as _;
    let address = std::net::SocketAddr::from((to.ip, 4343));
    let listener = to
        .ns
        .run(|| std::net::TcpListener::bind(address))
        .expect("listen");
    let accepted = std::thread::spawn(move || listener.accept());
    let stream = from.run(|| std::net::TcpStream::connect_timeout(&address, PATIENCE));
    let mut stream = stream.expect("connect");
    let (other, peer) = accepted.join().expect("no panic").expect("accept");
    drop(other);
    let mut nothing = [0];
    drop(stream.read(&mut nothing));
    peer.ip()
}

#[test]
fn the_fast_path_stays_on_and_pods_see_pods() {
    if !privileged() {
        return;
    }
    for (conf, flags, mode) in [
        (NET_CONF, &["--bpf-fast-path=auto"][..], "established"),
        (NFT_CONF, &["--bpf-fast-path=auto"], "established"),
        (NET_CONF, &["--bpf-fast-path=syn"], "syn"),
        (NFT_CONF, &["--bpf-fast-path=syn"], "syn"),
        (
            NFT_CONF,
            &["--bpf-fast-path=auto", "--nftables-ruleset=correct"],
            "established",
        ),
        (NET_CONF, &["--bpf-fast-path=off"], "off"),
        (NET_CONF, &["--datapath=kernel"], ""),
    ] {
        let mut rig = Rig::with(LabOptions::default(), conf);
        let flags: Vec<&str> = FLAGS.into_iter().chain(flags.iter().copied()).collect();
        rig.start_all(&flags);
        let (host, address) = outside(rig.lab());
        for node in 0..2 {
            let status = rig.status_is_ok(node);
            let fast = &status["fast_path"];
            if mode.is_empty() {
                assert_eq!(status["datapath"]["mode"], "kernel", "{flags:?} {status}");
            } else {
                assert_eq!(fast["mode"], mode, "{flags:?} {fast}");
            }
        }
        let (a, b) = (rig.pod(0), rig.pod(1));
        assert_eq!(source_seen(&a.ns, b), IpAddr::from(a.ip), "{flags:?}");
        assert_eq!(source_seen(&b.ns, a), IpAddr::from(b.ip), "{flags:?}");
        // Many packets of one connection, so that the fast path has it.
        traffic::tcp_transfer(&b.ns, b.ip, &a.ns, traffic::Amount::Bytes(4_000_000))
            .expect("a transfer");
        let connections = Connections::start(&a.ns, &host, address);
        connections.go_on(50);
        let outcome = connections.stop();
        assert_eq!(outcome.failures, Vec::<String>::new(), "{flags:?}");
        assert_eq!(
            outcome.sources,
            BTreeSet::from([rig.node(0).ip.into()]),
            "{flags:?}"
        );
    }
}

#[test]
fn what_drops_pods_packets_is_named_with_what_helps() {
    if !privileged() {
        return;
    }
    for variant in [NFT, LEGACY] {
        let mut rig = Rig::new(1);
        let ns = rig.ns(0).clone();
        variant.restore(
            &ns,
            4,
            "*filter\n:DOCKER-USER - [0:0]\n-A FORWARD -j DOCKER-USER\n-A FORWARD -j DROP\n-A DOCKER-USER -j RETURN\nCOMMIT\n",
        );
        rig.start_agent(0, &FLAGS);
        rig.wait_ready(0);
        let program = format!("iptables-{}", variant.backend);
        let line = format!(
            "{program}: the rule `-A FORWARD -j DROP` drops forwarded packets of pods before anything accepts them. It is Docker's; to \
             let them pass: {program} -I DOCKER-USER -s 10.244.0.0/16 -j ACCEPT; {program} -I DOCKER-USER -d 10.244.0.0/16 -j ACCEPT"
        );
        let warned = |rig: &mut Rig| rig.agent(0).log().matches(&line).count();
        assert_eq!(warned(&mut rig), 1, "{}", rig.agent(0).log());
        // As told.
        let advice = line.split_once("pass: ").expect("advice").1;
        ns.exec(["sh", "-c", advice]).unwrap();
        rig.kill_agent(0);
        rig.start_agent(0, &FLAGS);
        rig.wait_ready(0);
        assert_eq!(warned(&mut rig), 0, "{}", rig.agent(0).log());
    }
}

#[test]
fn subnet_env_says_whether_flannel_masquerades() {
    if !privileged() {
        return;
    }
    let mut rig = Rig::start(1, &["--ip-masq"]);
    assert_eq!(rig.subnet_env(0, "FLANNEL_IPMASQ"), "true");
    rig.kill_agent(0);
    rig.start_agent(0, &[]);
    rig.wait_ready(0);
    assert_eq!(rig.subnet_env(0, "FLANNEL_IPMASQ"), "false");
}

#[test]
fn cleanup_removes_our_rules_and_nobody_elses() {
    if !privileged() {
        return;
    }
    for conf in [NET_CONF, NFT_CONF] {
        let mut rig = Rig::with(
            LabOptions {
                nodes: 1,
                ..LabOptions::default()
            },
            conf,
        );
        let ns = rig.ns(0).clone();
        // Another instance, whose rules are in the same chains.
        let other = masq_rig::Kept::start(&ns, masq_rig::another());
        NFT.run(&ns, 4, "-A FORWARD -i eth9 -j DROP");
        other.stop();
        let before = NFT.save(&ns, 4);
        rig.start_agent(0, &["--ip-masq", "--ip-blackhole-route"]);
        rig.wait_ready(0);
        let own = rig.node(0).subnet;
        let route = format!("blackhole {own}");
        let routes = ns.ip("route show type blackhole").unwrap();
        assert!(routes.contains(&route), "{routes}");
        assert_eq!(rig.stop_agent(0), 0);
        let there = (NFT.save(&ns, 4), masq_rig::flannels(&ns));
        let dry = rig.cli(0, &["cleanup", "--dry-run"]);
        let rules = if conf == NET_CONF {
            "would remove 7 rules of flannel in iptables-nft"
        } else {
            "would remove nftables table flannel-ipv4"
        };
        assert!(dry.stdout.contains(rules), "{dry:?}");
        assert!(
            dry.stdout.contains(&format!("would remove route {route}")),
            "{dry:?}"
        );
        assert_eq!((NFT.save(&ns, 4), masq_rig::flannels(&ns)), there);
        let done = rig.cli(0, &["cleanup"]);
        assert_eq!(done.status.code(), Some(0), "{done:?}");
        assert_eq!(masq_rig::flannels(&ns), "");
        let after = NFT.save(&ns, 4);
        assert_eq!(masq_rig::sorted(&after), masq_rig::sorted(&before));
        assert!(!ns.ip("route show type blackhole").unwrap().contains(&route));
    }
}

#[test]
fn what_the_host_forwards_to_pods_elsewhere_is_masqueraded_as_upstream_does() {
    if !privileged() {
        return;
    }
    let correct = "--nftables-ruleset=correct";
    for (conf, extra, masqueraded) in [
        (NET_CONF, None, true),
        (NFT_CONF, None, false),
        (NFT_CONF, Some(correct), true),
    ] {
        let mut rig = Rig::with(LabOptions::default(), conf);
        let flags: Vec<&str> = FLAGS.into_iter().chain(extra).collect();
        rig.start_all(&flags);
        let (host, address) = outside(rig.lab());
        let node = rig.node(0).ip;
        host.ip(&format!("route add 10.244.0.0/16 via {node}"))
            .unwrap();
        let expected = if masqueraded {
            rig.node(0).subnet.base().into()
        } else {
            IpAddr::from(address)
        };
        assert_eq!(source_seen(&host, rig.pod(1)), expected, "{conf} {extra:?}");
        // The node that owns the pod leaves the address alone.
        assert_eq!(
            source_seen(&host, rig.pod(0)),
            IpAddr::from(address),
            "{conf} {extra:?}"
        );
    }
}
