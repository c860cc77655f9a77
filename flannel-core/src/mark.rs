//! Every name and number by which we recognise what is ours in the kernel, and the recognisers.
//!
//! The two mistakes are not equal. Leaking an object of ours is bounded: it costs a little memory, an operator can
//! see it, and the next start or `cleanup` takes it away. Destroying an object of somebody else is not: it may be
//! the only way into the machine. So a recogniser answers yes only when everything it can see agrees, and whoever
//! deletes asks a recogniser first.

use thiserror::Error;

use crate::addr::{IfIndex, Vni};

mod overlay;

pub use overlay::{Overlay, far_end};

/// Directory in the BPF file system that holds our pins: one directory per instance, see [`instance_dir`].
pub const BPFFS_ROOT: &str = "/sys/fs/bpf/flannel";

/// Name of the pinned link of the program on the egress of the tunnel device.
pub const PIN_TO_OVERLAY: &str = "to_overlay";

/// Name of the pinned link of the same program on the device that stands in, see [`stand_in`].
pub const PIN_STAND_IN: &str = "stand_in";

/// Name of the pinned link of the same program on the far end of the pair that is the tunnel device of IPv6 without a vxlan module.
pub const PIN_FAR_END: &str = "far_end";

/// Name of the pinned link of the same program on the far end of the pair that stands in.
pub const PIN_STAND_IN_FAR_END: &str = "stand_in_far_end";

/// Name of the pinned link of the program on the ingress of the uplink.
pub const PIN_FROM_WIRE: &str = "from_wire";

/// Name of the pinned link of the program on the ingress of the tunnel device.
pub const PIN_FROM_OVERLAY: &str = "from_overlay";

/// Name of the pinned link of the program on the egress of the uplink.
pub const PIN_TO_LINK: &str = "to_link";

/// Name of the pinned links of the program on the ingress of pod veths, before the interface's index, see [`pod_pin`].
pub const PIN_FROM_POD: &str = "from_pod";

/// Name of the pinned links of the program on the egress of pod veths, before the interface's index, see [`pod_pin`].
pub const PIN_TO_POD: &str = "to_pod";

/// Name of the pinned link of the program at the uplink's native XDP hook.
pub const PIN_XDP_DECAP: &str = "xdp_decap";

/// Names of the pinned maps of IPv4's overlay with what its program of native XDP goes on with for packets of IPv6, beside the links: for
/// programs that take frames of several buffers, and for others. What they are is no matter of the layout of other maps.
pub const PINS_XDP_NEXT: [&str; 2] = ["xdp_next_frags", "xdp_next"];

/// Priority of our filters for IPv4 where tcx is missing and programs hang on a clsact qdisc.
pub const TC_PRIORITY: u16 = 0xF1A0;

/// Priority of our filters for IPv6, behind those for IPv4: each leaves what is not of its family to the next.
pub const TC_PRIORITY_V6: u16 = 0xF1A1;

/// Handle of our filters on a clsact qdisc.
pub const TC_HANDLE: u32 = 1;

/// Kind of a filter that runs a BPF program.
pub const TC_KIND: &str = "bpf";

/// `rtm_protocol` of our routes on devices that are not ours. On our own device routes have upstream's shape.
pub const ROUTE_PROTOCOL: u8 = 0xF1;

/// nftables table of the rules for IPv4, as upstream names it.
pub const NFT_TABLE_V4: &str = "flannel-ipv4";

/// nftables table of the rules for IPv6, as upstream names it.
pub const NFT_TABLE_V6: &str = "flannel-ipv6";

/// iptables chain of the masquerade rules in table nat, as upstream names it.
pub const CHAIN_MASQ: &str = "FLANNEL-POSTRTG";

/// iptables chain of the accepting rules in table filter, as upstream names it.
pub const CHAIN_FORWARD: &str = "FLANNEL-FWD";

/// Comment of upstream's masquerade rules in iptables (since 0.16.2).
pub const COMMENT_MASQ: &str = "flanneld masq";

/// Comment of upstream's accepting rules in iptables (since 0.16.2).
pub const COMMENT_FORWARD: &str = "flanneld forward";

/// Longest name the kernel gives a network interface, in bytes (`IFNAMSIZ` less the terminating zero).
pub const MAX_DEVICE_NAME: usize = 15;

/// Link kind of the kernel's own tunnel device.
pub const KIND_VXLAN: &str = "vxlan";

/// Link kind of the pair that stands in for the tunnel device where the kernel has no vxlan module.
pub const KIND_VETH: &str = "veth";

/// Link kind of the device of the encrypted overlay.
pub const KIND_WIREGUARD: &str = "wireguard";

/// Name of the encrypted overlay's device, as upstream names it: for IPv4, or for both families in the modes with one device.
pub const WIREGUARD_DEVICE: &str = "flannel-wg";

/// Name of the encrypted overlay's device for IPv6 in mode `separate`, as upstream names it.
pub const WIREGUARD_DEVICE_V6: &str = "flannel-wg-v6";

/// What a name of this module was refused for.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum MarkError {
    /// The kernel would refuse the device.
    #[error(
        "device name {name:?} has {length} characters, the kernel allows {MAX_DEVICE_NAME}: choose a smaller VNI"
    )]
    NameTooLong {
        /// The name.
        name: String,
        /// Its length in bytes.
        length: usize,
    },
}

/// Name of the tunnel device for IPv4, and the only one on an IPv4 node. See [`check_name`] for its length.
pub fn device_name(vni: Vni) -> String {
    format!("flannel.{vni}")
}

/// Name of the port of the pods' bridge that makes room in front of packets, see [`crate::headroom`]. Too long for the kernel where
/// the identifier has more than four digits: such a node does without.
pub fn headroom_name(vni: Vni) -> String {
    format!("flannel-hr.{vni}")
}

/// Identifier of that device: never the network's own, because the kernel takes no two devices with the same.
pub const fn headroom_vni(vni: Vni) -> u32 {
    vni.get() ^ 0x0080_0000
}

/// Tells whether a link is that device.
pub fn is_our_headroom(name: &str, kind: &str, vni: Option<u32>, wanted: Vni) -> bool {
    name == headroom_name(wanted) && kind == KIND_VXLAN && vni == Some(headroom_vni(wanted))
}

/// Name of the tunnel device for IPv6. See [`check_name`] for its length.
pub fn device_v6_name(vni: Vni) -> String {
    format!("flannel-v6.{vni}")
}

/// Name of the far end of the pair that stands in for the tunnel device where the kernel has no vxlan module. One
/// character longer than [`device_name`], so it can be too long where that is not.
pub fn peer_device_name(vni: Vni) -> Result<String, MarkError> {
    let name = format!("flannelp.{vni}");
    check_name(&name)?;
    Ok(name)
}

/// Names of both ends of the pair that stands in for a tunnel device while that changes its kind, from the device's name: the one with
/// the routes, and the far end. They begin as that name does, so that who leaves `flannel*` alone leaves them alone. `None` for any
/// other device, and where the kernel would not take names that long.
pub fn stand_in(device: &str) -> Option<(String, String)> {
    let names = match (
        device.strip_prefix("flannel."),
        device.strip_prefix("flannel-v6."),
    ) {
        (Some(vni), _) => (format!("flannelt.{vni}"), format!("flannelu.{vni}")),
        (None, Some(vni)) => (format!("flannelt6.{vni}"), format!("flannelu6.{vni}")),
        (None, None) => return None,
    };
    check_name(&names.0).ok()?;
    Some(names)
}

/// Tells whether a link is an end of the pair that stands in for the tunnel device of `wanted`.
pub fn is_our_stand_in(name: &str, kind: &str, wanted: Vni) -> bool {
    kind == KIND_VETH
        && stand_in(&device_name(wanted)).is_some_and(|(near, far)| name == near || name == far)
}

/// Checks that the kernel takes a device of that name.
pub fn check_name(name: &str) -> Result<(), MarkError> {
    if name.len() <= MAX_DEVICE_NAME {
        Ok(())
    } else {
        Err(MarkError::NameTooLong {
            name: name.to_owned(),
            length: name.len(),
        })
    }
}

/// Tells whether a link is the kernel tunnel device (IPv4) of `wanted`, made by us or by upstream flannel.
///
/// `kind` and `vni` are what the kernel reports. A device of the right name with another identifier is not ours.
pub fn is_our_tunnel(name: &str, kind: &str, vni: Option<u32>, wanted: Vni) -> bool {
    name == device_name(wanted) && kind == KIND_VXLAN && vni == Some(wanted.get())
}

/// Tells whether a link is the kernel tunnel device (IPv6) of `wanted`, made by us or by upstream flannel.
pub fn is_our_tunnel_v6(name: &str, kind: &str, vni: Option<u32>, wanted: Vni) -> bool {
    name == device_v6_name(wanted) && kind == KIND_VXLAN && vni == Some(wanted.get())
}

/// Tells whether a link is one end of the pair that stands in for the tunnel device of `wanted`.
pub fn is_our_veth(name: &str, kind: &str, wanted: Vni) -> bool {
    let peer = peer_device_name(wanted);
    kind == KIND_VETH && (name == device_name(wanted) || peer.is_ok_and(|peer| peer == name))
}

/// Tells whether a link is a device of `wanted` of any shape: tunnel of either family, or stand-in.
pub fn is_our_device(name: &str, kind: &str, vni: Option<u32>, wanted: Vni) -> bool {
    is_our_tunnel(name, kind, vni, wanted)
        || is_our_tunnel_v6(name, kind, vni, wanted)
        || is_our_veth(name, kind, wanted)
}

/// Tells whether a link is a device of the encrypted overlay, made by us or by upstream flannel.
pub fn is_our_wireguard(name: &str, kind: &str) -> bool {
    kind == KIND_WIREGUARD && [WIREGUARD_DEVICE, WIREGUARD_DEVICE_V6].contains(&name)
}

/// Tells whether a filter on a clsact qdisc is one of ours.
pub fn is_our_filter(kind: &str, priority: u16, handle: u32) -> bool {
    kind == TC_KIND && [TC_PRIORITY, TC_PRIORITY_V6].contains(&priority) && handle == TC_HANDLE
}

/// Tells whether a route on a device that is not ours is one of ours.
pub fn is_our_route(protocol: u8) -> bool {
    protocol == ROUTE_PROTOCOL
}

/// Tells whether an entry of an instance directory is a link pin of ours.
pub fn is_our_link_pin(name: &str) -> bool {
    [
        PIN_TO_OVERLAY,
        PIN_STAND_IN,
        PIN_FAR_END,
        PIN_STAND_IN_FAR_END,
        PIN_FROM_WIRE,
        PIN_FROM_OVERLAY,
        PIN_TO_LINK,
        PIN_XDP_DECAP,
    ]
    .contains(&name)
        || parse_pod_pin(name).is_some()
}

/// Name of the pin of a pod hook's link on one interface. The BPF file system takes no name with a dot.
pub fn pod_pin(hook: &str, index: IfIndex) -> String {
    format!("{hook}-{}", index.get())
}

/// Reads a name made by [`pod_pin`] back: the hook's name and the interface. `None` for anything else.
pub fn parse_pod_pin(name: &str) -> Option<(&str, IfIndex)> {
    let (hook, index) = name.split_once('-')?;
    let index = IfIndex::try_from(index.parse::<u32>().ok()?).ok()?;
    let ours = [PIN_FROM_POD, PIN_TO_POD].contains(&hook) && pod_pin(hook, index) == name;
    ours.then_some((hook, index))
}

/// Name of an instance's directory below [`BPFFS_ROOT`].
///
/// The BPF file system is shared by network namespaces, so the name says which one the instance is in (`cookie`:
/// the kernel's `SO_NETNS_COOKIE`), and which network it serves. The BPF file system takes no name with a dot.
pub fn instance_dir(cookie: u64, vni: Vni) -> String {
    format!("{cookie}-{vni}")
}

/// Full path of an instance's directory.
pub fn instance_path(cookie: u64, vni: Vni) -> String {
    format!("{BPFFS_ROOT}/{}", instance_dir(cookie, vni))
}

/// Name of what a process pins in the root of the BPF file system to find out whether it may, and removes at once.
pub fn trial_pin(process: u32) -> String {
    format!("flannel-try-{process}")
}

/// Reads a name made by [`instance_dir`] back. `None` for anything it would not have written.
pub fn parse_instance_dir(name: &str) -> Option<(u64, Vni)> {
    let (cookie, vni) = name.split_once('-')?;
    let cookie = cookie.parse().ok()?;
    let vni = Vni::try_from(vni.parse::<u32>().ok()?).ok()?;
    (instance_dir(cookie, vni) == name).then_some((cookie, vni))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn vni(value: u32) -> Vni {
        Vni::try_from(value).unwrap()
    }

    #[test]
    fn names_and_their_length() {
        assert_eq!(device_name(vni(1)), "flannel.1");
        assert_eq!(device_v6_name(vni(1)), "flannel-v6.1");
        assert_eq!(peer_device_name(vni(1)).unwrap(), "flannelp.1");
        for (name, fits) in [
            (device_name(vni(9_999_999)), true),
            (device_name(vni(10_000_000)), false),
            (device_v6_name(vni(9_999)), true),
            (device_v6_name(vni(10_000)), false),
        ] {
            assert_eq!(check_name(&name).is_ok(), fits, "{name}");
        }
        assert!(peer_device_name(vni(999_999)).is_ok());
        assert_eq!(
            peer_device_name(vni(1_000_000)).unwrap_err().to_string(),
            "device name \"flannelp.1000000\" has 16 characters, the kernel allows 15: choose a smaller VNI"
        );
    }

    #[test]
    fn tunnel_needs_name_kind_and_vni() {
        let cases = [
            ("flannel.1", "vxlan", Some(1), true),
            ("flannel.1", "vxlan", Some(2), false),
            ("flannel.1", "vxlan", None, false),
            ("flannel.1", "dummy", Some(1), false),
            ("flannel.1", "", None, false),
            ("flannel.10", "vxlan", Some(1), false),
            ("flannel.01", "vxlan", Some(1), false),
            ("Flannel.1", "vxlan", Some(1), false),
            ("vxlan.calico", "vxlan", Some(1), false),
            ("cni0", "bridge", None, false),
        ];
        for (name, kind, found, ours) in cases {
            assert_eq!(
                is_our_tunnel(name, kind, found, vni(1)),
                ours,
                "{name} {kind} {found:?}"
            );
            assert_eq!(
                is_our_device(name, kind, found, vni(1)),
                ours,
                "{name} {kind} {found:?}"
            );
        }
        assert!(is_our_tunnel_v6("flannel-v6.1", "vxlan", Some(1), vni(1)));
        assert!(!is_our_tunnel_v6("flannel.1", "vxlan", Some(1), vni(1)));
        assert!(is_our_device("flannel-v6.1", "vxlan", Some(1), vni(1)));
    }

    #[test]
    fn stand_in_is_a_veth_of_one_of_two_names() {
        for (name, kind, ours) in [
            ("flannel.7", "veth", true),
            ("flannelp.7", "veth", true),
            ("flannelp.7", "vxlan", false),
            ("flannel.8", "veth", false),
            ("veth7", "veth", false),
        ] {
            assert_eq!(is_our_veth(name, kind, vni(7)), ours, "{name}");
            assert_eq!(is_our_device(name, kind, None, vni(7)), ours, "{name}");
        }
        assert!(is_our_veth("flannel.1000000", "veth", vni(1_000_000)));
    }

    #[test]
    fn what_stands_in_is_a_veth_of_one_of_two_names() {
        for (name, kind, ours) in [
            ("flannelt.7", "veth", true),
            ("flannelu.7", "veth", true),
            ("flannelt.7", "vxlan", false),
            ("flannelt.8", "veth", false),
            ("flannel.7", "veth", false),
        ] {
            assert_eq!(is_our_stand_in(name, kind, vni(7)), ours, "{name} {kind}");
            assert!(!is_our_veth(name, kind, vni(7)) || name == "flannel.7");
        }
        assert!(stand_in(&device_name(vni(999_999))).is_some());
        assert_eq!(stand_in(&device_name(vni(1_000_000))), None);
        assert_eq!(stand_in("cni0"), None);
        assert!(is_our_link_pin("stand_in"));
    }

    #[test]
    fn headroom_device_needs_name_kind_and_its_own_vni() {
        assert_eq!(headroom_name(vni(1)), "flannel-hr.1");
        for (name, kind, found, ours) in [
            ("flannel-hr.1", "vxlan", Some(0x80_0001), true),
            ("flannel-hr.1", "vxlan", Some(1), false),
            ("flannel-hr.1", "veth", None, false),
            ("flannel.1", "vxlan", Some(0x80_0001), false),
        ] {
            assert_eq!(
                is_our_headroom(name, kind, found, vni(1)),
                ours,
                "{name} {kind}"
            );
        }
        assert_eq!(headroom_vni(vni(0x80_0001)), 1);
    }

    #[test]
    fn filters_routes_and_pins() {
        assert!(is_our_filter("bpf", 0xF1A0, 1));
        assert!(!is_our_filter("bpf", 0xF1A0, 2));
        assert!(!is_our_filter("bpf", 1, 1));
        assert!(!is_our_filter("u32", 0xF1A0, 1));
        assert!(is_our_route(241));
        assert!(!is_our_route(3));
        assert!(is_our_link_pin("to_overlay") && is_our_link_pin("from_wire"));
        assert!(is_our_link_pin("to_link") && !is_our_link_pin("to_link-2"));
        assert!(is_our_link_pin("xdp_decap") && !is_our_link_pin("xdp_decap-2"));
        assert!(!is_our_link_pin("cil_from_netdev"));
        // Maps, not links.
        assert!(PINS_XDP_NEXT.iter().all(|name| !is_our_link_pin(name)));
        let veth = IfIndex::try_from(23).unwrap();
        assert_eq!(pod_pin("to_pod", veth), "to_pod-23");
        assert_eq!(parse_pod_pin("from_pod-23"), Some(("from_pod", veth)));
        assert!(is_our_link_pin("from_overlay") && is_our_link_pin("from_pod-23"));
        for name in [
            "from_pod",
            "from_pod-",
            "from_pod-0",
            "to_pod-07",
            "to_pod-+7",
            "from_wire-2",
        ] {
            assert!(
                parse_pod_pin(name).is_none() && !is_our_link_pin(name),
                "{name}"
            );
        }
    }

    #[test]
    fn instance_directories() {
        assert_eq!(instance_dir(1, vni(1)), "1-1");
        assert_eq!(instance_path(42, vni(7)), "/sys/fs/bpf/flannel/42-7");
        for name in [
            "",
            "1",
            "-1",
            "01-1",
            "+1-1",
            "1-1 ",
            "1-1/..",
            "1-16777216",
            "18446744073709551616-1",
            "x-1-1",
        ] {
            assert_eq!(parse_instance_dir(name), None, "{name:?}");
        }
    }

    proptest! {
        #[test]
        fn instance_directories_round_trip(cookie: u64, number in 0u32..=0x00ff_ffff) {
            let vni = vni(number);
            prop_assert_eq!(parse_instance_dir(&instance_dir(cookie, vni)), Some((cookie, vni)));
        }

        #[test]
        fn parsing_never_panics(name in ".*") {
            let _result = parse_instance_dir(&name);
        }
    }
}
