//! `flannel-agent check`: looking at a node, without changing anything on it. `flannel_core::check` judges.
//!
//! What cannot be looked at is part of the answer, never an error: a node that is broken is what this is for.

mod icmp;
mod node;
mod overlay;
mod probe;
mod sockets;
mod store;

use std::time::Duration;

use flannel_core::{
    addr::Vni,
    check::{Agent, Network, Observations, Report, Rules, UplinkSeen, judge, targets},
    iface, mark,
};
use tokio::time::Instant;

use crate::{
    cli::Args,
    dataplane::netlink::{Netlink, NetlinkError},
    fastpath,
    state::{Mode, State},
    telemetry::chain,
};

/// The bridge that the CNI plugin makes.
const BRIDGE: &str = "cni0";

/// How far to look.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reach {
    /// Whether to send packets to other nodes.
    pub(crate) peers: bool,
    /// How long everything that waits for others may take.
    pub(crate) timeout: Duration,
}

/// Looks and judges.
pub(crate) async fn run(given: &Args, reach: Reach) -> Result<Report, NetlinkError> {
    // A store that is silent to the end must leave time for the peers.
    let patience = Instant::now() + reach.timeout / 2;
    let deadline = Instant::now() + reach.timeout;
    let state = State::read(&given.subnet_file).ok().flatten();
    let running = state.as_ref().filter(|state| state.is_running());
    let (args, origin) = store::arguments(given, state.as_ref(), running);
    let net = Netlink::open()?;
    let survey = net.survey(BRIDGE).await?;
    let uplinks = net.uplinks(&args.wanted()).await?;
    let uplink = iface::select(&uplinks.links, &uplinks.routes, &args.wanted(), true, false)
        .map(|chosen| UplinkSeen {
            chosen,
            asked_for: !args.uplink.iface.is_empty()
                || !args.uplink.iface_regex.is_empty()
                || args.uplink.iface_can_reach.is_some()
                || args.uplink.public_ip.is_some(),
        })
        .map_err(|error| chain(&error));
    let network = Network {
        uplink,
        links: uplinks.links,
        defaults: survey.defaults.clone(),
    };
    let store = store::look(&args, origin, patience).await;
    let vni = store
        .conf()
        .map(|conf| conf.backend.vxlan.vni)
        .or(state.as_ref().map(|state| state.vni))
        .unwrap_or(Vni::DEFAULT);
    let agent = agent(given, state.as_ref(), running);
    let mut overlay = overlay::look(&net, &args, state.as_ref(), mark::device_name(vni)).await?;
    overlay.bridge.clone_from(&survey.bridge);
    let mut seen = Observations {
        node: node::look(&args, running.map(|state| state.pid)).await,
        sockets: sockets::look(&survey, &overlay.name, &mark::headroom_name(vni)),
        rules: rules().await,
        agent,
        network,
        store,
        overlay,
        probes: None,
    };
    let peers = targets(&seen);
    overlay::add_paths(&net, &mut seen, peers.keys().copied()).await?;
    node::add_reverse(&mut seen);
    if reach.peers {
        let mtu = seen.overlay.device.as_ref().map(|device| device.mtu);
        seen.probes = Some(probe::all(&peers, mtu, deadline).await);
    }
    Ok(judge(&seen))
}

fn agent(args: &Args, state: Option<&State>, running: Option<&State>) -> Agent {
    Agent {
        known: state.is_some(),
        pid: running.map(|state| state.pid),
        version: state.map(|state| state.version.clone()),
        ours: env!("CARGO_PKG_VERSION"),
        mode: state.map(|state| match state.datapath.mode {
            Mode::Bpf => "bpf",
            Mode::Kernel => "kernel",
        }),
        reason: state.map(|state| state.datapath.reason.clone()),
        problems: running.map_or(Vec::new(), |state| state.problems.clone()),
        file: State::path(&args.subnet_file).display().to_string(),
    }
}

async fn rules() -> Rules {
    let listed = fastpath::rules::list().await;
    let mut managers = Vec::new();
    let everything: String = [&listed.legacy, &listed.compat, &listed.nft]
        .into_iter()
        .flatten()
        .map(String::as_str)
        .collect();
    if everything.contains("ufw-before-input") {
        managers.push("ufw");
    }
    if everything.contains("\"firewalld\"") || everything.contains("INPUT_ZONES") {
        managers.push("firewalld");
    }
    Rules {
        legacy: listed.legacy,
        compat: listed.compat,
        nft: listed.nft,
        unreadable: listed.unreadable,
        managers,
    }
}
