//! What this process may do, read from `/proc/self/status` before anything is touched.

use std::fs;

const CAP_NET_ADMIN: u32 = 12;
const CAP_NET_RAW: u32 = 13;
const CAP_SYS_ADMIN: u32 = 21;
const CAP_BPF: u32 = 39;

/// The effective capabilities.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Capabilities(u64);

impl Capabilities {
    /// Reads them. An unreadable `/proc` counts as having all: the kernel will say no by itself.
    pub(crate) fn effective() -> Self {
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        Self(parse(&status).unwrap_or(u64::MAX))
    }

    /// Reads those of another process; `None` when that cannot be.
    pub(crate) fn of(pid: u32) -> Option<Self> {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        parse(&status).map(Self)
    }

    fn has(self, capability: u32) -> bool {
        self.0 & (1 << capability) != 0
    }

    /// Why eBPF is not permitted; `None` if it is.
    pub(crate) fn missing_for_bpf(self) -> Option<&'static str> {
        if self.has(CAP_SYS_ADMIN) {
            return None;
        }
        match (self.has(CAP_BPF), self.has(CAP_NET_ADMIN)) {
            (true, true) => None,
            (false, _) => Some(
                "eBPF is not permitted: CAP_BPF is missing (run privileged, or add the capability)",
            ),
            (true, false) => Some("eBPF is not permitted: CAP_NET_ADMIN is missing"),
        }
    }

    /// Whether the kernel's own objects may be changed.
    pub(crate) fn may_configure(self) -> bool {
        self.has(CAP_NET_ADMIN)
    }

    /// Whether packets of any protocol may be sent.
    pub(crate) fn may_send_raw(self) -> bool {
        self.has(CAP_NET_RAW)
    }

    /// Whether file systems may be mounted.
    pub(crate) fn may_mount(self) -> bool {
        self.has(CAP_SYS_ADMIN)
    }
}

fn parse(status: &str) -> Option<u64> {
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(line.trim(), 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn upstream_capabilities_do_not_permit_bpf() {
        // CAP_NET_ADMIN and CAP_NET_RAW, what flannel's own manifest gives.
        let capabilities =
            Capabilities(parse("Name:\tx\nCapEff:\t0000000000003000\n").expect("parse"));
        assert!(capabilities.may_configure());
        assert!(
            capabilities
                .missing_for_bpf()
                .is_some_and(|reason| reason.contains("CAP_BPF"))
        );
    }

    #[test]
    fn bpf_and_net_admin_do() {
        assert_eq!(
            Capabilities(1 << CAP_BPF | 1 << CAP_NET_ADMIN).missing_for_bpf(),
            None
        );
        assert_eq!(Capabilities(1 << CAP_SYS_ADMIN).missing_for_bpf(), None);
        assert!(Capabilities(1 << CAP_BPF).missing_for_bpf().is_some());
    }
}
