//! The plugin with the distribution's bridge, host-local, portmap and bandwidth, driven as containerd drives them.

mod plugin_rig;

use std::{
    collections::BTreeSet, fs, os::unix::fs::PermissionsExt as _, path::Path, time::Duration,
};

use flannel_testkit::{cni::plugin_error, json::ip_json, traffic};
use plugin_rig::{ENV, Host, ports, text};
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(5);

#[test]
fn a_pod_lives_and_leaves_nothing() {
    let Some(host) = Host::new(ENV) else { return };
    let mut container = host.runtime.container().unwrap();
    container.capabilities = json!({
        "portMappings": [{ "hostPort": 8088, "containerPort": 80, "protocol": "tcp" }],
        "bandwidth": { "ingressRate": 10_000_000, "ingressBurst": 1_000_000 },
    });
    let result = host.runtime.add(&container).unwrap();
    let pod = host.runtime.pod("p1", &container, &result).unwrap();
    assert_eq!(result["cniVersion"], "1.0.0");
    assert_eq!(pod.ip.to_string(), "10.244.1.2");
    traffic::ping_once(&pod.ns, pod.gateway, SOON).unwrap();

    let saved = host.runtime.saved(&container.id);
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(
        (mode(&saved), mode(saved.parent().unwrap())),
        (0o600, 0o700)
    );
    let wanted = format!(
        r#"{{"cniVersion":"1.0.0","hairpinMode":true,"ipMasq":false,"ipam":{{"dataDir":"{}","ranges":[[{{"subnet":"10.244.1.0/24"}}]],"routes":[{{"dst":"10.244.0.0/16"}}],"type":"host-local"}},"isDefaultGateway":true,"isGateway":true,"mtu":1450,"name":"cbr0","type":"bridge"}}"#,
        host.runtime.dir().join("networks").display()
    );
    assert_eq!(fs::read_to_string(&saved).unwrap(), wanted);

    // What the chain has made, by other readers.
    let link = flannel_testkit::json::link(&pod.ns, "eth0").unwrap();
    assert_eq!(link["mtu"], 1450);
    let routes = ip_json(&pod.ns, &["route"]).unwrap();
    let routes: BTreeSet<String> = routes
        .as_array()
        .unwrap()
        .iter()
        .map(|r| text(&r["dst"]))
        .collect();
    assert_eq!(
        routes,
        ["10.244.0.0/16", "10.244.1.0/24", "default"]
            .map(str::to_owned)
            .into()
    );
    let rules = host.node().ns.exec(["iptables-save", "-t", "nat"]).unwrap();
    assert!(rules.contains("--to-destination 10.244.1.2:80"), "{rules}");
    let shaped = host
        .node()
        .ns
        .exec(["tc", "qdisc", "show", "dev", &pod.host_if])
        .unwrap();
    assert!(shaped.contains("tbf"), "{shaped}");

    host.runtime.check(&container).unwrap();
    pod.ns.ip("addr flush dev eth0").unwrap();
    let error = host.runtime.check(&container).unwrap_err();
    assert_eq!(plugin_error(&error).unwrap().plugin, "flannel", "{error}");

    host.runtime.del(&container).unwrap();
    assert!(!saved.exists());
    assert_eq!(host.runtime.reservations(), []);
    assert_eq!(ports(&host), BTreeSet::new());
    let rules = host.node().ns.exec(["iptables-save", "-t", "nat"]).unwrap();
    assert!(!rules.contains("10.244.1.2"), "{rules}");
    // Runtimes repeat themselves.
    host.runtime.del(&container).unwrap();
    let error = host
        .runtime
        .exec("flannel", "CHECK", Some(&container), &host.conf())
        .unwrap()
        .unwrap_err();
    assert_eq!(error.code, 3, "{error}");
}

#[test]
fn a_pod_of_two_families() {
    let dual = format!(
        "{ENV}FLANNEL_IPV6_NETWORK=fd00:10:244::/48\nFLANNEL_IPV6_SUBNET=fd00:10:244:1::1/64\n"
    );
    let Some(host) = Host::new(&dual) else { return };
    let container = host.runtime.container().unwrap();
    let result = host.runtime.add(&container).unwrap();
    let given: Vec<String> = result["ips"]
        .as_array()
        .unwrap()
        .iter()
        .map(|ip| text(&ip["address"]))
        .collect();
    assert_eq!(given, ["10.244.1.2/24", "fd00:10:244:1::2/64"]);
    let seen = ip_json(&container.ns, &["-6", "route"])
        .unwrap()
        .to_string();
    assert!(seen.contains("fd00:10:244::/48"), "{seen}");
    host.runtime.check(&container).unwrap();
    host.runtime.del(&container).unwrap();
    assert_eq!(host.runtime.reservations(), []);
}

#[test]
fn every_version_gets_its_result() {
    let Some(mut host) = Host::new(ENV) else {
        return;
    };
    for version in ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0"] {
        // portmap and bandwidth know no version before 0.3.0.
        host.runtime.list["plugins"]
            .as_array_mut()
            .unwrap()
            .truncate(1);
        host.runtime.list["cniVersion"] = json!(version);
        let container = host.runtime.container().unwrap();
        let result = host
            .runtime
            .add(&container)
            .unwrap_or_else(|error| panic!("{version}: {error:#}"));
        assert_eq!(result["cniVersion"], version);
        let named = if version < "0.3.0" {
            &result["ip4"]["ip"]
        } else {
            &result["ips"][0]["address"]
        };
        assert!(text(named).starts_with("10.244.1."), "{result}");
        host.runtime.del(&container).unwrap();
        assert_eq!(host.runtime.reservations(), []);
    }
    // Debian's bridge does not know it yet, and its own words reach the runtime.
    host.runtime.list["cniVersion"] = json!("1.1.0");
    let container = host.runtime.container().unwrap();
    let error = host.runtime.add(&container).unwrap_err();
    let error = plugin_error(&error).unwrap();
    assert_eq!(
        (error.code, error.msg.as_str()),
        (1, "incompatible CNI versions")
    );
}

#[test]
fn a_failed_delete_is_repeated() {
    let Some(mut host) = Host::new(ENV) else {
        return;
    };
    let container = host.runtime.container().unwrap();
    host.runtime.add(&container).unwrap();
    let path = host.runtime.path.clone();
    // As on a node where somebody removes the standard plugins: bridge is there, host-local is not.
    let lone = host.runtime.dir().join("lone");
    fs::create_dir(&lone).unwrap();
    let bridge = path
        .iter()
        .map(|dir| dir.join("bridge"))
        .find(|file| file.exists())
        .unwrap();
    std::os::unix::fs::symlink(bridge, lone.join("bridge")).unwrap();
    host.runtime.list["plugins"]
        .as_array_mut()
        .unwrap()
        .truncate(1);
    host.runtime.path = vec![path[0].clone(), lone];
    for _ in 0..2 {
        let error = host.runtime.del(&container).unwrap_err();
        assert!(error.to_string().contains("host-local"), "{error}");
        assert!(host.runtime.saved(&container.id).exists());
        assert_eq!(host.runtime.reservations().len(), 1);
    }
    host.runtime.path = path;
    host.runtime.del(&container).unwrap();
    assert_eq!(host.runtime.reservations(), []);
    assert_eq!(ports(&host), BTreeSet::new());
    assert!(!host.runtime.saved(&container.id).exists());
}

#[test]
fn what_cannot_be_read_is_deleted_all_the_same() {
    let Some(host) = Host::new(ENV) else { return };
    for with_subnet in [true, false] {
        let container = host.runtime.container().unwrap();
        host.runtime.add(&container).unwrap();
        fs::write(host.runtime.saved(&container.id), "{\"cniVersion\":\"1.0").unwrap();
        if !with_subnet {
            // The runtime remembers where the address was.
            fs::remove_file(host.subnet_file()).unwrap();
        }
        host.runtime.del(&container).unwrap();
        assert_eq!(host.runtime.reservations(), []);
        assert_eq!(ports(&host), BTreeSet::new());
        assert!(!host.runtime.saved(&container.id).exists());
    }
}

#[test]
fn a_failed_addition_leaves_nothing() {
    // One address beside the gateway's.
    let Some(host) = Host::new(&ENV.replace("10.244.1.1/24", "10.244.1.1/30")) else {
        return;
    };
    let first = host.runtime.container().unwrap();
    host.runtime.add(&first).unwrap();
    let before = (ports(&host), host.runtime.reservations());
    let second = host.runtime.container().unwrap();
    let error = host.runtime.add(&second).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("no IP addresses available in range set"),
        "{error}"
    );
    assert!(!host.runtime.saved(&second.id).exists());
    assert_eq!((ports(&host), host.runtime.reservations()), before);
    assert!(second.ns.ifindex("eth0").is_err());
    // A runtime that adds the same container again must not lose it over the error.
    host.runtime.add(&first).unwrap_err();
    assert_eq!((ports(&host), host.runtime.reservations()), before);
    assert!(host.runtime.saved(&first.id).exists());
    host.runtime.del(&first).unwrap();
    host.runtime.add(&second).unwrap();
}

#[test]
fn garbage_is_collected_and_nothing_else() {
    let Some(host) = Host::new(ENV) else { return };
    let pods: Vec<_> = (0..4).map(|_| host.runtime.container().unwrap()).collect();
    for pod in &pods {
        host.runtime.add(pod).unwrap();
    }
    // Forgotten by upstream's plugin, and a pod of another network that keeps its files in the same place.
    fs::remove_file(host.runtime.saved(&pods[2].id)).unwrap();
    let other = host.runtime.saved("other");
    fs::write(
        &other,
        r#"{"type":"bridge","name":"net2","ipam":{"type":"host-local"}}"#,
    )
    .unwrap();
    let stays = [&pods[0]];
    // The runtime says nothing of what is to stay.
    let mut silent = host.conf();
    silent["cniVersion"] = json!("1.1.0");
    host.runtime
        .exec("flannel", "GC", None, &silent)
        .unwrap()
        .unwrap();
    assert_eq!(host.runtime.reservations().len(), 4);

    host.runtime.gc(&stays).unwrap();
    let left: Vec<String> = host
        .runtime
        .reservations()
        .into_iter()
        .map(|(_, id)| id)
        .collect();
    assert_eq!(left, [pods[0].id.clone()]);
    assert!(host.runtime.saved(&pods[0].id).exists() && other.exists());
    assert!(!host.runtime.saved(&pods[1].id).exists());
    host.runtime.check(&pods[0]).unwrap();
    // And once more, with nothing to do.
    host.runtime.gc(&stays).unwrap();
    host.runtime.gc(&[]).unwrap();
    assert_eq!(host.runtime.reservations(), []);
    let error = host
        .runtime
        .exec("flannel", "GC", None, &host.conf())
        .unwrap()
        .unwrap_err();
    assert_eq!(
        (error.code, error.msg.as_str()),
        (1, "config version does not allow GC")
    );
}

#[test]
fn twenty_pods_at_once() {
    let Some(host) = Host::new(ENV) else { return };
    let pods: Vec<_> = (0..20).map(|_| host.runtime.container().unwrap()).collect();
    // The bridge takes the lowest address of its ports, and the bridge plugin gives up where that changes under it: a runtime tries again.
    let moved = |error: &dyn std::fmt::Display| format!("{error:#}").contains("Mac doesn't match");
    let add = |pod| {
        for _ in 0..5 {
            match host.runtime.add(pod) {
                Err(error) if moved(&error) => host.runtime.del(pod).unwrap(),
                added => return added.unwrap(),
            }
        }
        panic!("the bridge does not come to rest")
    };
    let results: Vec<Value> = std::thread::scope(|scope| {
        let all: Vec<_> = pods
            .iter()
            .map(|pod| scope.spawn(move || add(pod)))
            .collect();
        all.into_iter().map(|one| one.join().unwrap()).collect()
    });
    let addresses: BTreeSet<_> = results
        .iter()
        .map(|result| flannel_testkit::cni::address(result).unwrap())
        .collect();
    assert_eq!(addresses.len(), 20);
    assert_eq!(ports(&host).len(), 20);
    // The bridge plugin also compares the bridge's address with the one that it had at ADD.
    let checked: Vec<_> = pods.iter().map(|pod| host.runtime.check(pod)).collect();
    assert!(checked.iter().any(Result::is_ok), "{checked:?}");
    for outcome in checked {
        if !outcome.as_ref().is_err_and(|error| moved(error)) {
            outcome.unwrap();
        }
    }
    let del = |pod| host.runtime.del(pod).unwrap();
    std::thread::scope(|scope| {
        for pod in &pods {
            scope.spawn(move || del(pod));
        }
    });
    assert_eq!(host.runtime.reservations(), []);
    assert_eq!(ports(&host), BTreeSet::new());
    let saved = fs::read_dir(host.runtime.dir().join("flannel")).unwrap();
    assert_eq!(saved.count(), 0);
}
