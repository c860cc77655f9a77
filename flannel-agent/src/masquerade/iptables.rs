//! The rules in iptables.

use std::time::Duration;

use flannel_core::{
    addr::Family,
    masquerade::{
        Request,
        backend::Backend,
        iptables::{self, Dump, Moment, Plan},
    },
};
use tokio::time::sleep;

use super::{
    Trouble, Wanted,
    programs::{self, Tool, Tools},
};
use crate::program::ProgramError;

/// How often, and how far apart, a change is tried that fails because somebody else has changed the same.
const ATTEMPTS: u32 = 4;
const PAUSE: Duration = Duration::from_millis(50);

/// What is known of iptables on this node.
#[derive(Debug, Default)]
pub(super) struct Iptables {
    families: [Option<Kept>; 2],
}

/// One family.
#[derive(Debug)]
struct Kept {
    family: Family,
    tools: Tools,
    chosen: Option<Tool>,
    /// Rules that read back otherwise than they were written: not to be written again until something changes.
    stuck: Option<Dump>,
}

impl Iptables {
    /// Whether a change of the rules cannot go unnoticed.
    pub(super) fn is_nft_only(&self) -> bool {
        self.families.iter().flatten().all(|kept| {
            let chosen = kept.chosen.as_ref();
            chosen.is_some_and(|tool| tool.version.backend == Backend::Nft)
        })
    }

    /// Brings both families to their rules.
    pub(super) async fn pass(&mut self, wanted: &Wanted, moment: Moment) -> Vec<Trouble> {
        if moment == Moment::Start {
            tracing::info!("Starting flannel in iptables mode...");
        }
        let mut troubles = Vec::new();
        let families = Family::ALL.into_iter().zip(wanted.requests());
        for ((family, request), kept) in families.zip(&mut self.families) {
            let Some(request) = request else { continue };
            let kept = match kept {
                Some(kept) => kept,
                None => kept.insert(Kept::find(family).await),
            };
            troubles.extend(kept.pass(request, moment).await);
        }
        troubles
    }

    /// Removes our rules: the other manager has taken over.
    pub(super) async fn retire(&mut self, wanted: &Wanted) -> Vec<Trouble> {
        let mut troubles = Vec::new();
        for (family, request) in Family::ALL.into_iter().zip(wanted.requests()) {
            let Some(request) = request else { continue };
            let tools = Tools::find(family).await;
            for backend in Backend::ALL {
                let Some(tool) = tools.of(backend) else {
                    continue;
                };
                troubles.extend(withdraw(tool, family, &request).await);
            }
        }
        troubles
    }
}

impl Kept {
    async fn find(family: Family) -> Self {
        let mut kept = Self {
            family,
            tools: Tools::default(),
            chosen: None,
            stuck: None,
        };
        kept.choose().await;
        kept
    }

    async fn choose(&mut self) {
        self.tools = Tools::find(self.family).await;
        self.chosen = self.tools.choose(self.family).await.map(|(tool, reason)| {
            if let Some(reason) = reason {
                tracing::warn!(
                    "rules go to iptables-{} though the installed {} is of the other kind: {reason}",
                    tool.version.backend.as_str(),
                    programs::name(self.family),
                );
            }
            tool
        });
    }

    async fn pass(&mut self, mut request: Request, moment: Moment) -> Option<Trouble> {
        let name = programs::name(self.family);
        if self.chosen.is_none() {
            // It may have been installed since.
            self.choose().await;
        }
        let Some(tool) = self.chosen.clone() else {
            if !request.masq && !request.forward {
                return None;
            }
            let text = format!(
                "Failed to setup IPTables. {name} binary was not found: install the package iptables, or set EnableNFTables; until then \
                 this node has no masquerade or forward rules"
            );
            return Some(Trouble {
                text,
                lacking: request.masq,
            });
        };
        request.random_fully &= tool.version.knows_random_fully();
        if moment == Moment::Start && request.has_moved() {
            announce_move(&request);
        }
        let done = self.converge(&tool, &request, moment).await;
        if moment == Moment::Start && done.is_ok() {
            self.leave_other(&tool, &request).await;
        }
        done.err()
    }

    async fn converge(
        &mut self,
        tool: &Tool,
        request: &Request,
        moment: Moment,
    ) -> Result<(), Trouble> {
        let mut failed = None;
        for attempt in 0..ATTEMPTS {
            let dump = self.dump(tool).await?;
            let plan = iptables::plan(&dump, request, moment);
            if plan.is_empty() {
                self.stuck = None;
                return Ok(());
            }
            if self.stuck.as_ref() == Some(&dump) {
                return Err(self.does_not_stick());
            }
            if attempt == 0 {
                announce(&plan, request, moment);
            }
            match tool.restore(&plan.payload).await {
                Ok(()) => {
                    tracing::info!("bootstrap done");
                    let dump = self.dump(tool).await?;
                    if iptables::plan(&dump, request, Moment::Resync).is_empty() {
                        self.stuck = None;
                        return Ok(());
                    }
                    self.stuck = Some(dump);
                }
                Err(error) => {
                    failed = Some(error);
                    sleep(PAUSE).await;
                }
            }
        }
        Err(match failed {
            Some(error) => refused(&error),
            None => self.does_not_stick(),
        })
    }

    async fn dump(&self, tool: &Tool) -> Result<Dump, Trouble> {
        tool.dump(self.family).await.map_err(|error| {
            Trouble::lack(format!(
                "Failed to ensure iptables rules: list them: {error}"
            ))
        })
    }

    fn does_not_stick(&self) -> Trouble {
        Trouble::lack(format!(
            "Failed to ensure iptables rules: {} does not show them as they were written: compare with {0}-save",
            programs::name(self.family)
        ))
    }

    /// Removes what an earlier start has left in the back end that is not used any more.
    async fn leave_other(&self, tool: &Tool, request: &Request) {
        for backend in Backend::ALL {
            if backend == tool.version.backend {
                continue;
            }
            if let Some(other) = self.tools.of(backend)
                && let Some(trouble) = withdraw(other, self.family, request).await
            {
                tracing::warn!("{}", trouble.text);
            }
        }
    }
}

/// Removes the rules of this instance from one back end.
async fn withdraw(tool: &Tool, family: Family, request: &Request) -> Option<Trouble> {
    let withdrawn = request.withdrawn();
    let work = async {
        let mut outcome = Ok(());
        for _attempt in 0..ATTEMPTS {
            let dump = tool.dump(family).await?;
            let plan = iptables::plan(&dump, &withdrawn, Moment::Start);
            if plan.is_empty() {
                return Ok(());
            }
            outcome = tool.restore(&plan.payload).await;
            if outcome.is_ok() {
                announce_removal(&plan);
            }
        }
        outcome
    };
    let result: Result<(), ProgramError> = work.await;
    result.err().map(|error| {
        Trouble::note(format!(
            "our rules in iptables-{} cannot be removed: {error}",
            tool.version.backend.as_str()
        ))
    })
}

fn refused(error: &ProgramError) -> Trouble {
    Trouble::lack(format!(
        "Failed to ensure iptables rules: change them: {error}"
    ))
}

fn announce_move(request: &Request) {
    let unknown = match request.network {
        ipnet::IpNet::V4(_) => "0.0.0.0/0",
        ipnet::IpNet::V6(_) => "::/0",
    };
    let before = match request.previous {
        Some((network, subnet)) => format!("({network}, {subnet})"),
        None => format!("({unknown}, {unknown})"),
    };
    tracing::info!(
        "Current network or subnet ({}, {}) is not equal to previous one {before}, trying to recycle old iptables rules",
        request.network,
        request.subnet
    );
}

fn announce(plan: &Plan, request: &Request, moment: Moment) {
    announce_removal(plan);
    if !plan.lacking {
        return;
    }
    if moment == Moment::Resync {
        tracing::info!("Some iptables rules are missing; deleting and recreating rules");
    } else if request.masq {
        tracing::info!("Setting up masking rules");
    }
}

fn announce_removal(plan: &Plan) {
    for rule in &plan.stale {
        tracing::info!("remove the iptables rule {rule}");
    }
}
