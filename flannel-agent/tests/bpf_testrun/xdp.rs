//! `xdp_decap`: the outer headers go, or the frame stays as it is.

use aya::programs::{TestRun as _, TestRunOptions, Xdp};
use flannel_agent::dataplane::bpf::OBJECT;
use flannel_common::{CounterId, config_flags, map::BARE_MAGIC};
use flannel_testkit::privileged;

use crate::{
    decap::{packet, wrapped},
    flows::{INSIDE, count, rechecked, udp},
    kernel::{Kernel, MTU, OUR_POD, PEER_POD, shortest},
};

const PASS: u32 = 2;
/// The kernel refuses shorter frames.
const SHORTEST: usize = 14;

fn kernel() -> Kernel {
    kernel_of(OBJECT)
}

/// With another object.
pub(crate) fn kernel_of(object: &[u8]) -> Kernel {
    let mut kernel = Kernel::load_object(object);
    xdp(&mut kernel).load().expect("the verifier agrees");
    let mut config = kernel.config();
    config.flags |= config_flags::XDP;
    kernel.put_config(&config);
    kernel
}

fn xdp(kernel: &mut Kernel) -> &mut Xdp {
    let program = kernel.ebpf.program_mut("xdp_decap").expect("a program");
    program.try_into().expect("an XDP program")
}

fn run(kernel: &mut Kernel, frame: &[u8]) -> Vec<u8> {
    let (out, is_bare) = strip(kernel, frame);
    // The hook behind it misses what it would have stripped, and nothing else.
    let missed = count(kernel, CounterId::XdpMissed);
    if frame.len() >= shortest(frame) {
        kernel.run("from_wire", frame);
    }
    assert_eq!(
        is_bare,
        count(kernel, CounterId::XdpMissed) > missed,
        "{frame:02x?}"
    );
    out
}

/// Runs `xdp_decap` alone: what has become of a frame, and whether it was stripped.
pub(crate) fn strip(kernel: &mut Kernel, frame: &[u8]) -> (Vec<u8>, bool) {
    let stripped = count(kernel, CounterId::XdpDecap);
    let mut out = vec![0; frame.len() + 64];
    let result = xdp(kernel)
        .test_run(TestRunOptions {
            data_in: Some(frame),
            data_out: Some(&mut out),
            ..TestRunOptions::new()
        })
        .expect("run xdp_decap");
    assert_eq!(result.return_value, PASS);
    out.truncate(result.data_size_out as usize);
    // The run gives the metadata too, which only a stripped frame has.
    let bare = out
        .strip_prefix(&BARE_MAGIC.to_ne_bytes())
        .map(<[u8]>::to_vec);
    assert_eq!(
        bare.is_some(),
        count(kernel, CounterId::XdpDecap) > stripped
    );
    let is_bare = bare.is_some();
    (bare.unwrap_or(out), is_bare)
}

/// The inner frame of [`packet`], addressed to the host that received the outer one.
fn bare(frame: &[u8]) -> Vec<u8> {
    let mut bare = frame[50..].to_vec();
    bare[..6].copy_from_slice(&frame[..6]);
    bare
}

#[test]
fn every_length_is_stripped() {
    if !privileged() {
        return;
    }
    let mut kernel = kernel();
    for len in 0..=MTU as usize - 28 {
        let frame = packet(len);
        assert_eq!(run(&mut kernel, &frame), bare(&frame), "{len}");
    }
    assert_eq!(count(&kernel, CounterId::XdpDecap), u64::from(MTU - 28 + 1));
}

#[test]
fn congestion_outside_shows_inside() {
    if !privileged() {
        return;
    }
    let mut kernel = kernel();
    let mut inside = udp(INSIDE, (PEER_POD, 1), (OUR_POD, 2), 40);
    inside[15] = 0x28 | 2;
    let mut wire = wrapped(&rechecked(&inside));
    wire[15] = 3;
    let wire = rechecked(&wire);
    inside[15] = 0x28 | 3;
    assert_eq!(run(&mut kernel, &wire)[14..], rechecked(&inside)[14..]);
    // Congestion on what cannot be marked: for from_wire to drop and count.
    inside[15] = 0x28;
    let mut wire = wrapped(&rechecked(&inside));
    wire[15] = 3;
    let wire = rechecked(&wire);
    assert_eq!(run(&mut kernel, &wire), wire);
}

#[test]
fn everything_else_stays_as_it_is() {
    if !privileged() {
        return;
    }
    let mut kernel = kernel();
    let good = packet(100);
    let with = |at: usize, byte: u8| {
        let mut frame = good.clone();
        frame[at] = byte;
        frame
    };
    let fixed = |at: usize, byte: u8| rechecked(&with(at, byte));
    let cases = [
        ("to another host", fixed(33, 77)),
        ("a fragment", fixed(20, 0x20)),
        ("a later fragment", fixed(21, 1)),
        ("not UDP", fixed(23, 6)),
        ("a martian", fixed(26, 127)),
        ("a wrong header checksum", with(24, 0x55)),
        ("another port", with(37, 1)),
        ("a UDP checksum", with(40, 1)),
        ("a wrong UDP length", with(39, 1)),
        ("no VNI", with(42, 0)),
        ("a reserved bit", with(45, 1)),
        ("another VNI", with(48, 77)),
        ("to another VTEP", with(55, 77)),
        ("to every VTEP", {
            let mut frame = good.clone();
            frame[50..56].fill(0xff);
            frame
        }),
        ("IPv6 inside", with(62, 0x86)),
        ("multicast outside", with(0, 1)),
        ("too long inside", packet(MTU as usize - 27)),
    ];
    for (what, frame) in cases {
        assert_eq!(run(&mut kernel, &frame), frame, "{what}");
    }
    for len in SHORTEST..84 {
        assert_eq!(run(&mut kernel, &good[..len]), good[..len], "{len} bytes");
    }
    assert_eq!(count(&kernel, CounterId::XdpDecap), 0);
    // Nothing is stripped before from_wire is there.
    let config = kernel.config();
    kernel.put_config(&config);
    assert_eq!(run(&mut kernel, &good), good);
}
