//! What the daemon leaves for `status` and `cleanup`: a small file beside `subnet.env`, written whenever it changes. It
//! describes choices (which uplink, which rung and why); what the kernel really has is read from the kernel.

mod bare;

use std::{
    collections::BTreeMap,
    fs, io,
    net::IpAddr,
    path::{Path, PathBuf},
};

use flannel_core::{
    addr::{Family, IfIndex, Vni, VtepMac},
    config::BackendKind,
    fastpath::Choice,
    features::{Course, Findings, Ladder, Wishes, climb},
    mark::Overlay,
    plan::{GateMode, Hook},
    xdp,
};
use ipnet::IpNet;
use serde::{Deserialize, Serialize};

pub(crate) use bare::{Bare, BareFile};

/// Name of the file, in the directory of `subnet.env`.
const FILE: &str = "flannel-agent.json";
/// The same for the overlay of IPv6 beside one of IPv4.
const SECOND_FILE: &str = "flannel-agent-v6.json";

/// The daemon's choices.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// Version of the agent that wrote it.
    pub version: String,
    /// Its process.
    pub pid: u32,
    /// Network identifier.
    pub vni: Vni,
    /// What it carries.
    #[serde(default = "v4")]
    pub family: Family,
    /// Whether it is the second overlay of this node.
    #[serde(skip)]
    pub second: bool,
    /// Name of the tunnel device.
    pub device: String,
    /// Name of the uplink.
    pub uplink: String,
    /// Index of the uplink.
    pub uplink_index: IfIndex,
    /// Address that other nodes send to.
    pub public_ip: IpAddr,
    /// MAC address of the tunnel device, as published.
    pub vtep_mac: VtepMac,
    /// The cluster network.
    pub network: IpNet,
    /// This node's subnet.
    pub subnet: Option<IpNet>,
    /// MTU of pods, in bytes.
    pub mtu: u32,
    /// The rung in use.
    pub datapath: Datapath,
    /// The lease store, without secrets.
    pub store: String,
    /// Whether changes in the store are being seen.
    pub store_connected: bool,
    /// What is wrong and needs a person.
    pub problems: Vec<String>,
    /// The file written for CNI plugins.
    pub subnet_file: PathBuf,
    /// Whether the blackhole route for the own subnet is of our making, if there is one.
    #[serde(default)]
    pub blackhole: bool,
    /// How the flow gate stands; `None` in the file of an agent that knew none.
    #[serde(default)]
    pub fast_path: Option<FastPath>,
}

/// How the flow gate stands, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FastPath {
    /// What is asked for.
    pub wanted: Choice,
    /// What is in force.
    pub mode: GateMode,
    /// Why it is this one.
    pub reason: String,
    /// Pods that stay with the host's stack.
    pub excluded: Vec<Excluded>,
    /// The kernel settings that matter, by name.
    pub sysctls: BTreeMap<String, Option<u32>>,
    /// What keeps the gate from working as it should.
    #[serde(default)]
    pub problems: Vec<String>,
}

/// A pod that stays with the host's stack.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Excluded {
    /// The host's end of its veth pair.
    pub interface: String,
    /// Why.
    pub reason: String,
}

/// Which way packets go, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Datapath {
    /// `bpf` or `kernel`.
    pub mode: Mode,
    /// Why it is this one.
    pub reason: String,
    /// `vxlan` or `veth`; `none` where packets are routed to all peers.
    pub device: String,
    /// `tcx` or `clsact`; `None` without eBPF.
    pub attach: Option<String>,
    /// How native XDP stands; `None` in the file of an agent that knew none.
    #[serde(default)]
    pub xdp: Option<Xdp>,
}

/// Whether native XDP is in use, and why or why not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Xdp {
    /// What is asked for.
    pub wanted: xdp::Choice,
    /// What has come of it.
    #[serde(default)]
    pub standing: xdp::Standing,
    /// Why it is as it is.
    pub reason: String,
}

/// The rung.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// eBPF around the host stack.
    Bpf,
    /// The kernel's device alone.
    Kernel,
}

impl Mode {
    /// For logs and tables.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Bpf => "bpf",
            Self::Kernel => "kernel",
        }
    }
}

const fn v4() -> Family {
    Family::V4
}

impl State {
    /// Where the state of the agent with this `subnet.env` is: of its only overlay, or that of IPv4.
    pub fn path(subnet_file: &Path) -> PathBuf {
        subnet_file.with_file_name(FILE)
    }

    /// The same of the overlay of IPv6 beside that.
    pub fn second_path(subnet_file: &Path) -> PathBuf {
        subnet_file.with_file_name(SECOND_FILE)
    }

    /// Where this one is.
    pub fn own_path(&self) -> PathBuf {
        if self.second {
            Self::second_path(&self.subnet_file)
        } else {
            Self::path(&self.subnet_file)
        }
    }

    /// The overlay.
    pub const fn overlay(&self) -> Overlay {
        let (family, vni) = (self.family, self.vni);
        Overlay { family, vni }
    }

    /// Whether it has a tunnel device. Without one all peers are routed to.
    pub fn is_tunnelled(&self) -> bool {
        self.datapath.device != "none"
    }

    /// The backend.
    pub fn backend(&self) -> BackendKind {
        if self.is_tunnelled() {
            BackendKind::Vxlan
        } else {
            BackendKind::HostGw
        }
    }

    /// The hooks that must have a program for eBPF to carry packets both ways.
    pub fn base_hooks(&self) -> &'static [Hook] {
        let gated = |fast: &FastPath| fast.mode != GateMode::Off;
        if self.datapath.mode != Mode::Bpf {
            &[]
        } else if self.is_tunnelled() {
            &Hook::BASE
        } else if self.fast_path.as_ref().is_some_and(gated) {
            &[Hook::FromWire]
        } else {
            &[]
        }
    }

    /// Reads it; `None` if there is none. One that does not parse is of another version: as good as none.
    pub fn read(subnet_file: &Path) -> io::Result<Option<Self>> {
        Self::read_at(&Self::path(subnet_file))
    }

    /// The same of the overlay of IPv6 beside one of IPv4.
    pub fn read_second(subnet_file: &Path) -> io::Result<Option<Self>> {
        let read = Self::read_at(&Self::second_path(subnet_file))?;
        Ok(read.map(|state| Self {
            second: true,
            ..state
        }))
    }

    fn read_at(path: &Path) -> io::Result<Option<Self>> {
        match fs::read_to_string(path) {
            Ok(text) => Ok(serde_json::from_str(&text).ok()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The rung, and why no other, from what the kernel can do and what came of it. `strips` is whether native XDP is attached and has
    /// stripped packets.
    pub fn ladder(&self, findings: &Findings, strips: bool) -> Ladder {
        let (path, gate) = (&self.datapath, self.fast_path.as_ref());
        let xdp = path.xdp.as_ref();
        let wishes = Wishes {
            fast_path: gate.map_or(Choice::Auto, |gate| gate.wanted),
            xdp: xdp.map_or(xdp::Choice::Auto, |xdp| xdp.wanted),
            ..Wishes::default()
        };
        let course = Course {
            no_kernel: (path.device == "veth").then(|| "a veth pair is the device".into()),
            no_bpf: (path.mode == Mode::Kernel).then(|| path.reason.clone()),
            gate: gate.map(|gate| (gate.mode, gate.reason.clone())),
            xdp: xdp.map(|xdp| {
                if strips {
                    Ok(())
                } else {
                    Err(xdp.reason.clone())
                }
            }),
        };
        climb(findings, &wishes, &course)
    }

    /// Whether the process that wrote it still runs.
    pub fn is_running(&self) -> bool {
        is_agent(self.pid)
    }
}

/// Whether a process is an agent, and not this one.
fn is_agent(pid: u32) -> bool {
    // The name guards against a process number that was used again. In a manifest of flannel's the program has flannel's name.
    // In a container of its own a command may have the number that the agent had in its container.
    pid != std::process::id()
        && fs::read_to_string(format!("/proc/{pid}/comm"))
            .is_ok_and(|comm| comm.starts_with("flannel"))
}
