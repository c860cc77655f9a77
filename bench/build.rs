//! Builds the programs that the benchmark compares with, and hands their path to the compiler as `FLANNEL_BENCH_OBJECT`.
//!
//! `FLANNEL_BENCH_OBJECT=<path>` in the environment (relative to the workspace root) skips the building.

use std::env;
use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use xtask::ebpf;

const OBJECT_VAR: &str = "FLANNEL_BENCH_OBJECT";

/// Everything the object is made of, relative to the workspace root.
const INPUTS: [&str; 3] = [
    "rust-toolchain.toml",
    "flannel-ebpf/Cargo.toml",
    "flannel-ebpf/src/bench.rs",
];

fn main() -> ExitCode {
    match embed() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!(
                "the eBPF object that the benchmark compares with could not be built: {error}"
            );
            eprintln!("  `cargo xtask setup` installs what the build needs (rust-src, bpf-linker)");
            ExitCode::FAILURE
        }
    }
}

fn embed() -> Result<(), Box<dyn Error>> {
    let package = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?);
    let root = package
        .parent()
        .ok_or("the package has no parent directory")?;
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
        ebpf::build_bin(root, ebpf::BENCH_OBJECT_NAME, &[])?
    };
    let copy = Path::new(&env::var("OUT_DIR")?).join(ebpf::BENCH_OBJECT_NAME);
    fs::copy(&built, &copy)?;
    println!("cargo:rustc-env={OBJECT_VAR}={}", copy.display());
    Ok(())
}
