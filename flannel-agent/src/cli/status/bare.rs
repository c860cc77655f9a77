//! The status of a node whose backend has no eBPF: wireguard, whose devices the kernel keeps, and alloc, which has none.

use std::collections::BTreeSet;

use flannel_core::config::BackendKind;

use super::{Agent, LeaseInfo, NOT_RUNNING, Path, Status, WireguardDevice, WireguardInfo};
use crate::{
    dataplane::netlink::Netlink,
    state::{Bare, Mode},
    wireguard,
};

/// Reads it from the kernel; `state` is what the agent has left.
pub(super) async fn collect(state: &Bare) -> anyhow::Result<Status> {
    let running = state.is_running();
    let mut problems = state.problems.clone();
    if !running {
        problems.push(NOT_RUNNING.into());
    }
    let encrypted = state.backend == BackendKind::Wireguard;
    let mut info = WireguardInfo {
        mode: state.mode.clone(),
        public_key: state.public_key.clone(),
        devices: Vec::new(),
    };
    if encrypted {
        info.devices = devices(state, &mut problems).await?;
    }
    let complete =
        info.devices.len() == state.devices.len() && info.devices.iter().all(|device| device.up);
    Ok(Status {
        ok: complete && !state.subnets.is_empty(),
        agent: Agent {
            running,
            pid: running.then_some(state.pid),
            version: Some(state.version.clone()),
        },
        backend: Some(state.backend),
        datapath: encrypted.then(|| Path {
            mode: Mode::Kernel,
            reason: "backend wireguard: the kernel's own devices encrypt and carry everything"
                .into(),
            attach: None,
            attached: Vec::new(),
            xdp: None,
        }),
        standing: None,
        features: Vec::new(),
        lease: Some(LeaseInfo {
            subnet: Some(list(&state.subnets)).filter(|text| !text.is_empty()),
            network: list(&state.networks),
            public_ip: list(&state.public_ips),
            uplink: state.uplink.clone(),
            mtu: state.mtu,
            store: state.store.clone(),
            store_connected: running && state.store_connected,
        }),
        device: None,
        routes: None,
        wireguard: encrypted.then_some(info),
        counters: None,
        fast_path: None,
        problems,
        ipv6: None,
    })
}

fn list<T: ToString>(all: &[T]) -> String {
    let all: Vec<String> = all.iter().map(ToString::to_string).collect();
    all.join(", ")
}

async fn devices(state: &Bare, problems: &mut Vec<String>) -> anyhow::Result<Vec<WireguardDevice>> {
    let net = Netlink::open()?;
    let mut found = Vec::new();
    let mut led = BTreeSet::new();
    for name in &state.devices {
        let Some(device) = wireguard::look(&net, name).await? else {
            problems.push(format!("there is no wireguard device {name}"));
            continue;
        };
        if !device.up {
            problems.push(format!("{name} is down"));
        }
        let inner = match &device.inner {
            Ok(inner) => Some(inner),
            Err(error) => {
                problems.push(format!("read the peers of {name}: {error}"));
                None
            }
        };
        led.extend(device.routes);
        found.push(WireguardDevice {
            name: name.clone(),
            mtu: device.mtu,
            up: device.up,
            port: inner.map(|inner| inner.port),
            peers: inner.map(|inner| inner.peers.len()),
            peers_alive: inner.map(|inner| inner.peers.values().filter(|peer| peer.alive).count()),
        });
    }
    for network in state.networks.iter().filter(|net| !led.contains(*net)) {
        problems.push(format!("no route leads {network} to a wireguard device"));
    }
    Ok(found)
}
