//! What `cargo xtask kernels` runs in a virtual machine, as its first process: loads the agent's eBPF object, runs the programs on
//! packets, and then a small overlay with real agents. It reports in lines that begin with [`MARK`].
//!
//! Started as any other process (by root, with `FLANNEL_AGENT` naming the agent) it does the same on the running kernel.

mod guest;
mod overlay;
mod programs;
mod xdp;

use std::{env, path::PathBuf, process::ExitCode, time::Instant};

use flannel_agent::dataplane::bpf::AttachMode;
use overlay::Way;

/// How the lines begin that are meant for `cargo xtask kernels`.
const MARK: &str = "kernel_probe:";

fn main() -> ExitCode {
    // A guest has nobody else to start anything.
    let is_guest = std::process::id() == 1;
    let mut report = Report { failed: false };
    if is_guest {
        report.case("start", guest::set_up);
    }
    if !report.failed {
        run(&mut report, is_guest);
    }
    println!("{MARK} end tainted={}", guest::tainted());
    if is_guest {
        guest::power_off();
    }
    if report.failed {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    }
}

fn run(report: &mut Report, is_guest: bool) {
    let attach = AttachMode::detect();
    println!("{MARK} fact attach {}", attach.as_str());
    report.case("load", programs::load);
    report.case("run", programs::run);
    let Some(agent) = env::var_os("FLANNEL_AGENT") else {
        report.case("overlay", || {
            Err::<String, _>(anyhow::anyhow!("FLANNEL_AGENT names no agent"))
        });
        return;
    };
    let agent = PathBuf::from(agent);
    // The cards of any other machine are not for playing.
    if is_guest {
        report.case("native XDP", || xdp::run(&agent));
    }
    let mut ways = vec![(attach, "vxlan")];
    if attach == AttachMode::Tcx {
        ways.push((AttachMode::Clsact, "vxlan"));
    }
    // Without the kernel's device eBPF carries everything, and other helpers come into play.
    ways.push((attach, "veth"));
    for (attach, device) in ways {
        let way = Way { attach, device };
        report.case(&format!("overlay, {way}"), || overlay::run(&agent, way));
    }
}

/// The account of the cases, on stdout.
struct Report {
    failed: bool,
}

impl Report {
    /// Runs a case; what it returns is told after its name.
    fn case(&mut self, name: &str, work: impl FnOnce() -> anyhow::Result<String>) {
        let started = Instant::now();
        match work() {
            Ok(told) => {
                let seconds = started.elapsed().as_secs_f32();
                println!("{MARK} ok {name}: {told} ({seconds:.1} s)");
            }
            Err(error) => {
                self.failed = true;
                // The first line is the one that is repeated; the rest can be read in the log.
                println!("{MARK} FAILED {name}: {error:#}");
            }
        }
    }
}
