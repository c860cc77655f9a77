//! Native XDP on the uplink: where it is worth trying, and whether it does anything.

use std::fmt;

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

/// So many packets without one that XDP has stripped, and it does not run.
const ENOUGH: u64 = 64;
/// Looks that a judgement takes at least, so that packets under way at the first one do not count.
const LOOKS: u32 = 3;

/// What the programs have counted since they were loaded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sample {
    /// Packets that XDP has stripped.
    pub stripped: u64,
    /// Packets decapsulated in eBPF, stripped ones included.
    pub received: u64,
}

/// What a [`Trial`] has shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Too few packets so far.
    Open,
    /// It strips packets.
    Works,
    /// It does not: so many packets came and it stripped none.
    Idle(u64),
}

/// Finds out whether an attached program runs. A driver may take it and never run it: virtio_net does where it receives into big
/// buffers (no mergeable ones, guest segmentation on).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Trial {
    first: Option<Sample>,
    looks: u32,
    works: bool,
}

impl Trial {
    /// Takes in what is counted now.
    pub fn look(&mut self, now: Sample) -> Verdict {
        let first = *self.first.get_or_insert(now);
        self.looks = self.looks.saturating_add(1);
        self.works |= now.stripped != first.stripped;
        if self.works {
            return Verdict::Works;
        }
        match now.received.checked_sub(first.received) {
            // Somebody has emptied the map.
            None => {
                *self = Self::default();
                Verdict::Open
            }
            Some(came) if came >= ENOUGH && self.looks >= LOOKS => Verdict::Idle(came),
            Some(_) => Verdict::Open,
        }
    }

    /// Whether nothing more can come of it.
    pub const fn is_over(&self) -> bool {
        self.works
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(stripped: u64, received: u64) -> Sample {
        Sample { stripped, received }
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
        assert!(trial.is_over());
        assert_eq!(trial.look(sample(8, 5_000)), Verdict::Works);
    }

    #[test]
    fn many_packets_and_none_stripped_is_proof_too() {
        let mut trial = Trial::default();
        assert_eq!(trial.look(sample(7, 100)), Verdict::Open);
        assert_eq!(trial.look(sample(7, 163)), Verdict::Open);
        assert_eq!(trial.look(sample(7, 163)), Verdict::Open);
        assert_eq!(trial.look(sample(7, 164)), Verdict::Idle(64));
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
        assert_eq!(trial.look(sample(0, 100)), Verdict::Open);
        assert_eq!(trial.look(sample(0, 0)), Verdict::Open);
        assert_eq!(trial.look(sample(0, 50)), Verdict::Open);
        assert_eq!(trial.look(sample(0, 113)), Verdict::Open);
        assert_eq!(trial.look(sample(0, 114)), Verdict::Idle(64));
    }
}
