//! What runs on which kernel, and what does not and why. The one place that knows.

use super::{Case, Kernel};
use crate::dist::arch::Arch;

/// How much runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tier {
    /// What a change must pass: within minutes.
    Quick,
    /// Everything that means something on another kernel.
    Complete,
}

/// A test binary of the agent.
pub(super) struct Suite {
    pub(super) target: &'static str,
    quick: bool,
}

const fn suite(target: &'static str, quick: bool) -> Suite {
    Suite { target, quick }
}

/// On a kernel from which nothing is withheld, in this order.
const SUITES: [Suite; 2] = [suite("bpf_testrun", true), suite("netns_wire", true)];

/// A test that is not run somewhere.
struct LeftOut {
    target: &'static str,
    /// The beginning of its path in the binary, or all of it.
    test: &'static str,
    on: fn(&Place) -> bool,
    why: &'static str,
}

/// A machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) kernel: Kernel,
    pub(super) arch: Arch,
    pub(super) case: Case,
}

const LEFT_OUT: [LeftOut; 0] = [];

impl Place {
    /// What runs here.
    pub(super) fn suites(self, tier: Tier) -> impl Iterator<Item = &'static Suite> {
        let is_wanted = move |suite: &&Suite| tier == Tier::Complete || suite.quick;
        SUITES.iter().filter(is_wanted)
    }

    /// Tests of a binary that do not run here, with the reason.
    pub(super) fn left_out(self, target: &str) -> Vec<(&'static str, &'static str)> {
        let here = LEFT_OUT
            .iter()
            .filter(|row| row.target == target && (row.on)(&self));
        here.map(|row| (row.test, row.why)).collect()
    }
}
