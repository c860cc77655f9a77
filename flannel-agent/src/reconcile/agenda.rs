//! When the loop looks next: events only ask for a look, and looks keep their distance.

use std::time::Duration;

use tokio::time::Instant;

use crate::dataplane::Scope;

/// Events that come together are answered together.
const COALESCE: Duration = Duration::from_millis(50);
/// The same where somebody waits for the answer.
const EXPEDITED: Duration = Duration::from_millis(5);
/// The longest rest: what is broken is repaired within two seconds all the same.
const MAX_REST: Duration = Duration::from_secs(1);

/// When to look, and at how much.
#[derive(Debug)]
pub(super) struct Agenda {
    kernel: Option<Instant>,
    pods: Option<Instant>,
    /// What a look took: the loop rests four times as long, so that a node with thousands of peers or pods, and a restless kernel, is
    /// not busy looking.
    kernel_rest: Duration,
    pods_rest: Duration,
}

impl Default for Agenda {
    fn default() -> Self {
        Self {
            kernel: None,
            pods: None,
            kernel_rest: COALESCE,
            pods_rest: COALESCE,
        }
    }
}

impl Agenda {
    /// When the next look of this scope is due, if one is.
    pub(super) fn due(&self, scope: Scope) -> Option<Instant> {
        match scope {
            Scope::Pods => self.pods,
            Scope::Maps | Scope::Kernel | Scope::Everything => self.kernel,
        }
    }

    /// Asks for a look, unless one is due already.
    pub(super) fn ask(&mut self, scope: Scope) {
        let now = Instant::now();
        match scope {
            Scope::Pods => self.pods.get_or_insert(now + self.pods_rest),
            Scope::Maps | Scope::Kernel | Scope::Everything => {
                self.kernel.get_or_insert(now + self.kernel_rest)
            }
        };
    }

    /// Asks for a look at the kernel without a rest.
    pub(super) fn hurry(&mut self) {
        let soon = Instant::now() + COALESCE;
        self.kernel = Some(self.kernel.map_or(soon, |due| due.min(soon)));
    }

    /// Asks for a look at the pods at once: somebody waits. Those who come together are answered together.
    pub(super) fn expedite(&mut self) {
        let soon = Instant::now() + EXPEDITED;
        self.pods = Some(self.pods.map_or(soon, |due| due.min(soon)));
    }

    /// A look begins.
    pub(super) fn begin(&mut self, scope: Scope) {
        if scope >= Scope::Kernel {
            self.kernel = None;
            self.pods = None;
        } else if scope == Scope::Pods {
            self.pods = None;
        }
    }

    /// A look has ended.
    pub(super) fn end(&mut self, scope: Scope, took: Duration) {
        let rest = COALESCE.max(took * 4).min(MAX_REST);
        match scope {
            Scope::Pods => self.pods_rest = rest,
            Scope::Maps => {}
            Scope::Kernel | Scope::Everything => self.kernel_rest = rest,
        }
    }
}
