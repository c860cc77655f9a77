//! `cargo xtask test --kernel`: the agent's own tests on the kernels of distributions, in virtual machines without acceleration.
//!
//! For each kernel: fetch it from Debian ([`debian`]) with the [`modules`] that a case leaves it, put it into an initramfs with a
//! [`userland`] of Debian's packages and the [`programs`] of this workspace, boot that in QEMU ([`machine`]) and read what its
//! first process says ([`report`]). What runs where is in [`suites`]. Needs no root but for the installation of packages.

mod cpio;
mod debian;
mod guest;
mod machine;
mod modules;
mod nics;
mod programs;
mod report;
mod suites;
mod userland;

use std::path::Path;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread;

use anyhow::{Context as _, Result, bail};

use crate::dist::arch::Arch;
use crate::dist::tools;
use crate::process;
use crate::setup::{self, Needs};

pub(crate) use guest::Done;
use guest::Guest;
use nics::Cards;
use suites::Place;
pub(crate) use suites::Tier;

/// What a run of all tests ends with: the oldest and the newest, and another architecture.
pub(crate) const EVERY_TIME: [(Kernel, Arch); 3] = [
    (Kernel::V5_10, Arch::Amd64),
    (Kernel::V7, Arch::Amd64),
    (Kernel::V6_12, Arch::Arm64),
];

/// How many machines run at a time.
const AT_ONCE: usize = 2;

/// A kernel, by the series that a Debian suite has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kernel {
    /// Of Debian 11: no tcx, and the oldest flags of `bpf_skb_adjust_room`.
    V5_10,
    /// Of Debian 12: no tcx.
    V6_1,
    /// Of Debian 13.
    V6_12,
    /// Of Debian 13's backports: the newest (7.3 in November 2026).
    V7,
}

/// Kernels, as `--kernel` has them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Kernels(pub(crate) Vec<Kernel>);

impl FromStr for Kernels {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let one = match text {
            "all" => return Ok(Self(Kernel::ALL.to_vec())),
            "5.10" => Kernel::V5_10,
            "6.1" => Kernel::V6_1,
            "6.12" => Kernel::V6_12,
            "7" | "7.2" | "7.3" | "backports" => Kernel::V7,
            _ => return Err("write 5.10, 6.1, 6.12, 7 or all".to_owned()),
        };
        Ok(Self(vec![one]))
    }
}

impl Kernel {
    pub(crate) const ALL: [Self; 4] = [Self::V5_10, Self::V6_1, Self::V6_12, Self::V7];

    const fn suite(self) -> &'static str {
        match self {
            Self::V5_10 => "bullseye",
            Self::V6_1 => "bookworm",
            Self::V6_12 => "trixie",
            Self::V7 => "trixie-backports",
        }
    }

    /// What it is called where its exact version does not matter.
    const fn name(self) -> &'static str {
        match self {
            Self::V5_10 => "5.10",
            Self::V6_1 => "6.1",
            Self::V6_12 => "6.12",
            Self::V7 => "7",
        }
    }

    const fn has_tcx(self) -> bool {
        matches!(self, Self::V6_12 | Self::V7)
    }

    /// Those of `flannel_common::map::helper_flags`: `bpf_ktime_get_coarse_ns` of 5.11 and `bpf_check_mtu` of 5.12.
    const fn has_helpers(self) -> bool {
        !matches!(self, Self::V5_10)
    }

    /// `BPF_F_ADJ_ROOM_ENCAP_L2_ETH` works.
    const fn has_l2_eth(self) -> bool {
        !matches!(self, Self::V5_10)
    }
}

/// What a machine lacks beside what its kernel lacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Case {
    Plain,
    /// `vxlan.ko` is not there, as on distributions that put it into another package.
    NoVxlan,
    /// Neither `cls_bpf.ko` nor `sch_ingress.ko`: without tcx there is nothing to attach to.
    NoClassifier,
    /// `bpf(2)` is refused to everybody, as by a sandbox.
    NoBpf,
    NoVxlanNoBpf,
    /// What Secure Boot sets.
    LockdownIntegrity,
    LockdownConfidentiality,
    /// It lacks nothing: its labs have network cards for uplinks.
    Cards(Cards),
}

impl Case {
    /// For files.
    const fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::NoVxlan => "no-vxlan",
            Self::NoClassifier => "no-classifier",
            Self::NoBpf => "no-bpf",
            Self::NoVxlanNoBpf => "no-vxlan-no-bpf",
            Self::LockdownIntegrity => "lockdown-integrity",
            Self::LockdownConfidentiality => "lockdown-confidentiality",
            Self::Cards(cards) => cards.name(),
        }
    }

    /// For people, behind the name of the kernel.
    const fn description(self) -> &'static str {
        match self {
            Self::Plain => "",
            Self::NoVxlan => " without vxlan.ko",
            Self::NoClassifier => " without cls_bpf.ko and sch_ingress.ko",
            Self::NoBpf => " with bpf(2) refused",
            Self::NoVxlanNoBpf => " without vxlan.ko and with bpf(2) refused",
            Self::LockdownIntegrity => " with lockdown=integrity",
            Self::LockdownConfidentiality => " with lockdown=confidentiality",
            Self::Cards(cards) => cards.description(),
        }
    }

    /// The modules that it does not have.
    const fn withheld(self) -> &'static [&'static str] {
        match self {
            Self::NoVxlan | Self::NoVxlanNoBpf => &["vxlan"],
            Self::NoClassifier => &["cls_bpf", "sch_ingress"],
            _ => &[],
        }
    }

    /// What bpf(2) answers, if it does not do what it is asked.
    const fn refuse_bpf(self) -> Option<i32> {
        /// `EPERM`: what a container's seccomp profile says.
        const EPERM: i32 = 1;
        match self {
            Self::NoBpf | Self::NoVxlanNoBpf => Some(EPERM),
            _ => None,
        }
    }

    /// What is added to the kernel's command line.
    const fn append(self) -> &'static str {
        match self {
            Self::LockdownIntegrity => "lockdown=integrity",
            Self::LockdownConfidentiality => "lockdown=confidentiality",
            _ => "",
        }
    }

    /// The network cards of its labs.
    const fn cards(self) -> Option<Cards> {
        match self {
            Self::Cards(cards) => Some(cards),
            _ => None,
        }
    }

    /// In the words of `flannel-agent/tests/netns_kernel.rs`.
    const fn lacks(self) -> &'static [&'static str] {
        match self {
            Self::NoVxlan => &["vxlan"],
            Self::NoClassifier => &["cls_bpf"],
            Self::NoBpf => &["bpf"],
            Self::NoVxlanNoBpf => &["vxlan", "bpf"],
            Self::Plain
            | Self::LockdownIntegrity
            | Self::LockdownConfidentiality
            | Self::Cards(_) => &[],
        }
    }
}

/// What to run.
pub(crate) struct Request<'a> {
    pub(crate) kernels: Vec<(Kernel, Arch)>,
    pub(crate) tier: Tier,
    /// Only machines whose case has a name that begins so.
    pub(crate) case: Option<&'a str>,
    /// Only tests whose name contains this.
    pub(crate) filter: Option<&'a str>,
    /// Look for newer packages.
    pub(crate) refresh: bool,
}

/// What all machines of an architecture have in common.
struct Equipment {
    programs: programs::Programs,
    base: cpio::Archive,
}

/// Runs all machines, two at a time, and hands over each outcome as it comes. While those of one architecture run, the programs
/// for the next are built.
pub(crate) fn run(root: &Path, request: &Request<'_>, done: &mut dyn FnMut(Done)) -> Result<()> {
    if !setup::is_debian() {
        bail!("the kernels come by apt from Debian: this needs Debian or Ubuntu");
    }
    setup::ensure(root, Needs::Kernels)?;
    let mut arches: Vec<Arch> = request.kernels.iter().map(|(_, arch)| *arch).collect();
    arches.sort_unstable();
    arches.dedup();
    tools::ensure_cross(root, &arches)?;
    let dir = &*root.join("target").join("kernels");
    let object = programs::object(root)?;
    let (machines, waiting) = mpsc::channel::<(Place, Arc<Equipment>)>();
    let waiting = Mutex::new(waiting);
    let (sender, outcomes) = mpsc::channel();
    thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            let (sender, waiting) = (sender.clone(), &waiting);
            scope.spawn(move || {
                loop {
                    let next = waiting
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .recv();
                    let Some((place, equipment)) = next.ok().filter(|_| !process::interrupted())
                    else {
                        return;
                    };
                    let guest = Guest {
                        dir,
                        place,
                        tier: request.tier,
                        filter: request.filter,
                        programs: &equipment.programs,
                        base: &equipment.base,
                    };
                    // The other end lives as long as this scope.
                    let _sent = sender.send(guest.run());
                }
            });
        }
        drop(sender);
        let prepared = scope.spawn(move || {
            arches
                .into_iter()
                .try_for_each(|arch| prepare(root, dir, arch, &object, request, &machines))
        });
        for outcome in outcomes {
            done(outcome);
        }
        prepared
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Fetches and builds what machines of an architecture need, and lets them start.
fn prepare(
    root: &Path,
    dir: &Path,
    arch: Arch,
    object: &Path,
    request: &Request<'_>,
    machines: &mpsc::Sender<(Place, Arc<Equipment>)>,
) -> Result<()> {
    if process::interrupted() {
        bail!("interrupted");
    }
    let places = places(request, arch);
    let mut targets: Vec<&str> = places
        .iter()
        .flat_map(|place| place.suites(request.tier))
        .map(|(target, _)| target)
        .collect();
    targets.sort_unstable();
    targets.dedup();
    let userland = userland::fetch(dir, arch, request.refresh)?;
    for (kernel, _) in request.kernels.iter().filter(|(_, of)| *of == arch) {
        debian::fetch(dir, *kernel, arch, request.refresh)?;
    }
    eprintln!("building {} test binaries for {arch} guests", targets.len());
    let programs = programs::build(root, arch, &targets, object)?;
    let mut base = cpio::Archive::default();
    base.add_below(&userland)
        .with_context(|| format!("read {}", userland.display()))?;
    programs.add_to(&mut base);
    let equipment = Arc::new(Equipment { programs, base });
    for place in places {
        // Those who start them live as long as there is one to start.
        let _sent = machines.send((place, Arc::clone(&equipment)));
    }
    Ok(())
}

/// The machines of an architecture, in the order in which they begin.
fn places(request: &Request<'_>, arch: Arch) -> Vec<Place> {
    let of_arch = request.kernels.iter().filter(|(_, of)| *of == arch);
    of_arch
        .flat_map(|(kernel, _)| {
            let is_wanted = |case: &Case| {
                request
                    .case
                    .is_none_or(|wanted| case.name().starts_with(wanted))
            };
            let cases = suites::cases(*kernel, request.tier).filter(is_wanted);
            cases.map(|case| Place {
                kernel: *kernel,
                arch,
                case,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_read_by_every_name() {
        assert_eq!("7".parse(), Ok(Kernels(vec![Kernel::V7])));
        assert_eq!("backports".parse(), Ok(Kernels(vec![Kernel::V7])));
        assert_eq!("all".parse(), Ok(Kernels(Kernel::ALL.to_vec())));
        let why = "4.19".parse::<Kernels>().expect_err("none");
        assert!(why.contains("5.10"), "{why}");
    }
}
