//! The rules that a node of a real cluster has: flannel's masquerade and forward rules and kube-proxy's, in the order and shape
//! that the two write them.

use std::{
    fmt::Write as _,
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::Path,
};

use anyhow::Context as _;
use flannel_testkit::{Family, Netns};

/// The service that is backed by the server's pod.
pub const fn service_ip(family: Family) -> IpAddr {
    match family {
        Family::V4 => IpAddr::V4(Ipv4Addr::new(10, 96, 0, 10)),
        Family::V6 => IpAddr::V6(Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0x10)),
    }
}
/// Port of the service.
pub const SERVICE_PORT: u16 = 80;

/// A node's place in its cluster.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// All pods of the cluster.
    pub network: &'a str,
    /// The pods of this node.
    pub subnet: &'a str,
    /// Who answers for [`service_ip`]; its family is that of the rules.
    pub backend: SocketAddr,
}

/// No rules, no connection tracking, and bridged packets are not shown to iptables.
pub fn clear(node: &Netns) -> anyhow::Result<()> {
    node.set_sysctl("net/bridge/bridge-nf-call-iptables", "0")?;
    node.set_sysctl("net/bridge/bridge-nf-call-ip6tables", "0")
}

/// Puts the rules for `services` services in place; the one that is used stands in the middle.
pub fn apply(node: &Netns, dir: &Path, place: Place<'_>, services: u32) -> anyhow::Result<()> {
    let (sysctl, program) = match Family::of(place.backend.ip()) {
        Family::V4 => ("bridge-nf-call-iptables", "iptables-restore"),
        Family::V6 => ("bridge-nf-call-ip6tables", "ip6tables-restore"),
    };
    node.set_sysctl(&format!("net/bridge/{sysctl}"), "1")?;
    let file = dir.join("iptables.rules");
    fs::write(&file, rules(place, services.max(1)))
        .with_context(|| format!("write {}", file.display()))?;
    let argv = [program.as_ref(), file.as_os_str()];
    node.exec(argv).map(drop)
}

const FILTER: &str = "\
*filter
:INPUT ACCEPT [0:0]
:FORWARD ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:FLANNEL-FWD - [0:0]
:KUBE-EXTERNAL-SERVICES - [0:0]
:KUBE-FIREWALL - [0:0]
:KUBE-FORWARD - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-PROXY-FIREWALL - [0:0]
:KUBE-SERVICES - [0:0]
-A INPUT -m conntrack --ctstate NEW -m comment --comment \"kubernetes load balancer firewall\" -j KUBE-PROXY-FIREWALL
-A INPUT -m comment --comment \"kubernetes health check service ports\" -j KUBE-NODEPORTS
-A INPUT -m conntrack --ctstate NEW -m comment --comment \"kubernetes externally-visible service portals\" -j KUBE-EXTERNAL-SERVICES
-A INPUT -j KUBE-FIREWALL
-A FORWARD -m conntrack --ctstate NEW -m comment --comment \"kubernetes load balancer firewall\" -j KUBE-PROXY-FIREWALL
-A FORWARD -m comment --comment \"kubernetes forwarding rules\" -j KUBE-FORWARD
-A FORWARD -m conntrack --ctstate NEW -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A FORWARD -m conntrack --ctstate NEW -m comment --comment \"kubernetes externally-visible service portals\" -j KUBE-EXTERNAL-SERVICES
-A FORWARD -m comment --comment \"flanneld forward\" -j FLANNEL-FWD
-A OUTPUT -m conntrack --ctstate NEW -m comment --comment \"kubernetes load balancer firewall\" -j KUBE-PROXY-FIREWALL
-A OUTPUT -m conntrack --ctstate NEW -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A OUTPUT -j KUBE-FIREWALL
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
-A KUBE-FORWARD -m comment --comment \"kubernetes forwarding rules\" -m mark --mark 0x4000/0x4000 -j ACCEPT
-A KUBE-FORWARD -m comment --comment \"kubernetes forwarding conntrack rule\" -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
";

/// The one rule of the table that IPv6 does not have.
const LOCALNET: &str = "-A KUBE-FIREWALL ! -s 127.0.0.0/8 -d 127.0.0.0/8 -m comment --comment \"block incoming localnet connections\" -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP";

const NAT_BASE: &str = "\
-A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A OUTPUT -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A POSTROUTING -m comment --comment \"kubernetes postrouting rules\" -j KUBE-POSTROUTING
-A POSTROUTING -m comment --comment \"flanneld masq\" -j FLANNEL-POSTRTG
-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0
-A KUBE-POSTROUTING -m comment --comment \"kubernetes service traffic requiring SNAT\" -j MASQUERADE --random-fully
";

/// Input of `iptables-restore`.
fn rules(place: Place<'_>, services: u32) -> String {
    let Place {
        network,
        subnet,
        backend,
    } = place;
    let mut text = String::from(FILTER);
    let mut line = |line: std::fmt::Arguments<'_>| {
        // Writing to a string does not fail.
        let _ok = text.write_fmt(line);
        text.push('\n');
    };
    let family = Family::of(backend.ip());
    if family == Family::V4 {
        line(format_args!("{LOCALNET}"));
    }
    let groups = match family {
        Family::V4 => "224.0.0.0/4",
        Family::V6 => "ff00::/8",
    };
    let forward = "-m comment --comment \"flanneld forward\" -j ACCEPT";
    line(format_args!("-A FLANNEL-FWD -s {network} {forward}"));
    line(format_args!("-A FLANNEL-FWD -d {network} {forward}"));
    line(format_args!("COMMIT\n*nat"));
    for chain in ["PREROUTING", "INPUT", "OUTPUT", "POSTROUTING"] {
        line(format_args!(":{chain} ACCEPT [0:0]"));
    }
    for chain in [
        "FLANNEL-POSTRTG",
        "KUBE-MARK-MASQ",
        "KUBE-NODEPORTS",
        "KUBE-POSTROUTING",
        "KUBE-SERVICES",
    ] {
        line(format_args!(":{chain} - [0:0]"));
    }
    for service in 0..services {
        line(format_args!(":KUBE-SVC-{service:016X} - [0:0]"));
        line(format_args!(":KUBE-SEP-{service:016X} - [0:0]"));
    }
    line(format_args!("{}", NAT_BASE.trim_end()));
    let masquerade = [
        "-m mark --mark 0x4000/0x4000 -m comment --comment \"flanneld masq\" -j RETURN".to_owned(),
        format!("-s {subnet} -d {network} -m comment --comment \"flanneld masq\" -j RETURN"),
        format!("-s {network} -d {subnet} -m comment --comment \"flanneld masq\" -j RETURN"),
        format!("! -s {network} -d {subnet} -m comment --comment \"flanneld masq\" -j RETURN"),
        format!(
            "-s {network} ! -d {groups} -m comment --comment \"flanneld masq\" -j MASQUERADE --random-fully"
        ),
        format!(
            "! -s {network} -d {network} -m comment --comment \"flanneld masq\" -j MASQUERADE --random-fully"
        ),
    ];
    for rule in masquerade {
        line(format_args!("-A FLANNEL-POSTRTG {rule}"));
    }
    for service in 0..services {
        let used = service == services / 2;
        let (ip, target) = if used {
            (service_ip(family), backend)
        } else {
            other_service(family, service)
        };
        let to = target.ip();
        let comment = format!("-m comment --comment \"default/svc-{service}:http\"");
        line(format_args!(
            "-A KUBE-SERVICES -d {ip} -p tcp {comment} -m tcp --dport {SERVICE_PORT} -j KUBE-SVC-{service:016X}"
        ));
        line(format_args!(
            "-A KUBE-SVC-{service:016X} ! -s {network} -d {ip} -p tcp {comment} -m tcp --dport {SERVICE_PORT} -j KUBE-MARK-MASQ"
        ));
        line(format_args!(
            "-A KUBE-SVC-{service:016X} {comment} -j KUBE-SEP-{service:016X}"
        ));
        line(format_args!(
            "-A KUBE-SEP-{service:016X} -s {to} {comment} -j KUBE-MARK-MASQ"
        ));
        line(format_args!(
            "-A KUBE-SEP-{service:016X} -p tcp {comment} -m tcp -j DNAT --to-destination {target}"
        ));
    }
    line(format_args!(
        "-A KUBE-SERVICES -m comment --comment \"kubernetes service nodeports; NOTE: this must be the last rule in this chain\" -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS"
    ));
    line(format_args!("COMMIT"));
    text
}

/// A service that is never asked for: any address apart from the one that is used, and a backend.
fn other_service(family: Family, number: u32) -> (IpAddr, SocketAddr) {
    match family {
        Family::V4 => (
            Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 97, 0, 1)) + number).into(),
            (Ipv4Addr::new(10, 244, 250, 2), 8080).into(),
        ),
        Family::V6 => {
            let first = Ipv6Addr::new(0xfd00, 0x10, 0x97, 0, 0, 0, 0, 1);
            let backend = Ipv6Addr::new(0xfd00, 0x10, 0x244, 0x250, 0, 0, 0, 2);
            (
                Ipv6Addr::from_bits(first.to_bits() + u128::from(number)).into(),
                (backend, 8080).into(),
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_used_service_stands_among_the_others() {
        let place = Place {
            network: "10.244.0.0/16",
            subnet: "10.244.1.0/24",
            backend: (Ipv4Addr::new(10, 244, 2, 2), 7000).into(),
        };
        let text = rules(place, 20);
        let services: Vec<&str> = text
            .lines()
            .filter(|line| line.starts_with("-A KUBE-SERVICES -d"))
            .collect();
        assert_eq!(services.len(), 20);
        assert!(services[10].contains(&service_ip(Family::V4).to_string()));
        assert!(text.contains("--to-destination 10.244.2.2:7000"));
        assert!(text.contains("--ctstate INVALID -j DROP"));
    }
}
