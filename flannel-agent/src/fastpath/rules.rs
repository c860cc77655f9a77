//! Reading the packet filter's rules with the tools that made them.

use std::{collections::BTreeSet, fs, time::Duration};

use flannel_core::fastpath::{Firewall, iptables, nft};
use tokio::time::sleep;

use super::netfilter;
use crate::program;

/// The longest a listing may take; a node with a hundred thousand rules needs a few seconds.
const PATIENCE: Duration = Duration::from_secs(30);
/// How often, and how long apart, a listing is tried.
const ATTEMPTS: u32 = 3;
const PAUSE: Duration = Duration::from_millis(50);
/// Names of the legacy tables of this network namespace. Reading it loads no module, which `iptables` does.
const LEGACY_TABLES: &str = "/proc/thread-self/net/ip_tables_names";
/// Tables that iptables-nft makes.
const BUILT_IN: [&str; 5] = ["filter", "nat", "mangle", "raw", "security"];
/// Programs that list the tables of each variant, and the word in their version by which the variant is known.
const LEGACY_SAVE: &[(&str, Option<&str>)] = &[
    ("iptables-legacy-save", None),
    ("iptables-save", Some("legacy")),
];
const COMPAT_SAVE: &[(&str, Option<&str>)] = &[
    ("iptables-nft-save", None),
    ("iptables-save", Some("nf_tables")),
];
/// The table generation of a network namespace in which nft was never used.
pub(crate) const UNUSED: u32 = 1;

/// The rules, and what of them could not be read, one line each. Rules that change while they are listed make a listing fail: it is
/// tried again.
pub(super) async fn read() -> (Firewall, Vec<String>) {
    for _attempt in 1..ATTEMPTS {
        let (firewall, unreadable) = attempt().await;
        if unreadable.is_empty() {
            return (firewall, unreadable);
        }
        sleep(PAUSE).await;
    }
    attempt().await
}

/// The rules as the tools list them.
#[derive(Debug, Default)]
pub(crate) struct Listing {
    /// `iptables-save` of the legacy tables.
    pub(crate) legacy: Option<String>,
    /// `iptables-save` of the tables in nftables.
    pub(crate) compat: Option<String>,
    /// `nft -j list ruleset`.
    pub(crate) nft: Option<String>,
    /// What could not be listed, one line each.
    pub(crate) unreadable: Vec<String>,
}

/// Lists the rules, with the precautions of [`read`].
pub(crate) async fn list() -> Listing {
    let mut listing = Listing::default();
    if !legacy_tables().is_empty() {
        match dump(LEGACY_SAVE).await {
            Ok(text) => listing.legacy = Some(text),
            Err(error) => listing
                .unreadable
                .push(format!("iptables rules (legacy) cannot be listed: {error}")),
        }
    }
    if netfilter::generation().is_some_and(|generation| generation > UNUSED) {
        match run("nft", &["-j", "list", "ruleset"]).await {
            Ok(text) => {
                let tables = nft::ip_tables(&text).unwrap_or_default();
                if tables
                    .iter()
                    .any(|table| BUILT_IN.contains(&table.as_str()))
                {
                    listing.compat = dump(COMPAT_SAVE).await.ok();
                }
                listing.nft = Some(text);
            }
            Err(error) => listing
                .unreadable
                .push(format!("nftables rules cannot be listed: {error}")),
        }
    }
    listing
}

async fn attempt() -> (Firewall, Vec<String>) {
    let mut firewall = Firewall::default();
    let mut unreadable = Vec::new();
    if !legacy_tables().is_empty() {
        match dump(LEGACY_SAVE).await {
            Ok(text) => firewall.chains.extend(iptables::parse(&text, "legacy")),
            Err(error) => {
                unreadable.push(format!("iptables rules (legacy) cannot be listed: {error}"));
            }
        }
    }
    // A kernel without nftables has no generation, and no rules of it.
    if netfilter::generation().is_some_and(|generation| generation > UNUSED)
        && let Err(error) = read_nft(&mut firewall).await
    {
        unreadable.push(format!("nftables rules cannot be listed: {error}"));
    }
    (firewall, unreadable)
}

/// The legacy tables there are.
pub(super) fn legacy_tables() -> Vec<String> {
    let names = fs::read_to_string(LEGACY_TABLES).unwrap_or_default();
    names.lines().map(str::to_owned).collect()
}

async fn read_nft(firewall: &mut Firewall) -> Result<(), String> {
    let listed = run("nft", &["-j", "list", "ruleset"]).await?;
    let mut elsewhere = BTreeSet::new();
    // Only asked where it has something to tell: older versions create their tables on being asked.
    if nft::ip_tables(&listed)?
        .iter()
        .any(|table| BUILT_IN.contains(&table.as_str()))
    {
        // Without it nft's own listing must do, which shows extensions of iptables without what they ask.
        match dump(COMPAT_SAVE).await {
            Ok(text) => {
                elsewhere = iptables::tables(&text);
                firewall.chains.extend(iptables::parse(&text, "nft"));
            }
            Err(error) => tracing::debug!(error, "list the rules of iptables-nft"),
        }
    }
    firewall.chains.extend(nft::parse(&listed, &elsewhere)?);
    Ok(())
}

/// The output of the first of these programs that there is and that is of the wanted variant.
async fn dump(tried: &[(&str, Option<&str>)]) -> Result<String, String> {
    for (name, variant) in tried {
        if program::find(name).is_none() {
            continue;
        }
        match variant {
            Some(variant) if !run(name, &["--version"]).await?.contains(variant) => {}
            _ => return run(name, &[]).await,
        }
    }
    let names: Vec<&str> = tried.iter().map(|(program, _)| *program).collect();
    Err(format!("install {}", names.join(" or ")))
}

async fn run(program: &str, arguments: &[&str]) -> Result<String, String> {
    program::run(program, arguments, "", PATIENCE)
        .await
        .map_err(|error| error.to_string())
}
