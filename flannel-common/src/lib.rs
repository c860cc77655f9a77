//! The ABI between the agent and the eBPF programs, and the arithmetic both sides share.
//!
//! Everything here is `no_std`, `repr(C)` and `Copy`. Fields that are bytes on the wire are byte arrays in
//! network order; all others are in host order. Whoever changes a layout raises [`LAYOUT_VERSION`].
#![no_std]
#![deny(missing_docs)]

#[cfg(test)]
extern crate std;

pub mod checksum;
pub mod counter;
pub mod ecn;
pub mod flow;
pub mod header;
pub mod header_v6;
pub mod map;
mod targets;

pub use counter::{Counter, CounterId, Direction, DropReason, reason_index};
pub use header::{HEADER_LEN, OVERHEAD_V4, OuterV4};
pub use header_v6::{OVERHEAD_V6, OuterV6};
pub use map::{
    Config, ConfigV6, LAYOUT_VERSION, NodeId, NodeRecord, NodeRecordV6, PodRecord, config_flags,
    node_flags,
};
