//! Pods that upstream's own CNI plugin connects, of release 0.9.0, on nodes that run the agent.

mod rig;

use std::path::{Path, PathBuf};

use flannel_testkit::{Pod, cni::Runtime, eventually, json::ip_json, privileged, traffic};
use rig::{PATIENCE, Rig};
use serde_json::json;

/// Upstream's plugin and those that it came with, where `cargo xtask setup` unpacks them.
fn plugins() -> PathBuf {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/cni-0.9/usr/lib/cni");
    assert!(
        dir.join("flannel").exists(),
        "{} has no flannel: run `cargo xtask setup`",
        dir.display()
    );
    dir
}

/// kube-flannel's list, in a version of the specification that the old plugins know.
fn runtime(rig: &Rig, node: usize) -> Runtime {
    let plugins = plugins();
    let mut runtime = Runtime::new(rig.node(node), &plugins.join("flannel")).expect("a runtime");
    runtime.list["cniVersion"] = json!("0.3.1");
    runtime.path.insert(1, plugins);
    runtime
}

#[test]
fn pods_of_upstreams_plugin_are_carried() {
    if !privileged() {
        return;
    }
    let mut rig = Rig::new(2);
    let runtimes = [0, 1].map(|node| runtime(&rig, node));
    for (node, runtime) in runtimes.iter().enumerate() {
        let cache = format!("--cni-cache-dir={}", runtime.cache_dir().display());
        rig.start_agent(node, &["--ip-masq", &cache]);
    }
    for node in 0..2 {
        rig.wait_ready(node);
    }
    let mut containers = Vec::new();
    for (node, runtime) in runtimes.iter().enumerate() {
        let (container, pod): (_, Pod) = runtime.add_pod("old").expect("ADD");
        let link = ip_json(&pod.ns, &["link", "show", "eth0"]).expect("the pod's link");
        assert_eq!(link[0]["mtu"], 1450);
        rig.adopt_pod(node, pod);
        containers.push(container);
    }
    rig.wait_converged();
    // As fast as any other pod.
    rig.wait_carried();
    let (a, b) = (rig.pod(0).clone(), rig.pod(1).clone());
    let sent = traffic::tcp_transfer(&b.ns, b.ip, &a.ns, traffic::Amount::Bytes(2_000_000));
    assert_eq!(sent.expect("a transfer").bytes, 2_000_000);
    let fast = &rig.status(0)["fast_path"]["counters"];
    assert!(fast["encap"]["packets"].as_u64() > Some(10), "{fast}");

    runtimes[0].del(&containers[0]).expect("DEL");
    assert_eq!(runtimes[0].reservations(), []);
    eventually(PATIENCE, "the pod is gone from the map", || {
        match rig.map_dump(0, "pods").as_array().map(Vec::len) {
            Some(0) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    });
}
