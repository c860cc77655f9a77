//! What a killed run leaves behind is found and removed, and nothing else is.

use flannel_testkit::{Capture, Etcd, Lab, LabOptions, Netns, privileged};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::Ipv4Addr;
use std::path::Path;
use std::process::{Command, Stdio};

/// Set for the copy of this test that is to be killed.
const VICTIM: &str = "FLANNEL_TESTKIT_VICTIM";

#[test]
fn the_leftovers_of_a_killed_run_are_swept() {
    if !privileged() {
        return;
    }
    if std::env::var_os(VICTIM).is_some() {
        be_the_victim();
    }
    let mut victim = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "the_leftovers_of_a_killed_run_are_swept",
            "--nocapture",
        ])
        .env(VICTIM, "1")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let pid = victim.id();
    let said = BufReader::new(victim.stdout.take().unwrap()).lines();
    let ready = said
        .map(Result::unwrap)
        .find(|line| line.contains("children"));
    victim.kill().unwrap();
    victim.wait().unwrap();
    let ready = ready.expect("the victim starts");
    let children: Vec<&str> = ready.split(' ').skip(1).collect();
    assert_eq!(children.len(), 2, "{ready}");
    let state = format!("/run/flannel-testkit/{pid}");
    // Another test process may have swept them already, if not yet to the end.
    let bystander = Lab::new(LabOptions::default()).unwrap();
    Lab::sweep_dead();
    Lab::sweep_pid(pid);
    for child in children {
        let gone = fs::read_to_string(format!("/proc/{child}/stat"));
        assert!(
            gone.is_err() || gone.unwrap().contains(") Z "),
            "{child} still runs"
        );
    }
    assert!(!Path::new(&state).exists());
    let names = Path::new("/run/netns").read_dir().unwrap();
    let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    assert_eq!(
        names
            .filter(|name| name.starts_with(&format!("fe-{pid}-")))
            .count(),
        0
    );
    assert!(bystander.node(0).ns.path().exists());
    bystander.node(0).ns.exec(["true"]).unwrap();
}

/// Starts a lab, says so, and waits to be killed.
fn be_the_victim() -> ! {
    let lab = Lab::new(LabOptions::default()).unwrap();
    let _capture = Capture::start(lab.underlay(), "br0", "").unwrap();
    let _etcd = Etcd::start(None, Ipv4Addr::LOCALHOST).unwrap();
    let mine = Command::new("ps")
        .args([
            "-o",
            "pid=,comm=",
            "--ppid",
            &std::process::id().to_string(),
        ])
        .output()
        .unwrap();
    let mine = String::from_utf8(mine.stdout).unwrap();
    let lines = mine
        .lines()
        .filter(|line| line.contains("tcpdump") || line.contains("etcd"));
    let pids: Vec<&str> = lines
        .filter_map(|line| line.split_whitespace().next())
        .collect();
    println!("\nchildren {}", pids.join(" "));
    std::io::stdout().flush().unwrap();
    loop {
        std::thread::park();
    }
}

#[test]
fn pins_of_a_node_go_with_its_lab() {
    if !privileged() {
        return;
    }
    // A bpffs of the thread's own, so that no other's pins are in sight.
    let body = || {
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        let none = None::<&str>;
        mount(none, "/", none, MsFlags::MS_SLAVE | MsFlags::MS_REC, none).unwrap();
        mount(
            Some("bpf"),
            "/sys/fs/bpf",
            Some("bpf"),
            MsFlags::empty(),
            none,
        )
        .unwrap();
        let lab = Lab::new(LabOptions::default()).unwrap();
        let root = Path::new("/sys/fs/bpf/flannel");
        let cookie = lab.node(1).ns.cookie().unwrap();
        let foreign = Netns::cookie(lab.underlay()).unwrap() ^ (1 << 40);
        for name in [
            format!("{cookie}-1/maps"),
            format!("{cookie}_20"),
            format!("{foreign}-1"),
        ] {
            fs::create_dir_all(root.join(name)).unwrap();
        }
        drop(lab);
        let left = fs::read_dir(root).unwrap();
        let left: Vec<_> = left.map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, [format!("{foreign}-1").as_str()]);
    };
    std::thread::scope(|scope| {
        let outcome = scope.spawn(body).join();
        outcome.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
}
