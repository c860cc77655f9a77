//! The ways from pod to pod that are compared.

use anyhow::{Context as _, bail};

use crate::cluster::Backend;

/// What carries the packets between the nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Path {
    /// Two pods, one cable.
    Direct,
    /// eBPF forwards, nothing encapsulates.
    NoOverlay,
    /// The kernel routes from node to node.
    HostGw,
    /// The kernel's vxlan device, programmed as flannel does.
    KernelVxlan,
    /// The agent, with `--datapath` and, for eBPF, `--bpf-fast-path`.
    Agent {
        /// `--datapath`.
        datapath: &'static str,
        /// `--bpf-fast-path`.
        fast_path: Option<&'static str>,
        /// Whether it is the agent to compare with, not the one built here.
        base: bool,
    },
    /// The program given with `--flanneld`.
    Flanneld,
}

/// Whether kube-proxy's and flannel's rules are there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rules {
    /// None, and no connection tracking.
    None,
    /// As many services as `--service-rules` says.
    Usual,
    /// [`MANY_SERVICES`] services.
    Many,
}

/// Services of the modes whose name ends in this number.
pub const MANY_SERVICES: u32 = 2000;

/// Ends the names of modes over IPv6 in a run that has both families.
pub const V6_SUFFIX: &str = "-v6";

/// One of the ways.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mode {
    /// The name that is reported.
    pub name: &'static str,
    /// What carries the packets.
    pub path: Path,
    /// Netfilter rules on the nodes.
    pub rules: Rules,
}

const fn agent(name: &'static str, fast_path: &'static str, rules: Rules, base: bool) -> Mode {
    Mode {
        name,
        path: Path::Agent {
            datapath: "bpf",
            fast_path: Some(fast_path),
            base,
        },
        rules,
    }
}

const fn kernel(name: &'static str, path: Path, rules: Rules) -> Mode {
    Mode { name, path, rules }
}

const AGENT_KERNEL: Path = Path::Agent {
    datapath: "kernel",
    fast_path: None,
    base: false,
};

/// All modes, in the order of tables.
pub const ALL: [Mode; 15] = [
    kernel("direct", Path::Direct, Rules::None),
    kernel("bpf-no-overlay", Path::NoOverlay, Rules::None),
    kernel("host-gw", Path::HostGw, Rules::None),
    kernel("host-gw-ct", Path::HostGw, Rules::Usual),
    kernel("kernel-vxlan", Path::KernelVxlan, Rules::None),
    kernel("kernel-vxlan-ct", Path::KernelVxlan, Rules::Usual),
    kernel("flanneld", Path::Flanneld, Rules::Usual),
    kernel("agent-kernel", AGENT_KERNEL, Rules::Usual),
    agent("agent-stack", "off", Rules::Usual, false),
    agent("agent-established", "established", Rules::Usual, false),
    agent("agent-syn", "syn", Rules::Usual, false),
    kernel("host-gw-ct-2000", Path::HostGw, Rules::Many),
    kernel("kernel-vxlan-ct-2000", Path::KernelVxlan, Rules::Many),
    agent("agent-established-2000", "established", Rules::Many, false),
    agent("agent-syn-2000", "syn", Rules::Many, false),
];

/// What `--guard` compares: the base, then the head, rung by rung.
pub const GUARD: [(Mode, Mode); 3] = [
    (
        agent("base-stack", "off", Rules::Usual, true),
        agent("agent-stack", "off", Rules::Usual, false),
    ),
    (
        agent("base-established", "established", Rules::Usual, true),
        agent("agent-established", "established", Rules::Usual, false),
    ),
    (
        agent("base-syn", "syn", Rules::Usual, true),
        agent("agent-syn", "syn", Rules::Usual, false),
    ),
];

impl Mode {
    /// Whether pods reach services here.
    pub fn has_services(&self) -> bool {
        self.rules != Rules::None
    }

    /// The same over IPv6, in a run that has both families.
    #[must_use]
    pub fn over_v6(self) -> Self {
        Self {
            // A few bytes per mode, for as long as the program runs: names are constants everywhere else.
            name: Box::leak(format!("{}{V6_SUFFIX}", self.name).into_boxed_str()),
            ..self
        }
    }

    /// Whether VXLAN is what it shows, whatever the agents' backend.
    pub fn is_of_vxlan(&self) -> bool {
        matches!(self.path, Path::KernelVxlan | Path::Flanneld)
    }
}

/// The modes to run: those named, or all that can run. `flanneld` needs a program.
pub fn select(
    names: &[String],
    backend: Backend,
    flanneld: bool,
    many: bool,
) -> anyhow::Result<Vec<Mode>> {
    if names.is_empty() {
        let wanted = |mode: &&Mode| {
            (backend == Backend::Vxlan || !mode.is_of_vxlan())
                && (flanneld || mode.path != Path::Flanneld)
                && (many || mode.rules != Rules::Many)
        };
        return Ok(ALL.iter().filter(wanted).copied().collect());
    }
    let mut chosen = Vec::new();
    for name in names {
        let mode = ALL.iter().find(|mode| mode.name == name);
        let known = || {
            let names: Vec<_> = ALL.iter().map(|mode| mode.name).collect();
            format!("no mode is named {name}; there are {}", names.join(", "))
        };
        let mode = *mode.with_context(known)?;
        if backend != Backend::Vxlan && mode.is_of_vxlan() {
            bail!(
                "mode {name} is one of vxlan: leave --backend {} out",
                backend.as_str()
            );
        }
        if mode.path == Path::Flanneld && !flanneld {
            bail!("mode flanneld needs --flanneld PATH");
        }
        if !chosen.contains(&mode) {
            chosen.push(mode);
        }
    }
    Ok(chosen)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_choice_all_run_that_can() {
        let names = |modes: Vec<Mode>| modes.iter().map(|mode| mode.name).collect::<Vec<_>>();
        assert_eq!(
            select(&[], Backend::Vxlan, true, true)
                .expect("modes")
                .len(),
            ALL.len()
        );
        let usual = names(select(&[], Backend::Vxlan, false, false).expect("modes"));
        assert_eq!(
            usual,
            [
                "direct",
                "bpf-no-overlay",
                "host-gw",
                "host-gw-ct",
                "kernel-vxlan",
                "kernel-vxlan-ct",
                "agent-kernel",
                "agent-stack",
                "agent-established",
                "agent-syn"
            ]
        );
    }

    #[test]
    fn names_are_checked() {
        let error =
            select(&["agent".to_owned()], Backend::Vxlan, false, false).expect_err("no such mode");
        assert!(error.to_string().contains("agent-syn"), "{error}");
        assert!(select(&["flanneld".to_owned()], Backend::Vxlan, false, false).is_err());
        let vxlan = ["kernel-vxlan".to_owned()];
        assert!(select(&vxlan, Backend::HostGw, false, false).is_err());
        let routed = select(&[], Backend::HostGw, true, true).expect("modes");
        assert!(routed.iter().all(|mode| !mode.is_of_vxlan()) && routed.len() == 11);
    }
}
