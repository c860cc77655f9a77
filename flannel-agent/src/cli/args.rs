//! Flags, with flannel's names, spelling and environment variables.

use std::{net::Ipv4Addr, path::PathBuf, time::Duration};

use clap::{ArgAction, Parser, Subcommand, ValueEnum};
use flannel_core::{acquire::Identity, iface::Wanted};

use crate::leases::{DEFAULT_PREFIX, DEFAULT_TTL, DirOptions, EtcdOptions, StoreConfig};

/// Carries pod traffic between nodes in VXLAN, in eBPF where the kernel can and in the kernel's own device where it cannot.
///
/// Without a subcommand it is the daemon, a replacement for flanneld. Flags may be written with one dash or two, and every
/// flag of flannel's is also read from FLANNELD_<NAME>.
#[derive(Clone, Debug, Parser)]
#[command(
    name = "flannel-agent",
    version,
    subcommand_negates_reqs = true,
    disable_help_subcommand = true
)]
pub struct Args {
    /// What to do instead of running the daemon.
    #[command(subcommand)]
    pub command: Option<Command>,

    /// Interface (name or address) whose network carries the overlay; may be given several times, the first match wins. Default:
    /// the interface of the default route.
    #[arg(long, env = "FLANNELD_IFACE", value_name = "NAME|IP", action = ArgAction::Append)]
    pub iface: Vec<String>,

    /// IPv4 address at which other nodes reach this one. Default: the address of the interface.
    #[arg(long, env = "FLANNELD_PUBLIC_IP", value_name = "IP")]
    pub public_ip: Option<Ipv4Addr>,

    /// File to write the subnet, MTU and network to, for CNI plugins and docker.
    #[arg(
        long,
        env = "FLANNELD_SUBNET_FILE",
        default_value = "/run/flannel/subnet.env",
        value_name = "FILE",
        global = true
    )]
    pub subnet_file: PathBuf,

    /// Network configuration for stores that hold none.
    #[arg(
        long,
        env = "FLANNELD_NET_CONFIG_PATH",
        default_value = "/etc/kube-flannel/net-conf.json",
        value_name = "FILE"
    )]
    pub net_config_path: PathBuf,

    /// Keep leases as files in this directory instead of in etcd.
    #[arg(long, env = "FLANNELD_LEASE_DIR", value_name = "DIR")]
    pub lease_dir: Option<PathBuf>,

    /// etcd endpoints, separated by commas.
    #[arg(
        long,
        env = "FLANNELD_ETCD_ENDPOINTS",
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

    /// Certificate authorities that may sign etcd's certificate (PEM).
    #[arg(long, env = "FLANNELD_ETCD_CAFILE", value_name = "FILE")]
    pub etcd_cafile: Option<PathBuf>,

    /// User name for etcd.
    #[arg(long, env = "FLANNELD_ETCD_USERNAME", value_name = "NAME")]
    pub etcd_username: Option<String>,

    /// Password for etcd.
    #[arg(
        long,
        env = "FLANNELD_ETCD_PASSWORD",
        hide_env_values = true,
        value_name = "PASSWORD"
    )]
    pub etcd_password: Option<String>,

    /// Minutes before its end at which the lease in etcd is renewed, 1 to 1439.
    #[arg(
        long,
        env = "FLANNELD_SUBNET_LEASE_RENEW_MARGIN",
        default_value_t = 60,
        value_parser = clap::value_parser!(u16).range(1..=1439),
        value_name = "MINUTES"
    )]
    pub subnet_lease_renew_margin: u16,

    /// Which data path: eBPF where possible, eBPF or nothing, or the kernel's vxlan device alone.
    #[arg(long, env = "FLANNELD_DATAPATH", value_enum, default_value_t = DatapathChoice::Auto)]
    pub datapath: DatapathChoice,

    /// What carries the name flannel.<VNI>: the kernel's vxlan device where there is one, or a veth pair and eBPF alone.
    #[arg(long, env = "FLANNELD_BPF_DEVICE", value_enum, default_value_t = DeviceChoice::Auto)]
    pub bpf_device: DeviceChoice,

    /// How eBPF programs are attached.
    #[arg(long, env = "FLANNELD_BPF_ATTACH", value_enum, default_value_t = AttachChoice::Auto)]
    pub bpf_attach: AttachChoice,

    /// Log verbosity: 0 for changes, 1 for plans, 2 and more for everything.
    #[arg(
        short = 'v',
        long = "v",
        env = "FLANNELD_V",
        default_value_t = 0,
        value_name = "LEVEL",
        global = true
    )]
    pub verbosity: u8,
}

/// What to do instead of running the daemon.
#[derive(Clone, Copy, Debug, Subcommand)]
pub enum Command {
    /// Shows what carries this node's traffic; works while the daemon is down.
    Status {
        /// Form of the answer.
        #[arg(short, long, value_enum, default_value_t = Output::Table)]
        output: Output,
    },
    /// Lists the other nodes as the data path knows them; works while the daemon is down.
    Peers {
        /// Form of the answer.
        #[arg(short, long, value_enum, default_value_t = Output::Table)]
        output: Output,
    },
    /// Removes what the agent made on this node: device, programs, maps, files. Nothing else does.
    Cleanup {
        /// Only say what would be removed.
        #[arg(long)]
        dry_run: bool,
        /// Also remove the device of this VNI when no trace of an agent says which it was.
        #[arg(long, value_name = "VNI")]
        vni: Option<u32>,
        /// Even while an agent is running, which will make it all again.
        #[arg(long)]
        force: bool,
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
    /// eBPF where it is possible and permitted, else the kernel's device.
    Auto,
    /// eBPF, or fail.
    Bpf,
    /// The kernel's device alone.
    Kernel,
}

/// `--bpf-device`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DeviceChoice {
    /// A vxlan device, or a veth pair where the kernel has none.
    Auto,
    /// A vxlan device, or fail.
    Vxlan,
    /// A veth pair: eBPF alone.
    Veth,
}

/// `--bpf-attach`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum AttachChoice {
    /// tcx where the kernel has it.
    Auto,
    /// tcx links.
    Tcx,
    /// Filters on a clsact qdisc.
    Clsact,
}

impl Args {
    /// Finds flags that exclude each other.
    pub fn check(&self) -> Result<(), &'static str> {
        if self.datapath == DatapathChoice::Kernel && self.bpf_device == DeviceChoice::Veth {
            return Err(
                "--bpf-device=veth needs eBPF, which --datapath=kernel forbids: leave out one of the two",
            );
        }
        Ok(())
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

/// Rewrites Go-style `-flag` arguments to the `--flag` form that clap reads.
pub fn normalize_go_flags(args: impl IntoIterator<Item = String>) -> Vec<String> {
    let mut out = Vec::new();
    let mut done = false;
    for (i, arg) in args.into_iter().enumerate() {
        done |= arg == "--";
        let name = arg.strip_prefix('-').filter(|rest| !rest.starts_with('-'));
        // `-v=4` and `-ojson` are clap's own; only longer names are Go's.
        let long = name
            .and_then(|name| name.split('=').next())
            .is_some_and(|name| name.len() > 1);
        let short_with_value = name.is_some_and(|name| {
            let mut chars = name.chars();
            matches!(chars.next(), Some('v' | 'o'))
                && chars.next().is_some_and(|c| {
                    c.is_ascii_digit() || name.starts_with("ojson") || name.starts_with("otable")
                })
        });
        out.push(if i > 0 && !done && long && !short_with_value {
            format!("-{arg}")
        } else {
            arg
        });
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    fn parse(args: &[&str]) -> Result<Args, clap::Error> {
        let args = std::iter::once("flannel-agent")
            .chain(args.iter().copied())
            .map(str::to_owned);
        Args::try_parse_from(normalize_go_flags(args))
    }

    #[test]
    fn definition_is_sound() {
        Args::command().debug_assert();
    }

    #[test]
    fn go_spelling_is_read() {
        let args =
            parse(&["-iface=eth1", "-iface", "eth2", "-etcd-prefix=/net", "-v=2"]).expect("parse");
        assert_eq!(args.iface, ["eth1", "eth2"]);
        assert_eq!(args.etcd_prefix, "/net");
        assert_eq!(args.verbosity, 2);
    }

    #[test]
    fn short_flags_survive() {
        assert_eq!(parse(&["-v", "1"]).expect("parse").verbosity, 1);
        assert_eq!(parse(&["-v1"]).expect("parse").verbosity, 1);
        let args = parse(&["status", "-o", "json"]).expect("parse");
        assert!(matches!(
            args.command,
            Some(Command::Status {
                output: Output::Json
            })
        ));
    }

    #[test]
    fn unknown_flags_and_bad_values_are_errors() {
        for bad in [
            &["--no-such-flag"][..],
            &["--public-ip=10.0.0"],
            &["--datapath=fast"],
            &["--subnet-lease-renew-margin=0"],
        ] {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn directory_beats_etcd() {
        assert!(matches!(
            parse(&["--lease-dir=/x"]).expect("parse").store(),
            StoreConfig::Dir(_)
        ));
        assert!(matches!(
            parse(&[]).expect("parse").store(),
            StoreConfig::Etcd(_)
        ));
    }
}
