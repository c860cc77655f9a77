//! Giving a way to carry packets up while running: when eBPF cannot be kept in place, or the device cannot be made again.

use flannel_core::{
    distribution::Feature,
    plan::{DeviceKind, Op},
};

use super::Loop;
use crate::{
    dataplane::{DataplaneError, bpf::AttachMode},
    kernel_modules,
    telemetry::chain,
};

/// Attempts, a second apart, before eBPF is given up where the kernel's device carries everything without it.
const PATIENCE: u32 = 3;

/// Why the loop ends before it is told to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Fall {
    /// eBPF cannot be kept in place, and the kernel's device does without.
    Bpf(String),
    /// The device cannot be made any more.
    Device(String),
}

/// Counts what fails.
#[derive(Debug)]
pub(super) struct Falling {
    /// eBPF is wanted where it can be, not at any price.
    may_fall: bool,
    attempts: u32,
    failed: bool,
    decided: Option<Fall>,
}

impl Falling {
    pub(super) const fn new(may_fall: bool) -> Self {
        Self {
            may_fall,
            attempts: 0,
            failed: false,
            decided: None,
        }
    }

    /// Takes a failed change into account.
    pub(super) fn note(&mut self, op: &Op, error: &DataplaneError, kind: Option<&DeviceKind>) {
        match error {
            DataplaneError::Netlink(refused)
                if matches!(op, Op::CreateDevice(_))
                    && matches!(kind, Some(DeviceKind::Vxlan { .. }))
                    && refused.errno() == Some(libc::EOPNOTSUPP) =>
            {
                self.decided = Some(Fall::Device(chain(error)));
            }
            DataplaneError::Bpf(_) | DataplaneError::NoBpf(_)
                if self.may_fall
                    // Without a tunnel it is the kernel's routes that do without.
                    && !matches!(kind, Some(DeviceKind::Veth { .. }))
                    && !matches!(op, Op::StandIn(_)) =>
            {
                self.failed = true;
                if self.attempts + 1 >= PATIENCE {
                    self.decided = Some(Fall::Bpf(format!("{op}: {}", chain(error))));
                }
            }
            DataplaneError::Netlink(_)
            | DataplaneError::Bpf(_)
            | DataplaneError::NoBpf(_)
            | DataplaneError::NoDevice(_) => {}
        }
    }

    /// Ends an attempt. What is to be done now, if anything.
    pub(super) fn end_attempt(&mut self) -> Option<Fall> {
        if std::mem::take(&mut self.failed) {
            self.attempts += 1;
        } else {
            self.attempts = 0;
        }
        self.decided.take()
    }

    /// Whether this was the first failure in a row.
    pub(super) const fn has_just_failed(&self) -> bool {
        self.attempts == 1
    }
}

impl Loop<'_> {
    /// Whether what was just tried is to be given up.
    pub(super) async fn fall(&mut self) -> Option<Fall> {
        let fall = self.falling.end_attempt();
        let stuck = self.falling.has_just_failed() || fall.is_some();
        let advice = if stuck {
            load_clsact(self.dataplane.attach_mode()).await
        } else {
            None
        };
        match (fall, advice) {
            (Some(Fall::Bpf(why)), Some(advice)) => Some(Fall::Bpf(format!("{why}; {advice}"))),
            (fall, _) => fall,
        }
    }
}

/// Has the kernel load what programs are attached by, where it did not by itself. Then says what else may help.
async fn load_clsact(mode: Option<AttachMode>) -> Option<String> {
    if mode != Some(AttachMode::Clsact) {
        return None;
    }
    let host = kernel_modules::host(Feature::Clsact);
    let failure = kernel_modules::load_feature(Feature::Clsact, &host)
        .await
        .err()?;
    Some(format!("{failure}; {}", host.advice(Feature::Clsact)))
}
