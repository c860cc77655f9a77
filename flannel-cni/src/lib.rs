//! The flannel CNI plugin: fills this node's subnet from `subnet.env` into a configuration for bridge and host-local, and lets them do
//! the work (upstream: the repository `flannel-io/cni-plugin`).
//!
//! It must never free or remove what it has not been told to, and never forget what it will have to free: a delegate's configuration
//! is on disk before the delegate runs, and goes only when the delegate has confirmed that everything is gone.

#![forbid(unsafe_code)]
#![deny(missing_docs)]
#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod agent;
mod bridge;
mod call;
mod command;
mod delegate;
mod error;
mod host_local;
mod json;
mod netconf;
mod plugin;
mod saved;
pub mod subnet_env;
mod version;

use std::{
    io::{self, Read as _, Write as _},
    process::ExitCode,
};

use call::{Call, Verb};
use error::CniError;

/// Runs the command that the environment names, as a runtime started us.
pub fn main() -> ExitCode {
    let variable = |name: &str| std::env::var(name).unwrap_or_default();
    if variable("CNI_COMMAND").is_empty() {
        complain(&version::about());
        return ExitCode::SUCCESS;
    }
    match serve(&variable) {
        Ok(answer) => {
            // A runtime that has gone away repeats itself or deletes: either is prepared for.
            let _gone = io::stdout().write_all(answer.as_bytes());
            ExitCode::SUCCESS
        }
        Err(error) => {
            let _gone = writeln!(io::stdout(), "{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn serve(variable: &dyn Fn(&str) -> String) -> Result<String, CniError> {
    let call = Call::read(variable)?;
    if call.verb == Verb::Version {
        return Ok(version::answer());
    }
    let mut stdin = Vec::new();
    io::stdin().read_to_end(&mut stdin).map_err(|error| {
        CniError::new(
            error::IO_FAILURE,
            format!("error reading from stdin: {error}"),
        )
    })?;
    command::run(&call, &stdin)
}

/// A line on standard error, which runtimes log.
fn complain(line: &str) {
    // Nobody to tell if standard error is closed.
    let _closed = writeln!(io::stderr(), "{line}");
}
