//! Reading the packet filter's rules with the tools that made them.

use std::{collections::BTreeSet, fs, time::Duration};

use flannel_core::{
    addr::Family,
    fastpath::{Firewall, iptables, nft},
};
use tokio::time::sleep;

use super::netfilter;
use crate::program;

/// The longest a listing may take; a node with a hundred thousand rules needs a few seconds.
const PATIENCE: Duration = Duration::from_secs(30);
/// How often, and how long apart, a listing is tried.
const ATTEMPTS: u32 = 3;
const PAUSE: Duration = Duration::from_millis(50);
/// Tables that iptables-nft makes.
const BUILT_IN: [&str; 5] = ["filter", "nat", "mangle", "raw", "security"];
/// A program that lists tables, and the word in its version by which the variant is known if its name does not tell.
type Save = (&'static str, Option<&'static str>);

/// What there is in this namespace of one family, and by which programs it is listed.
#[derive(Debug)]
struct Sources {
    /// `iptables`, as messages name it.
    name: &'static str,
    /// Names of the legacy tables. Reading it loads no module, which `iptables` does.
    legacy_tables: &'static str,
    legacy: [Save; 2],
    compat: [Save; 2],
}

const IPV4: Sources = Sources {
    name: "iptables",
    legacy_tables: "/proc/thread-self/net/ip_tables_names",
    legacy: [
        ("iptables-legacy-save", None),
        ("iptables-save", Some("legacy")),
    ],
    compat: [
        ("iptables-nft-save", None),
        ("iptables-save", Some("nf_tables")),
    ],
};

const IPV6: Sources = Sources {
    name: "ip6tables",
    legacy_tables: "/proc/thread-self/net/ip6_tables_names",
    legacy: [
        ("ip6tables-legacy-save", None),
        ("ip6tables-save", Some("legacy")),
    ],
    compat: [
        ("ip6tables-nft-save", None),
        ("ip6tables-save", Some("nf_tables")),
    ],
};

const fn sources(family: Family) -> &'static Sources {
    match family {
        Family::V4 => &IPV4,
        Family::V6 => &IPV6,
    }
}

/// The table generation of a network namespace in which nft was never used.
pub(crate) const UNUSED: u32 = 1;

/// The rules for one family, and what of them could not be read, one line each. Rules that change while they are listed make a
/// listing fail: it is tried again.
pub(super) async fn read(family: Family) -> (Firewall, Vec<String>) {
    for _attempt in 1..ATTEMPTS {
        let (firewall, unreadable) = attempt(family).await;
        if unreadable.is_empty() {
            return (firewall, unreadable);
        }
        sleep(PAUSE).await;
    }
    attempt(family).await
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
pub(crate) async fn list(family: Family) -> Listing {
    let mut listing = Listing::default();
    if !legacy_tables(family).is_empty() {
        match list_legacy(family).await {
            Ok(text) => listing.legacy = Some(text),
            Err(error) => listing.unreadable.push(error),
        }
    }
    if netfilter::generation().is_some_and(|generation| generation > UNUSED) {
        match run("nft", &["-j", "list", "ruleset"]).await {
            Ok(text) => {
                let tables = nft::tables(&text, family).unwrap_or_default();
                if tables
                    .iter()
                    .any(|table| BUILT_IN.contains(&table.as_str()))
                {
                    listing.compat = dump(&sources(family).compat).await.ok();
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

async fn list_legacy(family: Family) -> Result<String, String> {
    let sources = sources(family);
    dump(&sources.legacy)
        .await
        .map_err(|error| format!("{} rules (legacy) cannot be listed: {error}", sources.name))
}

async fn attempt(family: Family) -> (Firewall, Vec<String>) {
    let mut firewall = Firewall::default();
    let mut unreadable = Vec::new();
    if !legacy_tables(family).is_empty() {
        match list_legacy(family).await {
            Ok(text) => firewall
                .chains
                .extend(iptables::parse(&text, "legacy", family)),
            Err(error) => unreadable.push(error),
        }
    }
    // A kernel without nftables has no generation, and no rules of it.
    if netfilter::generation().is_some_and(|generation| generation > UNUSED)
        && let Err(error) = read_nft(&mut firewall, family).await
    {
        unreadable.push(format!("nftables rules cannot be listed: {error}"));
    }
    (firewall, unreadable)
}

/// The legacy tables there are.
pub(super) fn legacy_tables(family: Family) -> Vec<String> {
    let names = fs::read_to_string(sources(family).legacy_tables).unwrap_or_default();
    names.lines().map(str::to_owned).collect()
}

async fn read_nft(firewall: &mut Firewall, family: Family) -> Result<(), String> {
    let listed = run("nft", &["-j", "list", "ruleset"]).await?;
    let mut elsewhere = BTreeSet::new();
    // Only asked where it has something to tell: older versions create their tables on being asked.
    if nft::tables(&listed, family)?
        .iter()
        .any(|table| BUILT_IN.contains(&table.as_str()))
    {
        // Without it nft's own listing must do, which shows extensions of iptables without what they ask.
        match dump(&sources(family).compat).await {
            Ok(text) => {
                elsewhere = iptables::tables(&text);
                firewall
                    .chains
                    .extend(iptables::parse(&text, "nft", family));
            }
            Err(error) => tracing::debug!(error, "list the rules of iptables-nft"),
        }
    }
    firewall
        .chains
        .extend(nft::parse(&listed, family, &elsewhere)?);
    Ok(())
}

/// The output of the first of these programs that there is and that is of the wanted variant.
async fn dump(tried: &[Save]) -> Result<String, String> {
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
