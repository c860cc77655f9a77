//! Uplink, store and lease.

use super::*;

#[test]
fn the_uplink() {
    use Status::{Fail, Ok, Warn};
    assert_only("uplink", Fail, &["no default route", "--iface"], |seen| {
        seen.network.uplink = Err("no default route".into());
    });
    assert_only(
        "uplink",
        Fail,
        &["is down", "ip link set eth0 up"],
        |seen| seen.network.links[0].up = false,
    );
    let twin = |seen: &mut Observations| {
        seen.network
            .links
            .push(link(3, "wlan0", "192.168.77.99/24"));
    };
    assert_only("uplink", Warn, &["LAN: wlan0", "--iface=eth0"], twin);
    assert_only("uplink", Ok, &[], |seen| {
        twin(seen);
        uplink(seen).asked_for = true;
    });
    assert_only("uplink", Warn, &["wlan0 metric 600"], |seen| {
        seen.network.defaults.push(("wlan0".into(), 600));
    });
}

#[test]
fn the_store() {
    use Status::{Fail, Skip, Warn};
    let dead = |seen: &mut Observations| {
        seen.store.net_conf = Err(StoreTrouble::Store("connection refused".into()));
        seen.store.leases = Err("connection refused".into());
    };
    assert_only(
        "store",
        Fail,
        &["connection refused", "--etcd-endpoints"],
        dead,
    );
    let mut seen = healthy();
    dead(&mut seen);
    for name in ["network-config", "lease", "peer-entries", "mtu"] {
        assert_eq!(statuses(&judge(&seen))[name], Skip, "{name}");
    }
    assert_only("store", Fail, &["version 2", "etcdctl migrate"], |seen| {
        dead(seen);
        seen.store.older_api = Some("http://a:2379".into());
    });
    assert_only("store", Fail, &["--lease-dir"], |seen| {
        dead(seen);
        seen.store.name = "directory /x".into();
    });
    assert_only(
        "store",
        Fail,
        &["ClusterRole", "kubectl get nodes"],
        |seen| {
            dead(seen);
            seen.store.name = "kubernetes https://10.96.0.1 node a".into();
            seen.store.kubernetes = Some(None);
        },
    );
    assert_only(
        "network-config",
        Fail,
        &["ConfigMap", "--net-config-path"],
        |seen| {
            seen.store.net_conf = Err(StoreTrouble::Missing("not found".into()));
            seen.store.kubernetes = Some(seen.store.own(seen).map(|(key, _)| *key));
        },
    );
    assert_only(
        "network-config",
        Fail,
        &["not found", "etcdctl put"],
        |seen| {
            seen.store.net_conf = Err(StoreTrouble::Missing("not found".into()));
        },
    );
    assert_only("network-config", Fail, &["version 2 API only"], |seen| {
        seen.store.net_conf = Err(StoreTrouble::Missing("not found".into()));
        seen.store.older_api = Some("http://a:2379".into());
    });
    assert_only("network-config", Fail, &["correct it in etcd"], |seen| {
        conf(seen, "{");
    });
    assert_only("network-config", Warn, &["Backend is missing"], |seen| {
        conf(seen, r#"{"Network":"10.244.0.0/16"}"#);
    });
    let valid = |valid| move |seen: &mut Observations| seen.store.certificates[0].valid = valid;
    let now = 1_800_000_000;
    assert_only(
        "certificates",
        Fail,
        &["client.crt", "not valid yet", "clock"],
        valid(Some((now + 7200, now + 9000))),
    );
    assert_only(
        "certificates",
        Fail,
        &["expired 2 h ago"],
        valid(Some((1, now - 7200))),
    );
    assert_only(
        "certificates",
        Warn,
        &["3 days"],
        valid(Some((1, now + 3 * 86_400))),
    );
    assert_only("certificates", Fail, &["no certificate"], valid(None));
    assert_only("certificates", Skip, &[], |seen| {
        seen.store.certificates.clear();
    });
}

#[test]
fn the_lease() {
    use Status::{Fail, Skip, Warn};
    let key = SubnetKey::from_v4(net("10.244.1.0/24"));
    let gone = |seen: &mut Observations| {
        own_lease(seen).remove(&key);
    };
    assert_only(
        "lease",
        Fail,
        &["none of 1 leases is of 192.168.77.11"],
        gone,
    );
    let mut seen = healthy();
    let attrs = LeaseAttrs::vxlan_v4(OWN, 1, OWN_MAC.into());
    let other = SubnetKey::from_v4(net("10.244.3.0/24"));
    own_lease(&mut seen).insert(other, attrs);
    assert_eq!(statuses(&judge(&seen))["lease"], Fail);
    assert_only(
        "lease",
        Fail,
        &["subnet.env says 10.244.9.0/24", "restart the agent"],
        |seen| {
            seen.overlay.subnet_file.as_mut().expect("a file").subnet =
                Some(net("10.244.9.0/24").into());
            seen.overlay.bridge = None;
        },
    );
    assert_only(
        "lease",
        Fail,
        &["02:00:00:00:00:09", "MACAddressPolicy=none"],
        |seen| {
            device(seen).mac = [2, 0, 0, 0, 0, 9].into();
        },
    );
    let mut seen = healthy();
    gone(&mut seen);
    assert_eq!(statuses(&judge(&seen))["peer-entries"], Skip);
    seen.agent.pid = None;
    assert_eq!(statuses(&judge(&seen))["lease"], Warn);
    seen.agent.known = false;
    assert_eq!(statuses(&judge(&seen))["lease"], Skip);
}
