//! Programs that somebody detaches, pins that somebody removes, ways of attaching that change: traffic goes on over the kernel's device, the
//! loop puts everything back.

mod rig;

use std::{fs, time::Duration};

use flannel_testkit::{eventually, json::bpftool_json, privileged, traffic::FloodPing};
use rig::{
    PATIENCE, Rig,
    hooks::{self, Watch},
};

/// How long the loop may take to mend anything.
const REPAIR: Duration = Duration::from_secs(2);
const EVERY: Duration = Duration::from_millis(1);

fn flood(rig: &Rig) -> FloodPing {
    FloodPing::start(&rig.pod(0).ns, rig.pod(1).ip, EVERY).unwrap()
}

#[track_caller]
fn assert_nothing_lost(ping: FloodPing) {
    let stats = ping.stop().unwrap();
    assert_eq!(stats.lost, 0, "{stats:?}");
}

/// Until both programs are back, attached like this.
#[track_caller]
fn reattached(rig: &Rig, attach: &str) -> [u32; 2] {
    eventually(REPAIR, "the programs are attached again", || {
        hooks::hooks(rig.ns(0)).are(attach)
    })
}

#[track_caller]
fn status_is_whole(rig: &Rig) {
    eventually(REPAIR, "status has both programs", || {
        let status = rig.status(0);
        let whole = status["datapath"]["attached"]
            .as_array()
            .is_some_and(|all| all.len() == 2)
            && status["counters"].is_object()
            && status["problems"].as_array().is_some_and(Vec::is_empty);
        whole.then_some(()).ok_or_else(|| status.to_string())
    });
}

/// With the loop stopped, so that the time without programs is as long as the test wants, and then with it running.
#[test]
fn traffic_goes_on_over_the_kernel_while_links_are_detached() {
    if !privileged() {
        return;
    }
    let mut rig = Rig::start(2, &["--bpf-attach=tcx"]);
    rig.kill_agent(0);
    let ping = flood(&rig);
    let before = hooks::hooks(rig.ns(0)).are("tcx").unwrap();
    let kernel = rig.device_counters(0);
    detach_links(&rig);
    eventually(PATIENCE, "the kernel's device carries the traffic", || {
        let now = rig.device_counters(0);
        let enough = now.encap > kernel.encap + 300 && now.decap > kernel.decap + 300;
        enough
            .then_some(())
            .ok_or_else(|| format!("{now:?}, it was {kernel:?}"))
    });
    let bpf = rig.counters(0);
    rig.start_agent(0, &["--bpf-attach=tcx"]);
    rig.wait_ready(0);
    let after = reattached(&rig, "tcx");
    assert!(after[0] != before[0] && after[1] != before[1]);
    eventually(PATIENCE, "eBPF carries the traffic again", || {
        let now = rig.counters(0);
        let enough = now.encap > bpf.encap + 300 && now.decap > bpf.decap + 300;
        enough
            .then_some(())
            .ok_or_else(|| format!("{now:?}, it was {bpf:?}"))
    });
    for _ in 0..2 {
        detach_links(&rig);
        reattached(&rig, "tcx");
        status_is_whole(&rig);
    }
    assert_nothing_lost(ping);
}

fn detach_links(rig: &Rig) {
    for hook in ["to_overlay", "from_wire"] {
        let pin = rig.instance(0).join(hook).display().to_string();
        let link = bpftool_json(rig.ns(0), &["link", "show", "pinned", &pin]).unwrap();
        let id = link["id"].to_string();
        rig.ns(0)
            .exec(["bpftool", "link", "detach", "id", &id])
            .unwrap();
    }
}

#[test]
fn clsact_filters_and_qdiscs_come_back() {
    if !privileged() {
        return;
    }
    let rig = Rig::start(2, &["--bpf-attach=clsact"]);
    let places = [("eth0", "ingress"), ("flannel.1", "egress")];
    let ping = flood(&rig);
    hooks::hooks(rig.ns(0)).are("clsact").unwrap();
    for (dev, side) in places {
        rig.ns(0)
            .exec(["tc", "filter", "del", "dev", dev, side])
            .unwrap();
        reattached(&rig, "clsact");
        status_is_whole(&rig);
    }
    assert_nothing_lost(ping);
    // Not under traffic: the kernel stops a device's transmit queues whenever such a qdisc comes or goes (`qdisc_graft`).
    for (dev, _) in places {
        rig.ns(0)
            .exec(["tc", "qdisc", "del", "dev", dev, "clsact"])
            .unwrap();
        reattached(&rig, "clsact");
        status_is_whole(&rig);
    }
    rig.ping(0, 1).unwrap();
}

#[test]
fn removed_pins_come_back() {
    if !privileged() {
        return;
    }
    let rig = Rig::start(2, &["--bpf-attach=tcx"]);
    let ping = flood(&rig);
    let dir = rig.instance(0);
    let maps = || rig::dump::pins(&rig.maps_dir(0));
    let before = maps();
    assert_eq!(before.len(), 11, "{before:?}");

    // The links alone: this detaches.
    for hook in ["to_overlay", "from_wire"] {
        fs::remove_file(dir.join(hook)).unwrap();
        reattached(&rig, "tcx");
        status_is_whole(&rig);
    }
    assert_eq!(maps(), before);

    // One map, which the programs and the agent go on using.
    fs::remove_file(rig.map_pin(0, "nodes")).unwrap();
    eventually(REPAIR, "the map is pinned again, and the same", || {
        let now = maps();
        (now == before)
            .then_some(())
            .ok_or_else(|| format!("{now:?}"))
    });
    status_is_whole(&rig);

    // Everything.
    fs::remove_dir_all(&dir).unwrap();
    reattached(&rig, "tcx");
    eventually(REPAIR, "the maps are pinned again, and the same", || {
        let now = maps();
        (now == before)
            .then_some(())
            .ok_or_else(|| format!("{now:?}"))
    });
    status_is_whole(&rig);
    rig.wait_converged();
    assert_nothing_lost(ping);
}

/// Restarts node 0 with other flags under traffic. In between there may be two programs at a hook or none, but nothing is lost.
fn switch(rig: &mut Rig, flags: &[&str]) {
    rig.stop_agent(0);
    rig.start_agent(0, flags);
    rig.wait_ready(0);
}

#[test]
fn another_way_of_attaching_leaves_one_program_per_hook() {
    if !privileged() {
        return;
    }
    let (tcx, clsact) = (&["--bpf-attach=tcx"][..], &["--bpf-attach=clsact"][..]);
    let mut rig = Rig::start(2, tcx);
    // Adding such a qdisc stops a device's transmit queues for a moment (`qdisc_graft`): not our doing.
    for dev in ["eth0", "flannel.1"] {
        rig.ns(0)
            .exec(["tc", "qdisc", "add", "dev", dev, "clsact"])
            .unwrap();
    }
    let ping = flood(&rig);
    let watch = Watch::start(rig.ns(0));
    for (flags, attach) in [(clsact, "clsact"), (tcx, "tcx"), (clsact, "clsact")] {
        switch(&mut rig, flags);
        reattached(&rig, attach);
        status_is_whole(&rig);
    }
    let seen = watch.stop();
    assert!(
        seen.iter()
            .all(|look| !look.to_overlay.is_empty() && !look.from_wire.is_empty()),
        "never none: {seen:?}"
    );

    // The kernel's device alone: nothing may go on with maps that nobody writes any more, whichever way it was attached.
    for flags in [clsact, tcx] {
        switch(&mut rig, flags);
        switch(&mut rig, &["--datapath=kernel"]);
        let now = hooks::hooks(rig.ns(0));
        assert_eq!(now, hooks::Hooks::default(), "after {flags:?}");
        assert!(!rig.instance(0).exists());
        let kernel = rig.device_counters(0);
        eventually(PATIENCE, "the kernel's device carries the traffic", || {
            let now = rig.device_counters(0);
            let enough = now.encap > kernel.encap + 100 && now.decap > kernel.decap + 100;
            enough
                .then_some(())
                .ok_or_else(|| format!("{now:?}, it was {kernel:?}"))
        });
    }
    switch(&mut rig, tcx);
    reattached(&rig, "tcx");
    assert_nothing_lost(ping);
}
