//! `cargo xtask demo` and `cargo xtask bench`: build what is to be shown, then become the program that shows it.

use std::ffi::OsString;
use std::path::Path;

use anyhow::{Context as _, Result};

use crate::cargo::{self, Executable};
use crate::process;
use crate::setup::{self, Needs};

/// What the demo and the benchmark are given.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Passed on
    #[arg(
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "ARGS"
    )]
    args: Vec<OsString>,
}

pub(crate) fn demo(root: &Path, args: &Args) -> Result<()> {
    process::require_root("the demo", "demo")?;
    become_bin(root, "demo", &args.args)
}

pub(crate) fn bench(root: &Path, args: &Args) -> Result<()> {
    process::require_root("the benchmark", "bench")?;
    become_bin(root, "bench", &args.args)
}

fn become_bin(root: &Path, bin: &str, args: &[OsString]) -> Result<()> {
    setup::ensure(root, Needs::Everything)?;
    eprintln!(
        "building the agent, the CNI plugin and `{bin}` for release (some minutes the first time)"
    );
    let selection = [
        "build",
        "--release",
        "-p",
        "flannel-agent",
        "-p",
        "bench",
        "-p",
        "flannel-cni",
        "--bin",
        "flannel-agent",
        "--bin",
        "flannel",
        "--bin",
        bin,
    ];
    let built = cargo::build(root, &selection)?;
    let (agent, plugin) = (find(&built, "flannel-agent")?, find(&built, "flannel")?);
    let mut command = process::command(&find(&built, bin)?.path.to_string_lossy());
    command
        .args(args)
        // Another build may be named, such as the one that is shipped.
        .env(
            "FLANNEL_AGENT",
            std::env::var_os("FLANNEL_AGENT").unwrap_or_else(|| agent.path.clone().into()),
        )
        .env("FLANNEL_CNI", &plugin.path);
    Err(process::exec(&mut command))
}

fn find<'a>(built: &'a [Executable], bin: &str) -> Result<&'a Executable> {
    built
        .iter()
        .find(|executable| executable.kind == "bin" && executable.target == bin)
        .with_context(|| format!("cargo built no binary `{bin}`"))
}
