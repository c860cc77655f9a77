//! DEL: a pod's network goes, as often as the runtime asks until everything is gone.

use flannel_core::pods::report::Word;

use super::{load_env, report};
use crate::{
    call::{Call, Verb},
    complain,
    delegate::Delegate,
    error::CniError,
    netconf::NetConf,
    plugin,
    saved::Saved,
};

pub(super) fn run(call: &Call, conf: &NetConf) -> Result<(), CniError> {
    let saved = Saved::new(&conf.data_dir);
    let Some(text) = saved.get(&call.container)? else {
        // Never added, or gone already.
        return Ok(());
    };
    call.check_netns()?;
    let delegate = match Delegate::read(&text) {
        Ok(delegate) => delegate,
        Err(reason) => {
            complain(&format!(
                "failed to parse netconf: {}: {reason}; deleting with what the runtime says",
                saved.path(&call.container).display()
            ));
            reconstruct(conf)?
        }
    };
    // Before the address can be anybody else's.
    report(call, conf, conf.pods_before(), Word::Del);
    // If it fails what is saved stays, so that a repetition has the delegate try again.
    plugin::run(call, Verb::Del, &delegate)?;
    saved.remove(&call.container)
}

/// What the delegate was probably given.
fn reconstruct(conf: &NetConf) -> Result<Delegate, CniError> {
    let mut subnets = conf.subnets_before();
    if subnets.is_empty() {
        subnets = load_env(conf)?.subnets();
    }
    Delegate::reconstruct(conf, &subnets)
}
