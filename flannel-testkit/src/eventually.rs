//! Waiting for a condition. The only place of the crate that sleeps.

use std::fmt::Display;
use std::time::{Duration, Instant};

/// Time between two looks at a condition.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// Calls `look` until it succeeds, and panics with its last error when `deadline` has passed.
#[track_caller]
pub fn eventually<T, E: Display>(
    deadline: Duration,
    what: &str,
    look: impl FnMut() -> Result<T, E>,
) -> T {
    match try_eventually(deadline, what, look) {
        Ok(value) => value,
        Err(err) => panic!("{err}"),
    }
}

/// Calls `look` until it succeeds; fails with its last error when `deadline` has passed.
pub fn try_eventually<T, E: Display>(
    deadline: Duration,
    what: &str,
    mut look: impl FnMut() -> Result<T, E>,
) -> anyhow::Result<T> {
    let start = Instant::now();
    loop {
        match look() {
            Ok(value) => return Ok(value),
            Err(err) if start.elapsed() >= deadline => {
                anyhow::bail!("{what}: not within {deadline:?}: {err}")
            }
            Err(_) => std::thread::sleep(LOOK_EVERY),
        }
    }
}
