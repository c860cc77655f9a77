//! The eBPF programs for IPv4 over IPv4. Those for IPv6 are the same sources with another [`family`].
#![no_std]
#![no_main]

#[path = "family/v4.rs"]
mod family;

mod access;
mod decap;
mod encap;
mod gate;
mod link;
mod maps;
mod pod;
mod probe;
mod programs;
mod tuple;
mod xdp;

use programs::{Kind, Verdict};
