//! What a process uses, as `/proc` has it (proc(5)).

use std::{
    fs,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use nix::{
    time::{clock_getcpuclockid, clock_gettime},
    unistd::{Pid, SysconfVar, sysconf},
};

/// At one moment.
#[derive(Clone, Copy, Debug)]
pub(super) struct Usage {
    pub(super) at: Instant,
    /// Resident memory in MB, all of it.
    pub(super) rss: f64,
    /// Of that, what is no file's.
    pub(super) anon: f64,
    /// The most that was ever resident.
    pub(super) peak: f64,
    pub(super) threads: u64,
    /// CPU time so far, of threads that are gone, too.
    pub(super) cpu: Duration,
    /// That of programs it has run to their end.
    pub(super) children: Duration,
    /// How often its present threads have waited for something.
    pub(super) wakeups: u64,
}

impl Usage {
    pub(super) fn of(pid: u32) -> anyhow::Result<Self> {
        let status = read(&format!("/proc/{pid}/status"))?;
        // KiB there.
        let megabytes = |name| anyhow::Ok(field(&status, name)? as f64 * 1024.0 / 1e6);
        let clock = clock_getcpuclockid(Pid::from_raw(pid.try_into()?)).context("a CPU clock")?;
        let cpu = clock_gettime(clock).context("read a CPU clock")?;
        Ok(Self {
            at: Instant::now(),
            rss: megabytes("VmRSS:")?,
            anon: megabytes("RssAnon:")?,
            peak: megabytes("VmHWM:")?,
            threads: field(&status, "Threads:")?,
            cpu: cpu.into(),
            children: children(&read(&format!("/proc/{pid}/stat"))?)?,
            wakeups: wakeups(pid)?,
        })
    }
}

fn read(path: &str) -> anyhow::Result<String> {
    fs::read_to_string(path).with_context(|| format!("read {path}"))
}

fn field(status: &str, name: &str) -> anyhow::Result<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    let number = line.and_then(|line| line.split_whitespace().next());
    number
        .and_then(|number| number.parse().ok())
        .with_context(|| format!("no number at {name}"))
}

/// The name of the program, in parentheses, may hold anything: fields are counted from behind it.
fn children(stat: &str) -> anyhow::Result<Duration> {
    let (_, fields) = stat.rsplit_once(')').context("no name in stat")?;
    // The first of these is the third field: cutime and cstime are the sixteenth and seventeenth.
    let ticks: u64 = fields
        .split_whitespace()
        .skip(13)
        .take(2)
        .map(|number| number.parse::<u64>().context("no number in stat"))
        .sum::<anyhow::Result<u64>>()?;
    let a_second = sysconf(SysconfVar::CLK_TCK)?.context("no length of a tick")?;
    Ok(Duration::from_secs_f64(ticks as f64 / a_second as f64))
}

fn wakeups(pid: u32) -> anyhow::Result<u64> {
    let tasks = format!("/proc/{pid}/task");
    let mut sum = 0;
    for task in fs::read_dir(&tasks).with_context(|| format!("list {tasks}"))? {
        // One that has just ended is not there any more.
        if let Ok(status) = fs::read_to_string(task?.path().join("status")) {
            sum += field(&status, "voluntary_ctxt_switches:")?;
        }
    }
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_read() {
        let usage = Usage::of(std::process::id()).expect("our own");
        assert!(
            usage.rss > usage.anon && usage.peak >= usage.anon,
            "{usage:?}"
        );
        assert!(usage.threads > 0 && usage.cpu > Duration::ZERO, "{usage:?}");
    }

    #[test]
    fn the_time_of_children_is_found_behind_any_name() {
        let stat = "42 (a ) b) S 1 42 42 0 -1 4194560 100 0 0 0 250 50 30 20 20 0 3 0 700";
        let a_second = sysconf(SysconfVar::CLK_TCK)
            .expect("sysconf")
            .expect("ticks");
        let expected = Duration::from_secs_f64(50.0 / a_second as f64);
        assert_eq!(children(stat).expect("times"), expected);
        assert!(children("42 (a) S 1").is_ok_and(|time| time.is_zero()));
        assert!(children("").is_err());
    }
}
