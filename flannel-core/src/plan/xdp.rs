//! Native XDP on the uplink.
//!
//! A frame without its outer headers makes sense to `from_wire` alone, and only while the configuration tells it to look for such
//! frames. So XDP comes last and goes before anything that it depends on changes.

use super::{Attachment, BpfState, Desired, Observed, Op, Plan, Settings};

/// Detaches it where it is not wanted: before the configuration says so, and before `from_wire` follows the uplink.
pub(super) fn retire(desired: &Desired, observed: &Observed, plan: &mut Plan) {
    let (Some(want), Some(have)) = (&desired.bpf, &observed.bpf) else {
        return;
    };
    if let Some(there) = have.xdp
        && (!want.xdp || desired.tunnel.is_none() || there.ifindex != want.uplink)
    {
        plan.ops.push(Op::DetachXdp {
            ifindex: there.ifindex,
        });
    }
}

/// Attaches it, or replaces an earlier run's. To be called when the plan has everything that it depends on.
pub(super) fn admit(want: &Settings, have: &BpfState, plan: &mut Plan) {
    let wanted = Attachment {
        ifindex: want.uplink,
        current: true,
    };
    if want.xdp && have.xdp != Some(wanted) {
        plan.ops.push(Op::AttachXdp {
            ifindex: want.uplink,
        });
    }
}
