//! Flags about what others read of the agent: health endpoints and log lines.

use std::net::{IpAddr, SocketAddr};

use clap::{Args as Group, ValueEnum};

use super::boolean;

/// Flags about health endpoints and logs.
#[derive(Clone, Debug, Group)]
#[command(next_help_heading = super::SERVING)]
pub struct ServingArgs {
    /// Address to serve /healthz and /readyz at.
    #[arg(
        long,
        env = "FLANNELD_HEALTHZ_IP",
        default_value = "0.0.0.0",
        value_name = "IP"
    )]
    pub healthz_ip: IpAddr,

    /// Port to serve /healthz and /readyz at; 0 is not to.
    #[arg(
        long,
        env = "FLANNELD_HEALTHZ_PORT",
        default_value_t = 0,
        value_name = "PORT"
    )]
    pub healthz_port: u16,

    /// Address and port to serve /metrics at, such as 127.0.0.1:9476 or [::]:9476. Default: not to.
    #[arg(long, env = "FLANNELD_METRICS_ADDR", value_name = "IP:PORT")]
    pub metrics_addr: Option<SocketAddr>,

    /// Serve figures of each peer of the backend wireguard at /metrics, too: three series for each on every node.
    #[arg(
        long,
        env = "FLANNELD_METRICS_PEERS",
        num_args = 0..=1,
        require_equals = true,
        default_value_t = false,
        default_missing_value = "true",
        value_parser = boolean,
        action = clap::ArgAction::Set,
        value_name = "BOOL"
    )]
    pub metrics_peers: bool,

    /// Shape of log lines.
    #[arg(long, env = "FLANNELD_LOG_FORMAT", value_enum, default_value_t = LogFormat::Text, value_name = "FORMAT", global = true)]
    pub log_format: LogFormat,
}

impl ServingArgs {
    /// Where to serve health endpoints, if at all.
    pub fn healthz(&self) -> Option<SocketAddr> {
        (self.healthz_port != 0).then(|| SocketAddr::new(self.healthz_ip, self.healthz_port))
    }
}

/// `--log-format`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// Time, level, message and fields.
    Text,
    /// As upstream's: `I0716 00:42:46.596796       1 app.rs:474] message`.
    Klog,
    /// One JSON object a line.
    Json,
}
