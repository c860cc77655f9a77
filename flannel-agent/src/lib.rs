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
pub mod wireguard;
