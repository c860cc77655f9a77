//! Ways to etcd that lead nowhere, and its password.

use std::{fs, path::Path};

use flannel_testkit::{AgentProcess, Etcd, Lab, privileged};

use crate::{
    PATIENCE,
    place::{Place, binary, run},
};

/// Appears nowhere by accident.
const PASSWORD: &str = "xyzzy-4711";

#[test]
fn bad_ways_to_etcd_are_refused() {
    if !privileged() {
        return;
    }
    let place = Place::new();
    let garbage = place.path("garbage.pem");
    fs::write(&garbage, "nonsense").unwrap();
    let endpoint = "--etcd-endpoints=https://127.0.0.1:1";
    let with_password = format!("--etcd-endpoints=http://root:{PASSWORD}@127.0.0.1:1");
    let password = format!("--etcd-password={PASSWORD}");
    let cafile = format!("--etcd-cafile={garbage}");
    let subnet_file = &place.flags()[1];
    for (args, needles) in [
        (
            &["--etcd-endpoints=unix:///run/etcd"][..],
            &["unix:///run/etcd", "http or https"][..],
        ),
        (&["--etcd-endpoints=http://"], &["http://", "host:port"]),
        (&["--etcd-endpoints=http://a b:1"], &["a b:1", "host:port"]),
        (
            &["--etcd-endpoints=http://a:99999"],
            &["http://a:99999", "65535"],
        ),
        (&["--etcd-endpoints=http://a:x"], &["http://a:x", "65535"]),
        (&["--etcd-endpoints=,"], &["--etcd-endpoints="]),
        (
            &[&with_password],
            &["127.0.0.1:1", "--etcd-username", "--etcd-password"],
        ),
        (
            &[endpoint, "--etcd-certfile=/a"],
            &["--etcd-certfile", "--etcd-keyfile", "both"],
        ),
        (
            &[endpoint, "--etcd-keyfile=/a"],
            &["--etcd-certfile", "--etcd-keyfile", "both"],
        ),
        (
            &[endpoint, "--etcd-certfile=/nope", "--etcd-keyfile=/nope"],
            &["--etcd-certfile /nope", "No such file", "PEM"],
        ),
        (
            &[endpoint, "--etcd-cafile=/nope"],
            &["--etcd-cafile /nope", "No such file", "PEM"],
        ),
        (&[endpoint, &cafile], &[&garbage, "no certificate", "PEM"]),
        (&[&password], &["--etcd-password", "--etcd-username"]),
    ] {
        let args: Vec<&str> = args.iter().copied().chain([subnet_file.as_str()]).collect();
        place.assert_refused(&format!("{args:?}"), needles, || {
            let done = place.run_bare(&args, &[]);
            assert!(!done.stderr.contains(PASSWORD), "{}", done.stderr);
            done
        });
    }
}

#[test]
fn the_password_is_nowhere() {
    if !privileged() {
        return;
    }
    let place = Place::new();
    let etcd = Etcd::start(Some(place.lab.underlay()), Lab::GATEWAY).expect("etcd");
    etcd.put(
        "/coreos.com/network/config",
        r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#,
    )
    .unwrap();
    let endpoints = format!("--etcd-endpoints={}", etcd.endpoint());
    let password = format!("--etcd-password={PASSWORD}");
    let args = [
        &endpoints,
        "-v=10",
        "--etcd-username=root",
        &password,
        &place.flags()[1],
    ];
    let env = [("RUST_LOG", "trace")];
    let mut agent = AgentProcess::spawn(place.node(), binary(), &args, &env).unwrap();
    agent.wait_log("flannel is ready", PATIENCE).unwrap();
    let status = place.run(
        &["status", "-o", "json"],
        &[("FLANNELD_ETCD_PASSWORD", PASSWORD)],
    );
    assert_eq!(status.status.code(), Some(0), "{}", status.stderr);
    let answer: serde_json::Value = serde_json::from_str(&status.stdout).expect("JSON");
    assert_eq!(answer["ok"], true, "{answer}");
    let help = run(&["--help"], &[("FLANNELD_ETCD_PASSWORD", PASSWORD)]);

    // A real refusal of it, too.
    agent.sigterm().unwrap();
    assert_eq!(agent.wait(PATIENCE).unwrap(), 0);
    etcd.etcdctl(&["user", "add", "root:right"]).unwrap();
    etcd.etcdctl(&["user", "grant-role", "root", "root"])
        .unwrap();
    etcd.etcdctl(&["auth", "enable"]).unwrap();
    let refused = place.run_bare(&args, &env);
    assert_eq!(refused.status.code(), Some(3), "{}", refused.stderr);
    let state = fs::read_to_string(Path::new(&place.path("run/flannel-agent.json"))).unwrap();
    for text in [
        agent.log(),
        status.stdout,
        status.stderr,
        help.stdout,
        refused.stderr,
        state,
    ] {
        assert!(!text.contains(PASSWORD), "{text}");
    }
}
