//! The deciding half of flannel-ebpf: configuration, leases, interface choice and planning.
//!
//! Everything here takes values and returns values. Nothing in this crate reads a file, opens a socket, asks the
//! kernel for anything or looks at a clock; whoever acts lives in `flannel-agent`.

#![forbid(unsafe_code)]
#![deny(missing_docs)]
#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

pub mod acquire;
pub mod addr;
pub mod check;
pub mod config;
pub mod datagram;
pub mod distribution;
pub mod farewell;
pub mod fastpath;
pub mod features;
pub mod headroom;
pub mod iface;
mod json;
pub mod key;
pub mod kube;
pub mod lease;
pub mod mark;
pub mod masquerade;
pub mod plan;
pub mod pods;
pub mod subnet;
pub mod subnet_env;
pub mod wireguard;
pub mod xdp;
