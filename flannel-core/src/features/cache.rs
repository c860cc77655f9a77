//! What a later start may believe of an earlier one's findings.

use serde::{Deserialize, Serialize};

use super::Findings;

/// What findings hold for: the same kernel, this boot of it, and a process that may do the same.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Key {
    /// `/proc/sys/kernel/random/boot_id`.
    pub boot: String,
    /// `uname -r` and `uname -v`: a kernel that was replaced by kexec has the same release.
    pub kernel: String,
    /// Version of the agent.
    pub agent: String,
    /// The effective capabilities, in hex.
    pub capabilities: String,
    /// The security module's name for the process, such as an AppArmor profile.
    pub label: String,
    /// `/sys/kernel/security/lockdown`; empty where there is none.
    pub lockdown: String,
    /// The user namespace, in which the capabilities count.
    pub user_namespace: String,
}

/// Findings and what they hold for, as in the cache's file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cached {
    /// What they hold for; `None` where no other process can be known to be like the one that has found them.
    pub key: Option<Key>,
    /// The findings.
    pub findings: Findings,
}

impl Cached {
    /// Reads a file's text; `None` for anything that this version would not have written.
    pub fn parse(text: &str) -> Option<Self> {
        serde_json::from_str(text).ok()
    }

    /// The file's text.
    pub fn to_text(&self) -> String {
        // Strings and enums: there is nothing in it that JSON cannot say.
        serde_json::to_string_pretty(self).unwrap_or_default() + "\n"
    }

    /// What of it a start with this key may believe without trying. Everything else it has to try: what may have come since, what may
    /// have gone, and what an earlier start could not try.
    pub fn believed(self, key: &Key) -> Findings {
        if self.key.as_ref() == Some(key) {
            self.findings.lasting()
        } else {
            Findings::default()
        }
    }
}
