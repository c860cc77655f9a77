//! What goes wrong on purpose.

use super::request::Verb;
use std::time::Duration;

/// How a watch from a version that has been compacted is refused. Servers do both.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Gone {
    /// 200, and an ERROR event in the stream.
    #[default]
    Event,
    /// The HTTP status is 410.
    Status,
}

/// How a watch ends before its time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WatchEnd {
    /// The last chunk is sent, as at the end of `timeoutSeconds`.
    #[default]
    Clean,
    /// The connection breaks in the middle of the answer.
    Cut,
}

/// An answer that requests get instead of the right one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failure {
    /// 429, 500, 503 or 504.
    pub code: u16,
    /// Seconds in the header `Retry-After`.
    pub retry_after: Option<u32>,
    /// Only for requests with this verb.
    pub verb: Option<Verb>,
    /// How often; `None` is until it is taken back.
    pub times: Option<u32>,
}

impl Failure {
    /// A failure of every request until it is taken back.
    pub fn code(code: u16) -> Failure {
        Failure {
            code,
            retry_after: None,
            verb: None,
            times: None,
        }
    }
}

/// The state of all faults.
#[derive(Clone, Debug)]
pub(crate) struct Faults {
    /// Whether connections are accepted at all.
    pub(crate) listening: bool,
    /// Connections are accepted, and nothing is answered any more.
    pub(crate) hanging: bool,
    /// Connections of an earlier number are cut.
    pub(crate) connection_epoch: u64,
    /// Watches of an earlier number end.
    pub(crate) watch_epoch: u64,
    pub(crate) watch_end: WatchEnd,
    /// Each answer comes later by this.
    pub(crate) delay: Duration,
    pub(crate) failures: Vec<Failure>,
    pub(crate) gone: Gone,
    /// Whether watches may begin with a list (`sendInitialEvents`); servers before 1.32 refuse by default.
    pub(crate) streaming_lists: bool,
    pub(crate) bookmark_every: Duration,
    /// Watches that have seen an earlier number send a bookmark at once.
    pub(crate) bookmark_epoch: u64,
}

impl Default for Faults {
    fn default() -> Faults {
        Faults {
            listening: true,
            hanging: false,
            connection_epoch: 0,
            watch_epoch: 0,
            watch_end: WatchEnd::Clean,
            delay: Duration::ZERO,
            failures: Vec::new(),
            gone: Gone::Event,
            streaming_lists: false,
            bookmark_every: Duration::from_mins(1),
            bookmark_epoch: 0,
        }
    }
}

impl Faults {
    /// The failure that a request with this verb gets, if any; counts it.
    pub(crate) fn take(&mut self, verb: Option<Verb>) -> Option<Failure> {
        let hits = |failure: &Failure| failure.verb.is_none() || failure.verb == verb;
        let at = self.failures.iter().position(hits)?;
        let failure = self.failures[at];
        if let Some(times) = &mut self.failures[at].times {
            *times -= 1;
            if *times == 0 {
                self.failures.remove(at);
            }
        }
        Some(failure)
    }
}
