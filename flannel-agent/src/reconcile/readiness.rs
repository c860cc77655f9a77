//! What makes the node ready, and what others are told of it.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use flannel_core::{
    plan::{Desired, Observed, ObservedKind, Op, Plan, Tunnel},
    subnet_env::SubnetEnv,
};
use ipnet::IpNet;

use crate::{
    files,
    health::{Board, NOT_YET, Part, Pulse},
    metrics::Metrics,
    state::{Mode, State},
    telemetry::{chain, one_line},
};

/// Writes `subnet.env` once everything is in place, and keeps the board up to date. Each overlay of the node has one; they share what
/// is the node's.
#[derive(Debug)]
pub(crate) struct Readiness {
    board: Board,
    pulse: Pulse,
    metrics: Metrics,
    /// What the overlay is on the board.
    part: Part,
    /// What went wrong in the present attempt with more than a single pod.
    faults: Vec<String>,
    file: Arc<Mutex<EnvFile>>,
}

/// `subnet.env`, and what goes into it.
#[derive(Debug)]
struct EnvFile {
    path: PathBuf,
    ip_masq: bool,
    /// The overlays of the node, each with what is known of it once it is in place.
    overlays: BTreeMap<Part, Option<Ready>>,
    /// What each does, in a few words.
    summaries: BTreeMap<Part, String>,
    /// The text last written.
    written: Option<String>,
    /// Why it could not be written, once said.
    trouble: Option<String>,
    announced: bool,
}

/// An overlay that is in place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Ready {
    network: IpNet,
    subnet: Option<IpNet>,
    mtu: u32,
    mode: Mode,
}

impl EnvFile {
    /// The text, once every overlay is in place.
    fn text(&self) -> Option<String> {
        let overlays: Option<Vec<Ready>> = self.overlays.values().copied().collect();
        let mut env = SubnetEnv {
            network: None,
            subnet: None,
            ipv6_network: None,
            ipv6_subnet: None,
            mtu: u32::MAX,
            ip_masq: self.ip_masq,
        };
        for overlay in overlays? {
            env.mtu = env.mtu.min(overlay.mtu);
            match overlay.network {
                IpNet::V4(network) => env.network = Some(network),
                IpNet::V6(network) => env.ipv6_network = Some(network),
            }
            match overlay.subnet {
                Some(IpNet::V4(subnet)) => env.subnet = Some(subnet),
                Some(IpNet::V6(subnet)) => env.ipv6_subnet = Some(subnet),
                None => {}
            }
        }
        Some(env.render())
    }
}

impl Readiness {
    pub(crate) fn new(
        subnet_file: PathBuf,
        ip_masq: bool,
        board: Board,
        pulse: Pulse,
        metrics: Metrics,
    ) -> Self {
        Self {
            board,
            pulse,
            metrics,
            part: Part::Datapath,
            faults: Vec::new(),
            file: Arc::new(Mutex::new(EnvFile {
                path: subnet_file,
                ip_masq,
                overlays: BTreeMap::new(),
                summaries: BTreeMap::new(),
                written: None,
                trouble: None,
                announced: false,
            })),
        }
    }

    /// Begins with none of the node's overlays in place: one for each, the second that of IPv6 beside IPv4.
    pub(crate) fn begin(&self, count: usize) -> Vec<Self> {
        let parts = [Part::Datapath, Part::SecondDatapath].into_iter();
        let parts: Vec<Part> = parts.take(count).collect();
        {
            let mut file = self.file();
            file.overlays = parts.iter().map(|part| (*part, None)).collect();
            file.summaries.clear();
        }
        if count < 2 {
            self.board.settle(Part::SecondDatapath);
            self.metrics.forget(Part::SecondDatapath);
        } else if !self.board.is_settled(Part::Datapath) {
            // Otherwise it has been in place, and goes on carrying traffic.
            self.board.lack(Part::SecondDatapath, NOT_YET);
        }
        let of = |part: &Part| Self {
            board: self.board.clone(),
            pulse: self.pulse.clone(),
            metrics: self.metrics.clone(),
            part: *part,
            faults: Vec::new(),
            file: Arc::clone(&self.file),
        };
        parts.iter().map(of).collect()
    }

    fn file(&self) -> MutexGuard<'_, EnvFile> {
        self.file.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The loop has got something done.
    pub(super) fn beat(&self) {
        self.pulse.beat();
    }

    /// Where changes and looks are counted.
    pub(super) fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// The loop ends.
    pub(super) fn rest(&self) {
        self.pulse.rest();
    }

    /// Notes a trouble that keeps the data path from being complete.
    pub(super) fn fault(&mut self, troubles: &mut BTreeSet<String>, text: String) {
        self.faults.push(text.clone());
        troubles.insert(text);
    }

    /// Says before it is mended that the tunnel device is missing: everything else hangs on it.
    pub(super) fn foresee(&self, plan: &Plan) {
        let missing = plan.ops.iter().find_map(|op| match op {
            Op::CreateDevice(tunnel) => Some(tunnel.name.as_str()),
            _ => None,
        });
        if let Some(name) = missing {
            self.board.lack(
                self.part,
                format!("device {name} is missing and is being made"),
            );
        }
    }

    /// Tells the board how the data path is after an attempt. What is wrong with a single pod, or with another node's lease, is
    /// in `status`: it must not make this node unready, or one wrong lease would do so to all.
    pub(super) fn report(&mut self, seen: &Observed, desired: &Desired, state: &State) {
        let faults = std::mem::take(&mut self.faults);
        let device = seen.device.as_ref().map(|device| &device.kind);
        let ours = matches!(
            device,
            Some(ObservedKind::Vxlan { .. } | ObservedKind::Veth { .. })
        );
        if !faults.is_empty() {
            self.board.lack(self.part, faults.join("; "));
        } else if let Some(Tunnel { name, .. }) = desired.tunnel.as_ref().filter(|_| !ours) {
            let troubles = state.problems.join("; ");
            self.board.lack(
                self.part,
                format!("there is no device {name} of ours: {troubles}"),
            );
        } else if desired.peers.is_none() {
            self.board.lack(
                self.part,
                "the lease store has not told the other nodes yet",
            );
        } else {
            self.board.settle(self.part);
        }
        self.metrics.know(self.part, seen, desired, state);
        let peers = desired.peers.as_ref().map_or(0, BTreeMap::len);
        let subnet = state.subnet.map(|subnet| subnet.to_string());
        let summary = format!(
            "{peers} peers, datapath {}, subnet {}",
            state.datapath.mode.as_str(),
            subnet.as_deref().unwrap_or("none"),
        );
        let mut file = self.file();
        file.summaries.insert(self.part, summary);
        let all: Vec<&str> = file.summaries.values().map(String::as_str).collect();
        self.board.summarize(all.join("; "));
    }

    /// Writes `subnet.env` when it is due.
    pub(super) fn become_ready(&mut self, desired: &Desired, state: &State) {
        let Some(network) = desired.network() else {
            return;
        };
        let ready = Ready {
            network,
            subnet: state.subnet,
            mtu: state.mtu,
            mode: state.datapath.mode,
        };
        let mut file = self.file();
        file.overlays.insert(self.part, Some(ready));
        let Some(text) = file.text() else {
            return;
        };
        // Pods cannot be started without it: it is put back when somebody has emptied /run.
        if file.written.as_ref() != Some(&text) || !file.path.exists() {
            if let Err(error) = files::replace(&file.path, &text) {
                let trouble = chain(&error);
                self.board.lack(Part::SubnetFile, trouble.as_str());
                if file.trouble.as_ref() != Some(&trouble) {
                    tracing::error!("Failed to write subnet file: {trouble}");
                    file.trouble = Some(trouble);
                }
                return;
            }
            let subnets = file.overlays.values().flatten();
            let subnets: Vec<String> = subnets
                .filter_map(|overlay| Some(overlay.subnet?.to_string()))
                .collect();
            tracing::info!(
                subnet = subnets.join(" "),
                "Wrote subnet file to {}",
                one_line(&file.path.display().to_string())
            );
            file.written = Some(text);
            file.trouble = None;
        }
        self.board.settle(Part::SubnetFile);
        if !file.announced {
            file.announced = true;
            let kernel = |overlay: &Ready| overlay.mode == Mode::Kernel;
            let datapath = if file.overlays.values().flatten().any(kernel) {
                Mode::Kernel
            } else {
                Mode::Bpf
            };
            tracing::info!(datapath = datapath.as_str(), "flannel is ready");
            tracing::info!("Running backend.");
            tracing::info!("watching for new subnet leases");
        }
    }
}
