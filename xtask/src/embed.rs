//! What the build scripts of the agent and of the benchmark do: build an eBPF object and hand its path to the compiler.

use std::env;
use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use crate::ebpf;

/// An object, and for whom it is built.
#[derive(Clone, Copy, Debug)]
pub struct Embedded {
    /// The variable that the compiler gets the path in. With a path in the environment (relative to the workspace root) nothing is
    /// built and that object is taken: a release builds once and embeds the result for every architecture.
    pub variable: &'static str,
    /// Name of the object, which is that of its binary in `flannel-ebpf`.
    pub name: &'static str,
    /// Everything the object is made of, relative to the workspace root.
    pub inputs: &'static [&'static str],
    /// Who embeds it, for the message of a failure.
    pub whose: &'static str,
}

impl Embedded {
    /// The whole build script of the calling package, which is one directory below the workspace root.
    pub fn run(&self) -> ExitCode {
        let Err(error) = self.embed() else {
            return ExitCode::SUCCESS;
        };
        eprintln!(
            "the eBPF object of {} could not be built: {error}",
            self.whose
        );
        let mut source = error.source();
        while let Some(cause) = source {
            eprintln!("  because: {cause}");
            source = cause.source();
        }
        eprintln!("  `cargo xtask setup` installs what the build needs (rust-src, bpf-linker)");
        eprintln!(
            "  `cargo xtask build-ebpf` builds the object alone and shows the compiler's errors"
        );
        eprintln!(
            "  {}=<path> embeds an object that was built elsewhere",
            self.variable
        );
        ExitCode::FAILURE
    }

    fn embed(&self) -> Result<(), Box<dyn Error>> {
        let package = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?);
        let root = package
            .parent()
            .ok_or("the package has no parent directory")?;
        println!("cargo:rerun-if-env-changed={}", self.variable);
        let given = env::var_os(self.variable).filter(|path| !path.is_empty());
        let built = if let Some(path) = given {
            let given = root.join(path);
            println!("cargo:rerun-if-changed={}", given.display());
            ebpf::check_object(&given)?;
            given
        } else {
            for input in self.inputs {
                println!("cargo:rerun-if-changed={}", root.join(input).display());
            }
            ebpf::build_bin(root, self.name, &[])?
        };
        // A copy, so that emptying `target/bpf` does not break what is otherwise up to date.
        let copy = Path::new(&env::var("OUT_DIR")?).join(self.name);
        fs::copy(&built, &copy)?;
        println!("cargo:rustc-env={}={}", self.variable, copy.display());
        Ok(())
    }
}
