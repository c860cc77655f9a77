//! Findings of an earlier start: a file beside the state, believed only where nothing that they depend on has changed.

use std::{
    fs,
    path::{Path, PathBuf},
};

use flannel_core::features::{Cached, Findings, Key};

use crate::{cli::VERSION, files};

/// Name of the file, in the directory of `subnet.env`.
const FILE: &str = "flannel-features.json";

/// Where the findings of the agent with this `subnet.env` are.
pub(crate) fn path(subnet_file: &Path) -> PathBuf {
    subnet_file.with_file_name(FILE)
}

/// What findings of this process hold for. `None` where nobody can tell two such processes apart: a seccomp filter may refuse anything,
/// and cannot be looked into.
pub(super) fn key() -> Option<Key> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.map(|value| value.trim().to_owned())
    };
    if field("Seccomp:")? != "0" {
        return None;
    }
    let kernel = nix::sys::utsname::uname().ok()?;
    let text = |path: &str| fs::read_to_string(path).map(|text| text.trim().to_owned());
    Some(Key {
        boot: text("/proc/sys/kernel/random/boot_id").ok()?,
        kernel: format!(
            "{} {}",
            kernel.release().to_string_lossy(),
            kernel.version().to_string_lossy()
        ),
        agent: VERSION.into(),
        capabilities: field("CapEff:")?,
        label: text("/proc/self/attr/current").unwrap_or_default(),
        lockdown: text("/sys/kernel/security/lockdown").unwrap_or_default(),
        user_namespace: fs::read_link("/proc/self/ns/user")
            .ok()?
            .to_string_lossy()
            .into_owned(),
    })
}

/// What may be believed of the file. One that is damaged, of another boot or of another process is as good as none.
pub(super) fn read(subnet_file: &Path, key: &Key) -> Findings {
    fs::read_to_string(path(subnet_file))
        .ok()
        .and_then(|text| Cached::parse(&text))
        .map(|cached| cached.believed(key))
        .unwrap_or_default()
}

/// The findings of the agent with this `subnet.env`, for whoever wants to look at them; `None` if it has left none.
pub(crate) fn left(subnet_file: &Path) -> Option<Findings> {
    let text = fs::read_to_string(path(subnet_file)).ok()?;
    Some(Cached::parse(&text)?.findings)
}

/// Writes the file. Without it the next start tries everything again, which is all.
pub(super) fn write(subnet_file: &Path, key: Option<Key>, findings: &Findings) {
    let cached = Cached {
        key,
        findings: findings.clone(),
    };
    if let Err(error) = files::replace(&path(subnet_file), &cached.to_text()) {
        tracing::debug!(%error, "keep what the kernel can do");
    }
}
