//! The cases, and what they share.

mod acquire;
mod conf;
mod connect;
mod failover;
mod families;
mod keep;
mod outage;

use flannel_agent::leases::{EtcdOptions, StoreConfig};

use crate::{etcd_server::EtcdServer, lease_rig::attrs};

const CONFIG_KEY: &str = "/coreos.com/network/config";
const SUBNETS: &str = "/coreos.com/network/subnets/";

fn options(etcd: &EtcdServer) -> EtcdOptions {
    EtcdOptions {
        endpoints: vec![etcd.url()],
        ..EtcdOptions::default()
    }
}

fn config(etcd: &EtcdServer) -> StoreConfig {
    StoreConfig::Etcd(options(etcd))
}

fn lease_key(name: &str) -> String {
    format!("{SUBNETS}{name}")
}

/// Writes a lease as some other node would, without an etcd lease.
fn put(etcd: &EtcdServer, name: &str, node: u8) {
    etcd.ctl(&["put", &lease_key(name), &attrs(node).to_json()]);
}
