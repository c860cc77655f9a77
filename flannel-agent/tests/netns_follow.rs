//! The uplink's address and MTU, and the subnet, may change while the agent runs: the same process follows.

mod rig;

use std::{net::Ipv4Addr, time::Duration};

use flannel_testkit::{
    eventually,
    json::{ip_json, link},
    privileged,
    traffic::FloodPing,
};
use rig::{DEVICE, PATIENCE, Rig, text};

const MOVED: Ipv4Addr = Ipv4Addr::new(192, 168, 77, 99);
const EVERY: Duration = Duration::from_millis(2);

fn pings(rig: &Rig) {
    eventually(PATIENCE, "the pods reach each other", || {
        rig.ping(0, 1)
            .and_then(|_| rig.ping(1, 0))
            .map_err(|error| format!("{error:#}"))
    });
}

/// The addresses of the tunnel's outer packets, as the kernel's device has it.
fn local(rig: &Rig, node: usize) -> Option<String> {
    let details = ip_json(rig.ns(node), &["-d", "link", "show", "dev", DEVICE]).ok()?;
    text(&details[0]["linkinfo"]["info_data"], "local")
}

/// What goes over the wire names the published address, and everything stands on it.
#[track_caller]
fn wait_published(rig: &mut Rig, address: Ipv4Addr) {
    eventually(PATIENCE, "the address is published", || {
        let lease = rig.lease(0);
        if lease.public_ip != address.to_string() {
            return Err(lease.public_ip);
        }
        let local = local(rig, 0);
        (local.as_deref() == Some(&address.to_string()))
            .then_some(())
            .ok_or(format!("the device has {local:?}"))
    });
    rig.wait_converged();
}

#[test]
fn another_address_is_published() {
    if !privileged() {
        return;
    }
    for flags in [&[][..], &["--datapath=kernel"]] {
        let mut rig = Rig::start(2, flags);
        pings(&rig);
        let (pid, lease) = (rig.agent(0).pid(), rig.lease(0));
        let old = rig.node(0).ip;
        // As a DHCP client with another answer does it.
        rig.ns(0)
            .ip(&format!("addr del {old}/24 dev eth0"))
            .unwrap();
        rig.ns(0)
            .ip(&format!("addr add {MOVED}/24 dev eth0"))
            .unwrap();
        wait_published(&mut rig, MOVED);
        let now = rig.lease(0);
        assert_eq!(now.mac, lease.mac, "peers need not learn another MAC");
        pings(&rig);
        assert!(rig.agent(0).is_running());
        assert_eq!(rig.agent(0).pid(), pid);
        // And back.
        rig.ns(0)
            .ip(&format!("addr del {MOVED}/24 dev eth0"))
            .unwrap();
        rig.ns(0)
            .ip(&format!("addr add {old}/24 dev eth0"))
            .unwrap();
        wait_published(&mut rig, old);
        pings(&rig);
    }
}

#[test]
fn neither_a_second_address_nor_another_default_route_moves_the_overlay() {
    if !privileged() {
        return;
    }
    let mut rig = Rig::start(2, &[]);
    let flood = FloodPing::start(&rig.pod(0).ns, rig.pod(1).ip, EVERY).unwrap();
    let before = (
        local(&rig, 0),
        link(rig.ns(0), DEVICE).unwrap()["ifindex"].clone(),
    );
    // A lower address, which a fresh start might choose, and a VPN that takes the default route.
    rig.ns(0).ip("addr add 192.168.77.2/24 dev eth0").unwrap();
    rig.ns(0)
        .ip("link add vpn0 type veth peer name vpn1")
        .unwrap();
    rig.ns(0).ip("addr add 172.31.0.2/24 dev vpn0").unwrap();
    rig.ns(0).ip("link set vpn0 up").unwrap();
    rig.ns(0).ip("link set vpn1 up").unwrap();
    rig.ns(0)
        .ip("route add default via 172.31.0.1 dev vpn0 metric 1")
        .unwrap();
    // Longer than the agent waits for changes to settle, and than it takes to look at everything.
    std::thread::sleep(Duration::from_secs(12));
    let after = (
        local(&rig, 0),
        link(rig.ns(0), DEVICE).unwrap()["ifindex"].clone(),
    );
    assert_eq!(after, before);
    assert_eq!(
        rig.agent(0)
            .log()
            .matches("INFO Using interface with name ")
            .count(),
        1,
        "{}",
        rig.agent(0).log()
    );
    let flood = flood.stop().unwrap();
    assert_eq!(flood.lost, 0, "{flood:?}");
}

#[test]
fn another_mtu_is_passed_on_without_a_loss() {
    if !privileged() {
        return;
    }
    for flags in [&[][..], &["--datapath=kernel"]] {
        let mut rig = Rig::start(2, flags);
        let flood = FloodPing::start(&rig.pod(0).ns, rig.pod(1).ip, EVERY).unwrap();
        rig.ns(0).ip("link set eth0 mtu 1400").unwrap();
        eventually(PATIENCE, "the MTU is passed on", || {
            let mtu = link(rig.ns(0), DEVICE).map_err(|error| format!("{error:#}"))?["mtu"].clone();
            let env = rig.subnet_env(0, "FLANNEL_MTU");
            (mtu == 1350 && env == "1350")
                .then_some(())
                .ok_or(format!("{mtu}, {env}"))
        });
        rig.wait_converged();
        pings(&rig);
        let flood = flood.stop().unwrap();
        assert_eq!(flood.lost, 0, "{flood:?}");
        assert!(rig.agent(0).is_running());
    }
}

#[test]
fn the_address_is_followed_into_a_bridge() {
    if !privileged() {
        return;
    }
    let mut rig = Rig::start(2, &[]);
    pings(&rig);
    let address = rig.node(0).ip;
    // What an administrator does who makes room for virtual machines.
    rig.ns(0).ip("link add br0 type bridge").unwrap();
    rig.ns(0).ip("link set br0 up").unwrap();
    rig.ns(0).ip("link set eth0 master br0").unwrap();
    rig.ns(0)
        .ip(&format!("addr del {address}/24 dev eth0"))
        .unwrap();
    rig.ns(0)
        .ip(&format!("addr add {address}/24 dev br0"))
        .unwrap();
    eventually(PATIENCE, "the tunnel runs over the bridge", || {
        let details = ip_json(rig.ns(0), &["-d", "link", "show", "dev", DEVICE]);
        let details = details.map_err(|error| format!("{error:#}"))?;
        let lower = text(&details[0]["linkinfo"]["info_data"], "link");
        (lower.as_deref() == Some("br0"))
            .then_some(())
            .ok_or(format!("{lower:?}"))
    });
    rig.wait_converged();
    pings(&rig);
    assert!(rig.agent(0).is_running());
}

#[test]
fn an_uplink_without_an_address_is_waited_for() {
    if !privileged() {
        return;
    }
    let mut rig = Rig::start(2, &[]);
    pings(&rig);
    let address = rig.node(0).ip;
    rig.ns(0)
        .ip(&format!("addr del {address}/24 dev eth0"))
        .unwrap();
    rig.agent(0)
        .wait_log("the uplink cannot be used at the moment", PATIENCE)
        .unwrap();
    rig.ns(0)
        .ip(&format!("addr add {address}/24 dev eth0"))
        .unwrap();
    rig.agent(0)
        .wait_log("the uplink can be used again", PATIENCE)
        .unwrap();
    rig.wait_converged();
    pings(&rig);
    assert_eq!(
        rig.agent(0)
            .log()
            .matches("INFO Using interface with name ")
            .count(),
        1,
        "{}",
        rig.agent(0).log()
    );
}

fn write_config(rig: &Rig, settings: &str) {
    let text = format!(r#"{{"Network":"10.244.0.0/16","Backend":{{"Type":"vxlan"{settings}}}}}"#);
    let file = rig.lease_dir().join("config");
    let beside = rig.lease_dir().join("config.new");
    std::fs::write(&beside, text).unwrap();
    std::fs::rename(beside, file).unwrap();
}

#[test]
fn another_network_configuration_is_applied_where_it_can_be() {
    if !privileged() {
        return;
    }
    let mut rig = Rig::start(2, &["--ip-masq"]);
    let pid = rig.agent(0).pid();
    let flood = FloodPing::start(&rig.pod(0).ns, rig.pod(1).ip, EVERY).unwrap();
    let before = link(rig.ns(0), DEVICE).unwrap()["ifindex"].clone();
    write_config(&rig, r#","MTU":1400,"BpfFastPath":"off""#);
    eventually(PATIENCE, "MTU and fast path are applied", || {
        let mtu = link(rig.ns(0), DEVICE).map_err(|error| format!("{error:#}"))?["mtu"].clone();
        let env = rig.subnet_env(0, "FLANNEL_MTU");
        let mode = rig.status(0)["fast_path"]["mode"].clone();
        (mtu == 1350 && env == "1350" && mode == "off")
            .then_some(())
            .ok_or(format!("{mtu}, {env}, {mode}"))
    });
    // Neither of these can be: each is one line, and nothing else happens.
    for (settings, line) in [
        (r#","VNI":7"#, "Backend.VNI"),
        (r#","Port":4789"#, "Backend.Port"),
        (r#","MTU":-5"#, "Backend.MTU is -5"),
    ] {
        write_config(&rig, settings);
        rig.agent(0).wait_log(line, PATIENCE).unwrap();
    }
    write_config(&rig, "");
    eventually(PATIENCE, "and back", || {
        let mtu = link(rig.ns(0), DEVICE).map_err(|error| format!("{error:#}"))?["mtu"].clone();
        (mtu == 1450).then_some(()).ok_or(mtu.to_string())
    });
    rig.wait_converged();
    assert_eq!(link(rig.ns(0), DEVICE).unwrap()["ifindex"], before);
    assert_eq!(rig.agent(0).pid(), pid);
    let flood = flood.stop().unwrap();
    assert_eq!(flood.lost, 0, "{flood:?}");
}

/// From one firewall to the other while running: what masquerades is never gone, and the other's rules are.
#[test]
fn another_firewall_is_applied() {
    if !privileged() {
        return;
    }
    let rig = Rig::start(2, &["--ip-masq"]);
    let rules = |rig: &Rig| {
        let iptables = rig.ns(0).exec(["iptables-save", "-t", "nat"]).unwrap();
        let tables = rig.ns(0).exec(["nft", "list", "tables"]).unwrap();
        (
            iptables.contains("FLANNEL-POSTRTG"),
            tables.contains("flannel-ipv4"),
        )
    };
    assert_eq!(rules(&rig), (true, false));
    let file = rig.lease_dir().join("config");
    let nftables =
        r#"{"Network":"10.244.0.0/16","EnableNFTables":true,"Backend":{"Type":"vxlan"}}"#;
    std::fs::write(&file, nftables).unwrap();
    eventually(PATIENCE, "nftables masquerades", || {
        let found = rules(&rig);
        (found == (false, true))
            .then_some(())
            .ok_or(format!("{found:?}"))
    });
    write_config(&rig, "");
    eventually(PATIENCE, "iptables masquerades", || {
        let found = rules(&rig);
        (found == (true, false))
            .then_some(())
            .ok_or(format!("{found:?}"))
    });
    pings(&rig);
}

/// A subnet that another node has taken is given up, and everything that names it follows: device, `subnet.env`, masquerade.
#[test]
fn another_subnet_is_taken_up() {
    if !privileged() {
        return;
    }
    let mut rig = Rig::start(2, &["--ip-masq"]);
    let pid = rig.agent(0).pid();
    let old = rig.node(0).subnet;
    let stranger = "192.168.77.66".parse().unwrap();
    rig.put_lease(old, stranger, "02:00:00:00:00:66");
    let rules = |rig: &Rig, subnet: &str| {
        let saved = rig.ns(0).exec(["iptables-save", "-t", "nat"]).unwrap();
        saved.contains(&format!("-A FLANNEL-POSTRTG -s {subnet} -d 10.244.0.0/16 "))
    };
    eventually(PATIENCE, "another subnet stands everywhere", || {
        let new = rig.subnet_env(0, "FLANNEL_SUBNET");
        let base = new.replace(".1/24", ".0/24");
        let address = ip_json(rig.ns(0), &["-4", "addr", "show", "dev", DEVICE])
            .map_err(|error| format!("{error:#}"))?;
        let address = text(&address[0]["addr_info"][0], "local").unwrap_or_default();
        let done = base != old.to_string()
            && rules(&rig, &base)
            && !rules(&rig, &old.to_string())
            && format!("{address}/24") == base;
        done.then_some(()).ok_or(format!("{new}, {address}"))
    });
    assert_eq!(rig.agent(0).pid(), pid);
    assert!(rig.agent(0).is_running());
}
