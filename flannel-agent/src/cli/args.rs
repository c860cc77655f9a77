//! Flags, with flannel's names, spelling and environment variables.

use std::{net::Ipv4Addr, path::PathBuf};

use clap::{Parser, Subcommand, ValueEnum};
use flannel_core::{acquire::Identity, addr::Vni, fastpath::Choice, iface::Wanted};

mod bpf;
mod check;
mod effective;
mod firewall;
mod kube;
mod old;
mod quotes;
mod reading;
mod serving;
mod spelling;
mod store;
mod uplink;

pub use bpf::{AttachChoice, DatapathChoice, DeviceChoice, FastPathChoice, XdpChoice};
pub use firewall::{FirewallArgs, RulesetChoice};
pub(crate) use kube::last_known_state;
pub use kube::{KubeArgs, KubeVariables};
pub(super) use reading::program;
pub use serving::{LogFormat, ServingArgs};
pub use store::EtcdArgs;
pub use uplink::UplinkArgs;

use super::docker_opts;
use crate::{
    cni_socket,
    leases::{DirOptions, StoreConfig},
};

/// The program's name where nothing says otherwise.
pub(super) const PROGRAM: &str = "flannel-agent";

/// Headings in `--help`.
const STORE: &str = "Lease store";
const BPF: &str = "eBPF";
const SERVING: &str = "Serving and logs";

/// Carries pod traffic between nodes in VXLAN, with eBPF where the kernel can and with the kernel's own device where it cannot.
///
/// Without a command it is the daemon, a replacement for flanneld. Flags may be written with one dash or two. A flag that is not
/// given is read from the environment variable named with it, unless that is empty.
#[derive(Clone, Debug, Parser)]
#[command(
    name = "flannel-agent",
    version = super::VERSION,
    subcommand_negates_reqs = true,
    args_override_self = true,
    max_term_width = 80,
    after_help = "Exit codes: 0 stopped by SIGTERM or SIGINT; 1 anything not named here; 2 a bad flag, \
                  configuration, file or value; 3 the lease store refuses; 4 privilege or kernel \
                  support is missing."
)]
pub struct Args {
    /// What to do instead of running the daemon.
    #[command(subcommand)]
    pub command: Option<Command>,

    /// File to write subnet, network and MTU to, for the CNI plugin.
    #[arg(help_heading = STORE, long,
        env = "FLANNELD_SUBNET_FILE",
        default_value = "/run/flannel/subnet.env",
        value_name = "FILE",
        global = true
    )]
    pub subnet_file: PathBuf,

    /// Network configuration with --kube-subnet-mgr, and for a lease directory that has no file named config.
    #[arg(help_heading = STORE, long,
        env = "FLANNELD_NET_CONFIG_PATH",
        default_value = "/etc/kube-flannel/net-conf.json",
        value_name = "FILE"
    )]
    pub net_config_path: PathBuf,

    /// Directory, shared by all nodes, to keep leases in as files instead of in etcd.
    #[arg(help_heading = STORE, long, env = "FLANNELD_LEASE_DIR", value_name = "DIR")]
    pub lease_dir: Option<PathBuf>,

    #[command(flatten)]
    pub etcd: EtcdArgs,

    #[command(flatten)]
    pub uplink: UplinkArgs,

    #[command(flatten)]
    pub firewall: FirewallArgs,

    /// What carries the traffic.
    #[arg(help_heading = BPF, long, env = "FLANNELD_DATAPATH", value_enum, default_value_t = DatapathChoice::Auto, value_name = "CHOICE")]
    pub datapath: DatapathChoice,

    /// What kind of device flannel.<VNI> is.
    #[arg(help_heading = BPF, long, env = "FLANNELD_BPF_DEVICE", value_enum, default_value_t = DeviceChoice::Auto, value_name = "CHOICE")]
    pub bpf_device: DeviceChoice,

    /// How eBPF programs are attached.
    #[arg(help_heading = BPF, long, env = "FLANNELD_BPF_ATTACH", value_enum, default_value_t = AttachChoice::Auto, value_name = "CHOICE")]
    pub bpf_attach: AttachChoice,

    /// Whether packets lose their outer headers in the network driver, by native XDP.
    #[arg(help_heading = BPF, long, env = "FLANNELD_BPF_XDP", value_enum, default_value_t = XdpChoice::Auto, value_name = "CHOICE")]
    pub bpf_xdp: XdpChoice,

    /// Which packets between pods may bypass the host's stack. Default: what the network configuration says, else auto.
    #[arg(help_heading = BPF, long,
        env = "FLANNELD_BPF_FAST_PATH",
        value_enum,
        value_name = "CHOICE"
    )]
    pub bpf_fast_path: Option<FastPathChoice>,

    /// Flows that eBPF remembers for the fast path, 1024 to 16777216.
    #[arg(help_heading = BPF, long,
        env = "FLANNELD_BPF_FLOW_ENTRIES",
        default_value_t = 262_144,
        value_parser = flow_entries,
        value_name = "N"
    )]
    pub bpf_flow_entries: u32,

    /// Cache directory of CNI, where the container runtime keeps what plugins said of pods.
    #[arg(help_heading = BPF, long,
        env = "FLANNELD_CNI_CACHE_DIR",
        default_value = "/var/lib/cni",
        value_name = "DIR"
    )]
    pub cni_cache_dir: PathBuf,

    /// Socket at which the CNI plugin says which pods come and go. Default: cni.sock beside the subnet file.
    #[arg(help_heading = BPF, long, env = "FLANNELD_CNI_SOCKET", value_name = "FILE", global = true)]
    pub cni_socket: Option<PathBuf>,

    #[command(flatten)]
    pub kube: KubeArgs,

    #[command(flatten)]
    pub serving: ServingArgs,

    /// How much to log: 0 changes, 1 decisions too, 2 and more everything.
    #[arg(help_heading = SERVING, short = 'v',
        long = "v",
        env = "FLANNELD_V",
        default_value_t = 0,
        value_name = "LEVEL",
        value_parser = level,
        allow_negative_numbers = true,
        global = true
    )]
    pub verbosity: u8,

    /// Taken for flannel's sake, without effect.
    #[arg(help_heading = SERVING, long, env = "FLANNELD_VMODULE", value_name = "PATTERNS")]
    pub vmodule: Option<String>,

    /// Taken for flannel's sake, without effect.
    #[arg(
        help_heading = SERVING,
        long = "log_backtrace_at",
        env = "FLANNELD_LOG_BACKTRACE_AT",
        value_name = "FILE:LINE"
    )]
    pub log_backtrace_at: Option<String>,

    /// What the program was called by, for messages.
    #[arg(skip)]
    pub program: String,

    /// What to say of the flags and variables, once there is a log.
    #[arg(skip)]
    pub warnings: Vec<String>,
}

/// What to do instead of running the daemon.
#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    /// Shows what carries this node's traffic, also while the daemon is down.
    Status {
        /// Form of the answer.
        #[arg(short, long, value_enum, default_value_t = Output::Table, value_name = "FORM")]
        output: Output,
        /// Also list what the agent has found out about the kernel. JSON always has it.
        #[arg(long)]
        features: bool,
    },
    /// Tries what this kernel can do for the agent, and says which way of carrying packets follows. Nothing is left behind.
    #[command(
        after_help = "Exit codes: 0 the overlay can be carried; 1 it cannot; 2 a bad flag or value."
    )]
    Features {
        /// Form of the answer.
        #[arg(short, long, value_enum, default_value_t = Output::Table, value_name = "FORM")]
        output: Output,
    },
    /// Lists the other nodes as the data path knows them, also while the daemon is down.
    Peers {
        /// Form of the answer.
        #[arg(short, long, value_enum, default_value_t = Output::Table, value_name = "FORM")]
        output: Output,
    },
    /// Removes what the agent made on this node: device, programs, maps, files.
    Cleanup {
        /// Only say what would be removed.
        #[arg(long)]
        dry_run: bool,
        /// Also remove the device of this VNI, when no trace of an agent says which it was.
        #[arg(long, value_name = "VNI", value_parser = vni)]
        vni: Option<u32>,
        /// Leave the device with its peers, the firewall's rules and subnet.env: the kernel goes on carrying the overlay, for flanneld
        /// to take the node back without losing a packet.
        #[arg(long)]
        keep_device: bool,
        /// Do it even while an agent is running, which will make it all again.
        #[arg(long)]
        force: bool,
    },
    /// Checks whether this node is fit, before the daemon has ever run, while it runs or while it is down. Changes nothing.
    #[command(
        after_help = "Exit codes: 0 nothing failed; 1 a check failed; 2 a bad flag or value."
    )]
    Check {
        /// Form of the answer.
        #[arg(short, long, value_enum, default_value_t = Output::Table, value_name = "FORM")]
        output: Output,
        /// Send no packets to other nodes.
        #[arg(long)]
        no_peers: bool,
        /// How long to wait for the lease store and for other nodes, in seconds, 1 to 600.
        #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=600), value_name = "SECONDS")]
        timeout: u32,
    },
    /// Writes options for the Docker daemon that fit this node's subnet.env, as flannel's mk-docker-opts.sh does.
    #[command(name = "mk-docker-opts", after_help = docker_opts::OPTIONS)]
    MkDockerOpts,
    /// Copies a file to where others read it, all at once: they find the old one or the new one, never half. Permissions are kept.
    ///
    /// Called by the name of install-conf, the program does nothing else.
    #[command(name = "install-conf")]
    InstallConf {
        /// The file to copy.
        #[arg(value_name = "SRC")]
        source: PathBuf,
        /// The file to be, in a directory that exists.
        #[arg(value_name = "DEST")]
        destination: PathBuf,
    },
    /// Prints the version.
    Version,
}

/// Form of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people.
    Table,
    /// For programs.
    Json,
}

impl Args {
    /// Finds flags that exclude each other.
    pub fn check(&self) -> Result<(), &'static str> {
        if self.datapath == DatapathChoice::Kernel && self.bpf_device == DeviceChoice::Veth {
            return Err(
                "--bpf-device=veth needs eBPF, which --datapath=kernel forbids: leave out one of the two",
            );
        }
        if self.kube.kube_subnet_mgr && self.lease_dir.is_some() {
            return Err(
                "--kube-subnet-mgr and --lease-dir are two places for leases: leave out one of the two",
            );
        }
        Ok(())
    }

    /// What is wanted of the fast path: the flag beats the network configuration.
    pub fn fast_path(&self, configured: Option<Choice>) -> Choice {
        self.bpf_fast_path
            .map(Choice::from)
            .or(configured)
            .unwrap_or_default()
    }

    /// Where the CNI plugin is listened to.
    pub fn cni_socket(&self) -> PathBuf {
        let given = self.cni_socket.clone();
        given.unwrap_or_else(|| cni_socket::beside(&self.subnet_file))
    }

    /// Which lease store the flags ask for.
    pub fn store(&self) -> StoreConfig {
        if self.kube.kube_subnet_mgr {
            let options = self.kube.options(&self.net_config_path, &self.subnet_file);
            return StoreConfig::Kube(Box::new(options));
        }
        match &self.lease_dir {
            Some(dir) => StoreConfig::Dir(DirOptions {
                net_config_path: Some(self.net_config_path.clone()),
                ..DirOptions::new(dir)
            }),
            None => StoreConfig::Etcd(self.etcd.options()),
        }
    }

    /// Which uplink the flags ask for.
    pub fn wanted(&self) -> Wanted {
        self.uplink.wanted()
    }

    /// By what this node recognises its own lease.
    pub fn identity(public_ip: Option<Ipv4Addr>) -> Identity {
        Identity {
            public_ip,
            public_ipv6: None,
        }
    }
}

/// Go's `strconv.ParseBool`.
fn boolean(text: &str) -> Result<bool, &'static str> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        _ => Err("write true or false"),
    }
}

fn flow_entries(text: &str) -> Result<u32, &'static str> {
    text.parse()
        .ok()
        .filter(|entries| (1024..=16_777_216).contains(entries))
        .ok_or("write a whole number from 1024 to 16777216")
}

/// Any number, as upstream takes it: below 0 is 0, and above 255 there is nothing more to tell.
fn level(text: &str) -> Result<u8, &'static str> {
    let level: i64 = text.parse().map_err(|_| "write a whole number such as 1")?;
    Ok(u8::try_from(level.clamp(0, 255)).unwrap_or(u8::MAX))
}

fn vni(text: &str) -> Result<u32, &'static str> {
    text.parse()
        .ok()
        .filter(|vni| Vni::try_from(*vni).is_ok())
        .ok_or("write a whole number from 0 to 16777215")
}

#[cfg(test)]
mod tests;
