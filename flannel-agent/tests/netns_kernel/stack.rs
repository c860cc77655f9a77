//! How much stack the programs need, found without a kernel: all calls of a chain share what there is, and only old kernels round so
//! much that they refuse what others take.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use aya_obj::{Object, generated::bpf_insn};
use flannel_agent::dataplane::bpf::{OBJECT, OBJECT_V6};

/// `MAX_BPF_STACK` in `include/linux/filter.h`.
const LIMIT: usize = 512;
/// What must be left of it: a compiler or a small change needs another frame's worth.
const MARGIN: usize = 32;
/// The size of a frame is a multiple of this one (`check_max_stack_depth` before 6.9).
const UNIT: usize = 32;

/// The register that holds the top of the frame.
const TOP: u8 = 10;
/// Classes of instructions in `include/uapi/linux/bpf_common.h`: which register has the address.
const CLASS: u8 = 7;
const LOAD: u8 = 1;
const STORE_CONSTANT: u8 = 2;
const STORE: u8 = 3;
/// `BPF_ALU64 | BPF_MOV | BPF_X`, `BPF_ALU64 | BPF_ADD | BPF_K`, `BPF_JMP | BPF_CALL`.
const MOVE: u8 = 0xbf;
const ADD: u8 = 0x07;
const CALL: u8 = 0x85;
/// `BPF_PSEUDO_CALL`: the call of a function of the program itself, not of a helper.
const OWN: u8 = 1;

/// Of a function: how far down it reaches, and whom it calls, by their first instruction.
#[derive(Default)]
struct Frame {
    depth: usize,
    calls: BTreeSet<usize>,
}

fn frames(code: &[bpf_insn]) -> BTreeMap<usize, Frame> {
    let target = |(at, instruction): (usize, &bpf_insn)| {
        let is_own = instruction.code == CALL && instruction.src_reg() == OWN;
        is_own.then(|| (at + 1).wrapping_add_signed(instruction.imm as isize))
    };
    let starts = code.iter().enumerate().filter_map(target).chain([0]);
    let mut frames: BTreeMap<usize, Frame> = starts.map(|at| (at, Frame::default())).collect();
    // Registers that hold the top of the frame, before a place in it is made of that.
    let mut tops = BTreeSet::new();
    for (at, instruction) in code.iter().enumerate() {
        let (_, frame) = frames.range_mut(..=at).next_back().expect("a function");
        frame.calls.extend(target((at, instruction)));
        let (to, from) = (instruction.dst_reg(), instruction.src_reg());
        let place = match instruction.code & CLASS {
            LOAD if from == TOP => i32::from(instruction.off),
            STORE | STORE_CONSTANT if to == TOP => i32::from(instruction.off),
            _ if instruction.code == ADD && tops.contains(&to) => instruction.imm,
            _ => 0,
        };
        frame.depth = frame.depth.max(usize::try_from(-place).unwrap_or(0));
        if instruction.code == MOVE && from == TOP {
            tops.insert(to);
        } else if !matches!(instruction.code & CLASS, STORE | STORE_CONSTANT) {
            tops.remove(&to);
        }
    }
    frames
}

/// What the function with this first instruction and those that it calls need at once.
fn chain(frames: &BTreeMap<usize, Frame>, start: usize) -> usize {
    let frame = &frames[&start];
    let below = frame.calls.iter().map(|callee| chain(frames, *callee));
    frame.depth.max(1).next_multiple_of(UNIT) + below.max().unwrap_or(0)
}

/// Of every program of an object.
fn needs(object: &[u8]) -> BTreeMap<String, usize> {
    let mut object = Object::parse(object).expect("the object");
    let sections: HashSet<usize> = object.functions.keys().map(|key| key.0).collect();
    object.relocate_calls(&sections).expect("calls");
    #[expect(clippy::disallowed_methods, reason = "put in order at once")]
    let programs = object.programs.iter().map(|(name, program)| {
        let code = &object.functions[&program.function_key()].instructions;
        (name.clone(), chain(&frames(code), 0))
    });
    programs.collect()
}

#[test]
fn every_chain_of_calls_leaves_some_stack() {
    for object in [OBJECT, OBJECT_V6] {
        let needs = needs(object);
        assert!(needs.values().any(|need| *need > UNIT), "{needs:?}");
        let too_much = needs.values().any(|need| *need > LIMIT - MARGIN);
        assert!(!too_much, "bytes of stack by program: {needs:?}");
    }
}

#[test]
fn frames_are_counted_as_old_kernels_do() {
    let instruction = |code, to, from, off, imm| bpf_insn {
        code,
        _bitfield_align_1: [],
        _bitfield_1: bpf_insn::new_bitfield_1(to, from),
        off,
        imm,
    };
    let exit = || instruction(0x95, 0, 0, 0, 0);
    let code = [
        // A word 40 bytes down, the address of a place 70 bytes down, a call of what is behind the next exit, one of a helper.
        instruction(0x7b, TOP, 1, -40, 0),
        instruction(MOVE, 1, TOP, 0, 0),
        instruction(ADD, 1, 0, 0, -70),
        instruction(CALL, 0, OWN, 0, 2),
        instruction(CALL, 0, 0, 0, 500),
        exit(),
        // What is subtracted from anything else is no place.
        instruction(ADD, 1, 0, 0, -400),
        exit(),
    ];
    assert_eq!(chain(&frames(&code), 0), 96 + 32);
}
