//! Down at once, up after a quiet while: rules that come and go must not make the gate flap.

use std::time::Duration;

use super::Decision;

/// How long nothing that filters may change before a better decision is taken.
pub const QUIET: Duration = Duration::from_secs(10);

/// The decision in force, and how long a better one has been waiting.
#[derive(Clone, Debug)]
pub struct Settled {
    current: Decision,
    /// The better decision's digest, and since when it has been offered.
    waiting: Option<(u64, Duration)>,
}

impl Settled {
    /// Starts with a decision that is in force at once.
    pub fn new(first: Decision) -> Self {
        Self {
            current: first,
            waiting: None,
        }
    }

    /// The decision in force.
    pub fn current(&self) -> &Decision {
        &self.current
    }

    /// Whether a better decision waits for its time.
    pub fn is_waiting(&self) -> bool {
        self.waiting.is_some()
    }

    /// Takes what was decided at `now`, on any clock that only goes forward, and gives what is in force.
    pub fn offer(&mut self, now: Duration, next: Decision) -> &Decision {
        let mut at_once = next.clone();
        if next.mode > self.current.mode {
            at_once.mode = self.current.mode;
            at_once.reason.clone_from(&self.current.reason);
        }
        for (index, reason) in &self.current.excluded {
            at_once
                .excluded
                .entry(*index)
                .or_insert_with(|| reason.clone());
        }
        let same_risk = at_once.mode == next.mode && at_once.excluded.len() == next.excluded.len();
        if same_risk {
            self.waiting = None;
            self.current = next;
            return &self.current;
        }
        let since = match self.waiting {
            Some((fingerprint, since)) if fingerprint == next.fingerprint => since,
            _ => now,
        };
        if now.saturating_sub(since) >= QUIET {
            self.waiting = None;
            self.current = next;
        } else {
            self.waiting = Some((next.fingerprint, since));
            self.current = at_once;
        }
        &self.current
    }
}
