//! The programs that the lab runs: etcd, agents, HTTP.

use flannel_testkit::agent::Capability;
use flannel_testkit::{AgentProcess, Etcd, KernelNode, Lab, LabOptions, http, privileged};
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;
use std::time::Duration;

const SECOND: Duration = Duration::from_secs(1);

#[test]
fn etcd_keeps_its_data_over_restarts() {
    if !privileged() {
        return;
    }
    let lab = Lab::new(LabOptions::default()).unwrap();
    let mut etcd = Etcd::start(Some(lab.underlay()), Lab::GATEWAY).unwrap();
    assert!(etcd.endpoint().starts_with("http://192.168.77.1:"));
    let (key, lease) = KernelNode::set_up(lab.node(0)).unwrap().lease();
    assert_eq!(key, "10.244.1.0-24");
    let key = format!("/coreos.com/network/subnets/{key}");
    etcd.put(&key, &lease.to_string()).unwrap();
    etcd.put("-odd", "two\nlines\n").unwrap();
    // Nodes reach it over the underlay.
    let endpoint = etcd.endpoint();
    let seen = lab
        .node(1)
        .ns
        .exec(["etcdctl", "--endpoints", &endpoint, "get", &key])
        .unwrap();
    assert!(seen.contains("192.168.77.11"), "{seen}");

    etcd.stop().unwrap();
    etcd.get(&key).unwrap_err();
    etcd.restart().unwrap();
    assert_eq!(etcd.endpoint(), endpoint);
    assert_eq!(etcd.get(&key).unwrap(), Some(lease.to_string()));
    etcd.kill();
    etcd.restart().unwrap();
    assert_eq!(etcd.get("-odd").unwrap().unwrap(), "two\nlines\n");
    etcd.pause().unwrap();
    etcd.etcdctl(&["--command-timeout=200ms", "get", &key])
        .unwrap_err();
    etcd.resume().unwrap();
    assert_eq!(
        etcd.keys("/coreos.com/").unwrap(),
        std::slice::from_ref(&key)
    );
    etcd.delete(&key).unwrap();
    assert_eq!(etcd.get(&key).unwrap(), None);
    assert!(!etcd.log().is_empty());
}

#[test]
fn etcd_runs_on_loopback_without_a_lab() {
    if !privileged() {
        return;
    }
    let etcd = Etcd::start(None, Ipv4Addr::LOCALHOST).unwrap();
    etcd.put("k", "v").unwrap();
    assert_eq!(etcd.get("k").unwrap().as_deref(), Some("v"));
    let broken = Etcd::start_with(None, Ipv4Addr::LOCALHOST, &["--no-such-flag"]).unwrap_err();
    assert!(format!("{broken:#}").contains("ended with"), "{broken:#}");
}

#[test]
fn an_agent_is_awaited_and_ended() {
    if !privileged() {
        return;
    }
    let lab = Lab::new(LabOptions {
        nodes: 1,
        ..LabOptions::default()
    })
    .unwrap();
    let node = lab.node(0);
    let file = node.run_dir.join("subnet.env");
    let file = file.to_str().unwrap();
    let start = |script: &str| {
        let args = ["-c", script, "agent"];
        AgentProcess::spawn(
            node,
            Path::new("/bin/sh"),
            &args,
            &[("FLANNELD_SUBNET_FILE", file)],
        )
    };
    let mut agent =
        start("echo first; ip -br addr show eth0; echo X=1 >$FLANNELD_SUBNET_FILE; exec sleep 600")
            .unwrap();
    agent.wait_ready(10 * SECOND).unwrap();
    agent.wait_log("192.168.77.11/24", 10 * SECOND).unwrap();
    agent.wait(SECOND / 10).unwrap_err();
    agent.sigterm().unwrap();
    assert_eq!(agent.wait(10 * SECOND).unwrap(), 128 + 15);
    assert!(!agent.is_running());

    std::fs::remove_file(file).unwrap();
    let mut agent = start("echo no config >&2; exit 2").unwrap();
    let err = format!("{:#}", agent.wait_ready(30 * SECOND).unwrap_err());
    assert!(
        err.contains("no config") && err.contains("exit status: 2"),
        "{err}"
    );
    assert!(!agent.log().contains("first"), "only its own lines");
    assert_eq!(agent.wait(SECOND).unwrap(), 2);
}

#[test]
fn an_agent_can_be_held_to_few_capabilities() {
    if !privileged() {
        return;
    }
    let lab = Lab::new(LabOptions {
        nodes: 1,
        ..LabOptions::default()
    })
    .unwrap();
    let caps = [Capability::NetAdmin, Capability::NetRaw];
    let args = ["-c", "id -u; grep Cap /proc/self/status; exec sleep 600"];
    let mut agent =
        AgentProcess::spawn_with_caps(lab.node(0), Path::new("/bin/sh"), &args, &[], &caps)
            .unwrap();
    agent.wait_log("CapAmb", 10 * SECOND).unwrap();
    let log = agent.log();
    assert!(log.starts_with("0\n"), "{log}");
    for set in ["Inh", "Prm", "Eff", "Bnd"] {
        assert!(
            log.contains(&format!("Cap{set}:\t0000000000003000")),
            "{log}"
        );
    }
}

#[test]
fn an_endpoint_is_asked_inside_a_namespace() {
    if !privileged() {
        return;
    }
    let lab = Lab::new(LabOptions {
        nodes: 1,
        ..LabOptions::default()
    })
    .unwrap();
    let ns = &lab.node(0).ns;
    let listener = ns.run(|| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap());
    let address = listener.local_addr().unwrap();
    let answer = std::thread::scope(|scope| {
        scope.spawn(|| {
            let (mut stream, _) = listener.accept().unwrap();
            let mut asked = [0; 14];
            stream.read_exact(&mut asked).unwrap();
            assert_eq!(&asked, b"GET /healthz H");
            stream
                .write_all(b"HTTP/1.1 503 No\r\nA: b\r\n\r\nnot ready")
                .unwrap();
            drop(stream.shutdown(std::net::Shutdown::Write));
            drop(stream.read_to_end(&mut Vec::new()));
        });
        http::get(ns, address, "/healthz", 5 * SECOND).unwrap()
    });
    assert_eq!((answer.status, answer.body.as_str()), (503, "not ready"));
    assert_eq!(answer.headers, "A: b");
}
