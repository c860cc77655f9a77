//! The daemon's flags after `check`, which looks at what they name.

use clap::{ArgMatches, Command, FromArgMatches as _, builder::Resettable};

use super::Args;
use crate::leases::EtcdOptions;

const NAME: &str = "check";
/// Under which they are listed.
const HEADING: &str = "The daemon's flags";

/// Lets `check` take all flags of the daemon behind it, too. Defaults and variables stay with those before it.
pub(super) fn offer(command: Command) -> Command {
    let flags: Vec<_> = command
        .get_arguments()
        .filter(|flag| !flag.is_global_set() && flag.get_long().is_some())
        .filter(|flag| !matches!(flag.get_id().as_str(), "help" | "version"))
        .map(|flag| {
            flag.clone()
                .env(Resettable::Reset)
                .default_value(Resettable::Reset)
                .help_heading(HEADING)
        })
        .collect();
    command.mut_subcommand(NAME, |check| check.args(flags))
}

/// Puts what was given behind `check` over what was given before it.
pub(super) fn merge(args: &mut Args, matches: &ArgMatches) -> Result<(), clap::Error> {
    match matches.subcommand_matches(NAME) {
        Some(behind) => args.update_from_arg_matches(behind),
        None => Ok(()),
    }
}

impl Args {
    /// Whether a flag or variable says which lease store to use.
    pub fn names_store(&self) -> bool {
        let default = EtcdOptions::default();
        self.kube.kube_subnet_mgr
            || self.lease_dir.is_some()
            || self.etcd.etcd_endpoints != default.endpoints
            || self.etcd.etcd_prefix != default.prefix
    }
}
