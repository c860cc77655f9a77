//! The MTU of the pods: what is left of the underlay's after the outer headers.

use super::{BackendKind, ConfigError, NetConf};
use crate::addr::Mtu;

/// Bytes VXLAN adds to an inner IP packet over IPv4: inner Ethernet 14, VXLAN 8, UDP 8, IPv4 20.
pub const OVERHEAD_V4: u32 = 50;

/// Bytes VXLAN adds to an inner IP packet over IPv6, whose header has 40 bytes.
pub const OVERHEAD_V6: u32 = 70;

/// Bytes `WireGuard` adds to an inner IP packet over IPv6, which upstream takes for IPv4 as well: IPv6 40, UDP 8, type and receiver 8,
/// counter 8, authentication tag 16.
pub const OVERHEAD_WIREGUARD: u32 = 80;

/// The least MTU of a link that carries IPv6 (RFC 8200).
const IPV6_MIN: u32 = 1280;

/// The largest underlay MTU that can be configured for a tunnel with that overhead.
pub(super) const fn max_explicit(overhead: u32) -> u32 {
    Mtu::MAX + overhead
}

pub(super) fn vxlan_overhead(ipv6: bool) -> u32 {
    if ipv6 { OVERHEAD_V6 } else { OVERHEAD_V4 }
}

/// Checks an MTU from the configuration, which counts for every node.
pub(super) fn check_explicit(mtu: Option<u32>, overhead: u32) -> Result<(), ConfigError> {
    let least = IPV6_MIN + overhead;
    match mtu {
        Some(mtu) if mtu < least => Err(ConfigError::Invalid {
            key: "Backend.MTU",
            value: mtu.to_string(),
            fix: format!(
                "it is the MTU of the underlay and must be at least {least}, or 0 for the one of the uplink"
            ),
        }),
        _ => Ok(()),
    }
}

/// The MTU that the configuration names, where the backend has such a key.
fn explicit(conf: &NetConf) -> Option<u32> {
    match conf.backend.kind {
        BackendKind::Vxlan => conf.backend.vxlan.mtu,
        BackendKind::Wireguard => conf.backend.wireguard.mtu,
        BackendKind::HostGw | BackendKind::Alloc => None,
    }
}

/// Computes the MTU of the tunnel device and of the pods, for an uplink of `link_mtu` bytes.
///
/// For vxlan without `MTU` in the configuration that is the link's less [`OVERHEAD_V4`], or less [`OVERHEAD_V6`] when IPv6 is
/// enabled. A configured `MTU` is reduced by [`OVERHEAD_V4`] in both cases, as upstream does, after being limited to
/// the link's: the kernel limits the device in the same way, and the pods have to follow it. wireguard takes [`OVERHEAD_WIREGUARD`]
/// off either of them; host-gw and alloc add nothing to a packet.
pub fn tunnel_mtu(conf: &NetConf, link_mtu: u32) -> Result<Mtu, ConfigError> {
    let ipv6 = conf.enable_ipv6;
    let explicit = explicit(conf);
    let outer = explicit.map_or(link_mtu, |mtu| mtu.min(link_mtu));
    let overhead = match conf.backend.kind {
        BackendKind::Vxlan if explicit.is_some() => OVERHEAD_V4,
        BackendKind::Vxlan => vxlan_overhead(ipv6),
        BackendKind::Wireguard => OVERHEAD_WIREGUARD,
        BackendKind::HostGw | BackendKind::Alloc => 0,
    };
    let least = if ipv6 { IPV6_MIN } else { Mtu::MIN };
    outer
        .checked_sub(overhead)
        .filter(|mtu| *mtu >= least)
        .and_then(|mtu| Mtu::try_from(mtu.min(Mtu::MAX)).ok())
        .ok_or(ConfigError::LinkMtu {
            link_mtu,
            least: least + overhead,
        })
}

/// Says what is questionable about a configured MTU on a node with an uplink of `link_mtu` bytes, one line each.
pub fn mtu_warnings(conf: &NetConf, link_mtu: u32) -> Vec<String> {
    let Some(mtu) = explicit(conf) else {
        return Vec::new();
    };
    let mut warnings = Vec::new();
    if mtu > link_mtu {
        warnings.push(format!(
            "Backend.MTU is {mtu}, but the uplink has MTU {link_mtu}: using {link_mtu} here; \
             raise the uplink's or lower Backend.MTU"
        ));
    }
    let inner = mtu.min(link_mtu).saturating_sub(OVERHEAD_V4);
    let vxlan = conf.backend.kind == BackendKind::Vxlan;
    if vxlan && conf.enable_ipv6 && inner + OVERHEAD_V6 > link_mtu {
        warnings.push(format!(
            "Backend.MTU is {mtu}, which makes the tunnel's {inner}: IPv6 packets of that size do not fit the uplink's \
             MTU of {link_mtu}; set Backend.MTU to at most {}",
            link_mtu.saturating_sub(OVERHEAD_V6 - OVERHEAD_V4)
        ));
    }
    warnings
}
