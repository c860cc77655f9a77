//! What is neither a program on a packet nor an interface: the system call, maps, settings, files.

use std::{
    ffi::CString,
    fs::{self, File},
    io::{self, Read as _},
    os::fd::OwnedFd,
    path::Path,
};

use flannel_core::{
    features::{Feature, Finding},
    mark,
};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
    sys::resource::{Resource, getrlimit, setrlimit},
};

use super::{
    assembly::{Reg::R0, exit, set},
    kernel::{self, Kind},
};
use crate::dataplane::bpf::{
    self,
    syscall::{BPF_OBJ_PIN, Obj, number},
};

/// Map types by their number in `enum bpf_map_type`.
const MAPS: [(Feature, u32); 4] = [
    (Feature::Hash, 1),
    (Feature::Array, 2),
    (Feature::PerCpuArray, 6),
    (Feature::LruHash, 9),
];
const ARRAY: u32 = 2;
/// The first bytes of type information.
const BTF_MAGIC: u16 = 0xeb9f;
const BTF: &str = "/sys/kernel/btf/vmlinux";
const BPFFS: &str = "/sys/fs/bpf";

/// Kernels before 5.11 count maps against this limit; without CAP_SYS_RESOURCE it stays.
pub(crate) fn raise_memlock() {
    let unlimited = libc::RLIM_INFINITY;
    let _refused = setrlimit(Resource::RLIMIT_MEMLOCK, unlimited, unlimited);
}

/// Whether `bpf(2)` makes a map, which every kernel with eBPF does.
pub(super) fn bpf() -> Finding {
    match kernel::make_map(ARRAY, 1) {
        Ok(_map) => Finding::Present,
        Err(refusal) => refusal.finding(),
    }
}

/// The map types.
pub(super) fn maps(wanted: impl Fn(Feature) -> bool) -> Vec<(Feature, Finding)> {
    // A per-CPU map has a value for every CPU that there may ever be.
    let cpus = aya::util::nr_cpus().unwrap_or(1);
    let wanted = MAPS.into_iter().filter(|(feature, _)| wanted(*feature));
    wanted
        .map(|(feature, kind)| {
            let values = if feature == Feature::PerCpuArray {
                cpus
            } else {
                1
            };
            let used = kernel::make_map(kind, 2).and_then(|map| kernel::use_map(&map, values));
            let finding = match used {
                Ok(true) => Finding::Present,
                Ok(false) => Finding::absent("what is written is not what is read back"),
                Err(refusal) => refusal.finding(),
            };
            (feature, finding)
        })
        .collect()
}

/// Everything that is looked at rather than run.
pub(super) fn settings(
    wanted: impl Fn(Feature) -> bool,
    with_bpf: bool,
) -> Vec<(Feature, Finding)> {
    let mut found = vec![
        (Feature::Btf, btf()),
        (
            Feature::NativeXdp,
            Finding::untried(
                "needs the uplink, and some drivers reset the link: the agent attaches it when all else is in place",
            ),
        ),
    ];
    if with_bpf {
        found.extend([
            (Feature::Jit, jit()),
            (Feature::Memlock, memlock()),
            (Feature::Bpffs, bpffs()),
        ]);
    }
    found.retain(|(feature, _)| wanted(*feature));
    found
}

fn btf() -> Finding {
    let magic = || -> io::Result<u16> {
        let mut bytes = [0; 2];
        File::open(BTF)?.read_exact(&mut bytes)?;
        Ok(u16::from_ne_bytes(bytes))
    };
    match magic() {
        Ok(BTF_MAGIC) => Finding::Present,
        Ok(other) => Finding::absent(format!("{BTF} begins with {other:#06x}")),
        Err(error) => Finding::Absent {
            errno: error.raw_os_error(),
            reason: format!("read {BTF}: {error}"),
        },
    }
}

fn jit() -> Finding {
    let length = kernel::load(Kind::SchedCls, &[set(R0, 0), exit()], 0)
        .and_then(|program| kernel::machine_code(&program));
    match length {
        Ok(0) => Finding::absent("a program has no machine code (net.core.bpf_jit_enable = 0?)"),
        Ok(_) => Finding::Present,
        Err(refusal) => refusal.finding(),
    }
}

/// Whether a map may be larger than the limit.
fn memlock() -> Finding {
    /// More than any limit that matters here: a map of this size is made and thrown away.
    const LARGE: u64 = 64 << 20;
    let Ok((limit, _)) = getrlimit(Resource::RLIMIT_MEMLOCK) else {
        return Finding::untried("the limit cannot be read");
    };
    if limit >= LARGE {
        return Finding::Present;
    }
    let entries = u32::try_from(limit / 8 + 1).unwrap_or(u32::MAX);
    match kernel::make_map(ARRAY, entries) {
        Ok(_map) => Finding::Present,
        Err(_refusal) => Finding::Absent {
            errno: Some(libc::EPERM),
            reason: format!(
                "RLIMIT_MEMLOCK is {limit} bytes, this kernel counts maps against it, and it cannot be raised (CAP_SYS_RESOURCE is missing)"
            ),
        },
    }
}

/// Whether something can be pinned, here or, where nothing is mounted, in a mount namespace of a thread's own.
fn bpffs() -> Finding {
    let map = match kernel::make_map(ARRAY, 1) {
        Ok(map) => map,
        Err(refusal) => return refusal.finding(),
    };
    if bpf::mounted() {
        return pinned(&map);
    }
    let outcome = std::thread::scope(|scope| scope.spawn(|| mounted_apart(&map)).join());
    outcome.unwrap_or_else(|_panic| Finding::untried("the attempt ended without an answer"))
}

fn mounted_apart(map: &OwnedFd) -> Finding {
    let refused = |what: &str, errno: nix::errno::Errno| Finding::Absent {
        errno: Some(errno as i32),
        reason: format!("{BPFFS} is not mounted, and {what}: {}", errno.desc()),
    };
    let none = None::<&str>;
    if let Err(errno) = unshare(CloneFlags::CLONE_NEWNS) {
        return refused("a namespace to mount it in cannot be had", errno);
    }
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    if let Err(errno) = mount(none, "/", none, private, none) {
        return refused("the mounts cannot be kept apart", errno);
    }
    match mount(Some("bpf"), BPFFS, Some("bpf"), MsFlags::empty(), none) {
        Ok(()) => pinned(map),
        Err(errno) => refused("it cannot be mounted", errno),
    }
}

/// Pins a map and takes the pin away.
fn pinned(map: &OwnedFd) -> Finding {
    let path = Path::new(BPFFS).join(mark::trial_pin(std::process::id()));
    let pin = || -> io::Result<()> {
        let name = CString::new(path.as_os_str().as_encoded_bytes())?;
        let mut pin = Obj {
            pathname: name.as_ptr() as u64,
            bpf_fd: number(map)?,
            ..Obj::default()
        };
        bpf::syscall::bpf(BPF_OBJ_PIN, &mut pin)?;
        fs::remove_file(&path)
    };
    match pin() {
        Ok(()) => Finding::Present,
        Err(error) => Finding::Absent {
            errno: error.raw_os_error(),
            reason: format!("pin a map at {}: {error}", path.display()),
        },
    }
}
