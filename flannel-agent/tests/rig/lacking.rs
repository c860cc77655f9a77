//! Kernels other than the newest are described by the environment: `FLANNEL_TEST_LACKS` names, between commas, what this one does not
//! have.

use std::env;

use flannel_common::map::helper_flags;

/// What a kernel may lack: attachment by tcx, a flag of `bpf_skb_adjust_room`, the helpers of `flannel_common::map::helper_flags`, the
/// classifier, vxlan devices, `bpf(2)`.
const LACKING: [&str; 6] = ["tcx", "l2_eth", "helpers", "cls_bpf", "vxlan", "bpf"];

/// Whether this kernel is said to lack something.
pub(crate) fn lacks(what: &str) -> bool {
    let all = env::var("FLANNEL_TEST_LACKS").unwrap_or_default();
    let mut words = all.split(',').filter(|word| !word.is_empty());
    assert!(
        words.clone().all(|word| LACKING.contains(&word)),
        "FLANNEL_TEST_LACKS={all}"
    );
    words.any(|word| word == what)
}

/// What the programs are told of the kernel's helpers, as the agent does: the verifier refuses the names of those that it has not got.
pub(crate) fn helpers() -> u32 {
    if lacks("helpers") {
        0
    } else {
        helper_flags::COARSE_CLOCK | helper_flags::CHECK_MTU
    }
}
