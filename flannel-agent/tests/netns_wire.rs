//! What our node puts on the wire, and what it makes of what others put there: it must be flannel's VXLAN to the byte.

#[path = "netns_wire/frames.rs"]
mod frames;
#[path = "netns_wire/matrix.rs"]
mod matrix;
mod rig;
mod wire_rig;

use flannel_common::Direction;
use flannel_testkit::{
    Capture, LabOptions, Offloads, capture, packet::Csum, privileged,
    traffic::{Amount, tcp_transfer},
};
use matrix::exchange_everything;
use rig::{NET_CONF, Rig};
use wire_rig::{End, kernel_end, reasons, start_with_peer};

fn lab(nodes: u8, offloads: Offloads) -> LabOptions {
    LabOptions {
        nodes,
        offloads,
        ..LabOptions::default()
    }
}

/// All traffic between a node of ours with these flags and a kernel node; then a look at who carried it.
fn with_a_kernel_node(flags: &[&str], offloads: Offloads) {
    let mut rig = Rig::with(lab(2, offloads), NET_CONF);
    let (kernel, theirs) = kernel_end(&rig, 1);
    start_with_peer(&mut rig, 0, flags, &kernel);
    let ours = End::of(&rig, 0);
    let wire = Capture::start(rig.lab().underlay(), &rig.node(0).port, "udp port 8472")
        .expect("a capture of the wire");
    exchange_everything(&ours, &theirs, offloads);
    let wire = wire.stop().expect("the capture");
    matrix::check_capture(&wire, rig.node(0).ip, offloads);

    let alone = flags.contains(&"--bpf-device=veth");
    let bpf = rig.counters(0);
    let not_encapsulated = reasons(&rig, 0, Direction::Encap);
    let not_decapsulated = reasons(&rig, 0, Direction::Decap);
    println!("{flags:?} {offloads:?}: {bpf:?} {not_encapsulated:?} {not_decapsulated:?}");
}

#[test]
fn zz_off() {
    if privileged() {
        with_a_kernel_node(&["--datapath=bpf"], Offloads::Off);
    }
}
#[test]
fn zz_clsact() {
    if privileged() {
        with_a_kernel_node(&["--datapath=bpf", "--bpf-attach=clsact"], Offloads::Default);
    }
}
#[test]
fn zz_veth() {
    if privileged() {
        with_a_kernel_node(&["--datapath=bpf", "--bpf-device=veth"], Offloads::Default);
    }
}
#[test]
fn zz_veth_off() {
    if privileged() {
        with_a_kernel_node(&["--datapath=bpf", "--bpf-device=veth"], Offloads::Off);
    }
}

#[test]
fn a_kernel_node_and_ours_exchange_everything() {
    if privileged() {
        with_a_kernel_node(&["--datapath=bpf"], Offloads::Default);
    }
}
