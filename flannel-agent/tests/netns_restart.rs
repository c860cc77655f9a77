//! The agent may die, stop and be replaced at any moment: traffic does not notice.

mod rig;

use std::{path::Path, time::Duration};

use flannel_testkit::{
    Families, Family, eventually, privileged,
    traffic::{FloodPing, TcpFlow},
};
use rig::{
    PATIENCE, Rig, agent_binary,
    hooks::{self, Hooks, Watch},
    variant,
};
use serde_json::Value;

/// 1 kHz.
const EVERY: Duration = Duration::from_millis(1);
/// The longest time for which a TCP stream may stand still.
const STALL: Duration = Duration::from_secs(1);
/// What the stream sends, in bytes a second: less than overflows a queue on its way.
const RATE: u32 = 10_000_000;
const MAPS: [&str; 5] = ["config", "subnets", "nodes", "counters", "reasons"];

/// Both kinds of traffic from the pod of node 0 to the pod of node 1.
struct Traffic {
    ping: FloodPing,
    back: FloodPing,
    tcp: TcpFlow,
}

impl Traffic {
    fn start(rig: &Rig) -> Traffic {
        let (a, b) = (rig.pod(0), rig.pod(1));
        let [to_a, to_b] = [a, b].map(|pod| pod.address(rig.family()));
        Traffic {
            ping: FloodPing::start(&a.ns, to_b, EVERY).unwrap(),
            back: FloodPing::start(&b.ns, to_a, EVERY).unwrap(),
            tcp: TcpFlow::start_paced(&b.ns, to_b, &a.ns, RATE).unwrap(),
        }
    }

    /// Nothing was lost, nothing stood still.
    #[track_caller]
    fn assert_untouched(self) {
        let tcp = self.tcp.stop().unwrap();
        for ping in [self.ping, self.back] {
            let ping = ping.stop().unwrap();
            assert_eq!(ping.lost, 0, "{ping:?}");
            assert!(ping.sent > 100, "{ping:?}");
        }
        assert!(tcp.longest_stall <= STALL, "{tcp:?}");
    }
}

/// Waits until eBPF has carried so many packets more in both directions.
#[track_caller]
fn carried_by_bpf(rig: &Rig, node: usize, packets: u64) {
    let before = rig.counters(node);
    eventually(PATIENCE, "eBPF carries the traffic", || {
        let now = rig.counters(node);
        let enough = now.encap >= before.encap + packets && now.decap >= before.decap + packets;
        enough
            .then_some(())
            .ok_or_else(|| format!("{now:?}, it was {before:?}"))
    });
}

fn map_ids(rig: &Rig, node: usize) -> Vec<Value> {
    MAPS.map(|map| rig.map_info(node, map)["id"].clone())
        .to_vec()
}

fn tags(rig: &Rig, node: usize) -> [String; 2] {
    let ids = hooks::hooks(rig.ns(node)).one_each().unwrap();
    ids.map(|id| hooks::tag(rig.ns(node), id))
}

/// At every look there was exactly one program of ours at each hook.
#[track_caller]
fn assert_always_one(seen: &[Hooks], attach: &str, changes: usize) {
    let mut ids: Vec<[u32; 2]> = Vec::new();
    for look in seen {
        let now = look
            .are(attach)
            .unwrap_or_else(|error| panic!("{error}; all: {seen:?}"));
        // The one id changes before the other, unless a look misses that.
        if ids.last().is_none_or(|last| last[0] != now[0]) {
            ids.push(now);
        }
    }
    assert_eq!(ids.len(), changes + 1, "replaced {changes} times: {seen:?}");
}

/// Starts the agent anew and waits until its own programs are the ones that run.
fn restart(rig: &mut Rig, node: usize, binary: &Path, flags: &[&str]) {
    let before = hooks::hooks(rig.ns(node)).one_each().unwrap();
    rig.start_binary(node, binary, flags, &[]);
    rig.wait_ready(node);
    let after = hooks::hooks(rig.ns(node)).one_each().unwrap();
    assert!(
        before[0] != after[0] && before[1] != after[1],
        "ready with the programs of its predecessor: {before:?} {after:?}"
    );
    rig.wait_converged();
}

fn survives(flags: &[&str], attach: &str) {
    if !privileged() {
        return;
    }
    let mut rig = Rig::start(2, flags);
    let changed = variant::changed_agent(&rig.node(0).run_dir);
    let (maps, old_tags) = (map_ids(&rig, 0), tags(&rig, 0));
    let traffic = Traffic::start(&rig);
    let watch = if attach == "tcx" {
        Watch::start_tcx(rig.ns(0))
    } else {
        Watch::start(rig.ns(0))
    };
    carried_by_bpf(&rig, 0, 200);
    let counters = rig.counters(0);

    rig.kill_agent(0);
    carried_by_bpf(&rig, 0, 500);
    restart(&mut rig, 0, agent_binary(), flags);
    assert_eq!(
        tags(&rig, 0),
        old_tags,
        "the same build has the same programs"
    );
    carried_by_bpf(&rig, 0, 500);

    rig.kill_agent(1);
    restart(&mut rig, 1, agent_binary(), flags);

    rig.kill_agent(0);
    restart(&mut rig, 0, &changed, flags);
    let new_tags = tags(&rig, 0);
    assert!(
        new_tags[0] != old_tags[0] && new_tags[1] != old_tags[1],
        "another build has other programs: {old_tags:?} {new_tags:?}"
    );
    carried_by_bpf(&rig, 0, 500);

    assert_eq!(rig.stop_agent(0), 0);
    restart(&mut rig, 0, agent_binary(), flags);
    carried_by_bpf(&rig, 0, 500);

    assert_always_one(&watch.stop(), attach, 3);
    traffic.assert_untouched();
    assert_eq!(map_ids(&rig, 0), maps, "the maps are kept");
    let now = rig.counters(0);
    assert!(
        now.encap > counters.encap + 1000 && now.decap > counters.decap + 1000,
        "counters go on: {counters:?} {now:?}"
    );
}

#[test]
fn crash_and_upgrade_lose_nothing_with_tcx() {
    survives(&["--bpf-attach=tcx"], "tcx");
}

#[test]
fn crash_and_upgrade_lose_nothing_with_clsact() {
    survives(&["--bpf-attach=clsact"], "clsact");
}

#[test]
fn crash_and_upgrade_lose_nothing_with_ebpf_alone() {
    survives(&["--bpf-device=veth"], "tcx");
}

/// With both families, a crash and an orderly stop, and the traffic of each family goes on.
#[test]
fn crash_and_stop_lose_nothing_of_either_family() {
    if !privileged() {
        return;
    }
    let mut rig = Rig::start_of(Families::Dual, 2, &[]);
    let mut maps = Vec::new();
    let mut traffic = Vec::new();
    for family in Family::ALL {
        rig.look_at(family);
        maps.push(map_ids(&rig, 0));
        traffic.push(Traffic::start(&rig));
    }
    let all_carried = |rig: &mut Rig| {
        for family in Family::ALL {
            rig.look_at(family);
            carried_by_bpf(rig, 0, 300);
        }
    };
    all_carried(&mut rig);
    rig.kill_agent(0);
    all_carried(&mut rig);
    rig.start_agent(0, &[]);
    rig.wait_ready(0);
    all_carried(&mut rig);
    assert_eq!(rig.stop_agent(0), 0);
    all_carried(&mut rig);
    rig.start_agent(0, &[]);
    rig.wait_ready(0);
    all_carried(&mut rig);
    for (traffic, (family, maps)) in traffic.into_iter().zip(Family::ALL.into_iter().zip(maps)) {
        rig.look_at(family);
        rig.wait_converged();
        assert_eq!(map_ids(&rig, 0), maps, "the maps of {family} are kept");
        traffic.assert_untouched();
    }
}

fn stop_changes_nothing(flags: &[&str]) {
    if !privileged() {
        return;
    }
    let mut rig = Rig::start(2, flags);
    let before = rig.dump(0);
    let ping = FloodPing::start(&rig.pod(0).ns, rig.pod(1).ip, EVERY).unwrap();
    assert_eq!(rig.stop_agent(0), 0, "an orderly stop");
    before.assert_same(&rig.dump(0), "after SIGTERM");
    assert_eq!(rig.stop_agent(1), 0);
    let carries = |rig: &Rig| {
        if flags.contains(&"--datapath=kernel") {
            rig.device_counters(0)
        } else {
            rig.counters(0)
        }
    };
    let counters = carries(&rig);
    eventually(PATIENCE, "traffic goes on with no agent at all", || {
        let now = carries(&rig);
        let enough = now.encap > counters.encap + 500 && now.decap > counters.decap + 500;
        enough.then_some(()).ok_or_else(|| format!("{now:?}"))
    });
    before.assert_same(&rig.dump(0), "without an agent");
    let ping = ping.stop().unwrap();
    assert_eq!(ping.lost, 0, "{ping:?}");
}

#[test]
fn sigterm_removes_nothing_with_tcx() {
    stop_changes_nothing(&["--bpf-attach=tcx"]);
}

#[test]
fn sigterm_removes_nothing_with_clsact() {
    stop_changes_nothing(&["--bpf-attach=clsact"]);
}

#[test]
fn sigterm_removes_nothing_on_the_kernel_path() {
    stop_changes_nothing(&["--datapath=kernel"]);
}

/// An older agent with another layout of the maps has left its programs running on them.
fn layout_changes(flags: &[&str]) {
    if !privileged() {
        return;
    }
    let mut rig = Rig::start(2, flags);
    let old = map_ids(&rig, 0);
    let traffic = Traffic::start(&rig);
    rig.stop_agent(0);
    let maps = rig.maps_dir(0);
    let others = rig.instance(0).join("maps-v0");
    std::fs::rename(&maps, &others).unwrap();
    restart(&mut rig, 0, agent_binary(), flags);
    carried_by_bpf(&rig, 0, 500);
    traffic.assert_untouched();
    let new = map_ids(&rig, 0);
    assert!(old.iter().all(|id| !new.contains(id)), "{old:?} {new:?}");
    assert!(!others.exists(), "the maps of the other layout are gone");
    eventually(PATIENCE, "nothing holds the old maps", || {
        let left: Vec<_> = old
            .iter()
            .filter(|id| {
                let id = id.to_string();
                rig.ns(0)
                    .exec(["bpftool", "map", "show", "id", &id])
                    .is_ok()
            })
            .collect();
        left.is_empty()
            .then_some(())
            .ok_or_else(|| format!("{left:?}"))
    });
}

#[test]
fn another_layout_is_replaced_without_a_gap() {
    layout_changes(&[]);
}

#[test]
fn another_layout_is_replaced_without_a_gap_with_ebpf_alone() {
    layout_changes(&["--bpf-device=veth"]);
}
