//! The Kubernetes API goes away for two minutes, restarts, hangs, refuses, loses its history: traffic goes on, and the nodes agree with
//! it afterwards. Only the lab's own server does that on demand.

use super::*;
use flannel_testkit::apiserver::{self, Failure, Gone, Rule, Verb, WatchEnd};

const OUTAGE: Duration = Duration::from_mins(2);

/// A node that does not exist, by number.
struct Stranger(u8);

impl Stranger {
    fn subnet(&self) -> Subnet {
        format!("10.5.{}.0/24", self.0).parse().unwrap()
    }

    fn name(&self) -> String {
        format!("stranger-{}", self.0)
    }

    fn peer(&self) -> Peer {
        Peer {
            public_ip: format!("192.168.77.{}", self.0),
            mac: format!("0a:00:00:00:00:{:02x}", self.0),
        }
    }

    fn join(&self, rig: &KubeRig) {
        let Peer { public_ip, mac } = self.peer();
        rig.create_stranger(&self.name(), &self.subnet().to_string(), &public_ip, &mac);
    }
}

/// Three nodes; while the API is gone one leaves, one comes, one changes, one agent is restarted, and the history is thrown away.
#[test]
fn two_minutes_without_the_labs_server_cost_no_packet() {
    if !privileged() {
        return;
    }
    let mut rig = KubeRig::start(3, &[]);
    let (leaver, changer, comer) = (Stranger(70), Stranger(71), Stranger(72));
    leaver.join(&rig);
    changer.join(&rig);
    rig.wait_converged();
    let before = rig.leases();
    for node in 0..3 {
        rig.wait_remembered(node);
    }
    let near = rig.traffic(0, 1);
    let far = rig.traffic(1, 2);

    rig.api().stop().unwrap();
    let start = std::time::Instant::now();
    for node in 0..3 {
        rig.wait_store(node, false);
    }
    rig.api().delete_node(&leaver.name()).unwrap();
    let changed = Peer {
        public_ip: "192.168.77.171".into(),
        mac: "0a:00:00:00:01:71".into(),
    };
    rig.publish(&changer.name(), &changed.public_ip, &changed.mac);
    comer.join(&rig);
    rig.api().compact();
    // A restart in the middle of it goes by what was known last.
    rig.stop_agent(2);
    rig.start_agent(2, &[]);
    rig.wait_ready(2);
    assert_eq!(rig.converged(2, &before), Ok(()));
    // And one that crashed.
    rig.kill_agent(1);
    rig.start_agent(1, &[]);
    rig.wait_ready(1);
    hold(OUTAGE.saturating_sub(start.elapsed()), || rig.all_run());
    for node in 0..3 {
        assert_eq!(rig.converged(node, &before), Ok(()), "node {node}");
        assert_eq!(rig.status(node)["lease"]["store_connected"], false);
    }

    rig.api().resume().unwrap();
    rig.wait_converged();
    assert_eq!(rig.leases().get(&changer.subnet()), Some(&changed));
    for node in 0..3 {
        rig.wait_store(node, true);
        rig.wait_no_trace(node, leaver.subnet(), &leaver.peer());
    }
    near.lossless();
    far.lossless();
    rig.all_run();
}

#[test]
fn restarts_of_the_labs_server_and_ended_watches_are_not_noticed() {
    if !privileged() {
        return;
    }
    let mut rig = KubeRig::start(3, &[]);
    let traffic = rig.traffic(0, 1);
    let mut strangers = (70..).map(Stranger);
    let mut join = |rig: &KubeRig| strangers.next().unwrap().join(rig);
    for gone in [Gone::Event, Gone::Status] {
        rig.api().set_gone(gone);
        rig.api().restart().unwrap();
        join(&rig);
        rig.wait_converged();
        for how in [WatchEnd::Clean, WatchEnd::Cut] {
            rig.api().end_watches(how);
            join(&rig);
            rig.wait_converged();
            // Behind the agents' backs, so that the next watch begins too early.
            rig.api().stop().unwrap();
            join(&rig);
            rig.api().compact();
            rig.api().resume().unwrap();
            rig.wait_converged();
        }
    }
    traffic.lossless();
    rig.all_run();
}

#[test]
fn failures_of_the_labs_server_are_outlived() {
    if !privileged() {
        return;
    }
    let mut rig = KubeRig::start(3, &[]);
    let traffic = rig.traffic(0, 1);
    let failures = [
        Failure {
            retry_after: Some(1),
            ..Failure::code(429)
        },
        Failure::code(500),
        Failure {
            verb: Some(Verb::Watch),
            ..Failure::code(503)
        },
        Failure {
            verb: Some(Verb::List),
            ..Failure::code(504)
        },
    ];
    for (failure, number) in failures.into_iter().zip(80..) {
        rig.api().fail(failure);
        rig.api().end_watches(WatchEnd::Cut);
        rig.api().compact();
        Stranger(number).join(&rig);
        hold(Duration::from_secs(2), || rig.all_run());
        rig.api().stop_failing();
        rig.wait_converged();
    }
    // It accepts connections and says nothing, with the old ones open.
    rig.api().hang(true);
    Stranger(90).join(&rig);
    rig.api().compact();
    hold(Duration::from_secs(3), || rig.all_run());
    rig.api().hang(false);
    rig.wait_converged();
    // It is slow.
    rig.api().delay(Duration::from_secs(2));
    rig.api().end_watches(WatchEnd::Clean);
    Stranger(91).join(&rig);
    rig.wait_converged();
    rig.api().delay(Duration::ZERO);
    // Its certificate has expired, and then it has a good one again.
    rig.api().expire_certificate(true).unwrap();
    rig.wait_store(0, false);
    Stranger(92).join(&rig);
    rig.api().expire_certificate(false).unwrap();
    rig.wait_converged();
    traffic.lossless();
    rig.all_run();
}

/// The API's host goes off the wire: nothing is refused, packets just do not come back.
#[test]
fn a_labs_server_that_vanishes_costs_no_packet() {
    if !privileged() {
        return;
    }
    let mut rig = KubeRig::start(3, &[]);
    let before = rig.leases();
    rig.wait_remembered(0);
    let traffic = rig.traffic(0, 1);
    rig.connect_api(false);
    Stranger(70).join(&rig);
    rig.api().compact();
    rig.stop_agent(0);
    rig.start_agent(0, &[]);
    rig.wait_ready(0);
    hold(Duration::from_secs(5), || rig.all_run());
    assert_eq!(rig.converged(0, &before), Ok(()));
    rig.api().cut_connections().expect("cut");
    rig.connect_api(true);
    // The agents' old connections know nothing of that; they have to notice it themselves.
    rig.wait_converged();
    traffic.lossless();
    rig.all_run();
}

/// The role of manifests up to 0.20.1 lacks `get` of nodes; ours needs what upstream's says today, and no more.
#[test]
fn the_roles_of_manifests_are_enough_on_the_labs_server() {
    if !privileged() {
        return;
    }
    let mut rig = KubeRig::new(2, kube_rig::NET_CONF);
    let account = apiserver::service_account();
    rig.api().set_rules(
        &account,
        vec![
            Rule::core("pods", &["get"]),
            Rule::core("nodes", &["list", "watch"]),
            Rule::core("nodes/status", &["patch"]),
        ],
    );
    for node in 0..2 {
        rig.create_node(node);
        rig.start_agent(node, &[]);
    }
    for node in 0..2 {
        rig.wait_ready(node);
        rig.add_pod(node);
    }
    rig.wait_converged();
    // The MAC address outlives the device without that right, too.
    let (mac, stored) = (rig.device_mac(0), rig.annotations(0));
    let traffic = rig.traffic(0, 1);
    rig.stop_agent(0);
    traffic.lossless();
    rig.ns(0).ip(&format!("link del {}", rig::DEVICE)).unwrap();
    std::fs::remove_file(rig.subnet_file(0)).unwrap();
    rig.start_agent(0, &[]);
    rig.wait_ready(0);
    assert_eq!(rig.device_mac(0), mac);
    assert_eq!(rig.annotations(0), stored);

    // A right that is taken away under a running agent: traffic goes on, the status says what is wrong.
    let traffic = rig.traffic(0, 1);
    rig.api().set_rules(&account, Vec::new());
    rig.api().end_watches(WatchEnd::Cut);
    eventually(PATIENCE, "the refusal is said", || {
        let log = rig.agent(0).log();
        let needle = r#"cannot list resource "nodes" in API group "" at the cluster scope"#;
        let other = needle.replace("list", "watch");
        (log.contains(needle) || log.contains(&other))
            .then_some(())
            .ok_or(log)
    });
    rig.api().set_rules(&account, apiserver::upstream_rules());
    Stranger(70).join(&rig);
    eventually(Duration::from_secs(90), "the rights are back", || {
        rig.converged(0, &rig.leases())
    });
    traffic.lossless();
    rig.all_run();
}

/// Projected tokens are replaced while the agent runs; the file says the new one.
#[test]
fn a_rotated_token_of_the_labs_server_is_read_again() {
    if !privileged() {
        return;
    }
    let mut rig = KubeRig::new(2, kube_rig::NET_CONF);
    let dir = rig.lab.node(0).run_dir.join("account");
    rig.api().write_service_account(&dir).unwrap();
    let kubeconfig = format!(
        "{{apiVersion: v1, kind: Config, current-context: x, contexts: [{{name: x, context: {{cluster: x, user: x}}}}], \
         clusters: [{{name: x, cluster: {{server: \"{}\", certificate-authority: {}}}}}], \
         users: [{{name: x, user: {{tokenFile: {}}}}}]}}",
        rig.api().url(),
        dir.join("ca.crt").display(),
        dir.join("token").display()
    );
    for node in 0..2 {
        rig.create_node(node);
        let file = rig.lab.node(node).run_dir.join("by-token-file");
        std::fs::write(&file, &kubeconfig).unwrap();
        let flag = format!("--kubeconfig-file={}", file.display());
        rig.start_agent(node, &[&flag]);
    }
    for node in 0..2 {
        rig.wait_ready(node);
        rig.add_pod(node);
    }
    rig.wait_converged();
    let traffic = rig.traffic(0, 1);
    rig.api().rotate_token(&apiserver::service_account());
    rig.api().write_service_account(&dir).unwrap();
    rig.api().end_watches(WatchEnd::Cut);
    Stranger(70).join(&rig);
    // Clients read the file again each minute.
    for node in 0..2 {
        eventually(Duration::from_mins(3), "the new token is used", || {
            rig.converged(node, &rig.leases())
        });
    }
    traffic.lossless();
    rig.all_run();
}
