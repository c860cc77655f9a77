//! A cluster of thousands of nodes in etcd.

use std::{collections::BTreeMap, fmt::Write as _, fs, time::Duration};

use flannel_testkit::{Subnet, eventually, privileged};

use crate::{
    cpu_ticks,
    etcd_rig::{EtcdRig, PREFIX, value},
    rig::Peer,
};

const PEERS: u32 = 5000;
/// etcd takes so many changes at a time.
const BATCH: u32 = 100;
/// Programming so many entries in a debug build, on a machine with other things to do.
const LONG: Duration = Duration::from_mins(3);
/// Longer than the period in which everything is read again.
const SPELL: Duration = Duration::from_secs(12);
/// What one CPU has in a second.
const TICKS: u64 = 100;
/// In kB. A debug build needs 44 MB; how much more it takes from the system depends on the order in which its threads allocate.
const MEMORY: u64 = 64 << 10;

fn peer(number: u32) -> (Subnet, Peer) {
    let (high, low) = (number / 250, number % 250);
    let subnet = format!("10.{}.{low}.0/24", 100 + high);
    let peer = Peer {
        public_ip: format!("192.168.{}.{}", 100 + high, 1 + low),
        mac: format!("0a:00:00:00:{high:02x}:{low:02x}"),
    };
    (subnet.parse().expect("a subnet"), peer)
}

/// Writes or deletes the leases of peers that do not exist.
fn change(rig: &EtcdRig, numbers: std::ops::Range<u32>, line: impl Fn(&str, &Peer) -> String) {
    let numbers: Vec<u32> = numbers.collect();
    for batch in numbers.chunks(BATCH as usize) {
        let mut transaction = String::from("\n");
        for number in batch {
            let (subnet, peer) = peer(*number);
            let key = format!("{PREFIX}/subnets/{}", subnet.lease_key());
            writeln!(transaction, "{}", line(&key, &peer)).unwrap();
        }
        transaction += "\n\n";
        let file = rig.lab.node(0).run_dir.join("transaction");
        fs::write(&file, transaction).expect("write a transaction");
        let script = format!(
            "ETCDCTL_API=3 etcdctl --endpoints={} txn <{}",
            rig.etcd.endpoint(),
            file.display()
        );
        let said = rig.ns(0).exec(["sh", "-c", &script]).expect("etcdctl txn");
        assert!(said.starts_with("SUCCESS"), "{said}");
    }
}

/// The largest memory that a process has had, in kB.
fn peak_memory(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("the process");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let number = line.and_then(|line| line.split_whitespace().next());
    number.expect("VmHWM").parse().expect("a number")
}

#[test]
fn five_thousand_leases_are_programmed_and_followed() {
    if !privileged() {
        return;
    }
    let conf = r#"{"Network":"10.0.0.0/8","SubnetLen":24,"SubnetMin":"10.10.0.0","Backend":{"Type":"vxlan"}}"#;
    for flags in [&[][..], &["--datapath=kernel"]] {
        let mut rig = EtcdRig::new(1, conf);
        rig.prefer(0, "10.20.1.0/24".parse().unwrap());
        let put = |key: &str, peer: &Peer| {
            let value = value(&peer.public_ip, 1, &peer.mac).replace('"', "\\\"");
            format!("put {key} \"{value}\"")
        };
        change(&rig, 0..PEERS, put);
        rig.start_agent(0, flags);
        rig.agent(0)
            .wait_log("flannel is ready", LONG)
            .unwrap_or_else(|error| panic!("{error:#}"));
        let mut want: BTreeMap<Subnet, Peer> = (0..PEERS).map(peer).collect();
        let has = |rig: &EtcdRig, want: &BTreeMap<Subnet, Peer>| {
            eventually(LONG, "the kernel has all peers", || {
                let have = rig.kernel_peers(0).map_err(|error| format!("{error:#}"))?;
                (have == *want)
                    .then_some(())
                    .ok_or(format!("{} peers", have.len()))
            });
        };
        has(&rig, &want);
        // A fifth leaves at once, and one comes.
        change(&rig, 4000..PEERS, |key, _| format!("del {key}"));
        change(&rig, PEERS..PEERS + 1, put);
        want.retain(|subnet, _| (0..4000).any(|number| peer(number).0 == *subnet));
        want.extend([peer(PEERS)]);
        has(&rig, &want);
        let pid = rig.agent(0).pid();
        let peak = peak_memory(pid);
        assert!(peak < MEMORY, "{peak} kB");
        // Everything is read again every ten seconds, which leaves room for others.
        let before = cpu_ticks(pid);
        std::thread::sleep(SPELL);
        let used = cpu_ticks(pid) - before;
        let all = TICKS * SPELL.as_secs();
        assert!(used < all / 2, "{used} of {all} ticks");
        rig.all_run();
    }
}
