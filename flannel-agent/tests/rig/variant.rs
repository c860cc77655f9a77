//! Other builds of the agent: the same program, but eBPF programs in it have other instructions.

#[path = "elf.rs"]
mod elf;

use std::{fs, path::Path, path::PathBuf};

use flannel_testkit::put_program;

use super::agent_binary;
use elf::INSTRUCTION;

/// The programs that the agent embeds.
const OBJECT: &[u8] = include_bytes!(env!("FLANNEL_EBPF_OBJECT"));
const OBJECT_V6: &[u8] = include_bytes!(env!("FLANNEL_EBPF_OBJECT_V6"));
/// `BPF_ALU64 | BPF_MOV | BPF_K`.
const MOV64: u8 = 0xb7;
/// `BPF_ALU | BPF_MOV | BPF_K`: the same for values that are not negative, as it clears the upper half.
const MOV32: u8 = 0xb4;
/// `r0 = *(u64 *)(r0 + 0)`: no verifier takes it from a register that was never written.
const BROKEN: [u8; INSTRUCTION] = [0x79, 0x00, 0, 0, 0, 0, 0, 0];

/// Makes a copy of the agent in `dir` whose embedded object has instructions of the same effect in other words.
pub(crate) fn changed_agent(dir: &Path) -> PathBuf {
    agent_with(OBJECT, dir, "changed-build", rewritten)
}

/// Makes a copy of the agent in `dir` with programs for IPv4 that every verifier refuses.
pub(crate) fn broken_agent(dir: &Path, programs: &[&str]) -> PathBuf {
    broken_agent_of(OBJECT, dir, programs)
}

/// The same with programs for IPv6.
pub(crate) fn broken_agent_v6(dir: &Path, programs: &[&str]) -> PathBuf {
    broken_agent_of(OBJECT_V6, dir, programs)
}

fn broken_agent_of(object: &[u8], dir: &Path, programs: &[&str]) -> PathBuf {
    let name = format!("broken-{}", programs.join("-"));
    agent_with(object, dir, &name, |object| {
        let mut broken = object.to_vec();
        for name in programs {
            for code in elf::code(object, Some(name)) {
                broken[code.start..code.start + INSTRUCTION].copy_from_slice(&BROKEN);
            }
        }
        broken
    })
}

fn agent_with(object: &[u8], dir: &Path, name: &str, change: impl Fn(&[u8]) -> Vec<u8>) -> PathBuf {
    let mut agent = fs::read(agent_binary()).expect("read the agent");
    let at = find(&agent, object).expect("the agent contains the object");
    agent[at..at + object.len()].copy_from_slice(&change(object));
    let dir = dir.join(name);
    fs::create_dir_all(&dir).expect("make a directory");
    let path = dir.join("flannel-agent");
    put_program(&path, agent);
    path
}

/// Replaces 64-bit moves of small constants by 32-bit ones in every section with code.
fn rewritten(object: &[u8]) -> Vec<u8> {
    let mut changed = object.to_vec();
    let mut moves = 0;
    for code in elf::code(object, None) {
        for instruction in changed[code].chunks_exact_mut(INSTRUCTION) {
            // The sign is in the last byte.
            if instruction[0] == MOV64 && instruction[7] & 0x80 == 0 {
                instruction[0] = MOV32;
                moves += 1;
            }
        }
    }
    assert!(moves > 3, "only {moves} moves of constants in the object");
    changed
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    // The object is aligned, and far apart from anything like it.
    let head = &needle[..64];
    haystack
        .windows(head.len())
        .enumerate()
        .filter(|(_, window)| window == &head)
        .map(|(at, _)| at)
        .find(|at| haystack[*at..].starts_with(needle))
}
