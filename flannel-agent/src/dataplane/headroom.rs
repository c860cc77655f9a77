//! Keeping the device that makes room in front of what pods send.

use flannel_core::{
    headroom::{self, Change, Wanted},
    plan::{Desired, DeviceKind},
};

use super::Dataplane;
use crate::telemetry::chain;

impl Dataplane {
    /// Makes or removes the device. It is worth a little speed and nothing else, so a failure is said once and left at that.
    pub async fn tend_headroom(&mut self, desired: &Desired) {
        let kind = desired.tunnel.as_ref().map(|tunnel| &tunnel.kind);
        let Some(DeviceKind::Vxlan { vni, port, .. }) = kind else {
            return;
        };
        if self.headroom_refused {
            return;
        }
        let open = desired
            .bpf
            .as_ref()
            .is_some_and(|settings| !settings.gate.is_off());
        let bridge = self.pod_sources().and_then(|sources| sources.bridge);
        let mut wanted = bridge.filter(|_| open).map(|bridge| Wanted {
            bridge: bridge.index,
            mtu: bridge.mtu,
        });
        if open && bridge.is_none() {
            // Not read yet, or no bridge yet.
            return;
        }
        if let Some(bridge) = wanted.map(|wanted| wanted.bridge) {
            match self.net.is_big_tcp(bridge).await {
                Ok(false) => {}
                Ok(true) => wanted = None,
                Err(error) => {
                    tracing::debug!(error = chain(&error), "look at the bridge");
                    return;
                }
            }
        }
        let there = match self.net.headroom(*vni).await {
            Ok(there) => there,
            Err(error) => {
                tracing::debug!(error = chain(&error), "look for the headroom device");
                return;
            }
        };
        let done = match headroom::change(wanted, there) {
            None => return,
            Some(Change::Create(wanted)) => {
                let made = self.net.create_headroom(*vni, *port, wanted).await;
                made.map(|()| "made the headroom device: pods' packets get room for outer headers")
            }
            Some(Change::Remove(index)) => {
                let removed = self.net.delete_device(index).await;
                removed.map(|()| "removed the headroom device")
            }
        };
        match done {
            Ok(what) => tracing::info!("{what}"),
            Err(error) => {
                self.headroom_refused = true;
                tracing::info!(
                    error = chain(&error),
                    "no headroom device: datagrams of pods cost a copy more"
                );
            }
        }
    }
}
