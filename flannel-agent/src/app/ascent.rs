//! While the node carries packets in a lesser way than the flags allow: finding out when a better one has become possible.
//!
//! Nobody notifies of a module that is installed, of a file system that is mounted, of memory that is free again. So it is tried from
//! time to time, less and less often, and at once when something changes that may be the cause. To go up is to end the session: the next
//! one finds the better way by itself.

use std::{
    path::Path,
    time::{Duration, SystemTime},
};

use flannel_core::plan::ObservedKind;
use tokio::time::{Instant, MissedTickBehavior, interval};

use super::session::{Node, Setting};
use crate::{
    cli::{DatapathChoice, DeviceChoice},
    datapath::{self, Rung},
    dataplane::bpf,
    device::Up,
    kernel_modules,
    state::Mode,
};

/// How long after the first look below what is wished for it is tried again; each time twice as long.
const FIRST: Duration = Duration::from_secs(10);
/// The longest time between two attempts.
const LONGEST: Duration = Duration::from_mins(5);
/// How often the signs are looked at: a handful of file attributes.
const SIGNS: Duration = Duration::from_secs(2);
/// A way that has held for so long is believed to hold.
const PROVEN: Duration = Duration::from_mins(10);

/// What is remembered from one session to the next.
#[derive(Debug)]
pub(super) struct Ascent {
    /// How long to wait before the next attempt.
    pause: Duration,
    /// Why eBPF was given up while it ran; the next session does without.
    pub(super) fallen: Option<String>,
}

/// What the present session does without.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Lack {
    bpf: bool,
    vxlan: bool,
}

/// What may change when a better way becomes possible.
#[derive(Debug, PartialEq)]
struct Signs {
    modules: [bool; 3],
    installed: Option<SystemTime>,
    bpffs: bool,
}

impl Signs {
    fn read(installed: &Path) -> Self {
        Self {
            modules: ["vxlan", "sch_ingress", "cls_bpf"]
                .map(|name| Path::new("/sys/module").join(name).exists()),
            installed: installed.metadata().and_then(|meta| meta.modified()).ok(),
            bpffs: bpf::mounted(),
        }
    }
}

impl Lack {
    /// What a node that was brought up like this could have and does not.
    pub(super) fn of(node: &Node<'_>, up: &Up) -> Self {
        let args = node.args;
        Self {
            bpf: up.path.mode == Mode::Kernel && args.datapath == DatapathChoice::Auto,
            vxlan: up.path.device == "veth" && args.bpf_device == DeviceChoice::Auto,
        }
    }

    const fn is_nothing(self) -> bool {
        !self.bpf && !self.vxlan
    }
}

impl Default for Ascent {
    fn default() -> Self {
        Self {
            pause: FIRST,
            fallen: None,
        }
    }
}

impl Ascent {
    /// Takes a session's end into account. One that lacked nothing for long needs no patience at its next trouble.
    pub(super) fn note_end(&mut self, lack: Lack, begun: Instant) {
        if lack.is_nothing() && begun.elapsed() >= PROVEN {
            self.pause = FIRST;
        }
    }

    /// Until a better way than the present one is possible; for ever if there is none.
    pub(super) async fn better(&mut self, node: &Node<'_>, setting: &Setting, lack: Lack) {
        if lack.is_nothing() {
            std::future::pending::<()>().await;
        }
        let installed = format!("/lib/modules/{}/modules.dep", kernel_modules::release());
        let installed = Path::new(&installed);
        let mut signs = Signs::read(installed);
        let mut due = Instant::now() + self.pause;
        let mut tick = interval(SIGNS);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            let now = Signs::read(installed);
            if now != signs {
                tracing::debug!(?now, "something has changed: trying a better way");
                self.pause = FIRST;
            } else if Instant::now() < due {
                continue;
            }
            signs = now;
            let possible = is_possible(node, setting, lack).await;
            // Also if it is: whether it holds is another question.
            self.pause = (self.pause * 2).min(LONGEST);
            due = Instant::now() + self.pause;
            if let Some(what) = possible {
                tracing::info!("{what}: setting the node up anew");
                self.fallen = None;
                return;
            }
        }
    }
}

/// What has become possible of what is missing.
async fn is_possible(node: &Node<'_>, setting: &Setting, lack: Lack) -> Option<&'static str> {
    if lack.vxlan && makes_vxlan(node, setting).await {
        return Some("the kernel makes vxlan devices now");
    }
    if lack.bpf && loads_bpf(node, setting).await {
        return Some("eBPF can be used now");
    }
    None
}

async fn makes_vxlan(node: &Node<'_>, setting: &Setting) -> bool {
    let Ok(tunnel) = node.tunnel(setting) else {
        return false;
    };
    let there = node.net.device(&tunnel.name).await.ok().flatten();
    let is_veth = there.is_some_and(|device| matches!(device.kind, ObservedKind::Veth { .. }));
    is_veth && matches!(node.site(setting).try_elsewhere(&tunnel).await, Ok(None))
}

async fn loads_bpf(node: &Node<'_>, setting: &Setting) -> bool {
    let Ok(ethernet) = node.net.is_ethernet(setting.uplink.index).await else {
        return false;
    };
    let (args, conf) = (node.args.clone(), setting.conf.clone());
    // The verifier takes its time.
    let tried =
        tokio::task::spawn_blocking(move || match datapath::choose(&args, &conf, ethernet) {
            Ok(Rung::Bpf(bpf)) => {
                bpf.discard();
                true
            }
            Ok(Rung::Kernel(reason)) => {
                tracing::debug!(reason, "eBPF cannot be used yet");
                false
            }
            Err(_) => false,
        });
    tried.await.unwrap_or(false)
}
