//! Watching what the flow gate's mode depends on, and publishing what `flannel_core::fastpath` decides.
//!
//! It only looks, but for two kernel settings (see `sysctls`). Whoever acts on the decision is the reconcile loop.

mod devices;
pub(crate) mod netfilter;
pub(crate) mod rules;
mod sysctls;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    time::Duration,
};

use flannel_core::{
    addr::{Family, IfIndex},
    fastpath::{
        Choice, Decision, Device, Firewall, Place, Settled, Signals, Sysctls, decide,
        learning::{Tally, cannot_learn},
    },
    plan::GateMode,
};
use ipnet::IpNet;
use rtnetlink::{Handle, MulticastGroup};
use tokio::{
    sync::{
        mpsc::{self, error::TrySendError},
        watch,
    },
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::{
    dataplane::bpf::Instance,
    state::{Excluded, FastPath},
};

/// How often what costs little is looked at, of which the kernel tells nothing: settings, and generations in case it has not told.
const GLANCE: Duration = Duration::from_secs(1);
/// The same while there are legacy tables, of which it tells nothing either.
const LEGACY_GLANCE: Duration = Duration::from_millis(250);
/// How often everything is read, whatever seems to have changed.
const RESYNC: Duration = Duration::from_secs(10);
/// Changes that come together are looked at together.
const COALESCE: Duration = Duration::from_millis(50);
/// The longest rest after a reading.
const MAX_REST: Duration = Duration::from_secs(2);
/// How long a start waits for the first decision. A restart that took the gate for closed would make every flow prove itself again.
const FIRST: Duration = Duration::from_secs(3);
/// The bridge that flannel's CNI configuration makes: known before the first pod is.
const BRIDGE: &str = "cni0";

/// What the watch needs to know of this node.
#[derive(Debug)]
pub(crate) struct Watch {
    /// What is asked for.
    pub(crate) choice: Choice,
    /// Why the programs cannot run here at all.
    pub(crate) unsupported: Option<String>,
    /// The cluster network. The watch is for its family: where there are both, there are two.
    pub(crate) network: IpNet,
    /// Name of the tunnel device.
    pub(crate) tunnel: String,
    /// Name of the uplink.
    pub(crate) uplink: String,
    /// Where the counters are pinned.
    pub(crate) instance: Option<Instance>,
}

/// The watch as the reconcile loop sees it.
#[derive(Debug)]
pub(crate) struct FastPathWatch {
    /// How the gate is to stand.
    pub(crate) decisions: watch::Receiver<Decision>,
    /// The same and more, for `status`.
    pub(crate) reports: watch::Receiver<FastPath>,
    /// To be told which devices are pods', beside those that show as such by themselves.
    pub(crate) pods: watch::Sender<BTreeSet<IfIndex>>,
}

impl Watch {
    /// Looks once, so that there is a decision, and goes on in a task of its own until cancelled.
    pub(crate) async fn start(self, cancel: CancellationToken) -> FastPathWatch {
        let (pods, pods_out) = watch::channel(BTreeSet::new());
        let mut watching = Watching {
            node: self,
            pods: pods_out,
            handle: connect(),
            seen: Seen::default(),
            firewall: Firewall::default(),
            unlisted: Vec::new(),
            devices: BTreeMap::new(),
            own: BTreeSet::new(),
            tally: None,
            unlearning: None,
            started: Instant::now(),
        };
        let sysctls = sysctls::look(watching.node.sets());
        let first = timeout(FIRST, watching.decide(sysctls.clone())).await;
        let decision = first.unwrap_or_else(|_elapsed| Decision {
            mode: GateMode::Off,
            reason: "the node's rules are still being listed".to_owned(),
            excluded: BTreeMap::new(),
            judged: None,
            fingerprint: 0,
        });
        let (decisions_in, decisions) = watch::channel(decision.clone());
        let report = watching.report(&decision, &sysctls);
        let (reports_in, reports) = watch::channel(report);
        announce(&watching.node, &decision);
        tokio::spawn(async move {
            cancel
                .run_until_cancelled(watching.run(Settled::new(decision), decisions_in, reports_in))
                .await
        });
        FastPathWatch {
            decisions,
            reports,
            pods,
        }
    }

    /// Whether settings are to be written.
    fn sets(&self) -> bool {
        self.choice != Choice::Off && self.unsupported.is_none()
    }

    fn family(&self) -> Family {
        Family::of_net(&self.network)
    }
}

/// What a glance sees: when it is another, everything is read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Seen {
    generation: Option<u32>,
    /// The legacy tables and their shapes; `None` before the first glance.
    legacy: Option<Vec<(String, Option<Vec<u8>>)>>,
    values: Vec<Option<u32>>,
}

impl Seen {
    /// How long until the next glance.
    fn pause(&self) -> Duration {
        match &self.legacy {
            Some(tables) if tables.is_empty() => GLANCE,
            _ => LEGACY_GLANCE,
        }
    }

    /// Whether no rule can have changed without this: another legacy rule of the same size does not show.
    fn is_certain(&self) -> bool {
        self.generation.is_some() && self.legacy.as_ref().is_some_and(Vec::is_empty)
    }
}

#[derive(Debug)]
struct Watching {
    node: Watch,
    pods: watch::Receiver<BTreeSet<IfIndex>>,
    handle: Option<Handle>,
    seen: Seen,
    firewall: Firewall,
    /// Rules that could not be listed.
    unlisted: Vec<String>,
    devices: BTreeMap<IfIndex, Device>,
    own: BTreeSet<IpAddr>,
    tally: Option<Tally>,
    unlearning: Option<String>,
    started: Instant,
}

impl Watching {
    async fn run(
        mut self,
        mut settled: Settled,
        decisions: watch::Sender<Decision>,
        reports: watch::Sender<FastPath>,
    ) {
        if !self.node.sets() {
            // Nothing can change a gate that is not wanted; the channels stay open.
            return std::future::pending().await;
        }
        let (changes_in, mut changes) = mpsc::channel(1);
        tokio::spawn(keep_watching(changes_in));
        let mut last = Instant::now();
        loop {
            let told = tokio::select! {
                () = sleep(self.seen.pause()) => false,
                Some(()) = changes.recv() => true,
                Ok(()) = self.pods.changed() => true,
            };
            if told {
                sleep(COALESCE).await;
                while changes.try_recv().is_ok() {}
            }
            let sysctls = sysctls::look(true);
            let seen = glance(&sysctls, self.node.family());
            if !told && !settled.is_waiting() && seen == self.seen && last.elapsed() < RESYNC {
                continue;
            }
            let begun = Instant::now();
            if last.elapsed() >= RESYNC {
                self.learn();
                if !self.seen.is_certain() || !self.unlisted.is_empty() {
                    self.seen = Seen::default();
                }
                last = begun;
            }
            let next = self.decide(sysctls.clone()).await;
            let now = begun.duration_since(self.started);
            let current = settled.offer(now, next).clone();
            let report = self.report(&current, &sysctls);
            reports.send_if_modified(|old| {
                let changed = *old != report;
                *old = report;
                changed
            });
            decisions.send_if_modified(|old| {
                if *old == current {
                    return false;
                }
                if (old.mode, &old.reason) != (current.mode, &current.reason) {
                    announce(&self.node, &current);
                }
                *old = current;
                true
            });
            // A node with very many rules is not busy reading them.
            sleep((begun.elapsed() * 4).min(MAX_REST)).await;
        }
    }

    /// Reads what has changed, rules only if a glance says so, and decides.
    async fn decide(&mut self, sysctls: Sysctls) -> Decision {
        let mut unlooked = None;
        if self.node.sets() {
            // Before the reading: what changes meanwhile is seen by the next glance.
            let seen = glance(&sysctls, self.node.family());
            if (seen.generation, &seen.legacy) != (self.seen.generation, &self.seen.legacy) {
                (self.firewall, self.unlisted) = rules::read(self.node.family()).await;
            }
            self.seen = seen;
            let looked = match &self.handle {
                Some(handle) => {
                    let pods = self.pods.borrow_and_update().clone();
                    devices::look(handle, self.node.network, &self.node.tunnel, &pods).await
                }
                None => Err("there is no netlink socket".to_owned()),
            };
            match looked {
                Ok((devices, own)) => (self.devices, self.own) = (devices, own),
                Err(error) => unlooked = Some(format!("traffic control cannot be read: {error}")),
            }
        }
        let mut names: BTreeSet<String> = self
            .devices
            .values()
            .map(|device| device.name.clone())
            .collect();
        names.insert(self.node.tunnel.clone());
        names.insert(BRIDGE.to_owned());
        let signals = Signals {
            unsupported: self.node.unsupported.clone(),
            place: Place {
                network: self.node.network,
                devices: names,
                own: self.own.clone(),
                uplink: self.node.uplink.clone(),
            },
            sysctls,
            firewall: self.firewall.clone(),
            devices: self.devices.clone(),
            unreadable: self.unlisted.iter().cloned().chain(unlooked).collect(),
        };
        decide(self.node.choice, &signals)
    }

    /// Looks at the gate's counters.
    fn learn(&mut self) {
        let totals = self
            .node
            .instance
            .as_ref()
            .and_then(|instance| instance.totals().ok());
        let now = totals.map(|totals| Tally {
            tagged: totals.gate_tagged,
            confirmed: totals.gate_confirmed,
        });
        if let (Some(before), Some(now)) = (self.tally, now) {
            let found = cannot_learn(before, now, &self.devices);
            if let Some(problem) = &found
                && self.unlearning.is_none()
            {
                tracing::warn!("{problem}");
            }
            // An interval without traffic tells nothing.
            if found.is_some() || now.confirmed > before.confirmed {
                self.unlearning = found;
            }
        }
        self.tally = now;
    }

    fn report(&self, decision: &Decision, sysctls: &Sysctls) -> FastPath {
        let name = |index: &IfIndex| {
            self.devices
                .get(index)
                .map_or_else(|| index.to_string(), |device| device.name.clone())
        };
        FastPath {
            wanted: self.node.choice,
            mode: decision.mode,
            reason: decision.reason.clone(),
            excluded: decision
                .excluded
                .iter()
                .map(|(index, reason)| Excluded {
                    interface: name(index),
                    reason: reason.clone(),
                })
                .collect(),
            sysctls: sysctls
                .all()
                .into_iter()
                .map(|sysctl| (format!("net.netfilter.{}", sysctl.name), sysctl.value))
                .collect(),
            problems: self.unlearning.iter().cloned().collect(),
        }
    }
}

/// Says how the gate stands: a warning where somebody asked for more.
fn announce(node: &Watch, decision: &Decision) {
    let Decision { mode, reason, .. } = decision;
    let (wanted, family) = (node.choice, node.family());
    let less = match wanted {
        Choice::Auto | Choice::Off => false,
        Choice::Established => *mode < GateMode::Established,
        Choice::Syn => *mode < GateMode::Syn,
    };
    if less {
        tracing::warn!(%family, %wanted, %mode, reason, "fast path");
    } else {
        tracing::info!(%family, %wanted, %mode, reason, "fast path");
    }
}

fn glance(sysctls: &Sysctls, family: Family) -> Seen {
    let shape_of = |table: String| {
        let shape = netfilter::legacy_shape(&table, family);
        (table, shape.map(Vec::from))
    };
    Seen {
        generation: netfilter::generation(),
        legacy: Some(
            rules::legacy_tables(family)
                .into_iter()
                .map(shape_of)
                .collect(),
        ),
        values: sysctls.all().map(|sysctl| sysctl.value).into(),
    }
}

fn connect() -> Option<Handle> {
    match rtnetlink::new_connection() {
        Ok((connection, handle, _)) => {
            tokio::spawn(connection);
            Some(handle)
        }
        Err(error) => {
            tracing::warn!(%error, "open a netlink socket for traffic control");
            None
        }
    }
}

/// Passes on that rules, devices or their traffic control have changed. Without notifications the glances have to do.
async fn keep_watching(out: mpsc::Sender<()>) {
    let rules = async {
        if let Err(error) = netfilter::watch(out.clone()).await {
            tracing::debug!(%error, "watch the nftables rules");
        }
    };
    tokio::join!(rules, watch_devices(&out));
}

async fn watch_devices(out: &mpsc::Sender<()>) {
    use futures_util::StreamExt as _;
    match rtnetlink::new_multicast_connection(&[MulticastGroup::Tc, MulticastGroup::Link]) {
        Ok((connection, _handle, mut messages)) => {
            tokio::spawn(connection);
            while messages.next().await.is_some() {
                // A full channel already says what there is to say.
                if let Err(TrySendError::Closed(())) = out.try_send(()) {
                    break;
                }
            }
        }
        Err(error) => tracing::debug!(%error, "watch devices"),
    }
}
