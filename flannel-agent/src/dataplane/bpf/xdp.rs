//! Native XDP on the uplink, as a link of its own, pinned beside the others. In the driver or not at all: generic XDP would switch GRO off
//! for the whole interface.

use std::{
    io,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    thread,
    time::Duration,
};

use aya::programs::Xdp;
use flannel_core::{addr::IfIndex, plan::Attachment, xdp::Sample};

use super::{
    Bpf, BpfError,
    attach::{name_of, remove_pin},
    link,
    pins::pin_error,
    wait_for_programs,
};

/// The programs, best first: the first also takes frames of several buffers, and no kernel before 5.18 takes it.
pub(super) const PROGRAMS: [&str; 2] = ["xdp_decap_frags", "xdp_decap"];

/// How often an interface that is taken is asked again, and how long to wait in between.
const ATTEMPTS: u32 = 10;
const BETWEEN: Duration = Duration::from_millis(20);

/// Attaches a program. A link whose pin was removed leaves the interface some time after that (the kernel puts it off): only an interface
/// that stays taken is somebody else's.
fn attach_patiently(program: BorrowedFd<'_>, ifindex: IfIndex) -> io::Result<OwnedFd> {
    for _attempt in 1..ATTEMPTS {
        match link::attach_xdp(program, ifindex) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => thread::sleep(BETWEEN),
            outcome => return outcome,
        }
    }
    link::attach_xdp(program, ifindex)
}

impl Bpf {
    /// Attaches native XDP, or replaces an earlier run's program in place.
    pub fn attach_xdp(&mut self, ifindex: IfIndex) -> Result<(), BpfError> {
        let interface = name_of(ifindex)?;
        let refused = |source| BpfError::Xdp {
            interface: interface.clone(),
            source,
        };
        let pin = self.instance.xdp_link();
        let own = self.xdp_program()?;
        let program = own
            .fd()
            .map_err(|source| BpfError::program("look up", PROGRAMS[0], source))?;
        if link::pinned(&pin).is_some_and(|there| there.ifindex == Some(ifindex)) {
            let there = link::open(&pin).map_err(refused)?;
            return link::replace(&there, program.as_fd()).map_err(refused);
        }
        // What is pinned holds nothing any more, or another interface: an interface has one native XDP program.
        remove_pin(&pin)?;
        let link = attach_patiently(program.as_fd(), ifindex).map_err(refused)?;
        link::pin(&link, &pin).map_err(|source| pin_error("pin", &pin, source))
    }

    /// Detaches native XDP, and waits until no frame that it has stripped is on its way to `from_wire`.
    pub fn detach_xdp(&mut self) -> Result<(), BpfError> {
        let pin = self.instance.xdp_link();
        remove_pin(&pin)?;
        wait_for_programs();
        Ok(())
    }

    /// What is attached, or was: a link that holds nothing any more is one at the uplink that is not current.
    pub(super) fn xdp_attachment(&mut self, uplink: IfIndex) -> Option<Attachment> {
        let link = link::pinned(&self.instance.xdp_link())?;
        // Loaded only when it is wanted.
        let own = self
            .xdp
            .and_then(|name| self.xdp_named(name).ok()?.info().ok());
        Some(Attachment {
            ifindex: link.ifindex.unwrap_or(uplink),
            current: link.ifindex.is_some() && own.is_some_and(|own| own.id() == link.program),
        })
    }

    /// What shows whether it runs.
    pub fn xdp_sample(&self) -> Result<Sample, BpfError> {
        self.instance.xdp_sample()
    }

    /// The program, loaded.
    fn xdp_program(&mut self) -> Result<&mut Xdp, BpfError> {
        let name = match self.xdp {
            Some(name) => name,
            None => self.load_xdp()?,
        };
        self.xdp_named(name)
    }

    fn load_xdp(&mut self) -> Result<&'static str, BpfError> {
        let mut refused = BpfError::Missing(PROGRAMS[0].into());
        for name in PROGRAMS {
            match self.xdp_named(name)?.load() {
                Ok(()) => {
                    self.xdp = Some(name);
                    return Ok(name);
                }
                Err(source) => refused = BpfError::program("load", name, source),
            }
        }
        Err(refused.kept_in(self.logs.as_deref()))
    }

    fn xdp_named(&mut self, name: &str) -> Result<&mut Xdp, BpfError> {
        self.ebpf
            .program_mut(name)
            .ok_or_else(|| BpfError::Missing(name.to_owned()))?
            .try_into()
            .map_err(|source| BpfError::program("find", name, source))
    }
}
