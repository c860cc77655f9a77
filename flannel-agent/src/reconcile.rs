//! The loop: look, plan, change, until there is nothing left to change.
//!
//! Level-triggered. Events only say "look again": a new view of the leases, a notification of the kernel about something ours,
//! a tick. The loop never ends by itself, and it leaves everything in place when it is told to end.

mod agenda;
mod calls;
mod fall;
mod gate;
mod quiet;
mod readiness;
mod xdp;

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use flannel_core::{
    addr::{Family, IfIndex},
    config::BackendKind,
    farewell::Farewell,
    plan::{Desired, Op, PeerProblem, Plan, peers_of, plan},
};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, MissedTickBehavior, interval, sleep, sleep_until},
};
use tokio_util::sync::CancellationToken;

use crate::{
    app::{own_of, set_own},
    dataplane::{
        Dataplane, PodNews, Scope, bpf,
        netlink::{self, Change},
    },
    files,
    leases::View,
    state::State,
    telemetry::chain,
};

use agenda::Agenda;
pub(crate) use calls::Calls;
pub(crate) use fall::Fall;
use fall::Falling;
pub(crate) use gate::Gatekeeper;
use quiet::Quiet;
pub(crate) use readiness::Readiness;
pub(crate) use xdp::XdpKeeper;

/// How often the eBPF half is looked at: nothing notifies of a detached program or a flushed map.
const TICK: Duration = Duration::from_secs(1);
/// How often everything is read, whatever the notifications said: at least so long apart.
const RESYNC: Duration = Duration::from_secs(10);
/// The same for each peer: what is read at a time costs so much more, and so often the node must not be busy with it.
const RESYNC_OF_PEER: Duration = Duration::from_millis(20);
/// A plan that is not empty after so many passes is tried again at the next tick.
const MAX_PASSES: usize = 14;
/// Notifications that may wait while the loop is busy.
const BACKLOG: usize = 1024;
/// How long a lost notification socket stays closed.
const REOPEN: Duration = Duration::from_secs(1);

/// The one owner of the kernel's state.
#[derive(Debug)]
pub(crate) struct Loop<'a> {
    dataplane: Dataplane,
    desired: Desired,
    views: watch::Receiver<View>,
    state: State,
    ready: Readiness,
    calls: &'a mut Calls,
    /// What was last said about trouble, so that each trouble is one line.
    said: BTreeSet<String>,
    peer_problems: Vec<PeerProblem>,
    state_written: Option<State>,
    /// Peers that have just left, by the time since `started`.
    farewell: Farewell,
    started: Instant,
    gate: Gatekeeper,
    xdp: XdpKeeper,
    agenda: Agenda,
    /// What the last plan was made for, if it was empty and the peers are the same.
    quiet: Option<Quiet>,
    falling: Falling,
    /// Whether the leases have changed since they were looked at.
    view_changed: bool,
    /// Whether a look at the kernel failed: the kernel ends a list that changes while it is read with EBUSY or EINTR.
    unanswered: bool,
    changes: mpsc::Receiver<Change>,
    notify: Option<mpsc::Sender<Change>>,
}

impl<'a> Loop<'a> {
    pub(crate) fn new(
        dataplane: Dataplane,
        desired: Desired,
        views: watch::Receiver<View>,
        state: State,
        (ready, calls): (Readiness, &'a mut Calls),
        (gate, xdp): (Gatekeeper, XdpKeeper),
        may_fall: bool,
    ) -> Self {
        let (notify, changes) = mpsc::channel(BACKLOG);
        Self {
            dataplane,
            desired,
            views,
            state,
            ready,
            calls,
            said: BTreeSet::new(),
            peer_problems: Vec::new(),
            state_written: None,
            farewell: Farewell::default(),
            started: Instant::now(),
            gate,
            xdp,
            agenda: Agenda::default(),
            quiet: None,
            falling: Falling::new(may_fall),
            view_changed: true,
            unanswered: false,
            changes,
            notify: Some(notify),
        }
    }

    /// Runs until cancelled, or until it cannot be gone on with like this.
    pub(crate) async fn run(mut self, cancel: CancellationToken) -> Option<Fall> {
        let mut fall = None;
        let family = self.dataplane.family();
        // Watch first, look second: what changes in between is not lost.
        let watcher = self
            .notify
            .take()
            .map(|out| tokio::spawn(watch_kernel(out, family)));
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut last_full = Instant::now();
        let mut due = Some(Scope::Everything);
        loop {
            self.ready.beat();
            if let Some(scope) = due {
                let begun = Instant::now();
                if scope == Scope::Everything {
                    last_full = begun;
                }
                self.agenda.begin(scope);
                self.converge(scope).await;
                self.agenda.end(scope, begun.elapsed());
                self.ready.metrics().looked(scope, begun.elapsed());
                fall = self.fall().await;
                if fall.is_some() {
                    break;
                }
            }
            if let Err(error) = self.dataplane.keep(&self.desired) {
                tracing::debug!(error = chain(&error), "say that the maps are kept");
            }
            let farewell = self.next_farewell();
            due = tokio::select! {
                () = cancel.cancelled() => break,
                changed = self.views.changed() => {
                    if changed.is_err() {
                        // The lease store's task is gone only while we are stopping.
                        cancel.cancelled().await;
                        break;
                    }
                    self.view_changed = true;
                    self.agenda.hurry();
                    None
                }
                () = self.gate.changed() => Some(Scope::Kernel),
                Some(change) = self.changes.recv() => {
                    self.take_change(&change);
                    None
                }
                call = self.calls.next() => {
                    self.take_call(call);
                    None
                }
                () = at(self.agenda.due(Scope::Kernel)) => Some(Scope::Kernel),
                () = at(self.agenda.due(Scope::Pods)) => Some(Scope::Pods),
                () = farewell => {
                    self.view_changed = true;
                    Some(Scope::Kernel)
                }
                _ = tick.tick() => {
                    if last_full.elapsed() >= self.resync() {
                        self.dataplane.forget_asked();
                        Some(Scope::Everything)
                    } else if std::mem::take(&mut self.unanswered) {
                        Some(Scope::Kernel)
                    } else {
                        Some(Scope::Maps)
                    }
                }
            };
        }
        self.ready.rest();
        if let Some(watcher) = watcher {
            watcher.abort();
        }
        fall
    }

    /// How far apart readings of everything are.
    fn resync(&self) -> Duration {
        let peers = self.desired.peers.as_ref().map_or(0, BTreeMap::len);
        let peers = u32::try_from(peers).unwrap_or(u32::MAX);
        RESYNC.max(RESYNC_OF_PEER.saturating_mul(peers))
    }

    /// Takes a notification in. A pod whose interface is gone is taken out of the map at once, because its address may be given to
    /// another pod at any moment; returns that interface. Everything else can wait for the next look.
    fn take_change(&mut self, change: &Change) -> Option<IfIndex> {
        if self.concerns_us(change) {
            self.agenda.ask(Scope::Kernel);
        }
        match self.dataplane.pod_news(change) {
            PodNews::Nothing => None,
            PodNews::Changed => {
                self.agenda.ask(Scope::Pods);
                None
            }
            PodNews::Gone(ifindex) => {
                // What was attached there is tidied up by the next look.
                self.agenda.ask(Scope::Pods);
                self.drop_pods_behind(ifindex);
                Some(ifindex)
            }
        }
    }

    /// Takes the pods behind an interface out of the map at once.
    fn drop_pods_behind(&mut self, ifindex: IfIndex) {
        let addresses = self.gate.forget(&mut self.desired, ifindex);
        match self.dataplane.drop_pods(&addresses) {
            Ok(()) => {
                for address in addresses {
                    tracing::info!(ifindex = ifindex.get(), "delete pod {address}");
                }
            }
            Err(error) => tracing::warn!(error = chain(&error), "delete a pod"),
        }
    }

    /// Whether a notification can be about something that the plan depends on, pods left aside.
    fn concerns_us(&self, change: &Change) -> bool {
        let interesting = |index: &u32| {
            self.dataplane
                .interests()
                .iter()
                .any(|ours| ours.get() == *index)
        };
        match change {
            Change::Link(link) => {
                let tunnel = self.desired.tunnel.as_ref();
                tunnel.is_some_and(|tunnel| link.name.as_ref() == Some(&tunnel.name))
                    || interesting(&link.index)
            }
            Change::Address(index) => interesting(index),
            Change::Neighbour(neighbour) => interesting(&neighbour.index),
            Change::Route | Change::Missed => true,
        }
    }

    /// Turns the newest view of the leases into what is desired.
    fn take_view(&mut self) {
        let view = self.views.borrow_and_update().clone();
        if let Some(own) = &view.own {
            set_own(&mut self.desired, &own.key);
            self.state.subnet = own_of(&own.key, self.dataplane.family());
        }
        self.state.store_connected = view.connected;
        let (Some(own), Some(snapshot)) = (&view.own, &view.snapshot) else {
            return;
        };
        let kind = match self.desired.tunnel {
            Some(_) => BackendKind::Vxlan,
            None => BackendKind::HostGw,
        };
        let family = self.dataplane.family();
        let (peers, problems) = peers_of(&snapshot.leases, &own.key, family, kind);
        for problem in &problems {
            if !self.peer_problems.contains(problem) {
                tracing::warn!("{problem}: ignored");
            }
        }
        self.peer_problems = problems;
        let before = self.desired.peers.take().unwrap_or_default();
        let now = self.started.elapsed();
        self.desired.peers = Some(self.farewell.extend(&before, peers, &self.desired.own, now));
        self.quiet = None;
    }

    /// Until a peer that has left is to be let go; for ever if none has.
    fn next_farewell(&self) -> impl Future<Output = ()> + use<> {
        let due = self.farewell.due().map(|due| self.started + due);
        async move {
            match due {
                Some(due) => sleep_until(due).await,
                None => std::future::pending().await,
            }
        }
    }

    /// Looks, plans and changes until the plan is empty. A failed change ends the attempt; the next tick makes another.
    async fn converge(&mut self, mut scope: Scope) {
        let mut troubles = BTreeSet::new();
        let mut done = false;
        if std::mem::take(&mut self.view_changed) {
            self.take_view();
        }
        if scope == Scope::Maps || scope == Scope::Everything {
            self.try_xdp();
        }
        for _pass in 0..MAX_PASSES {
            self.xdp.set(&mut self.desired);
            self.gate.set(&mut self.desired, self.dataplane.seen());
            if let Err(error) = self.dataplane.observe(&self.desired, scope).await {
                // What asked for this look has been answered with nothing.
                self.unanswered |= scope != Scope::Maps;
                self.quiet = None;
                self.ready.fault(
                    &mut troubles,
                    format!("look at the kernel: {}", chain(&error)),
                );
                break;
            }
            // Again: a hook that is found missing means another epoch, which is to be in place before the hook is.
            self.gate.set(&mut self.desired, self.dataplane.seen());
            let leaving = self
                .calls
                .apply(self.dataplane.pod_sources_mut(), self.desired.pods.as_ref());
            let (seen, sources) = (self.dataplane.seen(), self.dataplane.pod_sources());
            self.gate.learn(&mut self.desired, seen, sources, &leaving);
            if let Some(quiet) = &self.quiet
                && self.dataplane.is_unchanged()
                && quiet.suits(&self.desired)
            {
                troubles.extend(quiet.problems().iter().cloned());
                done = true;
                break;
            }
            let mut plan = plan(&self.desired, seen);
            if plan.ops.is_empty() {
                troubles.extend(plan.problems.iter().cloned());
                self.quiet = Some(Quiet::of(&self.desired, plan.problems));
                done = true;
                break;
            }
            self.quiet = None;
            troubles.extend(std::mem::take(&mut plan.problems));
            tracing::debug!(ops = plan.ops.len(), "plan");
            self.ready.foresee(&plan);
            if !self.carry_out(&plan, &mut troubles).await {
                break;
            }
            // What was changed has consequences: routes go with their device, and so on. Pods have none.
            if !plan.ops.iter().all(Op::is_about_pods) {
                scope = scope.max(Scope::Kernel);
            }
        }
        if !done && troubles.is_empty() {
            let text = format!("the node is not as it should be after {MAX_PASSES} attempts");
            self.ready.fault(&mut troubles, text);
        }
        self.answer_calls();
        self.speak(troubles);
        self.ready
            .report(self.dataplane.seen(), &self.desired, &self.state);
        if done && scope >= Scope::Kernel {
            self.dataplane.tend_headroom(&self.desired).await;
        }
        // Whoever waits for us to be ready asks for the state next.
        self.save_state();
        if done && self.desired.peers.is_some() {
            self.ready.become_ready(&self.desired, &self.state);
        }
    }

    /// Finds out whether native XDP does anything.
    fn try_xdp(&mut self) {
        if !self.xdp.is_on_trial() {
            return;
        }
        match self.dataplane.xdp_sample() {
            Ok(now) => self.xdp.look(now),
            Err(error) => tracing::debug!(error = chain(&error), "read the counters"),
        }
    }

    /// Makes the changes of a plan. False if one failed: what comes after it is left for the next attempt, but for other pods.
    async fn carry_out(&mut self, plan: &Plan, troubles: &mut BTreeSet<String>) -> bool {
        // Pod veths on which nothing more is to be done.
        let mut given_up: BTreeSet<IfIndex> = BTreeSet::new();
        let mut done = true;
        for op in &plan.ops {
            self.ready.beat();
            while let Ok(change) = self.changes.try_recv() {
                given_up.extend(self.take_change(&change));
            }
            let veth = new_on_veth(op);
            if veth.is_some_and(|veth| given_up.contains(&veth)) {
                continue;
            }
            let kind = self.desired.tunnel.as_ref().map(|tunnel| &tunnel.kind);
            let applied = self.dataplane.apply(op, kind).await;
            self.ready.metrics().changed(op, applied.is_ok());
            match (applied, veth) {
                (Ok(()), _)
                    if matches!(
                        op,
                        Op::PutLinkRoute {
                            replaces: Some(_),
                            ..
                        }
                    ) =>
                {
                    tracing::warn!("{op}, which was not ours");
                }
                (Ok(()), _) => tracing::info!("{op}"),
                // It went before we heard of it.
                (Err(_), Some(veth)) if bpf::interface_name(veth).is_none() => {
                    given_up.insert(veth);
                }
                (Err(error), Some(veth)) => {
                    troubles.insert(format!("{op}: {}", chain(&error)));
                    given_up.insert(veth);
                    done = false;
                }
                // The way without it is open.
                (Err(error), None) if self.xdp.is_refused(op, &error) => {}
                (Err(error), None) => {
                    self.falling.note(op, &error, kind);
                    self.ready
                        .fault(troubles, format!("{op}: {}", chain(&error)));
                    return false;
                }
            }
        }
        done
    }

    /// Says each new trouble once, and when the last one is over.
    fn speak(&mut self, troubles: BTreeSet<String>) {
        for trouble in troubles.difference(&self.said) {
            tracing::warn!("{trouble}");
        }
        if !self.said.is_empty() && troubles.is_empty() {
            tracing::info!("everything is in place again");
        }
        self.state.problems = troubles.iter().cloned().collect();
        self.said = troubles;
    }

    fn save_state(&mut self) {
        self.state.fast_path = Some(self.gate.report());
        self.state.datapath.xdp = Some(self.xdp.report());
        if self.state_written.as_ref() == Some(&self.state) {
            return;
        }
        let path = self.state.own_path();
        match serde_json::to_string_pretty(&self.state) {
            Ok(text) => {
                if let Err(error) = files::replace(&path, &text) {
                    tracing::debug!(error = chain(&error), "write the state file");
                }
            }
            Err(error) => tracing::debug!(%error, "write the state file"),
        }
        self.state_written = Some(self.state.clone());
    }
}

/// The pod veth that an op puts something on.
const fn new_on_veth(op: &Op) -> Option<IfIndex> {
    match op {
        Op::Attach { hook, ifindex } if hook.is_per_pod() => Some(*ifindex),
        Op::PutPod { pod, .. } => Some(pod.ifindex),
        _ => None,
    }
}

/// Until then; for ever if there is no such time.
async fn at(due: Option<Instant>) {
    match due {
        Some(due) => sleep_until(due).await,
        None => std::future::pending().await,
    }
}

/// Keeps a notification socket open.
async fn watch_kernel(out: mpsc::Sender<Change>, family: Family) {
    while !out.is_closed() {
        match netlink::watch(out.clone(), family).await {
            Ok(()) => return,
            Err(error) => tracing::warn!(
                error = chain(&error),
                "the kernel's notifications are interrupted"
            ),
        }
        sleep(REOPEN).await;
        if out.send(Change::Missed).await.is_err() {
            return;
        }
    }
}
