//! Builds the eBPF objects that the agent embeds, one for each address family.

use std::process::ExitCode;

use xtask::{ebpf, embed::Embedded};

const INPUTS: &[&str] = &[
    "Cargo.lock",
    "Cargo.toml",
    "rust-toolchain.toml",
    "flannel-common/Cargo.toml",
    "flannel-common/src",
    "flannel-ebpf/Cargo.toml",
    "flannel-ebpf/src",
];

fn main() -> ExitCode {
    let objects = [
        ("FLANNEL_EBPF_OBJECT", ebpf::OBJECT_NAME),
        ("FLANNEL_EBPF_OBJECT_V6", ebpf::OBJECT_V6_NAME),
    ];
    for (variable, name) in objects {
        let object = Embedded {
            variable,
            name,
            inputs: INPUTS,
            whose: "the agent",
        };
        if object.run() != ExitCode::SUCCESS {
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}
