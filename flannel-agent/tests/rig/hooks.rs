//! Which programs run at the two hooks of a node, and a watch over them.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
};

use aya::programs::{SchedClassifier, TcAttachType};
use flannel_testkit::{Family, Netns, json::bpftool_json};
use serde_json::Value;

use super::{VNI, list};

/// A program at a hook.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Program {
    pub(crate) id: u32,
    pub(crate) name: String,
    pub(crate) attach: &'static str,
}

/// The programs at our two hooks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Hooks {
    /// Egress of the tunnel device.
    pub(crate) to_overlay: Vec<Program>,
    /// Ingress of the uplink.
    pub(crate) from_wire: Vec<Program>,
}

impl Hooks {
    /// The ids, if each hook has exactly one program, the one of its name.
    pub(crate) fn one_each(&self) -> Result<[u32; 2], String> {
        match (&self.to_overlay[..], &self.from_wire[..]) {
            ([out], [inn]) if out.name == "to_overlay" && inn.name == "from_wire" => {
                Ok([out.id, inn.id])
            }
            _ => Err(format!("not one program at each hook: {self:?}")),
        }
    }

    /// Whether the tunnel device has one program, and the uplink one for each of this many overlays.
    pub(crate) fn of_overlays(&self, overlays: usize) -> Result<(), String> {
        let named = |all: &[Program], name: &str| all.iter().all(|program| program.name == name);
        let right = self.to_overlay.len() == 1
            && self.from_wire.len() == overlays
            && named(&self.to_overlay, "to_overlay")
            && named(&self.from_wire, "from_wire");
        right
            .then_some(())
            .ok_or_else(|| format!("not one program of each of {overlays} overlays: {self:?}"))
    }

    /// Whether both are there, attached in this way.
    pub(crate) fn are(&self, attach: &str) -> Result<[u32; 2], String> {
        let ids = self.one_each()?;
        let all = self.to_overlay.iter().chain(&self.from_wire);
        if all.clone().all(|program| program.attach == attach) {
            Ok(ids)
        } else {
            Err(format!("not attached by {attach}: {self:?}"))
        }
    }
}

fn by_tcx(ns: &Netns, device: &str) -> Hooks {
    Hooks {
        to_overlay: tcx(ns, device, TcAttachType::Egress),
        from_wire: tcx(ns, "eth0", TcAttachType::Ingress),
    }
}

/// What runs at the hooks of IPv4's overlay, whether attached by tcx or by clsact. A device that is missing has no programs.
pub(crate) fn hooks(ns: &Netns) -> Hooks {
    hooks_of(ns, Family::V4)
}

/// The same of a family's overlay. The uplink is both families'.
pub(crate) fn hooks_of(ns: &Netns, family: Family) -> Hooks {
    let device = &family.device(VNI);
    loop {
        let mut found = by_tcx(ns, device);
        // This bpftool knows nothing of tcx, so nothing is counted twice.
        let net = bpftool_json(ns, &["net"]).expect("bpftool net");
        // A program that moves from the one to the other between the two looks would be seen twice, or not at all.
        if by_tcx(ns, device) != found {
            continue;
        }
        let filters = &net[0]["tc"];
        found
            .to_overlay
            .extend(clsact(filters, device, "clsact/egress"));
        found
            .from_wire
            .extend(clsact(filters, "eth0", "clsact/ingress"));
        return found;
    }
}

/// The tcx programs of an interface, in the order in which they run.
pub(crate) fn tcx(ns: &Netns, ifname: &str, side: TcAttachType) -> Vec<Program> {
    let Ok((_, programs)) = ns.run(|| SchedClassifier::query_tcx(ifname, side)) else {
        return Vec::new();
    };
    programs
        .iter()
        .map(|program| Program {
            id: program.id(),
            name: program.name_as_str().unwrap_or_default().to_owned(),
            attach: "tcx",
        })
        .collect()
}

/// The programs of an interface on one side, whether attached by tcx or by clsact.
pub(crate) fn programs(ns: &Netns, ifname: &str, side: TcAttachType) -> Vec<Program> {
    let kind = match side {
        TcAttachType::Ingress => "clsact/ingress",
        _ => "clsact/egress",
    };
    let mut found = tcx(ns, ifname, side);
    let net = bpftool_json(ns, &["net"]).expect("bpftool net");
    found.extend(clsact(&net[0]["tc"], ifname, kind));
    found
}

fn clsact(filters: &Value, ifname: &str, kind: &str) -> Vec<Program> {
    list(filters)
        .iter()
        .filter(|filter| filter["devname"] == ifname && filter["kind"] == kind)
        .filter_map(|filter| {
            Some(Program {
                // A filter without an id is of the old kind of BPF.
                id: filter["id"].as_u64()?.try_into().ok()?,
                name: filter["name"].as_str().unwrap_or_default().to_owned(),
                attach: "clsact",
            })
        })
        .collect()
}

/// The tag of a program: a hash over its instructions.
pub(crate) fn tag(ns: &Netns, id: u32) -> String {
    let show = bpftool_json(ns, &["prog", "show", "id", &id.to_string()]).expect("show a program");
    show["tag"].as_str().expect("a tag").to_owned()
}

/// Looks at the hooks again and again until it is stopped.
pub(crate) struct Watch {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Vec<Hooks>>>,
}

impl Watch {
    /// Watches both ways of attaching.
    pub(crate) fn start(ns: &Netns) -> Watch {
        Watch::with(ns, hooks)
    }

    /// Watches what is attached by tcx alone, which takes a fraction of the time.
    pub(crate) fn start_tcx(ns: &Netns) -> Watch {
        Watch::with(ns, |ns| by_tcx(ns, &Family::V4.device(VNI)))
    }

    fn with(ns: &Netns, look: fn(&Netns) -> Hooks) -> Watch {
        let stop = Arc::new(AtomicBool::new(false));
        let (ns, stopped) = (ns.clone(), Arc::clone(&stop));
        let thread = std::thread::spawn(move || {
            let mut seen: Vec<Hooks> = Vec::new();
            loop {
                let last = stopped.load(Ordering::Relaxed);
                let now = look(&ns);
                if seen.last() != Some(&now) {
                    seen.push(now);
                }
                if last {
                    return seen;
                }
            }
        });
        Watch {
            stop,
            thread: Some(thread),
        }
    }

    /// Everything that was different from what was seen just before.
    pub(crate) fn stop(mut self) -> Vec<Hooks> {
        self.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.take().expect("a watch stops once");
        thread.join().expect("the watch")
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}
