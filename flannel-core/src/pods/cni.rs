//! The results that container runtimes keep of CNI's ADD: one JSON file for each interface of a pod.
//!
//! libcni writes `{"kind": "cniCacheV1", …, "result": {…}}`, older versions the bare result; see `libcni/api.go` of
//! `containernetworking/cni`. The result's shape is that of the CNI specification since 0.3.0: `interfaces` names the bridge, the
//! host's end of the veth pair and, with a `sandbox`, the pod's own end; `ips` point into that list.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::addr::VtepMac;

/// An address that a CNI plugin gave to a pod.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CniPod {
    /// The pod's address.
    pub address: IpAddr,
    /// The pod's MAC address.
    pub mac: VtepMac,
    /// Interfaces of the host that the plugin named. One that is a port of the bridge is the host's end of the pod's veth pair.
    pub host_interfaces: Vec<String>,
}

#[derive(Deserialize)]
struct Cached {
    result: AddResult,
}

#[derive(Deserialize)]
struct AddResult {
    #[serde(default)]
    interfaces: Vec<Interface>,
    #[serde(default)]
    ips: Vec<Address>,
}

#[derive(Deserialize)]
struct Interface {
    #[serde(default)]
    name: String,
    #[serde(default)]
    mac: String,
    #[serde(default)]
    sandbox: String,
}

#[derive(Deserialize)]
struct Address {
    address: String,
    #[serde(default)]
    interface: Option<usize>,
}

/// Reads one file. What is not a result of that shape, or has no address, is nobody's.
pub fn parse(text: &str) -> Vec<CniPod> {
    let result = serde_json::from_str::<Cached>(text)
        .map(|cached| cached.result)
        .or_else(|_| serde_json::from_str::<AddResult>(text));
    let Ok(result) = result else {
        return Vec::new();
    };
    let host_interfaces: Vec<String> = result
        .interfaces
        .iter()
        .filter(|interface| interface.sandbox.is_empty())
        .map(|interface| interface.name.clone())
        .collect();
    result
        .ips
        .iter()
        .filter_map(|ip| {
            let interface = result.interfaces.get(ip.interface?)?;
            if interface.sandbox.is_empty() {
                return None;
            }
            Some(CniPod {
                address: ip.address.parse::<IpNet>().ok()?.addr(),
                mac: interface.mac.parse().ok()?,
                host_interfaces: host_interfaces.clone(),
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const RESULT: &str = r#"{"cniVersion":"1.0.0",
        "interfaces":[{"name":"cni0","mac":"52:8f:1b:0b:01:02"},{"name":"veth8b2d4c1e","mac":"12:0f:1b:0b:01:02"},
            {"name":"eth0","mac":"ae:8f:1b:0b:01:02","sandbox":"/var/run/netns/cni-1"}],
        "ips":[{"interface":2,"address":"10.244.1.7/24","gateway":"10.244.1.1"},{"interface":2,"address":"fd00::7/64"}],
        "routes":[{"dst":"0.0.0.0/0"}],"dns":{}}"#;

    fn pod() -> CniPod {
        CniPod {
            address: IpAddr::from([10, 244, 1, 7]),
            mac: "ae:8f:1b:0b:01:02".parse().unwrap(),
            host_interfaces: vec!["cni0".into(), "veth8b2d4c1e".into()],
        }
    }

    /// One entry for each address.
    fn pods() -> [CniPod; 2] {
        let of_ipv6 = CniPod {
            address: "fd00::7".parse().unwrap(),
            ..pod()
        };
        [pod(), of_ipv6]
    }

    #[test]
    fn both_forms() {
        assert_eq!(parse(RESULT), pods());
        let cached = format!(
            r#"{{"kind":"cniCacheV1","containerId":"4ab5","config":"e30=","ifName":"eth0","networkName":"cbr0","result":{RESULT}}}"#
        );
        assert_eq!(parse(&cached), pods());
    }

    #[test]
    fn others_are_nobodys() {
        for text in [
            "",
            "[]",
            "{}",
            r#"{"kind":"cniCacheV1","result":null}"#,
            // The address of an interface of the host, of one that is not listed, and of none.
            r#"{"interfaces":[{"name":"cni0","mac":"52:8f:1b:0b:01:02"}],"ips":[{"interface":0,"address":"10.244.1.1/24"}]}"#,
            r#"{"interfaces":[],"ips":[{"interface":5,"address":"10.244.1.7/24"}]}"#,
            r#"{"ips":[{"address":"10.244.1.7/24"}]}"#,
            r#"{"ips":[{"interface":-1,"address":"10.244.1.7/24"}]}"#,
            r#"{"interfaces":[{"name":"eth0","mac":"","sandbox":"/n"}],"ips":[{"interface":0,"address":"10.244.1.7/24"}]}"#,
            // Before 0.3.0.
            r#"{"cniVersion":"0.2.0","ip4":{"ip":"10.244.1.7/24"}}"#,
        ] {
            assert_eq!(parse(text), [], "{text}");
        }
    }

    proptest! {
        #[test]
        fn never_panics(text in ".*") {
            let _pods = parse(&text);
        }
    }
}
