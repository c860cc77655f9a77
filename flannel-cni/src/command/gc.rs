//! GC: frees what no container has any more. The runtime names every attachment of our network that is to stay.

use std::collections::BTreeSet;

use serde_json::json;

use super::load_env;
use crate::{
    call::{Call, Verb},
    complain,
    delegate::Delegate,
    error::CniError,
    host_local,
    netconf::{Attachment, NetConf},
    plugin,
    saved::Saved,
    version,
};

/// The name of the interface where nobody has written it down: every runtime that has one network gives this.
const IFNAME: &str = "eth0";

pub(super) fn run(call: &Call, conf: &NetConf) -> Result<(), CniError> {
    let Some(valid) = &conf.valid_attachments else {
        complain("the runtime does not say which attachments are to stay: nothing is freed");
        return Ok(());
    };
    // Addresses may be freed without a subnet, but not without knowing where.
    let current = load_env(conf).and_then(|env| Delegate::assemble(conf, &env));
    let mut errors = Vec::new();
    let saved = Saved::new(&conf.data_dir);
    for container in saved.containers()? {
        errors.extend(free_saved(call, conf, &saved, &container, valid).err());
    }
    match current {
        Ok(delegate) => errors.extend(free_others(call, conf, &delegate, valid).err()),
        Err(error) => errors.push(error),
    }
    let mut errors = errors.into_iter();
    match errors.next() {
        None => Ok(()),
        Some(first) => {
            let rest: Vec<String> = errors.map(|error| error.to_string()).collect();
            let details: Vec<String> = std::iter::once(first.details.clone())
                .chain(rest)
                .filter(|text| !text.is_empty())
                .collect();
            Err(first.with_details(details.join("; ")))
        }
    }
}

/// Deletes a container of our network of which something is saved, if it is not to stay.
fn free_saved(
    call: &Call,
    conf: &NetConf,
    saved: &Saved,
    container: &str,
    valid: &[Attachment],
) -> Result<(), CniError> {
    if valid.iter().any(|stays| stays.container == container) {
        return Ok(());
    }
    let Some(text) = saved.get(container)? else {
        return Ok(());
    };
    // Whose an unreadable one is nobody can tell: the container's own DEL sees to it.
    let Ok(delegate) = Delegate::read(&text) else {
        return Ok(());
    };
    if delegate.network() != Some(&conf.name) {
        return Ok(());
    }
    let reserved = host_local::attachments(&delegate)?;
    let mut attachments: BTreeSet<Attachment> = reserved
        .into_iter()
        .filter(|attachment| attachment.container == container)
        .collect();
    if attachments.is_empty() {
        attachments.insert(Attachment {
            container: container.to_owned(),
            ifname: IFNAME.to_owned(),
        });
    }
    for attachment in &attachments {
        delete(call, &delegate, attachment)?;
    }
    saved.remove(container)
}

/// Frees addresses of our network of which nothing is saved, since upstream's plugin forgets a pod whose DEL has failed; and has a
/// delegate that knows GC free what else it may have.
fn free_others(
    call: &Call,
    conf: &NetConf,
    delegate: &Delegate,
    valid: &[Attachment],
) -> Result<(), CniError> {
    let stale: Vec<Attachment> = host_local::attachments(delegate)?
        .into_iter()
        .filter(|attachment| !valid.contains(attachment))
        .collect();
    let known = plugin::versions(call, delegate)?;
    if let Some(version) = version::newest_common(&known) {
        let delegate = delegate.with("cniVersion", json!(version));
        for attachment in &stale {
            delete(call, &delegate, attachment)?;
        }
    }
    if known.iter().any(|version| version == conf.spec_version()) {
        pass_on(call, delegate, valid)?;
    }
    Ok(())
}

fn delete(call: &Call, delegate: &Delegate, attachment: &Attachment) -> Result<(), CniError> {
    complain(&format!(
        "delete {} of container {}, which the runtime does not know",
        attachment.ifname, attachment.container
    ));
    plugin::delete(call, delegate, attachment)
}

fn pass_on(call: &Call, delegate: &Delegate, valid: &[Attachment]) -> Result<(), CniError> {
    let valid: Vec<_> = valid
        .iter()
        .map(|stays| json!({ "containerID": stays.container, "ifname": stays.ifname }))
        .collect();
    let delegate = delegate
        .with("cni.dev/valid-attachments", json!(valid))
        .with("cni.dev/attachments", json!(valid));
    plugin::run(call, Verb::Gc, &delegate).map(drop)
}
