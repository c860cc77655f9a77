//! Programs of a few instructions, written by hand: each calls one helper, and nothing of ours is in them that could be refused for
//! another reason.

/// `struct bpf_insn` in `include/uapi/linux/bpf.h`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Insn {
    code: u8,
    /// Destination in the lower half, source in the upper.
    registers: u8,
    offset: i16,
    immediate: i32,
}

/// A register. Helpers take their arguments in `R1` to `R5` and answer in `R0`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Reg {
    R0,
    R1,
    R2,
    R3,
    R4,
    R5,
    /// Kept across calls: here the context.
    R6,
    R7,
    /// The stack's upper end.
    R10 = 10,
}

/// `BPF_ALU64 | BPF_MOV | BPF_K`, and with a register instead of a number.
const MOV_IMMEDIATE: u8 = 0xb7;
const MOV_REGISTER: u8 = 0xbf;
/// `BPF_ALU64 | BPF_ADD | BPF_K`.
const ADD_IMMEDIATE: u8 = 0x07;
/// `BPF_LDX | BPF_MEM | BPF_W`: reads four bytes.
const LOAD_WORD: u8 = 0x61;
/// `BPF_ST | BPF_MEM | BPF_W`: writes four bytes.
const STORE_WORD: u8 = 0x62;
/// `BPF_LD | BPF_IMM | BPF_DW`: a number of 64 bits, in two instructions.
const LOAD_LONG: u8 = 0x18;
/// `BPF_JMP | BPF_JEQ | BPF_K`, and for "not equal".
const JUMP_EQUAL: u8 = 0x15;
const JUMP_UNEQUAL: u8 = 0x55;
/// `BPF_JMP | BPF_JSLT | BPF_K`.
const JUMP_LESS: u8 = 0xc5;
/// `BPF_JMP | BPF_CALL` and `BPF_JMP | BPF_EXIT`.
const CALL: u8 = 0x85;
const EXIT: u8 = 0x95;

const fn insn(code: u8, to: Reg, from: Reg, offset: i16, immediate: i32) -> Insn {
    Insn {
        code,
        registers: to as u8 | (from as u8) << 4,
        offset,
        immediate,
    }
}

/// Sets a register to a number.
pub(super) const fn set(to: Reg, number: i32) -> Insn {
    insn(MOV_IMMEDIATE, to, Reg::R0, 0, number)
}

/// Sets a register to another.
pub(super) const fn copy(to: Reg, from: Reg) -> Insn {
    insn(MOV_REGISTER, to, from, 0, 0)
}

/// Adds a number to a register.
pub(super) const fn add(to: Reg, number: i32) -> Insn {
    insn(ADD_IMMEDIATE, to, Reg::R0, 0, number)
}

/// Reads the four bytes at `offset` from what a register points at.
pub(super) const fn read(to: Reg, from: Reg, offset: i16) -> Insn {
    insn(LOAD_WORD, to, from, offset, 0)
}

/// Writes four bytes at `offset` from what a register points at.
pub(super) const fn write(to: Reg, offset: i16, number: i32) -> Insn {
    insn(STORE_WORD, to, Reg::R0, offset, number)
}

/// Sets a register to a number of 64 bits.
pub(super) const fn set_long(to: Reg, number: u64) -> [Insn; 2] {
    let (low, high) = (number as u32, (number >> 32) as u32);
    [
        insn(LOAD_LONG, to, Reg::R0, 0, low.cast_signed()),
        insn(0, Reg::R0, Reg::R0, 0, high.cast_signed()),
    ]
}

/// Leaves out so many instructions if the register has that value.
pub(super) const fn skip_if(register: Reg, number: i32, instructions: i16) -> Insn {
    insn(JUMP_EQUAL, register, Reg::R0, instructions, number)
}

/// Leaves out so many instructions if the register has another value.
pub(super) const fn skip_unless(register: Reg, number: i32, instructions: i16) -> Insn {
    insn(JUMP_UNEQUAL, register, Reg::R0, instructions, number)
}

/// Leaves out so many instructions if the register is negative.
pub(super) const fn skip_if_negative(register: Reg, instructions: i16) -> Insn {
    insn(JUMP_LESS, register, Reg::R0, instructions, 0)
}

/// Calls a helper, by its number in `enum bpf_func_id`.
pub(super) const fn call(helper: i32) -> Insn {
    insn(CALL, Reg::R0, Reg::R0, 0, helper)
}

/// Ends with what is in `R0`.
pub(super) const fn exit() -> Insn {
    insn(EXIT, Reg::R0, Reg::R0, 0, 0)
}
