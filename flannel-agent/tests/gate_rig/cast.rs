//! Who takes part: pods, Services, and the rungs of the fast path.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use flannel_common::flow::mode;
use flannel_testkit::Family;

/// A rung of the fast path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Mode {
    Off,
    Established,
    Syn,
    /// As the agent decides, which is [`Mode::Established`] unless something on the node speaks against it.
    Auto,
}

impl Mode {
    /// Those that do not depend on the node.
    pub(crate) const ALL: [Mode; 3] = [Mode::Off, Mode::Established, Mode::Syn];

    pub(crate) fn flag(self) -> &'static str {
        match self {
            Mode::Off => "--bpf-fast-path=off",
            Mode::Established => "--bpf-fast-path=established",
            Mode::Syn => "--bpf-fast-path=syn",
            Mode::Auto => "--bpf-fast-path=auto",
        }
    }

    pub(super) fn raw(self) -> u32 {
        match self {
            Mode::Off => mode::OFF,
            Mode::Established | Mode::Auto => mode::ESTABLISHED,
            Mode::Syn => mode::SYN,
        }
    }
}

/// A pod of the rig.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Who {
    A,
    A2,
    B,
    B2,
    C,
}

impl Who {
    pub(crate) const ALL: [Who; 5] = [Who::A, Who::A2, Who::B, Who::B2, Who::C];

    pub(crate) fn node(self) -> usize {
        match self {
            Who::A | Who::A2 => 0,
            Who::B | Who::B2 => 1,
            Who::C => 2,
        }
    }
}

/// The services, each with its own cluster address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Vip {
    /// Backed by `B`.
    Remote,
    /// Backed by `A2`.
    Local,
    /// Backed by `A`.
    Own,
    /// Backed by `A2`, `B` and `C`.
    Random,
    /// UDP, backed by `B` and `C`.
    Dns,
    /// UDP, backed by `B`.
    RemoteUdp,
    /// With [`super::NODE_PORT`], backed by `B`.
    NodePort,
    /// With [`super::LOCAL_NODE_PORT`], backed by `B`.
    LocalNodePort,
    /// With session affinity, backed by `A2`, `B` and `C`.
    Sticky,
}

impl Vip {
    pub(super) fn address(self, family: Family) -> SocketAddr {
        let (host, port) = match self {
            Vip::Remote => (10, 80),
            Vip::Local => (11, 80),
            Vip::Own => (12, 80),
            Vip::Random => (13, 80),
            Vip::Dns => (14, 53),
            Vip::RemoteUdp => (15, 53),
            Vip::NodePort => (16, 80),
            Vip::LocalNodePort => (17, 80),
            Vip::Sticky => (18, 80),
        };
        let ip: IpAddr = match family {
            Family::V4 => Ipv4Addr::new(10, 96, 0, host).into(),
            Family::V6 => Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, host.into()).into(),
        };
        SocketAddr::new(ip, port)
    }
}
