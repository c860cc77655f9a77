//! While the node carries packets in a lesser way than the flags allow: finding out when a better one has become possible.
//!
//! Nobody notifies of a module that is installed, of a file system that is mounted, of memory that is free again. So it is tried from
//! time to time, less and less often, and at once when something changes that may be the cause. To go up is to end the session: the next
//! one finds the better way by itself.

use std::{
    collections::BTreeSet,
    path::Path,
    time::{Duration, SystemTime},
};

use flannel_core::{addr::Family, config::NetConf, plan::ObservedKind};
use tokio::time::{Instant, MissedTickBehavior, interval};

use super::session::{Node, Setting};
use crate::{
    cli::{Args, DatapathChoice, DeviceChoice},
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
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Lack {
    /// The families that the kernel carries alone.
    bpf: BTreeSet<Family>,
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
    pub(super) fn of(node: &Node<'_>, ups: &[Up]) -> Self {
        let args = node.args;
        let kernel =
            |up: &&Up| up.path.mode == Mode::Kernel && args.datapath == DatapathChoice::Auto;
        let families = ups.iter().filter(kernel);
        Self {
            bpf: families.map(|up| up.dataplane.family()).collect(),
            vxlan: ups.iter().any(|up| up.path.device == "veth")
                && args.bpf_device == DeviceChoice::Auto,
        }
    }

    fn is_nothing(&self) -> bool {
        self.bpf.is_empty() && !self.vxlan
    }

    /// The first family that would gain. One that has eBPF is not tried: that its programs can be loaded once more says nothing about
    /// those that cannot.
    fn gaining(&self, mut loads: impl FnMut(Family) -> bool) -> Option<Family> {
        self.bpf.iter().copied().find(|family| loads(*family))
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
    pub(super) fn note_end(&mut self, lack: &Lack, begun: Instant) {
        if lack.is_nothing() && begun.elapsed() >= PROVEN {
            self.pause = FIRST;
        }
    }

    /// Until a better way than the present one is possible; for ever if there is none.
    pub(super) async fn better(&mut self, node: &Node<'_>, setting: &Setting, lack: &Lack) {
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
async fn is_possible(node: &Node<'_>, setting: &Setting, lack: &Lack) -> Option<&'static str> {
    if lack.vxlan && makes_vxlan(node, setting).await {
        return Some("the kernel makes vxlan devices now");
    }
    if loads_bpf(node, setting, lack).await {
        return Some("eBPF can be used now");
    }
    None
}

async fn makes_vxlan(node: &Node<'_>, setting: &Setting) -> bool {
    let Ok(checked) = setting.check(&node.origin) else {
        return false;
    };
    for checked in &checked {
        let Some(tunnel) = node.tunnel_of(setting, checked) else {
            continue;
        };
        let family = Family::of_net(&tunnel.network);
        let there = node.net.device(&tunnel.name, family).await.ok().flatten();
        let is_veth = there.is_some_and(|device| matches!(device.kind, ObservedKind::Veth { .. }));
        let site = node.site(setting, checked);
        if is_veth && matches!(site.try_elsewhere(&tunnel).await, Ok(None)) {
            return true;
        }
    }
    false
}

async fn loads_bpf(node: &Node<'_>, setting: &Setting, lack: &Lack) -> bool {
    if lack.bpf.is_empty() {
        return false;
    }
    let Ok(ethernet) = node.net.is_ethernet(setting.uplink.index).await else {
        return false;
    };
    let (args, conf, lack) = (node.args.clone(), setting.conf.clone(), lack.clone());
    // The verifier takes its time.
    let tried = tokio::task::spawn_blocking(move || {
        let gaining = lack.gaining(|family| loads(&args, &conf, family, ethernet));
        gaining.is_some()
    });
    tried.await.unwrap_or(false)
}

/// Tries it, and leaves nothing of that.
fn loads(args: &Args, conf: &NetConf, family: Family, ethernet: bool) -> bool {
    match datapath::choose(args, conf, family, ethernet) {
        Ok(Rung::Bpf(bpf)) => {
            bpf.discard();
            true
        }
        Ok(Rung::Kernel(reason)) => {
            tracing::debug!(%family, reason, "eBPF cannot be used yet");
            false
        }
        Err(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lack(bpf: &[Family]) -> Lack {
        Lack {
            bpf: bpf.iter().copied().collect(),
            vxlan: false,
        }
    }

    #[test]
    fn only_a_family_without_ebpf_is_tried() {
        let both = Family::ALL;
        for (without, loadable, gaining) in [
            (&both[..], &both[..], Some(Family::V4)),
            (&both, &[Family::V6], Some(Family::V6)),
            (&both, &[], None),
            (&[Family::V6], &[Family::V4], None),
            (&[Family::V6], &both, Some(Family::V6)),
            (&[Family::V4], &[Family::V6], None),
            (&[], &both, None),
        ] {
            let mut tried = Vec::new();
            let found = lack(without).gaining(|family| {
                tried.push(family);
                loadable.contains(&family)
            });
            assert_eq!(found, gaining, "without {without:?}, loadable {loadable:?}");
            assert!(tried.iter().all(|family| without.contains(family)));
        }
    }

    #[test]
    fn nothing_is_lacking_where_both_families_have_all() {
        assert!(lack(&[]).is_nothing());
        assert!(!lack(&[Family::V6]).is_nothing());
        let vxlan = true;
        assert!(!Lack { vxlan, ..lack(&[]) }.is_nothing());
    }
}
