//! `xdp_decap`: by itself, and behind the program for IPv4, which has the interface where there are both.

use aya::{
    Ebpf, EbpfLoader,
    maps::{PerCpuArray, ProgramArray},
    programs::{TestRun as _, TestRunOptions, Xdp},
};
use flannel_agent::dataplane::bpf::OBJECT;
use flannel_common::{Counter, CounterId, config_flags, map::BARE_MAGIC_V6};
use flannel_testkit::privileged;

use crate::{
    decap::{inner, wrapped},
    kernel::{KINDS, Kernel, Kind, MTU},
    lacking::helpers,
};

const PASS: u32 = 2;
const OVERHEAD: usize = 70;
/// The array and the program that are for each other.
const VARIANTS: [(&str, &str); 2] = [
    ("xdp_next", "xdp_decap"),
    ("xdp_next_frags", "xdp_decap_frags"),
];

fn kernel() -> Kernel {
    let mut kernel = Kernel::load();
    let mut config = kernel.config();
    config.flags |= config_flags::XDP;
    kernel.put_config(&config);
    for (_, name) in VARIANTS {
        xdp(&mut kernel.ebpf, name)
            .load()
            .expect("the verifier agrees");
    }
    kernel
}

/// The programs for IPv4, on maps that say nothing.
fn first() -> Ebpf {
    let mut ebpf = EbpfLoader::new()
        .override_global("KERNEL_HELPERS", &helpers(), true)
        .load(OBJECT)
        .expect("load the object");
    for (_, name) in VARIANTS {
        xdp(&mut ebpf, name).load().expect("the verifier agrees");
    }
    ebpf
}

fn xdp<'a>(ebpf: &'a mut Ebpf, name: &str) -> &'a mut Xdp {
    let program = ebpf.program_mut(name).expect("a program");
    program.try_into().expect("an XDP program")
}

/// What a program makes of a frame, with the metadata in front.
fn run(ebpf: &mut Ebpf, name: &str, frame: &[u8]) -> Vec<u8> {
    let mut out = vec![0; frame.len() + 64];
    let result = xdp(ebpf, name)
        .test_run(TestRunOptions {
            data_in: Some(frame),
            data_out: Some(&mut out),
            ..TestRunOptions::new()
        })
        .expect("run the program");
    assert_eq!(result.return_value, PASS);
    out.truncate(result.data_size_out as usize);
    out
}

/// A stripped frame: the mark, and what was inside, addressed to the host that received the outer one.
fn bare(frame: &[u8]) -> Vec<u8> {
    let mut bare = BARE_MAGIC_V6.to_ne_bytes().to_vec();
    bare.extend(&frame[..6]);
    bare.extend(&frame[OVERHEAD + 6..]);
    bare
}

fn stripped(ebpf: &Ebpf) -> u64 {
    let counters = ebpf.map("counters").expect("a map");
    let counters: PerCpuArray<_, Counter> = counters.try_into().expect("an array");
    let all = counters.get(&(CounterId::XdpDecap as u32), 0);
    all.expect("a counter").iter().map(|one| one.packets).sum()
}

#[test]
fn every_length_is_stripped() {
    if !privileged() {
        return;
    }
    let mut kernel = kernel();
    let mut frames = 0;
    for kind in KINDS {
        let head = inner(kind, 0).len() - 14;
        for len in 0..=MTU as usize - head {
            let frame = wrapped(&inner(kind, len));
            let out = run(&mut kernel.ebpf, "xdp_decap", &frame);
            assert_eq!(out, bare(&frame), "{kind:?} {len}");
            frames += 1;
        }
    }
    assert_eq!(stripped(&kernel.ebpf), frames);
    let damaged = |at: usize| {
        let mut frame = wrapped(&inner(Kind::Udp, 40));
        frame[at] ^= 1;
        frame
    };
    // The outer source, UDP checksum and VNI, the inner destination and length: what `from_wire` leaves or refuses, too.
    for at in [22, 60, 68, 70, 88] {
        let frame = damaged(at);
        assert_eq!(run(&mut kernel.ebpf, "xdp_decap", &frame), frame, "{at}");
    }
    assert_eq!(stripped(&kernel.ebpf), frames);
}

#[test]
fn what_is_of_ipv6_goes_on_behind_the_program_for_ipv4() {
    if !privileged() {
        return;
    }
    let (mut kernel, mut first) = (kernel(), first());
    let frame = wrapped(&inner(Kind::Tcp, 1_000));
    let mut of_another = frame.clone();
    of_another[12..14].copy_from_slice(&[0x08, 0x06]);
    for (slot, name) in VARIANTS {
        // Nobody there: as it came.
        assert_eq!(run(&mut first, name, &frame), frame, "{name}");
        let array = first.map_mut(slot).expect("an array");
        let mut array: ProgramArray<_> = array.try_into().expect("an array of programs");
        let program = xdp(&mut kernel.ebpf, name).fd().expect("its descriptor");
        array.set(0, program, 0).expect("put a program in");
        assert_eq!(run(&mut first, name, &frame), bare(&frame), "{name}");
        for other in [&of_another[..], &frame[..14], &frame[..80]] {
            assert_eq!(run(&mut first, name, other), other, "{name}");
        }
        let array = first.map_mut(slot).expect("an array");
        let mut array: ProgramArray<_> = array.try_into().expect("an array of programs");
        array.clear_index(&0).expect("take it out");
        assert_eq!(run(&mut first, name, &frame), frame, "{name}");
    }
    // Each counts its own.
    assert_eq!((stripped(&kernel.ebpf), stripped(&first)), (2, 0));
}

/// One array would not do: it takes programs of one kind alone.
#[test]
fn each_kind_of_program_has_an_array_of_its_own() {
    if !privileged() {
        return;
    }
    let (mut kernel, mut first) = (kernel(), first());
    for ((slot, _), (_, other)) in VARIANTS.into_iter().zip(VARIANTS.into_iter().rev()) {
        let program = xdp(&mut kernel.ebpf, other).fd().expect("its descriptor");
        let array = first.map_mut(slot).expect("an array");
        let mut array: ProgramArray<_> = array.try_into().expect("an array of programs");
        array
            .set(0, program, 0)
            .expect_err("it is of the other kind");
    }
}
