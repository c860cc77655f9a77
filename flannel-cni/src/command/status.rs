//! STATUS: whether a pod can be added.

use flannel_core::pods::report::{Outcome, Word};

use super::load_env;
use crate::{
    agent,
    call::{Call, Verb},
    delegate::Delegate,
    error::{CniError, NOT_AVAILABLE},
    netconf::NetConf,
    plugin,
};

pub(super) fn run(call: &Call, conf: &NetConf) -> Result<(), CniError> {
    let env = load_env(conf).map_err(|error| CniError {
        code: NOT_AVAILABLE,
        ..error
    })?;
    let delegate = Delegate::assemble(conf, &env)?;
    if let Some(answer) = agent::tell(&conf.agent_socket, Word::Status)
        && answer.state == Outcome::NotReady
    {
        return Err(CniError::new(
            NOT_AVAILABLE,
            format!("flannel is not ready: {}", answer.reason),
        ));
    }
    let known = plugin::versions(call, &delegate)?;
    if known.iter().any(|version| version == conf.spec_version()) {
        plugin::run(call, Verb::Status, &delegate)?;
    }
    Ok(())
}
