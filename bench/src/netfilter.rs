//! The rules that a node of a real cluster has: flannel's masquerade and forward rules and kube-proxy's, in the order and shape
//! that the two write them.

use std::{fmt::Write as _, fs, net::Ipv4Addr, path::Path};

use anyhow::Context as _;
use flannel_testkit::Netns;

/// The service that is backed by the server's pod.
pub const SERVICE_IP: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
/// Port of the service.
pub const SERVICE_PORT: u16 = 80;

/// A node's place in its cluster.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// All pods of the cluster.
    pub network: &'a str,
    /// The pods of this node.
    pub subnet: &'a str,
    /// Who answers for [`SERVICE_IP`].
    pub backend: (Ipv4Addr, u16),
}

/// No rules, no connection tracking, and bridged packets are not shown to iptables.
pub fn clear(node: &Netns) -> anyhow::Result<()> {
    node.set_sysctl("net/bridge/bridge-nf-call-iptables", "0")
}

/// Puts the rules for `services` services in place; the one that is used stands in the middle.
pub fn apply(node: &Netns, dir: &Path, place: Place<'_>, services: u32) -> anyhow::Result<()> {
    node.set_sysctl("net/bridge/bridge-nf-call-iptables", "1")?;
    let file = dir.join("iptables.rules");
    fs::write(&file, rules(place, services.max(1)))
        .with_context(|| format!("write {}", file.display()))?;
    let argv = ["iptables-restore".as_ref(), file.as_os_str()];
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
-A KUBE-FIREWALL ! -s 127.0.0.0/8 -d 127.0.0.0/8 -m comment --comment \"block incoming localnet connections\" -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
-A KUBE-FORWARD -m comment --comment \"kubernetes forwarding rules\" -m mark --mark 0x4000/0x4000 -j ACCEPT
-A KUBE-FORWARD -m comment --comment \"kubernetes forwarding conntrack rule\" -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
";

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
            "-s {network} ! -d 224.0.0.0/4 -m comment --comment \"flanneld masq\" -j MASQUERADE --random-fully"
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
        let (ip, (to, to_port)) = if used {
            (SERVICE_IP, backend)
        } else {
            // Others, never asked for: any address apart from the one that is used.
            let ip = Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 97, 0, 1)) + service);
            (ip, (Ipv4Addr::new(10, 244, 250, 2), 8080))
        };
        let comment = format!("-m comment --comment \"default/svc-{service}:http\"");
        line(format_args!(
            "-A KUBE-SERVICES -d {ip}/32 -p tcp {comment} -m tcp --dport {SERVICE_PORT} -j KUBE-SVC-{service:016X}"
        ));
        line(format_args!(
            "-A KUBE-SVC-{service:016X} ! -s {network} -d {ip}/32 -p tcp {comment} -m tcp --dport {SERVICE_PORT} -j KUBE-MARK-MASQ"
        ));
        line(format_args!(
            "-A KUBE-SVC-{service:016X} {comment} -j KUBE-SEP-{service:016X}"
        ));
        line(format_args!(
            "-A KUBE-SEP-{service:016X} -s {to}/32 {comment} -j KUBE-MARK-MASQ"
        ));
        line(format_args!(
            "-A KUBE-SEP-{service:016X} -p tcp {comment} -m tcp -j DNAT --to-destination {to}:{to_port}"
        ));
    }
    line(format_args!(
        "-A KUBE-SERVICES -m comment --comment \"kubernetes service nodeports; NOTE: this must be the last rule in this chain\" -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS"
    ));
    line(format_args!("COMMIT"));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_used_service_stands_among_the_others() {
        let place = Place {
            network: "10.244.0.0/16",
            subnet: "10.244.1.0/24",
            backend: (Ipv4Addr::new(10, 244, 2, 2), 7000),
        };
        let text = rules(place, 20);
        let services: Vec<&str> = text
            .lines()
            .filter(|line| line.starts_with("-A KUBE-SERVICES -d"))
            .collect();
        assert_eq!(services.len(), 20);
        assert!(services[10].contains(&SERVICE_IP.to_string()));
        assert!(text.contains("--to-destination 10.244.2.2:7000"));
        assert!(text.contains("--ctstate INVALID -j DROP"));
    }
}
