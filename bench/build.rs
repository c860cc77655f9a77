//! Builds the programs that the benchmark compares with.

use std::process::ExitCode;

use xtask::{ebpf, embed::Embedded};

fn main() -> ExitCode {
    Embedded {
        variable: "FLANNEL_BENCH_OBJECT",
        name: ebpf::BENCH_OBJECT_NAME,
        inputs: &[
            "rust-toolchain.toml",
            "flannel-ebpf/Cargo.toml",
            "flannel-ebpf/src/bench.rs",
        ],
        whose: "the benchmark",
    }
    .run()
}
