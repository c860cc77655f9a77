//! The command line, and bad input of every kind: one line that names the value and the fix, exit code 2, nothing changed.

#[path = "cli/etcd.rs"]
mod etcd;
#[path = "cli/files.rs"]
mod files;
#[path = "cli/flags.rs"]
mod flags;
#[path = "cli/net_conf.rs"]
mod net_conf;
#[path = "cli/place.rs"]
mod place;

use std::{ffi::OsString, os::unix::ffi::OsStringExt as _, time::Duration};

use clap::CommandFactory as _;
use flannel_agent::cli::Args;
use flannel_testkit::{privileged, process};
use place::{Place, assert_one_line, binary, run};

const PATIENCE: Duration = Duration::from_secs(30);

#[test]
fn help_names_every_flag_within_80_columns() {
    let mut command = Args::command();
    command.build();
    let mut pages = vec![(vec!["--help"], command.clone())];
    for subcommand in command.get_subcommands() {
        let name = subcommand.get_name();
        if name != "help" {
            pages.push((vec![name, "--help"], subcommand.clone()));
        }
    }
    assert!(pages.len() > 4, "{pages:?}");
    for (args, command) in pages {
        // A wide terminal must not make it wider.
        let done = run(&args, &[("COLUMNS", "200")]);
        assert_eq!(done.status.code(), Some(0), "{args:?}");
        assert_eq!(done.stderr, "", "{args:?}");
        for line in done.stdout.lines() {
            assert!(line.chars().count() <= 80, "{args:?}: {line}");
        }
        for argument in command.get_arguments() {
            if let Some(long) = argument.get_long() {
                let flag = format!("--{long}");
                assert!(done.stdout.contains(&flag), "no {flag}: {}", done.stdout);
            }
            if let Some(variable) = argument.get_env() {
                let variable = format!("env: {}", variable.to_string_lossy());
                let text = done.stdout.split_whitespace().collect::<Vec<_>>().join(" ");
                assert!(text.contains(&variable), "no {variable}: {text}");
            }
        }
    }
    for other in [
        &["-h"][..],
        &["-help"],
        &["help"],
        &["help", "status"],
        &["status", "-h"],
    ] {
        let done = run(other, &[]);
        assert_eq!(done.status.code(), Some(0), "{other:?}");
        assert!(done.stdout.contains("Usage: flannel-agent"), "{other:?}");
    }
}

#[test]
fn the_version_is_told_in_every_spelling() {
    for args in [["--version"], ["-version"], ["-V"], ["version"]] {
        let done = run(&args, &[("FLANNELD_V", "")]);
        assert_eq!(done.status.code(), Some(0), "{args:?}");
        assert_eq!(done.stderr, "", "{args:?}");
        assert!(done.stdout.contains(env!("CARGO_PKG_VERSION")), "{args:?}");
    }
}

#[test]
fn bad_flags_are_refused() {
    if !privileged() {
        return;
    }
    let place = Place::new();
    for (args, needles) in [
        (&["--bogus"][..], &["--bogus", "--help"][..]),
        (&["-bogus=1"], &["--bogus"]),
        (&["--publicip=1.2.3.4"], &["--publicip", "--public-ip"]),
        (
            &["--public-ip=10.0.0"],
            &["'10.0.0'", "--public-ip", "192.168.1.10"],
        ),
        (&["--public-ip=fd00::1"], &["'fd00::1'", "IPv4"]),
        (&["--public-ip"], &["--public-ip", "value"]),
        (&["--datapath=fast"], &["'fast'", "auto, bpf, kernel"]),
        (&["--bpf-device=tap"], &["'tap'", "auto, vxlan, veth"]),
        (&["--bpf-attach=xdp"], &["'xdp'", "auto, tcx, clsact"]),
        (&["--bpf-xdp=generic"], &["'generic'", "auto, off, native"]),
        (
            &["--datapath=kernel", "--bpf-device=veth"],
            &["--bpf-device=veth", "--datapath=kernel"],
        ),
        (&["-v=much"], &["'much'", "whole number"]),
        (&["--subnet-lease-renew-margin=0"], &["'0'", "1 to 1439"]),
        (
            &["--subnet-lease-renew-margin=1440"],
            &["'1440'", "1 to 1439"],
        ),
        (
            &["--subnet-lease-renew-margin=soon"],
            &["'soon'", "1 to 1439"],
        ),
        (&["foo"], &["'foo'", "--help"]),
        (&["--", "foo"], &["'foo'"]),
        (&["status", "-o", "yaml"], &["'yaml'", "table, json"]),
        (&["cleanup", "--vni=16777216"], &["'16777216'", "16777215"]),
        (&["--public-ip=a\nb"], &["a\\nb"]),
        (
            &["--iface=nope0"],
            &["\"nope0\"", "--iface", "eth0:[192.168.77.11"],
        ),
        (&["--iface=10.9.9.9"], &["10.9.9.9", "--iface", "eth0"]),
        (&["--iface=a\nb"], &["a\\nb"]),
        (&["--iface=lo"], &["lo", "IPv4 address", "--iface"]),
        (
            &["--iface=nope0", "--iface=nope1"],
            &["nope0", "nope1", "eth0"],
        ),
        (&["--public-ip=10.9.9.9"], &["10.9.9.9", "--iface", "eth0"]),
    ] {
        place.refuses(args, needles);
    }
    let garbage = OsString::from_vec(b"--iface=\xff".to_vec());
    place.assert_refused("bytes that are no text", &["--iface=", "UTF-8"], || {
        let mut command = place.node().ns.command(binary());
        process::finish(command.args(place.flags()).arg(&garbage), PATIENCE).unwrap()
    });
}

#[test]
fn flags_are_read_as_go_reads_them() {
    if !privileged() {
        return;
    }
    let place = Place::new();
    // Which interface the complaint is about tells which value was taken.
    for (args, env, taken) in [
        (&["-iface=nope0"][..], &[][..], "nope0"),
        (&["-iface", "nope0", "--v=1", "-v", "1"], &[], "nope0"),
        (&[], &[("FLANNELD_IFACE", "nope1")], "nope1"),
        (&["--iface=nope0"], &[("FLANNELD_IFACE", "nope1")], "nope0"),
        (
            &["-net-config-path=/x", "-net-config-path=/y", "-iface=nope0"],
            &[],
            "nope0",
        ),
        (
            &["-iface=nope0"],
            &[
                ("FLANNELD_PUBLIC_IP", ""),
                ("FLANNELD_V", ""),
                ("FLANNELD_DATAPATH", ""),
                ("FLANNELD_SUBNET_LEASE_RENEW_MARGIN", ""),
                ("FLANNELD_ETCD_CERTFILE", ""),
                ("FLANNELD_ETCD_PASSWORD", ""),
            ],
            "nope0",
        ),
    ] {
        place.assert_refused(&format!("{args:?} {env:?}"), &[taken], || {
            place.run(args, env)
        });
    }
    place.assert_refused("an endpoint of two", &["ftp://b", "http"], || {
        let flags = place.flags();
        place.run_bare(&[&flags[1], "-etcd-endpoints", "http://a:1,ftp://b"], &[])
    });
    place.assert_refused(
        "a bad variable",
        &["'soon'", "FLANNELD_SUBNET_LEASE_RENEW_MARGIN", "1 to 1439"],
        || place.run(&[], &[("FLANNELD_SUBNET_LEASE_RENEW_MARGIN", "soon")]),
    );
}

#[test]
fn a_node_without_an_agent_says_so() {
    if !privileged() {
        return;
    }
    let place = Place::new();
    let done = place.run(&["status", "-o", "json"], &[]);
    assert_eq!(done.status.code(), Some(1), "{}", done.stderr);
    let answer: serde_json::Value = serde_json::from_str(&done.stdout).expect("JSON");
    assert_eq!(answer["ok"], false, "{answer}");
    let done = place.run(&["foo"], &[]);
    assert_one_line("foo", &done, &["'foo'"]);
}
