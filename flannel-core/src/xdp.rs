//! Native XDP on the uplink: where it is worth trying, and whether it does anything.

use std::{fmt, time::Duration};

use serde::{Deserialize, Serialize};

/// What `--bpf-xdp` asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Choice {
    /// On hardware whose driver takes it.
    #[default]
    Auto,
    /// Never.
    Off,
    /// Wherever the driver takes it.
    Native,
}

impl Choice {
    /// The word on the command line.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Off => "off",
            Self::Native => "native",
        }
    }
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Whether to try it on an uplink, and why not. `kind` is the kernel's word for what the interface is (`IFLA_INFO_KIND`), which
/// hardware does not have.
pub fn decide(choice: Choice, kind: Option<&str>) -> Result<(), String> {
    match (choice, kind) {
        (Choice::Off, _) => Err("switched off".into()),
        (Choice::Auto, Some(kind)) => Err(format!(
            "the uplink is a {kind} device: native XDP pays on hardware alone"
        )),
        (Choice::Auto, None) | (Choice::Native, _) => Ok(()),
    }
}

/// Why a driver or the kernel refuses, by errno, and what helps; `None` where the error says all there is to say.
pub const fn advice(errno: i32) -> Option<&'static str> {
    // Numbers of `asm-generic/errno.h`: this crate knows no libc.
    match errno {
        // EBUSY, EEXIST
        16 | 17 => {
            Some("another XDP program is on the interface: remove it, or leave it with that")
        }
        // EINVAL, ERANGE
        22 | 34 => Some("the interface's MTU or queues are more than the driver takes with XDP"),
        // EOPNOTSUPP
        95 => Some(
            "the driver has no native XDP, or not with the features that are on (virtio_net: switch guest offloads off on the host)",
        ),
        _ => None,
    }
}

/// So many packets that came past XDP without one that it has stripped, and it does not run. What GRO has merged counts once, so a
/// stream of a megabyte may be no more than forty.
const ENOUGH: u64 = 16;
/// Looks that a judgement takes at least, so that packets under way at the first one do not count.
const LOOKS: u32 = 3;
/// How long an interface that has shown to be of no use is left alone. Drivers change their mind only when somebody changes their
/// settings, and every attempt resets some of them.
pub const LEFT_ALONE: Duration = Duration::from_hours(24);

/// How native XDP stands on the uplink.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Standing {
    /// Not wanted, or not worth it here.
    #[default]
    Off,
    /// The driver or the kernel does not take the program.
    Refused,
    /// The driver takes it; no packet has shown yet that it runs.
    Unproven,
    /// It strips packets.
    Works,
    /// The driver takes it and does not run it.
    Idle,
}

impl Standing {
    /// In the order of what comes after what.
    pub const ALL: [Self; 5] = [
        Self::Off,
        Self::Refused,
        Self::Unproven,
        Self::Works,
        Self::Idle,
    ];

    /// The metric label.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Refused => "refused",
            Self::Unproven => "unproven",
            Self::Works => "works",
            Self::Idle => "idle",
        }
    }
}

/// What the programs have counted since they were loaded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sample {
    /// Packets that XDP has stripped.
    pub stripped: u64,
    /// Packets that it should have stripped, and that came whole. Others than those prove nothing: a peer's with UDP checksums, say.
    pub missed: u64,
}

/// What a [`Trial`] has shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Too few packets so far.
    Open,
    /// It strips packets, or did when there were any last.
    Works,
    /// It does not: so many packets came past it and it stripped none.
    Idle(u64),
}

/// Finds out whether an attached program runs. A driver may take it and never run it: virtio_net does where it receives into big
/// buffers (no mergeable ones, guest segmentation on). It may also cease to, so the trial has no end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Trial {
    /// When a packet was stripped last, or the trial began.
    first: Option<Sample>,
    looks: u32,
    works: bool,
}

impl Trial {
    /// Takes in what is counted now.
    pub fn look(&mut self, now: Sample) -> Verdict {
        let first = *self.first.get_or_insert(now);
        self.looks = self.looks.saturating_add(1);
        let missed = match (
            now.stripped.checked_sub(first.stripped),
            now.missed.checked_sub(first.missed),
        ) {
            (Some(0), Some(missed)) => missed,
            (Some(_), Some(_)) => {
                *self = Self {
                    first: Some(now),
                    looks: 1,
                    works: true,
                };
                0
            }
            // Somebody has emptied the map.
            _ => {
                *self = Self {
                    works: self.works,
                    ..Self::default()
                };
                0
            }
        };
        if missed >= ENOUGH && self.looks >= LOOKS {
            return Verdict::Idle(missed);
        }
        if self.works {
            Verdict::Works
        } else {
            Verdict::Open
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(stripped: u64, missed: u64) -> Sample {
        Sample { stripped, missed }
    }

    #[test]
    fn auto_is_for_hardware() {
        for kind in ["veth", "bridge", "bond", "vlan", "tun", "macvlan"] {
            let reason = decide(Choice::Auto, Some(kind)).unwrap_err();
            assert!(reason.contains(kind), "{reason}");
            assert_eq!(decide(Choice::Native, Some(kind)), Ok(()));
            assert!(decide(Choice::Off, Some(kind)).is_err());
        }
        assert_eq!(decide(Choice::Auto, None), Ok(()));
        assert_eq!(decide(Choice::Native, None), Ok(()));
        assert!(decide(Choice::Off, None).is_err());
    }

    #[test]
    fn the_first_stripped_packet_is_proof() {
        let mut trial = Trial::default();
        assert_eq!(trial.look(sample(7, 100)), Verdict::Open);
        assert_eq!(trial.look(sample(7, 130)), Verdict::Open);
        assert_eq!(trial.look(sample(8, 500)), Verdict::Works);
        for _ in 0..1_000 {
            assert_eq!(trial.look(sample(8, 500)), Verdict::Works);
        }
    }

    #[test]
    fn many_packets_and_none_stripped_is_proof_too() {
        let mut trial = Trial::default();
        assert_eq!(trial.look(sample(7, 100)), Verdict::Open);
        assert_eq!(trial.look(sample(7, 115)), Verdict::Open);
        assert_eq!(trial.look(sample(7, 115)), Verdict::Open);
        assert_eq!(trial.look(sample(7, 116)), Verdict::Idle(16));
    }

    #[test]
    fn what_has_worked_may_cease_to() {
        let mut trial = Trial::default();
        trial.look(sample(0, 0));
        assert_eq!(trial.look(sample(900, 0)), Verdict::Works);
        // A queue that strips and one that does not: it is of use.
        for round in 1..100 {
            assert_eq!(trial.look(sample(900 + round, 500 * round)), Verdict::Works);
        }
        assert_eq!(trial.look(sample(999, 49_600)), Verdict::Works);
        assert_eq!(trial.look(sample(999, 49_600)), Verdict::Idle(100));
    }

    #[test]
    fn one_burst_between_two_looks_is_not() {
        let mut trial = Trial::default();
        assert_eq!(trial.look(sample(0, 0)), Verdict::Open);
        assert_eq!(trial.look(sample(0, 10_000)), Verdict::Open);
        assert_eq!(trial.look(sample(0, 10_000)), Verdict::Idle(10_000));
    }

    #[test]
    fn silence_proves_nothing() {
        let mut trial = Trial::default();
        for _ in 0..1_000 {
            assert_eq!(trial.look(sample(3, 9)), Verdict::Open);
        }
    }

    #[test]
    fn counters_that_fall_begin_anew() {
        let mut trial = Trial::default();
        assert_eq!(trial.look(sample(5, 100)), Verdict::Open);
        assert_eq!(trial.look(sample(0, 0)), Verdict::Open);
        assert_eq!(trial.look(sample(0, 5)), Verdict::Open);
        assert_eq!(trial.look(sample(0, 20)), Verdict::Open);
        assert_eq!(trial.look(sample(0, 21)), Verdict::Idle(16));
    }
}
