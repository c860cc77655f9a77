//! systemd's side of `sd_notify`, played with a socket of our own.

use std::{
    os::{
        linux::net::SocketAddrExt as _,
        unix::net::{SocketAddr, UnixDatagram},
    },
    time::{Duration, Instant},
};

use super::{configure, unconfigured};
use crate::rig::{NET_CONF, PATIENCE, Rig, agent_binary};

/// What has been heard so far, assignment by assignment.
struct Manager {
    socket: UnixDatagram,
    heard: Vec<String>,
    /// How many of them a wait has looked at.
    passed: usize,
}

impl Manager {
    fn new(socket: UnixDatagram) -> Manager {
        socket
            .set_read_timeout(Some(Duration::from_secs(1)))
            .expect("timeout");
        Manager {
            socket,
            heard: Vec::new(),
            passed: 0,
        }
    }

    /// Listens until an assignment fits that was not passed over before.
    #[track_caller]
    fn wait(&mut self, what: &str, fits: impl Fn(&str) -> bool) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            while let Some(line) = self.heard.get(self.passed) {
                self.passed += 1;
                if fits(line) {
                    return line.clone();
                }
            }
            assert!(
                Instant::now() < deadline,
                "{what} was not heard, but {:?}",
                self.heard
            );
            let mut bytes = [0; 4096];
            if let Ok(length) = self.socket.recv(&mut bytes) {
                let text = String::from_utf8(bytes[..length].to_vec()).expect("UTF-8");
                self.heard.extend(text.lines().map(str::to_owned));
            }
        }
    }

    fn count(&self, line: &str) -> usize {
        self.heard.iter().filter(|heard| *heard == line).count()
    }
}

fn follow(rig: &mut Rig, manager: &mut Manager, name: &str) {
    let env = [("NOTIFY_SOCKET", name), ("WATCHDOG_USEC", "2000000")];
    rig.start_binary(0, agent_binary(), &[], &env);
    let status = manager.wait("a reason", |line| line.contains("net-conf.json"));
    assert!(
        status.starts_with("STATUS=not ready: network-config: "),
        "{status}"
    );
    assert_eq!(manager.count("READY=1"), 0);
    configure(rig, NET_CONF);
    manager.wait("READY=1", |line| line == "READY=1");
    manager.wait("the status", |line| {
        line.starts_with("STATUS=0 peers, datapath ") && line.ends_with(", subnet 10.244.1.0/24")
    });
    assert!(rig.subnet_file(0).exists());
    rig.put_lease(
        "10.244.77.0/24".parse().expect("a subnet"),
        "192.0.2.77".parse().expect("an address"),
        "02:00:00:00:00:77",
    );
    manager.wait("the peer", |line| line.starts_with("STATUS=1 peers, "));
    for _ in 0..3 {
        manager.wait("WATCHDOG=1", |line| line == "WATCHDOG=1");
    }
    assert_eq!(rig.stop_agent(0), 0);
    manager.wait("STOPPING=1", |line| line == "STOPPING=1");
    assert_eq!(manager.count("READY=1"), 1, "{:?}", manager.heard);
    assert_eq!(
        manager.heard.last().map(String::as_str),
        Some("STATUS=stopping; the data path stays as it is")
    );
}

#[test]
fn the_service_manager_is_kept_informed() {
    let Some(mut rig) = unconfigured() else {
        return;
    };
    let path = rig.node(0).run_dir.join("notify");
    let mut manager = Manager::new(UnixDatagram::bind(&path).expect("bind"));
    follow(&mut rig, &mut manager, path.to_str().expect("UTF-8"));
}

#[test]
fn an_abstract_socket_is_one_too() {
    let Some(mut rig) = unconfigured() else {
        return;
    };
    let address = SocketAddr::from_abstract_name(b"flannel/test").expect("an address");
    // Abstract names belong to a network namespace.
    let socket = rig.ns(0).try_run(|| UnixDatagram::bind_addr(&address));
    let mut manager = Manager::new(socket.expect("enter the namespace").expect("bind"));
    follow(&mut rig, &mut manager, "@flannel/test");
}

#[test]
fn a_service_manager_that_is_gone_does_not_matter() {
    let Some(mut rig) = unconfigured() else {
        return;
    };
    configure(&rig, NET_CONF);
    let env = [("NOTIFY_SOCKET", "/nonexistent/notify")];
    rig.start_binary(0, agent_binary(), &[], &env);
    rig.wait_ready(0);
    assert!(rig.agent(0).log().contains("/nonexistent/notify"));
    assert_eq!(rig.stop_agent(0), 0);
}
