//! The rules in the language of `nft`.

use super::{Policy, Rules, Service, hashed};
use crate::family::Family;
use crate::json::nft_json;
use crate::netns::Netns;
use anyhow::Context as _;
use serde_json::Value;
use std::net::SocketAddr;

/// Packets that the first rule of `filter-forward` has dropped.
pub(super) fn invalid_drops(ns: &Netns, family: Family) -> anyhow::Result<u64> {
    let table = match family {
        Family::V4 => "ip",
        Family::V6 => "ip6",
    };
    let list = nft_json(
        ns,
        &["list", "chain", table, "kube-proxy", "filter-forward"],
    )?;
    let counter = list["nftables"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|object| object["rule"]["expr"].as_array())
        .find(|rule| {
            rule.iter()
                .any(|part| part["match"]["right"] == "invalid" || is_invalid(part))
        })
        .and_then(|rule| {
            rule.iter()
                .find_map(|part| part["counter"]["packets"].as_u64())
        });
    counter.with_context(|| format!("no rule against invalid packets in {list}"))
}

fn is_invalid(part: &Value) -> bool {
    let right = &part["match"]["right"];
    right
        .as_array()
        .is_some_and(|states| states.iter().any(|state| state == "invalid"))
}

/// Chains and maps of kube-proxy that do not depend on services.
const BASE: &str = "
add table ip kube-proxy { comment \"rules for kube-proxy\" ; }
add set ip kube-proxy cluster-ips { type ipv4_addr ; comment \"Active ClusterIPs\" ; }
add set ip kube-proxy nodeport-ips { type ipv4_addr ; comment \"IPs that accept NodePort traffic\" ; }
add map ip kube-proxy firewall-ips { type ipv4_addr . inet_proto . inet_service : verdict ; }
add map ip kube-proxy no-endpoint-nodeports { type inet_proto . inet_service : verdict ; }
add map ip kube-proxy no-endpoint-services { type ipv4_addr . inet_proto . inet_service : verdict ; }
add map ip kube-proxy service-ips { type ipv4_addr . inet_proto . inet_service : verdict ; }
add map ip kube-proxy service-nodeports { type inet_proto . inet_service : verdict ; }
add chain ip kube-proxy cluster-ips-check
add chain ip kube-proxy filter-prerouting-pre-dnat { type filter hook prerouting priority -110 ; }
add chain ip kube-proxy filter-output-pre-dnat { type filter hook output priority -110 ; }
add chain ip kube-proxy filter-forward { type filter hook forward priority 0 ; }
add chain ip kube-proxy filter-input { type filter hook input priority 0 ; }
add chain ip kube-proxy filter-output { type filter hook output priority 0 ; }
add chain ip kube-proxy firewall-check
add chain ip kube-proxy mark-for-masquerade
add chain ip kube-proxy masquerading
add chain ip kube-proxy nat-output { type nat hook output priority -100 ; }
add chain ip kube-proxy nat-postrouting { type nat hook postrouting priority 100 ; }
add chain ip kube-proxy nat-prerouting { type nat hook prerouting priority -100 ; }
add chain ip kube-proxy nodeport-endpoints-check
add chain ip kube-proxy reject-chain
add chain ip kube-proxy services
add chain ip kube-proxy service-endpoints-check
add rule ip kube-proxy cluster-ips-check ip daddr @cluster-ips reject comment \"Reject traffic to invalid ports of ClusterIPs\"
add rule ip kube-proxy cluster-ips-check ip daddr { 10.96.0.0/16 } drop comment \"Drop traffic to unallocated ClusterIPs\"
add rule ip kube-proxy filter-prerouting-pre-dnat ct state new jump firewall-check
add rule ip kube-proxy filter-forward ct state invalid counter drop
add rule ip kube-proxy filter-forward ct state new jump service-endpoints-check
add rule ip kube-proxy filter-forward ct state new jump cluster-ips-check
add rule ip kube-proxy filter-input ct state new jump nodeport-endpoints-check
add rule ip kube-proxy filter-input ct state new jump service-endpoints-check
add rule ip kube-proxy filter-output ct state new jump service-endpoints-check
add rule ip kube-proxy filter-output-pre-dnat ct state new jump firewall-check
add rule ip kube-proxy filter-output ct state new jump cluster-ips-check
add rule ip kube-proxy firewall-check ip daddr . meta l4proto . th dport vmap @firewall-ips
add rule ip kube-proxy mark-for-masquerade mark set mark or 0x4000
add rule ip kube-proxy masquerading mark and 0x4000 == 0 return
add rule ip kube-proxy masquerading mark set mark xor 0x4000
add rule ip kube-proxy masquerading masquerade fully-random
add rule ip kube-proxy nat-output jump services
add rule ip kube-proxy nat-postrouting jump masquerading
add rule ip kube-proxy nat-prerouting jump services
add rule ip kube-proxy nodeport-endpoints-check ip daddr @nodeport-ips meta l4proto . th dport vmap @no-endpoint-nodeports
add rule ip kube-proxy reject-chain reject
add rule ip kube-proxy services ip daddr . meta l4proto . th dport vmap @service-ips
add rule ip kube-proxy services ip daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports
add rule ip kube-proxy service-endpoints-check ip daddr . meta l4proto . th dport vmap @no-endpoint-services
";

/// All tables.
pub(super) fn text(rules: &Rules<'_>) -> String {
    let mut text = BASE.to_owned();
    line(
        &mut text,
        &format!(
            "add element ip kube-proxy nodeport-ips {{ {} }}",
            rules
                .addresses
                .iter()
                .map(ToString::to_string)
                .collect::<Vec<_>>()
                .join(", ")
        ),
    );
    for service in rules.services {
        portal(&mut text, rules, service);
    }
    masquerade(&mut text, rules);
    host_ports(&mut text, rules);
    match rules.network.family() {
        Family::V4 => text,
        Family::V6 => of_ipv6(&text),
    }
}

/// The rules of IPv6, which are those of IPv4 in other words.
fn of_ipv6(text: &str) -> String {
    let other = |word: &str| -> String {
        match word {
            "ip" => "ip6".to_owned(),
            "ipv4_addr" => "ipv6_addr".to_owned(),
            "flannel-ipv4" => "flannel-ipv6".to_owned(),
            "10.96.0.0/16" => "fd00:10:96::/112".to_owned(),
            "224.0.0.0/4" => "ff00::/8".to_owned(),
            word => word.to_owned(),
        }
    };
    let lines = text.lines().map(|line| {
        let words: Vec<String> = line.split(' ').map(other).collect();
        words.join(" ") + "\n"
    });
    lines.collect()
}

/// One Service's chains and the elements that lead there.
fn portal(text: &mut String, rules: &Rules<'_>, service: &Service) {
    let (network, transport) = (rules.network, service.transport);
    let (ip, port) = (service.address.ip(), service.address.port());
    let name = format!(
        "{}-default/{}/{transport}/",
        &hashed(&service.name)[..8],
        service.name
    );
    let cluster = format!("service-{name}");
    line(text, &format!("add chain ip kube-proxy {cluster}"));
    let endpoints: Vec<String> = service
        .backends
        .iter()
        .map(|backend| endpoint(text, service, *backend))
        .collect();
    line(
        text,
        &format!(
            "add rule ip kube-proxy {cluster} ip daddr {ip} ip saddr != {network} jump mark-for-masquerade"
        ),
    );
    spread(text, &cluster, service, &endpoints);
    line(
        text,
        &format!("add element ip kube-proxy cluster-ips {{ {ip} }}"),
    );
    line(
        text,
        &format!(
            "add element ip kube-proxy service-ips {{ {ip} . {transport} . {port} : goto {cluster} }}"
        ),
    );
    let Some((node_port, policy)) = service.node_port else {
        return;
    };
    let outside = format!("external-{name}");
    line(text, &format!("add chain ip kube-proxy {outside}"));
    let mut rule = |rule: &str| line(text, &format!("add rule ip kube-proxy {outside} {rule}"));
    match policy {
        Policy::Cluster => {
            rule("jump mark-for-masquerade");
            rule(&format!("goto {cluster}"));
        }
        Policy::Local => {
            let local = format!("local-{name}");
            rule(&format!(
                "ip saddr {network} goto {cluster} comment \"short-circuit pod traffic\""
            ));
            rule(
                "fib saddr type local jump mark-for-masquerade comment \"masquerade local traffic\"",
            );
            rule(&format!(
                "fib saddr type local goto {cluster} comment \"short-circuit local traffic\""
            ));
            let nearby = service.local_backends(rules.subnet);
            let chains: Vec<String> = service
                .backends
                .iter()
                .zip(&endpoints)
                .filter(|(backend, _)| nearby.contains(backend))
                .map(|(_, chain)| chain.clone())
                .collect();
            if !chains.is_empty() {
                line(text, &format!("add chain ip kube-proxy {local}"));
                line(
                    text,
                    &format!("add rule ip kube-proxy {outside} goto {local}"),
                );
                spread(text, &local, service, &chains);
            }
        }
    }
    line(
        text,
        &format!(
            "add element ip kube-proxy service-nodeports {{ {transport} . {node_port} : goto {outside} }}"
        ),
    );
}

/// The chain of a backend.
fn endpoint(text: &mut String, service: &Service, backend: SocketAddr) -> String {
    let transport = service.transport;
    let (ip, port) = (backend.ip(), backend.port());
    // A name has no colons.
    let ip_name = ip.to_string().replace(':', ".");
    let name = format!(
        "{}-default/{}/{transport}/__{ip_name}/{port}",
        &hashed(&format!("{}/{backend}", service.name))[..8],
        service.name
    );
    let chain = format!("endpoint-{name}");
    line(text, &format!("add chain ip kube-proxy {chain}"));
    line(
        text,
        &format!("add rule ip kube-proxy {chain} ip saddr {ip} jump mark-for-masquerade"),
    );
    if service.affinity {
        line(
            text,
            &format!(
                "add set ip kube-proxy affinity-{name} {{ type ipv4_addr ; flags dynamic,timeout ; timeout 10800s ; }}"
            ),
        );
        line(
            text,
            &format!("add rule ip kube-proxy {chain} update @affinity-{name} {{ ip saddr }}"),
        );
    }
    line(
        text,
        &format!("add rule ip kube-proxy {chain} meta l4proto {transport} dnat to {backend}"),
    );
    chain
}

/// Leads from a service's chain to those of its backends, to each as often.
fn spread(text: &mut String, from: &str, service: &Service, chains: &[String]) {
    if service.affinity {
        for chain in chains {
            let set = chain.replacen("endpoint-", "affinity-", 1);
            line(
                text,
                &format!("add rule ip kube-proxy {from} ip saddr @{set} goto {chain}"),
            );
        }
    }
    let choices: Vec<String> = chains
        .iter()
        .enumerate()
        .map(|(at, chain)| format!("{at} : goto {chain}"))
        .collect();
    line(
        text,
        &format!(
            "add rule ip kube-proxy {from} numgen random mod {} vmap {{ {} }}",
            choices.len(),
            choices.join(", ")
        ),
    );
}

/// flannel's tables, word for word: its fourth rule makes the last one unreachable.
fn masquerade(text: &mut String, rules: &Rules<'_>) {
    let (network, subnet) = (rules.network, rules.subnet);
    line(text, "add table ip flannel-ipv4");
    line(
        text,
        "add chain ip flannel-ipv4 postrtg { type nat hook postrouting priority srcnat; policy accept; }",
    );
    for rule in [
        "meta mark 0x4000 return".to_owned(),
        format!("ip saddr {subnet} ip daddr {network} return"),
        format!("ip saddr {network} ip daddr {subnet} return"),
        format!("ip saddr != {subnet} ip daddr {network} return"),
        format!("ip saddr {network} ip daddr != 224.0.0.0/4 masquerade fully-random"),
        format!("ip saddr != {network} ip daddr {network} masquerade fully-random"),
    ] {
        line(text, &format!("add rule ip flannel-ipv4 postrtg {rule}"));
    }
    line(
        text,
        "add chain ip flannel-ipv4 forward { type filter hook forward priority filter; policy accept; }",
    );
    for way in ["saddr", "daddr"] {
        line(
            text,
            &format!("add rule ip flannel-ipv4 forward ip {way} {network} accept"),
        );
    }
}

/// The port mapping plugin's table.
fn host_ports(text: &mut String, rules: &Rules<'_>) {
    line(text, "add table inet cni_hostport");
    line(text, "add chain inet cni_hostport hostports");
    for chain in ["prerouting", "output"] {
        line(
            text,
            &format!(
                "add chain inet cni_hostport {chain} {{ type nat hook {chain} priority -100 ; }}"
            ),
        );
        line(
            text,
            &format!("add rule inet cni_hostport {chain} fib daddr type local jump hostports"),
        );
    }
    line(
        text,
        "add chain inet cni_hostport masquerading { type nat hook postrouting priority srcnat ; }",
    );
    for host_port in rules.host_ports {
        let (transport, port, backend) = (host_port.transport, host_port.port, host_port.backend);
        line(
            text,
            &format!(
                "add rule inet cni_hostport hostports {transport} dport {port} dnat ip to {backend}"
            ),
        );
        let ip = backend.ip();
        line(
            text,
            &format!(
                "add rule inet cni_hostport masquerading ip saddr {ip} ip daddr {ip} masquerade"
            ),
        );
    }
}

fn line(text: &mut String, line: &str) {
    text.push_str(line);
    text.push('\n');
}
