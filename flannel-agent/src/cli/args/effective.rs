//! What the flags and variables come to, for the log: upstream's line, without its passwords.

use std::{fmt::Display, path::PathBuf};

use flannel_core::iface::Pattern;

use super::Args;

/// What stands for a secret.
const HIDDEN: &str = "<hidden>";

impl Args {
    /// Upstream's `CLI flags config: {…}` (upstream: main.go, a Go struct printed by `%+v`), in its order.
    pub fn effective(&self) -> String {
        let (etcd, kube, uplink) = (&self.etcd, &self.kube, &self.uplink);
        let (firewall, serving) = (&self.firewall, &self.serving);
        let endpoints = without_credentials(&etcd.etcd_endpoints);
        let password = etcd.etcd_password.as_deref().unwrap_or_default();
        let password = if password.is_empty() { "" } else { HIDDEN };
        let patterns: Vec<&str> = uplink.iface_regex.iter().map(Pattern::as_str).collect();
        let fields: [(&str, &dyn Display); 28] = [
            ("etcdEndpoints", &endpoints),
            ("etcdPrefix", &etcd.etcd_prefix),
            ("etcdKeyfile", &path(etcd.etcd_keyfile.as_ref())),
            ("etcdCertfile", &path(etcd.etcd_certfile.as_ref())),
            ("etcdCAFile", &path(etcd.etcd_cafile.as_ref())),
            ("etcdUsername", &text(etcd.etcd_username.as_ref())),
            ("etcdPassword", &password),
            ("version", &false),
            ("kubeSubnetMgr", &kube.kube_subnet_mgr),
            (
                "kubeApiUrl",
                &without_credentials(kube.kube_api_url.as_slice()),
            ),
            ("kubeAnnotationPrefix", &kube.kube_annotation_prefix),
            ("kubeConfigFile", &path(kube.kubeconfig_file.as_ref())),
            ("iface", &format!("[{}]", uplink.iface.join(" "))),
            ("ifaceRegex", &format!("[{}]", patterns.join(" "))),
            ("ipMasq", &firewall.ip_masq),
            (
                "ipMasqRandomFullyDisable",
                &firewall.ip_masq_fully_random_disable,
            ),
            ("ifaceCanReach", &text(uplink.iface_can_reach.as_ref())),
            ("subnetFile", &self.subnet_file.display()),
            ("publicIP", &text(uplink.public_ip.as_ref())),
            ("publicIPv6", &text(uplink.public_ipv6.as_ref())),
            ("subnetLeaseRenewMargin", &etcd.subnet_lease_renew_margin),
            ("healthzIP", &serving.healthz_ip),
            ("healthzPort", &serving.healthz_port),
            ("iptablesResyncSeconds", &firewall.iptables_resync),
            ("iptablesForwardRules", &firewall.iptables_forward_rules),
            ("blackholeRoute", &firewall.ip_blackhole_route),
            ("netConfPath", &self.net_config_path.display()),
            (
                "setNodeNetworkUnavailable",
                &kube.set_node_network_unavailable,
            ),
        ];
        let fields: Vec<String> = fields
            .iter()
            .map(|(name, value)| format!("{name}:{value}"))
            .collect();
        format!("CLI flags config: {{{}}}", fields.join(" "))
    }
}

fn path(path: Option<&PathBuf>) -> String {
    path.map(|path| path.display().to_string())
        .unwrap_or_default()
}

fn text<T: Display>(value: Option<&T>) -> String {
    value.map(ToString::to_string).unwrap_or_default()
}

/// URLs may carry user name and password in front of an `@`. A password with a comma has been cut in two.
fn without_credentials(urls: &[String]) -> String {
    let mut shown: Vec<String> = Vec::new();
    for url in urls {
        let Some((before, host)) = url.rsplit_once('@') else {
            shown.push(url.clone());
            continue;
        };
        let mut start = before.to_owned();
        while !start.contains("://") {
            match shown.pop() {
                Some(earlier) => start = earlier,
                None => break,
            }
        }
        let scheme = start
            .split_once("://")
            .map(|(scheme, _)| format!("{scheme}://"));
        shown.push(format!("{}{HIDDEN}@{host}", scheme.unwrap_or_default()));
    }
    shown.join(",")
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;

    use super::*;

    fn line(flags: &[&str]) -> String {
        let words = std::iter::once(&"flanneld").chain(flags);
        Args::read(words.map(OsString::from))
            .expect("flags")
            .effective()
    }

    #[test]
    fn the_line_is_upstreams() {
        let flags = [
            "-etcd-endpoints=http://192.168.77.1:2379",
            "-iface=192.168.77.11",
            "-ip-masq",
            "-subnet-file=/run/flannel/a.env",
        ];
        assert_eq!(
            line(&flags),
            "CLI flags config: {etcdEndpoints:http://192.168.77.1:2379 etcdPrefix:/coreos.com/network etcdKeyfile: etcdCertfile: \
             etcdCAFile: etcdUsername: etcdPassword: version:false kubeSubnetMgr:false kubeApiUrl: \
             kubeAnnotationPrefix:flannel.alpha.coreos.com kubeConfigFile: iface:[192.168.77.11] ifaceRegex:[] ipMasq:true \
             ipMasqRandomFullyDisable:false ifaceCanReach: subnetFile:/run/flannel/a.env publicIP: publicIPv6: \
             subnetLeaseRenewMargin:60 healthzIP:0.0.0.0 healthzPort:0 iptablesResyncSeconds:5 iptablesForwardRules:true \
             blackholeRoute:false netConfPath:/etc/kube-flannel/net-conf.json setNodeNetworkUnavailable:true}"
        );
    }

    #[test]
    fn secrets_are_hidden() {
        let line = line(&[
            "-etcd-endpoints=http://f:3,https://root:a@b@c:1,http://d:x,y@e:2",
            "-etcd-username=root",
            "-etcd-password=hunter2",
            "-kube-api-url=https://u:p@api",
            "-iface=a",
            "-iface=b",
            "-iface-regex=^10\\.",
        ]);
        assert!(
            line.contains(
                "{etcdEndpoints:http://f:3,https://<hidden>@c:1,http://<hidden>@e:2 etcdPrefix"
            ),
            "{line}"
        );
        assert!(
            line.contains("etcdUsername:root etcdPassword:<hidden> version"),
            "{line}"
        );
        assert!(line.contains("kubeApiUrl:https://<hidden>@api "), "{line}");
        assert!(line.contains("iface:[a b] ifaceRegex:[^10\\.] "), "{line}");
    }
}
