//! Processes on a machine that seems to lack something: a privilege, eBPF, the vxlan device type.

use crate::process::{check, pidfd_open, poll_in};
use anyhow::Context as _;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Capabilities by their number in `linux/capability.h`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Capability {
    DacReadSearch = 2,
    NetBindService = 10,
    NetAdmin = 12,
    NetRaw = 13,
    SysModule = 16,
    SysAdmin = 21,
    SysResource = 24,
    Perfmon = 38,
    Bpf = 39,
}

/// What becomes of a process that calls `bpf(2)`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BpfCall {
    #[default]
    Allowed,
    /// The call fails with this errno: ENOSYS on a kernel without eBPF, EPERM where it is forbidden.
    Fails(i32),
    /// The process ends with SIGSYS: proof that it never calls.
    Kills,
}

/// What a process has to do without. By default nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Confinement<'a> {
    /// All that it gets, still as uid 0, in the bounding, permitted, effective and inheritable sets; `None` is everything.
    pub caps: Option<&'a [Capability]>,
    pub bpf: BpfCall,
    /// The kernel answers as one that never heard of vxlan devices: whoever asks for one gets EOPNOTSUPP.
    pub no_vxlan: bool,
}

impl Confinement<'static> {
    /// Nothing.
    pub const FREE: Self = Self {
        caps: None,
        bpf: BpfCall::Allowed,
        no_vxlan: false,
    };
    /// A kernel without the vxlan module.
    pub const NO_VXLAN: Self = Self {
        no_vxlan: true,
        ..Self::FREE
    };
    /// What flannel's own manifest grants.
    pub const UPSTREAM: Self = Self {
        caps: Some(&[Capability::NetAdmin, Capability::NetRaw]),
        ..Self::FREE
    };
}

/// The highest capability number that a 64-bit set can hold.
const HIGHEST: u32 = 63;
/// `_LINUX_CAPABILITY_VERSION_3`: sets of 64 bits in two words.
const CAPSET_VERSION: u32 = 0x2008_0522;
/// The number under which a confined child keeps the listener of its own filter.
const LISTENER: i32 = 250;
/// `SECCOMP_IOCTL_NOTIF_RECV` and `SECCOMP_IOCTL_NOTIF_SEND`: `_IOWR('!', n, struct)` with structs of 80 and 24 bytes.
const NOTIF_RECV: libc::Ioctl = 0xc050_2100_u32 as libc::Ioctl;
const NOTIF_SEND: libc::Ioctl = 0xc018_2101_u32 as libc::Ioctl;
/// The device kind in a netlink request, behind the upper half of its attribute's header (`IFLA_INFO_KIND`).
const KIND_VXLAN: &[u8] = b"\x01\0vxlan";
/// A kind of the same length that no kernel has.
const KIND_NONE: &[u8] = b"\x01\0vxnot";

/// Makes `cmd` start confined. With `no_vxlan` it waits at its first netlink request until somebody serves it, as
/// [`AgentProcess::spawn_confined`](crate::AgentProcess::spawn_confined) does.
pub fn apply(cmd: &mut Command, confinement: &Confinement<'_>) {
    let Confinement {
        caps,
        bpf,
        no_vxlan,
    } = *confinement;
    let keep = caps.map(|caps| caps.iter().fold(0_u64, |set, cap| set | 1 << (*cap as u32)));
    let confine = move || {
        if bpf != BpfCall::Allowed || no_vxlan {
            filter(bpf, no_vxlan)?;
        }
        keep.map_or(Ok(()), keep_capabilities)
    };
    // SAFETY: only system calls on values of the closure's own; nothing is allocated. It runs after the namespace has been
    // entered, which needs CAP_SYS_ADMIN.
    unsafe { cmd.pre_exec(confine) };
}

/// Serves the child's filter in a thread that ends with the child. The kernel learns what a vxlan device is, and forgets it, with `known`.
pub(crate) fn watch(child: &Child, known: Arc<AtomicBool>) -> anyhow::Result<()> {
    let pidfd = pidfd_open(child.id())?;
    // SAFETY: pidfd_getfd takes no pointers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), LISTENER, 0) };
    let fd = check(i32::try_from(fd)?).context("take over the listener of a seccomp filter")?;
    // SAFETY: the descriptor is new and owned by nobody else.
    let listener = unsafe { OwnedFd::from_raw_fd(fd) };
    std::thread::Builder::new()
        .name("no vxlan".into())
        .spawn(move || while serve(&listener, &known).is_ok() {})?;
    Ok(())
}

/// Waits for one `sendto`, makes a request for a vxlan device one for a device that no kernel has, and lets it go on.
fn serve(listener: &OwnedFd, known: &AtomicBool) -> io::Result<()> {
    if !poll_in(listener, Duration::from_mins(1))? {
        return Ok(());
    }
    // SAFETY: plain integers, for which all-zero is a value, and what the kernel asks for.
    let mut asked: libc::seccomp_notif = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel writes one seccomp_notif.
    check(unsafe { libc::ioctl(listener.as_raw_fd(), NOTIF_RECV, &raw mut asked) })?;
    if !known.load(Ordering::SeqCst) {
        // A process that has ended meanwhile needs no answer; the next call tells.
        drop(rename_kind(&asked));
    }
    let mut answer = libc::seccomp_notif_resp {
        id: asked.id,
        val: 0,
        error: 0,
        flags: libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32,
    };
    // SAFETY: the kernel reads one seccomp_notif_resp.
    let rc = unsafe { libc::ioctl(listener.as_raw_fd(), NOTIF_SEND, &raw mut answer) };
    match check(rc) {
        Err(err) if err.raw_os_error() != Some(libc::ENOENT) => Err(err),
        _ => Ok(()),
    }
}

fn rename_kind(asked: &libc::seccomp_notif) -> anyhow::Result<()> {
    let memory = File::options()
        .read(true)
        .write(true)
        .open(format!("/proc/{}/mem", asked.pid))?;
    let (at, len) = (asked.data.args[1], asked.data.args[2]);
    let mut message = vec![0; usize::try_from(len.min(65_536))?];
    memory.read_exact_at(&mut message, at)?;
    let is_create = message.get(4..6) == Some(&libc::RTM_NEWLINK.to_ne_bytes());
    let found = message
        .windows(KIND_VXLAN.len())
        .position(|bytes| bytes == KIND_VXLAN);
    if let Some(offset) = found.filter(|_| is_create) {
        memory.write_all_at(KIND_NONE, at + offset as u64)?;
    }
    Ok(())
}

/// Installs a seccomp filter; with `no_vxlan` its listener becomes descriptor [`LISTENER`], across the exec.
fn filter(bpf: BpfCall, no_vxlan: bool) -> io::Result<()> {
    let step = |code: u32, jt: u8, k: u32| libc::sock_filter {
        code: code as u16,
        jt,
        jf: u8::from(code & 0x07 == libc::BPF_JMP) * (1 - jt),
        k,
    };
    let is = |call: libc::c_long| step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, call as u32);
    let give = |verdict: u32| step(libc::BPF_RET | libc::BPF_K, 0, verdict);
    let on_bpf = match bpf {
        BpfCall::Allowed => libc::SECCOMP_RET_ALLOW,
        BpfCall::Fails(errno) => libc::SECCOMP_RET_ERRNO | errno as u32,
        BpfCall::Kills => libc::SECCOMP_RET_KILL_PROCESS,
    };
    let on_send = if no_vxlan {
        libc::SECCOMP_RET_USER_NOTIF
    } else {
        libc::SECCOMP_RET_ALLOW
    };
    let mut program = [
        // The number is the first field of `struct seccomp_data`.
        step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0),
        is(libc::SYS_bpf),
        give(on_bpf),
        is(libc::SYS_sendto),
        give(on_send),
        give(libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_mut_ptr(),
    };
    let flags = if no_vxlan {
        libc::SECCOMP_FILTER_FLAG_NEW_LISTENER
    } else {
        0
    };
    // SAFETY: `program` describes a live array, and the kernel copies it.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            flags,
            &raw const program,
        )
    };
    let fd = check(i32::try_from(fd).unwrap_or(-1))?;
    if no_vxlan {
        // SAFETY: dup2 takes no pointers; the copy survives the exec, the original does not.
        check(unsafe { libc::dup2(fd, LISTENER) })?;
    }
    Ok(())
}

/// Reduces the calling process to the capabilities in `keep`, across an exec as uid 0 too.
fn keep_capabilities(keep: u64) -> io::Result<()> {
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    #[repr(C)]
    #[derive(Clone, Copy)]
    struct Word {
        effective: u32,
        permitted: u32,
        inheritable: u32,
    }
    for cap in (0..=HIGHEST).filter(|cap| keep & (1 << cap) == 0) {
        // SAFETY: this prctl takes no pointers.
        let rc = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, libc::c_ulong::from(cap), 0, 0, 0) };
        if rc < 0 && io::Error::last_os_error().raw_os_error() != Some(libc::EINVAL) {
            return Err(io::Error::last_os_error());
        }
    }
    let header = Header {
        version: CAPSET_VERSION,
        pid: 0,
    };
    let words = [keep & 0xffff_ffff, keep >> 32].map(|half| {
        let half = half as u32;
        Word {
            effective: half,
            permitted: half,
            inheritable: half,
        }
    });
    // SAFETY: version 3 reads one header and two words, which both live here.
    let rc = unsafe { libc::syscall(libc::SYS_capset, &raw const header, words.as_ptr()) };
    check(i32::try_from(rc).unwrap_or(-1)).map(drop)
}
