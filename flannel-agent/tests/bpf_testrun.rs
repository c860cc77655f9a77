//! The programs run by the kernel on packets made here, with `BPF_PROG_TEST_RUN`: every verdict, every reason, and a lot of
//! garbage. What comes out is read with etherparse, never with our own code.

#[path = "bpf_testrun/decap.rs"]
mod decap;
#[path = "rig/elf.rs"]
mod elf;
#[path = "bpf_testrun/encap.rs"]
mod encap;
#[path = "bpf_testrun/failing.rs"]
mod failing;
#[path = "bpf_testrun/flows.rs"]
mod flows;
#[path = "bpf_testrun/garbage.rs"]
mod garbage;
#[path = "bpf_testrun/gate.rs"]
mod gate;
#[path = "bpf_testrun/kernel.rs"]
mod kernel;
#[path = "rig/lacking.rs"]
mod lacking;
#[path = "bpf_testrun/link.rs"]
mod link;
#[path = "bpf_testrun/xdp.rs"]
mod xdp;
