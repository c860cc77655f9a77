//! Knowing without a plan that there is nothing to do.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use flannel_core::{
    plan::{Desired, Direct, Settings, Tunnel},
    pods::Pod,
};
use ipnet::IpNet;

/// What was desired when a plan was last empty, but for the peers: with thousands of them a plan takes longer than a look.
#[derive(Debug)]
pub(super) struct Quiet {
    tunnel: Option<Tunnel>,
    direct: Option<Direct>,
    own: BTreeSet<IpNet>,
    bpf: Option<Settings>,
    pods: Option<BTreeMap<IpAddr, Pod>>,
    /// What that plan found that no change of ours can mend.
    problems: Vec<String>,
}

impl Quiet {
    pub(super) fn of(desired: &Desired, problems: Vec<String>) -> Self {
        Self {
            tunnel: desired.tunnel.clone(),
            direct: desired.direct.clone(),
            own: desired.own.clone(),
            bpf: desired.bpf.clone(),
            pods: desired.pods.clone(),
            problems,
        }
    }

    /// What no change of ours can mend.
    pub(super) fn problems(&self) -> &[String] {
        &self.problems
    }

    /// Whether a plan for the same peers and the same kernel would be the same.
    pub(super) fn suits(&self, desired: &Desired) -> bool {
        self.tunnel == desired.tunnel
            && self.direct == desired.direct
            && self.own == desired.own
            && self.bpf == desired.bpf
            && self.pods == desired.pods
    }
}
