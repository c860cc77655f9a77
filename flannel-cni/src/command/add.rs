//! ADD: a pod's network.

use flannel_core::pods::{cni, report::Word};
use serde_json::json;

use super::{load_env, report};
use crate::{
    bridge,
    call::{Call, Verb},
    complain,
    delegate::Delegate,
    error::CniError,
    json,
    netconf::NetConf,
    plugin,
    saved::Saved,
    subnet_env::SubnetEnv,
};

pub(super) fn run(call: &Call, conf: &NetConf) -> Result<String, CniError> {
    let env = load_env(conf)?;
    let delegate = Delegate::assemble(conf, &env)?;
    call.check_netns()?;
    let text = json::compact(&delegate.conf);
    complain(&format!(
        "delegateAdd: netconf sent to delegate plugin:\n{text}"
    ));
    let saved = Saved::new(&conf.data_dir);
    // Then this is a repetition, and what the delegate has made before must not be undone with it.
    let had = saved.exists(&call.container);
    saved.put(&call.container, &text)?;
    let added = match plugin::run(call, Verb::Add, &delegate) {
        Err(error) if had => Err(error),
        Err(error) => retry(call, &delegate, &env, &saved, error),
        done => done,
    };
    let result = added?;
    let pods = cni::parse(&result);
    if !pods.is_empty() {
        report(call, conf, pods, Word::Add);
    }
    Ok(result)
}

/// Undoes what a failed ADD may have left, and tries once more if the only trouble is a bridge that kept an old address of ours.
fn retry(
    call: &Call,
    delegate: &Delegate,
    env: &SubnetEnv,
    saved: &Saved,
    error: CniError,
) -> Result<String, CniError> {
    if !undo(call, delegate, saved) || !bridge::is_refusal(&error) {
        return Err(error);
    }
    let (name, old) = bridge::may_move(delegate, env, error)?;
    complain(&format!(
        "{name} has no ports and the address {old} of an earlier subnet of this node: replacing it"
    ));
    saved.put(&call.container, &json::compact(&delegate.conf))?;
    let forced = delegate.with("forceAddress", json!(true));
    plugin::run(call, Verb::Add, &forced).inspect_err(|_| {
        undo(call, delegate, saved);
    })
}

/// Has the delegate take back what it has made. If it cannot, what is saved stays for the runtime's DEL.
fn undo(call: &Call, delegate: &Delegate, saved: &Saved) -> bool {
    let undone = plugin::run(call, Verb::Del, delegate).and_then(|_| saved.remove(&call.container));
    if let Err(error) = &undone {
        complain(&format!("undo the failed ADD: {error}"));
    }
    undone.is_ok()
}
