//! The programs for IPv6, run by the kernel on packets made here with `BPF_PROG_TEST_RUN`: what differs from IPv4, and that what does not
//! is the same. What comes out is read with etherparse, never with our own code.

#[path = "bpf_testrun_v6/decap.rs"]
mod decap;
#[path = "bpf_testrun_v6/encap.rs"]
mod encap;
#[path = "bpf_testrun_v6/gate.rs"]
mod gate;
#[path = "bpf_testrun_v6/kernel.rs"]
mod kernel;
#[path = "rig/lacking.rs"]
mod lacking;
#[path = "bpf_testrun_v6/link.rs"]
mod link;
#[path = "bpf_testrun_v6/xdp.rs"]
mod xdp;
