//! What an agent does while nothing happens, and whether it keeps what it no longer needs. Counts alone: they are the same on every machine.

use std::{
    collections::BTreeMap,
    fs,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use flannel_testkit::{AgentProcess, Lab, LabOptions, eventually, http, privileged};

const PATIENCE: Duration = Duration::from_mins(2);
const METRICS: &str = "127.0.0.1:9476";
const PEERS: u32 = 1000;
/// For how many seconds an agent at rest is watched. It makes no difference to what is asked of it for each look.
const WATCH: &str = "25";

/// A node and its agent in a cluster of peers that are nothing but leases.
struct Place {
    agent: AgentProcess,
    leases: PathBuf,
    lab: Lab,
}

impl Place {
    fn start() -> Self {
        let lab = Lab::new(LabOptions {
            nodes: 1,
            ..LabOptions::default()
        })
        .expect("a lab");
        let node = lab.node(0);
        let dir = node.run_dir.join("leases");
        let leases = dir.join("subnets");
        fs::create_dir_all(&leases).expect("a directory");
        let conf = r#"{"Network":"10.0.0.0/8","Backend":{"Type":"vxlan"}}"#;
        fs::write(dir.join("config"), conf).expect("the configuration");
        for peer in 1..=PEERS {
            write_lease(&leases, peer, 0);
        }
        let flag = |name: &str, path: &Path| format!("--{name}={}", path.display());
        let flags = [
            flag("lease-dir", &dir),
            flag("subnet-file", &node.run_dir.join("subnet.env")),
            flag("cni-cache-dir", &node.run_dir.join("cni-cache")),
            format!("--metrics-addr={METRICS}"),
            "--ip-masq".to_owned(),
        ];
        let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
        let binary = Path::new(env!("CARGO_BIN_EXE_flannel-agent"));
        let mut agent = AgentProcess::spawn(node, binary, &flags, &[]).expect("an agent");
        agent.wait_ready(PATIENCE).expect("ready");
        let place = Self { agent, leases, lab };
        place.wait_for(PEERS, 0);
        place
    }

    /// Waits until a peer's forwarding entry is of this round.
    fn wait_for(&self, peer: u32, round: u32) {
        let wanted = mac(peer, round);
        eventually(PATIENCE, "the peer is known", || {
            let entries = self.lab.node(0).ns.command("bridge");
            let entries = text_of(entries, &["fdb", "show", "dev", "flannel.1"]);
            let known = entries.lines().any(|line| line.starts_with(&wanted));
            known.then_some(()).ok_or(format!("no {wanted}"))
        });
    }

    /// Looks at the node so far, by what they take in.
    fn looks(&self) -> BTreeMap<String, u64> {
        let address: SocketAddr = METRICS.parse().expect("an address");
        let ns = &self.lab.node(0).ns;
        let answer = http::get(ns, address, "/metrics", PATIENCE).expect("metrics");
        let lines = answer.body.lines().filter_map(|line| {
            let rest = line.strip_prefix("flannel_reconcile_runs_total{scope=\"")?;
            let (scope, count) = rest.split_once("\"} ")?;
            Some((scope.to_owned(), count.parse().ok()?))
        });
        lines.collect()
    }

    fn look_count(&self, scope: &str) -> u64 {
        self.looks().get(scope).copied().unwrap_or(0)
    }

    /// KiB that no file backs.
    fn anonymous(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.agent.pid()));
        let status = status.expect("the agent runs");
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("RssAnon:"));
        let number = line.and_then(|line| line.split_whitespace().next());
        number.expect("a number").parse().expect("a number")
    }
}

#[test]
fn an_agent_at_rest_asks_the_kernel_little_however_many_peers_there_are() {
    if !privileged() {
        return;
    }
    let place = Place::start();
    // What the start has caused has been looked at.
    let before = place.look_count("maps");
    eventually(PATIENCE, "looks at the maps", || {
        let now = place.look_count("maps") - before;
        (now >= 2).then_some(()).ok_or(format!("{now} looks"))
    });
    let before = place.looks();
    let out = place.lab.node(0).run_dir.join("strace");
    // Not to be asked for numbers meanwhile, for which it would have to look, too.
    let watched = Command::new("timeout")
        .args(["--signal=INT", WATCH, "strace"])
        .args(["-f", "-c", "-e", "trace=bpf,sendto,execve", "-o"])
        .arg(&out)
        .args(["-p", &place.agent.pid().to_string()])
        .stdin(Stdio::null())
        .output();
    let said = watched.expect("run strace").stderr;
    let after = place.looks();
    let table = fs::read_to_string(&out);
    let table = table.unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&said)));
    let calls = calls(&table);
    let looked = |scope: &str| {
        let of = |looks: &BTreeMap<String, u64>| looks.get(scope).copied().unwrap_or(0);
        of(&after) - of(&before)
    };
    let looks = looked("maps") + looked("kernel") + looked("pods");
    let readings = looked("everything");
    assert!(looks > 0, "from {before:?} to {after:?}");
    // A next hop that is confirmed from time to time is a change in the kernel: then each peer's route is looked up, too.
    let kernel = looked("kernel");
    println!(
        "{calls:?} in {looks} looks, {kernel} of them at the kernel, and {readings} readings of everything"
    );
    assert!(kernel <= 4, "from {before:?} to {after:?}");
    let of = |name: &str| calls.get(name).copied().unwrap_or(0);
    // Each peer has two entries of maps, and the network has room for 65,536, of which most are not read with everything either.
    assert!(readings > 0, "from {before:?} to {after:?}");
    let limit = looks * 25 + readings * 50;
    assert!(of("bpf") <= limit, "{} bpf(2), {limit} allowed", of("bpf"));
    // A route lookup for each peer, but not with the looks of every second.
    let limit = looks * 40 + (kernel + readings) * (u64::from(PEERS) + 100);
    assert!(
        of("sendto") <= limit,
        "{} requests, {limit} allowed",
        of("sendto")
    );
    assert_eq!(
        of("execve"),
        0,
        "nothing has changed that a program could tell"
    );
}

#[test]
fn changes_leave_no_memory_behind() {
    const ROUNDS: u32 = 40;
    const EACH: u32 = 50;
    if !privileged() {
        return;
    }
    let place = Place::start();
    let round = |round: u32| {
        for peer in 1..=EACH {
            write_lease(&place.leases, peer, round);
        }
        place.wait_for(EACH, round);
    };
    // The first rounds find out how much the changes themselves need.
    for number in 1..=ROUNDS / 4 {
        round(number);
    }
    let before = place.anonymous();
    for number in ROUNDS / 4 + 1..=ROUNDS {
        round(number);
    }
    let after = place.anonymous();
    println!(
        "{before} KiB before, {after} KiB after {} changes",
        EACH * ROUNDS
    );
    // A tenth of a KiB for each change would be three MiB.
    assert!(after < before + 2048, "from {before} KiB to {after} KiB");
}

fn mac(peer: u32, round: u32) -> String {
    let [.., a, b] = peer.to_be_bytes();
    format!("0e:00:00:{round:02x}:{a:02x}:{b:02x}")
}

/// Puts a peer's lease in place as the agents themselves do, so that nobody reads half of it.
fn write_lease(leases: &Path, peer: u32, round: u32) {
    let subnet = Ipv4Addr::from((10 << 24) | ((65_536 - peer) << 8));
    let ip = Ipv4Addr::from((172 << 24) | (16 << 16) | peer);
    let lease = format!(
        r#"{{"PublicIP":"{ip}","PublicIPv6":null,"BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"{}"}}}}"#,
        mac(peer, round)
    );
    let scratch = leases.join(format!(".{subnet}"));
    fs::write(&scratch, lease).expect("a lease");
    fs::rename(scratch, leases.join(format!("{subnet}-24"))).expect("a lease in its place");
}

fn text_of(mut command: Command, arguments: &[&str]) -> String {
    let output = command.args(arguments).output().expect("run a program");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Calls by name, of the table that `strace -c` writes: share, seconds, time of each, calls, perhaps errors, name.
fn calls(table: &str) -> BTreeMap<String, u64> {
    let rows = table.lines().filter_map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let count = words.get(3)?.parse().ok()?;
        Some(((*words.last()?).to_owned(), count))
    });
    rows.collect()
}
