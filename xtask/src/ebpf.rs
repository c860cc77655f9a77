//! Builds the eBPF object, for `cargo xtask build-ebpf` and for the agent's build script.
//!
//! Both run the same command into the same directory (`target/bpf`), so `core` is compiled once,
//! whatever the profile or target directory of the build that asks for the object.

use std::env;
use std::error::Error;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};

/// The one version of bpf-linker that fits the pinned compiler: it loads rustc's own LLVM 22.
/// Newer releases want LLVM 23.
pub const LINKER_VERSION: &str = "0.10.3";

/// Name of the object below the target directory, and of the binary target that produces it.
pub const OBJECT_NAME: &str = "flannel-datapath";

/// Name of the object with the programs for IPv6.
pub const OBJECT_V6_NAME: &str = "flannel-datapath-v6";

/// Name of the object with the programs that the benchmark compares with.
pub const BENCH_OBJECT_NAME: &str = "flannel-bench";

const PACKAGE: &str = "flannel-ebpf";
const TARGET: &str = "bpfel-unknown-none";
/// Chosen once for every host: the programs use nothing of `pt_regs`, the only thing that depends on it,
/// so that one object serves amd64 and arm64.
const BPF_TARGET_ARCH: &str = "x86_64";
/// `e_machine` of a BPF object (`EM_BPF` in `elf.h`).
const EM_BPF: [u8; 2] = [247, 0];

/// Why there is no eBPF object.
#[derive(Debug)]
pub enum EbpfError {
    /// The compiler lacks the sources of `core`; holds the toolchain's directory.
    NoRustSrc(PathBuf),
    /// No bpf-linker of [`LINKER_VERSION`]; holds those of other versions.
    NoLinker(Vec<(PathBuf, String)>),
    /// `rust-toolchain.toml` could not be read or names no channel.
    NoChannel(PathBuf),
    /// A program could not be started.
    Start {
        program: OsString,
        source: io::Error,
    },
    /// cargo ran and reported errors.
    Cargo(ExitStatus),
    /// A file is no BPF object; says why.
    NotBpf { path: PathBuf, why: String },
}

impl fmt::Display for EbpfError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoRustSrc(sysroot) => {
                write!(f, "rust-src is not installed in {}", sysroot.display())
            }
            Self::NoLinker(others) => {
                write!(f, "bpf-linker {LINKER_VERSION} is not installed")?;
                for (path, version) in others {
                    write!(f, ", {} is {version}", path.display())?;
                }
                Ok(())
            }
            Self::NoChannel(path) => write!(f, "no toolchain channel in {}", path.display()),
            Self::Start { program, .. } => write!(f, "start {}", program.display()),
            Self::Cargo(status) => write!(f, "cargo for {TARGET} ended with {status}"),
            Self::NotBpf { path, why } => write!(f, "{} is no BPF object: {why}", path.display()),
        }
    }
}

impl Error for EbpfError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::Start { source, .. } => Some(source),
            Self::NoRustSrc(_)
            | Self::NoLinker(_)
            | Self::NoChannel(_)
            | Self::Cargo(_)
            | Self::NotBpf { .. } => None,
        }
    }
}

/// Builds the object with `features` of `flannel-ebpf` and returns its path.
///
/// `root` is the workspace root. cargo's progress goes to stderr; nothing is written to stdout, which
/// belongs to cargo when a build script calls this.
pub fn build(root: &Path, features: &[String]) -> Result<PathBuf, EbpfError> {
    build_bin(root, OBJECT_NAME, features)
}

/// Like [`build`], for another binary target of `flannel-ebpf`.
pub fn build_bin(root: &Path, bin: &str, features: &[String]) -> Result<PathBuf, EbpfError> {
    run(cargo(root, "build", features)?.args(["--bin", bin]))?;
    let object = object_path(root).with_file_name(bin);
    check_object(&object)?;
    Ok(object)
}

/// Runs clippy over the eBPF programs, with warnings as errors.
pub fn clippy(root: &Path) -> Result<(), EbpfError> {
    run(cargo(root, "clippy", &[])?.args(["--", "-D", "warnings"]))
}

/// Where [`build`] leaves the object.
pub fn object_path(root: &Path) -> PathBuf {
    [
        &target_dir(root),
        Path::new(TARGET),
        Path::new("release"),
        Path::new(OBJECT_NAME),
    ]
    .iter()
    .collect()
}

/// Refuses files that are no BPF ELF object, so that a wrong path is noticed when building and not when loading.
pub fn check_object(path: &Path) -> Result<(), EbpfError> {
    let not_bpf = |why: String| EbpfError::NotBpf {
        path: path.to_owned(),
        why,
    };
    let bytes = fs::read(path).map_err(|source| not_bpf(source.to_string()))?;
    if !bytes.starts_with(b"\x7fELF") {
        return Err(not_bpf("no ELF header".to_owned()));
    }
    match bytes.get(18..20) {
        Some(machine) if machine == EM_BPF => Ok(()),
        machine => Err(not_bpf(format!("ELF machine {machine:?}, not {EM_BPF:?}"))),
    }
}

/// Finds bpf-linker of [`LINKER_VERSION`] on `PATH` and where `cargo install` puts it.
pub fn find_linker() -> Result<PathBuf, EbpfError> {
    let mut others = Vec::new();
    for path in search_path()
        .iter()
        .map(|dir| dir.join("bpf-linker"))
        .filter(|path| path.is_file())
    {
        let version = Command::new(&path)
            .arg("--version")
            .stderr(Stdio::null())
            .output()
            .map(|output| String::from_utf8_lossy(&output.stdout).into_owned())
            .unwrap_or_default();
        match version.trim().strip_prefix("bpf-linker ") {
            Some(LINKER_VERSION) => return Ok(path),
            Some(other) => others.push((path, other.to_owned())),
            None => others.push((path, "of unknown version".to_owned())),
        }
    }
    Err(EbpfError::NoLinker(others))
}

/// Checks that the sources of `core`, which `-Z build-std` compiles, are installed.
pub fn check_rust_src(root: &Path) -> Result<(), EbpfError> {
    let sysroot = sysroot(root)?;
    if sysroot.join("lib/rustlib/src/rust/library/core").is_dir() {
        Ok(())
    } else {
        Err(EbpfError::NoRustSrc(sysroot))
    }
}

/// The channel that `rust-toolchain.toml` pins.
pub fn channel(root: &Path) -> Result<String, EbpfError> {
    let path = root.join("rust-toolchain.toml");
    let text = fs::read_to_string(&path).unwrap_or_default();
    parse_channel(&text).ok_or(EbpfError::NoChannel(path))
}

fn parse_channel(text: &str) -> Option<String> {
    text.lines()
        .filter_map(|line| line.split_once('='))
        .find(|(key, _)| key.trim() == "channel")
        .map(|(_, value)| value.trim().trim_matches('"').to_owned())
}

/// Whether a program can be started by name, or is where `cargo install` and rustup put theirs.
pub fn on_search_path(program: &str) -> bool {
    search_path().iter().any(|dir| dir.join(program).is_file())
}

fn target_dir(root: &Path) -> PathBuf {
    root.join("target").join("bpf")
}

fn run(command: &mut Command) -> Result<(), EbpfError> {
    let status = command
        .status()
        .map_err(|source| start_error(command.get_program(), source))?;
    if status.success() {
        Ok(())
    } else {
        Err(EbpfError::Cargo(status))
    }
}

fn start_error(program: &OsStr, source: io::Error) -> EbpfError {
    EbpfError::Start {
        program: program.to_owned(),
        source,
    }
}

fn cargo(root: &Path, subcommand: &str, features: &[String]) -> Result<Command, EbpfError> {
    check_rust_src(root)?;
    let linker = find_linker()?;
    let mut command = pinned_cargo(root)?;
    clean_env(&mut command);
    command
        .current_dir(root)
        .args([
            subcommand,
            "--package",
            PACKAGE,
            "--release",
            "--target",
            TARGET,
        ])
        .args(["-Z", "build-std=core", "--target-dir"])
        .arg(target_dir(root))
        // `-Z` on a stable compiler; needed for nothing but `build-std`.
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_TARGET_BPFEL_UNKNOWN_NONE_LINKER", linker)
        .env("CARGO_ENCODED_RUSTFLAGS", rustflags(root)?)
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    if !features.is_empty() {
        command.args(["--features", &features.join(",")]);
    }
    Ok(command)
}

/// The flags of aya-build 0.2: without full debug info and `--btf` the object has no BTF. Arrays are filled with
/// zeros in place: by bpf-linker's default each is a call of `memset`, slower, and with a frame of its own on the stack of 512 bytes.
/// Sources are named alike wherever they are, so that a checkout elsewhere gives the same object.
fn rustflags(root: &Path) -> Result<OsString, EbpfError> {
    let mut flags = OsString::from(format!(
        "--cfg=bpf_target_arch=\"{BPF_TARGET_ARCH}\"\x1f-Cdebuginfo=2\x1f-Clink-arg=--btf\x1f-Clink-arg=--disable-expand-memcpy-in-order"
    ));
    for (prefix, stand_in) in source_prefixes(root, &sysroot(root)?) {
        flags.push("\x1f--remap-path-prefix=");
        flags.push(prefix);
        flags.push(format!("={stand_in}"));
    }
    Ok(flags)
}

/// Directories of sources, and what to call them in debug information and messages: of a workspace, of a compiler, of cargo's.
pub fn source_prefixes(root: &Path, sysroot: &Path) -> Vec<(PathBuf, &'static str)> {
    let std = sysroot.join("lib/rustlib/src/rust");
    let mut prefixes = vec![(root.to_owned(), "/flannel-ebpf")];
    // rustup's toolchains may be links, which the compiler follows.
    prefixes.extend(fs::canonicalize(&std).map(|real| (real, "/rust")));
    prefixes.push((std, "/rust"));
    prefixes.extend(cargo_home().map(|home| (home, "/cargo")));
    prefixes
}

fn cargo_home() -> Option<PathBuf> {
    env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(PathBuf::from(env::var_os("HOME")?).join(".cargo")))
}

/// The pinned toolchain's name if this process runs under another one of rustup (`cargo +nightly …`).
fn other_toolchain(root: &Path) -> Result<Option<String>, EbpfError> {
    let channel = channel(root)?;
    let active = env::var("RUSTUP_TOOLCHAIN").ok();
    Ok(active
        .filter(|active| !active.starts_with(&channel))
        .map(|_| channel))
}

fn pinned_cargo(root: &Path) -> Result<Command, EbpfError> {
    Ok(match other_toolchain(root)? {
        Some(channel) => rustup_run(&channel, "cargo"),
        None => Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into())),
    })
}

fn rustup_run(channel: &str, program: &str) -> Command {
    let mut command = Command::new("rustup");
    command
        .args(["run", channel, program])
        .env_remove("RUSTUP_TOOLCHAIN");
    command
}

/// Removes what an outer cargo sets for its build scripts, wrappers and flags meant for the host: each would
/// end in the object or make cargo rebuild `core`.
fn clean_env(command: &mut Command) {
    /// The user's own settings for the network, the terminal and the job count.
    const KEEP: [&str; 9] = [
        "CARGO_HOME",
        "CARGO_HTTP_",
        "CARGO_NET_",
        "CARGO_REGISTRIES_",
        "CARGO_REGISTRY_",
        "CARGO_SOURCE_",
        "CARGO_TERM_",
        "CARGO_BUILD_JOBS",
        "CARGO_MAKEFLAGS",
    ];
    /// `HOST` and the like are watched by dependencies: with them, a build from a build script and one from a shell
    /// would compile each other's crates anew.
    const DROP: [&str; 14] = [
        "DEBUG",
        "HOST",
        "NUM_JOBS",
        "OPT_LEVEL",
        "OUT_DIR",
        "PROFILE",
        "RUSTC",
        "RUSTC_LINKER",
        "RUSTC_WORKSPACE_WRAPPER",
        "RUSTC_WRAPPER",
        "RUSTDOC",
        "RUSTDOCFLAGS",
        "RUSTFLAGS",
        "TARGET",
    ];
    for (name, _) in env::vars_os() {
        let Some(text) = name.to_str() else { continue };
        let of_cargo =
            text.starts_with("CARGO_") && !KEEP.iter().any(|keep| text.starts_with(keep));
        if of_cargo || DROP.contains(&text) {
            command.env_remove(&name);
        }
    }
}

fn sysroot(root: &Path) -> Result<PathBuf, EbpfError> {
    let mut rustc = match other_toolchain(root)? {
        Some(channel) => rustup_run(&channel, "rustc"),
        None => match sysroot_of_cargo() {
            Some(sysroot) => return Ok(sysroot),
            None => Command::new("rustc"),
        },
    };
    let output = rustc
        .args(["--print", "sysroot"])
        .current_dir(root)
        .output()
        .map_err(|source| start_error(rustc.get_program(), source))?;
    Ok(PathBuf::from(
        String::from_utf8_lossy(&output.stdout).trim(),
    ))
}

/// Under cargo `$CARGO` is `<sysroot>/bin/cargo`; asking rustc costs a few hundred milliseconds.
fn sysroot_of_cargo() -> Option<PathBuf> {
    let cargo = PathBuf::from(env::var_os("CARGO")?);
    let sysroot = cargo.parent()?.parent()?;
    sysroot
        .join("lib/rustlib")
        .is_dir()
        .then(|| sysroot.to_owned())
}

/// `PATH`, then where `cargo install` puts binaries, which need not be on it.
fn search_path() -> Vec<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let mut dirs: Vec<_> = env::split_paths(&path).collect();
    dirs.extend(cargo_home().map(|home| home.join("bin")));
    let mut seen = Vec::new();
    dirs.retain(|dir| {
        let new = !seen.contains(dir);
        seen.push(dir.clone());
        new
    });
    dirs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_channel_is_read_from_the_pin() {
        let text = "[toolchain]\nchannel = \"1.95.0\"\ncomponents = [\"rust-src\"]\n";
        assert_eq!(parse_channel(text).as_deref(), Some("1.95.0"));
        assert_eq!(parse_channel("[toolchain]\n"), None);
    }

    #[test]
    fn a_host_binary_is_no_bpf_object() {
        let exe = env::current_exe().expect("path of this test");
        let error = check_object(&exe).expect_err("an x86_64 or aarch64 binary");
        assert!(error.to_string().contains("ELF machine"), "{error}");
    }

    #[test]
    fn a_missing_object_is_named() {
        let error = check_object(Path::new("/nonexistent/object")).expect_err("no such file");
        assert!(
            error
                .to_string()
                .starts_with("/nonexistent/object is no BPF object"),
            "{error}"
        );
    }
}
