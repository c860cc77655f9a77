//! Our own network configuration, on standard input.

use std::path::{Path, PathBuf};

use flannel_core::pods::{cni, cni::CniPod};
use serde_json::Value;

use crate::{
    call,
    error::{CniError, DECODING_FAILURE, INVALID_NETWORK_CONFIG},
    json::{self, Object},
    version,
};

const SUBNET_FILE: &str = "/run/flannel/subnet.env";
const DATA_DIR: &str = "/var/lib/cni/flannel";
/// The agent's socket, beside the subnet file unless the configuration says otherwise.
const SOCKET: &str = "cni.sock";

/// What the runtime gave us.
#[derive(Clone, Debug)]
pub(crate) struct NetConf {
    /// Empty if it was not said.
    pub(crate) version: String,
    pub(crate) name: String,
    pub(crate) subnet_file: PathBuf,
    pub(crate) data_dir: PathBuf,
    /// Not in upstream's plugin: where the agent listens.
    pub(crate) agent_socket: PathBuf,
    pub(crate) delegate: Object,
    pub(crate) ipam: Object,
    pub(crate) runtime_config: Option<Value>,
    pub(crate) prev_result: Option<Value>,
    /// With GC: every attachment that is to stay. `None` if the runtime did not say.
    pub(crate) valid_attachments: Option<Vec<Attachment>>,
}

/// An interface of a container.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Attachment {
    pub(crate) container: String,
    pub(crate) ifname: String,
}

impl NetConf {
    /// Reads the configuration, with upstream's messages.
    pub(crate) fn parse(stdin: &[u8]) -> Result<Self, CniError> {
        let conf: Object = serde_json::from_slice(stdin).map_err(|error| {
            CniError::new(
                DECODING_FAILURE,
                format!("error unmarshall network config: {error}"),
            )
        })?;
        let name = text(&conf, "name")?.unwrap_or_default();
        if name.is_empty() {
            return Err(CniError::new(
                INVALID_NETWORK_CONFIG,
                "missing network name",
            ));
        }
        if !call::is_name(&name) {
            return Err(CniError::new(
                INVALID_NETWORK_CONFIG,
                "invalid characters found in network name",
            )
            .with_details(name));
        }
        version::of(&conf)?;
        let path = |key: &str, default: &str| {
            let given = text(&conf, key)?.filter(|path| !path.is_empty());
            Ok::<PathBuf, CniError>(given.unwrap_or_else(|| default.to_owned()).into())
        };
        let subnet_file = path("subnetFile", SUBNET_FILE)?;
        let beside = subnet_file.with_file_name(SOCKET);
        Ok(Self {
            version: text(&conf, "cniVersion")?.unwrap_or_default(),
            name,
            data_dir: path("dataDir", DATA_DIR)?,
            agent_socket: path("agentSocket", &beside.to_string_lossy())?,
            subnet_file,
            delegate: object(&conf, "delegate")?,
            ipam: object(&conf, "ipam")?,
            runtime_config: json::field(&conf, "runtimeConfig").cloned(),
            prev_result: json::field(&conf, "prevResult").cloned(),
            valid_attachments: attachments(&conf)?,
        })
    }

    /// The version, as said or meant.
    pub(crate) fn spec_version(&self) -> &str {
        if self.version.is_empty() {
            "0.1.0"
        } else {
            &self.version
        }
    }

    /// The pods that an earlier ADD gave addresses to, as the runtime remembers it.
    pub(crate) fn pods_before(&self) -> Vec<CniPod> {
        self.prev_result
            .as_ref()
            .map(|result| cni::parse(&result.to_string()))
            .unwrap_or_default()
    }

    /// The subnets in which an earlier ADD gave addresses.
    pub(crate) fn subnets_before(&self) -> Vec<String> {
        let ips = self
            .prev_result
            .as_ref()
            .and_then(|result| result.get("ips"));
        let ips = ips.and_then(Value::as_array).into_iter().flatten();
        ips.filter_map(|ip| ip.get("address")?.as_str()?.parse::<ipnet::IpNet>().ok())
            .map(|net| net.trunc().to_string())
            .collect()
    }

    /// For messages that point to a directory or file.
    pub(crate) fn subnet_file(&self) -> &Path {
        &self.subnet_file
    }
}

fn text(conf: &Object, key: &str) -> Result<Option<String>, CniError> {
    match json::field(conf, key) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(_) => Err(wrong_type(key, "a string")),
    }
}

fn object(conf: &Object, key: &str) -> Result<Object, CniError> {
    match json::field(conf, key) {
        None => Ok(Object::new()),
        Some(Value::Object(object)) => Ok(object.clone()),
        Some(_) => Err(wrong_type(key, "an object")),
    }
}

fn wrong_type(key: &str, kind: &str) -> CniError {
    CniError::internal(format!(
        "loadFlannelNetConf failed: failed to load netconf: {key} is not {kind}"
    ))
}

/// `cni.dev/attachments` was the name in the specification's text for a while; libcni sends both.
fn attachments(conf: &Object) -> Result<Option<Vec<Attachment>>, CniError> {
    let keys = ["cni.dev/valid-attachments", "cni.dev/attachments"];
    let Some((key, given)) = keys
        .into_iter()
        .find_map(|key| Some((key, json::field(conf, key)?)))
    else {
        return Ok(None);
    };
    let read = |entry: &Value| {
        let entry = entry.as_object()?;
        Some(Attachment {
            container: json::field(entry, "containerID")?.as_str()?.to_owned(),
            ifname: json::field(entry, "ifname")?.as_str()?.to_owned(),
        })
    };
    // One that we do not understand may be one that is to stay.
    let all: Option<Vec<Attachment>> = given
        .as_array()
        .and_then(|entries| entries.iter().map(read).collect());
    all.map(Some).ok_or_else(|| {
        CniError::new(
            INVALID_NETWORK_CONFIG,
            format!("{key} is not a list of objects with containerID and ifname"),
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<NetConf, CniError> {
        NetConf::parse(text.as_bytes())
    }

    #[test]
    fn defaults_are_upstreams() {
        let conf = parse(r#"{"name":"cbr0","type":"flannel"}"#).unwrap();
        assert_eq!(conf.subnet_file, Path::new("/run/flannel/subnet.env"));
        assert_eq!(conf.data_dir, Path::new("/var/lib/cni/flannel"));
        assert_eq!(conf.agent_socket, Path::new("/run/flannel/cni.sock"));
        assert_eq!(conf.spec_version(), "0.1.0");
        assert_eq!(conf.valid_attachments, None);
    }

    #[test]
    fn keys_are_matched_as_go_matches_them() {
        let conf = parse(
            r#"{"Name":"cbr0","SUBNETFILE":"/x/env","dataDir":"","Delegate":{"hairpinMode":true},"ipam":null,"cniVersion":"1.0.0"}"#,
        )
        .unwrap();
        assert_eq!(conf.subnet_file, Path::new("/x/env"));
        assert_eq!(conf.agent_socket, Path::new("/x/cni.sock"));
        assert_eq!(conf.data_dir, Path::new("/var/lib/cni/flannel"));
        assert_eq!(conf.delegate.len(), 1);
        assert!(conf.ipam.is_empty());
    }

    #[test]
    fn wrong_configurations_are_refused() {
        for (text, code, said) in [
            ("", 6, "error unmarshall network config: "),
            ("[]", 6, "error unmarshall network config: "),
            ("{}", 7, "missing network name"),
            (
                r#"{"name":"../x"}"#,
                7,
                "invalid characters found in network name",
            ),
            (
                r#"{"name":"a","delegate":[]}"#,
                999,
                "loadFlannelNetConf failed: failed to load netconf: delegate is not an object",
            ),
            (
                r#"{"name":"a","dataDir":1}"#,
                999,
                "loadFlannelNetConf failed: failed to load netconf: dataDir is not a string",
            ),
            (
                r#"{"name":"a","cniVersion":1}"#,
                6,
                "decoding version from network config: ",
            ),
            (
                r#"{"name":"a","cni.dev/valid-attachments":{}}"#,
                7,
                "cni.dev/valid-attachments is not a list",
            ),
            (
                r#"{"name":"a","cni.dev/valid-attachments":[{"containerID":"x"}]}"#,
                7,
                "cni.dev/valid-attachments is not a list",
            ),
        ] {
            let error = parse(text).unwrap_err();
            assert_eq!(error.code, code, "{text}");
            assert!(error.msg.starts_with(said), "{text}: {error}");
        }
    }

    #[test]
    fn both_names_of_the_attachments() {
        let conf = |keys: &str| parse(&format!(r#"{{"name":"a",{keys}}}"#)).unwrap();
        let entry = r#"[{"containerID":"c","ifname":"eth0"}]"#;
        let one = Some(vec![Attachment {
            container: "c".into(),
            ifname: "eth0".into(),
        }]);
        for keys in [
            format!(r#""cni.dev/valid-attachments":{entry}"#),
            format!(r#""cni.dev/attachments":{entry}"#),
            format!(r#""cni.dev/attachments":[],"cni.dev/valid-attachments":{entry}"#),
        ] {
            assert_eq!(conf(&keys).valid_attachments, one, "{keys}");
        }
        // What is not said must not be read as "none".
        let null = conf(r#""cni.dev/valid-attachments":null,"cni.dev/attachments":null"#);
        assert_eq!(null.valid_attachments, None);
        assert_eq!(
            conf(r#""cni.dev/valid-attachments":[]"#).valid_attachments,
            Some(vec![])
        );
    }
}
