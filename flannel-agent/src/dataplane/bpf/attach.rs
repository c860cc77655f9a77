//! Attaching: tcx links, pinned, where the kernel has them (6.6); a clsact filter with our priority and handle elsewhere.
//!
//! A program is replaced, never detached and attached again: by `BPF_LINK_UPDATE` on the pinned link, or by netlink's replace.

use std::{ffi::CString, fs, io, path::Path};

use aya::programs::{
    LinkOrder, SchedClassifier, TcAttachType,
    links::{FdLink, Link as _, PinnedLink},
    tc::{self, NlOptions, SchedClassifierLink, TcAttachOptions, TcHandle},
};
use flannel_core::{
    addr::IfIndex,
    mark::{self, Overlay},
    plan::{Attachment, Hook},
};

use super::{
    Bpf, BpfError,
    error::errno,
    link,
    pins::{ensure_bpffs, pin_error},
    program,
};

/// How programs are attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttachMode {
    /// tcx links (6.6 and later).
    Tcx,
    /// Filters on a clsact qdisc.
    Clsact,
}

impl AttachMode {
    /// For logs and `status`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Tcx => "tcx",
            Self::Clsact => "clsact",
        }
    }

    /// What this kernel has.
    pub fn detect() -> Self {
        // A kernel without tcx refuses the very question.
        if SchedClassifier::query_tcx("lo", TcAttachType::Ingress).is_ok() {
            Self::Tcx
        } else {
            Self::Clsact
        }
    }
}

impl Bpf {
    /// Attaches a program, or replaces the one of an earlier run. What an earlier run attached the other way goes once the new
    /// one is in place; until then both run the same rules, and the first to take a packet keeps it.
    ///
    /// `filter` is the program that our clsact filter runs there, which only netlink knows.
    pub fn attach(
        &mut self,
        hook: Hook,
        ifindex: IfIndex,
        filter: Option<u32>,
    ) -> Result<(), BpfError> {
        let interface = name_of(ifindex)?;
        self.pin_maps()?;
        match self.attach {
            AttachMode::Tcx => {
                self.attach_tcx(hook, ifindex, &interface)?;
                if filter.is_some() {
                    delete_filter(hook, ifindex, self.instance.overlay())?;
                }
            }
            AttachMode::Clsact => {
                self.attach_clsact(hook, side(hook), ifindex, &interface)?;
                remove_pin(&self.instance.link(hook, ifindex))?;
                if hook.is_per_pod() {
                    self.instance.note_filter(hook, ifindex)?;
                }
            }
        }
        if hook == Hook::ToOverlay {
            self.attach_far_end(&interface)?;
        }
        self.instance.remove_old_maps();
        Ok(())
    }

    /// Detaches what of ours is at a hook of an interface, which may be gone by now. The qdisc stays: a pod's veth takes it along, and
    /// to take it away under traffic costs packets (`qdisc_graft`).
    ///
    /// `filter` is the program that our clsact filter runs there, which only netlink knows.
    pub fn detach(
        &mut self,
        hook: Hook,
        ifindex: IfIndex,
        filter: Option<u32>,
    ) -> Result<(), BpfError> {
        if filter.is_some() {
            delete_filter(hook, ifindex, self.instance.overlay())?;
        }
        remove_pin(&self.instance.link(hook, ifindex))?;
        if hook == Hook::ToOverlay {
            self.instance.forget_far_ends()?;
        }
        if hook.is_per_pod() && name_of(ifindex).is_err() {
            self.instance.forget_qdisc(ifindex)?;
        }
        Ok(())
    }

    /// What of ours is attached at a hook of an interface.
    ///
    /// `filter` is the program that our clsact filter runs there, which only netlink knows.
    pub(super) fn attachment(
        &mut self,
        hook: Hook,
        ifindex: IfIndex,
        filter: Option<u32>,
    ) -> Option<Attachment> {
        if name_of(ifindex).is_err() {
            return None;
        }
        // One that this kernel would not load is nowhere.
        let own = self.program_id(hook).unwrap_or(0);
        let current = match self.attach {
            AttachMode::Tcx => {
                // Without its pin a link would end with this process.
                let link = link::pinned(&self.instance.link(hook, ifindex))?;
                match link.ifindex {
                    Some(at) if at == ifindex => link.program == own,
                    // A link that holds nothing, and a pin that would stay when the gate is shut.
                    _ if hook == Hook::FromOverlay => false,
                    _ => return None,
                }
            }
            AttachMode::Clsact => match filter {
                Some(id) => id == own,
                None => return None,
            },
        };
        // Without the pins of its maps nobody could adopt them: neither `status` nor the next agent.
        let current = current && self.maps_are_pinned();
        let current = current && (hook != Hook::ToOverlay || self.is_at_far_end(ifindex, own));
        Some(Attachment { ifindex, current })
    }

    pub(super) fn maps_are_pinned(&self) -> bool {
        self.pins.iter().all(|(path, _)| path.exists())
    }

    /// Pins the maps that are not pinned.
    fn pin_maps(&self) -> Result<(), BpfError> {
        // Somebody may have unmounted it, and all pins with it.
        ensure_bpffs()?;
        for (path, map) in self.pins.iter().filter(|(path, _)| !path.exists()) {
            if let Some(dir) = path.parent() {
                fs::create_dir_all(dir).map_err(|error| pin_error("create", dir, error))?;
            }
            map.pin(path)
                .map_err(|error| pin_error("pin", path, io::Error::other(error)))?;
        }
        Ok(())
    }

    pub(super) fn program_id(&mut self, hook: Hook) -> Result<u32, BpfError> {
        let info = program(&mut self.ebpf, hook.as_str())?
            .info()
            .map_err(|source| BpfError::program("look up", hook.as_str(), source))?;
        Ok(info.id())
    }

    fn attach_tcx(
        &mut self,
        hook: Hook,
        ifindex: IfIndex,
        interface: &str,
    ) -> Result<(), BpfError> {
        let pin = self.instance.link(hook, ifindex);
        let own = self.program_id(hook)?;
        if let Ok(old) = PinnedLink::from_pin(&pin) {
            let link: Result<SchedClassifierLink, _> = FdLink::from(old).try_into();
            if let Ok(link) = link {
                let replaced = program(&mut self.ebpf, hook.as_str())?.attach_to_link(link);
                match replaced {
                    Ok(id) if attached_to(interface, hook, own) => {
                        // The pin keeps the link; our handle of it may go.
                        drop(program(&mut self.ebpf, hook.as_str())?.take_link(id));
                        return Ok(());
                    }
                    // It lives on another interface: the uplink changed. Below it is replaced by a new one.
                    Ok(id) => drop(program(&mut self.ebpf, hook.as_str())?.take_link(id)),
                    // Detached by hand or with its interface: a dead link takes no program.
                    Err(source) if errno(&source) == Some(libc::ENOLINK) => {}
                    Err(source) => return Err(BpfError::program("replace", hook.as_str(), source)),
                }
            }
        }
        self.make_tcx(hook, side(hook), interface, &pin)
    }

    /// Attaches a program by a new link, which takes the place of what is pinned there.
    pub(super) fn make_tcx(
        &mut self,
        hook: Hook,
        side: TcAttachType,
        interface: &str,
        pin: &Path,
    ) -> Result<(), BpfError> {
        let program = program(&mut self.ebpf, hook.as_str())?;
        let id = program
            .attach_with_options(interface, side, TcAttachOptions::TcxOrder(order(hook)))
            .map_err(|source| BpfError::program("attach", hook.as_str(), source))?;
        let link = program
            .take_link(id)
            .map_err(|source| BpfError::program("attach", hook.as_str(), source))?;
        let link: FdLink = link.try_into().map_err(|_not_fd| BpfError::Tc {
            what: format!("pin {} on {interface}", hook.as_str()),
            reason: "the kernel made no link".into(),
        })?;
        // The new link is attached: only now may the old one go.
        remove_pin(pin)?;
        link.pin(pin)
            .map_err(|error| pin_error("pin", pin, io::Error::other(error)))?;
        Ok(())
    }

    /// Gives a tunnel device what filters hang on while it carries nothing: the kernel takes the transmit queues of a device out of use
    /// as it adds a qdisc (`qdisc_graft`), and loses what is sent meanwhile.
    pub fn prepare(&self, ifindex: IfIndex) {
        if self.attach != AttachMode::Clsact {
            return;
        }
        let added = name_of(ifindex).map(|interface| tc::qdisc_add_clsact(&interface));
        // Whatever it is, attaching meets it again and says so.
        if let Ok(Err(error)) = added {
            tracing::debug!(ifindex = ifindex.get(), %error, "add a clsact qdisc");
        }
    }

    pub(super) fn attach_clsact(
        &mut self,
        hook: Hook,
        side: TcAttachType,
        ifindex: IfIndex,
        interface: &str,
    ) -> Result<(), BpfError> {
        let tc_error = |what: &str, reason: String| BpfError::Tc {
            what: format!("{what} on {interface}"),
            reason,
        };
        match tc::qdisc_add_clsact(interface) {
            // The tunnel device takes its qdisc along.
            Ok(()) if hook == Hook::FromWire || hook.is_per_pod() => {
                self.instance.note_qdisc(ifindex)?;
            }
            Ok(()) => {}
            // EEXIST: somebody's clsact is as good as ours.
            Err(error)
                if errno(&error) == Some(libc::EEXIST)
                    || error.to_string().contains("File exists") => {}
            Err(error) => return Err(tc_error("add a clsact qdisc", error.to_string())),
        }
        let handle = TcHandle::from(mark::TC_HANDLE);
        let priority = self.instance.overlay().tc_priority();
        let program = program(&mut self.ebpf, hook.as_str())?;
        let there = SchedClassifierLink::attached(interface, side, priority, handle, None)
            .map_err(|error| tc_error("find the filter", error.to_string()))?;
        let id = match program.attach_to_link(there) {
            Ok(id) => id,
            Err(_absent) => program
                .attach_with_options(
                    interface,
                    side,
                    TcAttachOptions::Netlink(NlOptions {
                        priority,
                        handle,
                        classid: None,
                    }),
                )
                .map_err(|source| BpfError::program("attach", hook.as_str(), source))?,
        };
        let link = program
            .take_link(id)
            .map_err(|source| BpfError::program("attach", hook.as_str(), source))?;
        // Dropping it would delete the filter, which is meant to outlive the agent.
        std::mem::forget(link);
        Ok(())
    }
}

/// Where a program goes among those of others. What looks at packets before the stack must see all of them: one that somebody before it
/// has taken would go unnoticed.
const fn order(hook: Hook) -> LinkOrder {
    match hook {
        Hook::FromPod | Hook::FromOverlay => LinkOrder::first(),
        Hook::ToOverlay | Hook::FromWire | Hook::ToPod | Hook::ToLink => LinkOrder::last(),
    }
}

/// Removes a pinned link and at once what it holds attached, or the note of a filter.
pub(super) fn remove_pin(pin: &Path) -> Result<(), BpfError> {
    let removed = if pin.is_dir() {
        fs::remove_dir(pin)
    } else {
        link::detach(pin);
        fs::remove_file(pin)
    };
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(pin_error("remove", pin, error))
        }
        _ => Ok(()),
    }
}

/// Deletes an overlay's filter at this hook, and nothing else; not the qdisc either, which may serve others.
pub fn delete_filter(hook: Hook, ifindex: IfIndex, overlay: Overlay) -> Result<(), BpfError> {
    let interface = name_of(ifindex)?;
    let failed = |reason: String| BpfError::Tc {
        what: format!("delete our filter on {interface}"),
        reason,
    };
    SchedClassifierLink::attached(
        &interface,
        side(hook),
        overlay.tc_priority(),
        TcHandle::from(mark::TC_HANDLE),
        None,
    )
    .map_err(|error| failed(error.to_string()))?
    .detach()
    .map_err(|error| failed(error.to_string()))
}

/// Which side of the interface a hook is on.
pub(super) const fn side(hook: Hook) -> TcAttachType {
    if hook.is_ingress() {
        TcAttachType::Ingress
    } else {
        TcAttachType::Egress
    }
}

/// Whether the link pinned there holds its program at this interface.
pub(super) fn is_attached(pin: &Path, ifindex: IfIndex) -> bool {
    link::pinned(pin).is_some_and(|link| link.ifindex == Some(ifindex))
}

fn attached_to(interface: &str, hook: Hook, id: u32) -> bool {
    SchedClassifier::query_tcx(interface, side(hook))
        .is_ok_and(|(_, programs)| programs.iter().any(|program| program.id() == id))
}

/// The name of an interface, if there is one of that index.
pub fn interface_name(ifindex: IfIndex) -> Option<String> {
    name_of(ifindex).ok()
}

pub(super) fn name_of(ifindex: IfIndex) -> Result<String, BpfError> {
    let name: Result<CString, _> = nix::net::if_::if_indextoname(ifindex.get());
    name.map(|name| name.to_string_lossy().into_owned())
        .map_err(|errno| BpfError::Tc {
            what: format!("find interface {}", ifindex.get()),
            reason: errno.to_string(),
        })
}
