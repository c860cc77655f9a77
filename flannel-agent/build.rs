//! Builds the eBPF object and hands its path to the compiler as `FLANNEL_EBPF_OBJECT`.
//!
//! `FLANNEL_EBPF_OBJECT=<path>` in the environment (relative to the workspace root) skips the building: a release
//! builds the object once and embeds it for every architecture.

use std::env;
use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use xtask::ebpf;

const OBJECT_VAR: &str = "FLANNEL_EBPF_OBJECT";

/// Everything the object is made of, relative to the workspace root.
const INPUTS: [&str; 7] = [
    "Cargo.lock",
    "Cargo.toml",
    "rust-toolchain.toml",
    "flannel-common/Cargo.toml",
    "flannel-common/src",
    "flannel-ebpf/Cargo.toml",
    "flannel-ebpf/src",
];

fn main() -> ExitCode {
    match embed() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("the eBPF object that the agent embeds could not be built: {error}");
            let mut source = error.source();
            while let Some(cause) = source {
                eprintln!("  because: {cause}");
                source = cause.source();
            }
            eprintln!("  `cargo xtask setup` installs what the build needs (rust-src, bpf-linker)");
            eprintln!(
                "  `cargo xtask build-ebpf` builds the object alone and shows the compiler's errors"
            );
            eprintln!("  {OBJECT_VAR}=<path> embeds an object that was built elsewhere");
            ExitCode::FAILURE
        }
    }
}

fn embed() -> Result<(), Box<dyn Error>> {
    let package = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?);
    let root = package
        .parent()
        .ok_or("the agent's package has no parent directory")?;
    println!("cargo:rerun-if-env-changed={OBJECT_VAR}");
    let given = env::var_os(OBJECT_VAR).filter(|path| !path.is_empty());
    let built = if let Some(path) = given {
        let given = root.join(path);
        println!("cargo:rerun-if-changed={}", given.display());
        ebpf::check_object(&given)?;
        given
    } else {
        for input in INPUTS {
            println!("cargo:rerun-if-changed={}", root.join(input).display());
        }
        ebpf::build(root, &[])?
    };
    // A copy, so that emptying `target/bpf` does not break an agent that is otherwise up to date.
    let copy = Path::new(&env::var("OUT_DIR")?).join(ebpf::OBJECT_NAME);
    fs::copy(&built, &copy)?;
    println!("cargo:rustc-env={OBJECT_VAR}={}", copy.display());
    Ok(())
}
