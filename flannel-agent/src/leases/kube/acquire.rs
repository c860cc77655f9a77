//! Getting to know the cluster, and taking what it has assigned to this node.

use flannel_core::{
    config::NetConf,
    kube::{Node, NodeError, OwnPlan, plan_own},
    lease::Lease,
};
use http::Method;
use tokio::{
    sync::watch,
    time::{Instant, sleep, sleep_until, timeout},
};
use tracing::{debug, info, warn};

use super::{KubeLeases, Origin, REMINDER, events::Event, feed::Known, memory, name};
use crate::leases::{
    ErrorKind, Held, LeaseError, Offer, Outcome,
    retry::{Backoff, jittered},
};

/// How long to wait after a refusal.
pub(super) const REFUSED: std::time::Duration = std::time::Duration::from_secs(30);

/// Says something once, and again every ten seconds.
#[derive(Debug, Default)]
struct Reminder(Option<(String, Instant)>);

impl Reminder {
    fn is_due(&mut self, text: &str) -> bool {
        let now = Instant::now();
        let quiet = self
            .0
            .as_ref()
            .is_some_and(|(said, at)| said == text && now < *at + REMINDER);
        if !quiet {
            self.0 = Some((text.to_owned(), now));
        }
        !quiet
    }
}

pub(super) async fn sync(store: &KubeLeases, conf: &NetConf, tell: &impl Fn(&str)) -> Origin {
    info!("Waiting 10m0s for node controller to sync");
    info!("Starting kube subnet manager");
    let patience = store.shared.options.patience;
    if timeout(patience, from_api(store, tell)).await.is_err() {
        if let Some(text) = remember(store, conf) {
            return Origin::Memory(text);
        }
        from_api(store, tell).await;
    }
    info!("Node controller sync successful");
    info!(
        "Created subnet manager: Kubernetes Subnet Manager - {}",
        store.shared.own.get().unwrap_or_default()
    );
    Origin::Api
}

/// Until there is a complete list, and a name to look for in it.
async fn from_api(store: &KubeLeases, tell: &impl Fn(&str)) {
    let mut known = store.known();
    find_name(store, tell).await;
    let mut reminder = Reminder::default();
    loop {
        {
            let known = known.borrow_and_update();
            if known.complete {
                return;
            }
            let text = format!(
                "waiting for the list of nodes from {}: {}",
                store.describe(),
                known.error.as_deref().unwrap_or("no answer yet")
            );
            tell(&text);
            if known.error.is_some() && reminder.is_due("waiting") {
                warn!("Node controller sync not completed: {text}");
            }
        }
        let _later = timeout(REMINDER, known.changed()).await;
    }
}

/// Takes the last known state for what is known until the API answers.
fn remember(store: &KubeLeases, conf: &NetConf) -> Option<String> {
    let path = store.shared.options.memory.as_deref()?;
    let given = store.shared.own.get();
    let (own, nodes) = memory::load(path, given.as_deref(), conf)?;
    if !nodes.contains_key(&own) {
        return None;
    }
    store.shared.own.remember(own);
    let peers = nodes.len().saturating_sub(1);
    let mut taken = false;
    store.shared.known.send_if_modified(|known| {
        taken = !known.complete;
        if taken {
            known.nodes = nodes;
            known.remembered = true;
        }
        taken
    });
    if !taken {
        // It has just answered.
        return None;
    }
    let text = format!(
        "{} does not answer: started from the last known state, {peers} other nodes",
        store.describe()
    );
    warn!(
        file = %path.display(),
        "{text}; their changes are taken up when it answers"
    );
    Some(text)
}

/// Finds out this node's name, however long that takes.
async fn find_name(store: &KubeLeases, tell: &impl Fn(&str)) {
    let mut reminder = Reminder::default();
    let mut backoff = Backoff::new();
    while let Err(error) = name::find(store).await {
        let text = error.chain();
        tell(&text);
        if reminder.is_due(&text) {
            warn!("{text}");
        }
        sleep(backoff.next_wait()).await;
    }
}

/// One attempt at a lease, with what is known now.
pub(super) async fn attempt(store: &KubeLeases, offer: &Offer) -> Result<Held, LeaseError> {
    let mut known = store.known();
    let mut backoff = Backoff::new();
    while store.shared.own.get().is_none() {
        match name::find(store).await {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::Retry => sleep(backoff.next_wait()).await,
            Err(error) => return Err(error),
        }
    }
    let complete = match known.wait_for(Known::is_usable).await {
        Ok(known) => known.complete,
        Err(_closed) => false,
    };
    if complete {
        name::find(store).await?;
    }
    let node = store.own_node(&known.borrow());
    let node = node.ok_or_else(|| LeaseError::KubeNoNode {
        node: store.shared.own.get().unwrap_or_default(),
    })?;
    let plan = plan_own(&node, &store.shared.names, &offer.conf, &offer.attrs)
        .map_err(|error| LeaseError::KubeNode(Box::new(error)))?;
    announce(&plan);
    let outcome = if plan.patch.is_empty() {
        Outcome::Reused
    } else {
        Outcome::New
    };
    if complete {
        publish(store, &node, &plan).await?;
    }
    let held = Held {
        lease: plan.lease,
        outcome,
        grip: None,
    };
    info!("Lease acquired: {}", subnets(&held.lease));
    Ok(held)
}

/// The subnets of a lease in words.
pub(super) fn subnets(lease: &Lease) -> String {
    let v4 = lease.key.v4.map(|net| net.to_string());
    let v6 = lease.key.v6.map(|net| net.to_string());
    v4.into_iter().chain(v6).collect::<Vec<_>>().join(" ")
}

/// Says what an administrator's annotations change.
pub(super) fn announce(plan: &OwnPlan) {
    for overwrite in plan.overwrites.iter().filter(|one| one.is_news) {
        info!("{}", overwrite.announcement());
    }
    for problem in &plan.problems {
        warn!("{problem}: it is not used");
    }
}

/// Writes the annotations of this object that differ.
pub(super) async fn publish(
    store: &KubeLeases,
    node: &Node,
    plan: &OwnPlan,
) -> Result<(), LeaseError> {
    if plan.patch.is_empty() {
        return Ok(());
    }
    let (uid, node) = (&node.uid, &node.name);
    let path = format!("/api/v1/nodes/{node}/status");
    let patch = serde_json::json!({"metadata": {"annotations": plan.patch}}).to_string();
    let kind = "application/strategic-merge-patch+json";
    let answer = store
        .shared
        .connection
        .send(
            &format!("annotate node {node:?}"),
            (Method::PATCH, &path),
            (kind, patch),
        )
        .await?;
    info!(
        node,
        subnets = subnets(&plan.lease),
        value = plan.lease.attrs.to_json(),
        "published our lease"
    );
    let after: Option<Node> = serde_json::from_str(&answer)
        .inspect_err(|error| debug!(%error, "the answer to our annotations"))
        .ok();
    match after {
        Some(after) => {
            let version = after.resource_version.parse().unwrap_or(0);
            store.note_written(after.uid, version);
        }
        None => store.note_written(uid.clone(), 0),
    }
    Ok(())
}

/// Takes a lease, however long that takes. Each trouble is one line in the log, again every ten seconds, and an Event.
pub(super) async fn acquire(store: &KubeLeases, offer: &Offer, tell: &impl Fn(&str)) -> Held {
    let mut known = store.known();
    let mut reminder = Reminder::default();
    let mut backoff = Backoff::new();
    loop {
        known.mark_unchanged();
        let error = match attempt(store, offer).await {
            Ok(held) => return held,
            Err(error) => error,
        };
        let text = error.chain();
        tell(&text);
        if reminder.is_due(&text) {
            warn!("{}", advice(&error));
        }
        match &error {
            LeaseError::KubeNode(problem) => {
                store.tell(event(problem));
                wait_for_change(&mut known).await;
            }
            LeaseError::KubeNoNode { .. } => wait_for_change(&mut known).await,
            error if error.kind() == ErrorKind::Refused => sleep(jittered(REFUSED)).await,
            _ => sleep(backoff.next_wait()).await,
        }
    }
}

/// Until something changes, or it is time to say again what is waited for.
async fn wait_for_change(known: &mut watch::Receiver<Known>) {
    tokio::select! {
        changed = known.changed() => if changed.is_err() {
            std::future::pending::<()>().await;
        },
        () = sleep_until(Instant::now() + REMINDER) => {}
    }
}

/// What is wrong with our Node object, and what can be done about it.
fn advice(error: &LeaseError) -> String {
    let fix = match error {
        LeaseError::KubeNode(problem) => match &**problem {
            NodeError::NoPodCidr { .. } => {
                "waiting for it: the cluster has to assign one, with kubeadm init --pod-network-cidr, or with --allocate-node-cidrs and \
                 --cluster-cidr of kube-controller-manager"
            }
            NodeError::Outside { .. } => {
                "nothing is published: make Network in net-conf.json the cluster's pod network, and restart this pod"
            }
            NodeError::MissingFamily { .. } => {
                "waiting for it: the cluster has to be dual-stack, or set EnableIPv6 to false in net-conf.json"
            }
            NodeError::TooMany { .. }
            | NodeError::BadCidr { .. }
            | NodeError::Annotation { .. } => "waiting for another one",
        },
        LeaseError::KubeNoNode { .. } => {
            "waiting for it: is NODE_NAME the name that kubectl get nodes shows?"
        }
        _ => "trying again",
    };
    format!("failed to acquire lease: {}: {fix}", error.chain())
}

/// The Event for what is wrong with our Node object.
pub(super) fn event(problem: &NodeError) -> Event {
    let reason = match problem {
        NodeError::NoPodCidr { .. } => "NoPodCIDR",
        NodeError::Outside { .. } => "PodCIDROutsideNetwork",
        NodeError::MissingFamily { .. } => "PodCIDRFamilyMissing",
        NodeError::TooMany { .. } | NodeError::BadCidr { .. } => "InvalidPodCIDR",
        NodeError::Annotation { .. } => "InvalidAnnotation",
    };
    let advice = advice(&LeaseError::KubeNode(Box::new(problem.clone())));
    Event::warning(reason, advice)
}

impl KubeLeases {
    /// Says something about our node to those who look at it in the cluster.
    pub(super) fn tell(&self, event: Event) {
        let node = self.own_node(&self.shared.known.borrow());
        if let Some(node) = node {
            self.shared.recorder.tell(&node, event);
        }
    }
}
