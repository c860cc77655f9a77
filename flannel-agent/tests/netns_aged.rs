//! An agent that stays away: after a while its programs stand back, and the kernel's device carries what the kernel's tables say, which
//! another program may keep by then.

mod rig;

use std::time::Duration;

use flannel_common::{CounterId, Direction, DropReason, counter::REASON_ENTRIES, reason_index};
use flannel_testkit::{
    eventually, privileged,
    traffic::{FloodPing, TcpFlow},
};
use rig::{PATIENCE, Rig, per_cpu};

const EVERY: Duration = Duration::from_millis(2);
/// In bytes a second.
const RATE: u32 = 5_000_000;

fn left_to_the_kernel(rig: &Rig, node: usize) -> u64 {
    let dump = rig.map_dump(node, "reasons");
    let index = reason_index(Direction::Encap, DropReason::Stale);
    assert!(index < REASON_ENTRIES);
    per_cpu(&dump[index as usize])
}

/// What eBPF has carried of this node's packets.
fn carried(rig: &Rig, node: usize) -> u64 {
    rig.packets(node, CounterId::BpfEncap) + rig.packets(node, CounterId::FastEncap)
}

fn wait_carried_on(rig: &Rig, node: usize) {
    let at = carried(rig, node);
    eventually(PATIENCE, "eBPF carries", || {
        let now = carried(rig, node);
        (now > at + 100).then_some(()).ok_or(format!("{at}, {now}"))
    });
}

fn stands_back(mode: &str) {
    if !privileged() {
        return;
    }
    let flag = format!("--bpf-fast-path={mode}");
    let mut rig = Rig::start(2, &[&flag]);
    let (a, b) = (rig.pod(0).clone(), rig.pod(1).clone());
    let flood = FloodPing::start(&a.ns, b.ip, EVERY).unwrap();
    let back = FloodPing::start(&b.ns, a.ip, EVERY).unwrap();
    let stream = TcpFlow::start_paced(&b.ns, b.ip, &a.ns, RATE).unwrap();
    wait_carried_on(&rig, 0);
    assert_eq!(left_to_the_kernel(&rig, 0), 0);

    rig.kill_agent(0);
    wait_carried_on(&rig, 0);
    // As if the time were over.
    rig.map_write(0, "alive", 0, &1_u64.to_ne_bytes());
    let at = carried(&rig, 0);
    let left = left_to_the_kernel(&rig, 0);
    eventually(PATIENCE, "the kernel carries", || {
        let now = left_to_the_kernel(&rig, 0);
        (now > left + 200)
            .then_some(())
            .ok_or(format!("{left}, {now}"))
    });
    assert!(
        carried(&rig, 0) <= at + 10,
        "but for packets under way nothing is carried by eBPF"
    );
    let problems = rig.status(0)["problems"].to_string();
    assert!(
        problems.contains("the kernel's device carries"),
        "{problems}"
    );

    // The next agent takes over again.
    rig.start_agent(0, &[&flag]);
    rig.wait_ready(0);
    wait_carried_on(&rig, 0);
    let problems = rig.status(0)["problems"].to_string();
    assert_eq!(problems, "[]");
    let stream = stream.stop().unwrap();
    assert!(stream.longest_stall <= Duration::from_secs(1), "{stream:?}");
    for flood in [flood, back] {
        let flood = flood.stop().unwrap();
        assert_eq!(flood.lost, 0, "{flood:?}");
    }
}

#[test]
fn programs_stand_back_through_the_stack() {
    stands_back("off");
}

#[test]
fn programs_stand_back_around_the_stack() {
    stands_back("established");
}

/// After a rollback another program keeps the kernel's tables, and the maps are of the past.
#[test]
fn a_peer_that_moved_since_is_reached() {
    if !privileged() {
        return;
    }
    let mut rig = Rig::start(2, &[]);
    assert_eq!(rig.stop_agent(0), 0);
    // Node 1 gets another address, with the same MAC address; its agent publishes it. On node 0 somebody else follows that.
    let (old, new) = (rig.node(1).ip, "192.168.77.98");
    let ip = |node: usize, line: &str| rig.ns(node).ip(line).unwrap();
    ip(1, &format!("addr del {old}/24 dev eth0"));
    ip(1, &format!("addr add {new}/24 dev eth0"));
    eventually(PATIENCE, "the address is published", || {
        let lease = rig.lease(1);
        (lease.public_ip == new)
            .then_some(())
            .ok_or(lease.public_ip)
    });
    let mac = rig.lease(1).mac;
    let words = [
        "bridge",
        "fdb",
        "replace",
        &mac,
        "dev",
        "flannel.1",
        "dst",
        new,
        "self",
        "permanent",
    ];
    rig.ns(0).exec(words).unwrap();
    eventually(PATIENCE, "the maps lead to the old address", || {
        match rig.ping(0, 1) {
            // Node 1 answers at the old address until its programs know the new one.
            Ok(_) => Err("a ping passes".to_owned()),
            Err(_) => Ok(()),
        }
    });
    rig.map_write(0, "alive", 0, &1_u64.to_ne_bytes());
    eventually(PATIENCE, "the kernel knows the way", || {
        rig.ping(0, 1).map_err(|error| format!("{error:#}"))
    });
    rig.start_agent(0, &[]);
    rig.wait_ready(0);
    rig.wait_converged();
    rig.ping(0, 1).unwrap();
    assert!(carried(&rig, 0) > 0);
}

/// Where there is no kernel device there is nobody to stand back for.
#[test]
fn ebpf_alone_never_stands_back() {
    if !privileged() {
        return;
    }
    let mut rig = Rig::start(2, &["--bpf-device=veth"]);
    rig.ping(0, 1).unwrap();
    let until: Vec<Vec<u8>> = rig.map_values(0, "alive");
    assert_eq!(until, [[0; 8]]);
    rig.kill_agent(0);
    rig.ping(0, 1).unwrap();
}

/// While an agent runs, the time is always ahead, and it is said again and again.
#[test]
fn a_running_agent_is_believed() {
    if !privileged() {
        return;
    }
    let rig = Rig::start(2, &[]);
    let first = rig.map_values(0, "alive");
    eventually(PATIENCE, "it is said again", || {
        let now = rig.map_values(0, "alive");
        (now != first).then_some(()).ok_or(format!("{now:?}"))
    });
}
