//! What the agent makes of the rules, settings and traffic control it finds on a node: how the flow gate stands, and what `status`
//! says about it.

mod rig;

use std::{net::SocketAddr, path::PathBuf};

use flannel_testkit::{
    Family, Netns, Prefix, eventually, privileged, put_program,
    services::{Flavour, HostPort, Policy, Service, Services, Transport},
};
use rig::{DEVICE, PATIENCE, Rig, agent_binary};
use serde_json::Value;

const LIBERAL: &str = "net/netfilter/nf_conntrack_tcp_be_liberal";
const IGNORE_RST: &str = "net/netfilter/nf_conntrack_tcp_ignore_invalid_rst";
const LOOSE: &str = "net/netfilter/nf_conntrack_tcp_loose";

/// Waits until `status` shows this mode, with every one of these words in the reason.
#[track_caller]
fn wait_for(rig: &Rig, mode: &str, words: &[&str]) -> Value {
    eventually(PATIENCE, &format!("{mode}, {words:?}"), || {
        let fast = rig.status(0)["fast_path"].clone();
        let reason = fast["reason"].as_str().unwrap_or_default();
        if fast["mode"] == mode && words.iter().all(|word| reason.contains(word)) {
            Ok(fast)
        } else {
            Err(fast.to_string())
        }
    })
}

#[track_caller]
fn exec(ns: &Netns, line: &str) {
    ns.exec(line.split_whitespace())
        .unwrap_or_else(|error| panic!("{line}: {error:#}"));
}

/// Feeds `nft`.
#[track_caller]
fn nft(ns: &Netns, ruleset: &str) {
    ns.exec(["nft", ruleset])
        .unwrap_or_else(|error| panic!("{ruleset}: {error:#}"));
}

/// The programs that list and make rules of a family, by variant.
fn iptables(family: Family, variant: &str) -> String {
    match family {
        Family::V4 => format!("iptables-{variant}"),
        Family::V6 => format!("ip6tables-{variant}"),
    }
}

fn rules_for_every_packet(family: Family) {
    if !privileged() {
        return;
    }
    let rig = Rig::start_of(family.into(), 1, &[]);
    let ns = rig.ns(0);
    let (legacy, compat) = (iptables(family, "legacy"), iptables(family, "nft"));
    let (word, elsewhere) = match family {
        Family::V4 => ("ip", "192.0.2.0/24"),
        Family::V6 => ("ip6", "2001:db8::/32"),
    };
    let fast = wait_for(&rig, "established", &["nothing on this node"]);
    assert_eq!(fast["wanted"], "auto");
    let quota = "-A FORWARD -m quota --quota 1000000 -j ACCEPT";
    exec(ns, &format!("{legacy} {quota}"));
    let table = format!("{legacy} table filter");
    wait_for(&rig, "off", &["quota", &table, "chain FORWARD"]);
    let limit = "-R FORWARD 1 -m limit --limit 100/sec -j ACCEPT";
    exec(ns, &format!("{legacy} {limit}"));
    wait_for(&rig, "off", &["limit", &table]);
    let mark = "-t mangle -A FORWARD -j DSCP --set-dscp 8";
    exec(ns, &format!("{compat} {mark}"));
    exec(ns, &format!("{legacy} -F FORWARD"));
    let table = format!("{compat} table mangle");
    wait_for(&rig, "off", &["DSCP", &table]);
    nft(
        ns,
        "add table inet acct; add counter inet acct pods; \
         add chain inet acct f { type filter hook forward priority 0; }; \
         add rule inet acct f counter name pods",
    );
    exec(ns, &format!("{compat} -t mangle -F"));
    wait_for(&rig, "off", &["counter", "nft table inet acct"]);
    // What only names other devices and networks is nobody's business.
    nft(
        ns,
        &format!(
            "flush chain inet acct f; add rule inet acct f iifname docker0 counter name pods; \
             add rule inet acct f {word} daddr {elsewhere} counter name pods"
        ),
    );
    wait_for(&rig, "established", &["nothing on this node"]);
}

#[test]
fn rules_for_every_packet_switch_auto_off() {
    rules_for_every_packet(Family::V4);
}

#[test]
fn rules_for_every_packet_of_ipv6_switch_auto_off() {
    rules_for_every_packet(Family::V6);
}

#[test]
fn syn_stands_back_where_pods_are_filtered() {
    if !privileged() {
        return;
    }
    let rig = Rig::start(1, &["--bpf-fast-path=syn"]);
    let ns = rig.ns(0);
    assert_eq!(wait_for(&rig, "syn", &["asked for"])["wanted"], "syn");
    let victim = rig.pod(0).ip;
    exec(
        ns,
        &format!("iptables-legacy -A FORWARD -d {victim} -j DROP"),
    );
    wait_for(
        &rig,
        "established",
        &["syn was asked for", &format!("-d {victim}/32 -j DROP")],
    );
    nft(
        ns,
        "add table inet fw; add chain inet fw f { type filter hook forward priority 0; }; \
         add rule inet fw f tcp dport 23 drop",
    );
    exec(ns, "iptables-legacy -F FORWARD");
    wait_for(&rig, "established", &["chain f of nft table inet fw"]);
    nft(ns, "delete table inet fw");
    wait_for(&rig, "syn", &["asked for"]);
    ns.set_sysctl(LOOSE, "0").unwrap();
    wait_for(&rig, "established", &["nf_conntrack_tcp_loose"]);
}

/// Services, and a rule that shows that theirs were read.
fn services(family: Family, flavour: Flavour) {
    let rig = Rig::start_of(family.into(), 1, &["--bpf-fast-path=syn"]);
    let backend = SocketAddr::new(rig.pod(0).address(family), 8080);
    let (address, network) = match family {
        Family::V4 => ("10.96.0.80:80", "10.244.0.0/16"),
        Family::V6 => ("[fd00:10:96::80]:80", "fd00:10:244::/48"),
    };
    let service = Service::tcp("web", address.parse().unwrap(), &[backend])
        .with_node_port(30080, Policy::Cluster)
        .with_affinity();
    let host_port = HostPort {
        transport: Transport::Tcp,
        port: 8081,
        backend,
    };
    let network: Prefix = network.parse().unwrap();
    let services = Services::install(rig.node(0), flavour, network, &[service], &[host_port]);
    let _services = services.unwrap();
    // The rules are there before the one that shows that they were read.
    nft(
        rig.ns(0),
        "add table inet fw; add chain inet fw f { type filter hook forward priority 0; }; \
         add rule inet fw f tcp dport 23 drop",
    );
    let fast = wait_for(&rig, "established", &["nft table inet fw"]);
    let reason = fast["reason"].as_str().unwrap_or_default();
    assert!(!reason.contains("more)"), "{flavour:?}: {reason}");
    nft(rig.ns(0), "delete table inet fw");
    wait_for(&rig, "syn", &["asked for"]);
}

#[test]
fn services_of_kube_proxy_leave_syn_possible() {
    if privileged() {
        for flavour in Flavour::ALL {
            services(Family::V4, flavour);
        }
    }
}

#[test]
fn services_of_ipv6_leave_syn_possible() {
    if privileged() {
        services(Family::V6, Flavour::Nftables);
    }
}

#[test]
fn an_explicit_choice_overrides_doubts() {
    if !privileged() {
        return;
    }
    let mut rig = Rig::new(1);
    exec(
        rig.ns(0),
        "iptables-legacy -A FORWARD -m quota --quota 1000000 -j ACCEPT",
    );
    rig.start_all(&["--bpf-fast-path=established"]);
    wait_for(&rig, "established", &["asked for, although", "quota"]);
}

#[test]
fn settings_are_set_kept_set_and_left_set() {
    if !privileged() {
        return;
    }
    let mut rig = Rig::new(1);
    let read = |rig: &Rig, key| rig.ns(0).sysctl(key).unwrap();
    for key in [LIBERAL, IGNORE_RST] {
        rig.ns(0).set_sysctl(key, "0").unwrap();
    }
    let loose = read(&rig, LOOSE);
    rig.start_all(&["--bpf-fast-path=off"]);
    let fast = wait_for(&rig, "off", &["switched off"]);
    assert_eq!(fast["wanted"], "off");
    for key in [LIBERAL, IGNORE_RST] {
        assert_eq!(read(&rig, key), "0");
    }
    assert_eq!(rig.stop_agent(0), 0);

    rig.start_agent(0, &[]);
    rig.wait_ready(0);
    let fast = wait_for(&rig, "established", &[]);
    for key in [LIBERAL, IGNORE_RST] {
        assert_eq!(read(&rig, key), "1");
        assert_eq!(fast["sysctls"][key.replace('/', ".")], 1);
    }
    assert_eq!(
        fast["sysctls"][LOOSE.replace('/', ".")].to_string(),
        loose,
        "{fast}"
    );
    let log = rig.agent(0).log();
    for key in [LIBERAL, IGNORE_RST] {
        let name = key.replace('/', ".");
        let lines = log.lines().filter(|line| line.contains(&name));
        assert_eq!(lines.count(), 1, "{name} in {log}");
    }
    rig.ns(0).set_sysctl(LIBERAL, "0").unwrap();
    eventually(PATIENCE, "it is set again", || {
        match read(&rig, LIBERAL).as_str() {
            "1" => Ok(()),
            other => Err(format!("it is {other}")),
        }
    });
    assert_eq!(rig.stop_agent(0), 0);
    for key in [LIBERAL, IGNORE_RST] {
        assert_eq!(read(&rig, key), "1");
    }
    assert_eq!(read(&rig, LOOSE), loose);
}

#[test]
fn settings_that_cannot_be_set_switch_it_off() {
    if !privileged() {
        return;
    }
    let mut rig = Rig::new(1);
    rig.ns(0).set_sysctl(LIBERAL, "0").unwrap();
    let wrapper = read_only_proc(&rig);
    rig.start_binary(0, &wrapper, &["--bpf-fast-path=established"], &[]);
    rig.wait_ready(0);
    let fast = wait_for(
        &rig,
        "off",
        &["nf_conntrack_tcp_be_liberal is 0", "Read-only"],
    );
    assert_eq!(fast["wanted"], "established");
    assert_eq!(rig.ns(0).sysctl(LIBERAL).unwrap(), "0");
    // Set by somebody who may, it is as good.
    rig.ns(0).set_sysctl(LIBERAL, "1").unwrap();
    rig.ns(0).set_sysctl(IGNORE_RST, "1").unwrap();
    wait_for(&rig, "established", &[]);
}

#[test]
fn shaping_keeps_one_pod_with_the_stack_or_all() {
    if !privileged() {
        return;
    }
    let mut rig = Rig::start(1, &[]);
    let other = rig.add_pod(0);
    let ns = rig.ns(0);
    let shaped = rig.pod(0).host_if.clone();
    wait_for(&rig, "established", &[]);
    exec(
        ns,
        &format!("tc qdisc add dev {shaped} root tbf rate 100mbit burst 32kbit latency 400ms"),
    );
    exec(ns, &format!("tc qdisc add dev {} clsact", other.host_if));
    // A filter that leaves the decision to actions, of which there may be any.
    let filter = [
        "tc",
        "filter",
        "add",
        "dev",
        &other.host_if,
        "ingress",
        "bpf",
    ];
    ns.exec(filter.iter().chain(&["bytecode", "1,6 0 0 0"]))
        .unwrap();
    eventually(PATIENCE, "both pods are left to the stack", || {
        let fast = rig.status(0)["fast_path"].clone();
        let list = fast["excluded"].as_array().cloned().unwrap_or_default();
        let says = |interface: &str, word: &str| {
            list.iter().any(|pod| {
                pod["interface"] == interface
                    && pod["reason"]
                        .as_str()
                        .is_some_and(|text| text.contains(word))
            })
        };
        let both = says(&shaped, "qdisc tbf") && says(&other.host_if, "filter bpf");
        if both && list.len() == 2 && fast["mode"] == "established" {
            Ok(())
        } else {
            Err(fast.to_string())
        }
    });
    exec(
        ns,
        &format!("tc qdisc add dev {DEVICE} root tbf rate 100mbit burst 32kbit latency 400ms"),
    );
    wait_for(&rig, "off", &[&format!("qdisc tbf on {DEVICE}")]);
}

#[test]
fn the_network_configuration_chooses_and_the_flag_beats_it() {
    if !privileged() {
        return;
    }
    let conf = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan","BpfFastPath":"off"}}"#;
    let mut rig = Rig::with(
        flannel_testkit::LabOptions {
            nodes: 1,
            ..flannel_testkit::LabOptions::default()
        },
        conf,
    );
    rig.start_all(&[]);
    assert_eq!(wait_for(&rig, "off", &["switched off"])["wanted"], "off");
    assert_eq!(rig.stop_agent(0), 0);
    rig.start_agent(0, &["--bpf-fast-path=established"]);
    rig.wait_ready(0);
    let fast = wait_for(&rig, "established", &["asked for"]);
    assert_eq!(fast["wanted"], "established");
}

#[test]
fn without_ebpf_it_is_off() {
    if !privileged() {
        return;
    }
    let rig = Rig::start(1, &["--datapath=kernel", "--bpf-fast-path=established"]);
    wait_for(&rig, "off", &["eBPF is not in use", "--datapath=kernel"]);
    assert_eq!(rig.ns(0).sysctl(LIBERAL).unwrap(), "0");
}

/// A program that runs the agent with its arguments where `/proc/sys` is mounted read-only, as in most containers.
fn read_only_proc(rig: &Rig) -> PathBuf {
    let path = rig.node(0).run_dir.join("agent-in-container");
    let script = format!(
        "#!/bin/sh\nexec unshare --mount --propagation unchanged sh -c 'mount --make-rprivate / && \
         mount --bind /proc/sys /proc/sys && mount -o remount,bind,ro /proc/sys && exec {} \"$@\"' sh \"$@\"\n",
        agent_binary().display()
    );
    put_program(&path, script);
    path
}
