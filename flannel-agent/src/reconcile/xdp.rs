//! Native XDP in the loop: wanted until the driver refuses it or proves not to run it, then not again in this run.

use flannel_core::{
    plan::{Desired, Op},
    xdp::{self, Choice, Trial, Verdict},
};

use crate::{
    dataplane::{DataplaneError, bpf},
    state::Xdp,
    telemetry::chain,
};

/// Whether it is wanted, and what it has shown.
#[derive(Debug)]
pub(crate) struct XdpKeeper {
    choice: Choice,
    /// Why it is not wanted; `None` while it is.
    obstacle: Option<String>,
    trial: Trial,
}

impl XdpKeeper {
    /// `kind` is what the uplink is, see [`xdp::decide`]; `unsupported` is why there is no eBPF at all.
    pub(crate) fn new(choice: Choice, kind: Option<&str>, unsupported: Option<String>) -> Self {
        let decided = unsupported.map_or_else(|| xdp::decide(choice, kind), Err);
        if let Err(reason) = &decided
            && choice == Choice::Native
        {
            tracing::warn!(reason, "no native XDP");
        }
        Self {
            choice,
            obstacle: decided.err(),
            trial: Trial::default(),
        }
    }

    /// Says in the desired state whether it is wanted.
    pub(super) fn set(&self, desired: &mut Desired) {
        if let Some(settings) = &mut desired.bpf {
            settings.xdp = self.obstacle.is_none();
        }
    }

    /// Takes in what is counted now; `None` while it is not attached.
    pub(super) fn look(&mut self, now: Option<xdp::Sample>) {
        if self.trial.is_over() {
            return;
        }
        let Some(now) = now else {
            self.trial = Trial::default();
            return;
        };
        if let Verdict::Idle(packets) = self.trial.look(now) {
            let reason = format!(
                "the driver took the program and does not run it: it has stripped none of {packets} packets \
                 (virtio_net does so without mergeable receive buffers; a peer that sends UDP checksums looks the same)"
            );
            tracing::warn!(reason, "native XDP is switched off");
            self.obstacle = Some(reason);
        }
    }

    /// Whether to look at the counters.
    pub(super) fn is_on_trial(&self) -> bool {
        self.obstacle.is_none() && !self.trial.is_over()
    }

    /// Takes a refusal in. False if the op is another one, or the interface is only gone.
    pub(super) fn is_refused(&mut self, op: &Op, error: &DataplaneError) -> bool {
        let Op::AttachXdp { ifindex } = op else {
            return false;
        };
        if bpf::interface_name(*ifindex).is_none() {
            return false;
        }
        let reason = chain(error);
        if self.choice == Choice::Native {
            tracing::warn!(reason, "no native XDP");
        } else {
            tracing::info!(reason, "no native XDP");
        }
        self.obstacle = Some(reason);
        true
    }

    /// How it stands, for `status`.
    pub(super) fn report(&self) -> Xdp {
        let reason = match &self.obstacle {
            Some(obstacle) => obstacle.clone(),
            None if self.trial.is_over() => "it strips packets".into(),
            None => "the driver takes it; no packet has shown yet that it runs".into(),
        };
        Xdp {
            wanted: self.choice,
            reason,
        }
    }
}
