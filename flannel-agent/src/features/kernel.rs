//! What a trial asks of the kernel: load a program, run it on a packet, make a map. Everything ends with its descriptor.

use std::{io, os::fd::OwnedFd};

use flannel_core::features::Finding;

use super::assembly::Insn;
use crate::dataplane::bpf::{
    last_word,
    syscall::{
        BPF_MAP_CREATE, BPF_MAP_LOOKUP_ELEM, BPF_MAP_UPDATE_ELEM, BPF_OBJ_GET_INFO_BY_FD,
        BPF_PROG_LOAD, BPF_PROG_TEST_RUN, InfoByFd, bpf, number, owned,
    },
};

/// A GPL-compatible licence: some helpers are for nobody else.
const LICENSE: &[u8] = b"Dual MIT/GPL\0";
/// Room for what the verifier says of a few instructions.
const LOG: usize = 16 << 10;

/// `enum bpf_prog_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Kind {
    SchedCls = 3,
    Xdp = 6,
}

/// Why something was refused.
#[derive(Debug)]
pub(super) struct Refusal {
    errno: i32,
    what: &'static str,
    /// The verifier's last word, if it has spoken.
    said: Option<String>,
}

impl Refusal {
    fn new(what: &'static str, error: &io::Error) -> Self {
        Self {
            errno: error.raw_os_error().unwrap_or(0),
            what,
            said: None,
        }
    }

    /// What it means for a feature.
    pub(super) fn finding(self) -> Finding {
        absent(self.what, self.errno, self.said.as_deref())
    }
}

/// A feature that an errno says no to.
pub(super) fn absent(what: &str, errno: i32, said: Option<&str>) -> Finding {
    let error = io::Error::from_raw_os_error(errno);
    let said = said.map_or_else(|| advice(errno).to_owned(), |said| format!(" ({said})"));
    Finding::Absent {
        errno: Some(errno),
        reason: format!("{what}: {error}{said}"),
    }
}

/// What is known about an errno of `bpf(2)`.
fn advice(errno: i32) -> &'static str {
    match errno {
        libc::ENOSYS => " (this kernel was built without eBPF)",
        libc::EPERM => {
            " (forbidden by a missing capability, seccomp, lockdown or a security module)"
        }
        _ => "",
    }
}

/// `union bpf_attr` for `BPF_PROG_LOAD`, as far as Linux 4.14 knows it.
#[repr(C)]
#[derive(Default)]
struct ProgLoad {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
}

/// `union bpf_attr` for `BPF_PROG_TEST_RUN`, as far as Linux 4.12 knows it.
#[repr(C)]
#[derive(Default)]
struct TestRun {
    prog_fd: u32,
    retval: u32,
    data_size_in: u32,
    data_size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
}

/// `union bpf_attr` for `BPF_MAP_CREATE`, as Linux 4.6 knows it.
#[repr(C)]
#[derive(Default)]
struct MapCreate {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    map_flags: u32,
}

/// `union bpf_attr` for `BPF_MAP_*_ELEM`.
#[repr(C)]
#[derive(Default)]
struct MapElement {
    map_fd: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// The head of `struct bpf_prog_info`.
#[repr(C)]
#[derive(Default)]
struct ProgInfo {
    kind: u32,
    id: u32,
    tag: [u8; 8],
    jited_len: u32,
    xlated_len: u32,
}

/// Loads a program.
pub(super) fn load(kind: Kind, code: &[Insn], flags: u32) -> Result<OwnedFd, Refusal> {
    let mut attributes = ProgLoad {
        prog_type: kind as u32,
        insn_cnt: code.len() as u32,
        insns: code.as_ptr() as u64,
        license: LICENSE.as_ptr() as u64,
        prog_flags: flags,
        ..ProgLoad::default()
    };
    let error = match bpf(BPF_PROG_LOAD, &mut attributes).and_then(owned) {
        Ok(program) => return Ok(program),
        Err(error) => error,
    };
    // Again, to hear why: a log slows the first attempt down, which nearly always succeeds.
    let mut log = vec![0u8; LOG];
    attributes.log_level = 1;
    attributes.log_size = LOG as u32;
    attributes.log_buf = log.as_mut_ptr() as u64;
    drop(bpf(BPF_PROG_LOAD, &mut attributes).and_then(owned));
    let log = log.split(|byte| *byte == 0).next().unwrap_or_default();
    let log = String::from_utf8_lossy(log);
    Err(Refusal {
        said: last_word(&log).map(str::to_owned),
        ..Refusal::new("load a program", &error)
    })
}

/// Runs a program on a packet, and gives its answer and what has become of the packet.
pub(super) fn run(program: &OwnedFd, packet: &[u8]) -> Result<(i32, Vec<u8>), Refusal> {
    let mut out = vec![0u8; packet.len() + 256];
    let refused = |error: io::Error| Refusal::new("run a program on a packet", &error);
    let mut attributes = TestRun {
        prog_fd: number(program).map_err(refused)?,
        data_size_in: packet.len() as u32,
        data_size_out: out.len() as u32,
        data_in: packet.as_ptr() as u64,
        data_out: out.as_mut_ptr() as u64,
        ..TestRun::default()
    };
    bpf(BPF_PROG_TEST_RUN, &mut attributes).map_err(refused)?;
    out.truncate(attributes.data_size_out as usize);
    Ok((attributes.retval.cast_signed(), out))
}

/// How long the machine code of a program is, in bytes; zero if it is interpreted.
pub(super) fn machine_code(program: &OwnedFd) -> Result<u32, Refusal> {
    let refused = |error: io::Error| Refusal::new("look a program up", &error);
    let mut info = ProgInfo::default();
    let mut ask = InfoByFd {
        bpf_fd: number(program).map_err(refused)?,
        info_len: size_of::<ProgInfo>() as u32,
        info: (&raw mut info) as u64,
    };
    bpf(BPF_OBJ_GET_INFO_BY_FD, &mut ask).map_err(refused)?;
    Ok(info.jited_len)
}

/// Makes a map with keys of four bytes and values of eight.
pub(super) fn make_map(kind: u32, entries: u32) -> Result<OwnedFd, Refusal> {
    let mut attributes = MapCreate {
        map_type: kind,
        key_size: size_of::<u32>() as u32,
        value_size: size_of::<u64>() as u32,
        max_entries: entries,
        map_flags: 0,
    };
    bpf(BPF_MAP_CREATE, &mut attributes)
        .and_then(owned)
        .map_err(|error| Refusal::new("make a map", &error))
}

/// Writes the first entry and reads it back, with one value for each of so many CPUs.
pub(super) fn use_map(map: &OwnedFd, cpus: usize) -> Result<bool, Refusal> {
    let refused = |error: io::Error| Refusal::new("write and read a map", &error);
    let key = 0u32;
    let written: Vec<u64> = (1..).take(cpus).collect();
    let mut read = vec![0u64; cpus];
    let mut element = MapElement {
        map_fd: number(map).map_err(refused)?,
        key: (&raw const key) as u64,
        value: written.as_ptr() as u64,
        flags: 0,
    };
    bpf(BPF_MAP_UPDATE_ELEM, &mut element).map_err(refused)?;
    element.value = read.as_mut_ptr() as u64;
    bpf(BPF_MAP_LOOKUP_ELEM, &mut element).map_err(refused)?;
    Ok(read == written)
}
