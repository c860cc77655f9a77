//! Stores that do not answer, and configurations that cannot be used.

use std::fs;

use flannel_testkit::{Etcd, privileged};

use crate::{
    assert_fails, assert_healthy, assert_warns, check_with,
    rig::{NET_CONF, Rig},
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
