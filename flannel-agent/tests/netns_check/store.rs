//! Stores that do not answer, and configurations that cannot be used.

use std::fs;

use flannel_testkit::{AgentProcess, Etcd, privileged, process};

use crate::{
    assert_fails, assert_healthy, assert_warns, check, check_with, ended,
    rig::{NET_CONF, PATIENCE, Rig, agent_binary},
};

#[test]
fn an_etcd_that_is_absent_empty_or_right_is_told_apart() {
    if !privileged() {
        return;
    }
    let rig = Rig::new(1);
    let nobody = "--etcd-endpoints=http://127.0.0.1:1";
    let answer = check_with(&rig, 0, &[nobody]);
    assert_fails(&answer, "store", "127.0.0.1:1", "--etcd-endpoints");

    let etcd = Etcd::start(Some(rig.ns(0)), rig.node(0).ip).expect("start etcd");
    let endpoint = format!("--etcd-endpoints={}", etcd.endpoint());
    let answer = check_with(&rig, 0, &[&endpoint]);
    assert_fails(
        &answer,
        "network-config",
        "/coreos.com/network/config",
        "etcdctl put",
    );
    etcd.put("/coreos.com/network/config", NET_CONF).unwrap();
    assert_healthy(&check_with(&rig, 0, &[&endpoint]), &[]);
    let answer = check_with(&rig, 0, &[&endpoint, "--etcd-prefix=/elsewhere"]);
    assert_fails(
        &answer,
        "network-config",
        "/elsewhere/config",
        "--etcd-prefix",
    );
}

#[test]
fn without_its_store_a_node_is_still_tried() {
    if !privileged() {
        return;
    }
    let rig = Rig::start(2, &[]);
    // Nobody answers there, not even that the port is closed.
    let silent = "--etcd-endpoints=http://192.168.77.250:2379";
    let (findings, code) = check_with(&rig, 0, &[silent, "--timeout=4"]);
    assert_eq!(code, 1);
    assert_eq!(ended(&findings, "FAIL"), ["store"], "{findings:#?}");
    for name in ["underlay", "overlay", "path-mtu"] {
        assert_eq!(findings[name].0, "OK", "{findings:#?}");
    }
}

#[test]
fn a_lease_directory_that_is_absent_is_found() {
    if !privileged() {
        return;
    }
    let rig = Rig::new(1);
    let answer = check_with(&rig, 0, &["--lease-dir=/nonexistent/leases"]);
    let (findings, code) = &answer;
    assert_eq!(*code, 1, "{findings:#?}");
    let (_, found, fix) = &findings["store"];
    assert!(found.contains("/nonexistent/leases"), "{findings:#?}");
    assert!(fix.contains("--lease-dir"), "{findings:#?}");
}

#[test]
fn a_broken_configuration_is_quoted() {
    if !privileged() {
        return;
    }
    let rig = Rig::new(1);
    let dir = format!("--lease-dir={}", rig.lease_dir().display());
    for (text, found) in [
        ("{", "JSON"),
        (r#"{"Network":"10.244.0.0"}"#, "Network"),
        (
            r#"{"Network":"10.244.0.0/16","Backend":{"Type":"ipip"}}"#,
            "ipip",
        ),
    ] {
        fs::write(rig.lease_dir().join("config"), text).unwrap();
        assert_fails(
            &check_with(&rig, 0, &[&dir]),
            "network-config",
            found,
            "correct it in directory",
        );
    }
    let text = r#"{"Network":"10.244.0.0/16"}"#;
    fs::write(rig.lease_dir().join("config"), text).unwrap();
    assert_warns(
        &check_with(&rig, 0, &[&dir]),
        "network-config",
        "Backend is missing",
        "correct it",
        &[],
    );
}

/// The key that flannel reads.
const KEY: &str = "/coreos.com/network/config";

#[test]
fn the_store_of_a_running_agent_is_known_from_its_flags_and_variables() {
    if !privileged() {
        return;
    }
    let rig = Rig::new(1);
    let etcd = Etcd::start(Some(rig.ns(0)), rig.node(0).ip).expect("start etcd");
    etcd.put(KEY, NET_CONF).unwrap();
    let file = format!("--subnet-file={}", rig.subnet_file(0).display());
    let endpoint = etcd.endpoint();
    let flag = format!("--etcd-endpoints={endpoint}");
    let variable = [("FLANNELD_ETCD_ENDPOINTS", endpoint.as_str())];
    for (flags, env) in [
        (vec![flag.as_str(), &file], &[][..]),
        (vec![&file], &variable),
    ] {
        let mut agent = AgentProcess::spawn(rig.node(0), agent_binary(), &flags, env).unwrap();
        agent.wait_log("flannel is ready", PATIENCE).unwrap();
        let answer = check(&rig, 0);
        assert_healthy(&answer, &[]);
        let found = &answer.0["store"].1;
        assert!(
            found.contains(&endpoint) && found.contains("the running agent's flags"),
            "{found}"
        );
        agent.sigterm().unwrap();
        assert_eq!(agent.wait(PATIENCE).unwrap(), 0);
        let answer = check(&rig, 0);
        assert_healthy(&answer, &["agent"]);
        let found = &answer.0["store"].1;
        assert!(
            found.contains(&endpoint) && found.contains("what the agent left"),
            "{found}"
        );
    }
}

#[test]
fn a_password_is_not_printed() {
    if !privileged() {
        return;
    }
    let rig = Rig::new(1);
    let etcd = Etcd::start(Some(rig.ns(0)), rig.node(0).ip).expect("start etcd");
    let endpoint = format!("--etcd-endpoints={}", etcd.endpoint());
    let secrets = ["--etcd-username=flannel", "--etcd-password=hunter2"];
    for form in ["-otable", "-ojson"] {
        for level in ["-v=0", "-v=2"] {
            let done = rig.cli(
                0,
                &["check", form, level, &endpoint, secrets[0], secrets[1]],
            );
            assert_eq!(done.status.code(), Some(1), "{done:?}");
            assert!(done.stdout.contains("store"), "{done:?}");
            assert!(!format!("{done:?}").contains("hunter2"), "{done:?}");
        }
    }
}

#[test]
fn a_configuration_in_the_older_api_of_etcd_is_told() {
    if !privileged() {
        return;
    }
    let rig = Rig::new(1);
    let ip = rig.node(0).ip;
    let etcd = Etcd::start_with(Some(rig.ns(0)), ip, &["--enable-v2=true"]).expect("start etcd");
    let mut put = rig.ns(0).command("etcdctl");
    put.env("ETCDCTL_API", "2")
        .args(["--endpoints", &etcd.endpoint(), "set", KEY, NET_CONF]);
    process::succeed(&mut put, PATIENCE).expect("etcdctl set");
    let endpoint = format!("--etcd-endpoints={}", etcd.endpoint());
    let answer = check_with(&rig, 0, &[&endpoint]);
    assert_fails(
        &answer,
        "network-config",
        KEY,
        "has the key in its version 2 API only",
    );
}

#[test]
fn certificates_are_read() {
    if !privileged() {
        return;
    }
    let rig = Rig::new(1);
    let dir = &rig.node(0).run_dir;
    let (key, crt) = (dir.join("k.pem"), dir.join("c.pem"));
    let make = |days: &str| {
        let mut openssl = std::process::Command::new("openssl");
        openssl
            .args([
                "req",
                "-x509",
                "-newkey",
                "ec",
                "-pkeyopt",
                "ec_paramgen_curve:prime256v1",
            ])
            .args(["-nodes", "-subj", "/CN=flannel", "-days", days, "-keyout"])
            .arg(&key)
            .arg("-out")
            .arg(&crt);
        process::succeed(&mut openssl, PATIENCE).expect("openssl");
    };
    let etcd = Etcd::start(Some(rig.ns(0)), rig.node(0).ip).expect("start etcd");
    etcd.put(KEY, NET_CONF).unwrap();
    let words = [
        format!("--etcd-endpoints={}", etcd.endpoint()),
        format!("--etcd-certfile={}", crt.display()),
        format!("--etcd-keyfile={}", key.display()),
    ];
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    make("365");
    let answer = check_with(&rig, 0, &words);
    assert_healthy(&answer, &[]);
    assert_eq!(answer.0["certificates"].0, "OK", "{:#?}", answer.0);
    make("3");
    assert_warns(
        &check_with(&rig, 0, &words),
        "certificates",
        "c.pem expires in",
        "anew",
        &[],
    );
}
