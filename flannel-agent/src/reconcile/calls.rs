//! What the CNI plugin says, and when it is answered.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    time::{Duration, Instant},
};

use flannel_core::{
    addr::IfIndex,
    plan::Settings,
    pods::{
        Pod, PodSources,
        announced::{Announced, all_known},
        cni::CniPod,
        report::{Answer, Outcome, Report},
    },
};
use tokio::sync::{mpsc, oneshot};

use super::Loop;
use crate::{
    cni_socket::{Call, News},
    dataplane::Dataplane,
};

/// Calls that may wait for an overlay.
const BACKLOG: usize = 64;

/// What was said, over all sessions, and who waits for an answer.
#[derive(Debug)]
pub(crate) struct Calls {
    incoming: mpsc::Receiver<Call>,
    announced: Announced,
    waiting: Vec<(Report, oneshot::Sender<Answer>)>,
    started: Instant,
}

impl Calls {
    /// One for each overlay: every one of them hears what is said, and who asks is answered once all have done their part.
    pub(crate) fn split(mut incoming: mpsc::Receiver<Call>, count: usize) -> Vec<Self> {
        if count == 1 {
            return vec![Self::new(incoming)];
        }
        let (outs, ins): (Vec<_>, Vec<_>) = (0..count).map(|_| mpsc::channel(BACKLOG)).unzip();
        tokio::spawn(async move {
            while let Some(Call { news, answer }) = incoming.recv().await {
                let mut answers = Vec::new();
                for out in &outs {
                    let (one, all) = oneshot::channel();
                    let call = Call {
                        news: news.clone(),
                        answer: one,
                    };
                    if out.send(call).await.is_ok() {
                        answers.push(all);
                    }
                }
                tokio::spawn(async move {
                    let mut worst: Option<Answer> = None;
                    for one in answers {
                        let Ok(one) = one.await else { continue };
                        let better = |worst: &Answer| worst.state != Outcome::Carried;
                        if !worst.as_ref().is_some_and(better) {
                            worst = Some(one);
                        }
                    }
                    if let Some(worst) = worst {
                        // Who has gone away need not know.
                        let _gone = answer.send(worst);
                    }
                });
            }
        });
        ins.into_iter().map(Self::new).collect()
    }

    fn new(incoming: mpsc::Receiver<Call>) -> Self {
        Self {
            incoming,
            announced: Announced::default(),
            waiting: Vec::new(),
            started: Instant::now(),
        }
    }

    /// The next call; for ever if there is no socket. Cancelling it loses nothing.
    pub(super) async fn next(&mut self) -> Call {
        match self.incoming.recv().await {
            Some(call) => call,
            None => std::future::pending().await,
        }
    }

    /// Adds what was announced to what was read, and gives the interfaces that are to be left out.
    pub(super) fn apply(
        &mut self,
        sources: Option<&mut PodSources>,
        known: Option<&BTreeMap<IpAddr, Pod>>,
    ) -> BTreeSet<IfIndex> {
        let Some(sources) = sources else {
            self.announced.clear();
            return BTreeSet::new();
        };
        self.announced
            .extend(sources, known.unwrap_or(&BTreeMap::new()));
        self.announced.leaving(sources, self.now())
    }

    fn now(&self) -> Duration {
        self.started.elapsed()
    }
}

impl Loop<'_> {
    /// Takes a call in. A pod that goes is taken out of the map at once; one that comes is answered after a look at the kernel.
    pub(super) fn take_call(&mut self, call: Call) {
        let Call { news, answer } = call;
        let sources = self.dataplane.pod_sources();
        match news {
            News::Come(report) => {
                self.calls.announced.come(&report, sources);
                self.calls.waiting.push((report, answer));
                self.dataplane.doubt_pods();
                self.agenda.expedite();
            }
            News::Go(report) => {
                let now = self.calls.now();
                let going = match (sources, &self.desired.pods) {
                    (Some(sources), Some(known)) => {
                        self.calls.announced.go(&report, known, sources, now)
                    }
                    _ => BTreeSet::new(),
                };
                for ifindex in going {
                    self.drop_pods_behind(ifindex);
                    // What is attached there is tidied up by the next look.
                    self.agenda.expedite();
                }
                // Who has gone away need not know.
                let _gone = answer.send(Answer::new(Outcome::Gone, ""));
            }
        }
    }

    /// Answers those of whom something is known now.
    pub(super) fn answer_calls(&mut self) {
        if let Some(pods) = &self.desired.pods {
            self.calls.announced.settle(pods);
        }
        let waiting = std::mem::take(&mut self.calls.waiting);
        for (report, answer) in waiting {
            if answer.is_closed() {
                continue;
            }
            match self.verdict(&report) {
                Some(verdict) => {
                    tracing::debug!(
                        container = report.container,
                        ?verdict,
                        "a pod was announced"
                    );
                    // It has not been closed a moment ago.
                    let _gone = answer.send(verdict);
                }
                None => self.calls.waiting.push((report, answer)),
            }
        }
    }

    /// What has come of a pod; `None` if that is not known yet.
    fn verdict(&self, report: &Report) -> Option<Answer> {
        let stack = |reason: &str| Some(Answer::new(Outcome::Stack, reason));
        let gate_is_off = |settings: &Settings| settings.gate.is_off();
        if self.desired.bpf.as_ref().is_none_or(gate_is_off) {
            return stack("the fast path is off");
        }
        let sources = self.dataplane.pod_sources()?;
        let ours = |pod: &&CniPod| sources.own.contains(&pod.address);
        let pods: Vec<CniPod> = report.pods.iter().filter(ours).cloned().collect();
        if pods.is_empty() {
            return stack("it is in another subnet");
        }
        let known = self.desired.pods.as_ref()?;
        if all_known(&pods, known) {
            return in_place(&self.dataplane, &pods, known)
                .then(|| Answer::new(Outcome::Carried, ""));
        }
        let names: BTreeSet<&String> = pods.iter().flat_map(|pod| &pod.host_interfaces).collect();
        let mut ports = sources.ports.iter();
        let excluded = ports.find_map(|(index, port)| {
            names
                .contains(&port.name)
                .then(|| self.gate.excludes(*index))?
        });
        excluded.and_then(|reason| stack(&reason))
    }
}

/// Whether the map has the pods as they are to be.
fn in_place(dataplane: &Dataplane, pods: &[CniPod], known: &BTreeMap<IpAddr, Pod>) -> bool {
    let Some(bpf) = &dataplane.seen().bpf else {
        return false;
    };
    pods.iter().all(|pod| {
        let wanted = known.get(&pod.address);
        wanted.is_some() && bpf.pods.get(&pod.address).and_then(Option::as_ref) == wanted
    })
}
