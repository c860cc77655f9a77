//! Kernel, privileges, settings.

use std::{
    fs,
    path::Path,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use aya::{programs::ProgramType, sys::is_program_supported};
use flannel_core::{
    addr::{Family, Vni},
    check::{
        Bpffs, Capabilities, Clock, Manager, Node, Observations, Reverse, ReverseFilter, Vxlan,
        Wants,
    },
    distribution::{Feature, Host, Modules},
    features::Ladder,
    mark,
};
use nix::sched::{CloneFlags, unshare};

use crate::{
    cli::{Args, DatapathChoice},
    dataplane::{
        bpf::{self, AttachMode, Instance},
        netlink::Netlink,
    },
    features, kernel_modules, preflight,
    state::State,
    telemetry::chain,
};

/// Where the kernel's settings of this namespace are.
const IPV4: &str = "/proc/sys/net/ipv4";

/// Looks. `agent` is the running daemon, whose privileges count more than ours.
pub(super) async fn look(args: &Args, agent: Option<u32>, family: Family) -> Node {
    let host = kernel_modules::host(Feature::Vxlan);
    let bridge_nf = match family {
        Family::V4 => "/proc/sys/net/bridge/bridge-nf-call-iptables",
        Family::V6 => "/proc/sys/net/bridge/bridge-nf-call-ip6tables",
    };
    Node {
        btf: Path::new("/sys/kernel/btf/vmlinux").exists(),
        capabilities: capabilities(agent),
        wants: match args.datapath {
            DatapathChoice::Auto => Wants::Auto,
            DatapathChoice::Bpf => Wants::Bpf,
            DatapathChoice::Kernel => Wants::Kernel,
        },
        bpf: bpf(),
        bpffs: bpffs(),
        hooks: AttachMode::detect().as_str(),
        vxlan: vxlan(&host).await,
        ip_forward: setting(&format!("{IPV4}/ip_forward")).map(|value| value != 0),
        forwarding_v6: setting("/proc/sys/net/ipv6/conf/all/forwarding").map(|value| value != 0),
        bridge_nf: setting(bridge_nf).map(|value| value != 0),
        reverse: Reverse::default(),
        clock: clock(args),
        managers: managers(),
        ladder: ladder(args),
        kernel: host.kernel.clone(),
        host,
    }
}

/// From what the agent has left: to try it here would load modules.
fn ladder(args: &Args) -> Option<Ladder> {
    let state = State::read(&args.subnet_file).ok()??;
    let findings = features::left(&args.subnet_file)?;
    let strips = Instance::of(state.overlay()).is_ok_and(|instance| {
        instance.is_xdp_attached(state.uplink_index)
            && instance.totals().is_ok_and(|totals| totals.xdp.packets > 0)
    });
    Some(state.ladder(&findings, strips))
}

fn setting(path: &str) -> Option<u8> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

fn capabilities(agent: Option<u32>) -> Capabilities {
    let of_agent = agent.and_then(preflight::Capabilities::of);
    let held = of_agent.unwrap_or_else(preflight::Capabilities::effective);
    Capabilities {
        whose: if of_agent.is_some() {
            "the agent"
        } else {
            "this process"
        },
        net_admin: held.may_configure(),
        net_raw: held.may_send_raw(),
        missing_for_bpf: held.missing_for_bpf().map(str::to_owned),
    }
}

fn bpf() -> Result<(), String> {
    match is_program_supported(ProgramType::SchedClassifier) {
        Ok(true) => Ok(()),
        Ok(false) => Err("it knows no programs for tc".into()),
        Err(error) => Err(chain(&error)),
    }
}

fn bpffs() -> Bpffs {
    if bpf::mounted() {
        return Bpffs::Mounted;
    }
    let known = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    if !known
        .lines()
        .any(|line| line.trim_start_matches("nodev").trim() == "bpf")
    {
        return Bpffs::Missing("the kernel has no such file system".into());
    }
    if !Path::new("/sys/fs/bpf").is_dir() {
        return Bpffs::Missing("the directory does not exist".into());
    }
    if preflight::Capabilities::effective().may_mount() {
        Bpffs::Mountable
    } else {
        Bpffs::Missing("mounting it needs CAP_SYS_ADMIN".into())
    }
}

/// Tries it where that changes nothing: with the module there, in a network namespace of its own that ends with the attempt.
async fn vxlan(host: &Host) -> Vxlan {
    if !Path::new("/sys/module/vxlan").exists()
        && let Modules::With(file) = &host.modules
    {
        return Vxlan::Loadable(file.clone());
    }
    tokio::task::spawn_blocking(attempt)
        .await
        .unwrap_or_else(|error| Vxlan::Untried(error.to_string()))
}

fn attempt() -> Vxlan {
    // A namespace belongs to a thread, which must not be one that is used again.
    let thread = std::thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET)
            .map_err(|errno| Vxlan::Untried(format!("make a network namespace: {errno}")))?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| Vxlan::Untried(error.to_string()))?;
        runtime.block_on(async {
            let net = Netlink::open().map_err(|error| Vxlan::Untried(chain(&error)))?;
            net.try_vxlan(&mark::device_name(Vni::DEFAULT))
                .await
                .map_err(|error| Vxlan::Refused(chain(&error)))
        })
    });
    match thread.join() {
        Ok(Ok(())) => Vxlan::Works,
        Ok(Err(other)) => other,
        Err(_panic) => Vxlan::Untried("the attempt ended without an answer".into()),
    }
}

fn clock(args: &Args) -> Clock {
    let since = |time: SystemTime| {
        time.duration_since(UNIX_EPOCH)
            .unwrap_or(Duration::ZERO)
            .as_secs()
    };
    let mut files = vec![
        Path::new("/proc/self/exe").to_path_buf(),
        args.subnet_file.clone(),
    ];
    files.extend(args.lease_dir.iter().map(|dir| dir.join("config")));
    let newest = files
        .into_iter()
        .filter_map(|file| {
            let written = fs::metadata(&file).and_then(|meta| meta.modified()).ok()?;
            Some((since(written), file.display().to_string()))
        })
        .max();
    Clock {
        now: since(SystemTime::now()),
        newest,
    }
}

/// Programs by the names of their processes, with the directories of their configuration.
const MANAGERS: [(&str, &str, &[&str]); 2] = [
    (
        "NetworkManager",
        "NetworkManager",
        &[
            "/etc/NetworkManager/conf.d",
            "/etc/NetworkManager",
            "/run/NetworkManager/conf.d",
            "/usr/lib/NetworkManager/conf.d",
        ],
    ),
    (
        "systemd-networkd",
        "systemd-network",
        &[
            "/etc/systemd/network",
            "/run/systemd/network",
            "/usr/lib/systemd/network",
        ],
    ),
];

/// The network namespace of a process.
fn namespace(process: &str) -> Option<std::path::PathBuf> {
    fs::read_link(format!("/proc/{process}/ns/net")).ok()
}

fn managers() -> Vec<Manager> {
    // Those of other namespaces, such as of containers, have nothing to do with our devices.
    let here = namespace("self");
    let running: Vec<String> = super::sockets::processes()
        .into_iter()
        .filter(|pid| namespace(&pid.to_string()) == here)
        .filter_map(|pid| fs::read_to_string(format!("/proc/{pid}/comm")).ok())
        .map(|comm| comm.trim_end().to_owned())
        .collect();
    MANAGERS
        .into_iter()
        // The kernel cuts the names of processes to 15 bytes.
        .filter(|(_, comm, _)| running.iter().any(|name| name == comm))
        .map(|(name, _, dirs)| Manager {
            name,
            leaves_alone: dirs.iter().any(|dir| names_flannel(Path::new(dir))),
        })
        .collect()
}

/// Whether a file in the directory speaks of flannel's devices.
fn names_flannel(dir: &Path) -> bool {
    let entries = fs::read_dir(dir).into_iter().flatten();
    entries.filter_map(Result::ok).any(|entry| {
        fs::read_to_string(entry.path()).is_ok_and(|text| {
            text.lines()
                .map(str::trim)
                .any(|line| !line.starts_with(['#', ';']) && line.contains("flannel"))
        })
    })
}

/// Adds the reverse path filters, once uplink and tunnel device are known.
pub(super) fn add_reverse(seen: &mut Observations) {
    let value = |interface: &str| setting(&format!("{IPV4}/conf/{interface}/rp_filter"));
    let all = value("all").unwrap_or(0);
    let filter = |interface: &str| {
        Some(ReverseFilter {
            interface: interface.to_owned(),
            value: value(interface)?.max(all),
        })
    };
    let reverse = &mut seen.node.reverse;
    reverse.uplink = seen
        .network
        .uplink()
        .and_then(|uplink| filter(&uplink.name));
    reverse.tunnel = seen
        .overlay
        .device
        .as_ref()
        .and_then(|_| filter(&seen.overlay.name));
    let Some(uplink) = seen.network.uplink() else {
        return;
    };
    reverse.elsewhere = seen
        .overlay
        .ways
        .iter()
        // IPv6 has no such filter.
        .filter(|(peer, index)| peer.is_ipv4() && **index != uplink.index)
        .map(|(peer, index)| {
            let link = seen.network.links.iter().find(|link| link.index == *index);
            let name = link.map_or("another interface", |link| link.name.as_str());
            format!("{peer} by {name}")
        })
        .collect();
}
