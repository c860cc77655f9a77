//! The verifier's own words about every program, also when it accepts it: they are kept, because the next kernel may not.

use std::{
    collections::BTreeMap,
    collections::{HashMap, HashSet},
    io,
    os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd},
};

use aya::maps::MapData;
use aya_obj::{Map, Object, ProgramSection};
use flannel_agent::dataplane::bpf::{OBJECT, OBJECT_V6};
use flannel_testkit::privileged;
use nix::libc;

use crate::{keep, lacking::helpers, raise_memlock};

/// `BPF_MAP_UPDATE_ELEM`, `BPF_PROG_LOAD` and `BPF_MAP_FREEZE`, and what is loaded, in `include/uapi/linux/bpf.h`.
const MAP_UPDATE: libc::c_long = 2;
const PROG_LOAD: libc::c_long = 5;
const MAP_FREEZE: libc::c_long = 22;
const SCHED_CLS: u32 = 3;
const XDP: u32 = 6;
/// Each instruction once (1), and the totals (4).
const LOG_LEVEL: u32 = 1 | 4;
/// The kernel takes no more than a quarter of `u32::MAX`; 16 MB hold a hundred thousand instructions.
const LOG_SIZE: usize = 16 << 20;

/// The beginning of `union bpf_attr` for [`PROG_LOAD`].
#[repr(C)]
struct Load {
    kind: u32,
    count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
}

/// The same for [`MAP_UPDATE`].
#[repr(C)]
struct Update {
    fd: u32,
    _padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[test]
fn the_verifier_takes_every_program_and_says_what_it_saw() {
    if !privileged() {
        return;
    }
    raise_memlock();
    for (object, prefix) in [(OBJECT, ""), (OBJECT_V6, "v6_")] {
        load_all(object, prefix);
    }
}

/// Loads the programs of an object, without the flags of which old kernels know nothing. What is kept of them begins with `prefix`.
fn load_all(object: &[u8], prefix: &str) {
    let mut object = Object::parse(object).expect("the object");
    let helpers = helpers().to_ne_bytes();
    let globals = HashMap::from([("KERNEL_HELPERS", (&helpers[..], true))]);
    object.patch_map_data(globals).expect("a global");
    let maps: Vec<(String, Map, MapData)> = object
        .maps
        .drain()
        .map(|(name, map)| {
            let made = MapData::create(map.clone(), &name, None).expect("a map");
            if !map.data().is_empty() {
                fill(&made, map.data()).unwrap_or_else(|error| panic!("fill {name}: {error}"));
            }
            (name, map, made)
        })
        .collect();
    let sections: HashSet<usize> = object
        .functions
        .keys()
        .map(|(section, _)| *section)
        .collect();
    let by_name = maps
        .iter()
        .map(|(name, map, made)| (name.as_str(), made.fd().as_fd().as_raw_fd(), map));
    object.relocate_maps(by_name, &sections).expect("maps");
    object.relocate_calls(&sections).expect("calls");

    #[expect(clippy::disallowed_methods, reason = "put in order at once")]
    let programs: BTreeMap<_, _> = object.programs.iter().collect();
    assert!(programs.len() > 5, "{:?}", programs.keys());
    for (name, program) in programs {
        let kind = match program.section {
            ProgramSection::SchedClassifier => SCHED_CLS,
            ProgramSection::Xdp { .. } => XDP,
            _ => panic!("{name} is of a kind that this test does not know"),
        };
        let code = &object.functions[&program.function_key()].instructions;
        let license = object.license.as_c_str();
        let mut log = vec![0; LOG_SIZE];
        let load = Load {
            kind,
            count: code.len() as u32,
            instructions: code.as_ptr() as u64,
            license: license.as_ptr() as u64,
            log_level: LOG_LEVEL,
            log_size: LOG_SIZE as u32,
            log: log.as_mut_ptr() as u64,
            kernel_version: 0,
            flags: 0,
            name: [0; 16],
        };
        let outcome = prog_load(&load);
        let length = log.iter().position(|byte| *byte == 0).unwrap_or(0);
        let said = String::from_utf8_lossy(&log[..length]).into_owned();
        keep(&format!("verifier/{prefix}{name}.log"), &said);
        let end: Vec<&str> = said.lines().rev().take(5).collect();
        outcome.unwrap_or_else(|error| panic!("load {prefix}{name}: {error}: {end:?}"));
        let seen =
            processed(&said).unwrap_or_else(|| panic!("no account of {prefix}{name}: {end:?}"));
        assert!(seen >= code.len() as u64 / 2, "{seen} of {}", code.len());
        keep("facts", &format!("insns_{prefix}{name} {seen}\n"));
    }
}

/// Gives a map of globals its content, which nobody changes after: the verifier goes by it.
fn fill(map: &MapData, content: &[u8]) -> io::Result<()> {
    let fd = u32::try_from(map.fd().as_fd().as_raw_fd()).map_err(io::Error::other)?;
    let key = 0_u32;
    let update = Update {
        fd,
        _padding: 0,
        key: &raw const key as u64,
        value: content.as_ptr() as u64,
        flags: 0,
    };
    bpf(MAP_UPDATE, &update)?;
    bpf(MAP_FREEZE, &fd).map(drop)
}

/// `processed 1234 insns (limit 1000000) max_states_per_insn …`
fn processed(log: &str) -> Option<u64> {
    let line = log
        .lines()
        .find_map(|line| line.strip_prefix("processed "))?;
    line.split(' ').next()?.parse().ok()
}

fn prog_load(load: &Load) -> io::Result<OwnedFd> {
    let fd = bpf(PROG_LOAD, load)?;
    // SAFETY: the descriptor is new and owned by nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn bpf<T>(command: libc::c_long, attributes: &T) -> io::Result<i32> {
    // SAFETY: all addresses are of live memory of the sizes beside them, and the kernel writes to the log alone.
    let answer = unsafe { libc::syscall(libc::SYS_bpf, command, attributes, size_of::<T>()) };
    if answer < 0 {
        return Err(io::Error::last_os_error());
    }
    i32::try_from(answer).map_err(io::Error::other)
}
