//! The set-ups of users' reports, with their own flags, configurations and leases.

use std::{fs, os::unix::net::UnixDatagram, path::Path, time::Duration};

use flannel_testkit::{
    AgentProcess, Etcd, LabOptions, Node, eventually, json::ip_json, privileged, process,
};

use crate::{
    etcd_rig::EtcdRig,
    rig::{DEVICE, NET_CONF, PATIENCE, Rig, agent_binary, kernel_peers, text},
};

/// An agent as a unit of systemd with `Type=notify` starts it.
fn start_unit(node: &Node, flags: &[&str]) -> (AgentProcess, UnixDatagram) {
    let path = node.run_dir.join("notify");
    let _absent = fs::remove_file(&path);
    let socket = UnixDatagram::bind(&path).expect("bind the socket of systemd");
    socket
        .set_read_timeout(Some(PATIENCE))
        .expect("set a time limit");
    let path = path.display().to_string();
    let agent = AgentProcess::spawn(node, agent_binary(), flags, &[("NOTIFY_SOCKET", &path)]);
    (agent.expect("an agent"), socket)
}

/// Waits until systemd has heard that the unit is ready.
#[track_caller]
fn wait_notified(agent: &AgentProcess, socket: &UnixDatagram) {
    let mut buffer = [0; 4096];
    loop {
        let len = socket
            .recv(&mut buffer)
            .unwrap_or_else(|error| panic!("{error}; it said:\n{}", agent.log()));
        let said = String::from_utf8_lossy(&buffer[..len]);
        if said.lines().any(|line| line == "READY=1") {
            return;
        }
    }
}

fn local(node: &Node) -> Option<String> {
    let details = ip_json(&node.ns, &["-d", "link", "show", "dev", DEVICE]).ok()?;
    text(&details[0]["linkinfo"]["info_data"], "local")
}

/// What a shell makes of a variable of the subnet file, as the units of container engines do.
fn sourced(file: &Path, name: &str) -> String {
    let mut command = std::process::Command::new("sh");
    let script = format!(". {}; printf %s \"${name}\"", file.display());
    process::succeed(command.args(["-c", &script]), PATIENCE).expect("source the subnet file")
}

/// Flannel 0.7 as a service: three endpoints, of which two are down, flags that are no more, and a virtual address on the uplink.
#[test]
fn a_unit_with_three_endpoints_and_a_virtual_address() {
    if !privileged() {
        return;
    }
    let conf = r#"{ "Network": "100.64.0.0/16", "SubnetLen": 24, "Backend": {"Type": "vxlan"} }"#;
    for (extra, vip_first) in [
        (&[][..], false),
        (&["-interface=eth0", "-public-ip=192.168.77.11"], false),
        (&["-interface=eth0", "-public-ip=192.168.77.11"], true),
    ] {
        let rig = EtcdRig::new(1, conf);
        let node = rig.lab.node(0);
        let ip = node.ip.to_string();
        assert_eq!(ip, "192.168.77.11");
        let mut addresses = [format!("{ip}/24"), "192.168.77.150/32".to_owned()];
        if vip_first {
            addresses.reverse();
        }
        node.ns.ip("addr flush dev eth0").unwrap();
        for address in addresses {
            node.ns.ip(&format!("addr add {address} dev eth0")).unwrap();
        }
        node.ns.ip("route add default via 192.168.77.1").unwrap();
        let dir = node.run_dir.join("flanneld");
        let file = dir.join("subnet.env");
        let endpoints = format!(
            "-etcd-endpoints=http://192.168.77.1:4001,http://192.168.77.2:4001,{}",
            rig.etcd.endpoint()
        );
        let networks = format!("-subnet-dir={}/networks", dir.display());
        let subnet_file = format!("-subnet-file={}", file.display());
        let flags = [
            &[endpoints.as_str(), "-logtostderr=true", "-ip-masq=true"][..],
            &[networks.as_str(), subnet_file.as_str()],
            extra,
        ]
        .concat();
        let (mut agent, socket) = start_unit(node, &flags);
        wait_notified(&agent, &socket);
        let log = agent.log();
        let warned: Vec<&str> = log.lines().filter(|line| line.contains(" WARN ")).collect();
        for flag in ["--logtostderr", "--subnet-dir"] {
            assert!(warned.iter().any(|line| line.contains(flag)), "{log}");
        }
        assert_eq!(
            warned.iter().any(|line| line.contains("--interface ")),
            !extra.is_empty(),
            "{log}"
        );
        assert!(!log.contains(" ERROR "), "{log}");
        // The address of the node, not the virtual one.
        assert_eq!(local(node).as_deref(), Some(ip.as_str()));
        let stored = rig.stored();
        let [(key, value)] = &stored.iter().collect::<Vec<_>>()[..] else {
            panic!("{stored:?}");
        };
        assert!(
            value.starts_with(&format!(r#"{{"PublicIP":"{ip}","#)),
            "{value}"
        );
        let subnet = key.replace("0-24", "1/24");
        assert_eq!(
            fs::read_to_string(&file).unwrap(),
            format!(
                "FLANNEL_NETWORK=100.64.0.0/16\nFLANNEL_SUBNET={subnet}\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n"
            )
        );
        assert_eq!(sourced(&file, "FLANNEL_SUBNET"), subnet);
        assert!(agent.is_running());
    }
}

/// Flannel 0.7.1 as a service: a prefix of its own, certificates, and leases of that release, whose values have no VNI.
#[test]
fn a_unit_with_another_prefix_among_leases_of_an_old_release() {
    if !privileged() {
        return;
    }
    let rig = Rig::new(1);
    let host = rig.lab().host("etcd", 200).expect("a host for etcd");
    let etcd = Etcd::start(Some(&host), [192, 168, 77, 200].into()).expect("etcd");
    let prefix = "/kubernetes/network";
    let old = |ip: &str, mac: &str| {
        format!(
            r#"{{"PublicIP":"{ip}","BackendType":"vxlan","BackendData":{{"VtepMAC":"{mac}"}}}}"#
        )
    };
    let own = rig.node(0).ip.to_string();
    for (name, value) in [
        (
            "config",
            r#"{ "Network": "172.30.0.0/16", "SubnetLen": 24, "Backend": { "Type": "vxlan" } }"#
                .to_owned(),
        ),
        (
            "subnets/172.30.19.0-24",
            old("192.168.77.70", "d6:51:2e:80:5c:69"),
        ),
        (
            "subnets/172.30.20.0-24",
            old("192.168.77.71", "d6:51:2e:80:5c:70"),
        ),
        ("subnets/172.30.21.0-24", old(&own, "d6:51:2e:80:5c:71")),
    ] {
        etcd.put(&format!("{prefix}/{name}"), &value).unwrap();
    }
    let dir = &rig.node(0).run_dir;
    let mut openssl = std::process::Command::new("openssl");
    openssl.current_dir(dir).args(
        "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=flanneld -keyout flanneld-key.pem -out flanneld.pem"
            .split(' '),
    );
    process::succeed(&mut openssl, PATIENCE).expect("a certificate");
    let at = |name: &str| dir.join(name).display().to_string();
    let flags = [
        format!("-etcd-cafile={}", at("flanneld.pem")),
        format!("-etcd-certfile={}", at("flanneld.pem")),
        format!("-etcd-keyfile={}", at("flanneld-key.pem")),
        format!("-etcd-endpoints={}", etcd.endpoint()),
        format!("-etcd-prefix={prefix}"),
        format!("--subnet-file={}", at("subnet.env")),
    ];
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    let (agent, socket) = start_unit(rig.node(0), &flags);
    wait_notified(&agent, &socket);
    // What the guide greps for.
    assert!(
        agent.log().contains("Lease acquired: 172.30.21.0/24"),
        "{}",
        agent.log()
    );
    assert_eq!(rig.subnet_env(0, "FLANNEL_SUBNET"), "172.30.21.1/24");
    eventually(PATIENCE, "the old peers are there", || {
        let (_, peers) = kernel_peers(rig.ns(0)).map_err(|error| format!("{error:#}"))?;
        let known: Vec<(String, String, String)> = peers
            .into_iter()
            .map(|(subnet, peer)| (subnet.to_string(), peer.public_ip, peer.mac))
            .collect();
        let want = [
            ("172.30.19.0/24", "192.168.77.70", "d6:51:2e:80:5c:69"),
            ("172.30.20.0/24", "192.168.77.71", "d6:51:2e:80:5c:70"),
        ]
        .map(|(subnet, ip, mac)| (subnet.to_owned(), ip.to_owned(), mac.to_owned()));
        (known == want).then_some(()).ok_or(format!("{known:?}"))
    });
}

/// The configuration was written with the older API of etcd, as all guides before 2022 have it.
#[test]
fn a_configuration_of_the_version_2_api_is_named_and_waited_for() {
    if !privileged() {
        return;
    }
    let rig = Rig::new(1);
    let host = rig.lab().host("etcd", 200).expect("a host for etcd");
    let ip = [192, 168, 77, 200].into();
    let etcd = Etcd::start_with(Some(&host), ip, &["--enable-v2=true"]).expect("etcd");
    let key = "/coreos.com/network/config";
    let mut put = host.command("etcdctl");
    put.env("ETCDCTL_API", "2")
        .args(["--endpoints", &etcd.endpoint(), "set", key, NET_CONF]);
    process::succeed(&mut put, PATIENCE).expect("etcdctl set");
    let endpoints = format!("--etcd-endpoints={}", etcd.endpoint());
    let file = format!("--subnet-file={}", rig.subnet_file(0).display());
    let (mut agent, socket) = start_unit(rig.node(0), &[&endpoints, &file]);
    let line =
        "flannel config not found in etcd store. Did you create your config using etcdv3 API?";
    agent.wait_log(line, PATIENCE).unwrap();
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(agent.log().matches(line).count(), 1, "{}", agent.log());
    assert!(agent.is_running());
    etcd.put(key, NET_CONF).unwrap();
    wait_notified(&agent, &socket);
}

/// The service is started before the network is: it says so and ends, and the start after that works.
#[test]
fn a_start_before_the_uplink_has_an_address_is_made_again() {
    if !privileged() {
        return;
    }
    let mut rig = Rig::with(
        LabOptions {
            nodes: 1,
            ..LabOptions::default()
        },
        NET_CONF,
    );
    let ip = rig.node(0).ip;
    rig.ns(0).ip("addr flush dev eth0").unwrap();
    for (flags, needle) in [
        (&[][..], "unable to find default route"),
        (&["--iface=eth0"], "eth0"),
    ] {
        let mut command = rig.ns(0).command(agent_binary());
        command.args(rig.common_flags(0)).args(flags);
        let done = process::finish(&mut command, PATIENCE).expect("it ends");
        let errors: Vec<&str> = done
            .stderr
            .lines()
            .filter(|line| line.contains(" ERROR "))
            .collect();
        assert!(
            matches!(errors[..], [line] if line.contains(needle)),
            "{flags:?}: {}",
            done.stderr
        );
        assert!(!rig.subnet_file(0).exists());
        assert!(rig.ns(0).ifindex(DEVICE).is_err(), "nothing was changed");
    }
    rig.ns(0).ip(&format!("addr add {ip}/24 dev eth0")).unwrap();
    rig.ns(0).ip("route add default via 192.168.77.1").unwrap();
    rig.start_agent(0, &[]);
    rig.wait_ready(0);
}
