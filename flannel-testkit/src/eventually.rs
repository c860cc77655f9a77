//! Waiting for a condition. The only place of the crate that sleeps.

use std::fmt::Display;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

/// Time between two looks at a condition.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// How many times longer than elsewhere things may take here: the environment variable `FLANNEL_TEST_PATIENCE`, 1 unless set. An
/// emulated machine is some ten times slower than the one it runs on.
static FACTOR: LazyLock<u32> = LazyLock::new(|| {
    let value = std::env::var("FLANNEL_TEST_PATIENCE");
    value.map_or(1, |value| {
        let factor = value.parse();
        factor.unwrap_or_else(|err| panic!("FLANNEL_TEST_PATIENCE={value}: {err}"))
    })
});

/// A time limit for this machine: what it is elsewhere, several times over where the machine is slow. For limits alone, never for
/// times that something is meant to take. [`eventually`] and everything with a limit in this crate apply it themselves.
pub fn patience(limit: Duration) -> Duration {
    limit * *FACTOR
}

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
    let deadline = patience(deadline);
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
