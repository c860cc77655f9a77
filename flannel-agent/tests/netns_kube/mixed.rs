//! A node that upstream runs on, beside two of ours: nothing in the API tells them apart.

use super::*;
use flannel_testkit::traffic::ping_once;
use flannel_testkit::upstream::{LeaseStore, UpstreamConf};
use flannel_testkit::{Family, Upstream};
use std::fs;

/// Node 2 is upstream's. Its model keeps leases in files, which stand for the Node objects.
#[test]
fn a_node_of_upstreams_takes_part() {
    if !privileged() {
        return;
    }
    let mut rig = KubeRig::new(3, kube_rig::NET_CONF);
    for node in 0..3 {
        rig.create_node(node);
    }
    let place = rig.lab.node(2);
    let dir = place.run_dir.join("leases");
    fs::create_dir_all(&dir).unwrap();
    let store = LeaseStore::Dir(&dir);
    let conf = UpstreamConf::new(Subnet::new([10, 5, 0, 0].into(), 16));
    let mut upstream = Upstream::new(place, conf);
    upstream.start(&store).unwrap();
    let mac = upstream.device_mac(Family::V4).unwrap();
    rig.publish(&rig.name(2), "192.168.77.13", &mac);
    let theirs = rig.annotations(2);
    for node in 0..2 {
        rig.start_agent(node, &[]);
    }
    for node in 0..2 {
        rig.wait_ready(node);
    }
    // What a running flanneld does with each event of a node.
    for (subnet, peer) in rig.leases() {
        let lease = json!({
            "PublicIP": peer.public_ip, "PublicIPv6": null, "BackendType": "vxlan",
            "BackendData": {"VNI": 1, "VtepMAC": peer.mac},
        });
        store.put(&subnet.lease_key(), &lease.to_string()).unwrap();
    }
    upstream.add_peers(&store).unwrap();
    for node in 0..3 {
        rig.add_pod(node);
    }
    rig.wait_converged();
    for (from, to) in [(0, 2), (1, 2), (2, 1), (2, 0), (0, 1)] {
        eventually(PATIENCE, "pods reach each other", || {
            ping_once(&rig.pod(from).ns, rig.pod(to).ip, Duration::from_secs(1))
                .map_err(|error| format!("{error:#}"))
        });
    }
    let traffic = rig.traffic(2, 0);
    // Ours come and go beside it, and nobody writes to its object.
    rig.stop_agent(0);
    rig.start_agent(0, &[]);
    rig.wait_ready(0);
    rig.stop_agent(1);
    rig.delete_node(1);
    eventually(PATIENCE, "the node that left is forgotten", || {
        rig.converged(0, &rig.leases())
    });
    traffic.lossless();
    assert_eq!(rig.annotations(2), theirs);
    assert_eq!(upstream.device_mac(Family::V4).unwrap(), mac);

    // Then ours takes its place: the object stays as it is, in every byte.
    let traffic = rig.traffic(2, 0);
    rig.start_agent(2, &[]);
    rig.wait_ready(2);
    rig.wait_converged();
    assert_eq!(rig.annotations(2), theirs);
    assert_eq!(rig.device_mac(2), mac);
    traffic.lossless();
}
