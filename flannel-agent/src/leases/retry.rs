//! Waiting between attempts, and saying so once.

use std::{
    hash::{BuildHasher as _, RandomState},
    time::Duration,
};

use tokio::time::Instant;
use tracing::{debug, info, warn};

use super::error::{ErrorKind, LeaseError};

/// The first wait after a failure.
const FIRST: Duration = Duration::from_millis(100);
/// The longest wait between two attempts.
const LONGEST: Duration = Duration::from_secs(5);

/// A number nobody else draws: seeded per process by the operating system.
pub(super) fn random() -> u64 {
    RandomState::new().hash_one(std::process::id())
}

/// A random index below `len`; zero when `len` is.
pub(super) fn random_below(len: usize) -> usize {
    let len = u64::try_from(len).unwrap_or(u64::MAX).max(1);
    usize::try_from(random() % len).unwrap_or(0)
}

/// Between half of `wait` and all of it, so that nodes that failed together do not come back together.
pub(super) fn jittered(wait: Duration) -> Duration {
    let half = wait / 2;
    let spread = u64::try_from(half.as_micros()).unwrap_or(u64::MAX).max(1);
    half + Duration::from_micros(random() % spread)
}

/// A duration of a second or more in Go's words, as upstream's lines have them, to the millisecond: `22h59m58.999s`.
pub(super) fn go_duration(duration: Duration) -> String {
    let (seconds, milliseconds) = (duration.as_secs(), duration.subsec_millis());
    let (hours, minutes) = (seconds / 3600, seconds / 60 % 60);
    let fraction = match milliseconds {
        0 => String::new(),
        some => format!(".{some:03}").trim_end_matches('0').to_owned(),
    };
    let seconds = format!("{}{fraction}s", seconds % 60);
    match (hours, minutes) {
        (0, 0) => seconds,
        (0, minutes) => format!("{minutes}m{seconds}"),
        (hours, minutes) => format!("{hours}h{minutes}m{seconds}"),
    }
}

/// Doubling waits from 100 ms to 5 s.
#[derive(Clone, Copy, Debug)]
pub(super) struct Backoff(Duration);

impl Backoff {
    pub(super) fn new() -> Self {
        Backoff(FIRST)
    }

    /// The next wait; each is twice the one before it, up to 5 s.
    pub(super) fn next_wait(&mut self) -> Duration {
        let wait = self.0;
        self.0 = (wait * 2).min(LONGEST);
        jittered(wait)
    }

    pub(super) fn reset(&mut self) {
        self.0 = FIRST;
    }
}

/// Spaces out repeated writes to a key that somebody else keeps rewriting.
#[derive(Debug, Default)]
pub(super) struct Contest {
    last: Option<Instant>,
    wait: Duration,
}

impl Contest {
    /// Longer than any write of a single mishap takes to be over.
    const FORGOTTEN_AFTER: Duration = Duration::from_mins(5);
    const LONGEST: Duration = Duration::from_mins(1);

    /// `None`: write now. Otherwise when to ask again. The wait grows from one second to one minute.
    pub(super) fn entered(&mut self, now: Instant) -> Option<Instant> {
        match self.last {
            Some(last) if now < last + self.wait => return Some(last + self.wait),
            Some(last) if now < last + Self::FORGOTTEN_AFTER => {
                self.wait = (self.wait * 2).clamp(Duration::from_secs(1), Self::LONGEST);
            }
            _ => self.wait = Duration::from_secs(1),
        }
        self.last = Some(now);
        None
    }
}

/// One stretch of time without the store: reported when it starts and when it ends, not at every attempt.
#[derive(Debug, Default)]
pub(super) struct Outage {
    since: Option<(Instant, ErrorKind)>,
}

impl Outage {
    /// Notes a failure. A second line within one outage is written only when its kind changes.
    pub(super) fn failed(&mut self, error: &LeaseError) {
        let kind = error.kind();
        match self.since {
            Some((_, known)) if known == kind => {
                debug!(error = %error.chain(), "lease store still fails");
            }
            Some((since, _)) => {
                warn!(error = %error.chain(), "lease store fails in another way");
                self.since = Some((since, kind));
            }
            None => {
                warn!(
                    error = %error.chain(),
                    "lease store unreachable, retrying; known leases stay in force"
                );
                self.since = Some((Instant::now(), kind));
            }
        }
    }

    /// Notes a success; `store` is named in the line that ends an outage.
    pub(super) fn recovered(&mut self, store: &str) {
        if let Some((since, _)) = self.since.take() {
            let seconds = since.elapsed().as_secs();
            info!(store, seconds, "lease store is back");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backoff_doubles_to_five_seconds() {
        let mut backoff = Backoff::new();
        for full in [100, 200, 400, 800, 1600, 3200, 5000, 5000] {
            let wait = backoff.next_wait();
            let full = Duration::from_millis(full);
            assert!(wait >= full / 2 && wait <= full, "{wait:?} of {full:?}");
        }
        backoff.reset();
        assert!(backoff.next_wait() <= FIRST);
    }

    #[test]
    fn a_contest_slows_down_and_is_forgotten() {
        let mut contest = Contest::default();
        let start = Instant::now();
        assert_eq!(contest.entered(start), None);
        let second = Duration::from_secs(1);
        assert_eq!(contest.entered(start), Some(start + second));
        assert_eq!(contest.entered(start + second), None);
        assert_eq!(contest.entered(start + second), Some(start + 3 * second));
        let later = start + Duration::from_hours(1);
        assert_eq!(contest.entered(later), None);
        assert_eq!(contest.entered(later), Some(later + second));
    }

    #[test]
    fn durations_read_as_in_go() {
        for (milliseconds, text) in [
            (82_798_999, "22h59m58.999s"),
            (86_400_000, "24h0m0s"),
            (3_599_000, "59m59s"),
            (90_500, "1m30.5s"),
            (1_050, "1.05s"),
        ] {
            assert_eq!(go_duration(Duration::from_millis(milliseconds)), text);
        }
    }

    #[test]
    fn random_numbers_differ_and_stay_in_range() {
        assert_ne!(random(), random());
        assert!((0..100).all(|_| random_below(7) < 7));
        assert_eq!(random_below(0), 0);
    }
}
