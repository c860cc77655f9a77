//! The lease store, the network configuration in it, and this node's lease.

use std::collections::BTreeMap;

use super::{Certificate, Finding, Observations, few};
use crate::{
    addr::Family,
    config::{BackendKind, ConfigError, NetConf},
    lease::{LeaseAttrs, SubnetKey},
};

/// What the lease store said.
#[derive(Clone, Debug)]
pub struct StoreSeen {
    /// Its name, without secrets.
    pub name: String,
    /// How the name was come by: `flags`, `the running agent's flags`, …
    pub origin: &'static str,
    /// The text of the network configuration. The error says why there is none.
    pub net_conf: Result<String, StoreTrouble>,
    /// All leases.
    pub leases: Result<BTreeMap<SubnetKey, LeaseAttrs>, String>,
    /// Where an etcd has only the configuration of its older API: the endpoint.
    pub older_api: Option<String>,
    /// Certificates among the flags.
    pub certificates: Vec<Certificate>,
    /// Present when it is the Kubernetes API, which knows nodes by name: this node's subnet there.
    pub kubernetes: Option<Option<SubnetKey>>,
}

/// Why a store gave no configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoreTrouble {
    /// It cannot be reached or refuses.
    Store(String),
    /// It answers and has none.
    Missing(String),
}

impl StoreSeen {
    /// The configuration, if it is there and valid.
    pub fn conf(&self) -> Option<NetConf> {
        self.read(self.net_conf.as_ref().ok()?).ok()
    }

    fn read(&self, text: &str) -> Result<NetConf, ConfigError> {
        if self.kubernetes.is_some() {
            NetConf::parse_assigned(text)
        } else {
            NetConf::parse(text)
        }
    }

    /// Where the configuration is corrected.
    fn place(&self) -> &str {
        match self.kubernetes {
            Some(_) => "net-conf.json of the ConfigMap",
            None => &self.name,
        }
    }

    /// The leases, if they could be listed.
    pub fn list(&self) -> Option<&BTreeMap<SubnetKey, LeaseAttrs>> {
        self.leases.as_ref().ok()
    }

    /// Our own lease, recognised by the public address, or by the node's name where the store has names.
    pub fn own(&self, seen: &Observations) -> Option<(&SubnetKey, &LeaseAttrs)> {
        if let Some(own) = self.kubernetes {
            return self.list()?.get_key_value(&own?);
        }
        let uplink = seen.network.uplink()?;
        let v4 = self.conf().is_none_or(|conf| conf.enable_ipv4);
        let family = if v4 { Family::V4 } else { Family::V6 };
        let public_ip = uplink.public(family)?;
        self.list()?
            .iter()
            .find(|(_, attrs)| attrs.public(family) == Some(public_ip))
    }
}

pub(super) fn judge(seen: &Observations) -> Vec<Finding> {
    vec![
        store(seen),
        certificates(seen),
        network_config(seen),
        lease(seen),
    ]
}

fn store(seen: &Observations) -> Finding {
    const NAME: &str = "store";
    let store = &seen.store;
    let from = format!("{} (from {})", store.name, store.origin);
    if let Err(StoreTrouble::Store(error)) = &store.net_conf {
        return Finding::fail(NAME, error.clone(), fix_for(store));
    }
    match &store.leases {
        Ok(leases) => Finding::ok(NAME, format!("{from}: {} leases", leases.len())),
        Err(error) => Finding::fail(NAME, error.clone(), fix_for(store)),
    }
}

fn fix_for(store: &StoreSeen) -> String {
    if let Some(endpoint) = &store.older_api {
        return format!(
            "{endpoint} speaks only etcd's version 2: upgrade etcd to 3.4 or newer and migrate the keys with etcdctl migrate"
        );
    }
    if store.kubernetes.is_some() {
        "check --kubeconfig-file or the pod's service account, that its ClusterRole has nodes: get, list, watch and nodes/status: patch, and that the API answers: kubectl get nodes"
            .into()
    } else if store.name.starts_with("etcd") {
        "check --etcd-endpoints, the certificates, user and password, and that etcd runs: ETCDCTL_API=3 etcdctl endpoint health"
            .into()
    } else {
        "check --lease-dir, that it is mounted and readable".into()
    }
}

fn certificates(seen: &Observations) -> Finding {
    const NAME: &str = "certificates";
    let now = seen.node.clock.now;
    let certificates = &seen.store.certificates;
    if certificates.is_empty() {
        return Finding::skip(NAME, "no certificates are given");
    }
    for certificate in certificates {
        let file = &certificate.file;
        let Some((from, until)) = certificate.valid else {
            return Finding::fail(
                NAME,
                format!("{file} holds no certificate"),
                "name a PEM file that begins with -----BEGIN CERTIFICATE-----",
            );
        };
        if now < from {
            return Finding::fail(
                NAME,
                format!(
                    "{file} is not valid yet: by this node's clock it begins in {} h",
                    (from - now) / 3600 + 1
                ),
                "set the clock, or issue the certificate anew",
            );
        }
        if now >= until {
            return Finding::fail(
                NAME,
                format!("{file} expired {} h ago", (now - until) / 3600),
                "issue the certificate anew",
            );
        }
        let days = (until - now) / 86_400;
        if days < 14 {
            return Finding::warn(
                NAME,
                format!("{file} expires in {days} days"),
                "issue the certificate anew",
            );
        }
    }
    Finding::ok(
        NAME,
        format!("{} valid", few(certificates.iter().map(|one| &one.file))),
    )
}

fn network_config(seen: &Observations) -> Finding {
    const NAME: &str = "network-config";
    let store = &seen.store;
    let text = match &store.net_conf {
        Ok(text) => text,
        Err(StoreTrouble::Store(_)) => {
            return Finding::skip(NAME, "the store does not answer");
        }
        Err(StoreTrouble::Missing(error)) => {
            let fix = match &store.older_api {
                Some(endpoint) => format!(
                    "{endpoint} has the key in its version 2 API only: write it with ETCDCTL_API=3 etcdctl put"
                ),
                None if store.kubernetes.is_some() => {
                    "mount the ConfigMap kube-flannel-cfg at /etc/kube-flannel, or name the file with --net-config-path".into()
                }
                None if store.name.starts_with("etcd") => {
                    "ETCDCTL_API=3 etcdctl put <prefix>/config '{\"Network\":\"10.244.0.0/16\",\"Backend\":{\"Type\":\"vxlan\"}}'; check --etcd-prefix".into()
                }
                None => "write {\"Network\":\"10.244.0.0/16\",\"Backend\":{\"Type\":\"vxlan\"}} to the file config in the lease directory".into(),
            };
            return Finding::fail(NAME, error.clone(), fix);
        }
    };
    let conf = match store.read(text) {
        Ok(conf) => conf,
        Err(error) => {
            return Finding::fail(
                NAME,
                error.to_string(),
                format!("correct it in {}", store.place()),
            );
        }
    };
    let networks: Vec<String> = conf
        .families()
        .into_iter()
        .filter_map(|family| Some(conf.range(family)?.0.to_string()))
        .collect();
    let mut text = format!("{}, {}", networks.join(", "), conf.backend.kind);
    if conf.backend.kind == BackendKind::Vxlan {
        let vxlan = &conf.backend.vxlan;
        text = format!("{text}, VNI {}, port {}", vxlan.vni, vxlan.port);
        if vxlan.direct_routing {
            text.push_str(", DirectRouting");
        }
    }
    match conf.warnings.first() {
        Some(warning) => Finding::warn(
            NAME,
            format!("{text}: {warning}"),
            format!("correct it in {}", store.place()),
        ),
        None => Finding::ok(NAME, text),
    }
}

fn lease(seen: &Observations) -> Finding {
    const NAME: &str = "lease";
    let Some(uplink) = seen.network.uplink() else {
        return Finding::skip(NAME, "without an uplink there is no address to look for");
    };
    let Some(list) = seen.store.list() else {
        return Finding::skip(NAME, "the store does not answer");
    };
    let family = seen.overlay.family;
    let public_ip = uplink.public(family);
    let public_ip = public_ip.map_or("none".into(), |ip| ip.to_string());
    let Some((key, attrs)) = seen.store.own(seen) else {
        let text = format!("none of {} leases is of {public_ip}", list.len());
        return if seen.agent.pid.is_some() {
            Finding::fail(
                NAME,
                text,
                "the agent takes one again within seconds; if not, its log says why (no subnet left, no permission to write)",
            )
        } else if seen.agent.known {
            Finding::warn(NAME, text, "start the agent: it takes one")
        } else {
            Finding::skip(NAME, format!("{text}: the agent takes one when it starts"))
        };
    };
    let twins: Vec<String> = list
        .iter()
        .filter(|(other, other_attrs)| {
            *other != key && other_attrs.public(family) == attrs.public(family)
        })
        .map(|(other, _)| other.to_string())
        .collect();
    if !twins.is_empty() {
        return Finding::fail(
            NAME,
            format!("{public_ip} has several leases: {key}, {}", few(&twins)),
            "two nodes publish the same address (give them --iface or --public-ip), or delete the older lease",
        );
    }
    if let Some(file) = &seen.overlay.subnet_file
        && file.subnet.is_some()
        && file.subnet != key.subnet(family)
    {
        return Finding::fail(
            NAME,
            format!(
                "the store says {key}, {} says {}",
                file.path,
                file.subnet.map_or("none".into(), |net| net.to_string())
            ),
            format!(
                "restart the agent, which writes {} anew; then restart the pods of the old subnet",
                file.path
            ),
        );
    }
    let mac = attrs.vxlan(family).map(|data| data.mac);
    if let (Some(device), Some(mac)) = (&seen.overlay.device, mac)
        && device.mac != mac
    {
        return Finding::fail(
            NAME,
            format!(
                "the MAC address of {} is {}, peers send to {mac}: nothing arrives",
                seen.overlay.name, device.mac
            ),
            format!(
                "start the agent, which sets it back, or ip link set {} address {mac}; against udev write \"MACAddressPolicy=none\" for OriginalName=flannel* to /etc/systemd/network/10-flannel.link",
                seen.overlay.name
            ),
        );
    }
    let data = match (mac, attrs.wireguard(family)) {
        (Some(mac), _) => format!(", MAC {mac}"),
        (None, Some(data)) => format!(", public key {}", data.public_key),
        (None, None) => String::new(),
    };
    Finding::ok(NAME, format!("{key} of {public_ip}{data}"))
}
