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
    /// Attaches native XDP, or replaces an earlier run's program in place. Where the program for IPv4 has the interface, that for IPv6 is
    /// put behind it.
    pub fn attach_xdp(&mut self, ifindex: IfIndex) -> Result<(), BpfError> {
        let interface = name_of(ifindex)?;
        let refused = |source| BpfError::Xdp {
            interface: interface.clone(),
            source,
        };
        let pin = self.instance.xdp_link();
        let instance = self.instance.clone();
        let (variant, own) = self.xdp_program()?;
        let program = own
            .fd()
            .map_err(|source| BpfError::program("look up", PROGRAMS[0], source))?;
        if link::pinned(&pin).is_some_and(|there| there.ifindex == Some(ifindex)) {
            let there = link::open(&pin).map_err(refused)?;
            return link::replace(&there, program.as_fd()).map_err(refused);
        }
        // What is pinned holds nothing any more, or another interface: an interface has one native XDP program.
        remove_pin(&pin)?;
        if let Some(before) = instance.before_xdp().filter(|at| at.has_xdp_hook(ifindex)) {
            let put = before.put_behind(variant, program.as_fd());
            return put
                .map_err(|source| pin_error("put a program behind that of", before.dir(), source));
        }
        let took = instance.take_xdp(ifindex, variant, program.as_fd());
        if took.map_err(refused)? {
            return Ok(());
        }
        let link = attach_patiently(program.as_fd(), ifindex).map_err(refused)?;
        link::pin(&link, &pin).map_err(|source| pin_error("pin", &pin, source))
    }

    /// Detaches native XDP, and waits until no frame that it has stripped is on its way to `from_wire`.
    pub fn detach_xdp(&mut self) -> Result<(), BpfError> {
        if !self.instance.leave_xdp() {
            remove_pin(&self.instance.xdp_link())?;
        }
        if let Some(before) = self.instance.before_xdp() {
            before.clear_behind();
        }
        wait_for_programs();
        Ok(())
    }

    /// What is attached, or was: a link that holds nothing any more is one at the uplink that is not current.
    pub(super) fn xdp_attachment(&mut self, uplink: IfIndex) -> Option<Attachment> {
        // Loaded only when it is wanted.
        let own = self
            .xdp
            .and_then(|variant| self.xdp_named(PROGRAMS.get(variant)?).ok()?.info().ok());
        let is_own = |program: u32| own.as_ref().is_some_and(|own| own.id() == program);
        if let Some(link) = link::pinned(&self.instance.xdp_link()) {
            return Some(Attachment {
                ifindex: link.ifindex.unwrap_or(uplink),
                current: link.ifindex.is_some() && is_own(link.program),
            });
        }
        // Behind one that is attached nowhere it is nowhere either.
        let before = self.instance.before_xdp()?;
        let ifindex = link::pinned(&before.xdp_link())?.ifindex?;
        let current = is_own(before.behind()?);
        Some(Attachment { ifindex, current })
    }

    /// What shows whether it runs.
    pub fn xdp_sample(&self) -> Result<Sample, BpfError> {
        self.instance.xdp_sample()
    }

    /// The program, loaded, with its index in [`PROGRAMS`].
    fn xdp_program(&mut self) -> Result<(usize, &mut Xdp), BpfError> {
        let variant = match self.xdp {
            Some(variant) => variant,
            None => self.load_xdp()?,
        };
        let name = PROGRAMS.get(variant).copied().unwrap_or_default();
        Ok((variant, self.xdp_named(name)?))
    }

    fn load_xdp(&mut self) -> Result<usize, BpfError> {
        let mut refused = BpfError::Missing(PROGRAMS[0].into());
        for (variant, name) in PROGRAMS.into_iter().enumerate() {
            match self.xdp_named(name)?.load() {
                Ok(()) => {
                    self.xdp = Some(variant);
                    return Ok(variant);
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
