//! What runs on which kernel, and what does not and why. The one place that knows.

use super::nics::Cards;
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
    quick: Part,
}

/// How much of a binary.
#[derive(Clone, Copy)]
enum Part {
    All,
    /// The tests of these names.
    Only(&'static [&'static str]),
    Nothing,
}

const fn suite(target: &'static str, quick: Part) -> Suite {
    Suite { target, quick }
}

/// What the kernel can, and the overlay in every way: also on kernels from which something is withheld.
const OF_THE_KERNEL: &str = "netns_kernel";
/// The part of it that knows what is left then.
const RUNG: &[&str] = &["rung::the_agent_makes_the_best_of_what_there_is"];

/// On a kernel from which nothing is withheld, in this order.
const SUITES: [Suite; 15] = [
    suite(OF_THE_KERNEL, Part::All),
    suite(
        "bpf_testrun",
        Part::Only(&[
            "decap::outer_headers",
            "decap::receivers_rules",
            "decap::super_packets",
            "encap::every_length_and_tos_is_encapsulated",
            "gate::a_connection_is_fast_after_its_handshake",
            "gate::what_the_gate_cannot_follow_goes_on_unchanged_and_untagged",
            "xdp::every_length_is_stripped",
        ]),
    ),
    suite(
        "bpf_testrun_v6",
        Part::Only(&[
            "decap::a_header_that_was_damaged_is_the_kernels_to_refuse",
            "encap::every_length_and_class_gets_a_right_checksum",
            "gate::super_packets_go_to_the_tunnel_device_past_the_stack",
            "gate::what_arrives_goes_into_the_pod",
        ]),
    ),
    suite(
        "netns_wire",
        Part::Only(&[
            "frames_equal_the_kernels",
            "frames_over_ipv6_equal_the_kernels",
        ]),
    ),
    suite(
        "netns_dual",
        Part::Only(&["both_families_carry_side_by_side"]),
    ),
    suite(
        "netns_direct",
        Part::Only(&["peers_on_the_link_are_routed_to_past_the_stack"]),
    ),
    // Of the kernel it uses what netns_direct does.
    suite("netns_hostgw", Part::Nothing),
    suite(
        "netns_module",
        Part::Only(&["the_module_itself_is_loaded_later_without_a_gap"]),
    ),
    // A host kernel may lack WireGuard.
    suite(
        "guest_wireguard",
        Part::Only(&[
            "both_families_over_a_device_each",
            "a_restart_keeps_the_key_and_loses_nothing",
            "change::from_vxlan_to_wireguard_and_back",
            "change::metrics_of_each_peer_are_what_wg_shows",
            "change::what_is_told_is_what_wg_shows",
        ]),
    ),
    suite("netns_restart", Part::Nothing),
    suite("netns_modes", Part::Nothing),
    suite("netns_detach", Part::Nothing),
    suite("netns_fastpath", Part::Nothing),
    suite("netns_gate_packets", Part::Nothing),
    suite("netns_pmtu", Part::Nothing),
];

/// A test that is not run somewhere.
struct LeftOut {
    target: &'static str,
    /// The beginning of its path in the binary, or all of it.
    test: &'static str,
    on: fn(Place) -> bool,
    why: &'static str,
}

/// A machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) kernel: Kernel,
    pub(super) arch: Arch,
    pub(super) case: Case,
}

const LEFT_OUT: &[LeftOut] = &[
    LeftOut {
        target: OF_THE_KERNEL,
        test: "overlay::the_overlay_works_on_clsact",
        on: without_tcx,
        why: "clsact is what this kernel likes best: the same test under another name has run",
    },
    LeftOut {
        target: "bpf_testrun",
        test: "gate::a_syn_is_admitted_in_both_directions",
        on: without_helpers,
        why: "this kernel has no bpf_check_mtu, without which nothing is admitted by its SYN",
    },
    LeftOut {
        target: "bpf_testrun_v6",
        test: "encap::at_the_far_end_of_a_pair_every_byte_is_summed_up",
        on: without_helpers,
        why: "this kernel's run of a program takes no interface that the packet has come in through: netns_dual carries such packets there",
    },
    LeftOut {
        target: "bpf_testrun",
        test: "xdp::",
        on: without_metadata,
        why: "this kernel's run of an XDP program does not give the metadata back, by which a stripped frame is known: machines with cards run it",
    },
    LeftOut {
        target: "netns_module",
        test: "the_module_itself_is_loaded_later_without_a_gap",
        on: without_tcx,
        why: "the new device gets a clsact qdisc while it carries traffic, and the kernel can lose a packet or two meanwhile: on 5.10 two segments, in three of four runs",
    },
    LeftOut {
        target: OF_CARDS,
        test: "silent::",
        on: on_cards_that_work,
        why: "these cards run XDP programs: machines with others do it",
    },
    LeftOut {
        target: OF_CARDS,
        test: "queues::",
        on: on_cards_that_work,
        why: "these cards have one queue: machines with others do it",
    },
    LeftOut {
        target: OF_CARDS,
        test: "jumbo::the_mtu_may_grow_while_xdp_is_attached",
        on: without_large_frames_for_xdp,
        why: "virtio_net here loses larger frames with a program attached, and gives it back only when the MTU is small again",
    },
    LeftOut {
        target: "netns_xdp",
        test: "by_itself_it_is_for_hardware_only",
        on: on_cards_that_work,
        why: "it is about veth pairs, and these are hardware",
    },
    LeftOut {
        target: "netns_xdp",
        test: "trial::a_driver_that_never_runs_it_is_found_out",
        on: on_cards_that_work,
        why: "it makes a veth pair look like a silent card: machines with such cards do it",
    },
];

/// `virtnet_xdp_set` asks for a small MTU even to detach.
fn without_large_frames_for_xdp(place: Place) -> bool {
    matches!(place.kernel, Kernel::V5_10 | Kernel::V6_1)
}

fn on_cards_that_work(place: Place) -> bool {
    matches!(place.case, Case::Cards(Cards::Hub | Cards::Tap))
}

fn without_tcx(place: Place) -> bool {
    !place.kernel.has_tcx()
}

/// `bpf_prog_test_run_xdp` gives metadata back since 5.18.
fn without_metadata(place: Place) -> bool {
    matches!(place.kernel, Kernel::V5_10)
}

fn without_helpers(place: Place) -> bool {
    !place.kernel.has_helpers()
}

/// Which machines lack something: on these kernels, and whether within minutes.
const CASES: [(Case, &[Kernel], bool); 13] = [
    (Case::NoBpf, &[Kernel::V5_10], false),
    (Case::NoClassifier, &[Kernel::V5_10], true),
    (Case::NoVxlan, &[Kernel::V6_1], false),
    (Case::NoClassifier, &[Kernel::V6_1, Kernel::V6_12], false),
    (Case::NoBpf, &[Kernel::V6_1], false),
    (Case::NoVxlanNoBpf, &[Kernel::V6_1], false),
    (Case::LockdownIntegrity, &[Kernel::V6_12], false),
    (Case::LockdownConfidentiality, &[Kernel::V6_12], false),
    (Case::NoVxlan, &[Kernel::V7], true),
    (
        Case::Cards(Cards::Hub),
        &[Kernel::V5_10, Kernel::V6_12],
        false,
    ),
    (Case::Cards(Cards::Tap), &[Kernel::V6_1, Kernel::V7], false),
    (Case::Cards(Cards::Queues), &[Kernel::V6_12], false),
    (Case::Cards(Cards::Silent), &Kernel::ALL, false),
];

/// What a driver alone shows.
const OF_CARDS: &str = "guest_nics";
/// What runs over network cards as well: what goes over the wire.
const OVER_CARDS: [&str; 4] = [OF_CARDS, "netns_wire", "netns_xdp", "netns_restart"];

fn of_cards(cards: Cards) -> Vec<(&'static str, &'static [&'static str])> {
    match cards {
        Cards::Hub | Cards::Tap => OVER_CARDS.map(|target| (target, &[][..])).to_vec(),
        Cards::Queues => vec![(OF_CARDS, &["queues::every_queue_strips"])],
        Cards::Silent => vec![(
            OF_CARDS,
            &[
                "silent::it_is_left_for_tc",
                "silent::silence_proves_nothing",
            ],
        )],
    }
}

/// What a machine may lack on a kernel, beside nothing.
pub(super) fn cases(kernel: Kernel, tier: Tier) -> impl Iterator<Item = Case> {
    let here = CASES.iter().filter(move |(_, kernels, quick)| {
        kernels.contains(&kernel) && (*quick || tier == Tier::Complete)
    });
    std::iter::once(Case::Plain).chain(here.map(|(case, ..)| *case))
}

impl Place {
    /// What runs here, and which tests of it: all, if none are named.
    pub(super) fn suites(self, tier: Tier) -> Vec<(&'static str, &'static [&'static str])> {
        let of_the_kernel = match self.case {
            Case::Cards(cards) => return of_cards(cards),
            Case::Plain => None,
            Case::LockdownIntegrity | Case::LockdownConfidentiality => Some(&[][..]),
            Case::NoVxlan | Case::NoClassifier | Case::NoBpf | Case::NoVxlanNoBpf => Some(RUNG),
        };
        if let Some(tests) = of_the_kernel {
            return vec![(OF_THE_KERNEL, tests)];
        }
        let part = |suite: &Suite| match (tier, suite.quick) {
            (Tier::Complete, _) | (_, Part::All) => Some((suite.target, &[][..])),
            (_, Part::Only(tests)) => Some((suite.target, tests)),
            (_, Part::Nothing) => None,
        };
        SUITES.iter().filter_map(part).collect()
    }

    /// Tests of a binary that do not run here, with the reason.
    pub(super) fn left_out(self, target: &str) -> Vec<(&'static str, &'static str)> {
        let here = LEFT_OUT
            .iter()
            .filter(|row| row.target == target && (row.on)(self));
        here.map(|row| (row.test, row.why)).collect()
    }

    /// What the tests are told that is not here (`flannel-agent/tests/netns_kernel.rs`).
    pub(super) fn lacks(self) -> String {
        let of_kernel = [
            (!self.kernel.has_tcx(), "tcx"),
            (!self.kernel.has_l2_eth(), "l2_eth"),
            (!self.kernel.has_helpers(), "helpers"),
        ];
        let of_kernel = of_kernel.into_iter().filter(|(lacks, _)| *lacks);
        let words = of_kernel
            .map(|(_, word)| word)
            .chain(self.case.lacks().iter().copied());
        words.collect::<Vec<_>>().join(",")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn place(kernel: Kernel, case: Case) -> Place {
        Place {
            kernel,
            arch: Arch::Amd64,
            case,
        }
    }

    #[test]
    fn tests_are_told_what_is_not_there() {
        assert_eq!(place(Kernel::V7, Case::Plain).lacks(), "");
        assert_eq!(
            place(Kernel::V5_10, Case::Plain).lacks(),
            "tcx,l2_eth,helpers"
        );
        let none = place(Kernel::V6_1, Case::NoVxlanNoBpf);
        assert_eq!(none.lacks(), "tcx,vxlan,bpf");
    }

    #[test]
    fn the_quick_tier_is_a_part_of_the_other() {
        for kernel in Kernel::ALL {
            let plain = place(kernel, Case::Plain);
            let complete = plain.suites(Tier::Complete);
            for (target, _) in plain.suites(Tier::Quick) {
                assert!(complete.contains(&(target, &[][..])), "{target}");
            }
            let all: Vec<Case> = cases(kernel, Tier::Complete).collect();
            assert!(cases(kernel, Tier::Quick).all(|case| all.contains(&case)));
            assert!(all.len() > 1, "{kernel:?} is never without anything");
        }
    }

    #[test]
    fn what_is_left_out_has_a_suite_and_a_reason() {
        for row in LEFT_OUT {
            let known = SUITES.iter().map(|suite| suite.target).chain(OVER_CARDS);
            assert!(known.into_iter().any(|target| target == row.target));
            assert!(!row.why.is_empty() && !row.test.is_empty());
        }
    }
}
