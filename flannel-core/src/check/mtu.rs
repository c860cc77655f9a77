//! Whether uplink, tunnel and pods agree on how large packets may be.

use super::{Finding, Observations, few};
use crate::config;

pub(super) fn judge(seen: &Observations) -> Finding {
    const NAME: &str = "mtu";
    let overlay = &seen.overlay;
    let (Some(conf), Some(uplink)) = (seen.store.conf(), seen.network.uplink()) else {
        return Finding::skip(NAME, "uplink or network configuration is unknown");
    };
    let wanted = match config::tunnel_mtu(&conf, uplink.mtu) {
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
    if let Some(file) = &overlay.subnet_file
        && let Some(mtu) = file.mtu.filter(|mtu| *mtu != wanted)
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
    let narrow: Vec<String> = overlay
        .paths
        .iter()
        .filter(|(_, mtu)| **mtu < wanted.saturating_add(config::OVERHEAD_V4))
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
