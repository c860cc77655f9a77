//! What makes the node ready, and what others are told of it.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
};

use flannel_core::{
    plan::{Desired, Observed, ObservedKind, Op, Plan},
    subnet_env::SubnetEnv,
};

use crate::{
    files,
    health::{Board, Part, Pulse},
    metrics::Metrics,
    state::State,
    telemetry::{chain, one_line},
};

/// Writes `subnet.env` once everything is in place, and keeps the board up to date.
#[derive(Debug)]
pub(crate) struct Readiness {
    subnet_file: PathBuf,
    ip_masq: bool,
    board: Board,
    pulse: Pulse,
    metrics: Metrics,
    /// What went wrong in the present attempt with more than a single pod.
    faults: Vec<String>,
    /// The text last written to `subnet.env`.
    written: Option<String>,
    /// Why it could not be written, once said.
    trouble: Option<String>,
    announced: bool,
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
            subnet_file,
            ip_masq,
            board,
            pulse,
            metrics,
            faults: Vec::new(),
            written: None,
            trouble: None,
            announced: false,
        }
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
                Part::Datapath,
                format!("device {name} is missing and is being made"),
            );
        }
    }

    /// Tells the board how the data path is after an attempt. What is wrong with a single pod, or with another node's lease, is
    /// in `status`: it must not make this node unready, or one wrong lease would do so to all.
    pub(super) fn report(&mut self, seen: &Observed, desired: &Desired, state: &State) {
        let faults = std::mem::take(&mut self.faults);
        let name = &desired.tunnel.name;
        let device = seen.device.as_ref().map(|device| &device.kind);
        let ours = matches!(
            device,
            Some(ObservedKind::Vxlan { .. } | ObservedKind::Veth { .. })
        );
        if !faults.is_empty() {
            self.board.lack(Part::Datapath, faults.join("; "));
        } else if !ours {
            let troubles = state.problems.join("; ");
            self.board.lack(
                Part::Datapath,
                format!("there is no device {name} of ours: {troubles}"),
            );
        } else if desired.peers.is_none() {
            self.board.lack(
                Part::Datapath,
                "the lease store has not told the other nodes yet",
            );
        } else {
            self.board.settle(Part::Datapath);
        }
        self.metrics.know(seen, desired, state);
        let peers = desired.peers.as_ref().map_or(0, BTreeMap::len);
        let subnet = state.subnet.map(|subnet| subnet.to_string());
        self.board.summarize(format!(
            "{peers} peers, datapath {}, subnet {}",
            state.datapath.mode.as_str(),
            subnet.as_deref().unwrap_or("none"),
        ));
    }

    /// Writes `subnet.env` when it is due.
    pub(super) fn become_ready(&mut self, desired: &Desired, state: &State) {
        let env = SubnetEnv {
            network: Some(desired.tunnel.network),
            subnet: state.subnet,
            ipv6_network: None,
            ipv6_subnet: None,
            mtu: state.mtu,
            ip_masq: self.ip_masq,
        };
        let text = env.render();
        // Pods cannot be started without it: it is put back when somebody has emptied /run.
        if self.written.as_ref() != Some(&text) || !self.subnet_file.exists() {
            if let Err(error) = files::replace(&self.subnet_file, &text) {
                let trouble = chain(&error);
                self.board.lack(Part::SubnetFile, trouble.as_str());
                if self.trouble.as_ref() != Some(&trouble) {
                    tracing::error!("Failed to write subnet file: {trouble}");
                    self.trouble = Some(trouble);
                }
                return;
            }
            tracing::info!(
                subnet = state.subnet.map(tracing::field::display),
                "Wrote subnet file to {}",
                one_line(&self.subnet_file.display().to_string())
            );
            self.written = Some(text);
            self.trouble = None;
        }
        self.board.settle(Part::SubnetFile);
        if !self.announced {
            self.announced = true;
            tracing::info!(datapath = state.datapath.mode.as_str(), "flannel is ready");
            tracing::info!("Running backend.");
            tracing::info!("watching for new subnet leases");
        }
    }
}
