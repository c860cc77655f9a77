//! Choosing the rung: what the flags ask for, what this process may do, what this kernel can.

use flannel_core::{
    addr::{Family, IfIndex, Vni},
    check::Wants,
    config::NetConf,
    distribution::{self, Refusal},
    features::{Attach, Course, Feature, Findings, Rung as Step, Wishes, climb},
    iface::Uplink,
    mark::Overlay,
    plan::{Gate, Hook, Settings},
};
use ipnet::IpNet;

use crate::{
    app::StartError,
    cli::{Args, AttachChoice, DatapathChoice},
    dataplane::{
        bpf::{self, AttachMode, Bpf, BpfError, Instance, LoadOptions},
        netlink::Netlink,
    },
    features, kernel_modules,
    preflight::Capabilities,
    state::{Mode, State},
    telemetry::chain,
};

/// The largest number of subnets that gets a dense array: a /8 of /24.
const MAX_SUBNETS: u32 = 1 << 20;
/// Fewer flows are not worth the programs.
const FEWEST_FLOWS: u32 = 1 << 10;

/// The eBPF half, or why there is none.
#[derive(Debug)]
pub(crate) enum Rung {
    /// Programs are loaded, not yet attached.
    Bpf(Box<Bpf>),
    /// The kernel's device does the work.
    Kernel(String),
}

/// Loads the eBPF half where the flags, the privileges and the kernel allow it. With `--datapath=auto` every obstacle ends in the
/// kernel's device; with `bpf` it is an error.
pub(crate) fn choose(
    args: &Args,
    conf: &NetConf,
    family: Family,
    ethernet: bool,
) -> Result<Rung, StartError> {
    const KERNEL: &str = "--datapath=kernel";
    let kernel = args.datapath == DatapathChoice::Kernel;
    let findings = features::at_start(&args.subnet_file, kernel.then_some(KERNEL));
    if kernel {
        return Ok(Rung::Kernel(KERNEL.into()));
    }
    let obstacle =
        match obstacle(conf, family, ethernet).or_else(|| impossible(args, conf, &findings)) {
            Some(reason) => reason,
            None => match load(args, conf, family, &findings) {
                Ok(bpf) => return Ok(Rung::Bpf(Box::new(bpf))),
                Err(error) => format!("eBPF cannot be used: {}", explain(&error)),
            },
        };
    if args.datapath == DatapathChoice::Bpf {
        return Err(StartError::NoBpf {
            flag: "--datapath=bpf",
            reason: obstacle,
        });
    }
    Ok(Rung::Kernel(obstacle))
}

/// The settings that the programs of a loaded eBPF half need.
pub(crate) fn settings(
    bpf: &Bpf,
    conf: &NetConf,
    uplink: &Uplink,
    alone: bool,
) -> Option<Settings> {
    let family = bpf.family();
    let (network, subnet_len) = conf.range(family)?;
    let (min, max) = local_port_range();
    let room = bpf.room();
    Some(Settings {
        network,
        subnet_len,
        vni: conf.backend.vxlan.vni.get(),
        port: conf.backend.vxlan.port,
        local: uplink.local(family)?,
        uplink: uplink.index,
        source_port_min: min,
        source_port_span: bpf.port_span(max.saturating_sub(min)),
        encap_flags: room.encap,
        decap_flags: room.decap,
        alone,
        // Alone there is nobody to leave super-packets to: stale tunnel state costs speed where they are forwarded again, nothing else.
        decap_gso: room.clears_gso || alone,
        xdp: false,
        gate: Gate::default(),
        ring_shift: bpf.ring_shift(),
        routed: false,
        own_index: None,
        tunnel: None,
    })
}

fn obstacle(conf: &NetConf, family: Family, ethernet: bool) -> Option<String> {
    if let Some(reason) = Capabilities::effective().missing_for_bpf() {
        return Some(reason.into());
    }
    if !ethernet {
        return Some(
            "the uplink is not an Ethernet interface: eBPF cannot build its headers".into(),
        );
    }
    if conf.backend.vxlan.gbp {
        return Some(
            "the backend's GBP extension is on, which only the kernel's device implements".into(),
        );
    }
    if conf.backend.vxlan.learning {
        return Some(
            "the backend's Learning is on, which only the kernel's device implements".into(),
        );
    }
    let (network, subnet_len) = conf.range(family)?;
    subnet_count(network, subnet_len)
        .is_none_or(|count| count > MAX_SUBNETS)
        .then(|| {
            format!(
                "network {network} has more than {MAX_SUBNETS} subnets of length {subnet_len}: too many for a map"
            )
        })
}

/// What the flags ask for.
pub(crate) fn wishes(args: &Args, conf: Option<&NetConf>) -> Wishes {
    Wishes {
        datapath: match args.datapath {
            DatapathChoice::Auto => Wants::Auto,
            DatapathChoice::Bpf => Wants::Bpf,
            DatapathChoice::Kernel => Wants::Kernel,
        },
        attach: match args.bpf_attach {
            AttachChoice::Auto => Attach::Auto,
            AttachChoice::Tcx => Attach::Tcx,
            AttachChoice::Clsact => Attach::Clsact,
        },
        fast_path: args.fast_path(conf.and_then(|conf| conf.backend.fast_path)),
        xdp: args.bpf_xdp.into(),
    }
}

/// What the kernel lacks for eBPF to carry anything.
fn impossible(args: &Args, conf: &NetConf, findings: &Findings) -> Option<String> {
    let mut ladder = climb(findings, &wishes(args, Some(conf)), &Course::default());
    let reason = ladder.why_not.remove(&Step::Stack)?;
    Some(format!("eBPF cannot be used: {reason}"))
}

/// What went wrong, and what to do about it where that is known.
fn explain(error: &BpfError) -> String {
    let refusal = match error.errno() {
        Some(libc::ENOSYS) => Refusal::Unknown,
        Some(libc::EPERM | libc::EACCES) => Refusal::Forbidden,
        Some(libc::ENOMEM | libc::E2BIG) => Refusal::NoRoom,
        _ => Refusal::Other,
    };
    let (kernel, confines) = (kernel_modules::release(), kernel_modules::confines());
    match distribution::bpf_advice(refusal, &kernel, &confines) {
        Some(advice) => format!("{}: {advice}", chain(error)),
        None => chain(error),
    }
}

/// Loads with as many flows as were asked for, or with fewer where the kernel has no room for them: a small table of flows is a
/// smaller loss than all of eBPF.
fn load(args: &Args, conf: &NetConf, family: Family, findings: &Findings) -> Result<Bpf, BpfError> {
    let mut flow_entries = args.bpf_flow_entries;
    loop {
        match load_with(args, conf, family, findings, flow_entries) {
            // Before Linux 5.11 a limit of locked memory is told as EPERM.
            Err(error)
                if matches!(
                    error.errno(),
                    Some(libc::ENOMEM | libc::E2BIG | libc::EPERM)
                ) && flow_entries > FEWEST_FLOWS =>
            {
                flow_entries = (flow_entries / 8).max(FEWEST_FLOWS);
                tracing::debug!(
                    error = chain(&error),
                    flow_entries,
                    "load eBPF with room for fewer flows"
                );
            }
            Ok(bpf) if flow_entries != args.bpf_flow_entries => {
                tracing::warn!(
                    flow_entries,
                    "the kernel has no room for {} flows: fewer are remembered",
                    args.bpf_flow_entries
                );
                return Ok(bpf);
            }
            loaded => return loaded,
        }
    }
}

fn load_with(
    args: &Args,
    conf: &NetConf,
    family: Family,
    findings: &Findings,
    flow_entries: u32,
) -> Result<Bpf, BpfError> {
    features::raise_memlock();
    bpf::ensure_bpffs()?;
    let attach = match args.bpf_attach {
        AttachChoice::Auto if findings.has(Feature::Tcx) => AttachMode::Tcx,
        AttachChoice::Auto if findings.lacks(Feature::Tcx).is_some() => AttachMode::Clsact,
        AttachChoice::Auto => AttachMode::detect(),
        AttachChoice::Tcx => AttachMode::Tcx,
        AttachChoice::Clsact => AttachMode::Clsact,
    };
    let subnets = conf
        .range(family)
        .and_then(|(network, len)| subnet_count(network, len));
    let vni = conf.backend.vxlan.vni;
    let options = LoadOptions {
        instance: Instance::of(Overlay { family, vni })?,
        subnet_count: subnets.unwrap_or(1),
        attach,
        flow_entries,
        last_port: findings.has(Feature::LastPort),
    };
    let mut bpf = Bpf::load_with_logs(&options, args.subnet_file.parent())?;
    // Of the flags nothing is asked here: what is in the way of it is known by then.
    let mut ladder = climb(findings, &Wishes::default(), &Course::default());
    if let Some(reason) = ladder.why_not.remove(&Step::Established) {
        bpf.forbid_gate(reason);
    }
    Ok(bpf)
}

/// How many subnets a network has; `None` if they are more than can be counted.
fn subnet_count(network: IpNet, subnet_len: u8) -> Option<u32> {
    1u32.checked_shl(subnet_len.saturating_sub(network.prefix_len()).into())
}

/// Says that there is no eBPF, and why: a warning, unless it was asked for.
pub(crate) fn announce_kernel(args: &Args, reason: &str) {
    if args.datapath == DatapathChoice::Kernel {
        tracing::info!(reason, "the kernel's vxlan device carries the overlay");
    } else {
        tracing::warn!(
            reason,
            "the kernel's vxlan device carries the overlay, without eBPF"
        );
    }
}

/// Detaches what an earlier run left attached and this one does not use: all of it without eBPF, else the filter on an uplink
/// that is no longer ours. It would go on with peers that nobody updates any more. Where there is nothing, nothing is touched.
///
/// `state` is the one about to be written; the file still holds the earlier one.
pub(crate) async fn retire(net: &Netlink, state: &State) {
    let earlier = if state.second {
        State::read_second(&state.subnet_file)
    } else {
        State::read(&state.subnet_file)
    };
    let earlier = earlier.ok().flatten();
    let overlay = state.overlay();
    let old_uplink = earlier.map(|earlier| earlier.uplink_index);
    let old_uplink = old_uplink.filter(|index| *index != state.uplink_index);
    if let Some(index) = old_uplink {
        retire_filter(net, Hook::FromWire, index, overlay).await;
        retire_filter(net, Hook::ToLink, index, overlay).await;
    }
    if state.datapath.mode == Mode::Bpf {
        return;
    }
    retire_programs(net, overlay, state.uplink_index).await;
    if let Ok(Some(index)) = net.index(&state.device).await {
        retire_filter(net, Hook::ToOverlay, index, overlay).await;
        retire_filter(net, Hook::FromOverlay, index, overlay).await;
    }
    if !state.second {
        retire_headroom(net, state.vni).await;
    }
}

/// Takes the port away that gives pods' packets room for outer headers.
pub(crate) async fn retire_headroom(net: &Netlink, vni: Vni) {
    let Ok(Some(there)) = net.headroom(vni).await else {
        return;
    };
    match net.delete_device(there.index).await {
        Ok(()) => tracing::info!("removed the headroom device of an earlier run"),
        Err(error) => tracing::warn!(error = chain(&error), "remove the headroom device"),
    }
}

/// Detaches an overlay's programs and removes its maps, with its filters at pods and on this uplink: no pin holds those.
pub(crate) async fn retire_programs(net: &Netlink, overlay: Overlay, uplink: IfIndex) {
    match Instance::of(overlay) {
        Ok(instance) if instance.dir().exists() => {
            let pod_hooks = instance.pod_hooks();
            match instance.remove() {
                Ok(()) => {
                    tracing::info!(dir = %instance.dir().display(), "detached the eBPF programs of an earlier run");
                }
                Err(error) => tracing::warn!(
                    error = chain(&error),
                    "detach the eBPF programs of an earlier run"
                ),
            }
            for (hook, index) in pod_hooks {
                retire_filter(net, hook, index, overlay).await;
            }
        }
        Ok(_) => {}
        Err(error) => {
            tracing::debug!(error = chain(&error), "look for programs of an earlier run");
        }
    }
    retire_filter(net, Hook::FromWire, uplink, overlay).await;
    retire_filter(net, Hook::ToLink, uplink, overlay).await;
}

async fn retire_filter(net: &Netlink, hook: Hook, index: IfIndex, overlay: Overlay) {
    // No filter, or no such interface any more.
    let Ok(Some(_program)) = net.filter_program(hook, index, overlay).await else {
        return;
    };
    match bpf::delete_filter(hook, index, overlay) {
        Ok(()) => {
            tracing::info!(%hook, ifindex = index.get(), "detached the tc filter of an earlier run");
        }
        Err(error) => tracing::warn!(
            error = chain(&error),
            "detach the tc filter of an earlier run"
        ),
    }
}

/// The range from which the vxlan device takes source ports (`udp_flow_src_port`).
fn local_port_range() -> (u16, u16) {
    let text =
        std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
    let mut numbers = text.split_whitespace().filter_map(|word| word.parse().ok());
    match (numbers.next(), numbers.next()) {
        (Some(min), Some(max)) if min < max => (min, max),
        _ => (32768, 60999),
    }
}
