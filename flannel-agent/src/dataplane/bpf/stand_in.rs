//! The program that encapsulates on the pair that stands in while the tunnel device changes its kind: a second place for it, with a pin
//! of its own.

use std::path::PathBuf;

use flannel_core::{
    addr::IfIndex,
    mark,
    plan::{Attachment, Hook},
};

use super::{
    AttachMode, Bpf, BpfError, Instance,
    attach::{name_of, remove_pin, side},
    join, link,
};

impl Instance {
    fn stand_in_link(&self) -> PathBuf {
        join(self.dir(), mark::PIN_STAND_IN)
    }
}

impl Bpf {
    /// Attaches the program that encapsulates to the pair, in place of what an earlier run may have left there.
    pub fn attach_stand_in(&mut self, ifindex: IfIndex) -> Result<(), BpfError> {
        let hook = Hook::ToOverlay;
        let interface = name_of(ifindex)?;
        match self.attach {
            AttachMode::Clsact => self.attach_clsact(hook, side(hook), ifindex, &interface)?,
            AttachMode::Tcx => {
                let pin = self.instance.stand_in_link();
                self.make_tcx(hook, side(hook), &interface, &pin)?;
            }
        }
        self.attach_far_end(&interface)
    }

    /// What of ours is attached to the pair. `filter` is the program that our clsact filter runs there, which only netlink knows.
    pub fn stand_in_attachment(
        &mut self,
        ifindex: IfIndex,
        filter: Option<u32>,
    ) -> Option<Attachment> {
        let program = match self.attach {
            AttachMode::Tcx => {
                let link = link::pinned(&self.instance.stand_in_link())?;
                (link.ifindex == Some(ifindex)).then_some(link.program)?
            }
            AttachMode::Clsact => filter?,
        };
        let own = self.program_id(Hook::ToOverlay).unwrap_or(0);
        Some(Attachment {
            ifindex,
            current: program == own && self.is_at_far_end(ifindex, own),
        })
    }

    /// Forgets the link, whose device is gone.
    pub fn forget_stand_in(&self) -> Result<(), BpfError> {
        remove_pin(&self.instance.stand_in_link())?;
        self.instance.forget_stand_in_far_end()
    }
}
