//! What the demo and the benchmark share, an overlay of agents in a lab and a stop button, and the parts of the benchmark.

pub mod cluster;
pub mod footprint;
pub mod guard;
pub mod meter;
pub mod mode;
pub mod netfilter;
mod no_overlay;
pub mod nodes;
pub mod pin;
pub mod plot;
pub mod programs;
pub mod report;
pub mod result;
pub mod rig;
pub mod session;
pub mod stats;
pub mod workload;

use std::{
    io::Write as _,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use anyhow::bail;

/// Set by Ctrl-C. Every step looks at it, so that the lab is taken down in the ordinary way.
static STOP: AtomicBool = AtomicBool::new(false);

/// Exit code after Ctrl-C, as a shell would give it.
pub const INTERRUPTED: u8 = 130;

/// Makes Ctrl-C and SIGTERM end the program in the ordinary way.
pub fn watch_for_stop() -> anyhow::Result<()> {
    ctrlc::set_handler(|| STOP.store(true, Ordering::SeqCst))?;
    Ok(())
}

/// Whether it was asked to stop.
pub fn stopped() -> bool {
    STOP.load(Ordering::SeqCst)
}

/// An error once it was asked to stop.
pub fn check_stop() -> anyhow::Result<()> {
    if stopped() {
        bail!("Ctrl-C");
    }
    Ok(())
}

/// Waits until it is asked to stop.
pub fn wait_for_stop() {
    while !stopped() {
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// A line of progress, on standard error.
pub fn progress(line: &str) {
    // Nobody to tell if standard error is closed.
    let _closed = writeln!(std::io::stderr(), "{line}");
}

/// A line of the result, on standard output.
pub fn say(line: &str) {
    // Nobody to tell if standard output is closed.
    let _closed = writeln!(std::io::stdout(), "{line}");
}
