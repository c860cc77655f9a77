//! The loop of the encrypted overlay: look, plan, change, until there is nothing left to change.
//!
//! Level-triggered: a new view of the leases, a notification of the kernel and a tick only say "look again".

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use flannel_core::{
    addr::{Family, Mtu},
    config::{BackendKind, NetConf},
    iface::Uplink,
    key::{PublicKey, SecretKey},
    lease::SubnetKey,
    mark,
    plan::PeerProblem,
    subnet_env::SubnetEnv,
    wireguard::{Desired, Op, Peer, Place, desired, plan},
};
use ipnet::IpNet;
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, MissedTickBehavior, interval, sleep},
};
use tokio_util::sync::CancellationToken;

use super::{Kernel, WireguardError, kernel::told};
use crate::{
    cli::Args,
    dataplane::netlink::{self, Change},
    files,
    health::{Board, Part, Pulse},
    leases::View,
    metrics::Metrics,
    state::{Bare, BareFile},
    telemetry::{chain, one_line},
};

/// How often the devices are looked at, whatever the notifications said: of peers there are none.
const TICK: Duration = Duration::from_secs(2);
/// The same for each peer.
const TICK_OF_PEER: Duration = Duration::from_millis(5);
/// Events that come together are answered together.
const COALESCE: Duration = Duration::from_millis(50);
/// The longest rest after a look that took long.
const MAX_REST: Duration = Duration::from_secs(1);
/// A plan that is not empty after so many passes is tried again at the next tick.
const MAX_PASSES: usize = 4;
/// How long a peer stays after its lease is gone: one that was written by delete and create is back within moments.
const GRACE: Duration = Duration::from_millis(700);
/// Notifications that may wait.
const BACKLOG: usize = 256;
/// How long a lost notification socket stays closed.
const REOPEN: Duration = Duration::from_secs(1);

/// What the devices are made from.
#[derive(Clone, Debug)]
pub(crate) struct Site {
    pub(crate) conf: NetConf,
    pub(crate) uplink: Uplink,
    pub(crate) private: SecretKey,
    pub(crate) mtu: Mtu,
    /// Networks that an earlier start had, from `subnet.env`.
    pub(crate) former: BTreeSet<IpNet>,
}

impl Site {
    fn place(&self, public: Option<PublicKey>) -> Place<'_> {
        Place {
            conf: &self.conf,
            private: &self.private,
            public,
            mtu: self.mtu,
            v4: self.uplink.local_v4(),
            v6: self.uplink.local_v6(),
            former: self.former.clone(),
        }
    }

    /// Makes or adopts the devices, without peers, and gives the public key that the kernel has computed.
    pub(crate) async fn bring_up(&self, kernel: &mut Kernel) -> Result<PublicKey, WireguardError> {
        let (desired, _) = desired(&self.place(None), None, None);
        let plan = plan(&desired, &kernel.observe().await?);
        if let Some(problem) = plan.problems.into_iter().next() {
            return Err(WireguardError::InTheWay(problem));
        }
        let mut made = Vec::new();
        for op in &plan.ops {
            if let Err(error) = kernel.apply(op).await {
                // Nothing of a start that failed stays on the node.
                for device in made {
                    if let Err(error) = kernel.apply(&Op::DeleteDevice { device }).await {
                        tracing::warn!(error = told(&error), "take back what was made");
                    }
                }
                return Err(error);
            }
            tracing::info!("{op}");
            if let Op::CreateDevice { device, .. } = op {
                made.push(device.clone());
            }
        }
        let seen = kernel.observe().await?;
        let device = desired.tunnels.keys().next();
        let device = device.and_then(|name| seen.devices.get(name));
        let inner = device.and_then(|device| device.inner.as_ref());
        inner
            .and_then(|inner| inner.public)
            .ok_or_else(|| WireguardError::Gone {
                what: "read the public key".into(),
                device: mark::WIREGUARD_DEVICE.into(),
            })
    }
}

/// The one owner of the devices.
#[derive(Debug)]
pub(crate) struct Keeper<'a> {
    args: &'a Args,
    site: &'a Site,
    kernel: &'a mut Kernel,
    public: PublicKey,
    origin: String,
    views: watch::Receiver<View>,
    board: Board,
    pulse: Pulse,
    metrics: Metrics,
    desired: Desired,
    own: Option<SubnetKey>,
    connected: bool,
    /// Peers whose lease is gone, by device and key, and until when they stay.
    leaving: BTreeMap<(String, PublicKey), (Peer, Instant)>,
    peer_problems: Vec<PeerProblem>,
    said: BTreeSet<String>,
    written: Option<String>,
    file_trouble: Option<String>,
    state: BareFile,
    announced: bool,
}

impl<'a> Keeper<'a> {
    pub(crate) fn new(
        args: &'a Args,
        site: &'a Site,
        (kernel, public): (&'a mut Kernel, PublicKey),
        origin: String,
        views: watch::Receiver<View>,
        (board, pulse, metrics): (Board, Pulse, Metrics),
    ) -> Self {
        Self {
            args,
            site,
            kernel,
            public,
            origin,
            views,
            board,
            pulse,
            metrics,
            desired: Desired::default(),
            own: None,
            connected: false,
            leaving: BTreeMap::new(),
            peer_problems: Vec::new(),
            said: BTreeSet::new(),
            written: None,
            file_trouble: None,
            state: BareFile::default(),
            announced: false,
        }
    }

    /// Runs until cancelled. Leaves everything in place then.
    pub(crate) async fn run(mut self, cancel: CancellationToken) {
        let (notify, mut changes) = mpsc::channel(BACKLOG);
        // Watch first, look second: what changes in between is not lost.
        let watchers = Family::ALL.map(|family| tokio::spawn(watch_kernel(notify.clone(), family)));
        drop(notify);
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        self.take_view();
        let mut last = Instant::now();
        loop {
            let begun = Instant::now();
            self.pulse.beat();
            self.converge().await;
            let rest = COALESCE.max(begun.elapsed() * 4).min(MAX_REST);
            let due = loop {
                let leaving = self.leaving.values().map(|(_, end)| *end).min();
                tokio::select! {
                    () = cancel.cancelled() => break false,
                    changed = self.views.changed() => {
                        if changed.is_err() {
                            // The lease store's task is gone only while we are stopping.
                            cancel.cancelled().await;
                            break false;
                        }
                        break true;
                    }
                    Some(change) = changes.recv() => {
                        if concerns_us(&change) {
                            break true;
                        }
                    }
                    () = at(leaving) => break true,
                    _ = tick.tick() => {
                        self.pulse.beat();
                        if last.elapsed() >= self.period() {
                            break true;
                        }
                    }
                }
            };
            if !due {
                break;
            }
            if cancel.run_until_cancelled(sleep(rest)).await.is_none() {
                break;
            }
            while changes.try_recv().is_ok() {}
            self.take_view();
            last = Instant::now();
        }
        self.pulse.rest();
        for watcher in watchers {
            watcher.abort();
        }
    }

    fn peers(&self) -> usize {
        let peers = self
            .desired
            .tunnels
            .values()
            .map(|tunnel| tunnel.peers.as_ref().map_or(0, BTreeMap::len));
        peers.max().unwrap_or(0)
    }

    fn period(&self) -> Duration {
        let peers = u32::try_from(self.peers()).unwrap_or(u32::MAX);
        TICK.max(TICK_OF_PEER.saturating_mul(peers))
    }

    /// Turns the newest view of the leases into what is desired.
    fn take_view(&mut self) {
        let view = self.views.borrow_and_update().clone();
        self.connected = view.connected;
        if let Some(own) = &view.own {
            self.own = Some(own.key);
        }
        let leases = view.snapshot.as_ref().map(|snapshot| &snapshot.leases);
        // Without an own lease nobody can tell which of the others is this node's.
        let leases = leases.filter(|_| self.own.is_some());
        let place = self.site.place(Some(self.public));
        let (mut new, problems) = desired(&place, self.own.as_ref(), leases);
        for problem in &problems {
            if !self.peer_problems.contains(problem) {
                tracing::warn!("{problem}: ignored");
            }
        }
        self.peer_problems = problems;
        self.keep_the_leaving(&mut new);
        self.desired = new;
    }

    /// Peers that have just left stay for a moment, unless another one has taken their place.
    fn keep_the_leaving(&mut self, new: &mut Desired) {
        let now = Instant::now();
        for (name, tunnel) in &self.desired.tunnels {
            for (key, peer) in tunnel.peers.iter().flatten() {
                let entry = self.leaving.entry((name.clone(), *key));
                entry.or_insert_with(|| (peer.clone(), now + GRACE));
            }
        }
        self.leaving.retain(|(name, key), (peer, end)| {
            let tunnel = new.tunnels.get_mut(name);
            let Some(peers) = tunnel.and_then(|tunnel| tunnel.peers.as_mut()) else {
                return false;
            };
            let taken = peers.contains_key(key)
                || peers
                    .values()
                    .any(|other| !other.allowed.is_disjoint(&peer.allowed));
            *end > now && !taken
        });
        for ((name, key), (peer, _)) in &self.leaving {
            let tunnel = new.tunnels.get_mut(name);
            if let Some(peers) = tunnel.and_then(|tunnel| tunnel.peers.as_mut()) {
                peers.insert(*key, peer.clone());
            }
        }
    }

    async fn converge(&mut self) {
        let mut troubles = BTreeSet::new();
        let mut done = false;
        'passes: for _pass in 0..MAX_PASSES {
            let seen = match self.kernel.observe().await {
                Ok(seen) => seen,
                Err(error) => {
                    troubles.insert(format!("look at the kernel: {}", told(&error)));
                    break;
                }
            };
            let plan = plan(&self.desired, &seen);
            troubles.extend(plan.problems);
            if plan.ops.is_empty() {
                done = true;
                break;
            }
            for op in &plan.ops {
                self.pulse.beat();
                match self.kernel.apply(op).await {
                    Ok(()) => tracing::info!("{op}"),
                    Err(error) => {
                        troubles.insert(told(&error));
                        break 'passes;
                    }
                }
            }
        }
        if !done && troubles.is_empty() {
            troubles.insert(format!(
                "the node is not as it should be after {MAX_PASSES} attempts"
            ));
        }
        self.report(&troubles, done);
        self.save_state(&troubles);
    }

    fn report(&mut self, troubles: &BTreeSet<String>, done: bool) {
        for trouble in troubles.difference(&self.said) {
            tracing::warn!("{trouble}");
        }
        if troubles.is_empty() && !self.said.is_empty() {
            tracing::info!("the encrypted overlay is as it should be again");
        }
        self.said.clone_from(troubles);
        let known = self
            .desired
            .tunnels
            .values()
            .all(|tunnel| tunnel.peers.is_some());
        if !troubles.is_empty() {
            let all: Vec<&str> = troubles.iter().map(String::as_str).collect();
            self.board.lack(Part::Datapath, all.join("; "));
        } else if !known {
            self.board.lack(
                Part::Datapath,
                "the lease store has not told the other nodes yet",
            );
        } else {
            self.board.settle(Part::Datapath);
        }
        let subnets: Vec<String> = self.subnets().iter().map(ToString::to_string).collect();
        self.board.summarize(format!(
            "{} peers, datapath wireguard, subnet {}",
            self.peers(),
            subnets.join(" ")
        ));
        if done && known {
            self.become_ready();
        }
    }

    fn subnets(&self) -> Vec<IpNet> {
        let own = self.own.as_ref();
        let v4 = own.and_then(|own| own.v4).map(IpNet::V4);
        let v6 = own.and_then(|own| own.v6).map(IpNet::V6);
        v4.into_iter().chain(v6).collect()
    }

    /// Writes `subnet.env` when it is due.
    fn become_ready(&mut self) {
        let (conf, own) = (&self.site.conf, self.own.as_ref());
        let env = SubnetEnv {
            network: conf.ipv4.map(|family| family.network),
            subnet: own.and_then(|own| own.v4),
            ipv6_network: conf.ipv6.map(|family| family.network),
            ipv6_subnet: own.and_then(|own| own.v6),
            mtu: self.site.mtu.get(),
            ip_masq: self.args.firewall.ip_masq,
        };
        let text = env.render();
        let file = &self.args.subnet_file;
        // Pods cannot be started without it: it is put back when somebody has emptied /run.
        if self.written.as_ref() != Some(&text) || !file.exists() {
            if let Err(error) = files::replace(file, &text) {
                let trouble = chain(&error);
                self.board.lack(Part::SubnetFile, trouble.as_str());
                if self.file_trouble.as_ref() != Some(&trouble) {
                    tracing::error!("Failed to write subnet file: {trouble}");
                    self.file_trouble = Some(trouble);
                }
                return;
            }
            tracing::info!(
                "Wrote subnet file to {}",
                one_line(&file.display().to_string())
            );
            self.written = Some(text);
            self.file_trouble = None;
        }
        self.board.settle(Part::SubnetFile);
        if !self.announced {
            self.announced = true;
            tracing::info!(datapath = "wireguard", "flannel is ready");
            tracing::info!("Running backend.");
            tracing::info!("watching for new subnet leases");
        }
    }

    fn save_state(&mut self, troubles: &BTreeSet<String>) {
        let (conf, uplink) = (&self.site.conf, &self.site.uplink);
        let peers = self.peer_problems.iter().map(ToString::to_string);
        let tunnels = &self.desired.tunnels;
        let public_ips = conf.families().into_iter();
        let state = Bare {
            backend: BackendKind::Wireguard,
            version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
            devices: tunnels.keys().cloned().collect(),
            mode: Some(conf.backend.wireguard.mode.as_str().into()),
            uplink: uplink.name.clone(),
            public_ips: public_ips
                .filter_map(|family| uplink.public(family))
                .collect(),
            public_key: Some(self.public.to_string()),
            networks: tunnels
                .values()
                .flat_map(|tunnel| tunnel.networks.iter().copied())
                .collect(),
            subnets: self.subnets(),
            mtu: self.site.mtu.get(),
            store: self.origin.clone(),
            store_connected: self.connected,
            problems: troubles.iter().cloned().chain(peers).collect(),
            subnet_file: self.args.subnet_file.clone(),
            blackhole: self.args.firewall.ip_blackhole_route,
        };
        self.metrics.know_bare(self.peers(), &state);
        self.state.save(state);
    }
}

/// Whether a notification can be about our devices, or about the way to their peers.
fn concerns_us(change: &Change) -> bool {
    match change {
        Change::Link(link) => link
            .name
            .as_deref()
            .is_none_or(|name| [mark::WIREGUARD_DEVICE, mark::WIREGUARD_DEVICE_V6].contains(&name)),
        Change::Address(_) | Change::Route | Change::Missed => true,
        Change::Neighbour(_) => false,
    }
}

async fn at(due: Option<Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due).await,
        None => std::future::pending().await,
    }
}

/// Keeps a notification socket open.
async fn watch_kernel(out: mpsc::Sender<Change>, family: Family) {
    while !out.is_closed() {
        if let Err(error) = netlink::watch(out.clone(), family).await {
            tracing::debug!(error = chain(&error), "notifications are interrupted");
        }
        sleep(REOPEN).await;
        // What changed meanwhile was not told.
        let _full = out.try_send(Change::Missed);
    }
}
