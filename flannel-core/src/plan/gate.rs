//! How the flow gate stands, and the hooks.

use std::fmt;

use flannel_common::flow::mode;
use serde::{Deserialize, Serialize};

/// Where a program is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Hook {
    /// Egress of the tunnel device.
    ToOverlay,
    /// Ingress of the uplink.
    FromWire,
    /// Ingress of the tunnel device; attached while the gate is not off.
    FromOverlay,
    /// Ingress of the host's end of a pod's veth pair; one for each pod veth while the gate is not off.
    FromPod,
    /// Egress of the host's end of a pod's veth pair; as [`Hook::FromPod`].
    ToPod,
    /// Egress of the uplink; attached while the gate is not off and there are peers to which packets are routed without a tunnel.
    ToLink,
}

impl Hook {
    /// Every hook.
    pub const ALL: [Self; 6] = [
        Self::ToOverlay,
        Self::FromWire,
        Self::FromOverlay,
        Self::FromPod,
        Self::ToPod,
        Self::ToLink,
    ];
    /// The hooks that have a program whatever the gate's mode, where there is a tunnel.
    pub const BASE: [Self; 2] = [Self::ToOverlay, Self::FromWire];
    /// The hooks of every pod veth.
    pub const POD: [Self; 2] = [Self::FromPod, Self::ToPod];

    /// Name of the program, and of the pinned link, which for the hooks of pods goes on with the interface's index.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::ToOverlay => "to_overlay",
            Self::FromWire => "from_wire",
            Self::FromOverlay => "from_overlay",
            Self::FromPod => "from_pod",
            Self::ToPod => "to_pod",
            Self::ToLink => "to_link",
        }
    }

    /// Whether there is one of it on every pod veth.
    pub const fn is_per_pod(self) -> bool {
        matches!(self, Self::FromPod | Self::ToPod)
    }

    /// Whether it sees what comes from the interface, not what goes out through it.
    pub const fn is_ingress(self) -> bool {
        matches!(self, Self::FromWire | Self::FromOverlay | Self::FromPod)
    }
}

impl fmt::Display for Hook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Which packets between pods may bypass the host stack.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GateMode {
    /// None.
    #[default]
    Off,
    /// Those of flows that the stack was seen to pass untouched.
    Established,
    /// Those too, and TCP connections from their first SYN.
    Syn,
}

impl GateMode {
    /// For logs and `status`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Established => "established",
            Self::Syn => "syn",
        }
    }

    /// The value in the map `config`.
    pub const fn raw(self) -> u32 {
        match self {
            Self::Off => mode::OFF,
            Self::Established => mode::ESTABLISHED,
            Self::Syn => mode::SYN,
        }
    }

    /// Reads a value of the map `config` back.
    pub const fn from_raw(raw: u32) -> Option<Self> {
        match raw {
            mode::OFF => Some(Self::Off),
            mode::ESTABLISHED => Some(Self::Established),
            mode::SYN => Some(Self::Syn),
            _ => None,
        }
    }
}

impl fmt::Display for GateMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// How the flow gate stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gate {
    /// Which packets it lets pass.
    pub mode: GateMode,
    /// What was learnt in another epoch counts for nothing.
    pub epoch: u32,
    /// How long a flow may bypass the stack after the stack has passed one of its packets, in milliseconds.
    pub lease_ms: u32,
}

impl Gate {
    /// Whether nothing may bypass the stack.
    pub fn is_off(&self) -> bool {
        self.mode == GateMode::Off
    }

    /// Whether nobody has set it.
    pub(super) fn is_unset(&self) -> bool {
        *self == Self::default()
    }
}
