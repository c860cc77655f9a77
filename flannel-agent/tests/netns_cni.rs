//! The CNI plugin and the agent: a pod is on the fast path before its first packet, and off it before its address is free.

mod rig;

use std::{
    collections::BTreeMap,
    fs,
    io::{Read as _, Write as _},
    net::Ipv4Addr,
    os::unix::{fs::FileTypeExt as _, fs::PermissionsExt as _, net::UnixStream},
    path::PathBuf,
    time::Duration,
};

use flannel_common::counter::CounterId;
use flannel_testkit::{
    Pod, cni,
    cni::{Container, Runtime},
    eventually,
    json::ip_json,
    privileged,
    traffic::{self, TcpPair, TcpServer},
};
use rig::{PATIENCE, Rig, list, per_cpu};
use serde_json::{Value, json};

const PORT: u16 = 8080;
/// No container runtime of the machine itself is to be asked.
const NO_CACHE: &str = "--cni-cache-dir=/nonexistent";
/// Without `--ip-masq` the bridge plugin masquerades between nodes, and then not every packet can take the fast path.
const SYN: [&str; 3] = ["--bpf-fast-path=syn", "--ip-masq", NO_CACHE];

/// Two nodes with agents, and runtimes that make pods with the plugin.
fn start(flags: &[&str]) -> (Rig, Vec<Runtime>) {
    let mut rig = Rig::new(2);
    let flannel = cni::flannel_plugin().unwrap();
    for node in 0..2 {
        rig.start_agent(node, flags);
    }
    let runtimes = (0..2)
        .map(|node| {
            rig.wait_ready(node);
            Runtime::new(rig.node(node), &flannel).unwrap()
        })
        .collect();
    rig.wait_converged();
    (rig, runtimes)
}

fn socket(rig: &Rig, node: usize) -> PathBuf {
    rig.node(node).run_dir.join("cni.sock")
}

/// The addresses in the map `pods`.
fn known(rig: &Rig, node: usize) -> Vec<Ipv4Addr> {
    let dump = rig.map_dump(node, "pods");
    let address = |entry: &Value| {
        let key = list(&entry["key"]).iter().filter_map(Value::as_str);
        let key: Vec<u8> = key
            .filter_map(|byte| u8::from_str_radix(byte.trim_start_matches("0x"), 16).ok())
            .collect();
        Ipv4Addr::from(<[u8; 4]>::try_from(key).unwrap())
    };
    list(&dump).iter().map(address).collect()
}

/// Packets of a node by counter, as `bpftool` shows them.
fn counters(rig: &Rig, node: usize) -> BTreeMap<&'static str, u64> {
    let dump = rig.map_dump(node, "counters");
    [
        ("encap", CounterId::BpfEncap),
        ("decap", CounterId::BpfDecap),
        ("fast encap", CounterId::FastEncap),
        ("fast decap", CounterId::FastDecap),
    ]
    .map(|(name, id)| (name, per_cpu(&dump[id as usize])))
    .into()
}

/// What the agent answers to a line.
fn ask(path: &std::path::Path, line: &Value) -> Value {
    let mut stream = UnixStream::connect(path).unwrap();
    stream.write_all(format!("{line}\n").as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    serde_json::from_str(&answer).unwrap()
}

fn report(command: &str, container: &Container, pod: &Pod) -> Value {
    json!({
        "version": 1, "command": command, "container": container.id, "ifname": container.ifname,
        "pods": [{
            "address": pod.ip.to_string(), "mac": flannel_testkit::mac_text(pod.mac),
            "hostInterfaces": ["cni0", pod.host_if],
        }],
    })
}

#[test]
fn the_first_packet_takes_the_fast_path() {
    if !privileged() {
        return;
    }
    let (rig, runtimes) = start(&SYN);
    let (_, server) = runtimes[1].add_pod("server").unwrap();
    assert_eq!(known(&rig, 1), [server.ip]);
    let listener = TcpServer::listen(&server.ns, server.ip, PORT).unwrap();
    for turn in 0..3 {
        let (_, client) = runtimes[0].add_pod("client").unwrap();
        // Not a packet has been sent yet, and nobody waits here.
        assert!(known(&rig, 0).contains(&client.ip), "turn {turn}");
        let before = [counters(&rig, 0), counters(&rig, 1)];
        let mut pair = TcpPair::connect(&client.ns, listener.address, &[&listener]).unwrap();
        pair.exchange(100).unwrap();
        let after = [counters(&rig, 0), counters(&rig, 1)];
        for node in 0..2 {
            let grown = |name: &str| after[node][name] - before[node][name];
            // SYN and SYN-ACK among them: none of the packets has seen the host's stack.
            assert!(
                grown("fast encap") >= 2 && grown("fast decap") >= 2,
                "{before:?}, {after:?}"
            );
            assert_eq!(
                grown("encap") + grown("decap"),
                0,
                "turn {turn}, node {node}: {before:?}, {after:?}"
            );
        }
        pair.close().unwrap();
    }
}

#[test]
fn without_the_socket_pods_work_and_are_learnt() {
    if !privileged() {
        return;
    }
    let (rig, mut runtimes) = start(&SYN);
    for runtime in &mut runtimes {
        runtime.flannel_mut()["agentSocket"] = json!("/nonexistent/cni.sock");
    }
    let (container, pod) = runtimes[0].add_pod("pod").unwrap();
    let (_, other) = runtimes[1].add_pod("other").unwrap();
    let listener = TcpServer::listen(&other.ns, other.ip, PORT).unwrap();
    let mut pair = TcpPair::connect(&pod.ns, listener.address, &[&listener]).unwrap();
    pair.exchange(100).unwrap();
    eventually(PATIENCE, "the pod is learnt", || match known(&rig, 0) {
        known if known == [pod.ip] => Ok(()),
        known => Err(format!("{known:?}")),
    });
    runtimes[0].del(&container).unwrap();
    eventually(PATIENCE, "the pod is forgotten", || match known(&rig, 0) {
        known if known.is_empty() => Ok(()),
        known => Err(format!("{known:?}")),
    });
}

#[test]
fn a_pod_is_gone_before_its_address_is_free() {
    if !privileged() {
        return;
    }
    let (rig, runtimes) = start(&SYN);
    let (container, pod) = runtimes[0].add_pod("pod").unwrap();
    let (_, other) = runtimes[0].add_pod("other").unwrap();
    let mut all = known(&rig, 0);
    all.sort();
    assert_eq!(all, [pod.ip, other.ip]);
    // The plugin says so before it has the delegate delete, and the interface is still there.
    let answer = ask(&socket(&rig, 0), &report("del", &container, &pod));
    assert_eq!(answer["state"], "gone", "{answer}");
    assert_eq!(known(&rig, 0), [other.ip]);
    rig.ns(0).ifindex(&pod.host_if).unwrap();
    // Heard of by the bridge, it is not learnt again before it is gone.
    traffic::ping_once(&pod.ns, pod.gateway, Duration::from_secs(5)).unwrap();
    assert_eq!(known(&rig, 0), [other.ip]);
    runtimes[0].del(&container).unwrap();
    assert_eq!(known(&rig, 0), [other.ip]);
    let (_, again) = runtimes[0].add_pod("again").unwrap();
    let mut all = known(&rig, 0);
    all.sort();
    assert_eq!(all, [other.ip, again.ip]);
}

#[test]
fn what_the_kernel_does_not_show_is_not_believed() {
    if !privileged() {
        return;
    }
    let (rig, runtimes) = start(&SYN);
    let (container, pod) = runtimes[0].add_pod("pod").unwrap();
    let path = socket(&rig, 0);
    let lie = |change: &dyn Fn(&mut Value)| {
        let mut line = report("add", &container, &pod);
        line["container"] = json!("liar");
        change(&mut line["pods"][0]);
        ask(&path, &line)
    };
    for (what, answer) in [
        (
            "no such interface",
            lie(&|pod| {
                pod["address"] = json!("10.244.1.77");
                pod["hostInterfaces"] = json!(["veth00000000"]);
            }),
        ),
        (
            "the uplink",
            lie(&|pod| {
                pod["address"] = json!("10.244.1.77");
                pod["hostInterfaces"] = json!(["eth0"]);
            }),
        ),
        (
            "another node's address",
            lie(&|pod| pod["address"] = json!("10.244.2.77")),
        ),
        (
            "the gateway",
            lie(&|pod| pod["address"] = json!("10.244.1.1")),
        ),
        // A MAC address is on one port, and an address has one MAC address.
        (
            "another's MAC",
            lie(&|pod| pod["mac"] = json!("02:00:00:00:00:99")),
        ),
    ] {
        assert_ne!(answer["state"], "carried", "{what}: {answer}");
        assert!(
            known(&rig, 0).iter().all(|known| *known == pod.ip),
            "{what}"
        );
    }
    // And nobody is taken off by naming another's interface or address.
    for (what, host_if, ip) in [
        ("interface", "veth00000000".to_owned(), pod.ip),
        (
            "address",
            pod.host_if.clone(),
            Ipv4Addr::new(10, 244, 1, 99),
        ),
    ] {
        let mut line = report("del", &container, &pod);
        line["pods"][0]["hostInterfaces"] = json!([host_if]);
        line["pods"][0]["address"] = json!(ip.to_string());
        ask(&path, &line);
        let there = eventually(PATIENCE, "the pod is known", || match known(&rig, 0) {
            known if known == [pod.ip] => Ok(known),
            known => Err(format!("{what}: {known:?}")),
        });
        assert_eq!(there, [pod.ip]);
    }
}

#[test]
fn twenty_pods_at_once_are_all_carried() {
    if !privileged() {
        return;
    }
    let (rig, runtimes) = start(&["--bpf-fast-path=established", "--ip-masq", NO_CACHE]);
    let runtime = &runtimes[0];
    let pods: Vec<_> = (0..20).map(|_| runtime.container().unwrap()).collect();
    std::thread::scope(|scope| {
        for pod in &pods {
            scope.spawn(move || runtime.add(pod).unwrap());
        }
    });
    // The last of them may have had to go on without.
    eventually(PATIENCE, "all are known", || match known(&rig, 0).len() {
        20 => Ok(()),
        known => Err(format!("{known} are")),
    });
    std::thread::scope(|scope| {
        for pod in &pods {
            scope.spawn(move || runtime.del(pod).unwrap());
        }
    });
    assert_eq!(known(&rig, 0), Vec::<Ipv4Addr>::new());
    assert_eq!(runtime.reservations(), []);
}

/// Plugins may be exchanged for each other while pods live, and each finds in `subnet.env` and in the other's files what it needs.
#[test]
fn upstreams_plugin_and_ours_work_with_the_agent_and_with_each_other() {
    if !privileged() {
        return;
    }
    let (rig, mut runtimes) = start(&SYN);
    let upstream = cni::upstream_plugin().unwrap();
    let ours = cni::flannel_plugin().unwrap();
    for runtime in &mut runtimes {
        // The newest that both have and that kube-flannel has used.
        runtime.list["cniVersion"] = json!("0.3.1");
    }
    let node = &runtimes[0];
    let (_, far) = runtimes[1].add_pod("far").unwrap();
    let mut files = Vec::new();
    let plugins = [&upstream, &ours];
    for (turn, (adds, deletes)) in [(0, 1), (1, 0), (0, 0)].into_iter().enumerate() {
        node.replace_plugin(plugins[adds]).unwrap();
        let (container, pod) = node.add_pod("pod").unwrap();
        traffic::ping_once(&pod.ns, far.ip, Duration::from_secs(5)).unwrap();
        eventually(PATIENCE, "the pod is learnt", || match known(&rig, 0) {
            known if known == [pod.ip] => Ok(()),
            known => Err(format!("turn {turn}: {known:?}")),
        });
        files.push(fs::read_to_string(node.saved(&container.id)).unwrap());
        node.replace_plugin(plugins[deletes]).unwrap();
        node.del(&container).unwrap();
        assert_eq!(node.reservations(), [], "turn {turn}");
        assert!(!node.saved(&container.id).exists(), "turn {turn}");
        rig.ns(0).ifindex(&pod.host_if).unwrap_err();
    }
    // Byte for byte, but for the key by which versions before the second family named the subnet.
    let mut theirs: Value = serde_json::from_str(&files[0]).unwrap();
    let ipam = theirs["ipam"].as_object_mut().unwrap();
    let subnet = ipam.remove("subnet").unwrap();
    ipam.insert("ranges".into(), json!([[{ "subnet": subnet }]]));
    assert_eq!(theirs.to_string(), files[1]);
}

#[test]
fn the_socket_outlives_the_agent_and_cleanup_removes_it() {
    if !privileged() {
        return;
    }
    let (mut rig, runtimes) = start(&SYN);
    let path = socket(&rig, 0);
    let meta = fs::metadata(&path).unwrap();
    assert!(meta.file_type().is_socket());
    assert_eq!(meta.permissions().mode() & 0o777, 0o600);
    rig.kill_agent(0);
    assert!(path.exists());
    // Nobody answers, and pods are made all the same.
    let (container, _) = runtimes[0].add_pod("meanwhile").unwrap();
    rig.start_agent(0, &SYN);
    rig.wait_ready(0);
    let answer = ask(&path, &json!({ "version": 1, "command": "status" }));
    assert_eq!(answer["state"], "ready", "{answer}");
    let (_, pod) = runtimes[0].add_pod("after").unwrap();
    assert!(known(&rig, 0).contains(&pod.ip));
    runtimes[0].del(&container).unwrap();
    runtimes[0].status().unwrap();
    rig.stop_agent(0);
    let done = rig.cli(0, &["cleanup"]);
    assert!(done.status.success(), "{done:?}");
    assert!(!path.exists() && !rig.subnet_file(0).exists());
    let links = ip_json(rig.ns(0), &["link"]).unwrap().to_string();
    assert!(!links.contains("flannel.1"), "{links}");
}
