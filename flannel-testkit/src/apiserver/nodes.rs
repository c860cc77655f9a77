//! Node objects as kubelets make them, small and full-size.

use super::clock;
use super::store::{Kind, Store};
use serde_json::{Value, json};
use std::sync::OnceLock;

/// Images that a kubelet reports at most (`--node-status-max-images`).
const IMAGES: u32 = 50;
/// What the kubelet sets on every node it registers.
const ATTACH: &str = "volumes.kubernetes.io/controller-managed-attach-detach";

/// A node as an API client makes it, with these subnets (none for a node that waits for one) and the annotation that every
/// kubelet sets.
pub fn node(name: &str, pod_cidrs: &[&str]) -> Value {
    let mut node = json!({
        "metadata": {"name": name, "annotations": {ATTACH: "true"}},
        "spec": {},
        "status": {"conditions": [{
            "type": "NetworkUnavailable", "status": "True", "lastHeartbeatTime": null, "lastTransitionTime": null,
            "reason": "NoRouteCreated", "message": "x",
        }]},
    });
    if !pod_cidrs.is_empty() {
        node["spec"]["podCIDRs"] = json!(pod_cidrs);
    }
    node
}

/// A node of some 15 KB that already has flannel's annotations: name `full-<number>`, subnet 10.64.0.0/24 and on, public address
/// 172.20.0.1 and on. Numbers go up to 49 999.
pub fn full_size_node(number: u32) -> Value {
    serde_json::from_str(&text(number, 1)).expect("the template is JSON")
}

/// Adds a full-size node without parsing anything.
pub(crate) fn insert(store: &mut Store, number: u32) {
    let text = text(number, store.next_revision());
    store.put_text(Kind::Node, (String::new(), name(number)), text);
}

fn name(number: u32) -> String {
    format!("full-{number:05}")
}

/// The template, filled in.
fn text(number: u32, revision: u64) -> String {
    static TEMPLATE: OnceLock<String> = OnceLock::new();
    let template = TEMPLATE.get_or_init(|| template().to_string());
    let [_, _, a, b] = number.to_be_bytes();
    let subnet = format!("10.{}.{b}.0/24", 64 + u32::from(a));
    let ip = format!("172.20.{}.{}", number / 250, number % 250 + 1);
    let mac = format!("0a:58:00:{a:02x}:{b:02x}:01");
    let uid = format!("00000000-0000-4000-8000-{number:012}");
    template
        .replace("@NAME@", &name(number))
        .replace("@SUBNET@", &subnet)
        .replace("@IP@", &ip)
        .replace("@MAC@", &mac)
        .replace("@UID@", &uid)
        .replace("@REVISION@", &revision.to_string())
}

fn template() -> Value {
    let now = clock::now();
    let mut node = json!({
        "metadata": {
            "name": "@NAME@", "uid": "@UID@", "resourceVersion": "@REVISION@", "creationTimestamp": now,
            "labels": labels(),
            "annotations": {
                "flannel.alpha.coreos.com/backend-data": "{\"VNI\":1,\"VtepMAC\":\"@MAC@\"}",
                "flannel.alpha.coreos.com/backend-type": "vxlan",
                "flannel.alpha.coreos.com/kube-subnet-manager": "true",
                "flannel.alpha.coreos.com/public-ip": "@IP@",
                "kubeadm.alpha.kubernetes.io/cri-socket": "unix:///var/run/containerd/containerd.sock",
                "node.alpha.kubernetes.io/ttl": "0",
                ATTACH: "true",
            },
        },
        "spec": {"podCIDR": "@SUBNET@", "podCIDRs": ["@SUBNET@"]},
        "status": status(&now),
    });
    node["metadata"]["managedFields"] = managed_fields(&node, &now);
    node
}

fn labels() -> Value {
    json!({
        "beta.kubernetes.io/arch": "amd64", "beta.kubernetes.io/os": "linux", "kubernetes.io/arch": "amd64",
        "kubernetes.io/hostname": "@NAME@", "kubernetes.io/os": "linux", "node-role.kubernetes.io/worker": "",
        "node.kubernetes.io/instance-type": "m6i.2xlarge", "topology.kubernetes.io/region": "eu-central-1",
        "topology.kubernetes.io/zone": "eu-central-1b",
    })
}

fn status(now: &str) -> Value {
    let resources = json!({
        "cpu": "8", "ephemeral-storage": "101430960Ki", "hugepages-1Gi": "0", "hugepages-2Mi": "0",
        "memory": "32386544Ki", "pods": "110",
    });
    let condition = |kind: &str, status: &str, reason: &str, message: &str| {
        json!({
            "type": kind, "status": status, "reason": reason, "message": message, "lastHeartbeatTime": now,
            "lastTransitionTime": now,
        })
    };
    let digest = |image: u32| {
        format!(
            "{:064x}",
            u128::from(image + 1) * 0x9e37_79b9_7f4a_7c15_f39c
        )
    };
    let images: Vec<Value> = (0..IMAGES)
        .map(|image| {
            let name = format!("registry.example.com/platform/service-{image:02}/component");
            json!({
                "names": [format!("{name}@sha256:{}", digest(image)), format!("{name}:v1.{image}.3")],
                "sizeBytes": 10_485_760 + image * 1_048_576,
            })
        })
        .collect();
    json!({
        "capacity": resources, "allocatable": resources,
        "addresses": [
            {"type": "InternalIP", "address": "@IP@"}, {"type": "Hostname", "address": "@NAME@"},
        ],
        "conditions": [
            condition("NetworkUnavailable", "False", "FlannelIsUp", "Flannel is running on this node"),
            condition("MemoryPressure", "False", "KubeletHasSufficientMemory", "kubelet has sufficient memory available"),
            condition("DiskPressure", "False", "KubeletHasNoDiskPressure", "kubelet has no disk pressure"),
            condition("PIDPressure", "False", "KubeletHasSufficientPID", "kubelet has sufficient PID available"),
            condition("Ready", "True", "KubeletReady", "kubelet is posting ready status"),
        ],
        "daemonEndpoints": {"kubeletEndpoint": {"Port": 10250}},
        "nodeInfo": {
            "machineID": "0123456789abcdef0123456789abcdef", "systemUUID": "@UID@", "bootID": "@UID@",
            "kernelVersion": "6.12.48+deb13-amd64", "osImage": "Debian GNU/Linux 13 (trixie)",
            "containerRuntimeVersion": "containerd://2.1.4", "kubeletVersion": "v1.33.0",
            "kubeProxyVersion": "v1.33.0", "operatingSystem": "linux", "architecture": "amd64",
        },
        "images": images,
    })
}

/// As if kubelet, controller and flannel had each set their part.
fn managed_fields(node: &Value, now: &str) -> Value {
    use super::managed::{Manager, record};
    let mut object = json!({"metadata": {}});
    let mut note = |name: &str, status: bool, touched: &Value| {
        let manager = Manager {
            name,
            api_version: "v1",
            status,
        };
        record(&mut object, &manager, touched, now);
    };
    let metadata = &node["metadata"];
    note(
        "kubelet",
        false,
        &json!({"metadata": {"labels": metadata["labels"]}}),
    );
    note(
        "kube-controller-manager",
        false,
        &json!({"spec": node["spec"]}),
    );
    note(
        "flanneld",
        true,
        &json!({"metadata": {"annotations": metadata["annotations"]}}),
    );
    note("kubelet", true, &json!({"status": node["status"]}));
    object["metadata"]["managedFields"].take()
}

/// Fails if a template has an open place.
#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn full_size_nodes_are_of_the_size_of_real_ones() {
        let text = text(4999, 17);
        assert!((13_000..20_000).contains(&text.len()), "{}", text.len());
        assert!(!text.contains("@NAME@") && !text.contains("@IP@"));
        let node = full_size_node(4999);
        assert_eq!(node["spec"]["podCIDR"], "10.83.135.0/24");
        let ip = &node["metadata"]["annotations"]["flannel.alpha.coreos.com/public-ip"];
        assert_eq!(ip, "172.20.19.250");
        assert_eq!(node["metadata"]["name"], "full-04999");
    }
}
