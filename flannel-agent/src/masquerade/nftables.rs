//! The rules in nftables.

use flannel_core::{
    addr::Family,
    masquerade::{
        iptables::Moment,
        nft::{self, Change},
    },
};

use super::{Trouble, Wanted, programs::PATIENCE};
use crate::{
    fastpath::{netfilter, rules::UNUSED},
    program::{self, ProgramError},
};

/// What is known of our tables.
#[derive(Debug, Default)]
pub(super) struct Nftables {
    /// What nft showed of each after the last change.
    settled: [Option<String>; 2],
}

impl Nftables {
    /// Brings both tables to their rules. Both are always there, as upstream has it.
    pub(super) async fn pass(&mut self, wanted: &Wanted, moment: Moment) -> Vec<Trouble> {
        if moment == Moment::Start {
            tracing::info!("Starting flannel in nftables mode...");
        }
        let mut troubles = Vec::new();
        let families = Family::ALL.into_iter().zip(wanted.requests());
        for ((family, request), settled) in families.zip(&mut self.settled) {
            let request = request.as_ref();
            let outcome = async {
                let listed = list(family).await?;
                let change = nft::plan(
                    family,
                    listed.as_deref(),
                    settled.as_deref(),
                    request,
                    wanted.ruleset,
                );
                let payload = match change {
                    Change::None => {
                        *settled = listed;
                        return Ok(None);
                    }
                    Change::Contested(other) => return Ok(Some(other)),
                    Change::Apply(payload) => payload,
                };
                if moment == Moment::Resync {
                    tracing::info!(
                        "the nftables rules of table {} are missing or altered; recreating them",
                        nft::table(family)
                    );
                } else {
                    tracing::info!("nftables: setting up rules ({})", nft::word(family));
                }
                program::run("nft", &["-f", "-"], &payload, PATIENCE).await?;
                *settled = list(family).await?;
                Ok(None)
            };
            let outcome: Result<Option<String>, ProgramError> = outcome.await;
            match outcome {
                Ok(None) => {}
                Ok(Some(other)) => troubles.push(Trouble::lack(format!(
                    "table {} has rules of another instance of flannel, for {other}: only one can use nftables in a network namespace, \
                     give the other EnableNFTables=false",
                    nft::table(family)
                ))),
                Err(ProgramError::Missing(_)) => {
                    troubles.push(Trouble {
                        text: "nft was not found: install the package nftables, or unset EnableNFTables; until then this node has no \
                               masquerade or forward rules"
                            .to_owned(),
                        lacking: wanted.masq,
                    });
                    break;
                }
                Err(error) => troubles.push(Trouble::lack(format!(
                    "the nftables rules of table {} cannot be put in place: {error}",
                    nft::table(family)
                ))),
            }
        }
        troubles
    }
}

/// The table as nft shows it; `None` where there is none.
pub(super) async fn list(family: Family) -> Result<Option<String>, ProgramError> {
    let arguments = ["list", "table", nft::word(family), nft::table(family)];
    match program::run("nft", &arguments, "", PATIENCE).await {
        Ok(text) => Ok(Some(text)),
        Err(ProgramError::Failed { said, .. }) if said.contains("No such file or directory") => {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// Removes our tables: the other manager has taken over.
pub(super) async fn retire() -> Vec<Trouble> {
    let mut troubles = Vec::new();
    if netfilter::generation().is_none_or(|generation| generation <= UNUSED) {
        return troubles;
    }
    for family in Family::ALL {
        match list(family).await {
            Ok(None) => {}
            Ok(Some(_)) => {
                let removal = nft::remove(family);
                match program::run("nft", &["-f", "-"], &removal, PATIENCE).await {
                    Ok(_) => tracing::info!("remove nftables table {}", nft::table(family)),
                    Err(error) => troubles.push(Trouble::note(format!(
                        "nftables table {} cannot be removed: {error}",
                        nft::table(family)
                    ))),
                }
            }
            // Without the program there are no tables of an earlier start either, or nobody can tell.
            Err(error) => tracing::debug!(%error, "look for nftables table {}", nft::table(family)),
        }
    }
    troubles
}
