//! `flannel-agent status`: what carries this node's traffic, read from the kernel and the pinned maps.

mod bare;
mod overlay;
mod print;

use std::collections::BTreeMap;

use anyhow::Context as _;
use flannel_common::Counter;
use flannel_core::{config::BackendKind, fastpath::Choice, plan::GateMode, xdp};
use serde::Serialize;

use super::{
    Args, Output,
    features::{self as findings, Row, Standing},
    table,
};
use crate::state::{Bare, Excluded, Mode, State};

#[derive(Debug, Serialize)]
struct Status {
    /// Whether the data path is in place.
    ok: bool,
    agent: Agent,
    /// How packets travel between nodes; `None` before an agent has run.
    backend: Option<BackendKind>,
    datapath: Option<Path>,
    /// The way that packets are carried, and why no other; `None` before an agent has run.
    standing: Option<Standing>,
    /// What the agent has found out about kernel and permissions; empty before an agent has.
    features: Vec<Row>,
    #[serde(skip_serializing_if = "Option::is_none")]
    lease: Option<LeaseInfo>,
    device: Option<DeviceInfo>,
    /// Peers on the link, to which packets go without a tunnel.
    #[serde(skip_serializing_if = "Option::is_none")]
    routes: Option<RoutesInfo>,
    /// The encrypted overlay.
    #[serde(skip_serializing_if = "Option::is_none")]
    wireguard: Option<WireguardInfo>,
    counters: Option<Counters>,
    fast_path: Option<FastPathInfo>,
    problems: Vec<String>,
    /// The overlay of IPv6 of a node that has one of IPv4 too.
    #[serde(skip_serializing_if = "Option::is_none")]
    ipv6: Option<Box<Self>>,
}

#[derive(Debug, Serialize)]
struct Agent {
    running: bool,
    pid: Option<u32>,
    version: Option<String>,
}

#[derive(Debug, Serialize)]
struct Path {
    mode: Mode,
    reason: String,
    attach: Option<String>,
    attached: Vec<&'static str>,
    xdp: Option<XdpInfo>,
}

/// How native XDP stands.
#[derive(Debug, Serialize)]
struct XdpInfo {
    wanted: xdp::Choice,
    standing: xdp::Standing,
    attached: bool,
    reason: String,
}

#[derive(Debug, Serialize)]
struct LeaseInfo {
    subnet: Option<String>,
    network: String,
    public_ip: String,
    uplink: String,
    mtu: u32,
    store: String,
    store_connected: bool,
}

#[derive(Debug, Serialize)]
struct DeviceInfo {
    name: String,
    kind: &'static str,
    index: u32,
    mac: String,
    mtu: u32,
    up: bool,
    peers: usize,
}

#[derive(Debug, Serialize)]
struct RoutesInfo {
    interface: String,
    peers: usize,
}

#[derive(Debug, Serialize)]
struct WireguardInfo {
    /// Which families a device carries.
    mode: Option<String>,
    public_key: Option<String>,
    devices: Vec<WireguardDevice>,
}

#[derive(Debug, Serialize)]
struct WireguardDevice {
    name: String,
    mtu: u32,
    up: bool,
    /// `None` where WireGuard does not tell, for want of a privilege.
    port: Option<u16>,
    peers: Option<usize>,
    /// Peers with a session that carries packets now.
    peers_alive: Option<usize>,
}

#[derive(Debug, Serialize)]
struct Counters {
    encap: Count,
    decap: Count,
    /// Those of `decap` that native XDP has stripped.
    xdp: Count,
    /// Packets left to the kernel's device, or dropped where there is none, by direction and reason.
    not_carried: Vec<NotCarried>,
}

#[derive(Debug, Serialize)]
struct Count {
    packets: u64,
    bytes: u64,
}

#[derive(Debug, Serialize)]
struct NotCarried {
    direction: &'static str,
    reason: &'static str,
    packets: u64,
}

/// How the flow gate stands.
#[derive(Debug, Serialize)]
struct FastPathInfo {
    wanted: Choice,
    mode: GateMode,
    reason: String,
    /// Pods that packets are handed to directly.
    pods: usize,
    excluded: Vec<Excluded>,
    counters: FastCounters,
    sysctls: BTreeMap<String, Option<u32>>,
}

/// Packets, those of the gate without bytes.
#[derive(Debug, Serialize)]
struct FastCounters {
    encap: Count,
    decap: Count,
    local: Count,
    /// To and from nodes on the same link, without outer headers.
    routed_out: Count,
    routed_in: Count,
    tagged: u64,
    confirmed: u64,
    refuted: u64,
    admitted: u64,
}

impl From<Counter> for Count {
    fn from(counter: Counter) -> Self {
        Self {
            packets: counter.packets,
            bytes: counter.bytes,
        }
    }
}

/// Prints the status. False when there is no working data path.
pub(super) async fn run(args: &Args, output: Output, features: bool) -> anyhow::Result<bool> {
    let status = collect(args).await?;
    match output {
        Output::Json => table::line(&serde_json::to_string_pretty(&status)?),
        Output::Table => {
            print::status(&status);
            if let Some(second) = &status.ipv6 {
                table::line("");
                print::status(second);
            }
            if features {
                findings::print(&status.features);
            }
        }
    }
    Ok(status.ok)
}

/// The overlay of this node, and inside it that of IPv6 beside that of IPv4.
async fn collect(args: &Args) -> anyhow::Result<Status> {
    let read = || format!("read {}", State::path(&args.subnet_file).display());
    let first = State::read(&args.subnet_file).with_context(read)?;
    if let Some(bare) = Bare::instead_of(first.as_ref(), &args.subnet_file).with_context(read)? {
        return bare::collect(&bare).await;
    }
    let second = State::read_second(&args.subnet_file).with_context(read)?;
    let mut status = overlay::collect(args, first).await?;
    if let Some(second) = second {
        let second = overlay::collect(args, Some(second)).await?;
        status.ok &= second.ok;
        status.ipv6 = Some(Box::new(second));
    }
    Ok(status)
}

const NOT_RUNNING: &str =
    "the agent is not running: traffic goes on, changes in the cluster are not followed";
