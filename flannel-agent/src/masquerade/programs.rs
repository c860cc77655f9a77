//! The programs of iptables that this node has, and which of them to use.

use std::{fs, time::Duration};

use flannel_core::{
    addr::Family,
    masquerade::{
        backend::{self, Backend, Found, Version},
        iptables::Dump,
    },
};

use crate::{
    fastpath::{netfilter, rules::UNUSED},
    program::{self, ProgramError},
};

/// The longest that a program may take: a node with a hundred thousand rules needs seconds.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);
/// How long `iptables-restore` waits for others that change rules, in seconds.
const LOCK_WAIT: &str = "--wait=5";

/// The programs of one family and one back end.
#[derive(Clone, Debug)]
pub(super) struct Tool {
    save: String,
    restore: String,
    pub(super) version: Version,
}

/// The name of the program that lists and changes rules of a family.
pub(super) const fn name(family: Family) -> &'static str {
    match family {
        Family::V4 => "iptables",
        Family::V6 => "ip6tables",
    }
}

impl Tool {
    /// The programs of this stem, if all are there: `iptables`, `ip6tables-legacy`.
    async fn find(stem: &str) -> Option<Self> {
        let (save, restore) = (format!("{stem}-save"), format!("{stem}-restore"));
        for program in [stem, &save, &restore] {
            program::find(program)?;
        }
        let said = program::run(stem, &["--version"], "", PATIENCE).await;
        let version = match said {
            Ok(said) => Version::parse(&said)?,
            Err(error) => {
                tracing::debug!(%error, "ask for the version of {stem}");
                return None;
            }
        };
        Some(Self {
            save,
            restore,
            version,
        })
    }

    /// All rules there are, without making tables by asking.
    pub(super) async fn dump(&self, family: Family) -> Result<Dump, ProgramError> {
        if !in_use(self.version.backend, family) {
            return Ok(Dump::default());
        }
        let text = program::run(&self.save, &[], "", PATIENCE).await?;
        Ok(Dump::parse(&text))
    }

    /// Applies a payload: one transaction per table.
    pub(super) async fn restore(&self, payload: &str) -> Result<(), ProgramError> {
        let mut arguments = vec!["--noflush"];
        if self.version.can_wait() {
            arguments.push(LOCK_WAIT);
        }
        program::run(&self.restore, &arguments, payload, PATIENCE).await?;
        Ok(())
    }
}

/// The programs of one family.
#[derive(Clone, Debug, Default)]
pub(super) struct Tools {
    default: Option<Tool>,
    legacy: Option<Tool>,
    nft: Option<Tool>,
}

impl Tools {
    pub(super) async fn find(family: Family) -> Self {
        let name = name(family);
        let names = [format!("{name}-legacy"), format!("{name}-nft")];
        let [legacy, nft] = names.each_ref().map(|name| Tool::find(name.as_str()));
        let finding = async { tokio::join!(Tool::find(name), legacy, nft) };
        let (default, legacy, nft) = Box::pin(finding).await;
        let mut tools = Self {
            default,
            legacy,
            nft,
        };
        // Under their own names they may be missing.
        if let Some(default) = &tools.default {
            let own = match default.version.backend {
                Backend::Legacy => &mut tools.legacy,
                Backend::Nft => &mut tools.nft,
            };
            own.get_or_insert_with(|| default.clone());
        }
        tools.default = tools
            .default
            .or_else(|| tools.nft.clone())
            .or_else(|| tools.legacy.clone());
        tools
    }

    /// Those of one back end.
    pub(super) fn of(&self, backend: Backend) -> Option<&Tool> {
        match backend {
            Backend::Legacy => self.legacy.as_ref(),
            Backend::Nft => self.nft.as_ref(),
        }
    }

    /// Those to use, and why they are not those that the node's administrator has chosen.
    pub(super) async fn choose(&self, family: Family) -> Option<(Tool, Option<String>)> {
        let default = self.default.clone()?;
        let legacy = self.found(Backend::Legacy, family).await;
        let nft = self.found(Backend::Nft, family).await;
        let (backend, reason) = backend::choose(default.version.backend, &legacy, &nft);
        match reason.and_then(|reason| Some((self.of(backend)?.clone(), reason))) {
            Some((tool, reason)) => Some((tool, Some(reason))),
            None => Some((default, None)),
        }
    }

    async fn found(&self, backend: Backend, family: Family) -> Found {
        let Some(tool) = self.of(backend) else {
            return Found::default();
        };
        let dump = tool.dump(family).await.unwrap_or_else(|error| {
            tracing::debug!(%error, "list the rules of {}", tool.save);
            Dump::default()
        });
        Found {
            dump,
            installed: true,
        }
    }
}

/// Whether the back end has been used at all in this network namespace.
pub(super) fn in_use(backend: Backend, family: Family) -> bool {
    match backend {
        Backend::Legacy => {
            let names = match family {
                Family::V4 => "/proc/thread-self/net/ip_tables_names",
                Family::V6 => "/proc/thread-self/net/ip6_tables_names",
            };
            fs::read_to_string(names).is_ok_and(|names| !names.trim().is_empty())
        }
        Backend::Nft => netfilter::generation().is_some_and(|generation| generation > UNUSED),
    }
}
