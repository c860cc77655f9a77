//! Modules of the kernel: loading them, and what there is to know about the machine when they are missing.

use std::{fs, path::Path, time::Duration};

use flannel_core::distribution::{self, Confines, Feature, Host};

use crate::program;

/// Where the modules are; in a container, where the host's are mounted.
const DIR: &str = "/lib/modules";
/// How long `modprobe` may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// Has the kernel load a module. The kernel asks for most by itself, from a program of the machine's that may not know them.
pub(crate) async fn load(module: &str) -> Result<(), String> {
    program::run("modprobe", &[module], "", PATIENCE)
        .await
        .map(drop)
        .map_err(|error| error.to_string())
}

/// Has the kernel load all that a feature needs. The error says what `modprobe` said.
pub(crate) async fn load_feature(feature: Feature, host: &Host) -> Result<(), String> {
    for module in feature.modules() {
        load(module)
            .await
            .map_err(|failure| host.modprobe_note(&failure))?;
    }
    Ok(())
}

/// The machine, as it looks to somebody who misses a feature.
pub(crate) fn host(feature: Feature) -> Host {
    let kernel = release();
    let container = in_container();
    let names: Vec<String> = fs::read_dir(DIR)
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .collect();
    let dep = fs::read_to_string(format!("{DIR}/{kernel}/modules.dep")).ok();
    Host {
        modules: distribution::modules(&kernel, &names, dep.as_deref(), feature),
        os_release: (!container)
            .then(|| {
                ["/etc/os-release", "/usr/lib/os-release"]
                    .iter()
                    .find_map(|path| fs::read_to_string(path).ok())
            })
            .flatten(),
        container,
        kernel,
    }
}

/// What of this process and of the kernel bears on `bpf(2)`.
pub(crate) fn confines() -> Confines {
    use nix::sys::resource::{Resource, getrlimit};
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let seccomp = status
        .lines()
        .find_map(|line| line.strip_prefix("Seccomp:"))
        .is_some_and(|mode| mode.trim() != "0");
    let lockdown = fs::read_to_string("/sys/kernel/security/lockdown")
        .ok()
        .and_then(|text| Some(text.split_once('[')?.1.split_once(']')?.0.to_owned()));
    let memlock = getrlimit(Resource::RLIMIT_MEMLOCK).map_or(libc::RLIM_INFINITY, |(soft, _)| soft);
    Confines {
        seccomp,
        lockdown,
        memlock: Some(memlock).filter(|limit| *limit != libc::RLIM_INFINITY),
        container: in_container(),
    }
}

/// `uname -r`.
pub(crate) fn release() -> String {
    nix::sys::utsname::uname().map_or_else(
        |_| "unknown".into(),
        |name| name.release().to_string_lossy().into_owned(),
    )
}

/// Whether this process's files are those of an image. Every runtime leaves one of these.
fn in_container() -> bool {
    std::env::var_os("KUBERNETES_SERVICE_HOST").is_some()
        || ["/.dockerenv", "/run/.containerenv"]
            .iter()
            .any(|path| Path::new(path).exists())
}
