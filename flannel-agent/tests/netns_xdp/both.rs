//! Both families behind one uplink, whose driver takes one program: that for IPv4 goes on with the one for IPv6. Either comes and goes
//! without the other.

use std::fs;

use flannel_common::{CounterId, Direction};
use flannel_testkit::{
    Families, Family, LabOptions, Offloads, eventually, json::bpftool_json, privileged,
    traffic::FloodPing,
};
use serde_json::Value;

use crate::{
    EVERY, NATIVE, detach, link_id, matrix, packets, pin, program,
    rig::{PATIENCE, Rig, net_conf},
    stripped,
    wire_rig::{self, End},
};

const BOTH: [Family; 2] = [Family::V4, Family::V6];

/// A lab of both families; no agent runs yet.
fn lab() -> Rig {
    let options = LabOptions {
        nodes: 2,
        offloads: Offloads::Off,
        ..LabOptions::default()
    };
    Rig::of(Families::Dual, options)
}

/// The number that `bpftool` shows as bytes.
fn number(bytes: &Value) -> Option<u64> {
    let bytes = bytes.as_array().filter(|bytes| bytes.len() == 4)?;
    let byte = |text: &Value| u64::from_str_radix(text.as_str()?.strip_prefix("0x")?, 16).ok();
    let bytes = bytes.iter().rev().map(byte);
    bytes.reduce(|high, low| Some(high? << 8 | low?)).flatten()
}

/// The program behind the one for IPv4, as `bpftool` has it.
fn behind(rig: &mut Rig, node: usize) -> Option<u64> {
    rig.look_at(Family::V4);
    ["xdp_next_frags", "xdp_next"].iter().find_map(|name| {
        let pin = rig.instance(node).join(name).display().to_string();
        let words = ["map", "lookup", "pinned", &pin, "key", "0", "0", "0", "0"];
        let shown = bpftool_json(rig.ns(node), &words).ok()?;
        number(&shown["value"])
    })
}

/// Whether that is a program on the maps of this family. One that has gone meanwhile is none.
fn is_of(rig: &mut Rig, node: usize, family: Family, program: u64) -> bool {
    rig.look_at(family);
    let Ok(shown) = bpftool_json(rig.ns(node), &["prog", "show", "id", &program.to_string()])
    else {
        return false;
    };
    let name = shown["name"].as_str().expect("its name");
    let config = rig.map_info(node, "config")["id"].clone();
    let maps = shown["map_ids"].as_array().expect("its maps");
    name.starts_with("xdp_decap") && maps.contains(&config)
}

/// Waits until the uplink's program is that for IPv4, with the one for IPv6 behind it. Their numbers.
#[track_caller]
fn wait_both(rig: &mut Rig, node: usize) -> (u64, u64) {
    eventually(PATIENCE, "one behind the other", || {
        let (first, next) = (program(rig, node)?, behind(rig, node));
        let next = next.ok_or("nothing is behind it")?;
        let right = is_of(rig, node, Family::V4, first) && is_of(rig, node, Family::V6, next);
        right
            .then_some((first, next))
            .ok_or(format!("{first}, {next}"))
    })
}

/// Waits until packets of this family are stripped, while there are some, and `status` says so.
#[track_caller]
fn wait_strips(rig: &mut Rig, node: usize, family: Family) {
    rig.look_at(family);
    let before = stripped(rig, node);
    eventually(PATIENCE, &format!("{family} is stripped"), || {
        let status = rig.status(node);
        // Alone, it is the first.
        let overlay = match &status["ipv6"] {
            second if family == Family::V6 && !second.is_null() => second,
            _ => &status,
        };
        let (xdp, now) = (&overlay["datapath"]["xdp"], stripped(rig, node));
        let said = overlay["counters"]["xdp"]["packets"].as_u64();
        let right = xdp["attached"] == true && xdp["standing"] == "works" && said > Some(before);
        (right && now > before + 100)
            .then_some(())
            .ok_or(format!("{before}, {now}, {xdp}"))
    });
}

fn flood(rig: &Rig, family: Family) -> FloodPing {
    FloodPing::start(&rig.pod(0).ns, rig.pod(1).address(family), EVERY).expect("a ping")
}

#[track_caller]
fn lost_nothing(flood: FloodPing) {
    let stats = flood.stop().expect("stop the ping");
    assert_eq!((stats.lost, stats.duplicates), (0, 0), "{stats:?}");
}

#[test]
fn everything_of_both_families_arrives() {
    if !privileged() {
        return;
    }
    let mut rig = lab();
    rig.start_all(&[NATIVE]);
    for node in 0..2 {
        wait_both(&mut rig, node);
    }
    // What is there of IPv4, with the MTU of IPv6, beside everything of IPv6.
    let (from, to) = (rig.pod(0), rig.pod(1));
    let flood_v4 = FloodPing::start(&from.ns, to.ip, 10 * EVERY).expect("a ping");
    rig.look_at(Family::V6);
    let before: Vec<u64> = (0..2).map(|node| stripped(&rig, node)).collect();
    matrix::exchange_everything(&End::of(&rig, 0), &End::of(&rig, 1), Offloads::Off);
    for (node, before) in before.into_iter().enumerate() {
        rig.look_at(Family::V6);
        let taken = stripped(&rig, node) - before;
        // Those of one family are none of the other's `from_wire`, which would leave them to the stack.
        let fast = packets(&rig, node, CounterId::FastDecap);
        assert!(taken > 300 && fast > 100, "{taken}, {fast} past the stack");
        for family in BOTH {
            rig.look_at(family);
            let mut left = wire_rig::reasons(&rig, node, Direction::Decap);
            if family == Family::V6 {
                // Fragments inside have no checksum that stands for what each of them has.
                left.remove("outer_checksum");
            }
            assert!(left.is_empty(), "{family}, not carried: {left:?}");
        }
        wait_strips(&mut rig, node, Family::V4);
    }
    lost_nothing(flood_v4);
}

#[test]
fn restarts_lose_nothing_of_either() {
    if !privileged() {
        return;
    }
    let mut rig = lab();
    rig.start_all(&[NATIVE]);
    let mut programs = wait_both(&mut rig, 1);
    rig.look_at(Family::V4);
    let link = link_id(&rig, 1);
    let floods = BOTH.map(|family| flood(&rig, family));
    for family in BOTH {
        wait_strips(&mut rig, 1, family);
    }
    for orderly in [true, false] {
        if orderly {
            assert_eq!(rig.stop_agent(1), 0);
        } else {
            rig.kill_agent(1);
        }
        for family in BOTH {
            wait_strips(&mut rig, 1, family);
        }
        rig.start_agent(1, &[NATIVE]);
        rig.wait_ready(1);
        programs = eventually(PATIENCE, "both are replaced", || {
            let now = wait_both(&mut rig, 1);
            let both = now.0 != programs.0 && now.1 != programs.1;
            both.then_some(now).ok_or(format!("{programs:?}, {now:?}"))
        });
        for family in BOTH {
            wait_strips(&mut rig, 1, family);
        }
        rig.look_at(Family::V4);
        assert_eq!(link_id(&rig, 1), link, "replaced in place");
    }
    // Whichever of the two sees it first.
    detach(&rig, 1, "xdp_decap");
    wait_both(&mut rig, 1);
    for family in BOTH {
        wait_strips(&mut rig, 1, family);
    }
    for flood in floods {
        lost_nothing(flood);
    }
}

/// All agents anew, with another network configuration.
fn change(rig: &mut Rig, families: Families) {
    for node in 0..2 {
        assert_eq!(rig.stop_agent(node), 0);
    }
    fs::write(rig.lease_dir().join("config"), net_conf(families)).expect("a configuration");
    for node in 0..2 {
        // It names the subnets of the former families alone.
        fs::remove_file(rig.subnet_file(node)).expect("remove the subnet file");
        rig.start_agent(node, &[NATIVE]);
    }
    for node in 0..2 {
        rig.wait_ready(node);
    }
}

/// The hook changes hands, and is never without a program: the driver is asked once.
#[test]
fn either_family_comes_and_goes_without_the_other() {
    if !privileged() {
        return;
    }
    let mut rig = lab();
    fs::write(rig.lease_dir().join("config"), net_conf(Families::V6)).expect("a configuration");
    rig.look_at(Family::V6);
    rig.start_all(&[NATIVE]);
    let flood_v6 = flood(&rig, Family::V6);
    wait_strips(&mut rig, 1, Family::V6);
    let link = link_id(&rig, 1);

    change(&mut rig, Families::Dual);
    wait_both(&mut rig, 1);
    rig.look_at(Family::V4);
    assert_eq!(link_id(&rig, 1), link, "taken over");
    let flood_v4 = flood(&rig, Family::V4);
    for family in BOTH {
        wait_strips(&mut rig, 1, family);
    }
    lost_nothing(flood_v6);
    rig.look_at(Family::V6);
    assert!(!fs::exists(pin(&rig, 1)).expect("look for a pin"));
    let of_v6 = rig.instance(1);

    change(&mut rig, Families::V4);
    eventually(PATIENCE, "nothing is left of IPv6", || {
        let left = (fs::exists(&of_v6).expect("look"), behind(&mut rig, 1));
        (left == (false, None))
            .then_some(())
            .ok_or(format!("{left:?}"))
    });
    wait_strips(&mut rig, 1, Family::V4);

    change(&mut rig, Families::Dual);
    wait_both(&mut rig, 1);
    rig.look_at(Family::V4);
    assert_eq!(link_id(&rig, 1), link, "never detached");
    lost_nothing(flood_v4);
    let (flood_v6, of_v4) = (flood(&rig, Family::V6), rig.instance(1));

    change(&mut rig, Families::V6);
    eventually(PATIENCE, "nothing is left of IPv4", || {
        let left = fs::exists(&of_v4).expect("look");
        (!left).then_some(()).ok_or("its directory is there")
    });
    wait_strips(&mut rig, 1, Family::V6);
    rig.look_at(Family::V6);
    assert_eq!(link_id(&rig, 1), link, "left to IPv6");
    lost_nothing(flood_v6);
}
