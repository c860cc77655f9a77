//! The rules in the language of `iptables-restore`.

use super::{Policy, Rules, Service, hashed};
use crate::family::Family;
use crate::netns::Netns;
use anyhow::Context as _;
use std::net::SocketAddr;
use std::process::{Command, Stdio};
use std::sync::OnceLock;

/// The legacy program where there is one.
pub(super) fn program(family: Family) -> &'static str {
    static LEGACY: OnceLock<bool> = OnceLock::new();
    let legacy = *LEGACY.get_or_init(|| {
        let legacy = Command::new("iptables-legacy")
            .arg("-V")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        legacy.is_ok_and(|status| status.success())
    });
    match (family, legacy) {
        (Family::V4, true) => "iptables-legacy",
        (Family::V4, false) => "iptables",
        (Family::V6, true) => "ip6tables-legacy",
        (Family::V6, false) => "ip6tables",
    }
}

/// Packets that the first rule of `KUBE-FORWARD` has dropped.
pub(super) fn invalid_drops(ns: &Netns, family: Family) -> anyhow::Result<u64> {
    let list = ns.exec([
        program(family),
        "-t",
        "filter",
        "-nvxL",
        "KUBE-FORWARD",
        "--wait",
        "10",
    ])?;
    list.lines()
        .find(|line| line.contains("DROP") && line.contains("INVALID"))
        .and_then(|line| line.split_whitespace().next())
        .with_context(|| format!("no rule against invalid packets in {list}"))?
        .parse()
        .with_context(|| format!("packets of the rule against invalid ones in {list}"))
}

/// One table under construction: chains first, then rules.
struct Table {
    name: &'static str,
    chains: String,
    rules: String,
}

impl Table {
    fn new(name: &'static str, chains: &[&str]) -> Table {
        let mut table = Table {
            name,
            chains: String::new(),
            rules: String::new(),
        };
        for chain in chains {
            table.chain(chain);
        }
        table
    }

    fn chain(&mut self, name: &str) {
        let policy = if name.contains('-') { "-" } else { "ACCEPT" };
        for part in [":", name, " ", policy, " [0:0]\n"] {
            self.chains.push_str(part);
        }
    }

    fn rule(&mut self, rule: &str) {
        self.rules.push_str("-A ");
        self.rules.push_str(rule);
        self.rules.push('\n');
    }

    fn finish(self, text: &mut String) {
        for part in ["*", self.name, "\n", &self.chains, &self.rules, "COMMIT\n"] {
            text.push_str(part);
        }
    }
}

/// All tables.
pub(super) fn text(rules: &Rules<'_>) -> String {
    let mut text = String::new();
    // kubelet's, with which it notices that somebody has flushed everything.
    Table::new("mangle", &["KUBE-KUBELET-CANARY", "KUBE-PROXY-CANARY"]).finish(&mut text);
    filter(rules).finish(&mut text);
    nat(rules).finish(&mut text);
    text
}

fn filter(rules: &Rules<'_>) -> Table {
    let mut table = Table::new(
        "filter",
        &[
            "INPUT",
            "FORWARD",
            "OUTPUT",
            "FLANNEL-FWD",
            "KUBE-EXTERNAL-SERVICES",
            "KUBE-FIREWALL",
            "KUBE-FORWARD",
            "KUBE-KUBELET-CANARY",
            "KUBE-NODEPORTS",
            "KUBE-PROXY-CANARY",
            "KUBE-PROXY-FIREWALL",
            "KUBE-SERVICES",
        ],
    );
    let new = "-m conntrack --ctstate NEW";
    let firewall = "-m comment --comment \"kubernetes load balancer firewall\"";
    let outside = "-m comment --comment \"kubernetes externally-visible service portals\"";
    let portals = "-m comment --comment \"kubernetes service portals\"";
    table.rule(&format!("INPUT {new} {firewall} -j KUBE-PROXY-FIREWALL"));
    table.rule(
        "INPUT -m comment --comment \"kubernetes health check service ports\" -j KUBE-NODEPORTS",
    );
    table.rule(&format!("INPUT {new} {outside} -j KUBE-EXTERNAL-SERVICES"));
    table.rule("INPUT -j KUBE-FIREWALL");
    table.rule(&format!("FORWARD {new} {firewall} -j KUBE-PROXY-FIREWALL"));
    table.rule("FORWARD -m comment --comment \"kubernetes forwarding rules\" -j KUBE-FORWARD");
    table.rule(&format!("FORWARD {new} {portals} -j KUBE-SERVICES"));
    table.rule(&format!(
        "FORWARD {new} {outside} -j KUBE-EXTERNAL-SERVICES"
    ));
    table.rule("FORWARD -m comment --comment \"flanneld forward\" -j FLANNEL-FWD");
    table.rule(&format!("OUTPUT {new} {firewall} -j KUBE-PROXY-FIREWALL"));
    table.rule(&format!("OUTPUT {new} {portals} -j KUBE-SERVICES"));
    table.rule("OUTPUT -j KUBE-FIREWALL");
    if rules.network.family() == Family::V4 {
        table.rule(
            "KUBE-FIREWALL ! -s 127.0.0.0/8 -d 127.0.0.0/8 -m comment --comment \"block incoming localnet connections\" \
             -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP",
        );
    }
    table.rule("KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP");
    table.rule("KUBE-FORWARD -m comment --comment \"kubernetes forwarding rules\" -m mark --mark 0x4000/0x4000 -j ACCEPT");
    table.rule(
        "KUBE-FORWARD -m comment --comment \"kubernetes forwarding conntrack rule\" -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
    );
    let network = rules.network;
    table.rule(&format!(
        "FLANNEL-FWD -s {network} -m comment --comment \"flanneld forward\" -j ACCEPT"
    ));
    table.rule(&format!(
        "FLANNEL-FWD -d {network} -m comment --comment \"flanneld forward\" -j ACCEPT"
    ));
    table
}

fn nat(rules: &Rules<'_>) -> Table {
    let mut table = Table::new(
        "nat",
        &[
            "PREROUTING",
            "INPUT",
            "OUTPUT",
            "POSTROUTING",
            "CNI-HOSTPORT-DNAT",
            "CNI-HOSTPORT-MASQ",
            "CNI-HOSTPORT-SETMARK",
            "FLANNEL-POSTRTG",
            "KUBE-KUBELET-CANARY",
            "KUBE-MARK-MASQ",
            "KUBE-NODEPORTS",
            "KUBE-POSTROUTING",
            "KUBE-PROXY-CANARY",
            "KUBE-SERVICES",
        ],
    );
    for hook in ["PREROUTING", "OUTPUT"] {
        table.rule(&format!(
            "{hook} -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES"
        ));
        table.rule(&format!(
            "{hook} -m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT"
        ));
    }
    table.rule("POSTROUTING -m comment --comment \"CNI portfwd requiring masquerade\" -j CNI-HOSTPORT-MASQ");
    table.rule(
        "POSTROUTING -m comment --comment \"kubernetes postrouting rules\" -j KUBE-POSTROUTING",
    );
    table.rule("POSTROUTING -m comment --comment \"flanneld masq\" -j FLANNEL-POSTRTG");
    table.rule("KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000");
    table.rule("KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN");
    table.rule("KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0");
    table.rule(
        "KUBE-POSTROUTING -m comment --comment \"kubernetes service traffic requiring SNAT\" -j MASQUERADE --random-fully",
    );
    masquerade(&mut table, rules);
    host_ports(&mut table, rules);
    for service in rules.services {
        portal(&mut table, rules, service);
    }
    table.rule(
        "KUBE-SERVICES -m comment --comment \"kubernetes service nodeports; NOTE: this must be the last rule in this chain\" \
         -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS",
    );
    table
}

/// flannel's rules.
fn masquerade(table: &mut Table, rules: &Rules<'_>) {
    let (network, subnet) = (rules.network, rules.subnet);
    let comment = "-m comment --comment \"flanneld masq\"";
    let groups = match network.family() {
        Family::V4 => "224.0.0.0/4",
        Family::V6 => "ff00::/8",
    };
    for rule in [
        format!("-m mark --mark 0x4000/0x4000 {comment} -j RETURN"),
        format!("-s {subnet} -d {network} {comment} -j RETURN"),
        format!("-s {network} -d {subnet} {comment} -j RETURN"),
        format!("! -s {network} -d {subnet} {comment} -j RETURN"),
        format!("-s {network} ! -d {groups} {comment} -j MASQUERADE --random-fully"),
        format!("! -s {network} -d {network} {comment} -j MASQUERADE --random-fully"),
    ] {
        table.rule(&format!("FLANNEL-POSTRTG {rule}"));
    }
}

/// The port mapping plugin's rules.
fn host_ports(table: &mut Table, rules: &Rules<'_>) {
    table.rule("CNI-HOSTPORT-SETMARK -m comment --comment \"CNI portfwd masquerade mark\" -j MARK --set-xmark 0x2000/0x2000");
    table.rule("CNI-HOSTPORT-MASQ -m mark --mark 0x2000/0x2000 -j MASQUERADE");
    for host_port in rules.host_ports {
        let (transport, port, backend) = (host_port.transport, host_port.port, host_port.backend);
        let chain = format!(
            "CNI-DN-{}",
            hashed(&format!("{transport}/{port}/{backend}"))
        );
        table.chain(&chain);
        table.rule(&format!(
            "CNI-HOSTPORT-DNAT -p {transport} -m comment --comment \"dnat name: cbr0\" -m multiport --dports {port} -j {chain}"
        ));
        let loopback = match rules.network.family() {
            Family::V4 => "127.0.0.1/32",
            Family::V6 => "::1/128",
        };
        for source in [rules.subnet.to_string(), loopback.to_owned()] {
            table.rule(&format!(
                "{chain} -s {source} -p {transport} --dport {port} -j CNI-HOSTPORT-SETMARK"
            ));
        }
        table.rule(&format!(
            "{chain} -p {transport} --dport {port} -j DNAT --to-destination {backend}"
        ));
    }
}

/// One Service's chains and the rules that lead there.
fn portal(table: &mut Table, rules: &Rules<'_>, service: &Service) {
    let (network, transport) = (rules.network, service.transport);
    let (ip, port) = (service.address.ip(), service.address.port());
    let hash = hashed(&service.name);
    let comment = format!("-m comment --comment \"default/{}\"", service.name);
    let cluster = format!("KUBE-SVC-{hash}");
    table.chain(&cluster);
    table.rule(&format!(
        "KUBE-SERVICES -d {ip} -p {transport} {comment} --dport {port} -j {cluster}"
    ));
    table.rule(&format!(
        "{cluster} ! -s {network} -d {ip} -p {transport} {comment} --dport {port} -j KUBE-MARK-MASQ"
    ));
    let endpoints: Vec<String> = service
        .backends
        .iter()
        .map(|backend| endpoint(table, service, *backend))
        .collect();
    let endpoints: Vec<&str> = endpoints.iter().map(String::as_str).collect();
    spread(table, &cluster, &comment, service, &endpoints);
    let Some((node_port, policy)) = service.node_port else {
        return;
    };
    let outside = format!("KUBE-EXT-{hash}");
    table.chain(&outside);
    table.rule(&format!(
        "KUBE-NODEPORTS -p {transport} {comment} --dport {node_port} -j {outside}"
    ));
    match policy {
        Policy::Cluster => {
            table.rule(&format!("{outside} {comment} -j KUBE-MARK-MASQ"));
            table.rule(&format!("{outside} -j {cluster}"));
        }
        Policy::Local => {
            let local = format!("KUBE-SVL-{hash}");
            table.chain(&local);
            table.rule(&format!("{outside} -s {network} {comment} -j {cluster}"));
            for target in ["KUBE-MARK-MASQ", &cluster] {
                table.rule(&format!(
                    "{outside} {comment} -m addrtype --src-type LOCAL -j {target}"
                ));
            }
            table.rule(&format!("{outside} -j {local}"));
            let nearby = service.local_backends(rules.subnet);
            let chains: Vec<&str> = service
                .backends
                .iter()
                .zip(&endpoints)
                .filter(|(backend, _)| nearby.contains(backend))
                .map(|(_, chain)| *chain)
                .collect();
            spread(table, &local, &comment, service, &chains);
        }
    }
}

/// The chain of a backend.
fn endpoint(table: &mut Table, service: &Service, backend: SocketAddr) -> String {
    let chain = format!(
        "KUBE-SEP-{}",
        hashed(&format!("{}/{backend}", service.name))
    );
    let (transport, ip) = (service.transport, backend.ip());
    let comment = format!("-m comment --comment \"default/{}\"", service.name);
    table.chain(&chain);
    table.rule(&format!("{chain} -s {ip} {comment} -j KUBE-MARK-MASQ"));
    let recent = if service.affinity {
        format!("-m recent --name {chain} --set ")
    } else {
        String::new()
    };
    table.rule(&format!(
        "{chain} -p {transport} {comment} {recent}-m {transport} -j DNAT --to-destination {backend}"
    ));
    chain
}

/// Leads from a service's chain to those of its backends, to each as often.
fn spread(table: &mut Table, from: &str, comment: &str, service: &Service, chains: &[&str]) {
    if service.affinity {
        for chain in chains {
            table.rule(&format!(
                "{from} {comment} -m recent --name {chain} --rcheck --seconds 10800 --reap -j {chain}"
            ));
        }
    }
    for (at, chain) in chains.iter().enumerate() {
        let left = u32::try_from(chains.len() - at).unwrap_or(u32::MAX);
        let chance = if left > 1 {
            format!(
                " -m statistic --mode random --probability {:.10}",
                1.0 / f64::from(left)
            )
        } else {
            String::new()
        };
        table.rule(&format!("{from} {comment}{chance} -j {chain}"));
    }
}
