//! The commands.

mod add;
mod check;
mod del;
mod gc;
mod status;

use std::fs;

use flannel_core::pods::{
    cni::CniPod,
    report::{Report, Word},
};

use crate::{
    agent,
    call::{Call, Verb},
    error::CniError,
    netconf::NetConf,
    subnet_env::SubnetEnv,
    version,
};

/// Carries out a call, and gives what is to be printed.
pub(crate) fn run(call: &Call, stdin: &[u8]) -> Result<String, CniError> {
    let conf = NetConf::parse(stdin)?;
    match call.verb {
        Verb::Add => {
            version::check(conf.spec_version())?;
            add::run(call, &conf)
        }
        Verb::Del => {
            version::check(conf.spec_version())?;
            del::run(call, &conf).map(|()| String::new())
        }
        Verb::Check => {
            version::check_allows(conf.spec_version(), "CHECK", version::WITH_CHECK)?;
            check::run(call, &conf).map(|()| String::new())
        }
        Verb::Gc => {
            version::check_allows(conf.spec_version(), "GC", version::WITH_GC)?;
            gc::run(call, &conf).map(|()| String::new())
        }
        Verb::Status => {
            version::check_allows(conf.spec_version(), "STATUS", version::WITH_GC)?;
            status::run(call, &conf).map(|()| String::new())
        }
        Verb::Version => Ok(version::answer()),
    }
}

/// This node's subnet, with upstream's message if there is none.
fn load_env(conf: &NetConf) -> Result<SubnetEnv, CniError> {
    let file = conf.subnet_file().display().to_string();
    let loaded = match fs::read(conf.subnet_file()) {
        Ok(bytes) => SubnetEnv::parse(&file, &String::from_utf8_lossy(&bytes))
            .map_err(|error| error.to_string()),
        Err(error) => Err(format!("open {file}: {}", words(&error))),
    };
    loaded.map_err(|reason| {
        CniError::internal(format!(
            "failed to load flannel 'subnet.env' file: {reason}. Check the flannel pod log for this node."
        ))
    })
}

/// An error of the system in Go's words.
fn words(error: &std::io::Error) -> String {
    match error.raw_os_error() {
        Some(errno) => nix::Error::from_raw(errno).desc().to_lowercase(),
        None => error.to_string(),
    }
}

/// Tells the agent that the pods of a call come or go.
fn report(call: &Call, conf: &NetConf, pods: Vec<CniPod>, word: impl FnOnce(Report) -> Word) {
    let report = Report {
        container: call.container.clone(),
        ifname: call.ifname.clone(),
        pods,
    };
    // Whatever the agent says, the pod works.
    let _answer = agent::tell(&conf.agent_socket, word(report));
}
