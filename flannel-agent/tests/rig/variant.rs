//! Another build of the agent: the same program, but every eBPF program in it has other instructions.

use std::{fs, os::unix::fs::PermissionsExt as _, path::Path, path::PathBuf};

use super::agent_binary;

/// `BPF_ALU64 | BPF_MOV | BPF_K`.
const MOV64: u8 = 0xb7;
/// `BPF_ALU | BPF_MOV | BPF_K`: the same for values that are not negative, as it clears the upper half.
const MOV32: u8 = 0xb4;
/// The length of an instruction.
const INSTRUCTION: usize = 8;
/// `SHT_PROGBITS`.
const PROGBITS: u32 = 1;
/// `SHF_EXECINSTR`.
const EXECUTABLE: u64 = 4;

/// Makes a copy of the agent in `dir` whose embedded object has instructions of the same effect in other words.
pub(crate) fn changed_agent(dir: &Path) -> PathBuf {
    let object = include_bytes!(env!("FLANNEL_EBPF_OBJECT"));
    let mut agent = fs::read(agent_binary()).expect("read the agent");
    let at = find(&agent, object).expect("the agent contains the object");
    agent[at..at + object.len()].copy_from_slice(&rewritten(object));
    let dir = dir.join("changed-build");
    fs::create_dir_all(&dir).expect("make a directory");
    let path = dir.join("flannel-agent");
    fs::write(&path, agent).expect("write the changed agent");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("make it executable");
    path
}

/// Replaces 64-bit moves of small constants by 32-bit ones in every section with code.
fn rewritten(object: &[u8]) -> Vec<u8> {
    let mut changed = object.to_vec();
    let table = number(object, 0x28, 8);
    let (entry, count) = (number(object, 0x3a, 2), number(object, 0x3c, 2));
    let mut moves = 0;
    for header in (0..count).map(|section| table + section * entry) {
        let kind = number(object, header + 4, 4);
        let flags = number(object, header + 8, 8);
        if kind != PROGBITS as usize || flags as u64 & EXECUTABLE == 0 {
            continue;
        }
        let (start, size) = (
            number(object, header + 0x18, 8),
            number(object, header + 0x20, 8),
        );
        for instruction in changed[start..start + size].chunks_exact_mut(INSTRUCTION) {
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

/// A little-endian number.
fn number(bytes: &[u8], at: usize, len: usize) -> usize {
    let mut value = [0; 8];
    value[..len].copy_from_slice(&bytes[at..at + len]);
    usize::try_from(u64::from_le_bytes(value)).expect("an offset")
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
