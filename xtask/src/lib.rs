//! What build scripts share with the `cargo xtask` commands.
//!
//! The standard library and nothing else: the agent's build script compiles this first.

pub mod ebpf;
pub mod embed;
