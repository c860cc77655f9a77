//! Whether uplink, tunnel and pods agree on how large packets may be.

use super::{Finding, Observations, few};
use crate::{
    addr::{Family, Mtu},
    config::{self, BackendKind, ConfigError, NetConf},
};

/// Bytes of outer headers.
pub(super) fn overhead(seen: &Observations) -> u32 {
    match (seen.backend(), seen.overlay.family) {
        (BackendKind::Vxlan, Family::V4) => config::OVERHEAD_V4,
        (BackendKind::Vxlan, Family::V6) => config::OVERHEAD_V6,
        (BackendKind::Wireguard, _) => config::OVERHEAD_WIREGUARD,
        (BackendKind::HostGw | BackendKind::Alloc, _) => 0,
    }
}

/// The MTU of the tunnel, on an uplink of this one.
pub(super) fn wanted(seen: &Observations, conf: &NetConf, uplink: u32) -> Result<Mtu, ConfigError> {
    let mtu = config::tunnel_mtu(conf, uplink)?;
    // What was written down is for IPv4: the kernel gives the device of IPv6 no more than what fits.
    let most = Mtu::try_from(uplink.saturating_sub(overhead(seen)));
    Ok(most.map_or(mtu, |most| mtu.min(most)))
}

pub(super) fn judge(seen: &Observations) -> Finding {
    const NAME: &str = "mtu";
    let overlay = &seen.overlay;
    let (Some(conf), Some(uplink)) = (seen.store.conf(), seen.network.uplink()) else {
        return Finding::skip(NAME, "uplink or network configuration is unknown");
    };
    let wanted = match wanted(seen, &conf, uplink.mtu) {
        Ok(mtu) => mtu.get(),
        Err(error) => {
            return Finding::fail(
                NAME,
                error.to_string(),
                "correct Backend.MTU in the network configuration",
            );
        }
    };
    let mut wrong = Vec::new();
    if let Some(device) = overlay
        .device
        .as_ref()
        .filter(|device| device.mtu != wanted)
    {
        wrong.push(format!("{} has {}", overlay.name, device.mtu));
    }
    for device in overlay.encrypted.iter().filter(|device| device.up.is_ok()) {
        if device.mtu != wanted {
            wrong.push(format!("{} has {}", device.name, device.mtu));
        }
    }
    // It is that of both families, of which one may have less.
    let least = overlay.family == Family::V4 && conf.enable_ipv6;
    if let Some(file) = &overlay.subnet_file
        && let Some(mtu) = file
            .mtu
            .filter(|mtu| *mtu != wanted && !(least && *mtu < wanted))
    {
        wrong.push(format!("FLANNEL_MTU in {} is {mtu}", file.path));
    }
    if !wrong.is_empty() {
        return Finding::fail(
            NAME,
            format!(
                "on uplink {} with MTU {} the tunnel's is {wanted}, but {}",
                uplink.name,
                uplink.mtu,
                wrong.join(", ")
            ),
            "restart the agent, which sets both; then restart the pods, which keep what they were made with",
        );
    }
    let large: Vec<String> = overlay
        .bridge
        .iter()
        .flat_map(|bridge| bridge.ports.iter().chain([(&bridge.name, &bridge.mtu)]))
        .filter(|(_, mtu)| **mtu > wanted)
        .map(|(name, mtu)| format!("{name} {mtu}"))
        .collect();
    if !large.is_empty() {
        return Finding::warn(
            NAME,
            format!("the tunnel's is {wanted}, larger are {}", few(&large)),
            "restart the pods behind them: they keep what they were made with",
        );
    }
    let overhead = overhead(seen);
    let narrow: Vec<String> = overlay
        .paths
        .iter()
        .filter(|(_, mtu)| **mtu < wanted.saturating_add(overhead))
        .map(|(peer, mtu)| format!("{peer} {mtu}"))
        .collect();
    if !narrow.is_empty() {
        let least = overlay.paths.values().min().copied().unwrap_or(0);
        return Finding::warn(
            NAME,
            format!(
                "the kernel knows narrower paths than uplink {} with MTU {}: {}",
                uplink.name,
                uplink.mtu,
                few(&narrow)
            ),
            format!(
                "mend the path, or set \"Backend\":{{\"MTU\":{least}}} in the network configuration"
            ),
        );
    }
    Finding::ok(
        NAME,
        format!(
            "uplink {} {}, tunnel and pods {wanted}",
            uplink.name, uplink.mtu
        ),
    )
}
