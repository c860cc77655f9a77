//! Choices about eBPF.

use clap::ValueEnum;
use flannel_core::{fastpath::Choice, xdp};

/// `--datapath`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DatapathChoice {
    /// eBPF where it is possible and permitted, else the kernel's vxlan device.
    Auto,
    /// eBPF, or exit with code 4.
    Bpf,
    /// The kernel's vxlan device alone.
    Kernel,
}

/// `--bpf-device`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DeviceChoice {
    /// A vxlan device, or a veth pair where the kernel has no vxlan.
    Auto,
    /// A vxlan device, or exit with code 4.
    Vxlan,
    /// A veth pair: eBPF carries everything.
    Veth,
}

/// `--bpf-attach`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum AttachChoice {
    /// With tcx where the kernel has it (6.6 and later), else with clsact.
    Auto,
    /// As tcx links.
    Tcx,
    /// As filters of a clsact qdisc.
    Clsact,
}

/// `--bpf-xdp`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum XdpChoice {
    /// On hardware whose driver takes it.
    Auto,
    /// Never.
    Off,
    /// Wherever the driver takes it, also on veth and other devices made of software.
    Native,
}

impl From<XdpChoice> for xdp::Choice {
    fn from(choice: XdpChoice) -> Self {
        match choice {
            XdpChoice::Auto => Self::Auto,
            XdpChoice::Off => Self::Off,
            XdpChoice::Native => Self::Native,
        }
    }
}

/// `--bpf-fast-path`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum FastPathChoice {
    /// Established where it can be kept correct, else off.
    Auto,
    /// None: every packet passes the stack.
    Off,
    /// Those of flows that the stack has passed untouched, again and again.
    Established,
    /// Those too, and TCP connections from their first packet, where nothing on the node filters pod traffic.
    Syn,
}

impl From<FastPathChoice> for Choice {
    fn from(choice: FastPathChoice) -> Self {
        match choice {
            FastPathChoice::Auto => Self::Auto,
            FastPathChoice::Off => Self::Off,
            FastPathChoice::Established => Self::Established,
            FastPathChoice::Syn => Self::Syn,
        }
    }
}
