//! Somebody else at the port of the overlay.

use std::net::UdpSocket;

use flannel_testkit::{eventually, privileged};

use crate::{
    assert_fails, assert_healthy, check_with,
    rig::{PATIENCE, Rig},
};

/// Binds a socket once nobody has the port any more: a process that another test starts has all descriptors for a moment.
#[track_caller]
fn take(rig: &Rig, address: &str) -> UdpSocket {
    eventually(PATIENCE, "the port is free", || {
        let taken = rig.ns(0).exec(["ss", "-Hlun"]).expect("ss");
        taken.trim().is_empty().then_some(()).ok_or(taken)
    });
    let socket = rig.ns(0).run(|| UdpSocket::bind(address));
    socket.expect("take the port")
}

#[test]
fn a_port_that_a_program_has_is_named_with_the_program() {
    if !privileged() {
        return;
    }
    let rig = Rig::new(1);
    let dir = format!("--lease-dir={}", rig.lease_dir().display());
    // As C programs listen, as Go programs do, and on one address only.
    for address in ["0.0.0.0:8472", "[::]:8472", "127.0.0.1:8472"] {
        let thief = take(&rig, address);
        let answer = check_with(&rig, 0, &[&dir]);
        let pid = std::process::id();
        assert_fails(&answer, "port", &format!("pid {pid}"), "another Port");
        drop(thief);
    }
    let elsewhere = take(&rig, "[::1]:8472");
    assert_healthy(&check_with(&rig, 0, &[&dir]), &[]);
    drop(elsewhere);
}

#[test]
fn another_vxlan_device_with_our_network_identifier_is_named() {
    if !privileged() {
        return;
    }
    let rig = Rig::new(1);
    let dir = format!("--lease-dir={}", rig.lease_dir().display());
    let make = |vni: u32| {
        format!("link add stranger type vxlan id {vni} dstport 8472 dev eth0 nolearning")
    };
    rig.ns(0).ip(&make(1)).unwrap();
    rig.ns(0).ip("link set stranger up").unwrap();
    let answer = check_with(&rig, 0, &[&dir]);
    assert_fails(&answer, "port", "stranger", "ip link del stranger");
    // Another identifier on the same port is no conflict.
    rig.ns(0).ip("link del stranger").unwrap();
    rig.ns(0).ip(&make(7)).unwrap();
    rig.ns(0).ip("link set stranger up").unwrap();
    assert_healthy(&check_with(&rig, 0, &[&dir]), &[]);
    // One that takes all identifiers, as Cilium's.
    rig.ns(0).ip("link del stranger").unwrap();
    let external = "link add cilium_vxlan type vxlan external dstport 8472";
    rig.ns(0).ip(external).unwrap();
    rig.ns(0).ip("link set cilium_vxlan up").unwrap();
    let answer = check_with(&rig, 0, &[&dir]);
    assert_fails(&answer, "port", "cilium_vxlan", "another Port");
}
