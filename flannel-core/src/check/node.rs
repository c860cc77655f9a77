//! Kernel, privileges, settings, and the daemon itself.

use super::{Finding, Observations, agent, few};
use crate::{
    addr::Family,
    config::BackendKind,
    distribution::{Feature, Host, version},
    features::Ladder,
};

/// The oldest kernel on which the programs have been seen to work.
const OLDEST: (u32, u32) = (5, 10);
/// Seconds by which clocks of files may be ahead before anybody should care.
const AHEAD: u64 = 120;

/// What `--datapath` asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wants {
    /// eBPF where it can be.
    Auto,
    /// eBPF or nothing.
    Bpf,
    /// The kernel's device.
    Kernel,
}

/// Kernel, privileges and settings.
#[derive(Clone, Debug)]
pub struct Node {
    /// `uname -r`.
    pub kernel: String,
    /// The machine, as it looks to somebody who misses the module vxlan.
    pub host: Host,
    /// Whether `/sys/kernel/btf/vmlinux` exists.
    pub btf: bool,
    /// What the daemon, or else this process, may do.
    pub capabilities: Capabilities,
    /// What `--datapath` asks for.
    pub wants: Wants,
    /// Whether the kernel takes a trivial program.
    pub bpf: Result<(), String>,
    /// `/sys/fs/bpf`.
    pub bpffs: Bpffs,
    /// `tcx` or `clsact`.
    pub hooks: &'static str,
    /// vxlan devices.
    pub vxlan: Vxlan,
    /// `net.ipv4.ip_forward`.
    pub ip_forward: Option<bool>,
    /// `net.ipv6.conf.all.forwarding`.
    pub forwarding_v6: Option<bool>,
    /// `net.bridge.bridge-nf-call-iptables`; `None` without the module.
    pub bridge_nf: Option<bool>,
    /// Reverse path filters.
    pub reverse: Reverse,
    /// The time, and what it can be held against.
    pub clock: Clock,
    /// Programs that manage interfaces, and are running.
    pub managers: Vec<Manager>,
    /// What the agent has found out about its ways to carry packets; `None` before one has run.
    pub ladder: Option<Ladder>,
}

/// What a process may do.
#[derive(Clone, Debug)]
pub struct Capabilities {
    /// Whose they are: `the agent` or `this process`.
    pub whose: &'static str,
    /// CAP_NET_ADMIN.
    pub net_admin: bool,
    /// CAP_NET_RAW.
    pub net_raw: bool,
    /// Why eBPF is not permitted.
    pub missing_for_bpf: Option<String>,
}

/// The file system of pinned maps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Bpffs {
    /// It is there.
    Mounted,
    /// It is not, and the daemon may mount it.
    Mountable,
    /// It is not, and cannot be mounted.
    Missing(String),
}

/// Whether the kernel makes vxlan devices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Vxlan {
    /// It has made one.
    Works,
    /// The module is installed and not loaded, in this file.
    Loadable(String),
    /// It does not, and this is what it says.
    Refused(String),
    /// It could not be tried.
    Untried(String),
}

/// Reverse path filters.
#[derive(Clone, Debug, Default)]
pub struct Reverse {
    /// The kernel's effective setting for the uplink.
    pub uplink: Option<ReverseFilter>,
    /// The kernel's effective setting for the tunnel device.
    pub tunnel: Option<ReverseFilter>,
    /// Peers' addresses to which the way out is not the uplink, each with the interface that it is.
    pub elsewhere: Vec<String>,
}

/// The larger of `rp_filter` of an interface and of `all`: 0 off, 1 strict, 2 loose.
#[derive(Clone, Debug)]
pub struct ReverseFilter {
    /// Interface.
    pub interface: String,
    /// Setting.
    pub value: u8,
}

impl ReverseFilter {
    const fn is_strict(&self) -> bool {
        self.value == 1
    }
}

/// The time, in seconds since 1970.
#[derive(Clone, Debug, Default)]
pub struct Clock {
    /// Now.
    pub now: u64,
    /// The newest time stamp of files that were surely written before now, and which file.
    pub newest: Option<(u64, String)>,
}

/// A program that manages interfaces.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manager {
    /// `NetworkManager` or `systemd-networkd`.
    pub name: &'static str,
    /// Whether its configuration leaves flannel's devices alone.
    pub leaves_alone: bool,
}

pub(super) fn judge(seen: &Observations) -> Vec<Finding> {
    let node = &seen.node;
    vec![
        kernel(node),
        btf(node),
        capabilities(node),
        bpf(node),
        bpffs(node),
        hooks(node),
        vxlan(seen),
        rung(seen),
        ip_forward(seen),
        rp_filter(seen),
        br_netfilter(seen),
        clock(node),
        managers(seen),
        agent::judge(seen),
    ]
}

fn kernel(node: &Node) -> Finding {
    const NAME: &str = "kernel";
    match version(&node.kernel) {
        Some(version) if version < OLDEST => Finding::warn(
            NAME,
            format!(
                "{} is older than {}.{}, the oldest tried",
                node.kernel, OLDEST.0, OLDEST.1
            ),
            "install a newer kernel, or run with --datapath=kernel",
        ),
        _ => Finding::ok(NAME, node.kernel.clone()),
    }
}

fn btf(node: &Node) -> Finding {
    const NAME: &str = "btf";
    if node.btf {
        Finding::ok(NAME, "/sys/kernel/btf/vmlinux is there")
    } else if node.wants == Wants::Kernel {
        Finding::skip(NAME, "--datapath=kernel needs none")
    } else {
        Finding::warn(
            NAME,
            "/sys/kernel/btf/vmlinux is missing: tools cannot name what programs use",
            "take a kernel with CONFIG_DEBUG_INFO_BTF, or mount /sys into the container",
        )
    }
}

fn capabilities(node: &Node) -> Finding {
    const NAME: &str = "capabilities";
    let held = &node.capabilities;
    let whose = held.whose;
    if !held.net_admin {
        return Finding::fail(
            NAME,
            format!("{whose} has no CAP_NET_ADMIN: nothing can be configured"),
            "run as root, or add the capability NET_ADMIN to the container",
        );
    }
    match &held.missing_for_bpf {
        None => Finding::ok(
            NAME,
            format!("{whose} may configure the network and load eBPF"),
        ),
        Some(_) if node.wants == Wants::Kernel => Finding::ok(
            NAME,
            format!("{whose} may configure the network; --datapath=kernel needs no more"),
        ),
        Some(missing) => grade(
            node,
            NAME,
            format!("{whose}: {missing}"),
            "run privileged, or add the capabilities BPF, NET_ADMIN and PERFMON",
        ),
    }
}

/// What hinders eBPF ends in the kernel's device, unless eBPF alone is wanted.
fn grade(node: &Node, name: &'static str, found: String, fix: &str) -> Finding {
    match node.wants {
        Wants::Bpf => Finding::fail(name, found, format!("{fix}; or leave out --datapath=bpf")),
        Wants::Auto => Finding::warn(
            name,
            format!("{found}; the kernel's device carries the traffic"),
            fix,
        ),
        Wants::Kernel => Finding::skip(name, format!("{found}; --datapath=kernel needs none")),
    }
}

fn bpf(node: &Node) -> Finding {
    match &node.bpf {
        Ok(()) => Finding::ok("bpf", "the kernel loads programs"),
        Err(error) => grade(
            node,
            "bpf",
            format!("the kernel refuses programs: {error}"),
            "run privileged (capabilities BPF, NET_ADMIN, PERFMON; seccomp and AppArmor unconfined) on a kernel with CONFIG_BPF_SYSCALL",
        ),
    }
}

fn bpffs(node: &Node) -> Finding {
    const NAME: &str = "bpffs";
    match &node.bpffs {
        Bpffs::Mounted => Finding::ok(NAME, "mounted at /sys/fs/bpf"),
        Bpffs::Mountable => Finding::ok(NAME, "not mounted at /sys/fs/bpf: the agent mounts it"),
        Bpffs::Missing(why) => grade(
            node,
            NAME,
            format!("not mounted at /sys/fs/bpf: {why}"),
            "mount -t bpf bpf /sys/fs/bpf on the host, and hand it to the container with mountPropagation",
        ),
    }
}

fn hooks(node: &Node) -> Finding {
    match node.hooks {
        "tcx" => Finding::ok("hooks", "tcx"),
        other => Finding::ok(
            "hooks",
            format!("{other}: this kernel has no tcx (6.6 and newer)"),
        ),
    }
}

fn vxlan(seen: &Observations) -> Finding {
    const NAME: &str = "vxlan";
    let kind = seen.backend();
    if kind != BackendKind::Vxlan {
        return Finding::skip(NAME, format!("backend {kind} needs none"));
    }
    let node = &seen.node;
    match &node.vxlan {
        Vxlan::Works => Finding::ok(NAME, "the kernel makes vxlan devices"),
        Vxlan::Loadable(file) => Finding::ok(
            NAME,
            format!("the module is not loaded yet: the first device loads {file}"),
        ),
        Vxlan::Untried(why) => Finding::skip(NAME, format!("could not be tried: {why}")),
        Vxlan::Refused(error) => {
            let found = format!("the kernel makes no vxlan device: {error}");
            let fix = node.host.advice(Feature::Vxlan);
            if node.wants == Wants::Kernel || node.bpf.is_err() {
                Finding::fail(NAME, found, fix)
            } else {
                Finding::warn(
                    NAME,
                    format!("{found}; eBPF alone carries the traffic"),
                    fix,
                )
            }
        }
    }
}

fn rung(seen: &Observations) -> Finding {
    const NAME: &str = "rung";
    let kind = seen.backend();
    if !kind.has_fast_path() {
        return Finding::skip(NAME, format!("backend {kind}: eBPF carries nothing of it"));
    }
    let Some(ladder) = &seen.node.ladder else {
        return Finding::skip(
            NAME,
            "no agent has tried yet what this kernel can do: flannel-agent features does it now",
        );
    };
    let why_not = ladder.why_not.iter();
    let why_not: Vec<String> = why_not
        .filter(|(rung, why)| {
            ladder.rung.is_none_or(|here| **rung > here) && !why.starts_with("needs L")
        })
        .map(|(rung, why)| format!("not {rung}: {why}"))
        .collect();
    let why_not = why_not.join("; ");
    match ladder.rung {
        Some(rung) if why_not.is_empty() => Finding::ok(NAME, format!("{rung}, {}", rung.title())),
        Some(rung) => Finding::ok(NAME, format!("{rung}, {}; {why_not}", rung.title())),
        None => Finding::fail(
            NAME,
            format!("nothing can carry the overlay: {why_not}"),
            "install the module vxlan, or let the agent use eBPF",
        ),
    }
}

fn ip_forward(seen: &Observations) -> Finding {
    const NAME: &str = "ip-forward";
    let node = &seen.node;
    let both = [seen.overlay.family, Family::V6];
    let families = if seen.second.is_some() {
        &both[..]
    } else {
        &both[..1]
    };
    let mut said = Vec::new();
    for family in families {
        let (name, value) = match family {
            Family::V4 => ("net.ipv4.ip_forward", node.ip_forward),
            Family::V6 => ("net.ipv6.conf.all.forwarding", node.forwarding_v6),
        };
        match value {
            Some(true) => said.push(format!("{name} = 1")),
            Some(false) => {
                return Finding::fail(
                    NAME,
                    format!("{name} = 0: the host forwards nothing from and to pods"),
                    format!("sysctl -w {name}=1, and the same line in /etc/sysctl.d/"),
                );
            }
            None => {
                let path = name.replace('.', "/");
                return Finding::skip(NAME, format!("/proc/sys/{path} cannot be read"));
            }
        }
    }
    Finding::ok(NAME, said.join(", "))
}

fn rp_filter(seen: &Observations) -> Finding {
    const NAME: &str = "rp-filter";
    let reverse = &seen.node.reverse;
    let shown: Vec<String> = reverse
        .uplink
        .iter()
        .chain(&reverse.tunnel)
        .map(|filter| format!("{} {}", filter.interface, filter.value))
        .collect();
    if shown.is_empty() {
        return Finding::skip(NAME, "neither uplink nor tunnel device is known");
    }
    let shown = shown.join(", ");
    if let Some(uplink) = reverse.uplink.as_ref().filter(|uplink| uplink.is_strict())
        && !reverse.elsewhere.is_empty()
    {
        return Finding::warn(
            NAME,
            format!(
                "{shown}: {} is strict, and the way back does not lead through it: {}",
                uplink.interface,
                few(&reverse.elsewhere)
            ),
            format!(
                "sysctl -w net.ipv4.conf.{}.rp_filter=2 (and conf.all no higher than 2)",
                uplink.interface
            ),
        );
    }
    let direct = seen
        .store
        .conf()
        .is_some_and(|conf| conf.backend.vxlan.direct_routing);
    if let Some(tunnel) = reverse.tunnel.as_ref().filter(|tunnel| tunnel.is_strict())
        && direct
    {
        return Finding::warn(
            NAME,
            format!(
                "{shown}: {} is strict, and DirectRouting sends replies another way",
                tunnel.interface
            ),
            format!("sysctl -w net.ipv4.conf.{}.rp_filter=2", tunnel.interface),
        );
    }
    Finding::ok(
        NAME,
        format!(
            "{shown} (0 off, 1 strict, 2 loose): nothing comes from where it would not go back to"
        ),
    )
}

fn br_netfilter(seen: &Observations) -> Finding {
    const NAME: &str = "br-netfilter";
    let (tool, setting) = match seen.overlay.family {
        Family::V4 => ("iptables", "net.bridge.bridge-nf-call-iptables"),
        Family::V6 => ("ip6tables", "net.bridge.bridge-nf-call-ip6tables"),
    };
    let fix = format!("modprobe br_netfilter && sysctl -w {setting}=1");
    let kube_proxy = seen.rules.has_kube_proxy();
    match (seen.node.bridge_nf, kube_proxy) {
        (Some(true), _) => Finding::ok(NAME, format!("{setting} = 1")),
        (Some(false), true) => Finding::warn(
            NAME,
            format!(
                "{setting} = 0, and kube-proxy uses {tool}: pods reach no Service whose pod is on the same node"
            ),
            fix,
        ),
        (None, true) => Finding::warn(
            NAME,
            format!(
                "the module br_netfilter is not loaded, and kube-proxy uses {tool}: pods reach no Service whose pod is on the same node"
            ),
            fix,
        ),
        (Some(false), false) => Finding::ok(
            NAME,
            format!("off, and no {tool} rules of kube-proxy need it"),
        ),
        (None, false) => Finding::ok(
            NAME,
            format!("not loaded, and no {tool} rules of kube-proxy need it"),
        ),
    }
}

fn managers(seen: &Observations) -> Finding {
    const NAME: &str = "network-manager";
    let managers = &seen.node.managers;
    if managers.is_empty() {
        return Finding::ok(NAME, "neither NetworkManager nor systemd-networkd runs");
    }
    let meddling: Vec<&Manager> = managers.iter().filter(|one| !one.leaves_alone).collect();
    if meddling.is_empty() {
        let names = few(managers.iter().map(|one| one.name));
        return Finding::ok(NAME, format!("{names} leaves flannel's devices alone"));
    }
    let fixes: Vec<&str> = meddling
        .iter()
        .map(|manager| match manager.name {
            "NetworkManager" => {
                "write \"[keyfile]\" and \"unmanaged-devices=interface-name:flannel*;interface-name:cni*;interface-name:veth*\" to /etc/NetworkManager/conf.d/flannel.conf and run nmcli general reload"
            }
            _ => {
                "write \"[Match]\", \"OriginalName=flannel*\", \"[Link]\", \"MACAddressPolicy=none\" to /etc/systemd/network/10-flannel.link, and \"[Match]\", \"Name=flannel*\", \"[Link]\", \"Unmanaged=yes\" to 10-flannel.network"
            }
        })
        .collect();
    Finding::warn(
        NAME,
        format!(
            "{} runs and is not told to leave flannel's devices alone: it may change their MAC or remove routes (the agent puts them back)",
            few(meddling.iter().map(|one| one.name))
        ),
        fixes.join("; "),
    )
}

fn clock(node: &Node) -> Finding {
    const NAME: &str = "clock";
    let clock = &node.clock;
    match &clock.newest {
        Some((newest, file)) if *newest > clock.now.saturating_add(AHEAD) => Finding::warn(
            NAME,
            format!(
                "the clock is at least {} s behind: {file} was written later than now",
                newest - clock.now
            ),
            "set the clock, and have chrony or systemd-timesyncd keep it: TLS and leases depend on it",
        ),
        _ => Finding::ok(NAME, "no file that the agent uses is from the future"),
    }
}
