//! What can go wrong with eBPF, in words.

use std::{
    error::Error as StdError,
    fs, io,
    net::IpAddr,
    path::{Path, PathBuf},
};

use aya::{EbpfError, maps::MapError, programs::ProgramError};
use flannel_core::{plan::Hook, xdp};
use thiserror::Error;

use crate::files;

/// An eBPF operation that failed.
#[derive(Debug, Error)]
pub enum BpfError {
    /// The kernel would not take the object.
    #[error("load {what}{}", advice(source))]
    Load {
        /// What was loaded.
        what: String,
        /// Why not.
        #[source]
        source: Box<EbpfError>,
    },
    /// A program could not be loaded, attached or run.
    #[error("{verb} program {name}{}", advice(source))]
    Program {
        /// What was attempted.
        verb: &'static str,
        /// Which program.
        name: String,
        /// Why not.
        #[source]
        source: Box<ProgramError>,
    },
    /// The verifier would not take a program.
    #[error("the verifier refuses program {program}: {said}{}", where_kept(kept.as_deref()))]
    Refused {
        /// Which program.
        program: String,
        /// The verifier's last word.
        said: String,
        /// All that it said.
        log: String,
        /// The file that has it.
        kept: Option<PathBuf>,
        /// The errno.
        #[source]
        source: io::Error,
    },
    /// A map could not be read.
    #[error("read entry {index} of map {map}")]
    Read {
        /// Which map.
        map: String,
        /// Which entry.
        index: u32,
        /// Why not.
        #[source]
        source: Box<MapError>,
    },
    /// A map could not be written.
    #[error("write entry {index} of map {map}")]
    Write {
        /// Which map.
        map: String,
        /// Which entry.
        index: u32,
        /// Why not.
        #[source]
        source: Box<MapError>,
    },
    /// An entry of the map of pods.
    #[error("{verb} entry {address} of map pods")]
    Pod {
        /// What was attempted.
        verb: &'static str,
        /// The pod's address.
        address: IpAddr,
        /// Why not.
        #[source]
        source: Box<MapError>,
    },
    /// A plan for the other address family.
    #[error("write {what} of {address}: the maps are of the other address family")]
    Foreign {
        /// What was to be written.
        what: &'static str,
        /// An address of it.
        address: IpAddr,
    },
    /// The embedded object lacks something.
    #[error("the embedded eBPF object has no {0}")]
    Missing(String),
    /// A file of the bpf file system.
    #[error("{verb} {}{}", path.display(), advice(source))]
    Pin {
        /// What was attempted.
        verb: &'static str,
        /// Which file or directory.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A tc filter or qdisc.
    #[error("{what}: {reason}")]
    Tc {
        /// What was attempted.
        what: String,
        /// Why not.
        reason: String,
    },
    /// A driver or the kernel that refuses native XDP.
    #[error("attach native XDP to {interface}{}", xdp_advice(source))]
    Xdp {
        /// Name of the interface.
        interface: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The kernel cannot make header room the way the programs need it.
    #[error(
        "bpf_skb_adjust_room refuses every set of flags (errno {0}): this kernel cannot encapsulate in eBPF"
    )]
    NoRoom(i32),
}

impl BpfError {
    pub(super) fn load(what: &str, source: EbpfError) -> Self {
        Self::Load {
            what: what.to_owned(),
            source: Box::new(source),
        }
    }

    pub(super) fn program(verb: &'static str, name: &str, source: ProgramError) -> Self {
        match source {
            ProgramError::LoadError {
                io_error,
                verifier_log,
            } if last_word(&verifier_log.to_string()).is_some() => {
                let log = verifier_log.to_string();
                Self::Refused {
                    program: name.to_owned(),
                    said: last_word(&log).unwrap_or_default().to_owned(),
                    log,
                    kept: None,
                    source: io_error,
                }
            }
            source => Self::Program {
                verb,
                name: name.to_owned(),
                source: Box::new(source),
            },
        }
    }

    /// Keeps what the verifier said in a file of that directory, and says so from now on. Any other error is as it was.
    pub(super) fn kept_in(mut self, dir: Option<&Path>) -> Self {
        if let (
            Some(dir),
            Self::Refused {
                program, log, kept, ..
            },
        ) = (dir, &mut self)
        {
            let path = log_file(dir, program);
            match files::replace(&path, log) {
                Ok(()) => *kept = Some(path),
                Err(error) => tracing::warn!(%error, "keep what the verifier said"),
            }
        }
        self
    }

    pub(super) fn read(map: &str, index: u32, source: MapError) -> Self {
        Self::Read {
            map: map.to_owned(),
            index,
            source: Box::new(source),
        }
    }

    pub(super) fn write(map: &str, index: u32, source: MapError) -> Self {
        Self::Write {
            map: map.to_owned(),
            index,
            source: Box::new(source),
        }
    }

    pub(super) fn pod(verb: &'static str, address: IpAddr, source: MapError) -> Self {
        Self::Pod {
            verb,
            address,
            source: Box::new(source),
        }
    }

    /// The errno at the bottom, if there is one.
    pub fn errno(&self) -> Option<i32> {
        errno(self)
    }
}

/// The file in which a program's refusal is kept.
fn log_file(dir: &Path, program: &str) -> PathBuf {
    dir.join(format!("flannel-verifier-{program}.log"))
}

/// The files in a directory that have a program's refusal.
pub(crate) fn kept_logs(dir: &Path) -> Vec<PathBuf> {
    let programs = Hook::ALL.iter().map(|hook| hook.as_str());
    programs
        .chain(super::xdp::PROGRAMS)
        .chain([super::probe::PROGRAM])
        .map(|program| log_file(dir, program))
        .filter(|file| file.exists())
        .collect()
}

/// Removes what is kept of an earlier start's refusals.
pub(super) fn forget_logs(dir: &Path) {
    for file in kept_logs(dir) {
        if let Err(error) = fs::remove_file(&file) {
            tracing::debug!(file = %file.display(), %error, "remove an old log of the verifier");
        }
    }
}

/// How the lines begin that end every log, whatever came of it.
const STATISTICS: [&str; 3] = ["processed ", "stack depth ", "verification time "];

/// The last line of a verifier's log that says something about the program.
pub(crate) fn last_word(log: &str) -> Option<&str> {
    log.lines()
        .rev()
        .map(str::trim)
        .find(|line| !line.is_empty() && !STATISTICS.iter().any(|begin| line.starts_with(begin)))
}

fn where_kept(kept: Option<&Path>) -> String {
    kept.map_or_else(String::new, |file| {
        format!(" (all that it said is in {})", file.display())
    })
}

/// Walks down to the operating system's error.
pub(super) fn errno(error: &(dyn StdError + 'static)) -> Option<i32> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(io) = error.downcast_ref::<io::Error>() {
            return io.raw_os_error();
        }
        next = error.source();
    }
    None
}

/// What helps with XDP.
fn xdp_advice(source: &io::Error) -> String {
    let advice = source.raw_os_error().and_then(xdp::advice);
    advice.map_or_else(String::new, |advice| format!(" ({advice})"))
}

/// What usually helps.
fn advice(source: &(dyn StdError + 'static)) -> &'static str {
    match errno(source) {
        Some(libc::EPERM) => {
            " (eBPF needs CAP_BPF and CAP_NET_ADMIN, or CAP_SYS_ADMIN: run privileged)"
        }
        Some(libc::ENOSYS) => " (this kernel was built without eBPF)",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_word_is_not_the_statistics() {
        let log = "func#0 @0\n0: R1=ctx() R10=fp0\n; x @ main.rs:1\n0: (79) r0 = *(u64 *)(r0 +0)\nR0 !read_ok\n\
                   verification time 74 usec\nstack depth 0+0\nprocessed 1 insns (limit 1000000) max_states_per_insn 0\n";
        assert_eq!(last_word(log), Some("R0 !read_ok"));
        assert_eq!(last_word("processed 0 insns\n\n"), None);
        assert_eq!(last_word(""), None);
    }
}
