//! Leases in the Kubernetes API, end to end: three nodes join, leave, change, and their Node objects with them. Traffic between pods
//! that are not concerned loses nothing. With `KUBECONFIG` the same runs against the cluster that it names.

#[path = "netns_kube/mixed.rs"]
mod mixed;
#[path = "netns_kube/outage.rs"]
mod outage;
#[path = "netns_kube/scale.rs"]
mod scale;

mod kube_rig;
mod rig;

use std::time::Duration;

use flannel_testkit::{Subnet, eventually, privileged};
use kube_rig::{KubeRig, hold};
use rig::{PATIENCE, Peer};
use serde_json::{Value, json};

/// What upstream v0.28.9 left on node `a` with public address 192.168.77.11 (`kubectl get node a -o json`).
const UPSTREAM_ANNOTATIONS: &str = r#"{"flannel.alpha.coreos.com/backend-data":"{\"VNI\":1,\"VtepMAC\":\"b2:ab:a1:15:2f:15\"}","flannel.alpha.coreos.com/backend-type":"vxlan","flannel.alpha.coreos.com/kube-subnet-manager":"true","flannel.alpha.coreos.com/public-ip":"192.168.77.11","volumes.kubernetes.io/controller-managed-attach-detach":"true"}"#;
const UPSTREAM_CONDITION: &str = r#"{"type":"NetworkUnavailable","status":"False","lastHeartbeatTime":"2026-11-20T22:26:58Z","lastTransitionTime":"2026-11-20T22:26:58Z","reason":"FlannelIsUp","message":"Flannel is running on this node"}"#;
/// The body of the request with which it wrote them.
const UPSTREAM_PATCH: &str = r#"{"metadata":{"annotations":{"flannel.alpha.coreos.com/backend-data":"{\"VNI\":1,\"VtepMAC\":\"fa:4b:f2:85:0f:4e\"}","flannel.alpha.coreos.com/backend-type":"vxlan","flannel.alpha.coreos.com/kube-subnet-manager":"true","flannel.alpha.coreos.com/public-ip":"192.168.77.11"}}}"#;
const UPSTREAM_SUBNET_ENV: &str = "FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=10.5.1.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n";

/// Waits until a node's condition is upstream's but for its times.
#[track_caller]
fn wait_network_available(rig: &KubeRig, node: usize) {
    let want: Value = serde_json::from_str(UPSTREAM_CONDITION).unwrap();
    eventually(PATIENCE, "the network is available", || {
        let object = rig.cluster.node(&rig.name(node)).unwrap();
        let conditions = &object.ok_or("no Node object")?["status"]["conditions"];
        let have = rig::list(conditions)
            .iter()
            .find(|condition| condition["type"] == "NetworkUnavailable");
        let mut have = have.cloned().ok_or(conditions.to_string())?;
        for time in ["lastHeartbeatTime", "lastTransitionTime"] {
            let text = have[time].as_str().unwrap_or_default().to_owned();
            if text.len() != "2026-11-20T22:26:58Z".len() {
                return Err(format!("{time} is {text:?}"));
            }
            have[time] = want[time].clone();
        }
        (have == want).then_some(()).ok_or(have.to_string())
    });
}

#[test]
fn a_node_object_is_upstreams_in_every_byte() {
    if !privileged() {
        return;
    }
    let rig = KubeRig::start(2, &[]);
    let mac = rig.device_mac(0);
    let want = UPSTREAM_ANNOTATIONS.replace("b2:ab:a1:15:2f:15", &mac);
    assert_eq!(json!(rig.annotations(0)).to_string(), want);
    assert_eq!(rig.subnet_env(0), UPSTREAM_SUBNET_ENV);
    for node in 0..2 {
        wait_network_available(&rig, node);
    }
}

/// What the agent asks for, and nothing else: on the lab's own server, which keeps a record.
#[test]
fn requests_are_upstreams_on_the_labs_server() {
    if !privileged() {
        return;
    }
    let mut rig = KubeRig::start(2, &[]);
    for node in 0..2 {
        wait_network_available(&rig, node);
    }
    let (mac, name) = (rig.device_mac(0), rig.name(0));
    let path = format!("/api/v1/nodes/{name}/status");
    let asked = rig.api().asked();
    let patches: Vec<_> = asked.iter().filter(|one| one.path == path).collect();
    assert_eq!(patches.len(), 2, "{patches:?}");
    assert_eq!(
        patches[0].body,
        UPSTREAM_PATCH.replace("fa:4b:f2:85:0f:4e", &mac)
    );
    let condition: Value = serde_json::from_str(&patches[1].body).unwrap();
    assert_eq!(
        condition["status"]["conditions"][0]["reason"],
        "FlannelIsUp"
    );
    for patch in patches {
        assert_eq!(patch.content_type, "application/strategic-merge-patch+json");
        assert_eq!((patch.method.as_str(), patch.status), ("PATCH", 200));
    }
    // Nothing that upstream's role does not allow was needed.
    let refused: Vec<_> = asked.iter().filter(|one| one.status == 403).collect();
    assert!(refused.is_empty(), "{refused:?}");

    // What is right already is not written again.
    rig.stop_agent(0);
    rig.api().forget_asked();
    rig.start_agent(0, &[]);
    rig.wait_ready(0);
    wait_network_available(&rig, 0);
    hold(Duration::from_secs(1), || rig.all_run());
    let asked = rig.api().asked();
    let written = asked.iter().filter(|one| one.method == "PATCH");
    assert!(
        written.clone().all(|one| !one.body.contains("annotations")),
        "{asked:?}"
    );
    assert_eq!(rig.device_mac(0), mac);
}

fn nodes_come_and_go(flags: &[&str]) {
    if !privileged() {
        return;
    }
    let mut rig = KubeRig::start(3, flags);
    let traffic = rig.traffic(0, 1);
    let (subnet, peer) = (rig.subnet(2), rig.leases()[&rig.subnet(2)].clone());

    // It leaves for good.
    rig.stop_agent(2);
    rig.delete_node(2);
    for node in 0..2 {
        rig.wait_no_trace(node, subnet, &peer);
    }
    // It is back, and a fourth one joins that is none of ours.
    rig.create_node(2);
    rig.start_agent(2, flags);
    rig.wait_ready(2);
    let stranger = format!("{}stranger", rig.lab.prefix());
    rig.create_stranger(
        &stranger,
        "10.5.70.0/24",
        "192.168.77.70",
        "0a:00:00:00:00:70",
    );
    rig.wait_converged();
    // It changes its address and its MAC.
    rig.publish(&stranger, "192.168.77.71", "0a:00:00:00:00:71");
    rig.wait_converged();
    let old = Peer {
        public_ip: "192.168.77.70".into(),
        mac: "0a:00:00:00:00:70".into(),
    };
    for node in 0..3 {
        eventually(PATIENCE, "the old MAC is gone", || {
            let left = rig.traces(node, "10.5.70.0/24".parse().unwrap(), &old);
            let left: Vec<_> = left
                .into_iter()
                .filter(|trace| trace.contains("0a:00"))
                .collect();
            left.is_empty().then_some(()).ok_or(left.join("; "))
        });
    }
    rig.cluster.delete_node(&stranger).unwrap();
    rig.wait_converged();
    traffic.lossless();
    // And the one that was away has traffic again.
    rig.exchange(2, 0);
    rig.all_run();
}

#[test]
fn nodes_come_and_go_with_ebpf() {
    nodes_come_and_go(&[]);
}

#[test]
fn nodes_come_and_go_on_the_kernel_path() {
    nodes_come_and_go(&["--datapath=kernel"]);
}

#[test]
fn a_node_changes_its_address() {
    if !privileged() {
        return;
    }
    let mut rig = KubeRig::start(3, &[]);
    let traffic = rig.traffic(0, 1);
    for line in [
        "addr del 192.168.77.13/24 dev eth0",
        "addr add 192.168.77.113/24 brd + dev eth0",
        "route replace default via 192.168.77.1",
    ] {
        rig.ns(2).ip(line).unwrap();
    }
    let key = format!("{}/public-ip", kube_rig::PREFIX);
    eventually(PATIENCE, "the new address is published", || {
        let now = rig.annotations(2).remove(&key);
        (now.as_deref() == Some("192.168.77.113"))
            .then_some(())
            .ok_or(format!("{now:?}"))
    });
    rig.wait_converged();
    assert_eq!(rig.leases()[&rig.subnet(2)].public_ip, "192.168.77.113");
    traffic.lossless();
    rig.exchange(2, 1);
    rig.all_run();
}

#[test]
fn an_own_node_object_that_is_made_anew_is_published_again() {
    if !privileged() {
        return;
    }
    let mut rig = KubeRig::start(3, &[]);
    let traffic = rig.traffic(0, 1);
    let (before, subnet) = (rig.annotations(2), rig.subnet(2));
    let peer = rig.leases()[&subnet].clone();
    rig.delete_node(2);
    rig.wait_no_trace(0, subnet, &peer);
    rig.wait_log(2, "is gone");
    rig.create_node(2);
    eventually(PATIENCE, "the annotations are back", || {
        let now = rig.annotations(2);
        (now == before).then_some(()).ok_or(format!("{now:?}"))
    });
    wait_network_available(&rig, 2);
    rig.wait_converged();
    traffic.lossless();
    rig.exchange(2, 0);
    rig.all_run();
}

#[test]
fn a_node_object_with_another_subnet_gives_the_node_that_subnet() {
    if !privileged() {
        return;
    }
    let mut rig = KubeRig::start(3, &[]);
    let traffic = rig.traffic(0, 1);
    let (old, mac) = (rig.subnet(2), rig.device_mac(2));
    let peer = rig.leases()[&old].clone();
    let new: Subnet = "10.5.77.0/24".parse().unwrap();
    // A subnet once assigned cannot be changed: the object is made anew.
    rig.delete_node(2);
    rig.create_node_with(2, new);
    eventually(PATIENCE, "the node takes its new subnet", || {
        let env = rig.subnet_env(2);
        env.contains("FLANNEL_SUBNET=10.5.77.1/24\n")
            .then_some(())
            .ok_or(env)
    });
    rig.wait_converged();
    assert_eq!(rig.leases()[&new].mac, mac, "the MAC address stays");
    for node in 0..2 {
        let left = rig.traces(node, old, &peer);
        let left: Vec<_> = left
            .into_iter()
            .filter(|trace| !trace.contains(&mac) && trace != "map nodes")
            .collect();
        assert!(left.is_empty(), "{left:?}");
    }
    let address =
        flannel_testkit::json::ip_json(rig.ns(2), &["-4", "addr", "show", "dev", rig::DEVICE]);
    let address = address.unwrap();
    assert_eq!(rig::list(&address[0]["addr_info"]).len(), 1, "{address}");
    assert_eq!(address[0]["addr_info"][0]["local"], "10.5.77.0");
    traffic.lossless();
    rig.all_run();
}

#[test]
fn a_peer_that_left_while_the_agent_was_down_is_removed() {
    if !privileged() {
        return;
    }
    let mut rig = KubeRig::start(2, &[]);
    let stranger = format!("{}stranger", rig.lab.prefix());
    let (public_ip, mac) = ("192.168.77.70", "0a:00:00:00:00:70");
    rig.create_stranger(&stranger, "10.5.70.0/24", public_ip, mac);
    rig.wait_converged();
    let traffic = rig.traffic(0, 1);
    rig.stop_agent(0);
    rig.cluster.delete_node(&stranger).unwrap();
    let subnet = "10.5.70.0/24".parse().unwrap();
    let peer = Peer {
        public_ip: public_ip.into(),
        mac: mac.into(),
    };
    assert!(
        !rig.traces(0, subnet, &peer).is_empty(),
        "nobody is there to remove it"
    );
    rig.start_agent(0, &[]);
    rig.wait_ready(0);
    rig.wait_no_trace(0, subnet, &peer);
    rig.wait_converged();
    traffic.lossless();
}
