//! Where and how a thread runs.

use std::{io, thread, time::Duration};

use nix::{
    sched::{CpuSet, sched_setaffinity},
    sys::resource::{Resource, getrlimit, setrlimit},
    unistd::Pid,
};

/// Above the ordinary tasks, below the kernel's own real-time threads.
const PRIORITY: i32 = 10;
/// What one real-time thread may take without ever waiting, in microseconds. No measurement comes near: the kernel ends
/// a program that spins for so long, so that it cannot hold the machine.
const LONGEST_SPIN: u64 = 8_000_000;

/// Keeps this thread on one CPU.
pub fn on_cpu(cpu: usize) -> io::Result<()> {
    let mut cpus = CpuSet::new();
    cpus.set(cpu)?;
    sched_setaffinity(Pid::from_raw(0), &cpus)?;
    Ok(())
}

/// How long a CPU rests before a real-time thread takes it. Ordinary tasks that wait for it run then; if they had to wait for most of a
/// second, the kernel would give them 50 ms in the middle of a measurement (the fair server of `kernel/sched/deadline.c`, and
/// `sched_rt_runtime_us` before Linux 6.12).
const REST: Duration = Duration::from_millis(30);

/// Keeps this thread on one CPU, ahead of everything that is not real-time: its share of the CPU is then all of it, and the
/// rate at which it works is the inverse of the cost.
pub fn fifo_on_cpu(cpu: usize) -> io::Result<()> {
    on_cpu(cpu)?;
    thread::sleep(REST);
    let param = libc::sched_param {
        sched_priority: PRIORITY,
    };
    // SAFETY: the pointer is to a live local; zero means this thread.
    let rc = unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const param) };
    if rc != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// The second CPU, or the first where there is only one.
pub fn other_cpu() -> usize {
    usize::from(std::thread::available_parallelism().map_or(1, usize::from) > 1)
}

/// Puts a limit on real-time threads that spin, and lifts the one on open files.
pub fn set_limits() -> io::Result<()> {
    setrlimit(Resource::RLIMIT_RTTIME, LONGEST_SPIN, LONGEST_SPIN)?;
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most)?;
    Ok(())
}
