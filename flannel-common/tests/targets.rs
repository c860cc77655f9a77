//! Targets that this is not for are refused in a clear line, and nothing else is said about them.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// The checks are compiled without `core`, which the toolchain has for few targets, so that the macro has to be declared.
const AROUND: &str = "#![feature(no_core, rustc_attrs)]
#![no_core]
#![allow(internal_features, unused_macros)]
#[rustc_builtin_macro]
macro_rules! compile_error { ($text:expr $(,)?) => {{}} }
mod targets;
";

#[test]
fn targets_of_64_bits_and_little_endian_are_taken() {
    for target in [
        "x86_64-unknown-linux-gnu",
        "x86_64-unknown-linux-musl",
        "aarch64-unknown-linux-gnu",
        "aarch64-unknown-linux-musl",
        "bpfel-unknown-none",
    ] {
        assert_eq!(errors_of(target), Vec::<String>::new(), "{target}");
    }
}

#[test]
fn targets_of_32_bits_are_refused_in_a_line() {
    for target in [
        "armv7-unknown-linux-musleabihf",
        "arm-unknown-linux-gnueabihf",
        "i686-unknown-linux-gnu",
    ] {
        let errors = errors_of(target);
        let [error] = errors.as_slice() else {
            panic!("{target}: {errors:?}")
        };
        for word in [
            "32-bit",
            "x86_64 (amd64)",
            "aarch64 (arm64)",
            "64-bit operating system",
        ] {
            assert!(error.contains(word), "{target}: {error}");
        }
    }
}

#[test]
fn targets_of_big_endian_are_refused_in_a_line() {
    for target in ["s390x-unknown-linux-gnu", "powerpc64-unknown-linux-gnu"] {
        let errors = errors_of(target);
        let [error] = errors.as_slice() else {
            panic!("{target}: {errors:?}")
        };
        for word in ["big-endian", "x86_64 (amd64)", "aarch64 (arm64)"] {
            assert!(error.contains(word), "{target}: {error}");
        }
    }
}

/// What the compiler of this build has against the checks, for a target.
fn errors_of(target: &str) -> Vec<String> {
    let dir = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(target);
    fs::create_dir_all(&dir).expect("a directory");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/targets.rs");
    fs::copy(source, dir.join("targets.rs")).expect("the checks");
    fs::write(dir.join("lib.rs"), AROUND).expect("what is around them");
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let output = Command::new(rustc)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .env("RUSTC_BOOTSTRAP", "1")
        .args([
            "--edition=2024",
            "--crate-type=lib",
            "--emit=metadata",
            "--target",
            target,
        ])
        .arg("--out-dir")
        .arg(&dir)
        .arg(dir.join("lib.rs"))
        .output()
        .expect("run the compiler");
    let text = String::from_utf8_lossy(&output.stderr);
    let errors: Vec<String> = text
        .lines()
        .filter_map(|line| line.strip_prefix("error: "))
        .filter(|line| !line.starts_with("aborting"))
        .map(str::to_owned)
        .collect();
    assert_eq!(errors.is_empty(), output.status.success(), "{text}");
    errors
}
