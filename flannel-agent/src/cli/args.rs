//! Flags, with flannel's names, spelling and environment variables.

use std::{ffi::OsString, net::Ipv4Addr, path::PathBuf, time::Duration};

use clap::{
    ArgAction, CommandFactory as _, FromArgMatches as _, Parser, Subcommand, ValueEnum,
    builder::Resettable,
    error::{ContextKind, ContextValue, ErrorKind},
};
use flannel_core::{acquire::Identity, addr::Vni, fastpath::Choice, iface::Wanted, xdp};

mod check;
mod firewall;
mod serving;

pub use firewall::{FirewallArgs, RulesetChoice};
pub use serving::{LogFormat, ServingArgs};

use crate::leases::{DEFAULT_PREFIX, DEFAULT_TTL, DirOptions, EtcdOptions, StoreConfig};

/// Carries pod traffic between nodes in VXLAN, with eBPF where the kernel can and with the kernel's own device where it cannot.
///
/// Without a command it is the daemon, a replacement for flanneld. Flags may be written with one dash or two. A flag that is not
/// given is read from the environment variable named with it, unless that is empty.
#[derive(Clone, Debug, Parser)]
#[command(
    name = "flannel-agent",
    version,
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

    /// Interface, by name or address, that carries the overlay. May be repeated: the first that exists is taken. Default: the one
    /// of the default route.
    #[arg(long, env = "FLANNELD_IFACE", value_name = "NAME|IP", action = ArgAction::Append)]
    pub iface: Vec<String>,

    /// IPv4 address at which other nodes reach this one. Default: the address of the interface.
    #[arg(long, env = "FLANNELD_PUBLIC_IP", value_name = "IP", value_parser = ipv4)]
    pub public_ip: Option<Ipv4Addr>,

    /// File to write subnet, network and MTU to, for the CNI plugin.
    #[arg(
        long,
        env = "FLANNELD_SUBNET_FILE",
        default_value = "/run/flannel/subnet.env",
        value_name = "FILE",
        global = true
    )]
    pub subnet_file: PathBuf,

    /// Network configuration for a lease directory that has no file named config.
    #[arg(
        long,
        env = "FLANNELD_NET_CONFIG_PATH",
        default_value = "/etc/kube-flannel/net-conf.json",
        value_name = "FILE"
    )]
    pub net_config_path: PathBuf,

    /// Directory, shared by all nodes, to keep leases in as files instead of in etcd.
    #[arg(long, env = "FLANNELD_LEASE_DIR", value_name = "DIR")]
    pub lease_dir: Option<PathBuf>,

    /// URLs of etcd, separated by commas.
    #[arg(
        long,
        env = "FLANNELD_ETCD_ENDPOINTS",
        action = ArgAction::Set,
        default_value = "http://127.0.0.1:4001,http://127.0.0.1:2379",
        value_delimiter = ',',
        value_name = "URL,..."
    )]
    pub etcd_endpoints: Vec<String>,

    /// Key prefix in etcd.
    #[arg(long, env = "FLANNELD_ETCD_PREFIX", default_value = DEFAULT_PREFIX, value_name = "PREFIX")]
    pub etcd_prefix: String,

    /// Client key for etcd (PEM).
    #[arg(long, env = "FLANNELD_ETCD_KEYFILE", value_name = "FILE")]
    pub etcd_keyfile: Option<PathBuf>,

    /// Client certificate for etcd (PEM).
    #[arg(long, env = "FLANNELD_ETCD_CERTFILE", value_name = "FILE")]
    pub etcd_certfile: Option<PathBuf>,

    /// Certificate authorities that may sign etcd's certificate (PEM). Default: the system's.
    #[arg(long, env = "FLANNELD_ETCD_CAFILE", value_name = "FILE")]
    pub etcd_cafile: Option<PathBuf>,

    /// User name for etcd.
    #[arg(long, env = "FLANNELD_ETCD_USERNAME", value_name = "NAME")]
    pub etcd_username: Option<String>,

    /// Password for etcd.
    #[arg(
        long,
        env = "FLANNELD_ETCD_PASSWORD",
        allow_hyphen_values = true,
        value_name = "PASSWORD"
    )]
    pub etcd_password: Option<String>,

    /// Minutes before the end of its 24 hours at which the lease in etcd is renewed, 1 to 1439.
    #[arg(
        long,
        env = "FLANNELD_SUBNET_LEASE_RENEW_MARGIN",
        default_value_t = 60,
        value_parser = minutes,
        value_name = "MINUTES"
    )]
    pub subnet_lease_renew_margin: u16,

    #[command(flatten)]
    pub firewall: FirewallArgs,

    #[command(flatten)]
    pub serving: ServingArgs,

    /// What carries the traffic.
    #[arg(long, env = "FLANNELD_DATAPATH", value_enum, default_value_t = DatapathChoice::Auto, value_name = "CHOICE")]
    pub datapath: DatapathChoice,

    /// What kind of device flannel.<VNI> is.
    #[arg(long, env = "FLANNELD_BPF_DEVICE", value_enum, default_value_t = DeviceChoice::Auto, value_name = "CHOICE")]
    pub bpf_device: DeviceChoice,

    /// How eBPF programs are attached.
    #[arg(long, env = "FLANNELD_BPF_ATTACH", value_enum, default_value_t = AttachChoice::Auto, value_name = "CHOICE")]
    pub bpf_attach: AttachChoice,

    /// Whether packets lose their outer headers in the network driver, by native XDP.
    #[arg(long, env = "FLANNELD_BPF_XDP", value_enum, default_value_t = XdpChoice::Auto, value_name = "CHOICE")]
    pub bpf_xdp: XdpChoice,

    /// Which packets between pods may bypass the host's stack. Default: what the network configuration says, else auto.
    #[arg(
        long,
        env = "FLANNELD_BPF_FAST_PATH",
        value_enum,
        value_name = "CHOICE"
    )]
    pub bpf_fast_path: Option<FastPathChoice>,

    /// Flows that eBPF remembers for the fast path, 1024 to 16777216.
    #[arg(
        long,
        env = "FLANNELD_BPF_FLOW_ENTRIES",
        default_value_t = 262_144,
        value_parser = flow_entries,
        value_name = "N"
    )]
    pub bpf_flow_entries: u32,

    /// Cache directory of CNI, where the container runtime keeps what plugins said of pods.
    #[arg(
        long,
        env = "FLANNELD_CNI_CACHE_DIR",
        default_value = "/var/lib/cni",
        value_name = "DIR"
    )]
    pub cni_cache_dir: PathBuf,

    /// How much to log: 0 changes, 1 decisions too, 2 and more everything.
    #[arg(
        short = 'v',
        long = "v",
        env = "FLANNELD_V",
        default_value_t = 0,
        value_name = "LEVEL",
        value_parser = level,
        allow_negative_numbers = true,
        global = true
    )]
    pub verbosity: u8,
}

/// What to do instead of running the daemon.
#[derive(Clone, Copy, Debug, Subcommand)]
pub enum Command {
    /// Shows what carries this node's traffic, also while the daemon is down.
    Status {
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

impl Args {
    /// Reads the command line, the first argument being the program's name, and the environment for what is not on it.
    pub fn read(arguments: impl IntoIterator<Item = OsString>) -> Result<Self, clap::Error> {
        let command = Self::command().mut_args(|arg| {
            let value = arg.get_env().and_then(std::env::var_os);
            if value.is_some_and(|value| value.is_empty()) {
                // To upstream, and to manifests that always set it, an empty variable is none.
                arg.env(Resettable::Reset)
            } else {
                arg.hide_env_values(true)
            }
        });
        let command = check::offer(command);
        let arguments = normalize_go_flags(arguments);
        let odd = arguments
            .iter()
            .find(|argument| argument.to_str().is_none());
        let odd = odd.cloned();
        let mut matches = command
            .try_get_matches_from(arguments)
            .map_err(|error| match odd {
                Some(odd) if error.kind() == ErrorKind::InvalidUtf8 => Self::command().error(
                    ErrorKind::InvalidUtf8,
                    format!("{} is not UTF-8: write it in UTF-8", odd.display()),
                ),
                _ => error,
            })?;
        let behind = matches.clone();
        let mut args = Self::from_arg_matches_mut(&mut matches)?;
        check::merge(&mut args, &behind)?;
        Ok(args)
    }

    /// The environment variable that a complaint is about, if it was not the command line.
    pub fn variable_of(error: &clap::Error) -> Option<String> {
        let (Some(ContextValue::String(name)), Some(ContextValue::String(value))) = (
            error.get(ContextKind::InvalidArg),
            error.get(ContextKind::InvalidValue),
        ) else {
            return None;
        };
        let mut command = Self::command();
        command.build();
        let arg = command
            .get_arguments()
            .find(|arg| arg.to_string() == *name)?;
        let variable = arg.get_env()?;
        let given = std::env::var_os(variable).is_some_and(|given| given.to_str() == Some(value));
        given.then(|| variable.to_string_lossy().into_owned())
    }

    /// Finds flags that exclude each other.
    pub fn check(&self) -> Result<(), &'static str> {
        if self.datapath == DatapathChoice::Kernel && self.bpf_device == DeviceChoice::Veth {
            return Err(
                "--bpf-device=veth needs eBPF, which --datapath=kernel forbids: leave out one of the two",
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

    /// Which lease store the flags ask for.
    pub fn store(&self) -> StoreConfig {
        match &self.lease_dir {
            Some(dir) => StoreConfig::Dir(DirOptions {
                net_config_path: Some(self.net_config_path.clone()),
                ..DirOptions::new(dir)
            }),
            None => StoreConfig::Etcd(EtcdOptions {
                endpoints: self.etcd_endpoints.clone(),
                prefix: self.etcd_prefix.clone(),
                keyfile: self.etcd_keyfile.clone(),
                certfile: self.etcd_certfile.clone(),
                cafile: self.etcd_cafile.clone(),
                username: self.etcd_username.clone(),
                password: self.etcd_password.clone(),
                renew_margin: Duration::from_secs(u64::from(self.subnet_lease_renew_margin) * 60),
                ttl: DEFAULT_TTL,
            }),
        }
    }

    /// Which uplink the flags ask for.
    pub fn wanted(&self) -> Wanted {
        Wanted {
            ifaces: self.iface.clone(),
            public_ip: self.public_ip,
            public_ipv6: None,
        }
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

fn ipv4(text: &str) -> Result<Ipv4Addr, &'static str> {
    text.parse()
        .map_err(|_| "write an IPv4 address such as 192.168.1.10")
}

fn minutes(text: &str) -> Result<u16, &'static str> {
    text.parse()
        .ok()
        .filter(|minutes| (1..=1439).contains(minutes))
        .ok_or("write a whole number from 1 to 1439")
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

/// Rewrites Go-style `-flag` arguments to the `--flag` form that clap reads.
fn normalize_go_flags(arguments: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let mut out = Vec::new();
    let mut done = false;
    // A password may look like a flag.
    let mut literal = false;
    for (i, argument) in arguments.into_iter().enumerate() {
        let text = argument.to_str().unwrap_or_default();
        done |= text == "--" && !literal;
        let rewrite = i > 0 && !done && !literal && is_go_flag(text);
        literal = matches!(text, "-etcd-password" | "--etcd-password") && !literal;
        out.push(if rewrite {
            format!("-{text}").into()
        } else {
            argument
        });
    }
    out
}

/// Whether `-text` is a long flag. `-v=4`, `-v4` and `-ojson` are clap's own.
fn is_go_flag(text: &str) -> bool {
    let Some(name) = text.strip_prefix('-').filter(|name| !name.starts_with('-')) else {
        return false;
    };
    let long = name.split('=').next().is_some_and(|name| name.len() > 1);
    let short_with_value = matches!(name, "ojson" | "otable")
        || name
            .strip_prefix('v')
            .is_some_and(|level| level.starts_with(|c: char| c.is_ascii_digit()));
    long && !short_with_value
}

#[cfg(test)]
mod tests;
