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
    addr::{Family, Vni},
    check::{Agent, Network, Observations, Report, Rules, Second, UplinkSeen, judge},
    iface,
    mark::{self, Overlay},
};
use tokio::time::Instant;

use crate::{
    cli::Args,
    dataplane::netlink::{Netlink, NetlinkError},
    fastpath,
    state::{Bare, Mode, State},
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
    let bare = Bare::instead_of(state.as_ref(), &given.subnet_file);
    let bare = bare.ok().flatten();
    // Of another backend's agent nothing is left that is true.
    let state = state.filter(|_| bare.is_none());
    let second = State::read_second(&given.subnet_file).ok().flatten();
    let second = second.filter(|_| state.is_some());
    let known = Known::of(given, state.as_ref(), bare.as_ref());
    let (args, origin) = store::arguments(given, known.store.as_deref(), known.agent.pid);
    let net = Netlink::open()?;
    let survey = net.survey(BRIDGE).await?;
    let uplinks = net.uplinks(&args.wanted()).await?;
    let store = store::look(&args, origin, patience).await;
    let families = store
        .conf()
        .map_or_else(|| vec![Family::V4], |conf| conf.families());
    let [v4, v6] = Family::ALL.map(|family| families.contains(&family));
    let uplink = iface::select(&uplinks.links, &uplinks.routes, &args.wanted(), v4, v6)
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
    let vni = store
        .conf()
        .map(|conf| conf.backend.vxlan.vni)
        .or(state.as_ref().map(|state| state.vni))
        .unwrap_or(Vni::DEFAULT);
    let first = families.first().copied().unwrap_or(Family::V4);
    let of = |family| Overlay { family, vni };
    let mut overlay = overlay::look(&net, &args, state.as_ref(), of(first)).await?;
    if let Some(bare) = &bare {
        overlay.encrypted = overlay::encrypted(&net, bare).await?;
    }
    overlay.bridge.clone_from(&survey.bridge);
    let mut seen = Observations {
        node: node::look(&args, known.agent.pid, first).await,
        sockets: sockets::look(&survey, &overlay.name, &mark::headroom_name(vni)),
        rules: rules(first).await,
        rules_v6: match families.as_slice() {
            [_, second, ..] => Some(rules(*second).await),
            _ => None,
        },
        agent: known.agent,
        network,
        store,
        overlay,
        probes: None,
        second: None,
    };
    overlay::look_at_peers(&net, &mut seen, reach.peers, deadline).await?;
    node::add_reverse(&mut seen);
    // With wireguard and alloc nothing is of one family alone.
    if families.len() > 1 && bare.is_none() {
        let mut overlay = overlay::look(&net, &args, second.as_ref(), of(Family::V6)).await?;
        overlay.bridge.clone_from(&survey.bridge);
        let mut other = Observations {
            overlay,
            probes: None,
            agent: Known::of(given, second.as_ref(), None).agent,
            ..seen.clone()
        };
        overlay::look_at_peers(&net, &mut other, reach.peers, deadline).await?;
        seen.second = Some(Second {
            agent: other.agent,
            overlay: other.overlay,
            probes: other.probes,
        });
    }
    Ok(judge(&seen))
}

/// What the agent has left.
struct Known {
    agent: Agent,
    store: Option<String>,
}

impl Known {
    fn of(args: &Args, state: Option<&State>, bare: Option<&Bare>) -> Self {
        let Some(bare) = bare else {
            return Self {
                agent: agent(args, state, state.filter(|state| state.is_running())),
                store: state.map(|state| state.store.clone()),
            };
        };
        let running = bare.is_running();
        let agent = Agent {
            known: true,
            pid: running.then_some(bare.pid),
            version: Some(bare.version.clone()),
            ours: env!("CARGO_PKG_VERSION"),
            backend: Some(bare.backend),
            mode: Some("kernel"),
            reason: Some(format!("backend {}", bare.backend)),
            problems: bare.problems.iter().filter(|_| running).cloned().collect(),
            file: State::path(&args.subnet_file).display().to_string(),
        };
        Self {
            agent,
            store: Some(bare.store.clone()),
        }
    }
}

fn agent(args: &Args, state: Option<&State>, running: Option<&State>) -> Agent {
    Agent {
        known: state.is_some(),
        pid: running.map(|state| state.pid),
        version: state.map(|state| state.version.clone()),
        ours: env!("CARGO_PKG_VERSION"),
        backend: state.map(State::backend),
        mode: state.map(|state| match state.datapath.mode {
            Mode::Bpf => "bpf",
            Mode::Kernel => "kernel",
        }),
        reason: state.map(|state| state.datapath.reason.clone()),
        problems: running.map_or(Vec::new(), |state| state.problems.clone()),
        file: State::path(&args.subnet_file).display().to_string(),
    }
}

async fn rules(family: Family) -> Rules {
    let listed = fastpath::rules::list(family).await;
    let mut managers = Vec::new();
    let everything: String = [&listed.legacy, &listed.compat, &listed.nft]
        .into_iter()
        .flatten()
        .map(String::as_str)
        .collect();
    let of_ufw = match family {
        Family::V4 => "ufw-before-input",
        Family::V6 => "ufw6-before-input",
    };
    if everything.contains(of_ufw) {
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
