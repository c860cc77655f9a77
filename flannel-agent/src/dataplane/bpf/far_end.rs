//! The far end of the pair that carries IPv6 where the kernel has no vxlan device.
//!
//! Over IPv6 a super-packet needs an outer checksum for each of its segments, and a packet without a checksum of its own one over all its
//! bytes. So the near end, which has the routes, leaves nothing to hardware: what goes through it comes out of the far end in segments,
//! with every checksum filled in, and there the program that encapsulates has it a second time.

use std::{io, os::fd::AsFd as _, path::PathBuf};

use aya::programs::TcAttachType;
use flannel_core::{
    addr::{Family, IfIndex},
    mark,
    plan::Hook,
};

use super::{
    AttachMode, Bpf, BpfError, Instance,
    attach::{delete_filter, name_of, remove_pin},
    join, link,
    pins::pin_error,
    program,
};
use crate::dataplane::offload;

/// A hook on the far end's side, for what asks for a side by a hook.
const SIDE: Hook = Hook::FromOverlay;

impl Instance {
    fn far_end_link(&self, near: &str) -> PathBuf {
        let name = if near == self.overlay().device() {
            mark::PIN_FAR_END
        } else {
            mark::PIN_STAND_IN_FAR_END
        };
        join(self.dir(), name)
    }

    /// Forgets the links of both pairs.
    pub(super) fn forget_far_ends(&self) -> Result<(), BpfError> {
        remove_pin(&join(self.dir(), mark::PIN_FAR_END))?;
        self.forget_stand_in_far_end()
    }

    /// Forgets the link of the pair that stands in.
    pub(super) fn forget_stand_in_far_end(&self) -> Result<(), BpfError> {
        remove_pin(&join(self.dir(), mark::PIN_STAND_IN_FAR_END))
    }
}

impl Bpf {
    /// The far end that needs a program, of the pair whose near end has that name. `None` for IPv4, and for other devices.
    fn far_end(&self, near: &str) -> Option<(String, IfIndex)> {
        let overlay = self.instance.overlay();
        if overlay.family != Family::V6 {
            return None;
        }
        let name = if near == overlay.device() {
            overlay.far_end().ok()
        } else {
            mark::stand_in(&overlay.device()).map(|(_, far)| far)
        }?;
        let index = nix::net::if_::if_nametoindex(name.as_str()).ok()?;
        Some((name, IfIndex::try_from(index).ok()?))
    }

    /// Prepares the near end, and attaches the program that encapsulates to the far end, where there is one.
    pub(super) fn attach_far_end(&mut self, near: &str) -> Result<(), BpfError> {
        let Some((far, ifindex)) = self.far_end(near) else {
            return Ok(());
        };
        offload::fill_checksums(near).map_err(|error| BpfError::Tc {
            what: format!("switch checksum offload off on {near}"),
            reason: error.to_string(),
        })?;
        let hook = Hook::ToOverlay;
        let pin = self.instance.far_end_link(near);
        match self.attach {
            AttachMode::Tcx => {
                let there = link::pinned(&pin).filter(|there| there.ifindex == Some(ifindex));
                if there.is_some() {
                    let failed = |error: io::Error| pin_error("replace", &pin, error);
                    let link = link::open(&pin).map_err(failed)?;
                    let program = program(&mut self.ebpf, hook.as_str())?;
                    let fd = program
                        .fd()
                        .map_err(|source| BpfError::program("replace", hook.as_str(), source))?;
                    link::replace(&link, fd.as_fd()).map_err(failed)?;
                } else {
                    self.make_tcx(hook, TcAttachType::Ingress, &far, &pin)?;
                }
                // Of a run that attached the other way; mostly there is none.
                if let Err(error) = delete_filter(SIDE, ifindex, self.instance.overlay()) {
                    tracing::debug!(far, %error, "delete a filter");
                }
            }
            AttachMode::Clsact => {
                self.attach_clsact(hook, TcAttachType::Ingress, ifindex, &far)?;
                remove_pin(&pin)?;
            }
        }
        Ok(())
    }

    /// Whether the program of that id is at the far end too, and the near end as it has to be. Which filter there is only netlink knows.
    pub(super) fn is_at_far_end(&self, near: IfIndex, program: u32) -> bool {
        let Some((near, (_, ifindex))) = name_of(near)
            .ok()
            .and_then(|near| self.far_end(&near).map(|far| (near, far)))
        else {
            return true;
        };
        let attached = match self.attach {
            AttachMode::Tcx => link::pinned(&self.instance.far_end_link(&near))
                .is_some_and(|link| link.ifindex == Some(ifindex) && link.program == program),
            AttachMode::Clsact => true,
        };
        attached && matches!(offload::leaves_checksums(&near), Ok(false))
    }
}
