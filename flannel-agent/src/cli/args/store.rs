//! Flags about etcd.

use std::{path::PathBuf, time::Duration};

use clap::{ArgAction, Args as Group};

use crate::leases::{DEFAULT_PREFIX, DEFAULT_TTL, EtcdOptions};

/// Flags about etcd.
#[derive(Clone, Debug, Group)]
#[command(next_help_heading = super::STORE)]
pub struct EtcdArgs {
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
}

impl EtcdArgs {
    /// What the lease store needs to know.
    pub fn options(&self) -> EtcdOptions {
        EtcdOptions {
            endpoints: self.etcd_endpoints.clone(),
            prefix: self.etcd_prefix.clone(),
            keyfile: self.etcd_keyfile.clone(),
            certfile: self.etcd_certfile.clone(),
            cafile: self.etcd_cafile.clone(),
            username: self.etcd_username.clone(),
            password: self.etcd_password.clone(),
            renew_margin: Duration::from_secs(u64::from(self.subnet_lease_renew_margin) * 60),
            ttl: DEFAULT_TTL,
        }
    }
}

fn minutes(text: &str) -> Result<u16, &'static str> {
    text.parse()
        .ok()
        .filter(|minutes| (1..=1439).contains(minutes))
        .ok_or("write a whole number from 1 to 1439")
}
