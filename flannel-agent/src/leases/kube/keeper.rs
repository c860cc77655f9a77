//! Keeping this node's annotations and following the other nodes, for as long as the agent runs.

use std::{
    collections::{BTreeMap, BTreeSet},
    future::pending,
    hash::{Hash as _, Hasher as _},
    sync::Arc,
    time::Duration,
};

use flannel_core::{
    kube::{Families, Node, OwnPlan, plan_own, read_cluster, shared_addresses, subnets_of},
    lease::{Lease, LeaseAttrs, SubnetKey},
};
use futures_util::{FutureExt as _, future::BoxFuture};
use tokio::{
    sync::watch,
    time::{Instant, sleep, sleep_until},
};
use tracing::{debug, error, info, warn};

use super::{
    KubeLeases,
    acquire::{REFUSED, announce, event, publish, subnets},
    events::Event,
    feed::Known,
    memory, name,
};
use crate::leases::{
    COALESCE, ErrorKind, Held, LeaseError, Offer, Snapshot, View,
    retry::{Backoff, Contest, jittered},
};

/// How long changes of the last known state are gathered before it is written.
const SAVE: Duration = Duration::from_secs(1);
/// How long the watch may lag behind our own write.
const LAG: Duration = Duration::from_secs(10);

/// What was said already, so that each trouble is one line.
#[derive(Debug, Default)]
struct Said(BTreeSet<String>);

impl Said {
    /// Says what is new of these, and forgets what is over.
    fn say(&mut self, lines: BTreeSet<String>) {
        for line in lines.difference(&self.0) {
            warn!("{line}");
        }
        self.0 = lines;
    }
}

/// What is to be done about our own Node object.
enum Step {
    Nothing,
    /// The view changes.
    Tell,
    /// The annotations of this object are to be written. The API may take its time, and the other nodes are followed meanwhile.
    Write(Box<Node>, Box<OwnPlan>),
}

/// What became of a write.
struct Wrote {
    node: Node,
    plan: OwnPlan,
    result: Result<(), LeaseError>,
}

struct Keeper<'a> {
    store: &'a KubeLeases,
    out: &'a watch::Sender<View>,
    offer: Offer,
    held: Held,
    /// The last readable lease of each node, and the object it was read from.
    last: BTreeMap<String, (String, Lease)>,
    said: Said,
    own_error: Option<String>,
    contest: Contest,
    backoff: Backoff,
    /// Nothing is written before.
    repair_at: Option<Instant>,
    /// When to look again for our own write.
    lag_until: Option<Instant>,
    save_at: Option<Instant>,
    /// A digest of the last known state as it was written.
    saved: Option<u64>,
    ever_complete: bool,
}

pub(super) async fn run(
    store: &KubeLeases,
    held: Held,
    mut offers: watch::Receiver<Offer>,
    out: &watch::Sender<View>,
) {
    let mut known = store.known();
    let offer = offers.borrow_and_update().clone();
    let mut keeper = Keeper {
        store,
        out,
        offer,
        held,
        last: BTreeMap::new(),
        said: Said::default(),
        own_error: None,
        contest: Contest::default(),
        backoff: Backoff::new(),
        repair_at: None,
        lag_until: None,
        save_at: None,
        saved: None,
        ever_complete: false,
    };
    let mut offers_open = true;
    let mut naming =
        (!store.shared.own.is_certain()).then(|| ascertain(store, known.clone()).boxed());
    let mut writing: Option<BoxFuture<'_, Wrote>> = None;
    let mut is_news = true;
    loop {
        if is_news {
            let own = {
                let known = known.borrow_and_update();
                keeper.look(&known);
                known.complete.then(|| store.own_node(&known))
            };
            if let Some(own) = own
                && naming.is_none()
                && writing.is_none()
            {
                match keeper.settle(own) {
                    Step::Nothing => {}
                    Step::Tell => keeper.look(&known.borrow()),
                    Step::Write(node, plan) => writing = Some(write(store, *node, *plan).boxed()),
                }
            }
        }
        is_news = true;
        tokio::select! {
            changed = known.changed() => match changed {
                // Changes that come together are looked at together.
                Ok(()) => sleep(COALESCE).await,
                Err(_) => pending::<()>().await,
            },
            changed = offers.changed(), if offers_open => match changed {
                Ok(()) => {
                    keeper.offer = offers.borrow_and_update().clone();
                    keeper.repair_at = None;
                }
                Err(_) => offers_open = false,
            },
            wrote = end_of(&mut writing) => {
                writing = None;
                keeper.wrote(wrote);
            }
            () = end_of(&mut naming) => naming = None,
            () = until(keeper.repair_at) => keeper.repair_at = None,
            () = until(keeper.lag_until) => keeper.lag_until = None,
            () = until(keeper.save_at) => {
                keeper.save_at = None;
                let text = keeper.remember(&known.borrow());
                keeper.save(text).await;
                is_news = false;
            }
        }
    }
}

/// Finds out whether the name of the last known state is right, as soon as the API answers. Until then nothing is written: the object of
/// that name may be another node's.
async fn ascertain(store: &KubeLeases, mut known: watch::Receiver<Known>) {
    let mut backoff = Backoff::new();
    let mut said = false;
    // Closed is what it never is.
    let _complete = known.wait_for(|known| known.complete).await.is_ok();
    while let Err(error) = name::find(store).await {
        if !std::mem::replace(&mut said, true) {
            warn!(
                "{}: our lease is not published until our name is certain",
                error.chain()
            );
        }
        sleep(backoff.next_wait()).await;
    }
}

/// Publishes what was planned.
async fn write(store: &KubeLeases, node: Node, plan: OwnPlan) -> Wrote {
    let result = publish(store, &node, &plan).await;
    Wrote { node, plan, result }
}

/// Waits for the end of something, or for ever when nothing runs.
async fn end_of<T>(running: &mut Option<BoxFuture<'_, T>>) -> T {
    match running {
        Some(running) => running.await,
        None => pending().await,
    }
}

async fn until(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => pending().await,
    }
}

impl Keeper<'_> {
    fn own(&self) -> String {
        self.store.shared.own.get().unwrap_or_default()
    }

    /// Turns what is known into a view.
    fn look(&mut self, known: &Known) {
        debug!("looking at what is known of the cluster");
        if known.complete && !self.ever_complete {
            self.ever_complete = true;
            info!(nodes = known.nodes.len(), "the list of nodes is complete");
        }
        let snapshot = known.is_usable().then(|| Arc::new(self.snapshot(known)));
        if known.complete {
            self.save_at.get_or_insert_with(|| Instant::now() + SAVE);
        }
        super::super::publish(
            self.out,
            View {
                own: Some(self.held.lease.clone()),
                snapshot,
                connected: known.connected,
                last_error: self.own_error.clone().or_else(|| known.error.clone()),
            },
        );
    }

    fn snapshot(&mut self, known: &Known) -> Snapshot {
        let families = Families::from(&self.offer.conf);
        let names = &self.store.shared.names;
        let own = self.own();
        let cluster = read_cluster(known.nodes.values(), names, families, &own);
        let mut leases = cluster.leases;
        let mut holders = cluster.holders;
        let mut lines: BTreeSet<String> = BTreeSet::new();
        for (node, problems) in &cluster.problems {
            for problem in problems {
                lines.insert(format!("Error turning node {node:?} to lease: {problem}"));
            }
        }
        for twin in &cluster.twins {
            lines.insert(format!(
                "nodes {:?} and {:?} both have the subnet {}: it counts as that of {:?}, which was made last; delete the other Node object",
                twin.left_out, twin.kept, twin.key, twin.kept
            ));
        }
        // What could be read before goes on for as long as the object is the same: somebody's slip must not cost a node its traffic.
        let readable: BTreeSet<&String> = holders.values().collect();
        let kept: Vec<(String, Lease)> = self
            .last
            .iter()
            .filter(|(name, _)| **name != own && !readable.contains(name))
            .filter(|(name, (uid, lease))| {
                known.nodes.get(*name).is_some_and(|node| {
                    node.uid == *uid && subnets_of(node, families).is_ok_and(|key| key == lease.key)
                })
            })
            .map(|(name, (_, lease))| (name.clone(), lease.clone()))
            .collect();
        for (name, lease) in kept {
            if leases.contains_key(&lease.key) {
                continue;
            }
            lines.insert(format!(
                "node {name:?} has lost annotations of flannel's: going on with what they were"
            ));
            holders.insert(lease.key, name);
            leases.insert(lease.key, lease.attrs);
        }
        self.last = holders
            .iter()
            .filter_map(|(key, name)| {
                let uid = known.nodes.get(name)?.uid.clone();
                let attrs = leases.get(key)?.clone();
                Some((name.clone(), (uid, Lease { key: *key, attrs })))
            })
            .collect();
        self.find_shared(&mut lines, &holders, &leases, &own);
        if let Some(other) = holders.get(&self.held.lease.key) {
            lines.insert(format!(
                "node {other:?} has our subnet {}: delete its Node object if the machine is gone",
                self.held.lease.key
            ));
        }
        self.said.say(lines);
        leases.insert(self.held.lease.key, self.held.lease.attrs.clone());
        Snapshot { leases }
    }

    /// Two nodes with one public address: one of them gets the traffic of both.
    fn find_shared(
        &self,
        lines: &mut BTreeSet<String>,
        holders: &BTreeMap<SubnetKey, String>,
        leases: &BTreeMap<SubnetKey, LeaseAttrs>,
        own: &str,
    ) {
        let all = holders
            .iter()
            .filter_map(|(key, node)| Some((node.as_str(), leases.get(key)?)))
            .chain([(own, &self.held.lease.attrs)]);
        for (address, nodes) in shared_addresses(all) {
            let ours = nodes.contains(own);
            let nodes: Vec<String> = nodes.iter().map(|node| format!("{node:?}")).collect();
            let line = format!(
                "nodes {} publish the same address {address}: give each its own with --iface or --public-ip",
                nodes.join(", ")
            );
            if ours {
                self.store
                    .tell(Event::warning("DuplicatePublicIP", line.as_str()));
            }
            lines.insert(line);
        }
    }

    /// Whether what we see of our Node object is older than what we wrote to it.
    fn lags(&self, node: &Node) -> bool {
        let seen = node.resource_version.parse::<u64>().ok();
        self.store.written().is_some_and(|written| {
            written.uid == node.uid
                && seen.is_some_and(|seen| seen < written.version)
                && written.at.elapsed() < LAG
        })
    }

    /// Compares our own annotations with what they should be, and follows what the cluster assigns to us.
    fn settle(&mut self, own: Option<Node>) -> Step {
        if self.repair_at.is_some_and(|at| Instant::now() < at) {
            return Step::Nothing;
        }
        let Some(node) = own else {
            return self.fail(format!(
                "our Node object {:?} is gone: going on, and publishing our lease again when it is back",
                self.own()
            ));
        };
        self.lag_until = self.lags(&node).then(|| Instant::now() + LAG);
        if self.lag_until.is_some() {
            return Step::Nothing;
        }
        let plan = plan_own(
            &node,
            &self.store.shared.names,
            &self.offer.conf,
            &self.offer.attrs,
        );
        let plan = match plan {
            Ok(plan) => plan,
            Err(problem) => {
                self.store.tell(event(&problem));
                let subnet = subnets(&self.held.lease);
                return self.fail(format!("{problem}: going on with {subnet}"));
            }
        };
        if plan.patch.is_empty() {
            return self.take(&plan, &node);
        }
        if !self.may_write(&node, &plan) {
            return Step::Nothing;
        }
        announce(&plan);
        Step::Write(Box::new(node), Box::new(plan))
    }

    /// Notes what became of a write.
    fn wrote(&mut self, Wrote { node, plan, result }: Wrote) {
        let Err(error) = result else {
            self.backoff.reset();
            self.take(&plan, &node);
            return;
        };
        let refused = error.kind() == ErrorKind::Refused;
        let wait = if refused {
            jittered(REFUSED)
        } else {
            self.backoff.next_wait()
        };
        self.repair_at = Some(Instant::now() + wait);
        self.fail(format!(
            "our annotations cannot be written: {}",
            error.chain()
        ));
    }

    /// Whether to write now: somebody who keeps changing our annotations is not to be fought at full speed.
    fn may_write(&mut self, node: &Node, plan: &OwnPlan) -> bool {
        let ours =
            self.held.lease.attrs == plan.lease.attrs && self.held.lease.key == plan.lease.key;
        let written = self.store.written();
        let is_new = written
            .as_ref()
            .is_some_and(|written| written.uid != node.uid);
        // Before we have seen ours in place, what is there may be of an earlier run.
        if ours && !is_new && written.is_some() {
            if let Some(later) = self.contest.entered(Instant::now()) {
                self.repair_at = Some(later);
                return false;
            }
            let keys: Vec<&str> = plan.patch.keys().map(String::as_str).collect();
            warn!(
                annotations = keys.join(" "),
                "annotations of ours were changed by somebody else, restoring them: if this repeats, another agent runs for this node"
            );
        } else if ours && is_new {
            info!(
                node = node.name,
                "our Node object was made anew, publishing our lease"
            );
        }
        true
    }

    /// Our annotations say what they should.
    fn take(&mut self, plan: &OwnPlan, node: &Node) -> Step {
        let mut changed = false;
        if self.own_error.take().is_some() {
            changed = true;
        }
        if self
            .store
            .written()
            .is_none_or(|written| written.uid != node.uid)
        {
            self.store.note_written(node.uid.clone(), 0);
        }
        if self.held.lease.key != plan.lease.key {
            warn!(
                before = subnets(&self.held.lease),
                now = subnets(&plan.lease),
                "this node's pod CIDR has changed: pods started before keep addresses of the old one until they are restarted"
            );
            info!("Lease acquired: {}", subnets(&plan.lease));
        }
        if self.held.lease != plan.lease {
            self.held.lease = plan.lease.clone();
            changed = true;
        }
        if changed { Step::Tell } else { Step::Nothing }
    }

    /// Notes what is wrong with our own object, in one line.
    fn fail(&mut self, text: String) -> Step {
        if self.own_error.as_ref() == Some(&text) {
            return Step::Nothing;
        }
        error!("{text}");
        self.own_error = Some(text);
        Step::Tell
    }

    /// The text of the last known state, if it is another one.
    fn remember(&self, known: &Known) -> Option<String> {
        let shared = &self.store.shared;
        shared.options.memory.as_ref()?;
        let text = memory::text(&known.nodes, &self.own(), &shared.names, &self.offer.conf)?;
        (self.saved != Some(digest(&text))).then_some(text)
    }

    async fn save(&mut self, text: Option<String>) {
        let path = self.store.shared.options.memory.clone();
        let Some((path, text)) = path.zip(text) else {
            return;
        };
        let digest = digest(&text);
        if memory::save(&path, text).await {
            self.saved = Some(digest);
        }
    }
}

/// Stands in for a text that is too long to be kept for a comparison.
fn digest(text: &str) -> u64 {
    let mut hasher = std::hash::DefaultHasher::new();
    text.hash(&mut hasher);
    hasher.finish()
}
