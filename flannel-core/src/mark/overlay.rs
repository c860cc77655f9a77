//! The overlays of a network: what each is called, and what is its.

use super::{
    BPFFS_ROOT, KIND_VETH, KIND_VXLAN, MarkError, TC_PRIORITY, TC_PRIORITY_V6, check_name,
    device_name, device_v6_name, instance_dir, parse_instance_dir, peer_device_name,
};
use crate::addr::{Family, Vni};

/// An overlay: a network has one for each address family, which share nothing but their network
/// identifier and the place for native XDP at the uplink.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Overlay {
    /// The family of what it carries, and of what carries it.
    pub family: Family,
    /// Its network identifier.
    pub vni: Vni,
}

impl Overlay {
    /// The overlay of IPv4.
    pub const fn v4(vni: Vni) -> Self {
        let family = Family::V4;
        Self { family, vni }
    }

    /// The overlay of IPv6.
    pub const fn v6(vni: Vni) -> Self {
        let family = Family::V6;
        Self { family, vni }
    }

    /// Name of its tunnel device. See [`check_name`] for its length.
    pub fn device(self) -> String {
        match self.family {
            Family::V4 => device_name(self.vni),
            Family::V6 => device_v6_name(self.vni),
        }
    }

    /// Name of the far end of the pair that is its tunnel device where the kernel has no vxlan module.
    pub fn far_end(self) -> Result<String, MarkError> {
        match self.family {
            Family::V4 => peer_device_name(self.vni),
            Family::V6 => {
                let name = format!("flannelp6.{}", self.vni);
                check_name(&name)?;
                Ok(name)
            }
        }
    }

    /// Name of its directory below [`BPFFS_ROOT`], see [`instance_dir`].
    pub fn dir(self, cookie: u64) -> String {
        match self.family {
            Family::V4 => instance_dir(cookie, self.vni),
            Family::V6 => format!("{cookie}-{}-v6", self.vni),
        }
    }

    /// Full path of its directory.
    pub fn path(self, cookie: u64) -> String {
        format!("{BPFFS_ROOT}/{}", self.dir(cookie))
    }

    /// Reads a name made by [`Overlay::dir`] back. `None` for anything it would not have written.
    pub fn parse_dir(name: &str) -> Option<(u64, Self)> {
        let Some(rest) = name.strip_suffix("-v6") else {
            let (cookie, vni) = parse_instance_dir(name)?;
            return Some((cookie, Self::v4(vni)));
        };
        let (cookie, vni) = parse_instance_dir(rest)?;
        Some((cookie, Self::v6(vni)))
    }

    /// That of the other family in the same network.
    #[must_use]
    pub const fn sibling(self) -> Self {
        match self.family {
            Family::V4 => Self::v6(self.vni),
            Family::V6 => Self::v4(self.vni),
        }
    }

    /// Priority of its filters on a clsact qdisc.
    pub const fn tc_priority(self) -> u16 {
        match self.family {
            Family::V4 => TC_PRIORITY,
            Family::V6 => TC_PRIORITY_V6,
        }
    }

    /// Tells whether a link is its tunnel device, of whatever kind, or the far end of that.
    pub fn is_our_device(self, name: &str, kind: &str, vni: Option<u32>) -> bool {
        let is_device = name == self.device();
        match kind {
            KIND_VXLAN => is_device && vni == Some(self.vni.get()),
            KIND_VETH => is_device || self.far_end().is_ok_and(|far| far == name),
            _ => false,
        }
    }
}

/// Name of the far end of the pair that is this tunnel device where the kernel has no vxlan module. `None` for any other device, and
/// where the kernel would not take a name that long.
pub fn far_end(device: &str) -> Option<String> {
    let vni = device.rsplit_once('.')?.1.parse::<u32>().ok()?;
    let vni = Vni::try_from(vni).ok()?;
    let overlays = [Overlay::v4(vni), Overlay::v6(vni)];
    let overlay = overlays
        .into_iter()
        .find(|overlay| overlay.device() == device)?;
    overlay.far_end().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vni(value: u32) -> Vni {
        Vni::try_from(value).unwrap()
    }

    #[test]
    fn each_family_has_names_of_its_own() {
        let (v4, v6) = (Overlay::v4(vni(1)), Overlay::v6(vni(1)));
        assert_eq!(
            (v4.device(), v6.device()),
            ("flannel.1".into(), "flannel-v6.1".into())
        );
        assert_eq!(v4.far_end().unwrap(), "flannelp.1");
        assert_eq!(v6.far_end().unwrap(), "flannelp6.1");
        assert_ne!(v4.tc_priority(), v6.tc_priority());
        assert_eq!((v4.sibling(), v6.sibling()), (v6, v4));
        for overlay in [v4, v6] {
            let name = overlay.dir(7);
            assert!(!name.contains('.'), "{name}: bpffs takes no dot");
            assert_eq!(Overlay::parse_dir(&name), Some((7, overlay)));
            assert_eq!(far_end(&overlay.device()), overlay.far_end().ok());
        }
        for other in ["7", "7-1-v5", "7-1-v6-v6", "7-01-v6", "x-1-v6"] {
            assert_eq!(Overlay::parse_dir(other), None, "{other}");
        }
        for other in [
            "flannel.01",
            "flannel-v6",
            "vxlan.1",
            "flannel-wg",
            "flannel.1.1",
        ] {
            assert_eq!(far_end(other), None, "{other}");
        }
        assert_eq!(Overlay::v6(vni(9_999)).far_end().unwrap().len(), 14);
    }

    #[test]
    fn a_device_is_of_one_overlay() {
        let (v4, v6) = (Overlay::v4(vni(3)), Overlay::v6(vni(3)));
        for (overlay, other) in [(v4, v6), (v6, v4)] {
            let device = overlay.device();
            let far = overlay.far_end().unwrap();
            assert!(overlay.is_our_device(&device, KIND_VXLAN, Some(3)));
            assert!(overlay.is_our_device(&device, KIND_VETH, None));
            assert!(overlay.is_our_device(&far, KIND_VETH, None));
            assert!(!overlay.is_our_device(&device, KIND_VXLAN, Some(4)));
            assert!(!overlay.is_our_device(&far, KIND_VXLAN, Some(3)));
            assert!(!overlay.is_our_device(&device, "bridge", None));
            assert!(!other.is_our_device(&device, KIND_VXLAN, Some(3)));
            assert!(!other.is_our_device(&far, KIND_VETH, None));
        }
    }
}
