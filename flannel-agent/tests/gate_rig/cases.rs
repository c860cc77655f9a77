//! Cases that share a lab: each starts with clean tables, and none may leave a packet dropped as invalid.

#![allow(
    unused_imports,
    unused_macros,
    reason = "not every test binary has a list of cases"
)]

use std::time::Instant;

use flannel_testkit::{Family, services::Flavour};

use super::{Extra, Gate, Mode};

/// A case: its name, and what it does. It says what is wrong.
pub(crate) type Case = (&'static str, fn(&mut Gate) -> anyhow::Result<()>);

/// Runs all cases in one lab and fails with all that is wrong.
#[track_caller]
pub(crate) fn run(mode: Mode, flavour: Flavour, cases: &[Case]) {
    run_with(mode, flavour, Extra::default(), cases);
}

/// The same in a lab of another kind.
#[track_caller]
pub(crate) fn run_with(mode: Mode, flavour: Flavour, extra: Extra<'_>, cases: &[Case]) {
    if !flannel_testkit::privileged() {
        return;
    }
    let mut gate = Gate::with([mode; 3], flavour, extra);
    let failures = run_in(&mut gate, cases);
    let lab = (extra.family, extra.routed_by.unwrap_or("a tunnel"));
    assert!(
        failures.is_empty(),
        "{mode:?}, {flavour:?}, {lab:?}: {failures:#?}"
    );
}

/// The same over IPv6.
#[track_caller]
pub(crate) fn run_over_ipv6(mode: Mode, flavour: Flavour, cases: &[Case]) {
    run_with(mode, flavour, Extra::over(Family::V6), cases);
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

/// Over IPv6 a test of each mode in which the gate is open, one for each kind of rules: what the other combinations differ in has no
/// family.
macro_rules! over_ipv6 {
    ($cases:expr) => {
        #[test]
        fn established_with_nftables_over_ipv6() {
            gate_rig::cases::run_over_ipv6(Mode::Established, Flavour::Nftables, $cases);
        }

        #[test]
        fn syn_with_iptables_over_ipv6() {
            gate_rig::cases::run_over_ipv6(Mode::Syn, Flavour::Iptables, $cases);
        }
    };
}

pub(crate) use {in_all_modes, over_ipv6};
