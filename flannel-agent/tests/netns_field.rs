//! What users of flannel have run into, from their reports: each ends well here. `docs/troubleshooting.md` names these tests.

#[path = "netns_field/crowd.rs"]
mod crowd;
mod etcd_rig;
mod gate_rig;
#[path = "netns_field/leftovers.rs"]
mod leftovers;
#[path = "netns_field/network_restart.rs"]
mod network_restart;
#[path = "netns_field/reports.rs"]
mod reports;
mod rig;
#[path = "netns_field/stalls.rs"]
mod stalls;
#[path = "netns_field/storm.rs"]
mod storm;

use std::{fs, time::Duration};

use flannel_testkit::{
    eventually,
    traffic::{FloodPing, TcpServer},
};
use rig::{PATIENCE, Rig};

/// Where pods' and other servers listen.
pub(crate) const PORT: u16 = 8080;

/// Waits until a node has all that it should, and both pods reach each other.
#[track_caller]
pub(crate) fn wait_mended(rig: &Rig, what: &str) {
    eventually(PATIENCE, what, || {
        rig.converged(0)?;
        rig.ping(0, 1)
            .and_then(|_| rig.ping(1, 0))
            .map_err(|error| format!("{error:#}"))
    });
}

/// From now on nothing is lost between the pods of the first two nodes.
#[track_caller]
pub(crate) fn assert_lossless(rig: &Rig, what: &str) {
    let flood = FloodPing::start(&rig.pod(0).ns, rig.pod(1).ip, Duration::from_millis(1));
    let flood = flood.expect("a flood of probes");
    std::thread::sleep(Duration::from_millis(300));
    let stats = flood.stop().expect("the account of a flood");
    assert!(stats.sent > 0 && stats.lost == 0, "{what}: {stats:?}");
}

/// A server in the pod of a node.
#[track_caller]
pub(crate) fn serve(rig: &Rig, node: usize) -> TcpServer {
    let pod = rig.pod(node);
    TcpServer::listen(&pod.ns, pod.ip, PORT).expect("listen")
}

/// CPU time that a process has used so far, in the kernel's ticks.
#[track_caller]
pub(crate) fn cpu_ticks(pid: u32) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("the process");
    // The name, in parentheses, may have blanks.
    let fields: Vec<&str> = stat
        .rsplit_once(')')
        .expect("a name")
        .1
        .split_whitespace()
        .collect();
    let [user, system] = [11, 12].map(|at: usize| fields[at].parse::<u64>().expect("ticks"));
    user + system
}
