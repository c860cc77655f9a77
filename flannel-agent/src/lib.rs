//! The acting half of flannel-ebpf: command line, lease stores, kernel, reconcile loop.
//!
//! It must never decide what the node should look like: `flannel_core` does, and this crate carries it out.

#![deny(unsafe_code)]
#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::indexing_slicing
    )
)]

#[cfg(not(target_pointer_width = "64"))]
compile_error!(
    "32-bit targets are not supported: the maps that the agent shares with the kernel are laid out for 64 bits; build for amd64 or \
     arm64 (a Raspberry Pi 3 or newer needs a 64-bit operating system)"
);
#[cfg(not(target_endian = "little"))]
compile_error!(
    "big-endian targets are not supported: the eBPF object is little-endian; build for amd64 or arm64"
);

pub mod app;
mod bridge_netfilter;
mod check;
pub mod cli;
mod cni_socket;
mod datapath;
pub mod dataplane;
mod device;
mod fastpath;
mod features;
pub mod files;
pub mod health;
mod http;
mod kernel_modules;
pub mod leases;
pub mod masquerade;
mod metrics;
mod notify;
mod preflight;
mod program;
mod reconcile;
pub mod state;
mod telemetry;
