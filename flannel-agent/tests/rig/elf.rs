//! The eBPF object as bytes: where its instructions are, and which program they belong to.

use std::ops::Range;

/// The length of an instruction.
pub(crate) const INSTRUCTION: usize = 8;
/// `SHT_PROGBITS`.
const PROGBITS: usize = 1;
/// `SHT_SYMTAB`.
const SYMBOLS: usize = 2;
/// `SHF_EXECINSTR`.
const EXECUTABLE: usize = 4;
/// Length of an entry of the table of symbols.
const SYMBOL: usize = 24;

struct Section {
    kind: usize,
    flags: usize,
    at: usize,
    size: usize,
    link: usize,
}

/// The instructions of one program, or else of all, as ranges of bytes.
pub(crate) fn code(object: &[u8], program: Option<&str>) -> Vec<Range<usize>> {
    let sections = sections(object);
    match program {
        Some(name) => vec![instructions(object, &sections, name)],
        None => sections
            .iter()
            .filter(|section| section.kind == PROGBITS && section.flags & EXECUTABLE != 0)
            .map(|section| section.at..section.at + section.size)
            .collect(),
    }
}

fn instructions(object: &[u8], sections: &[Section], name: &str) -> Range<usize> {
    let table = sections
        .iter()
        .find(|section| section.kind == SYMBOLS)
        .expect("a table of symbols");
    let names = &sections[table.link];
    (table.at..table.at + table.size)
        .step_by(SYMBOL)
        .find_map(|at| {
            let start = names.at + number(object, at, 4);
            let end = start + object[start..].iter().position(|byte| *byte == 0)?;
            let section = &sections[number(object, at + 6, 2)];
            let (value, size) = (number(object, at + 8, 8), number(object, at + 16, 8));
            (&object[start..end] == name.as_bytes() && size > 0)
                .then(|| section.at + value..section.at + value + size)
        })
        .unwrap_or_else(|| panic!("no program {name} in the object"))
}

fn sections(object: &[u8]) -> Vec<Section> {
    let table = number(object, 0x28, 8);
    let (entry, count) = (number(object, 0x3a, 2), number(object, 0x3c, 2));
    (0..count)
        .map(|section| table + section * entry)
        .map(|header| Section {
            kind: number(object, header + 4, 4),
            flags: number(object, header + 8, 8),
            at: number(object, header + 0x18, 8),
            size: number(object, header + 0x20, 8),
            link: number(object, header + 0x28, 4),
        })
        .collect()
}

/// A little-endian number.
fn number(bytes: &[u8], at: usize, len: usize) -> usize {
    let mut value = [0; 8];
    value[..len].copy_from_slice(&bytes[at..at + len]);
    usize::try_from(u64::from_le_bytes(value)).expect("an offset")
}
