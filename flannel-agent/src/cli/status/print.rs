//! The status for people.

use flannel_core::{config::BackendKind, plan::GateMode};

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
    if let Some(backend) = status
        .backend
        .filter(|backend| *backend != BackendKind::Vxlan)
    {
        let what = match backend {
            BackendKind::Alloc => ": no data path, somebody else routes",
            BackendKind::HostGw => ": no tunnel, routes to the nodes on the link",
            BackendKind::Wireguard | BackendKind::Vxlan => "",
        };
        row("Backend", format!("{backend}{what}"));
    }
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
                    counters.encap.packets + counters.routed_out.packets,
                    counters.decap.packets + counters.routed_in.packets,
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
    if let Some(routes) = &status.routes {
        row(
            "Routes",
            format!("{} peers over {}", routes.peers, routes.interface),
        );
    }
    if let Some(wireguard) = &status.wireguard {
        let unknown = || "unknown".to_owned();
        let mode = wireguard.mode.clone().unwrap_or_else(unknown);
        let key = wireguard.public_key.clone().unwrap_or_else(unknown);
        row("WireGuard", format!("mode {mode}, public key {key}"));
        for device in &wireguard.devices {
            let up = if device.up { "up" } else { "down" };
            let told = (device.port, device.peers, device.peers_alive);
            let more = if let (Some(port), Some(peers), Some(alive)) = told {
                format!(", port {port}, {peers} peers, {alive} with a session")
            } else {
                String::new()
            };
            let (name, mtu) = (&device.name, device.mtu);
            row(
                "Device",
                format!("{name} (wireguard), {up}, MTU {mtu}{more}"),
            );
        }
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
