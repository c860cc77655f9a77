//! The eBPF programs for IPv6 over IPv6: the sources of those for IPv4, with another [`family`].
#![no_std]
#![no_main]

#[path = "family/v6.rs"]
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
