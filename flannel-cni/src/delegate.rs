//! The configuration that the delegate gets (upstream: `flannel_linux.go`, `doCmdAdd` and `getDelegateIPAM`).

use ipnet::IpNet;
use serde_json::{Value, json};

use crate::{error::CniError, json::Object, netconf::NetConf, subnet_env::SubnetEnv};

/// The kind of delegate unless the configuration says otherwise.
const BRIDGE: &str = "bridge";
/// Bridge's name unless its configuration says otherwise (upstream: bridge's `defaultBrName`).
const DEFAULT_BRIDGE: &str = "cni0";

/// A delegate's configuration.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Delegate {
    /// Its plugin.
    pub(crate) kind: String,
    pub(crate) conf: Object,
}

impl Delegate {
    /// Puts it together from our configuration and this node's subnet.
    pub(crate) fn assemble(conf: &NetConf, env: &SubnetEnv) -> Result<Self, CniError> {
        check(&conf.delegate)?;
        let mut delegate = skeleton(conf);
        let kind = kind_of(&delegate);
        default(&mut delegate, "ipMasq", json!(!env.ip_masq));
        default(&mut delegate, "mtu", json!(env.mtu));
        let ipam = ipam(conf, &env.subnets(), &env.networks())?;
        delegate.insert("ipam".into(), Value::Object(ipam));
        Ok(Self {
            kind,
            conf: delegate,
        })
    }

    /// Puts together what a delegate needs to free what it gave, when what it was given is lost. `subnets` are those in which the
    /// addresses may be.
    pub(crate) fn reconstruct(conf: &NetConf, subnets: &[String]) -> Result<Self, CniError> {
        check(&conf.delegate)?;
        let mut delegate = skeleton(conf);
        let kind = kind_of(&delegate);
        delegate.insert("ipam".into(), Value::Object(ipam(conf, subnets, &[])?));
        Ok(Self {
            kind,
            conf: delegate,
        })
    }

    /// Reads one that was saved.
    pub(crate) fn read(text: &str) -> Result<Self, String> {
        let conf: Object = serde_json::from_str(text).map_err(|error| error.to_string())?;
        match conf.get("type").and_then(Value::as_str) {
            Some(kind) => Ok(Self {
                kind: kind.to_owned(),
                conf,
            }),
            None => Err("it names no plugin as its type".to_owned()),
        }
    }

    /// With another value in it.
    pub(crate) fn with(&self, key: &str, value: Value) -> Self {
        let mut changed = self.clone();
        changed.conf.insert(key.to_owned(), value);
        changed
    }

    /// The name of the network.
    pub(crate) fn network(&self) -> Option<&str> {
        self.conf.get("name")?.as_str()
    }

    /// The bridge that it makes, if that is what it makes.
    pub(crate) fn bridge(&self) -> Option<&str> {
        if self.kind != BRIDGE {
            return None;
        }
        let named = self.conf.get("bridge").and_then(Value::as_str);
        Some(
            named
                .filter(|name| !name.is_empty())
                .unwrap_or(DEFAULT_BRIDGE),
        )
    }

    /// The configuration of whoever gives addresses.
    pub(crate) fn ipam(&self) -> Option<&Object> {
        self.conf.get("ipam")?.as_object()
    }
}

fn check(delegate: &Object) -> Result<(), CniError> {
    if delegate.get("type").is_some_and(|kind| !kind.is_string()) {
        return Err(CniError::internal(
            "'delegate' dictionary, if present, must have (string) 'type' field",
        ));
    }
    for key in ["name", "ipam"] {
        if delegate.contains_key(key) {
            return Err(CniError::internal(format!(
                "'delegate' dictionary must not have '{key}' field, it'll be set by flannel"
            )));
        }
    }
    Ok(())
}

/// What does not depend on the subnet.
fn skeleton(conf: &NetConf) -> Object {
    let mut delegate = conf.delegate.clone();
    if let Some(given) = &conf.runtime_config {
        delegate.insert("runtimeConfig".into(), given.clone());
    }
    delegate.insert("name".into(), json!(conf.name));
    default(&mut delegate, "type", json!(BRIDGE));
    if kind_of(&delegate) == BRIDGE {
        default(&mut delegate, "isGateway", json!(true));
    }
    if !conf.version.is_empty() {
        delegate.insert("cniVersion".into(), json!(conf.version));
    }
    delegate
}

fn kind_of(delegate: &Object) -> String {
    let kind = delegate.get("type").and_then(Value::as_str);
    kind.unwrap_or(BRIDGE).to_owned()
}

fn default(object: &mut Object, key: &str, value: Value) {
    object.entry(key).or_insert(value);
}

fn ipam(conf: &NetConf, subnets: &[String], networks: &[String]) -> Result<Object, CniError> {
    let mut ipam = conf.ipam.clone();
    default(&mut ipam, "type", json!("host-local"));
    let mut routes = match ipam.get("routes") {
        Some(given) => routes(given).map_err(|reason| {
            CniError::internal(format!(
                "failed to assemble Delegate IPAM: failed to read IPAM routes: {reason}"
            ))
        })?,
        None => Vec::new(),
    };
    routes.extend(networks.iter().map(|network| json!({ "dst": network })));
    let ranges = subnets.iter().map(|subnet| json!([{ "subnet": subnet }]));
    ipam.insert("ranges".into(), ranges.collect());
    ipam.insert("routes".into(), Value::Array(routes));
    Ok(ipam)
}

/// What libcni's `types.Route` keeps of a list of routes.
fn routes(given: &Value) -> Result<Vec<Value>, String> {
    let entries = match given {
        Value::Null => return Ok(Vec::new()),
        Value::Array(entries) => entries,
        other => return Err(format!("{other} is not a list of routes")),
    };
    entries.iter().map(route).collect()
}

fn route(entry: &Value) -> Result<Value, String> {
    let given = entry
        .as_object()
        .ok_or_else(|| format!("{entry} is not a route"))?;
    let mut route = Object::new();
    for (key, value) in given {
        match key.to_ascii_lowercase().as_str() {
            "dst" => {
                let dst = value.as_str().unwrap_or_default();
                let dst: IpNet = dst
                    .parse()
                    .map_err(|_| format!("invalid CIDR address: {dst}"))?;
                route.insert("dst".into(), json!(dst.to_string()));
            }
            "gw" => {
                let text = value.as_str().unwrap_or_default();
                if !text.is_empty() {
                    let gateway: std::net::IpAddr = text
                        .parse()
                        .map_err(|_| format!("invalid IP address: {text}"))?;
                    route.insert("gw".into(), json!(gateway.to_string()));
                }
            }
            name @ ("mtu" | "advmss" | "priority")
                if value.as_i64().is_some_and(|value| value != 0) =>
            {
                route.insert(name.to_owned(), value.clone());
            }
            name @ ("table" | "scope") if value.is_i64() => {
                route.insert(name.to_owned(), value.clone());
            }
            _ => {}
        }
    }
    if !route.contains_key("dst") {
        return Err(format!("{entry} has no dst"));
    }
    Ok(Value::Object(route))
}

#[cfg(test)]
mod tests;
