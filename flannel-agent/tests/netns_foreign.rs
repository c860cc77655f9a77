//! What is not ours stays as it is, byte for byte: through start, work, stop and `cleanup`, which leaves nothing of ours.

mod rig;

use std::{
    collections::BTreeSet,
    fs,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use flannel_testkit::{Node, Pod, eventually, privileged};
use rig::{PATIENCE, Rig, dump, dump::Dump, stranger};

/// By which the agent's own objects are known in a dump.
const OURS: [&str; 12] = [
    "flannel.1",
    "flannel-hr.1",
    "flannelp.1",
    "to_overlay",
    "from_wire",
    "from_overlay",
    "from_pod",
    "to_pod",
    "FLANNEL-FWD",
    "FLANNEL-POSTRTG",
    // Priority 0xF1A0.
    "61856",
    "files",
];

/// Everything that others have on a node, as other programs would leave it there.
struct Strangers {
    pins: PathBuf,
    pod: Pod,
    _links: Vec<OwnedFd>,
}

impl Strangers {
    fn set_up(rig: &Rig, node: &Node) -> Strangers {
        let ns = &node.ns;
        let pod = node.add_pod(node.subnet, 2, 1450).unwrap();
        for line in [
            "link add vxlan100 type vxlan id 100 local 192.168.77.11 dev eth0 dstport 4789 learning",
            "addr add 10.99.0.1/24 dev vxlan100",
            "link set vxlan100 up",
            "link add docker0 type bridge",
            "addr add 172.17.0.1/16 dev docker0",
            "link set docker0 up",
            "link add flannel.7 type bridge",
            "link set flannel.7 up",
            "route add 10.50.0.0/16 via 192.168.77.1 dev eth0",
            "route add blackhole 10.51.0.0/16",
            "route add blackhole 10.244.1.0/24 metric 700",
            "route add 10.244.0.0/16 via 192.168.77.1 dev eth0 metric 500",
            "route add 10.52.0.0/16 via 192.168.77.1 dev eth0 table 100",
            "rule add from 10.52.0.0/16 lookup 100",
            "neigh add 192.168.77.250 lladdr 02:00:00:00:00:fa dev eth0 nud permanent",
        ] {
            ns.ip(line).unwrap();
        }
        for line in [
            "bridge fdb append 00:00:00:00:00:00 dev vxlan100 dst 192.168.77.250",
            "tc qdisc add dev eth0 clsact",
            "tc filter add dev eth0 ingress pref 10 bpf bytecode 1,6 0 0 0,",
            "tc filter add dev eth0 ingress pref 62000 bpf bytecode 1,6 0 0 0,",
            "tc filter add dev eth0 egress pref 30 bpf bytecode 1,6 0 0 0,",
            "nft add table ip other",
            "nft add chain ip other forward { type filter hook forward priority 5 ; }",
            "nft add rule ip other forward ip daddr 192.0.2.3 drop",
            "nft add table ip flannel-other",
            "iptables -t nat -A POSTROUTING -s 10.99.0.0/24 -j MASQUERADE",
            "iptables -A FORWARD -s 10.99.0.0/24 -j ACCEPT",
        ] {
            // The program of the bytecode filter is one word.
            let words = line
                .split(' ')
                .collect::<Vec<_>>()
                .join("\u{0}")
                .replace("1,6\u{0}0\u{0}0\u{0}0,", "1,6 0 0 0,");
            ns.exec(words.split('\u{0}')).unwrap();
        }
        let pins = PathBuf::from(format!("/sys/fs/bpf/{}other", rig.lab().prefix()));
        fs::create_dir_all(&pins).unwrap();
        let ingress = stranger::program("stranger_in");
        let egress = stranger::program("stranger_out");
        let links = vec![
            stranger::attach(&ingress, ns, "eth0", stranger::BPF_TCX_INGRESS),
            stranger::attach(&egress, ns, "eth0", stranger::BPF_TCX_EGRESS),
        ];
        stranger::pin(&ingress, &pins.join("program"));
        stranger::pin(&links[0], &pins.join("link"));
        Strangers {
            pins,
            pod,
            _links: links,
        }
    }

    /// What is pinned elsewhere: by the stranger, and by the other node's agent.
    fn pinned(&self, other_instance: &Path) -> Vec<String> {
        let mut all = dump::pins(&self.pins);
        assert_eq!(all.len(), 2, "{all:?}");
        all.extend(dump::pins(other_instance));
        all
    }
}

impl Drop for Strangers {
    fn drop(&mut self) {
        drop(fs::remove_dir_all(&self.pins));
    }
}

/// What `cleanup` names, after the words that say what happens to it.
fn named(text: &str, words: &str) -> BTreeSet<String> {
    text.lines()
        .filter_map(|line| line.strip_prefix(words))
        .map(|rest| rest.trim().to_owned())
        .collect()
}

/// Things happen to the node that make the loop work.
fn churn(rig: &Rig) {
    let subnet = "10.244.66.0/24".parse().unwrap();
    let ip = |line: &str| rig.ns(0).ip(line).unwrap();
    rig.put_lease(
        subnet,
        "192.168.77.66".parse().unwrap(),
        "02:00:00:00:00:66",
    );
    eventually(PATIENCE, "the peer is there", || rig.converged_kernel(0));
    ip("link del flannel.1");
    eventually(PATIENCE, "the device is whole again", || {
        rig.converged_kernel(0)
    });
    ip("neigh flush dev flannel.1 nud permanent");
    rig.remove_lease(subnet);
    eventually(PATIENCE, "all is as it was", || rig.converged_kernel(0));
    eventually(PATIENCE, "the peer answers", || rig.ping(0, 1));
}

fn strangers_stay(flags: &[&str]) {
    if !privileged() {
        return;
    }
    let mut rig = Rig::new(2);
    let strangers = Strangers::set_up(&rig, rig.node(0));
    rig.start_agent(1, flags);
    rig.wait_ready(1);
    rig.add_pod(1);
    let first = Dump::of(rig.ns(0));
    let theirs = first.without(&OURS);
    assert_eq!(first.diff(&theirs), [""; 0], "nothing of ours is there yet");

    rig.start_agent(0, flags);
    rig.wait_ready(0);
    rig.adopt_pod(0, strangers.pod.clone());
    rig.wait_converged();
    let pinned = strangers.pinned(&rig.instance(1));
    // The qdisc for our filters on the pod's veth: nobody else's was there.
    let qdisc = format!(
        r#"{{"dev":"{}","handle":"ffff:","kind":"clsact""#,
        strangers.pod.host_if
    );
    let ours: Vec<&str> = OURS.into_iter().chain([qdisc.as_str()]).collect();
    let unchanged = |rig: &Rig, when: &str| {
        theirs.assert_same(&Dump::of(rig.ns(0)).without(&ours), when);
        assert_eq!(strangers.pinned(&rig.instance(1)), pinned, "{when}");
    };
    unchanged(&rig, "after the start");

    churn(&rig);
    // Routes of others over our device: not of our shape, or not in our table.
    let over_ours = [
        "10.60.0.0/16 dev flannel.1 scope link",
        "10.61.0.0/24 via 10.244.2.0 dev flannel.1 onlink",
        "10.62.0.0/24 via 10.62.0.0 dev flannel.1 onlink table 100",
    ];
    for route in over_ours {
        rig.ns(0).ip(&format!("route add {route}")).unwrap();
    }
    let with_routes = Dump::of(rig.ns(0));
    let peer = "10.244.67.0/24".parse().unwrap();
    rig.put_lease(peer, "192.168.77.67".parse().unwrap(), "02:00:00:00:00:67");
    eventually(PATIENCE, "the peer is there", || {
        rig.ns(0).ip("route get 10.244.67.1").and_then(|text| {
            anyhow::ensure!(text.contains("dev flannel.1"), "{text}");
            Ok(())
        })
    });
    rig.remove_lease(peer);
    eventually(
        PATIENCE,
        "the peer is gone, the others' routes are not",
        || {
            let diff = with_routes.diff(&Dump::of(rig.ns(0)));
            diff.is_empty().then_some(()).ok_or_else(|| diff.join("\n"))
        },
    );
    unchanged(&rig, "after some work");

    refuses_while_running(&rig);
    assert_eq!(rig.stop_agent(0), 0);
    cleans(&rig, &first);
    assert_eq!(strangers.pinned(&rig.instance(1)), pinned, "after cleanup");
    // The other node has not noticed.
    rig.status_is_ok(1);
}

#[test]
fn strangers_stay_with_tcx() {
    strangers_stay(&["--bpf-attach=tcx"]);
}

#[test]
fn strangers_stay_with_clsact() {
    strangers_stay(&["--bpf-attach=clsact"]);
}

#[test]
fn strangers_stay_with_ebpf_alone() {
    strangers_stay(&["--bpf-device=veth"]);
}

#[test]
fn strangers_stay_on_the_kernel_path() {
    strangers_stay(&["--datapath=kernel"]);
}

fn refuses_while_running(rig: &Rig) {
    let before = rig.dump(0);
    let refused = rig.cli(0, &["cleanup"]);
    assert_eq!(refused.status.code(), Some(1), "{refused:?}");
    assert!(
        refused.stderr.contains("an agent is running (pid "),
        "{refused:?}"
    );
    assert_eq!(refused.stderr.lines().count(), 1, "{refused:?}");
    before.assert_same(&rig.dump(0), "after a refused cleanup");
}

/// A dry run changes nothing and names what the real one removes, after which the node is as it was at first.
fn cleans(rig: &Rig, first: &Dump) {
    let before = rig.dump(0);
    let dry = rig.cli(0, &["cleanup", "--dry-run"]);
    assert_eq!(dry.status.code(), Some(0), "{dry:?}");
    before.assert_same(&rig.dump(0), "after a dry run");
    let planned = named(&dry.stdout, "would remove ");
    assert!(planned.len() >= 3, "{dry:?}");
    assert_eq!(planned.len(), dry.stdout.lines().count(), "{dry:?}");

    let done = rig.cli(0, &["cleanup"]);
    assert_eq!(done.status.code(), Some(0), "{done:?}");
    assert_eq!(named(&done.stdout, "removed "), planned);
    assert_eq!(planned.len(), done.stdout.lines().count(), "{done:?}");
    first.assert_same(&Dump::of(rig.ns(0)), "after cleanup");
    assert!(!rig.instance(0).exists());
    assert!(
        dump::files(rig.node(0)).is_empty(),
        "{:?}",
        dump::files(rig.node(0))
    );

    let again = rig.cli(0, &["cleanup"]);
    assert_eq!(again.status.code(), Some(0), "{again:?}");
    assert_eq!(again.stdout.trim(), "nothing of ours found", "{again:?}");
    first.assert_same(&Dump::of(rig.ns(0)), "after a second cleanup");
}

/// On a node with nothing but an uplink, and an agent that died.
#[test]
fn cleanup_leaves_nothing_behind() {
    if !privileged() {
        return;
    }
    for flags in [
        &["--bpf-attach=tcx"][..],
        &["--bpf-attach=clsact"],
        &["--bpf-device=veth"],
        &["--datapath=kernel"],
    ] {
        eprintln!("with {flags:?}");
        let mut rig = Rig::new(2);
        // Tables that are there stay when they are empty again: nobody can tell whose they are.
        for chain in ["INPUT", "FORWARD", "OUTPUT"] {
            for what in ["-A", "-D"] {
                let words = ["iptables", what, chain, "-j", "ACCEPT"];
                rig.ns(0).exec(words).unwrap();
            }
        }
        let first = Dump::of(rig.ns(0));
        rig.start_agent(0, flags);
        rig.wait_ready(0);
        rig.kill_agent(0);
        cleans(&rig, &first);
        // And it can start again.
        rig.start_agent(0, flags);
        rig.wait_ready(0);
        rig.stop_agent(0);
        cleans(&rig, &first);
    }
}

#[test]
fn reports_without_a_daemon() {
    if !privileged() {
        return;
    }
    let mut rig = Rig::new(2);
    let fresh = rig.dump(0);
    let never = rig.cli(0, &["status", "-o", "json"]);
    assert_eq!(never.status.code(), Some(1), "{never:?}");
    let status: serde_json::Value = serde_json::from_str(&never.stdout).unwrap();
    assert_eq!(status["ok"], false);
    assert!(
        status["problems"]
            .to_string()
            .contains("no agent has run here"),
        "{status}"
    );
    let never = rig.cli(0, &["peers", "-o", "json"]);
    assert_eq!(never.status.code(), Some(1), "{never:?}");
    assert!(never.stderr.contains("no agent has run here"), "{never:?}");
    let never = rig.cli(0, &["cleanup"]);
    assert_eq!(
        (never.status.code(), never.stdout.trim()),
        (Some(0), "nothing of ours found")
    );
    fresh.assert_same(&rig.dump(0), "after commands that had nothing to report");

    for flags in [
        &["--bpf-attach=tcx"][..],
        &["--bpf-attach=clsact"],
        &["--datapath=kernel"],
    ] {
        for node in 0..2 {
            rig.start_agent(node, flags);
            rig.wait_ready(node);
        }
        rig.wait_converged();
        let alive = rig.status_is_ok(0);
        assert_eq!(alive["agent"]["running"], true, "{alive}");
        let peers = rig.peers(0);
        rig.kill_agent(0);
        rig.kill_agent(1);
        let dead = rig.status_is_ok(0);
        assert_eq!(dead["agent"]["running"], false, "{dead}");
        assert!(
            dead["problems"]
                .to_string()
                .contains("the agent is not running"),
            "{dead}"
        );
        for part in ["datapath", "device"] {
            assert_eq!(dead[part], alive[part], "{part} with {flags:?}");
        }
        assert_eq!(of_ipv4(&dead), of_ipv4(&alive), "{flags:?}");
        assert_eq!(dead["lease"]["subnet"], "10.244.1.0/24");
        assert_eq!(rig.peers(0), peers);
        assert_eq!(peers[0]["subnet"], "10.244.2.0/24", "{peers}");
        assert_eq!(peers[0]["vtep"], "192.168.77.12", "{peers}");
        assert_eq!(peers[0]["kernel_complete"], true, "{peers}");
    }
}

/// What eBPF has counted but for what is not IPv4: the kernel's own router solicitations come when they will.
fn of_ipv4(status: &serde_json::Value) -> serde_json::Value {
    let mut counters = status["counters"].clone();
    if let Some(left) = counters["not_carried"].as_array_mut() {
        left.retain(|entry| entry["reason"] != "not_ipv4");
    }
    counters
}
