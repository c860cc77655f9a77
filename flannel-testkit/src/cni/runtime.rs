//! What libcni does with a list of plugins (upstream: `libcni/api.go`).

use super::{Container, PluginError, Runtime};
use anyhow::Context as _;
use serde_json::{Map, Value, json};
use std::fs;
use std::path::PathBuf;

impl Runtime {
    /// ADD of every plugin in order, each with the result of the one before; the last result is kept in the cache.
    pub fn add(&self, container: &Container) -> anyhow::Result<Value> {
        let mut result = Value::Null;
        for plugin in self.plugins() {
            let conf = self.conf(plugin, Some(container), &result);
            let out = self.exec(kind(plugin), "ADD", Some(container), &conf)??;
            result = serde_json::from_str(&out).with_context(|| format!("the result {out:?}"))?;
        }
        self.remember(container, &result)?;
        Ok(result)
    }

    /// CHECK of the flannel plugin. Of the others Debian has versions whose CHECK fails on a node without IPv6 (portmap 1.1.1) or
    /// crashes without limits (bandwidth 1.1.1).
    pub fn check(&self, container: &Container) -> anyhow::Result<()> {
        let result = self.remembered(container)?.context("no cached result")?;
        for plugin in self.plugins().filter(|plugin| kind(plugin) == "flannel") {
            let conf = self.conf(plugin, Some(container), &result);
            self.exec(kind(plugin), "CHECK", Some(container), &conf)??;
        }
        Ok(())
    }

    /// DEL of every plugin, the last one first. The first that fails ends it, and the runtime would try all again.
    pub fn del(&self, container: &Container) -> anyhow::Result<()> {
        let result = self.remembered(container)?.unwrap_or(Value::Null);
        for plugin in self.plugins().rev() {
            let conf = self.conf(plugin, Some(container), &result);
            self.exec(kind(plugin), "DEL", Some(container), &conf)??;
        }
        match fs::remove_file(self.cache_file(container)) {
            Err(err) if err.kind() != std::io::ErrorKind::NotFound => Err(err.into()),
            _ => Ok(()),
        }
    }

    /// GC of every plugin with these attachments, in specification version 1.1.0.
    pub fn gc(&self, stay: &[&Container]) -> anyhow::Result<()> {
        let stay: Vec<Value> = stay
            .iter()
            .map(|container| json!({ "containerID": container.id, "ifname": container.ifname }))
            .collect();
        for plugin in self.plugins().filter(|plugin| knows_1_1(plugin)) {
            let mut conf = self.conf(plugin, None, &Value::Null);
            conf["cniVersion"] = json!("1.1.0");
            conf["cni.dev/valid-attachments"] = json!(stay);
            conf["cni.dev/attachments"] = json!(stay);
            self.exec(kind(plugin), "GC", None, &conf)??;
        }
        Ok(())
    }

    /// STATUS of every plugin, in specification version 1.1.0.
    pub fn status(&self) -> anyhow::Result<()> {
        for plugin in self.plugins().filter(|plugin| knows_1_1(plugin)) {
            let mut conf = self.conf(plugin, None, &Value::Null);
            conf["cniVersion"] = json!("1.1.0");
            self.exec(kind(plugin), "STATUS", None, &conf)??;
        }
        Ok(())
    }

    /// What a plugin of the list is called with.
    pub fn conf(&self, plugin: &Value, container: Option<&Container>, before: &Value) -> Value {
        let mut conf = plugin.clone();
        conf["name"] = self.list["name"].clone();
        conf["cniVersion"] = self.list["cniVersion"].clone();
        let wanted = conf
            .as_object_mut()
            .and_then(|conf| conf.remove("capabilities"));
        if let (Some(container), Some(wanted)) = (container, wanted) {
            let given: Map<String, Value> = wanted
                .as_object()
                .into_iter()
                .flatten()
                .filter(|(_, on)| **on == json!(true))
                .filter_map(|(name, _)| {
                    let value = container.capabilities.get(name)?;
                    Some((name.clone(), value.clone()))
                })
                .collect();
            if !given.is_empty() {
                conf["runtimeConfig"] = Value::Object(given);
            }
        }
        if !before.is_null() {
            conf["prevResult"] = before.clone();
        }
        conf
    }

    /// The flannel plugin's part of the list.
    pub fn flannel(&self) -> &Value {
        &self.list["plugins"][0]
    }

    /// For changes to it.
    pub fn flannel_mut(&mut self) -> &mut Value {
        &mut self.list["plugins"][0]
    }

    fn plugins(&self) -> impl DoubleEndedIterator<Item = &Value> {
        self.list["plugins"].as_array().into_iter().flatten()
    }

    fn cache_file(&self, container: &Container) -> PathBuf {
        let network = self.list["name"].as_str().unwrap_or_default();
        let name = format!("{network}-{}-{}", container.id, container.ifname);
        self.cache_dir().join("results").join(name)
    }

    fn remember(&self, container: &Container, result: &Value) -> anyhow::Result<()> {
        let cached = json!({
            "kind": "cniCacheV1",
            "containerId": container.id,
            "config": base64(self.list.to_string().as_bytes()),
            "ifName": container.ifname,
            "networkName": self.list["name"],
            "cniArgs": arguments(container),
            "capabilityArgs": container.capabilities,
            "result": result,
        });
        let file = self.cache_file(container);
        fs::write(&file, cached.to_string()).with_context(|| format!("write {}", file.display()))
    }

    fn remembered(&self, container: &Container) -> anyhow::Result<Option<Value>> {
        match fs::read_to_string(self.cache_file(container)) {
            Ok(text) => {
                let mut cached: Value = serde_json::from_str(&text)?;
                Ok(Some(cached["result"].take()))
            }
            Err(err) if err.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(err) => Err(err.into()),
        }
    }
}

/// The error of a plugin behind an error of the runtime.
pub fn plugin_error(error: &anyhow::Error) -> Option<&PluginError> {
    error.downcast_ref()
}

/// What containerd says of a pod in `CNI_ARGS`.
pub(super) fn arguments(container: &Container) -> [[String; 2]; 5] {
    let name = container.ns.name();
    [
        ["IgnoreUnknown", "1"],
        ["K8S_POD_NAMESPACE", "default"],
        ["K8S_POD_NAME", name],
        ["K8S_POD_INFRA_CONTAINER_ID", &container.id],
        ["K8S_POD_UID", "5a7bd2f1-0d14-4b5f-9c6e-1f0f8f2f4f10"],
    ]
    .map(|pair| pair.map(str::to_owned))
}

fn kind(plugin: &Value) -> &str {
    plugin["type"].as_str().unwrap_or_default()
}

/// The distribution's plugins may be older than GC and STATUS; a runtime asks them by VERSION first.
fn knows_1_1(plugin: &Value) -> bool {
    kind(plugin) == "flannel"
}

fn base64(bytes: &[u8]) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::new();
    for chunk in bytes.chunks(3) {
        let at = |index: usize| u32::from(chunk.get(index).copied().unwrap_or(0));
        let word = at(0) << 16 | at(1) << 8 | at(2);
        for place in 0..4 {
            let letter = LETTERS[(word >> (18 - 6 * place)) as usize & 63];
            let there = place <= chunk.len();
            out.push(if there { char::from(letter) } else { '=' });
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_the_usual_one() {
        for (text, encoded) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
        ] {
            assert_eq!(base64(text.as_bytes()), encoded, "{text}");
        }
    }
}
