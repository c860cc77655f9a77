//! More notifications of the kernel than fit into a socket.

use std::{fmt::Write as _, fs, time::Duration};

use flannel_testkit::{eventually, privileged};

use crate::{
    assert_lossless, cpu_ticks,
    rig::{DEVICE, PATIENCE, Rig},
    wait_mended,
};

/// How long the agent's CPU time is measured.
const SPELL: Duration = Duration::from_secs(4);
/// Half the period in which everything is read again: whoever hears nothing misses it at least once in three times.
const HEARD: Duration = Duration::from_secs(5);
const LINKS: usize = 200;
const EACH: usize = 4000;

/// Notifications that did not fit into the agent's sockets, as the kernel counts them.
fn drops(pid: u32) -> u64 {
    let table = fs::read_to_string(format!("/proc/{pid}/net/netlink")).expect("netlink sockets");
    let mut lines = table.lines();
    let header = lines.next().expect("a header");
    let column = |name: &str| {
        let at = header.split_whitespace().position(|word| word == name);
        at.unwrap_or_else(|| panic!("no {name} in {header}"))
    };
    let (drops, groups) = (column("Drops"), column("Groups"));
    lines
        .map(|line| line.split_whitespace().collect::<Vec<_>>())
        .filter(|fields| fields[groups] != "00000000")
        .map(|fields| fields[drops].parse::<u64>().expect("a number"))
        .sum()
}

/// Links, addresses, routes and neighbours come beside the overlay, and go.
fn storm(rig: &Rig) {
    let mut lines = String::new();
    for link in 0..LINKS {
        writeln!(lines, "link add storm{link} group 77 type bridge").unwrap();
    }
    writeln!(lines, "link set group 77 up").unwrap();
    for (number, link) in (0..EACH).zip((0..LINKS).cycle()) {
        let (high, low) = (number / 250, 1 + number % 250);
        writeln!(lines, "addr add 10.77.{high}.{low}/32 dev storm{link}").unwrap();
        writeln!(lines, "route add 10.78.{high}.{low}/32 dev storm{link}").unwrap();
        writeln!(
            lines,
            "neigh add 10.79.{high}.{low} lladdr 02:00:00:00:03:01 dev storm{link} nud permanent"
        )
        .unwrap();
    }
    writeln!(lines, "link del group 77").unwrap();
    let file = rig.node(0).run_dir.join("storm");
    fs::write(&file, lines).expect("write the batch");
    rig.ns(0)
        .exec_for(PATIENCE * 4, ["ip", "-batch", &file.display().to_string()])
        .expect("the storm");
}

/// CPU time that the agent uses while nothing happens.
fn quiet(rig: &mut Rig) -> u64 {
    let pid = rig.agent(0).pid();
    let before = cpu_ticks(pid);
    std::thread::sleep(SPELL);
    cpu_ticks(pid) - before
}

#[test]
fn a_storm_of_notifications_is_survived_and_what_it_hid_is_repaired() {
    if !privileged() {
        return;
    }
    for flags in [&[][..], &["--datapath=kernel"]] {
        let mut rig = Rig::start(2, flags);
        wait_mended(&rig, "the node is whole at first");
        let before = quiet(&mut rig);
        let pid = rig.agent(0).pid();
        rig.agent(0).signal(libc::SIGSTOP).expect("stop the agent");
        storm(&rig);
        for line in [
            "route flush dev flannel.1",
            "neigh flush dev flannel.1 nud permanent",
            "link set flannel.1 mtu 1300",
            "addr flush dev flannel.1",
        ] {
            rig.ns(0).ip(line).unwrap();
        }
        storm(&rig);
        assert!(drops(pid) > 0, "the socket has not overflowed");
        rig.agent(0).signal(libc::SIGCONT).expect("let it go on");
        wait_mended(&rig, "the node is whole again");
        eventually(PATIENCE, "the MTU is mended", || {
            let device = flannel_testkit::json::link(rig.ns(0), DEVICE).unwrap();
            (device["mtu"] == 1450)
                .then_some(())
                .ok_or(device["mtu"].clone())
        });
        // It still hears what happens.
        for _ in 0..3 {
            rig.ns(0).ip("route del 10.244.2.0/24").unwrap();
            eventually(HEARD, "the route is there again", || rig.converged(0));
        }
        // And one more with the agent awake.
        storm(&rig);
        wait_mended(&rig, "the node is whole after the second storm");
        assert_lossless(&rig, "after the storms");
        assert!(rig.agent(0).is_running() && rig.agent(0).pid() == pid);
        let after = quiet(&mut rig);
        // A spinning thread would use every tick there is; a few are a matter of when the looks fall.
        assert!(
            after <= 3 * before + 20,
            "{after} ticks in {SPELL:?}, it were {before} before the storm"
        );
    }
}
