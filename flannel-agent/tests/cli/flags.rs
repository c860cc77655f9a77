//! Flags and variables of flannel's: those it has, those it had, those it never had, and how they are written.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fs,
    os::unix::{ffi::OsStrExt as _, process::CommandExt as _},
    path::Path,
    process::Command,
};

use clap::CommandFactory as _;
use flannel_agent::cli::Args;
use flannel_testkit::{AgentProcess, privileged, process};

use crate::{
    PATIENCE,
    place::{Place, binary, run},
};

/// Upstream's flags (main.go of 0.28.9 and klog's), with a value that each takes.
const UPSTREAM: [(&str, &str); 32] = [
    ("etcd-endpoints", "http://127.0.0.1:2379"),
    ("etcd-prefix", "/net"),
    ("etcd-keyfile", "/k"),
    ("etcd-certfile", "/c"),
    ("etcd-cafile", "/ca"),
    ("etcd-username", "root"),
    ("etcd-password", "x"),
    ("iface", "nope0"),
    ("iface-regex", "^nope"),
    ("iface-can-reach", "192.168.77.1"),
    ("subnet-file", "/run/flannel/subnet.env"),
    ("public-ip", "192.0.2.1"),
    ("public-ipv6", "2001:db8::1"),
    ("subnet-lease-renew-margin", "60"),
    ("ip-masq", "true"),
    ("ip-masq-fully-random-disable", "true"),
    ("kube-subnet-mgr", "false"),
    ("kube-api-url", "https://10.0.0.1:6443"),
    ("kube-annotation-prefix", "flannel.alpha.coreos.com"),
    ("kubeconfig-file", "/k"),
    ("version", "false"),
    ("healthz-ip", "0.0.0.0"),
    ("healthz-port", "0"),
    ("iptables-resync", "5"),
    ("iptables-forward-rules", "true"),
    ("ip-blackhole-route", "true"),
    ("net-config-path", "/etc/kube-flannel/net-conf.json"),
    ("set-node-network-unavailable", "true"),
    ("v", "10"),
    ("vmodule", "main=1"),
    ("log_backtrace_at", "main.go:1"),
    ("log_dir", "/var/log"),
];

const BOOLEANS: [&str; 8] = [
    "ip-masq",
    "ip-masq-fully-random-disable",
    "kube-subnet-mgr",
    "version",
    "iptables-forward-rules",
    "ip-blackhole-route",
    "set-node-network-unavailable",
    "logtostderr",
];

#[test]
fn every_flag_of_upstreams_is_read_in_each_spelling() {
    for (flag, value) in UPSTREAM {
        let mut spellings = vec![
            vec![format!("-{flag}={value}")],
            vec![format!("--{flag}={value}")],
        ];
        if BOOLEANS.contains(&flag) {
            spellings.push(vec![format!("-{flag}=F")]);
        } else {
            spellings.push(vec![format!("-{flag}"), value.to_owned()]);
            spellings.push(vec![format!("--{flag}"), value.to_owned()]);
        }
        for spelling in spellings {
            let words: Vec<&str> = spelling
                .iter()
                .map(String::as_str)
                .chain(["version"])
                .collect();
            let done = run(&words, &[]);
            assert_eq!(done.status.code(), Some(0), "{words:?}: {}", done.stderr);
        }
        let name = format!("FLANNELD_{}", flag.to_uppercase().replace('-', "_"));
        let done = run(&["version"], &[(&name, value), ("FLANNELD_NO_SUCH", "x")]);
        assert_eq!(done.status.code(), Some(0), "{name}: {}", done.stderr);
    }
    // A variable for each, read when the flag is not given.
    let mut command = Args::command();
    command.build();
    let known: BTreeMap<String, String> = command
        .get_arguments()
        .filter_map(|arg| {
            let variable = arg.get_env()?.to_string_lossy().into_owned();
            Some((arg.get_long()?.to_owned(), variable))
        })
        .collect();
    for (flag, _) in UPSTREAM {
        if !["version", "log_dir"].contains(&flag) {
            let name = format!("FLANNELD_{}", flag.to_uppercase().replace('-', "_"));
            assert_eq!(known.get(flag), Some(&name));
        }
    }
}

#[test]
fn help_is_grouped() {
    let help = run(&["--help"], &[]).stdout;
    let mut at = 0;
    for heading in [
        "Lease store:",
        "Interface:",
        "Firewall:",
        "eBPF:",
        "Kubernetes:",
        "Serving and logs:",
    ] {
        let found = help.find(&format!("\n{heading}\n"));
        let found = found.unwrap_or_else(|| panic!("no {heading} in {help}"));
        assert_eq!(
            help.matches(&format!("\n{heading}\n")).count(),
            1,
            "{heading}"
        );
        assert!(found > at, "{heading} in {help}");
        at = found;
    }
    let (_, options) = help.split_once("\nOptions:\n").expect("Options");
    let options = options.split("\n\n").next().unwrap();
    assert!(!options.contains("env:"), "without a heading: {options}");
}

#[test]
fn the_effective_flags_are_logged_without_secrets() {
    if !privileged() {
        return;
    }
    let place = Place::new();
    let secret = "xyzzy-4711";
    let endpoint = format!("http://root:{secret}@127.0.0.1:1,http://127.0.0.1:2");
    let flag = format!("-etcd-password={secret}");
    let endpoints = format!("--etcd-endpoints={endpoint}");
    for (args, env) in [
        (
            &["-etcd-username=root", &flag, &endpoints, "-v=10"][..],
            &[][..],
        ),
        (
            &["-v=10"],
            &[
                ("FLANNELD_ETCD_USERNAME", "root"),
                ("FLANNELD_ETCD_PASSWORD", secret),
                ("FLANNELD_ETCD_ENDPOINTS", &*endpoint),
            ],
        ),
        (&["-v=10", &flag, "-iface=nope0"], &[("RUST_LOG", "trace")]),
        (&["-v=10", &flag, "-no-such-flag"], &[]),
        (&["-v=ten"], &[("FLANNELD_ETCD_PASSWORD", secret)]),
        (&["--etcd-pasword", secret, "-v=10"], &[]),
        (&[&format!("--etcd-pasword={secret}")], &[]),
    ] {
        let done = place.run_bare(args, env);
        assert_eq!(done.status.code(), Some(2), "{args:?}: {}", done.stderr);
        let text = format!("{}{}", done.stdout, done.stderr);
        assert!(!text.contains(secret), "{args:?} {env:?}: {text}");
        if text.contains("CLI flags config:") {
            assert!(
                text.contains("etcdPassword:<hidden> version:false"),
                "{text}"
            );
        } else {
            assert!(text.lines().count() == 1, "{text}");
        }
    }
    let done = place.run(&["-iface=nope0", "-ip-masq"], &[]);
    let line = done.stderr.lines().next().unwrap_or_default();
    assert!(
        line.contains("INFO CLI flags config: {etcdEndpoints:http://127.0.0.1:4001,http://127.0.0.1:2379 etcdPrefix:"),
        "{line}"
    );
    assert!(
        line.contains("iface:[nope0] ifaceRegex:[] ipMasq:true "),
        "{line}"
    );
    assert!(line.ends_with("setNodeNetworkUnavailable:true}"), "{line}");
}

#[test]
fn flags_that_lead_nowhere_say_what_to_write() {
    if !privileged() {
        return;
    }
    let place = Place::new();
    for (args, needles) in [
        (
            &["--ip-masq", "true", "--iface=eth0"][..],
            &["--ip-masq=true", "ignore"][..],
        ),
        (
            &["--kube-subnet-mgr"],
            &["--kube-subnet-mgr", "--lease-dir", "leave out one"],
        ),
        (&["--kube-subnet-mgr=yes"], &["'yes'", "true or false"]),
        (&["-networks=a"], &["--networks", "--etcd-prefix"]),
        (&["-remote=10.0.0.1:1"], &["--remote", "--etcd-endpoints"]),
        (&["-listen", ":1"], &["--listen", "--etcd-endpoints"]),
        (
            &["-iface-regex=("],
            &["'('", "--iface-regex", "unclosed group"],
        ),
        (&["-iface-can-reach=gateway"], &["'gateway'", "192.168.1.1"]),
        (&["-public-ipv6=192.0.2.1"], &["'192.0.2.1'", "IPv6"]),
        (&["-healthz-port=x"], &["'x'", "--healthz-port"]),
        (&["-ip_masq"], &["--ip_masq", "did you mean --ip-masq?"]),
    ] {
        place.refuses(args, needles);
    }
    for (name, value, needles) in [
        (
            "FLANNELD_IP_MASQ",
            "maybe",
            &["'maybe'", "FLANNELD_IP_MASQ", "true or false"][..],
        ),
        (
            "FLANNELD_HEALTHZ_PORT",
            "70000",
            &["'70000'", "FLANNELD_HEALTHZ_PORT"],
        ),
        ("FLANNELD_KUBE_SUBNET_MGR", "true", &["--kube-subnet-mgr"]),
        (
            "FLANNELD_IFACE_REGEX",
            "[",
            &["'['", "FLANNELD_IFACE_REGEX"],
        ),
    ] {
        place.assert_refused(name, needles, || place.run(&[], &[(name, value)]));
    }
    place.assert_refused(
        "a variable that is no text",
        &["FLANNELD_IFACE", "UTF-8"],
        || {
            let mut command = place.node().ns.command(binary());
            command.args(place.flags());
            command.env("FLANNELD_IFACE", OsStr::from_bytes(b"eth\xff"));
            process::finish(&mut command, PATIENCE).unwrap()
        },
    );
}

#[test]
fn old_flags_and_quotes_are_warned_of() {
    if !privileged() {
        return;
    }
    let place = Place::new();
    let quoted = format!("--net-config-path=\"{}\"", place.path("x"));
    for (args, env, taken, needles) in [
        (
            &["-interface=nope7"][..],
            &[][..],
            "nope7",
            &["--interface ", "--iface"][..],
        ),
        (
            &["-logtostderr=true", "-iface=nope7"],
            &[],
            "nope7",
            &["--logtostderr"],
        ),
        (
            &["-subnet-dir", "/x", "-iface=nope7"],
            &[],
            "nope7",
            &["--subnet-dir", "--subnet-file"],
        ),
        (
            &[&quoted, "-iface=nope7"],
            &[],
            "nope7",
            &["--net-config-path has quotes"],
        ),
        (
            &["-iface=\"nope7\""],
            &[],
            "\"nope7\"",
            &["--iface has quotes"],
        ),
        (
            &[],
            &[("FLANNELD_IFACE", "'nope7'")],
            "\"nope7\"",
            &["--iface has quotes"],
        ),
        (
            &["-iface=nope7"],
            &[("FLANNELD_IPMASQ", "true")],
            "nope7",
            &["FLANNELD_IPMASQ", "FLANNELD_IP_MASQ?"],
        ),
    ] {
        let done = place.run(args, env);
        let warnings: Vec<&str> = done
            .stderr
            .lines()
            .filter(|line| line.contains(" WARN "))
            .collect();
        let [warning] = warnings[..] else {
            panic!("{args:?}: {}", done.stderr);
        };
        for needle in needles {
            assert!(warning.contains(needle), "{args:?}: {warning}");
        }
        let error = done
            .stderr
            .lines()
            .find(|line| line.contains(" ERROR "))
            .unwrap_or_default();
        assert!(error.contains(taken), "{args:?}: {}", done.stderr);
        assert_eq!(done.status.code(), Some(2), "{args:?}");
    }
}

#[test]
fn under_flannels_name_it_speaks_of_itself_by_that() {
    if !privileged() {
        return;
    }
    let place = Place::new();
    let flanneld = place.path("flanneld");
    // A copy that is still being written when another test starts a program cannot be run.
    std::os::unix::fs::symlink(binary(), &flanneld).unwrap();
    let done = process::finish(Command::new(&flanneld).arg("-bogus"), PATIENCE).unwrap();
    assert_eq!(done.status.code(), Some(2));
    assert!(done.stderr.starts_with("flanneld: "), "{}", done.stderr);
    assert!(
        done.stderr.contains("see flanneld --help"),
        "{}",
        done.stderr
    );
    let done = process::finish(
        Command::new(binary())
            .arg0("/opt/bin/flanneld")
            .arg("--help"),
        PATIENCE,
    )
    .unwrap();
    assert!(done.stdout.contains("Usage: flanneld "), "{}", done.stdout);

    // The daemon is found under that name too.
    let flags = place.flags();
    let [leases, subnet_file] = [flags[0].as_str(), flags[1].as_str()];
    let path = Path::new(&flanneld);
    let mut agent = AgentProcess::spawn(place.node(), path, &[leases, subnet_file], &[]).unwrap();
    agent.wait_log("flannel is ready", PATIENCE).unwrap();
    let comm = fs::read_to_string(format!("/proc/{}/comm", agent.pid())).unwrap();
    assert_eq!(comm, "flanneld\n");
    let status = place.run(&["status", "-o", "json"], &[]);
    assert_eq!(status.status.code(), Some(0), "{}", status.stdout);
    let cleanup = place.run(&["cleanup"], &[]);
    assert!(
        cleanup.stderr.contains("an agent is running"),
        "{cleanup:?}"
    );
}
