//! Agents in what a container runtime makes of a manifest: its capabilities, read-only /proc/sys and /sys, no modules, its command
//! line. The store is a directory here, for there is no Kubernetes.

mod manifest_rig;
mod rig;

use std::{fs, os::unix::fs::PermissionsExt as _, path::PathBuf, time::Duration};

use anyhow::ensure;
use flannel_testkit::{eventually, privileged, traffic};
use manifest_rig::{UPSTREAM, agent, arguments, kustomize, list, objects, read, strings};
use rig::{PATIENCE, Rig, agent_binary};
use serde_json::Value;

/// Flags of the Kubernetes store and what takes its place; the rig brings the lease directory.
const STORE: [&str; 1] = ["--kube-subnet-mgr"];

/// A program that runs the agent as the container's security context has it, and a node's worth of mounts.
///
/// `setpriv` bounds the capabilities, which are what uid 0 has after the next exec.
#[track_caller]
fn container(rig: &Rig, node: usize, container: &Value) -> PathBuf {
    let context = &container["securityContext"];
    assert_eq!(context["privileged"], false, "{context}");
    let capabilities: Vec<String> = strings(&context["capabilities"]["add"])
        .iter()
        .map(|name| format!("+{}", name.to_lowercase()))
        .collect();
    let capabilities = capabilities.join(",");
    let mounts = list(&container["volumeMounts"]).iter();
    let bpffs = mounts
        .filter(|mount| mount["mountPath"] == "/sys/fs/bpf")
        .count();
    let keep = if bpffs == 1 {
        [
            "mount --bind /sys/fs/bpf /mnt",
            "mount --move /mnt /sys/fs/bpf",
        ]
    } else {
        ["", ""]
    };
    let inside = format!(
        "set -e\n{}\nmount -t sysfs -o ro sysfs /sys\n{}\n\
         mount --bind /proc/sys /proc/sys\nmount -o remount,ro,bind /proc/sys\n\
         mount -t tmpfs -o ro tmpfs /lib/modules\n\
         exec setpriv --bounding-set=-all,{capabilities} --inh-caps=-all,{capabilities} {} \"$@\"\n",
        keep[0],
        keep[1],
        agent_binary().display()
    );
    let dir = &rig.node(node).run_dir;
    let put = |name: &str, text: &str| {
        let path = dir.join(name);
        fs::write(&path, text).expect("write a script");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("make it a program");
        path
    };
    let inside = put("inside", &format!("#!/bin/sh\n{inside}"));
    let outside = format!(
        "#!/bin/sh\nmkdir -p /lib/modules\nexec unshare --mount {} \"$@\"\n",
        inside.display()
    );
    put("container", &outside)
}

/// A rig with an unconfined node and one with the container of a manifest on it, and a pod each.
fn beside_a_free_node(manifest: &str) -> Rig {
    let objects = objects(manifest);
    let agent = agent(&objects);
    let mut rig = Rig::new(2);
    rig.start_agent(0, &["--ip-masq"]);
    let program = container(&rig, 1, agent);
    let flags: Vec<&str> = arguments(agent)
        .into_iter()
        .filter(|flag| !STORE.contains(flag))
        .collect();
    assert!(flags.contains(&"--ip-masq"), "{flags:?}");
    let env = [
        ("POD_NAME", "kube-flannel-ds-x"),
        ("POD_NAMESPACE", "kube-flannel"),
        ("EVENT_QUEUE_DEPTH", "5000"),
        ("CONT_WHEN_CACHE_NOT_READY", "false"),
    ];
    rig.start_binary(1, &program, &flags, &env);
    for node in 0..2 {
        rig.wait_ready(node);
        rig.add_pod(node);
    }
    rig.wait_converged();
    rig
}

/// Ping and datagrams of all sizes in both directions.
#[track_caller]
fn exchange(rig: &Rig) {
    for (from, to) in [(0, 1), (1, 0)] {
        let (client, server) = (rig.pod(from), rig.pod(to));
        let stats = traffic::ping(&client.ns, server.ip, 20, Duration::from_millis(5))
            .unwrap_or_else(|error| panic!("ping from {from} to {to}: {error:#}"));
        assert_eq!(stats.lost, 0, "ping from {from} to {to}: {stats:?}");
        traffic::udp_echo(&server.ns, server.ip, &client.ns, &[1, 1422, 9000])
            .unwrap_or_else(|error| panic!("UDP from {from} to {to}: {error:#}"));
    }
}

#[track_caller]
fn has_rules(rig: &Rig) {
    let rules = rig.ns(1).exec(["iptables-save"]).expect("the rules");
    assert!(rules.contains("-A FLANNEL-POSTRTG"), "{rules}");
    assert!(rules.contains("-A FLANNEL-FWD"), "{rules}");
}

#[test]
fn upstreams_manifest_with_our_image_carries_traffic_on_the_kernels_device() {
    if !privileged() {
        return;
    }
    let mut rig = beside_a_free_node(UPSTREAM);
    exchange(&rig);
    has_rules(&rig);
    let status = rig.status(1);
    assert_eq!(status["ok"], true, "{status}");
    assert_eq!(status["datapath"]["mode"], "kernel", "{status}");
    let said = status["datapath"]["reason"].as_str().expect("a reason");
    assert!(said.contains("CAP_BPF"), "{said}");
    assert!(!rig.instance(1).exists(), "pins on the node");
    // Once, and nothing else: what upstream does without is no reason to complain.
    let log = rig.agent(1).log();
    let said: Vec<&str> = log
        .lines()
        .filter(|line| !line.contains(" INFO "))
        .collect();
    assert_eq!(said.len(), 1, "{log}");
    assert!(said[0].contains("CAP_BPF is missing"), "{log}");
    // The kubelet's probes.
    let ready = rig.ns(1).exec(["bash", "-c", READY]).expect("an answer");
    assert!(ready.contains("200 OK"), "{ready}");
}

/// A request as the kubelet's, to the port of upstream's manifest.
const READY: &str =
    "exec 3<>/dev/tcp/127.0.0.1/8081; printf 'GET /readyz HTTP/1.0\\r\\n\\r\\n' >&3; cat <&3";

#[test]
fn the_capabilities_of_the_overlay_are_enough_for_ebpf_and_with_two_settings_for_the_fast_path() {
    if !privileged() {
        return;
    }
    let mut rig = beside_a_free_node(&kustomize("capabilities"));
    exchange(&rig);
    has_rules(&rig);
    let status = rig.status_is_ok(1);
    assert_eq!(status["datapath"]["mode"], "bpf", "{status}");
    assert!(rig.instance(1).exists(), "no pins on the node");
    // /proc/sys is read-only: the agent cannot change what the fast path needs, and says so.
    assert_eq!(status["fast_path"]["mode"], "off", "{status}");
    let said = status["fast_path"]["reason"].as_str().expect("a reason");
    assert!(
        said.contains("nf_conntrack_tcp_be_liberal is 0 and cannot be set"),
        "{said}"
    );
    // As docs/install.md has the node set it.
    for name in [
        "nf_conntrack_tcp_be_liberal",
        "nf_conntrack_tcp_ignore_invalid_rst",
    ] {
        let setting = format!("net.netfilter.{name}=1");
        assert!(read("docs/install.md").contains(&setting), "{setting}");
        rig.ns(1).exec(["sysctl", "-w", &setting]).expect("set it");
    }
    eventually(PATIENCE, "the fast path is on", || {
        let status = rig.status(1);
        ensure!(status["fast_path"]["mode"] == "established", "{status}");
        Ok(())
    });
    exchange(&rig);
    let log = rig.agent(1).log();
    assert!(!log.contains(" ERROR "), "{log}");
}

/// In the container of deploy/cleanup.yml the command has the number that the agent had in its own.
#[test]
fn cleaning_up_from_another_container_is_not_taken_for_the_agent() {
    if !privileged() {
        return;
    }
    let mut rig = Rig::new(1);
    rig.start_agent(0, &[]);
    rig.wait_ready(0);
    rig.kill_agent(0);
    let mut state: Value =
        serde_json::from_slice(&fs::read(rig.state_file(0)).expect("the state")).expect("JSON");
    state["pid"] = 1.into();
    fs::write(rig.state_file(0), state.to_string()).expect("write the state");
    let subnet_file = rig.subnet_file(0).display().to_string();
    let agent = agent_binary().display().to_string();
    let done = rig.ns(0).exec([
        "unshare",
        "--fork",
        "--pid",
        "--mount-proc",
        &agent,
        "cleanup",
        "--keep-device",
        "--subnet-file",
        &subnet_file,
    ]);
    assert!(
        done.as_ref()
            .is_ok_and(|said| said.contains("eBPF programs and maps")),
        "{done:?}"
    );
    assert!(!rig.instance(0).exists(), "pins on the node");
    assert!(!rig.state_file(0).exists(), "the state is of the past");
    assert!(rig.subnet_file(0).exists(), "subnet.env");
}
