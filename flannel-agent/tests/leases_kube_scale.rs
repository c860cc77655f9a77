//! How much memory an agent needs for a large cluster, and a table of subnets that follows the nodes' real subnets.

use std::{fs, path::Path, time::Duration};

use flannel_testkit::{
    AgentProcess, Lab, LabOptions,
    apiserver::{ApiServer, Kind, node},
    eventually, privileged,
};

const PATIENCE: Duration = Duration::from_mins(2);
/// Nodes of some 15 KB each.
const NODES: u32 = 5000;
/// What the agent may have needed at most, in KiB.
const LIMIT: u64 = 60 * 1024;
/// What a release build has of its own file in memory, in KiB.
const PROGRAM: u64 = 18 * 1024;

/// A lab of one node, an API server in the underlay, and an agent.
struct Place {
    agent: AgentProcess,
    api: ApiServer,
    lab: Lab,
}

impl Place {
    fn start(network: &str, own: &str, prepare: impl FnOnce(&ApiServer)) -> Self {
        let lab = Lab::new(LabOptions {
            nodes: 1,
            ..LabOptions::default()
        })
        .expect("a lab");
        let api = ApiServer::start(Some(lab.underlay()), Lab::GATEWAY).expect("an API server");
        api.create(Kind::Node, node("n0", &[own])).expect("a node");
        prepare(&api);
        let dir = &lab.node(0).run_dir;
        // The range is not looked at.
        let conf = format!(
            r#"{{"Network":"{network}","SubnetLen":17,"SubnetMin":"1.2.3.4","Backend":{{"Type":"vxlan"}}}}"#
        );
        fs::write(dir.join("net-conf.json"), conf).expect("net-conf.json");
        fs::write(dir.join("kubeconfig"), api.kubeconfig()).expect("kubeconfig");
        let flag = |name: &str, file: &str| format!("--{name}={}", dir.join(file).display());
        let flags = [
            "--kube-subnet-mgr".to_owned(),
            flag("kubeconfig-file", "kubeconfig"),
            flag("net-config-path", "net-conf.json"),
            flag("subnet-file", "subnet.env"),
            flag("cni-cache-dir", "cni-cache"),
        ];
        let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
        let binary = Path::new(env!("CARGO_BIN_EXE_flannel-agent"));
        let agent = AgentProcess::spawn(lab.node(0), binary, &flags, &[("NODE_NAME", "n0")])
            .expect("an agent");
        Self { agent, api, lab }
    }

    /// A field of the agent's `/proc/<pid>/status`, in KiB.
    fn memory(&self, field: &str) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.agent.pid()));
        let status = status.expect("the agent runs");
        let line = status.lines().find_map(|line| line.strip_prefix(field));
        let number = line.and_then(|line| line.split_whitespace().next());
        number.expect("a number").parse().expect("a number")
    }

    fn wait_routes(&self, wanted: usize) {
        eventually(PATIENCE, "a route for each node", || {
            let routes = self.routes();
            if routes == wanted {
                Ok(())
            } else {
                Err(format!("{routes} routes of {wanted}"))
            }
        });
    }

    fn routes(&self) -> usize {
        let routes = self.lab.node(0).ns.ip("route show dev flannel.1");
        routes.map_or(0, |text| text.lines().count())
    }
}

#[test]
fn five_thousand_nodes_fit_into_sixty_megabytes() {
    if !privileged() {
        return;
    }
    let mut place = Place::start("10.0.0.0/8", "10.200.1.0/24", |api| {
        api.create_full_size_nodes(0..NODES);
    });
    place.agent.wait_ready(PATIENCE).expect("ready");
    place.wait_routes(NODES as usize);
    // Again, with everything in memory already.
    place.api.stop().expect("stop");
    place.api.delete_node("full-00007").expect("delete");
    place.api.compact();
    place.api.resume().expect("resume");
    place.wait_routes(NODES as usize - 1);
    let asked = place.api.asked().into_iter();
    let lists = asked.filter(|one| one.query == "limit=500");
    assert_eq!(lists.count(), 2);
    // Pages of the program itself count, too, but those of an unoptimised one are several times those of a release.
    let program = place.memory("RssFile:");
    let peak = place.memory("VmHWM:") - program.saturating_sub(PROGRAM);
    println!("{peak} KiB at most, of which {PROGRAM} for the program ({program} in this build)");
    assert!(peak < LIMIT, "{peak} KiB at most, {LIMIT} allowed");
}

#[test]
fn the_table_of_subnets_follows_the_nodes() {
    if !privileged() {
        return;
    }
    let annotated = |api: &ApiServer, name: &str, cidr: &str, host: u8| {
        let mut node = node(name, &[cidr]);
        node["metadata"]["annotations"] = serde_json::json!({
            "flannel.alpha.coreos.com/backend-data": format!("{{\"VNI\":1,\"VtepMAC\":\"0a:00:00:00:00:{host:02x}\"}}"),
            "flannel.alpha.coreos.com/backend-type": "vxlan",
            "flannel.alpha.coreos.com/kube-subnet-manager": "true",
            "flannel.alpha.coreos.com/public-ip": format!("192.168.77.{host}"),
        });
        api.create(Kind::Node, node).expect("a node");
    };
    let mut place = Place::start("10.5.0.0/16", "10.5.1.0/25", |api| {
        annotated(api, "n1", "10.5.1.128/25", 50);
    });
    place.agent.wait_ready(PATIENCE).expect("ready");
    let env = fs::read_to_string(&place.agent.subnet_file).expect("subnet.env");
    assert!(env.contains("FLANNEL_SUBNET=10.5.1.1/25"), "{env}");
    let carried = |subnet: &str| {
        let binary = env!("CARGO_BIN_EXE_flannel-agent");
        let file = format!("--subnet-file={}", place.agent.subnet_file.display());
        let mut command = place.lab.node(0).ns.command(Path::new(binary));
        let output = command
            .args([file.as_str(), "peers", "-o", "json"])
            .output();
        let output = output.expect("peers");
        let rows: serde_json::Value =
            serde_json::from_slice(&output.stdout).map_err(|_| format!("{output:?}"))?;
        let rows = rows.as_array().ok_or("no rows")?;
        let row = rows.iter().find(|row| row["subnet"] == subnet);
        // That it is in the map shows by the path MTU, which only maps have.
        let carried = row.is_some_and(|row| !row["path_mtu"].is_null());
        if carried {
            Ok(())
        } else {
            Err(format!("{rows:?}"))
        }
    };
    eventually(PATIENCE, "the half is in the map", || {
        carried("10.5.1.128/25")
    });
    annotated(&place.api, "n2", "10.5.2.64/26", 51);
    eventually(PATIENCE, "the quarter is in the map", || {
        carried("10.5.2.64/26")
    });
    let log = place.agent.log();
    assert!(
        log.contains("there are smaller subnets than before"),
        "{log}"
    );
}
