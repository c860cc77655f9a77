//! Builds the eBPF object that the agent embeds.

use std::process::ExitCode;

use xtask::{ebpf, embed::Embedded};

fn main() -> ExitCode {
    Embedded {
        variable: "FLANNEL_EBPF_OBJECT",
        name: ebpf::OBJECT_NAME,
        inputs: &[
            "Cargo.lock",
            "Cargo.toml",
            "rust-toolchain.toml",
            "flannel-common/Cargo.toml",
            "flannel-common/src",
            "flannel-ebpf/Cargo.toml",
            "flannel-ebpf/src",
        ],
        whose: "the agent",
    }
    .run()
}
