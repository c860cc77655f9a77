//! The status for people.

use flannel_core::plan::GateMode;

use super::{super::table, Status};

/// Prints it.
pub(super) fn status(status: &Status) {
    let mut rows: Vec<Vec<String>> = Vec::new();
    let mut row = |name: &str, value: String| rows.push(vec![name.to_owned(), value]);
    let agent = match (&status.agent.version, status.agent.pid) {
        (Some(version), Some(pid)) => format!("running, version {version}, pid {pid}"),
        _ => "not running".into(),
    };
    row("Agent", agent);
    if let Some(path) = &status.datapath {
        let how = path.attach.as_ref().map_or(String::new(), |attach| {
            format!(", {attach}: {}", path.attached.join(" "))
        });
        row(
            "Datapath",
            format!("{}{how} ({})", path.mode.as_str(), path.reason),
        );
        if let Some(xdp) = &path.xdp {
            let attached = if xdp.attached {
                "attached"
            } else {
                "not attached"
            };
            row(
                "Native XDP",
                format!("{attached}, wanted {} ({})", xdp.wanted, xdp.reason),
            );
        }
    }
    if let Some(standing) = &status.standing {
        let (name, rung) = standing.row();
        row(name, rung);
        for (rung, why) in standing.above() {
            row(&format!("Not {rung}"), why.to_owned());
        }
    }
    if let Some(fast) = &status.fast_path {
        row(
            "Fast path",
            format!("{}, wanted {} ({})", fast.mode, fast.wanted, fast.reason),
        );
        for pod in &fast.excluded {
            row(
                "Through the stack",
                format!("{}: {}", pod.interface, pod.reason),
            );
        }
        if fast.mode != GateMode::Off {
            let counters = &fast.counters;
            row(
                "Around the stack",
                format!(
                    "{} pods; {} packets sent, {} received, {} on this node",
                    fast.pods,
                    counters.encap.packets,
                    counters.decap.packets,
                    counters.local.packets
                ),
            );
            row(
                "Gate",
                format!(
                    "{} packets tagged, {} confirmed, {} refuted, {} connections admitted",
                    counters.tagged, counters.confirmed, counters.refuted, counters.admitted
                ),
            );
        }
    }
    if let Some(lease) = &status.lease {
        let subnet = lease.subnet.clone().unwrap_or_else(|| "none".into());
        row(
            "Subnet",
            format!("{subnet} of {}, MTU {}", lease.network, lease.mtu),
        );
        row(
            "Uplink",
            format!("{}, public address {}", lease.uplink, lease.public_ip),
        );
        let link = if lease.store_connected {
            "connected"
        } else {
            "not connected"
        };
        row("Store", format!("{}, {link}", lease.store));
    }
    if let Some(device) = &status.device {
        let up = if device.up { "up" } else { "down" };
        row(
            "Device",
            format!(
                "{} ({}), {up}, {}, MTU {}, {} peers",
                device.name, device.kind, device.mac, device.mtu, device.peers
            ),
        );
    }
    if let Some(counters) = &status.counters {
        row(
            "Sent by eBPF",
            format!(
                "{} packets, {} bytes",
                counters.encap.packets, counters.encap.bytes
            ),
        );
        row(
            "Received by eBPF",
            format!(
                "{} packets, {} bytes",
                counters.decap.packets, counters.decap.bytes
            ),
        );
        if counters.xdp.packets > 0 {
            row(
                "Stripped by XDP",
                format!(
                    "{} packets, {} bytes",
                    counters.xdp.packets, counters.xdp.bytes
                ),
            );
        }
        for reason in &counters.not_carried {
            row(
                "Not carried",
                format!(
                    "{} {}: {} packets",
                    reason.direction, reason.reason, reason.packets
                ),
            );
        }
    }
    for problem in &status.problems {
        row("Problem", problem.clone());
    }
    row(
        "Status",
        if status.ok {
            "OK".into()
        } else {
            "NOT OK".into()
        },
    );
    table::pairs(rows);
}
