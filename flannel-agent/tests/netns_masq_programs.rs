//! The programs that change the packet filter may be missing, old, or not do what they say.

mod masq_rig;
mod rig;

use std::{
    fs,
    path::{Path, PathBuf},
};

use flannel_testkit::{LabOptions, eventually, privileged, put_program};
use masq_rig::NFT;
use rig::{NET_CONF, PATIENCE, Rig};

const NFT_CONF: &str =
    r#"{"Network":"10.244.0.0/16","EnableNFTables":true,"Backend":{"Type":"vxlan"}}"#;
const FLAGS: [&str; 2] = ["--ip-masq", "--iptables-resync=1"];

fn rig_with(net_conf: &str) -> Rig {
    let options = LabOptions {
        nodes: 1,
        ..LabOptions::default()
    };
    Rig::with(options, net_conf)
}

fn put_script(path: &Path, text: &str) {
    put_program(path, format!("#!/bin/sh\n{text}\n"));
}

/// A directory with programs of these names in front of the real ones, for PATH.
fn in_front(rig: &Rig, programs: &[(&str, &str)]) -> String {
    let dir = rig.node(0).run_dir.join("bin");
    fs::create_dir_all(&dir).expect("make a directory");
    for (name, text) in programs {
        put_script(&dir.join(name), text);
    }
    format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", dir.display())
}

/// The agent on a machine without these programs: a script that hides their directory from it.
fn without_firewall_programs(rig: &Rig) -> PathBuf {
    let script = rig.node(0).run_dir.join("bare-agent");
    let agent = rig::agent_binary().display();
    let text = format!(
        "exec unshare --mount sh -c 'mount -t tmpfs none /usr/sbin && exec {agent} \"$@\"' sh \"$@\""
    );
    put_script(&script, &text);
    script
}

#[test]
fn without_the_programs_the_agent_says_so_once_and_runs() {
    if !privileged() {
        return;
    }
    for (conf, package) in [
        (NET_CONF, "install the package iptables"),
        (NFT_CONF, "install the package nftables"),
    ] {
        let mut rig = rig_with(conf);
        let script = without_firewall_programs(&rig);
        rig.start_binary(0, &script, &FLAGS, &[]);
        rig.wait_ready(0);
        std::thread::sleep(3 * masq_rig::RESYNC);
        let log = rig.agent(0).log();
        assert_eq!(log.matches(package).count(), 1, "{log}");
        assert!(rig.agent(0).is_running());
    }
}

#[test]
fn an_old_iptables_is_not_asked_for_what_it_does_not_know() {
    if !privileged() {
        return;
    }
    let mut rig = rig_with(NET_CONF);
    let refuse = "for word; do case $word in --wait*) echo what is $word >&2; exit 2;; esac; done; exec iptables-nft-restore \"$@\"";
    let path = in_front(
        &rig,
        &[
            ("iptables", "echo 'iptables v1.6.1'"),
            ("iptables-save", "exec iptables-nft-save"),
            ("iptables-restore", refuse),
            ("iptables-legacy", "exit 1"),
            ("iptables-nft", "exit 1"),
        ],
    );
    // What of the legacy variant's there is decides whether there is anything to list.
    rig.ns(0).exec(["iptables-legacy", "-L", "-n"]).unwrap();
    rig.start_binary(0, rig::agent_binary(), &FLAGS, &[("PATH", &path)]);
    rig.wait_ready(0);
    let saved = NFT.save(rig.ns(0), 4);
    assert!(saved.contains("-j MASQUERADE\n"), "{saved}");
    assert!(!saved.contains("--random-fully"), "{saved}");
}

#[test]
fn rules_that_do_not_stick_are_not_written_for_ever() {
    if !privileged() {
        return;
    }
    let mut rig = rig_with(NET_CONF);
    let count = rig.node(0).run_dir.join("calls");
    let nothing = format!("echo called >>{}; cat >/dev/null", count.display());
    let path = in_front(
        &rig,
        &[
            ("iptables-restore", nothing.as_str()),
            ("iptables-nft-restore", &nothing),
        ],
    );
    // Not empty, or there would be nothing to list.
    NFT.run(rig.ns(0), 4, "-A INPUT -i eth9 -j DROP");
    rig.start_binary(0, rig::agent_binary(), &FLAGS, &[("PATH", &path)]);
    rig.wait_ready(0);
    let calls = || {
        fs::read_to_string(&count)
            .unwrap_or_default()
            .lines()
            .count()
    };
    let line = "iptables does not show them as they were written";
    rig.agent(0).wait_log(line, PATIENCE).unwrap();
    let before = calls();
    std::thread::sleep(4 * masq_rig::RESYNC);
    assert_eq!(calls(), before);
    let log = rig.agent(0).log();
    assert_eq!(log.matches(line).count(), 1, "{log}");
    // Something changes: it is tried again.
    NFT.run(rig.ns(0), 4, "-A INPUT -i eth8 -j DROP");
    eventually(PATIENCE, "it is tried again", || {
        (calls() > before).then_some(()).ok_or("not yet")
    });
}

#[test]
fn the_rules_of_the_other_manager_stay_until_the_new_ones_are_in_place() {
    if !privileged() {
        return;
    }
    let mut rig = rig_with(NET_CONF);
    rig.start_agent(0, &FLAGS);
    rig.wait_ready(0);
    assert_eq!(rig.stop_agent(0), 0);
    let saved = NFT.save(rig.ns(0), 4);
    assert!(saved.contains("MASQUERADE"), "{saved}");
    fs::write(rig.lease_dir().join("config"), NFT_CONF).unwrap();
    let broken = rig.node(0).run_dir.join("broken");
    fs::write(&broken, "").unwrap();
    let fails = format!(
        "if [ \"$1\" = -f ] && [ -e {} ]; then echo no >&2; exit 1; fi; exec /usr/sbin/nft \"$@\"",
        broken.display()
    );
    let path = in_front(&rig, &[("nft", &fails)]);
    rig.start_binary(0, rig::agent_binary(), &FLAGS, &[("PATH", &path)]);
    rig.wait_ready(0);
    let line = "the nftables rules of table flannel-ipv4 cannot be put in place: nft ended with";
    rig.agent(0).wait_log(line, PATIENCE).unwrap();
    assert_eq!(NFT.save(rig.ns(0), 4), saved);
    fs::remove_file(&broken).unwrap();
    eventually(PATIENCE, "nftables has taken over", || {
        let saved = NFT.save(rig.ns(0), 4);
        (!saved.contains("FLANNEL")).then_some(()).ok_or(saved)
    });
    assert!(masq_rig::flannels(rig.ns(0)).contains("masquerade"));
    rig.agent(0)
        .wait_log("the firewall rules are in place again", PATIENCE)
        .unwrap();
}
