//! A node whose subnet has changed, with the old gateway's address still on cni0.

mod plugin_rig;

use std::time::Duration;

use flannel_testkit::{cni::plugin_error, traffic};
use plugin_rig::{ENV, Host, bridge_addresses, ports};

const OLD: &str = "10.244.1.1/24";
const NEW: &str = "10.244.7.1/24";

/// A node that had a pod in its old subnet, and has a new one.
fn moved() -> Option<(Host, flannel_testkit::cni::Container)> {
    let host = Host::new(ENV)?;
    let container = host.runtime.container().unwrap();
    host.runtime.add(&container).unwrap();
    assert_eq!(bridge_addresses(&host), [OLD]);
    host.write_env(&ENV.replace(OLD, NEW));
    Some((host, container))
}

/// A pod cannot be added, nothing was changed, and the error says what to do.
#[track_caller]
fn refused(host: &Host, said: &str, addresses: &[&str]) {
    let before = (ports(host), host.runtime.reservations());
    let container = host.runtime.container().unwrap();
    let error = host.runtime.add(&container).unwrap_err();
    let error = plugin_error(&error).expect("a plugin's error");
    assert!(
        error
            .msg
            .contains("\"cni0\" already has an IP address different from 10.244.7.1/24"),
        "{error}"
    );
    assert!(error.details.contains(said), "{error}");
    assert!(
        error.details.contains("delete the pods of the old subnet"),
        "{error}"
    );
    assert_eq!(bridge_addresses(host), addresses);
    assert_eq!((ports(host), host.runtime.reservations()), before);
    assert!(!host.runtime.saved(&container.id).exists());
}

#[test]
fn an_empty_bridge_moves_along() {
    let Some((host, container)) = moved() else {
        return;
    };
    host.runtime.del(&container).unwrap();
    let (_, pod) = host.runtime.add_pod("p").unwrap();
    assert_eq!(bridge_addresses(&host), [NEW]);
    // The first attempt has used one up for the moment.
    assert_eq!(pod.ip.to_string(), "10.244.7.3");
    traffic::ping_once(&pod.ns, pod.gateway, Duration::from_secs(5)).unwrap();
    // As before from then on.
    host.runtime.add_pod("q").unwrap();
    assert_eq!(bridge_addresses(&host), [NEW]);
}

#[test]
fn a_bridge_with_pods_stays() {
    let Some((host, container)) = moved() else {
        return;
    };
    refused(&host, "still has ports (veth", &[OLD]);
    host.runtime.del(&container).unwrap();
    host.runtime.add_pod("p").unwrap();
}

#[test]
fn a_bridge_that_somebody_else_uses_stays() {
    let Some((host, container)) = moved() else {
        return;
    };
    host.runtime.del(&container).unwrap();
    let ns = &host.node().ns;
    ns.ip("link add mine type veth peer name yours").unwrap();
    ns.ip("link set mine master cni0").unwrap();
    refused(&host, "still has ports (mine)", &[OLD]);
    ns.ip("link del mine").unwrap();
    ns.ip("addr add 192.168.5.1/24 dev cni0").unwrap();
    refused(
        &host,
        "are not just the gateway of an earlier subnet",
        &[OLD, "192.168.5.1/24"],
    );
    ns.ip("addr flush dev cni0").unwrap();
    ns.ip("addr add 172.17.0.1/24 dev cni0").unwrap();
    refused(
        &host,
        "are not just the gateway of an earlier subnet",
        &["172.17.0.1/24"],
    );
}
