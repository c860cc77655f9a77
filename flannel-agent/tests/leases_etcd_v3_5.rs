//! The lease store in etcd, against the etcd 3.5 of Debian 13.

mod etcd_cases;
mod etcd_server;
mod lease_rig;

use flannel_testkit::EtcdVersion;

const ETCD: EtcdVersion = EtcdVersion::V3_5;

#[test]
fn the_server_is_what_it_is_taken_for() {
    let output = std::process::Command::new(ETCD.program())
        .arg("--version")
        .output()
        .expect("run etcd");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(said.contains("etcd Version: 3.5."), "{said}");
}
