//! Cases that share a lab: each starts with clean tables, and none may leave a packet dropped as invalid.

#![allow(
    unused_imports,
    unused_macros,
    reason = "not every test binary has a list of cases"
)]

use std::time::Instant;

use flannel_testkit::services::Flavour;

use super::{Gate, Mode};

/// A case: its name, and what it does. It says what is wrong.
pub(crate) type Case = (&'static str, fn(&mut Gate) -> anyhow::Result<()>);

/// Runs all cases in one lab and fails with all that is wrong.
#[track_caller]
pub(crate) fn run(mode: Mode, flavour: Flavour, cases: &[Case]) {
    if !flannel_testkit::privileged() {
        return;
    }
    let mut gate = Gate::start(mode, flavour);
    let failures = run_in(&mut gate, cases);
    assert!(failures.is_empty(), "{mode:?}, {flavour:?}: {failures:#?}");
}

/// Runs all cases in a lab and gives all that is wrong.
pub(crate) fn run_in(gate: &mut Gate, cases: &[Case]) -> Vec<String> {
    let mut failures = Vec::new();
    let mut dropped = gate.invalid_drops();
    for (name, case) in cases {
        gate.clear_nattuples();
        let start = Instant::now();
        if let Err(error) = case(gate) {
            failures.push(format!("{name}: {error:#}"));
        }
        let now = gate.invalid_drops();
        if now != dropped {
            failures.push(format!(
                "{name}: dropped as invalid, by node: {dropped:?} before, {now:?} now"
            ));
            dropped = now;
        }
        eprintln!("    {:6.2} s  {name}", start.elapsed().as_secs_f64());
    }
    failures
}

/// One test for each mode and each kind of rules, which runs the named list of cases.
macro_rules! in_all_modes {
    ($cases:ident) => {
        #[test]
        fn off_with_iptables() {
            gate_rig::cases::run(Mode::Off, Flavour::Iptables, $cases);
        }

        #[test]
        fn off_with_nftables() {
            gate_rig::cases::run(Mode::Off, Flavour::Nftables, $cases);
        }

        #[test]
        fn established_with_iptables() {
            gate_rig::cases::run(Mode::Established, Flavour::Iptables, $cases);
        }

        #[test]
        fn established_with_nftables() {
            gate_rig::cases::run(Mode::Established, Flavour::Nftables, $cases);
        }

        #[test]
        fn syn_with_iptables() {
            gate_rig::cases::run(Mode::Syn, Flavour::Iptables, $cases);
        }

        #[test]
        fn syn_with_nftables() {
            gate_rig::cases::run(Mode::Syn, Flavour::Nftables, $cases);
        }
    };
}

pub(crate) use in_all_modes;
