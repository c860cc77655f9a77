//! The same file of the backends that have no eBPF and no loop of that kind: wireguard and alloc. Choices, never secrets.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use flannel_core::{addr::Family, config::BackendKind};
use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::{State, is_agent};
use crate::{files, telemetry::chain};

/// Names of the files, in the directory of `subnet.env`.
const WIREGUARD_FILE: &str = "flannel-wireguard.json";
const ALLOC_FILE: &str = "flannel-alloc.json";
/// The backends that have such a file.
const KINDS: [BackendKind; 2] = [BackendKind::Wireguard, BackendKind::Alloc];

/// The daemon's choices.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Bare {
    /// The backend.
    #[serde(default = "wireguard")]
    pub(crate) backend: BackendKind,
    /// Version of the agent that wrote it.
    pub(crate) version: String,
    /// Its process.
    pub(crate) pid: u32,
    /// Names of the devices.
    pub(crate) devices: Vec<String>,
    /// Which families a device carries, in the configuration's word.
    #[serde(default)]
    pub(crate) mode: Option<String>,
    /// Name of the uplink.
    pub(crate) uplink: String,
    /// Addresses that other nodes send to.
    #[serde(default)]
    pub(crate) public_ips: Vec<std::net::IpAddr>,
    /// The public key, as published.
    pub(crate) public_key: Option<String>,
    /// The cluster networks.
    pub(crate) networks: Vec<IpNet>,
    /// This node's subnets.
    pub(crate) subnets: Vec<IpNet>,
    /// MTU of pods, in bytes.
    pub(crate) mtu: u32,
    /// The lease store, without secrets.
    pub(crate) store: String,
    /// Whether changes in the store are being seen.
    pub(crate) store_connected: bool,
    /// What is wrong and needs a person.
    pub(crate) problems: Vec<String>,
    /// The file written for CNI plugins.
    pub(crate) subnet_file: PathBuf,
    /// Whether the blackhole routes for the own subnets are of our making, if there are any.
    pub(crate) blackhole: bool,
}

const fn wireguard() -> BackendKind {
    BackendKind::Wireguard
}

impl Bare {
    /// Where it is for the agent with this `subnet.env`. Backends that have none share a name with wireguard, which is never written.
    pub(crate) fn path(subnet_file: &Path, backend: BackendKind) -> PathBuf {
        subnet_file.with_file_name(match backend {
            BackendKind::Alloc => ALLOC_FILE,
            BackendKind::Wireguard | BackendKind::Vxlan | BackendKind::HostGw => WIREGUARD_FILE,
        })
    }

    /// Reads it, of whichever backend; `None` if there is none. One that does not parse is of another version: as good as none.
    pub(crate) fn read(subnet_file: &Path) -> io::Result<Option<Self>> {
        let mut found: Option<Self> = None;
        for backend in KINDS {
            let read = Self::read_of(subnet_file, backend)?;
            // After a crash in the midst of a change there may be two.
            let better = |there: &Self| !there.is_running();
            if found.as_ref().is_none_or(better) {
                found = read.or(found);
            }
        }
        Ok(found)
    }

    /// Reads it, if it is there instead of `state`, or what has written that is gone and this one is not.
    pub(crate) fn instead_of(
        state: Option<&State>,
        subnet_file: &Path,
    ) -> io::Result<Option<Self>> {
        let bare = Self::read(subnet_file)?;
        let is_newer =
            |bare: &Self| state.is_none_or(|state| bare.is_running() && !state.is_running());
        Ok(bare.filter(is_newer))
    }

    /// Reads that of one backend.
    pub(crate) fn read_of(subnet_file: &Path, backend: BackendKind) -> io::Result<Option<Self>> {
        match fs::read_to_string(Self::path(subnet_file, backend)) {
            Ok(text) => Ok(serde_json::from_str(&text).ok()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Where there may be one.
    pub(crate) fn paths(subnet_file: &Path) -> impl Iterator<Item = PathBuf> {
        KINDS
            .into_iter()
            .map(|backend| Self::path(subnet_file, backend))
    }

    /// The network and the subnet of each family that it has.
    pub(crate) fn nets(&self) -> impl Iterator<Item = (Family, (IpNet, Option<IpNet>))> {
        let of = |nets: &[IpNet], family| {
            let is = |net: &&IpNet| Family::of_net(net) == family;
            nets.iter().find(is).copied()
        };
        Family::ALL.into_iter().filter_map(move |family| {
            Some((
                family,
                (of(&self.networks, family)?, of(&self.subnets, family)),
            ))
        })
    }

    /// Whether the process that wrote it still runs.
    pub(crate) fn is_running(&self) -> bool {
        is_agent(self.pid)
    }
}

/// Keeps the file.
#[derive(Debug, Default)]
pub(crate) struct BareFile {
    written: Option<Bare>,
}

impl BareFile {
    /// Writes it, if it says something new or is gone.
    pub(crate) fn save(&mut self, state: Bare) {
        let path = Bare::path(&state.subnet_file, state.backend);
        if self.written.as_ref() == Some(&state) && path.exists() {
            return;
        }
        let text = match serde_json::to_string_pretty(&state) {
            Ok(text) => text,
            Err(error) => {
                tracing::debug!(%error, "write the state");
                return;
            }
        };
        match files::replace(&path, &text) {
            Ok(()) => self.written = Some(state),
            Err(error) => tracing::debug!(error = chain(&error), "write the state"),
        }
    }
}
