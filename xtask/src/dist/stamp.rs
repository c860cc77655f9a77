//! From what a release is built: version, commit and its time.

use std::env;
use std::path::Path;
use std::process::Stdio;

use anyhow::{Context as _, Result, bail};

use super::arch::Arch;
use crate::archive::output;
use crate::process;

/// Everything in a release that says when and from what it was made. Two releases of one commit have the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Stamp {
    pub(crate) version: String,
    /// The commit, with `-dirty` behind it where the tree has changes that are not in it.
    pub(crate) revision: String,
    /// Time of the commit, in seconds since 1970.
    pub(crate) epoch: u64,
}

impl Stamp {
    /// For tests.
    #[cfg(test)]
    pub(super) fn example() -> Self {
        Self {
            version: "0.1.0".to_owned(),
            revision: "abc".to_owned(),
            epoch: 0,
        }
    }

    /// From git, unless `SOURCE_DATE_EPOCH` and `FLANNEL_REVISION` say it, as they must where there is no repository.
    pub(super) fn of(root: &Path, version: &str) -> Result<Self> {
        let git = |words: &[&str], variable: &str| {
            let mut git = process::command("git");
            git.current_dir(root).args(words).stdin(Stdio::null());
            output(&mut git).with_context(|| {
                format!("no repository tells from what this is built: set {variable}")
            })
        };
        let revision = match env::var("FLANNEL_REVISION") {
            Ok(given) if !given.is_empty() => given,
            _ => {
                let commit = git(&["rev-parse", "HEAD"], "FLANNEL_REVISION")?;
                let changes = git(&["status", "--porcelain"], "FLANNEL_REVISION")?;
                let dirty = if changes.trim().is_empty() {
                    ""
                } else {
                    "-dirty"
                };
                format!("{}{dirty}", commit.trim())
            }
        };
        let epoch = match env::var("SOURCE_DATE_EPOCH") {
            Ok(given) if !given.is_empty() => given,
            _ => git(&["log", "-1", "--format=%ct"], "SOURCE_DATE_EPOCH")?,
        };
        let Ok(epoch) = epoch.trim().parse() else {
            bail!("SOURCE_DATE_EPOCH is {epoch:?}: write seconds since 1970");
        };
        if revision
            .chars()
            .any(|c| !(c.is_ascii_alphanumeric() || "-._+".contains(c)))
        {
            bail!("FLANNEL_REVISION is {revision:?}: write a commit");
        }
        Ok(Self {
            version: version.to_owned(),
            revision,
            epoch,
        })
    }

    /// What `flannel-agent --version` says.
    pub(super) fn long_version(&self, arch: Arch) -> String {
        let (commit, dirty) = match self.revision.strip_suffix("-dirty") {
            Some(commit) => (commit, "-dirty"),
            None => (self.revision.as_str(), ""),
        };
        let short = commit.get(..12).unwrap_or(commit);
        format!("{} ({short}{dirty}, linux/{arch})", self.version)
    }

    /// What all files of an architecture begin with.
    pub(super) fn stem(&self, arch: Arch) -> String {
        format!("flannel-ebpf-{}-linux-{arch}", self.version)
    }

    /// The time, as RFC 3339 has it.
    pub(super) fn time(&self) -> String {
        rfc3339(self.epoch)
    }
}

/// Howard Hinnant's `civil_from_days`: eras of 400 years, each beginning in March.
fn rfc3339(epoch: u64) -> String {
    let (days, seconds) = (epoch / 86_400, epoch % 86_400);
    let shifted = days + 719_468;
    let (era, of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 {
        from_march + 3
    } else {
        from_march - 9
    };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (seconds / 3_600, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_is_written_as_others_write_it() {
        for (epoch, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_795_253_760, "2026-11-21T09:36:00Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(rfc3339(epoch), text);
            let date = process::command("date")
                .args(["-u", "-d", &format!("@{epoch}"), "+%FT%TZ"])
                .output()
                .expect("date");
            assert_eq!(String::from_utf8_lossy(&date.stdout).trim(), text);
        }
    }

    #[test]
    fn the_version_names_commit_and_platform() {
        let mut stamp = Stamp {
            version: "0.1.0".to_owned(),
            revision: "0123456789abcdef0123".to_owned(),
            epoch: 0,
        };
        assert_eq!(
            stamp.long_version(Arch::Arm64),
            "0.1.0 (0123456789ab, linux/arm64)"
        );
        stamp.revision.push_str("-dirty");
        assert_eq!(
            stamp.long_version(Arch::Amd64),
            "0.1.0 (0123456789ab-dirty, linux/amd64)"
        );
    }
}
