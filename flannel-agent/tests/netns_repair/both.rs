//! A node with both families: mending the one leaves the other alone.

use std::{
    fs::{self, File},
    path::PathBuf,
    process::{Child, Stdio},
};

use flannel_testkit::{Families, Family, eventually, privileged, process};

use crate::{
    REPAIR,
    damages::{ALL, DEVICE_DAMAGES, Damage, FDB_DAMAGES, PEER_DAMAGES, ip},
    leases, nodes,
    rig::{PATIENCE, Rig, hooks},
    whole,
};

#[test]
fn mending_one_family_leaves_the_other_alone() {
    let all = [
        &DEVICE_DAMAGES[..],
        &PEER_DAMAGES[..2],
        &FDB_DAMAGES[..1],
        &ALL,
    ]
    .concat();
    let some = [&DEVICE_DAMAGES[..2], &ALL].concat();
    one_of_two(&[], &all);
    one_of_two(&["--bpf-attach=clsact"], &some);
    one_of_two(&["--datapath=kernel"], &some);
}

fn one_of_two(flags: &[&str], damages: &[Damage]) {
    if !privileged() {
        return;
    }
    let mut rig = nodes(Families::Dual, flags);
    let published = leases(&rig);
    for [broken, other] in [[Family::V4, Family::V6], [Family::V6, Family::V4]] {
        for (name, damage) in damages {
            let programs = hooks::hooks_of(rig.ns(0), other);
            rig.look_at(other);
            settled(&rig);
            let watch = Watch::start(&rig);
            rig.look_at(broken);
            damage(&rig);
            let what = format!("{flags:?}, {broken}: {name}");
            eventually(REPAIR, &what, || whole(&mut rig));
            assert_eq!(
                watch.stop(&rig, &other.device(1)),
                [""; 0],
                "{what}: {other}"
            );
            let now = hooks::hooks_of(rig.ns(0), other);
            assert_eq!(now.to_overlay, programs.to_overlay, "{what}: {other}");
            assert_eq!(leases(&rig), published, "{what}");
        }
    }
}

/// Waits until the kernel has made sure of the addresses of the device, of which it would tell later.
pub(crate) fn settled(rig: &Rig) {
    eventually(PATIENCE, "no tentative address", || {
        let shown = rig
            .ns(0)
            .ip(&format!("addr show dev {} tentative", rig.device()));
        let shown = shown.map_err(|error| format!("{error:#}"))?;
        shown.is_empty().then_some(()).ok_or(shown)
    });
}

/// What the kernel tells of the changes to node 0.
pub(crate) struct Watch {
    child: Child,
    file: PathBuf,
}

impl Watch {
    pub(crate) fn start(rig: &Rig) -> Watch {
        let file = rig.node(0).run_dir.join("monitor");
        let out = File::create(&file).expect("a file");
        let child = rig
            .ns(0)
            .command("ip")
            .args(["monitor", "link", "address", "route", "neigh"])
            .stdin(Stdio::null())
            .stdout(out)
            .spawn()
            .expect("ip monitor");
        let watch = Watch { child, file };
        watch.catch_up(rig);
        watch
    }

    /// Waits until it has told of all that was: it tells of one thing after the other, and last of what is changed here.
    fn catch_up(&self, rig: &Rig) {
        let told = || {
            let text = fs::read_to_string(&self.file).unwrap_or_default();
            text.matches(": lo: ").count()
        };
        let before = told();
        eventually(PATIENCE, "ip monitor listens", || {
            ip(rig, "link set lo alias probe");
            (told() > before).then_some(()).ok_or("nothing yet")
        });
    }

    /// The lines that name the device.
    pub(crate) fn stop(mut self, rig: &Rig, device: &str) -> Vec<String> {
        self.catch_up(rig);
        process::kill_and_reap(&mut self.child);
        let text = fs::read_to_string(&self.file).expect("what ip monitor said");
        let named = text.lines().filter(|line| line.contains(device));
        named.map(str::to_owned).collect()
    }
}
