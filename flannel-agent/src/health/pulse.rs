//! Whether the reconcile loop still turns.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

/// The loop's sign of life. Clones share it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Pulse(Arc<Mutex<Option<Instant>>>);

impl Pulse {
    /// The loop has just got something done.
    pub(crate) fn beat(&self) {
        self.set(Some(Instant::now()));
    }

    /// No loop runs, and none is expected to beat: before the first one, between two, after the last.
    pub(crate) fn rest(&self) {
        self.set(None);
    }

    /// How long the loop has been silent; zero while none runs.
    pub(crate) fn silence(&self) -> Duration {
        let last = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        last.map_or(Duration::ZERO, |last| last.elapsed())
    }

    fn set(&self, at: Option<Instant>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = at;
    }
}
