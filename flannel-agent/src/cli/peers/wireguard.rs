//! The peers of a node whose backend has no eBPF: those that the kernel's wireguard devices have; alloc has none.

use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use flannel_core::{config::BackendKind, wireguard::SeenPeer};
use serde::Serialize;

use super::{super::Output, table};
use crate::{dataplane::netlink::Netlink, state::Bare, wireguard};

#[derive(Debug, Serialize)]
struct PeerRow {
    /// What it may send, and what goes to it.
    subnets: Vec<String>,
    public_key: String,
    /// Where packets for it go now.
    endpoint: Option<String>,
    device: String,
    path: &'static str,
    /// Whether it has a session that carries packets now.
    alive: bool,
    /// When the last handshake was, in seconds since 1970; `None` for never.
    last_handshake: Option<u64>,
    received_bytes: u64,
    sent_bytes: u64,
}

/// Prints them. False when nothing can be known.
pub(super) async fn run(state: &Bare, output: Output) -> anyhow::Result<bool> {
    let mut rows = Vec::new();
    let net = Netlink::open()?;
    for name in &state.devices {
        let Some(device) = wireguard::look(&net, name).await? else {
            continue;
        };
        let inner = device.inner;
        let inner = inner.with_context(|| format!("read the peers of {name}"))?;
        let peers = inner.peers.iter();
        rows.extend(peers.map(|(key, peer)| row(name, &key.to_string(), peer)));
    }
    rows.sort_by(|one, other| (&one.subnets, &one.device).cmp(&(&other.subnets, &other.device)));
    match output {
        Output::Json => table::line(&serde_json::to_string_pretty(&rows)?),
        Output::Table if state.backend == BackendKind::Alloc => {
            table::line("backend alloc: no data path here, somebody else routes to other nodes");
        }
        Output::Table => print(&rows),
    }
    Ok(true)
}

fn row(device: &str, key: &str, peer: &SeenPeer) -> PeerRow {
    PeerRow {
        subnets: peer.allowed.iter().map(ToString::to_string).collect(),
        public_key: key.to_owned(),
        endpoint: peer.endpoint.map(|endpoint| endpoint.to_string()),
        device: device.to_owned(),
        path: "wireguard",
        alive: peer.alive,
        last_handshake: Some(peer.handshake).filter(|when| *when != 0),
        received_bytes: peer.received,
        sent_bytes: peer.sent,
    }
}

fn print(rows: &[PeerRow]) {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = now.map_or(0, |now| now.as_secs());
    let ago = |when: u64| format!("{} s ago", now.saturating_sub(when));
    table::rows(
        &[
            "SUBNETS",
            "ENDPOINT",
            "PUBLIC KEY",
            "DEVICE",
            "HANDSHAKE",
            "RECEIVED",
            "SENT",
        ],
        rows.iter().map(|row| {
            vec![
                row.subnets.join(" "),
                row.endpoint.clone().unwrap_or_else(|| "-".into()),
                row.public_key.clone(),
                row.device.clone(),
                row.last_handshake.map_or_else(|| "never".into(), ago),
                row.received_bytes.to_string(),
                row.sent_bytes.to_string(),
            ]
        }),
    );
}
