//! `cargo xtask setup`, and the check with which every other command begins.

mod programs;

use std::fs;
use std::io::{self, IsTerminal as _};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};
use xtask::ebpf;

use crate::borrowed::Borrowed;
use crate::cargo;
use crate::dist::arch::Arch;
use crate::dist::tools;
use crate::process;

use programs::Tool;

/// How much of the tools a command is going to use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Needs {
    /// The eBPF object.
    Ebpf,
    /// The whole workspace, and rustfmt and clippy.
    Build,
    /// What the lab of demo, tests and benchmarks runs.
    Everything,
    /// Those, and what boots other kernels.
    Kernels,
}

/// Components of the pinned toolchain beside rust-src, and the cargo subcommands they bring.
const COMPONENTS: [(&str, &str); 2] = [("rustfmt", "cargo-fmt"), ("clippy", "cargo-clippy")];

/// What is not there.
struct Missing {
    tools: Vec<Tool>,
    components: Vec<&'static str>,
    /// Why there is no linker to use, when there is none.
    linker: Option<String>,
    /// Packages of other releases, to be unpacked below `target`.
    borrowed: Vec<&'static Borrowed>,
}

impl Missing {
    fn find(root: &Path, needs: Needs) -> Result<Self> {
        let tools = programs::all()
            .filter(|tool| tool.needs <= needs && !present(tool.probe))
            .collect();
        let mut components = Vec::new();
        match ebpf::check_rust_src(root) {
            Ok(()) => {}
            Err(ebpf::EbpfError::NoRustSrc(_)) => components.push("rust-src"),
            Err(error) => return Err(error.into()),
        }
        if needs >= Needs::Build {
            let absent = COMPONENTS
                .iter()
                .filter(|(_, program)| !ebpf::on_search_path(program));
            components.extend(absent.map(|(component, _)| *component));
        }
        let linker = ebpf::find_linker().err().map(|error| error.to_string());
        // Elsewhere than on Debian it has to be put there by hand; the tests say where.
        let borrowed = if needs >= Needs::Everything && is_debian() {
            Borrowed::absent(root)
        } else {
            Vec::new()
        };
        Ok(Self {
            tools,
            components,
            linker,
            borrowed,
        })
    }

    fn is_empty(&self) -> bool {
        self.tools.is_empty()
            && self.components.is_empty()
            && self.linker.is_none()
            && self.borrowed.is_empty()
    }

    fn names(&self) -> String {
        let tools = self.tools.iter().map(|tool| tool.probe);
        let linker = self.linker.iter().map(|_| "bpf-linker");
        let borrowed = self.borrowed.iter().map(|package| package.name());
        tools
            .chain(self.components.iter().copied())
            .chain(linker)
            .chain(borrowed)
            .collect::<Vec<_>>()
            .join(", ")
    }
}

/// Installs what is missing, or says that nothing is.
pub(crate) fn run(root: &Path) -> Result<()> {
    let mut installed = install_missing(root, Needs::Kernels)?;
    // The tests on another architecture are built here. Elsewhere there are no kernels to run them on.
    if is_debian() {
        installed |= tools::ensure_cross(root, &Arch::ALL)?;
    }
    if !installed {
        println!("setup: everything is installed");
    }
    Ok(())
}

/// Installs what a command needs and lacks; prints nothing when it lacks nothing.
pub(crate) fn ensure(root: &Path, needs: Needs) -> Result<()> {
    install_missing(root, needs).map(|_| ())
}

/// Returns whether anything had to be installed.
fn install_missing(root: &Path, needs: Needs) -> Result<bool> {
    let missing = Missing::find(root, needs)?;
    if missing.is_empty() {
        return Ok(false);
    }
    let channel = ebpf::channel(root)?;
    announce(root, &missing, &channel);
    if !missing.tools.is_empty() {
        install_packages(&missing.tools)?;
    }
    if !missing.components.is_empty() {
        add_components(root, &channel, &missing.components)?;
    }
    if missing.linker.is_some() {
        install_linker(root)?;
    }
    for package in &missing.borrowed {
        package.fetch(root)?;
    }
    let still = Missing::find(root, needs)?;
    if !still.is_empty() {
        bail!("still missing after the installation: {}", still.names());
    }
    eprintln!("setup: done");
    Ok(true)
}

fn announce(root: &Path, missing: &Missing, channel: &str) {
    eprintln!("setup: missing: {}", missing.names());
    if !missing.tools.is_empty() && is_debian() {
        eprintln!(
            "setup: will run apt-get update and install {} (a minute or two)",
            words(&debian(&missing.tools))
        );
    }
    if !missing.components.is_empty() {
        eprintln!(
            "setup: will add {} to Rust {channel} (seconds)",
            missing.components.join(", ")
        );
    }
    for package in &missing.borrowed {
        eprintln!("setup: {}", package.announcement(root));
    }
    if let Some(why) = &missing.linker {
        eprintln!("setup: {why}");
        eprintln!(
            "setup: will build bpf-linker {} (2 to 5 minutes)",
            ebpf::LINKER_VERSION
        );
    }
}

fn install_packages(tools: &[Tool]) -> Result<()> {
    let packages = debian(tools);
    if !is_debian() {
        bail!(
            "install these packages and run this again: dnf install {}; or pacman -S {}; or, in Debian's names, {}",
            words(&distinct(tools, |tool| tool.fedora)),
            words(&distinct(tools, |tool| tool.arch)),
            words(&packages)
        );
    }
    let fresh_etcd = packages.contains(&"etcd-server");
    apt_install(&packages)?;
    // The tests start their own etcd; nobody asked for the service that Debian's package starts.
    if fresh_etcd && Path::new("/run/systemd/system").is_dir() {
        eprintln!("setup: stopping the etcd service that came with the package");
        process::run_undisturbed(as_root("systemctl")?.args(["disable", "--now", "etcd.service"]))?;
    }
    Ok(())
}

/// Installs Debian's packages.
pub(crate) fn apt_install(packages: &[&str]) -> Result<()> {
    process::run_undisturbed(as_root("apt-get")?.args(["update", "-qq"]))?;
    process::run_undisturbed(
        as_root("apt-get")?
            .args([
                "install",
                "-y",
                "-qq",
                "-o=Dpkg::Use-Pty=0",
                "--no-install-recommends",
            ])
            .args(packages),
    )
}

/// A command run as root: directly, or by sudo, which may ask for a password if there is somebody to ask.
fn as_root(program: &str) -> Result<Command> {
    let mut command = if process::is_root() {
        process::command("env")
    } else if process::on_path("sudo") {
        let mut sudo = process::command("sudo");
        if !io::stdin().is_terminal() {
            sudo.arg("-n");
        }
        sudo.arg("env");
        sudo
    } else {
        bail!(
            "installing packages needs root: there is no sudo, run `cargo xtask setup` as root once"
        );
    };
    // noninteractive also answers tshark's question about capturing by non-root users, with no.
    command.args(["DEBIAN_FRONTEND=noninteractive", program]);
    Ok(command)
}

fn add_components(root: &Path, channel: &str, components: &[&str]) -> Result<()> {
    if !ebpf::on_search_path("rustup") {
        bail!(
            "{} for Rust {channel} must be installed by hand, as there is no rustup; \
             for a compiler packaged by Debian the sources are the package rust-src",
            components.join(", ")
        );
    }
    let mut command = Command::new("rustup");
    command
        .args(["component", "add", "--toolchain", channel])
        .args(components);
    process::run(command.current_dir(root).stdin(Stdio::null())).with_context(|| {
        format!(
            "rustup could not add {}; a compiler packaged by Debian has its sources in rust-src",
            words(components)
        )
    })
}

fn install_linker(root: &Path) -> Result<()> {
    let mut command = cargo::command(root);
    command.args([
        "install",
        "--locked",
        "bpf-linker",
        "--version",
        ebpf::LINKER_VERSION,
    ]);
    // It belongs to no profile or target of this workspace.
    command
        .env_remove("CARGO_TARGET_DIR")
        .env_remove("CARGO_BUILD_TARGET")
        .env_remove("RUSTFLAGS");
    process::run(command.stdin(Stdio::null()))
}

/// Whether a program, or what an absolute path names, is there.
pub(crate) fn present(probe: &str) -> bool {
    if probe.starts_with('/') {
        probe.split(':').any(|path| Path::new(path).exists())
    } else {
        process::on_path(probe)
    }
}

fn debian(tools: &[Tool]) -> Vec<&'static str> {
    distinct(tools, |tool| tool.debian)
}

fn distinct(tools: &[Tool], name: fn(&Tool) -> &'static str) -> Vec<&'static str> {
    let mut names: Vec<_> = tools.iter().map(name).collect();
    names.sort_unstable();
    names.dedup();
    names
}

fn words(names: &[&str]) -> String {
    names.join(" ")
}

/// Whether packages come by apt.
pub(crate) fn is_debian() -> bool {
    let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    is_debian_release(&release) && process::on_path("apt-get")
}

/// `ID` or one of `ID_LIKE` in the text of `/etc/os-release` is Debian or Ubuntu.
fn is_debian_release(text: &str) -> bool {
    text.lines()
        .filter_map(|line| line.split_once('='))
        .filter(|(key, _)| matches!(*key, "ID" | "ID_LIKE"))
        .flat_map(|(_, value)| value.trim_matches('"').split_whitespace())
        .any(|id| matches!(id, "debian" | "ubuntu"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debian_and_its_children_are_known() {
        assert!(is_debian_release("NAME=x\nID=debian\n"));
        assert!(is_debian_release(
            "ID=linuxmint\nID_LIKE=\"ubuntu debian\"\n"
        ));
        assert!(!is_debian_release(
            "ID=fedora\nHOME_URL=\"https://debian\"\n"
        ));
        assert!(!is_debian_release(""));
    }

    #[test]
    fn every_tool_has_a_package_everywhere() {
        for tool in programs::all() {
            for name in [tool.probe, tool.debian, tool.fedora, tool.arch] {
                assert!(
                    !name.is_empty() && !name.contains(' '),
                    "{}: {name:?}",
                    tool.probe
                );
            }
        }
    }

    #[test]
    fn a_package_is_named_once() {
        let etcd: Vec<_> = programs::all()
            .filter(|tool| tool.fedora == "etcd")
            .collect();
        assert_eq!(distinct(&etcd, |tool| tool.fedora), ["etcd"]);
        assert_eq!(debian(&etcd), ["etcd-client", "etcd-server"]);
    }

    #[test]
    fn building_the_object_needs_no_lab() {
        let object: Vec<_> = programs::all()
            .filter(|tool| tool.needs <= Needs::Ebpf)
            .map(|tool| tool.probe)
            .collect();
        assert_eq!(object, ["cc"]);
    }

    #[test]
    fn probes_may_be_paths() {
        assert!(present("/proc/self"));
        assert!(present("/nonexistent:/proc/self"));
        assert!(!present("/nonexistent"));
        assert!(present("sh"));
    }
}
