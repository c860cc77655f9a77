//! Finding out what kernel and process can do, by trying it: programs of a few instructions on a packet, maps of one entry, and a pair of
//! interfaces in network namespaces that end with the attempt. Nothing is left behind, and no traffic of the node is touched.
//!
//! It must never decide what follows: `flannel_core::features` does.

mod assembly;
mod cache;
mod kernel;
mod lab;
mod node;
mod trials;
mod wire;

use std::{path::Path, time::Instant};

use flannel_core::features::{Feature, Finding, Findings};

pub(crate) use cache::{left, path as cache_path};
pub(crate) use node::raise_memlock;

use crate::preflight::Capabilities;

/// The findings for a start of the agent: those that an earlier start of this boot has made and that cannot have changed, and the rest
/// tried now. `no_bpf` is why `bpf(2)` is not to be touched.
pub(crate) fn at_start(subnet_file: &Path, no_bpf: Option<&str>) -> Findings {
    let key = cache::key();
    let known = key
        .as_ref()
        .map(|key| cache::read(subnet_file, key))
        .unwrap_or_default();
    settle(subnet_file, key, known, no_bpf)
}

/// The findings with everything tried now, whatever an earlier start has found. Nothing is written.
pub(crate) fn afresh() -> Findings {
    complete(Findings::default(), None)
}

fn settle(
    subnet_file: &Path,
    key: Option<flannel_core::features::Key>,
    known: Findings,
    no_bpf: Option<&str>,
) -> Findings {
    let from_cache = known.iter().count();
    let begin = Instant::now();
    let findings = complete(known, no_bpf);
    let took = begin.elapsed();
    tracing::debug!(?took, from_cache, "tried what this kernel can do");
    for (feature, finding) in findings.iter() {
        let reason = finding.reason().unwrap_or_default();
        tracing::trace!(%feature, finding = finding.as_str(), reason);
    }
    cache::write(subnet_file, key, &findings);
    findings
}

/// Tries what is not known yet.
fn complete(mut known: Findings, no_bpf: Option<&str>) -> Findings {
    let no_bpf = match no_bpf {
        Some(reason) => {
            known.put(Feature::Bpf, Finding::untried(reason));
            Some(reason.to_owned())
        }
        None => try_bpf(&mut known),
    };
    let missing: Vec<Feature> = Feature::ALL
        .iter()
        .copied()
        .filter(|feature| known.get(*feature).is_none())
        .collect();
    let wanted = |feature: Feature| missing.contains(&feature);
    let mut found = lab::try_all(&wanted, no_bpf.as_deref());
    if no_bpf.is_none() {
        found.extend(trials::try_all(wanted));
        found.extend(node::maps(wanted));
    }
    found.extend(node::settings(wanted, no_bpf.is_none()));
    for (feature, finding) in found {
        known.put(feature, finding);
    }
    for feature in missing {
        if known.get(feature).is_none() {
            let needs = no_bpf.as_deref().unwrap_or("needs bpf");
            known.put(feature, Finding::untried(needs));
        }
    }
    known
}

/// Whether `bpf(2)` may be called at all: always tried, because a filter may have come meanwhile. Gives why not.
fn try_bpf(known: &mut Findings) -> Option<String> {
    // What the capabilities say no to need not be tried; some security modules report each attempt.
    if let Some(reason) = Capabilities::effective().missing_for_bpf() {
        *known = known
            .iter()
            .filter(|(feature, _)| matches!(feature, Feature::Vxlan | Feature::Veth))
            .map(|(feature, finding)| (feature, finding.clone()))
            .collect();
        known.put(Feature::Bpf, Finding::absent(reason));
        return Some("needs bpf".into());
    }
    node::raise_memlock();
    match node::bpf() {
        Finding::Present => {
            known.put(Feature::Bpf, Finding::Present);
            None
        }
        finding => {
            known.put(Feature::Bpf, finding);
            Some("needs bpf".into())
        }
    }
}
