//! `cargo xtask build-ebpf`

use std::path::Path;

use anyhow::Result;
use xtask::ebpf;

use crate::setup::{self, Needs};

/// How to build the object.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Features of the crate flannel-ebpf, separated by commas
    #[arg(long, value_delimiter = ',', value_name = "FEATURE")]
    features: Vec<String>,
}

pub(crate) fn run(root: &Path, args: &Args) -> Result<()> {
    setup::ensure(root, Needs::Ebpf)?;
    let object = ebpf::build(root, &args.features)?;
    println!("{}", object.display());
    Ok(())
}
