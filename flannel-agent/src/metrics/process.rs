//! What this process uses, from `/proc/self` (proc(5)), under the names that every Prometheus client library gives it.

use std::{fmt, fs};

use prometheus_client::{collector::Collector, encoding::DescriptorEncoder};

use super::node::{counter, gauge};

/// Reads `/proc/self` at every scrape. A file that cannot be read leaves its metrics out.
#[derive(Debug)]
pub(super) struct Process;

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        let to = &mut encoder;
        if let Some(stat) = Stat::read() {
            counter(
                to,
                "process_cpu_seconds",
                "CPU time used, user and system",
                stat.cpu_seconds,
            )?;
            gauge(
                to,
                "process_virtual_memory_bytes",
                "Virtual memory",
                stat.virtual_bytes as f64,
            )?;
            gauge(
                to,
                "process_resident_memory_bytes",
                "Resident memory",
                stat.resident_bytes as f64,
            )?;
            if let Some(boot) = boot_time() {
                gauge(
                    to,
                    "process_start_time_seconds",
                    "When the process was started, in seconds since 1970",
                    boot + stat.start_seconds,
                )?;
            }
        }
        if let Ok(entries) = fs::read_dir("/proc/self/fd") {
            // One of them is the listing itself.
            let open = entries.count().saturating_sub(1);
            gauge(to, "process_open_fds", "Open file descriptors", open as f64)?;
        }
        if let Ok((soft, _)) =
            nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE)
        {
            gauge(
                to,
                "process_max_fds",
                "File descriptors that may be open",
                soft as f64,
            )?;
        }
        Ok(())
    }
}

/// Some fields of `/proc/self/stat`.
#[derive(Debug, PartialEq)]
struct Stat {
    cpu_seconds: f64,
    /// Since the machine was started.
    start_seconds: f64,
    virtual_bytes: u64,
    resident_bytes: u64,
}

impl Stat {
    fn read() -> Option<Self> {
        let unit = |name| nix::unistd::sysconf(name).ok().flatten();
        let ticks = unit(nix::unistd::SysconfVar::CLK_TCK)?;
        let page = unit(nix::unistd::SysconfVar::PAGE_SIZE)?;
        let text = fs::read_to_string("/proc/self/stat").ok()?;
        Self::parse(&text, ticks as f64, u64::try_from(page).ok()?)
    }

    /// The name of the program, in parentheses, may hold anything: fields are counted from behind it.
    fn parse(text: &str, ticks: f64, page: u64) -> Option<Self> {
        let (_, fields) = text.rsplit_once(')')?;
        let fields: Vec<&str> = fields.split_whitespace().collect();
        // The first of these is the third field of proc(5).
        let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
        Some(Self {
            cpu_seconds: (field(14)? + field(15)?) as f64 / ticks,
            start_seconds: field(22)? as f64 / ticks,
            virtual_bytes: field(23)?,
            resident_bytes: field(24)? * page,
        })
    }
}

/// When the machine was started, in seconds since 1970.
fn boot_time() -> Option<f64> {
    let text = fs::read_to_string("/proc/stat").ok()?;
    text.lines()
        .find_map(|line| line.strip_prefix("btime "))?
        .trim()
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stat_line_is_read() {
        let text = "42 (a ) b) S 1 42 42 0 -1 4194560 100 0 0 0 250 50 0 0 20 0 3 0 700 8192000 512 184467";
        let expected = Stat {
            cpu_seconds: 3.0,
            start_seconds: 7.0,
            virtual_bytes: 8_192_000,
            resident_bytes: 512 * 4096,
        };
        assert_eq!(Stat::parse(text, 100.0, 4096), Some(expected));
        assert_eq!(Stat::parse("42 (a) S 1", 100.0, 4096), None);
        assert_eq!(Stat::parse("", 100.0, 4096), None);
    }

    #[test]
    fn this_process_is_read() {
        let stat = Stat::read().expect("our own");
        assert!(stat.resident_bytes > 1 << 20, "{stat:?}");
        assert!(boot_time().expect("btime") > 1e9);
    }
}
