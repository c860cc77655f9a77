//! Where the leases of upstream's nodes are.

use crate::etcd::Etcd;
use crate::family::Prefix;
use anyhow::Context as _;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// Upstream's default for `--etcd-prefix`.
const PREFIX: &str = "/coreos.com/network";

/// A lease store. Upstream has etcd alone; a directory of our agent's is filled the way that etcd would be.
#[derive(Clone, Copy, Debug)]
pub enum LeaseStore<'a> {
    Etcd(&'a Etcd),
    Dir(&'a Path),
}

impl LeaseStore<'_> {
    /// Writes the network configuration.
    pub fn put_net_conf(&self, text: &str) -> anyhow::Result<()> {
        match self {
            LeaseStore::Etcd(etcd) => etcd.put(&format!("{PREFIX}/config"), text),
            LeaseStore::Dir(dir) => replace(&dir.join("config"), text),
        }
    }

    /// Writes a lease as upstream does, under the last part of its key: with a new etcd lease of 24 hours, whatever was there.
    pub fn put(&self, key: &str, text: &str) -> anyhow::Result<()> {
        match self {
            LeaseStore::Etcd(etcd) => {
                let said = etcd.etcdctl(&["lease", "grant", "86400"])?;
                let id = said.split(' ').nth(1).context("no id of a lease")?;
                let key = format!("{PREFIX}/subnets/{key}");
                let lease = format!("--lease={id}");
                etcd.etcdctl(&["put", &lease, "--", &key, text]).map(drop)
            }
            LeaseStore::Dir(dir) => {
                let dir = dir.join("subnets");
                fs::create_dir_all(&dir)?;
                replace(&dir.join(key), text)
            }
        }
    }

    /// Keys and values of all leases, as they are stored.
    pub fn stored(&self) -> anyhow::Result<BTreeMap<String, String>> {
        match self {
            LeaseStore::Etcd(etcd) => {
                let prefix = format!("{PREFIX}/subnets/");
                let text = etcd.etcdctl(&["get", "--prefix", "--", &prefix])?;
                let lines: Vec<&str> = text.lines().collect();
                let pairs = lines.chunks_exact(2);
                Ok(pairs
                    .map(|pair| (pair[0].replace(&prefix, ""), pair[1].to_owned()))
                    .collect())
            }
            LeaseStore::Dir(dir) => {
                let mut stored = BTreeMap::new();
                for entry in fs::read_dir(dir.join("subnets")).into_iter().flatten() {
                    let entry = entry?;
                    let name = entry.file_name().to_string_lossy().into_owned();
                    if !name.starts_with('.') {
                        stored.insert(name, fs::read_to_string(entry.path())?);
                    }
                }
                Ok(stored)
            }
        }
    }

    /// The leases, with the subnets that their keys name: one, or one of each family, IPv4 first.
    pub fn leases(&self) -> anyhow::Result<Vec<(Vec<Prefix>, Value)>> {
        let stored = self.stored()?;
        let leases = stored.iter().map(|(key, text)| {
            // Without IPv4 its part of the key is 0.0.0.0-0.
            let parts = key.split('&').map(|part| part.replacen('-', "/", 1));
            let parts = parts.filter(|part| part != "0.0.0.0/0");
            let subnets = parts.map(|part| part.parse()).collect::<Result<_, _>>()?;
            Ok((subnets, serde_json::from_str(text)?))
        });
        leases.collect()
    }
}

/// A reader sees the old text or the new one.
fn replace(path: &Path, text: &str) -> anyhow::Result<()> {
    let name = path.file_name().context("a file name")?.to_string_lossy();
    let scratch = path.with_file_name(format!(".{name}.new"));
    fs::write(&scratch, text)?;
    fs::rename(&scratch, path).with_context(|| format!("put {} in place", path.display()))
}
