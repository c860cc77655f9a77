//! CHECK: the delegate looks whether everything is as ADD left it. Upstream's always says yes.

use std::net::IpAddr;

use serde_json::{Value, json};

use crate::{
    call::{Call, Verb},
    delegate::Delegate,
    error::{CniError, UNKNOWN_CONTAINER},
    netconf::NetConf,
    plugin,
    saved::Saved,
};

pub(super) fn run(call: &Call, conf: &NetConf) -> Result<(), CniError> {
    let saved = Saved::new(&conf.data_dir);
    let path = saved.path(&call.container);
    let Some(text) = saved.get(&call.container)? else {
        return Err(CniError::new(
            UNKNOWN_CONTAINER,
            format!(
                "{} does not exist: the container was not added, or was deleted",
                path.display()
            ),
        ));
    };
    let delegate = Delegate::read(&text)
        .map_err(|reason| CniError::internal(format!("read {}: {reason}", path.display())))?;
    // The result comes in the version of the configuration that we are called with.
    let mut delegate = delegate.with("cniVersion", conf.spec_version().into());
    if let Some(result) = &conf.prev_result {
        delegate = delegate.with("prevResult", with_gateways(result));
    }
    plugin::run(call, Verb::Check, &delegate).map(drop)
}

/// A route of the result that names no gateway was made with that of the pod's address, and is so in the pod. Bridge looks for it without
/// one and never finds it (upstream: plugins' `ValidateExpectedRoute`, `ipam.ConfigureIface`).
fn with_gateways(result: &Value) -> Value {
    let mut result = result.clone();
    let gateways: Vec<IpAddr> = list(result.get("ips"))
        .filter_map(|ip| ip.get("gateway")?.as_str()?.parse().ok())
        .collect();
    let routes = result.get_mut("routes").and_then(Value::as_array_mut);
    for route in routes.into_iter().flatten() {
        let text = |key: &str| route.get(key).and_then(Value::as_str).unwrap_or_default();
        let is_v6 = text("dst").contains(':');
        let gateway = gateways.iter().find(|gateway| gateway.is_ipv6() == is_v6);
        if text("gw").is_empty()
            && let (Some(gateway), Some(route)) = (gateway, route.as_object_mut())
        {
            route.insert("gw".into(), json!(gateway.to_string()));
        }
    }
    result
}

fn list(value: Option<&Value>) -> impl Iterator<Item = &Value> {
    value.and_then(Value::as_array).into_iter().flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn routes_get_the_gateway_of_their_family() {
        let ips = json!([{"address":"10.1.17.5/24","gateway":"10.1.17.1"},{"address":"fc00::5/64","gateway":"fc00::1"}]);
        let routes =
            json!([{"dst":"10.1.0.0/16"},{"dst":"0.0.0.0/0","gw":"10.1.17.9"},{"dst":"fc00::/48"}]);
        let result = with_gateways(&json!({"ips":ips,"routes":routes}));
        let gateways: Vec<_> = list(result.get("routes"))
            .map(|route| route["gw"].as_str())
            .collect();
        assert_eq!(
            gateways,
            [Some("10.1.17.1"), Some("10.1.17.9"), Some("fc00::1")]
        );
        let bare = json!({"routes":[{"dst":"10.1.0.0/16"}]});
        assert_eq!(with_gateways(&bare), bare);
        for odd in [
            json!(null),
            json!(1),
            json!({"routes":1}),
            json!({"routes":[1],"ips":[1]}),
        ] {
            assert_eq!(with_gateways(&odd), odd);
        }
    }
}
