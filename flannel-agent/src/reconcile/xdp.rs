//! Native XDP in the loop: wanted until the driver refuses it or proves not to run it, then not again for a long time.

use std::time::Duration;

use flannel_core::{
    plan::{Desired, Op},
    xdp::{self, Choice, Standing, Trial, Verdict},
};
use tokio::time::Instant;

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
    obstacle: Option<Obstacle>,
    trial: Trial,
    works: bool,
}

/// Why native XDP is not wanted.
#[derive(Debug)]
struct Obstacle {
    standing: Standing,
    reason: String,
    /// When another attempt is worth it; never, if the flags or the kind of the interface are against it.
    until: Option<Instant>,
}

impl Obstacle {
    /// Something that the interface has shown.
    fn shown(standing: Standing, reason: String) -> Self {
        Self {
            standing,
            reason,
            until: Instant::now().checked_add(xdp::LEFT_ALONE),
        }
    }
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
            obstacle: decided.err().map(|reason| Obstacle {
                standing: Standing::Off,
                reason,
                until: None,
            }),
            trial: Trial::default(),
            works: false,
        }
    }

    /// Says in the desired state whether it is wanted.
    pub(super) fn set(&mut self, desired: &mut Desired) {
        let is_over = |obstacle: &Obstacle| {
            obstacle
                .until
                .is_some_and(|until| until.elapsed() > Duration::ZERO)
        };
        if self.obstacle.as_ref().is_some_and(is_over) {
            self.obstacle = None;
        }
        if let Some(settings) = &mut desired.bpf {
            settings.xdp = self.obstacle.is_none();
        }
    }

    /// Takes in what is counted now; `None` while it is not attached.
    pub(super) fn look(&mut self, now: Option<xdp::Sample>) {
        let Some(now) = now else {
            self.trial = Trial::default();
            self.works = false;
            return;
        };
        match self.trial.look(now) {
            Verdict::Open => {}
            Verdict::Works => self.works = true,
            Verdict::Idle(packets) => {
                let reason = format!(
                    "the driver took the program and does not run it: {packets} packets came past it and it has stripped none \
                     (virtio_net does so without mergeable receive buffers, mrg_rxbuf=off in QEMU)"
                );
                tracing::warn!(
                    reason,
                    "native XDP is switched off: tc decapsulates, as without it"
                );
                self.obstacle = Some(Obstacle::shown(Standing::Idle, reason));
                self.trial = Trial::default();
                self.works = false;
            }
        }
    }

    /// Whether to look at the counters.
    pub(super) const fn is_on_trial(&self) -> bool {
        self.obstacle.is_none()
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
        self.obstacle = Some(Obstacle::shown(Standing::Refused, reason));
        true
    }

    /// How it stands, for `status`.
    pub(super) fn report(&self) -> Xdp {
        let (standing, reason) = match &self.obstacle {
            Some(obstacle) => (obstacle.standing, obstacle.reason.clone()),
            None if self.works => (Standing::Works, "it strips packets".into()),
            None => (
                Standing::Unproven,
                "the driver takes it; no packet has shown yet that it runs".into(),
            ),
        };
        Xdp {
            wanted: self.choice,
            standing,
            reason,
        }
    }
}
