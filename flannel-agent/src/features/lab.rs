//! What takes interfaces: two network namespaces of a thread's own, joined by a veth pair, that end with it. On the host nothing is seen.
//!
//! At the pair's near end hangs a program that does with every frame what its length says. Frames go in at the far end and come out
//! there again, or do not.

use std::{
    collections::BTreeSet,
    fs::File,
    os::fd::{AsRawFd as _, OwnedFd},
    time::Duration,
};

use flannel_core::{
    addr::{IfIndex, Vni},
    features::{Feature, Finding},
    mark,
};
use nix::sched::{CloneFlags, unshare};
use tokio::runtime::Runtime;

use super::{
    assembly::{
        Insn,
        Reg::{R0, R1, R2, R3, R4, R7},
        call, exit, read, set, skip_unless,
    },
    kernel::{self, Kind},
    wire::Wire,
};
use crate::{
    dataplane::{
        bpf::syscall::{BPF_LINK_CREATE, bpf, number, owned},
        netlink::{Netlink, NetlinkError, TUNNEL_PORT},
    },
    telemetry::chain,
};

/// What is tried here.
pub(super) const HERE: [Feature; 8] = [
    Feature::Redirect,
    Feature::RedirectPeer,
    Feature::RedirectNeigh,
    Feature::Tcx,
    Feature::Clsact,
    Feature::Vxlan,
    Feature::LastPort,
    Feature::Veth,
];

/// How long frames may take to come back. They have before the call that sends them returns, but for a busy machine.
const PATIENCE: Duration = Duration::from_millis(60);
/// Helpers by their number in `enum bpf_func_id`.
const REDIRECT: i32 = 23;
const REDIRECT_NEIGH: i32 = 152;
const REDIRECT_PEER: i32 = 155;
/// `BPF_F_INGRESS`.
const INGRESS: i32 = 1;
/// `TC_ACT_UNSPEC`: on to the next program, and the stack.
const UNSPEC: i32 = -1;
/// `BPF_TCX_INGRESS` of `enum bpf_attach_type`.
const TCX_INGRESS: u32 = 46;
/// The loopback's index, in every namespace.
const LOOPBACK: u32 = 1;
/// Offset of `len` in `struct __sk_buff`.
const LEN: i16 = 0;
/// Name of both ends.
const PAIR: &str = "flannel-try";
/// Name of a vxlan device over the near end.
const TUNNEL: &str = "flannel-try-vx";
/// The only ports that it may send from: two, or one where the range ends before its end.
const PORTS: (u16, u16) = (40_000, 40_001);
/// Flows that are sent through it: one in two takes either port.
const FLOWS: u16 = 32;
/// Offsets in a frame of a tunnel over IPv4.
const PROTOCOL: usize = 23;
const SOURCE_PORT: usize = 34;
const PROTO_UDP: u8 = 17;

/// `union bpf_attr` for `BPF_LINK_CREATE` with what tcx wants of it.
#[repr(C)]
#[derive(Default)]
struct TcxLink {
    prog_fd: u32,
    target_ifindex: u32,
    attach_type: u32,
    flags: u32,
    relative: u32,
    padding: u32,
    expected_revision: u64,
}

/// What the program does with a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Way {
    /// `bpf_redirect` out of the near end.
    Send,
    /// `bpf_redirect` into the loopback.
    Receive,
    /// `bpf_redirect_peer`.
    Peer,
    /// `bpf_redirect_neigh`.
    Neighbour,
}

impl Way {
    const ALL: [Self; 4] = [Self::Send, Self::Receive, Self::Peer, Self::Neighbour];

    const fn feature(self) -> Feature {
        match self {
            Self::Send | Self::Receive => Feature::Redirect,
            Self::Peer => Feature::RedirectPeer,
            Self::Neighbour => Feature::RedirectNeigh,
        }
    }

    /// The call; what it answers is the verdict.
    fn code(self, near: IfIndex) -> Vec<Insn> {
        let (near, loopback) = (near.get().cast_signed(), LOOPBACK.cast_signed());
        let plain = |to, flags, helper| vec![set(R1, to), set(R2, flags), call(helper), exit()];
        match self {
            Self::Send => plain(near, 0, REDIRECT),
            Self::Receive => plain(loopback, INGRESS, REDIRECT),
            Self::Peer => plain(near, 0, REDIRECT_PEER),
            Self::Neighbour => vec![
                set(R1, near),
                set(R2, 0),
                set(R3, 0),
                set(R4, 0),
                call(REDIRECT_NEIGH),
                exit(),
            ],
        }
    }
}

/// Where a program hangs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Hook {
    Tcx,
    Clsact,
}

impl Hook {
    const ALL: [Self; 2] = [Self::Tcx, Self::Clsact];

    const fn feature(self) -> Feature {
        match self {
            Self::Tcx => Feature::Tcx,
            Self::Clsact => Feature::Clsact,
        }
    }

    /// The frame by which both programs know what to do: like no frame of the kernel's own.
    const fn frame_len(self, way: Way) -> usize {
        1401 + 16 * self as usize + way as usize
    }
}

/// Tries everything that `wanted` says yes to. `no_bpf` is why programs are not to be tried.
pub(super) fn try_all(
    wanted: &(dyn Fn(Feature) -> bool + Sync),
    no_bpf: Option<&str>,
) -> Vec<(Feature, Finding)> {
    let all: Vec<Feature> = HERE.into_iter().filter(|one| wanted(*one)).collect();
    if all.is_empty() {
        return Vec::new();
    }
    // A namespace belongs to a thread, which must not be one that is used again.
    let outcome = std::thread::scope(|scope| {
        let lab = std::thread::Builder::new().name("features".into());
        lab.spawn_scoped(scope, || in_namespaces(&all, no_bpf))
            .map(std::thread::ScopedJoinHandle::join)
    });
    match outcome {
        Ok(Ok(Ok(findings))) => findings,
        Ok(Ok(Err(reason))) => untried(&all, &reason),
        Ok(Err(_panic)) => untried(&all, "the attempt ended without an answer"),
        Err(error) => untried(&all, &format!("needs a thread of its own: {error}")),
    }
}

fn untried(features: &[Feature], reason: &str) -> Vec<(Feature, Finding)> {
    let features = features.iter();
    features
        .map(|feature| (*feature, Finding::untried(reason)))
        .collect()
}

/// The near end's namespace is the thread's own from here on.
fn in_namespaces(
    wanted: &[Feature],
    no_bpf: Option<&str>,
) -> Result<Vec<(Feature, Finding)>, String> {
    let new = || {
        unshare(CloneFlags::CLONE_NEWNET).map_err(|errno| {
            format!("needs a network namespace of its own (CAP_SYS_ADMIN): {errno}")
        })
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| error.to_string())?;
    new()?;
    let needs_pair = wanted.iter().any(|one| *one != Feature::Vxlan);
    let far = if needs_pair {
        let far = Far {
            space: File::open("/proc/thread-self/ns/net").map_err(|error| error.to_string())?,
            wire: Wire::new().map_err(|error| format!("open a packet socket: {error}"))?,
            net: open(&runtime)?,
        };
        new()?;
        Some(far)
    } else {
        None
    };
    let net = open(&runtime)?;
    let mut found = Vec::new();
    if wanted.contains(&Feature::Vxlan) {
        let made = runtime.block_on(net.try_vxlan(&mark::device_name(Vni::DEFAULT)));
        found.push((Feature::Vxlan, device(made)));
    }
    let Some(far) = far else { return Ok(found) };
    let rest: Vec<Feature> = HERE
        .into_iter()
        .filter(|one| !matches!(one, Feature::Vxlan | Feature::Veth) && wanted.contains(one))
        .collect();
    let near = match runtime.block_on(net.make_pair(PAIR, far.space.as_raw_fd())) {
        Ok(near) => near,
        Err(error) => {
            found.extend(untried(&rest, "needs veth"));
            found.push((Feature::Veth, device(Err(error))));
            return Ok(found);
        }
    };
    found.push((Feature::Veth, Finding::Present));
    if let Some(reason) = no_bpf {
        found.extend(untried(&rest, reason));
    } else if !rest.is_empty() {
        let lab = Lab {
            runtime: &runtime,
            net,
            far,
            near,
        };
        let findings = lab.carry().unwrap_or_else(|reason| untried(&rest, &reason));
        found.extend(findings.into_iter().filter(|(one, _)| rest.contains(one)));
    }
    Ok(found)
}

fn open(runtime: &Runtime) -> Result<Netlink, String> {
    runtime
        .block_on(async { Netlink::open() })
        .map_err(|error| chain(&error))
}

fn device(made: Result<(), NetlinkError>) -> Finding {
    match made {
        Ok(()) => Finding::Present,
        Err(error) => Finding::Absent {
            errno: error.errno(),
            reason: chain(&error),
        },
    }
}

/// The UDP source port of a frame of the tunnel.
fn source_port(frame: &[u8]) -> Option<u16> {
    let word = |at: usize| Some(u16::from_be_bytes([*frame.get(at)?, *frame.get(at + 1)?]));
    let ours =
        frame.get(PROTOCOL) == Some(&PROTO_UDP) && word(SOURCE_PORT + 2) == Some(TUNNEL_PORT);
    if ours { word(SOURCE_PORT) } else { None }
}

/// The namespace of the pair's far end, to which the thread does not return.
struct Far {
    space: File,
    wire: Wire,
    net: Netlink,
}

struct Lab<'a> {
    runtime: &'a Runtime,
    net: Netlink,
    far: Far,
    near: IfIndex,
}

impl Lab<'_> {
    /// Sends a frame for every helper through every hook.
    fn carry(self) -> Result<Vec<(Feature, Finding)>, String> {
        let said = |error: NetlinkError| chain(&error);
        let far = self
            .runtime
            .block_on(self.far.net.index(PAIR))
            .map_err(said)?;
        let far = far.ok_or("the veth pair has no far end")?;
        let inside = Wire::new().map_err(|error| error.to_string())?;
        let loopback = IfIndex::try_from(LOOPBACK).map_err(|error| error.to_string())?;
        self.runtime.block_on(async {
            self.net.furnish(self.near).await.map_err(said)?;
            self.net.up(loopback).await.map_err(said)?;
            self.far.net.up(far).await.map_err(said)
        })?;
        // An interface that is down would be the socket's first error.
        self.far.wire.bind(far).map_err(|error| error.to_string())?;
        inside.bind(loopback).map_err(|error| error.to_string())?;

        let mut found = Vec::new();
        let mut ways = Vec::new();
        for way in Way::ALL {
            match kernel::load(Kind::SchedCls, &way.code(self.near), 0) {
                Ok(_program) => ways.push(way),
                Err(refusal) => found.push((way.feature(), refusal.finding())),
            }
        }
        let mut links = Vec::new();
        let mut hooks = Vec::new();
        for hook in Hook::ALL {
            match self.attach(hook, &ways) {
                Ok(link) => {
                    links.push(link);
                    hooks.push(hook);
                }
                Err(finding) => found.push((hook.feature(), finding)),
            }
        }
        let arrived = self.exchange(&inside, &hooks, &ways)?;
        for way in &ways {
            let finding = if hooks.is_empty() {
                Finding::untried("needs tcx or clsact")
            } else if hooks.iter().any(|hook| arrived.contains(&(*hook, *way))) {
                Finding::Present
            } else {
                Finding::absent("the kernel takes the program, and a packet does not arrive")
            };
            // Of two ways with one feature the one that fails counts.
            let is_known = found
                .iter()
                .any(|(one, finding)| *one == way.feature() && *finding != Finding::Present);
            if !is_known {
                found.retain(|(one, _)| *one != way.feature());
                found.push((way.feature(), finding));
            }
        }
        for hook in &hooks {
            let finding = if arrived.iter().any(|(one, _)| one == hook) {
                Finding::Present
            } else {
                Finding::absent("a program is attached, and sees no packet")
            };
            found.push((hook.feature(), finding));
        }
        found.push((Feature::LastPort, self.last_port()));
        Ok(found)
    }

    /// Whether a vxlan device sends from the last port of its range, too (`udp_flow_src_port` in `include/net/udp.h`).
    fn last_port(&self) -> Finding {
        let made = self.net.make_tunnel(TUNNEL, self.near, PORTS);
        let tunnel = match self.runtime.block_on(made) {
            Ok(tunnel) => tunnel,
            Err(error) => return Finding::untried(format!("needs vxlan: {}", chain(&error))),
        };
        let sent = Wire::new().and_then(|wire| {
            wire.bind(tunnel)?;
            (1..=FLOWS).try_for_each(|flow| wire.send(&super::trials::packet_from(flow, 100)))
        });
        if let Err(error) = sent {
            return Finding::untried(format!("send through a vxlan device: {error}"));
        }
        let mut came = BTreeSet::new();
        let mut count = 0;
        self.far.wire.read_all(PATIENCE, |frame| {
            if let Some(port) = source_port(frame) {
                came.insert(port);
                count += 1;
            }
            count == FLOWS
        });
        if came.contains(&PORTS.1) {
            Finding::Present
        } else if came.is_empty() {
            Finding::untried("nothing comes out of a vxlan device")
        } else {
            Finding::absent("the last port of the range is not taken")
        }
    }

    /// The program of a hook: what to do with frames of these lengths.
    fn program(&self, hook: Hook, ways: &[Way]) -> Result<OwnedFd, Finding> {
        let mut code = vec![read(R7, R1, LEN)];
        for way in ways {
            let call = way.code(self.near);
            let len = hook.frame_len(*way) as i32;
            code.push(skip_unless(R7, len, call.len() as i16));
            code.extend(call);
        }
        code.extend([set(R0, UNSPEC), exit()]);
        kernel::load(Kind::SchedCls, &code, 0).map_err(kernel::Refusal::finding)
    }

    /// Attaches it at the near end. What is given back holds it there.
    fn attach(&self, hook: Hook, ways: &[Way]) -> Result<Option<OwnedFd>, Finding> {
        let program = self.program(hook, ways)?;
        let refused = |what: &str, error: &std::io::Error| {
            kernel::absent(what, error.raw_os_error().unwrap_or(0), None)
        };
        match hook {
            Hook::Tcx => {
                let mut create = TcxLink {
                    prog_fd: number(&program).map_err(|error| refused("use a program", &error))?,
                    target_ifindex: self.near.get(),
                    attach_type: TCX_INGRESS,
                    ..TcxLink::default()
                };
                bpf(BPF_LINK_CREATE, &mut create)
                    .and_then(owned)
                    .map(Some)
                    .map_err(|error| refused("make a tcx link (Linux 6.6 and newer)", &error))
            }
            Hook::Clsact => {
                let made = self.net.add_filter(self.near, program.as_raw_fd());
                match self.runtime.block_on(made) {
                    // The filter holds the program, the namespace the filter.
                    Ok(()) => Ok(None),
                    Err(error) => Err(device(Err(error))),
                }
            }
        }
    }

    /// Sends the frames, and says which have come out where they should.
    fn exchange(
        &self,
        inside: &Wire,
        hooks: &[Hook],
        ways: &[Way],
    ) -> Result<BTreeSet<(Hook, Way)>, String> {
        let cases: Vec<(Hook, Way)> = hooks
            .iter()
            .flat_map(|hook| ways.iter().map(|way| (*hook, *way)))
            .collect();
        for (hook, way) in &cases {
            let frame = super::trials::packet(hook.frame_len(*way));
            self.far
                .wire
                .send(&frame)
                .map_err(|error| format!("send a frame: {error}"))?;
        }
        let mut arrived = BTreeSet::new();
        for (wire, is_inside) in [(&self.far.wire, false), (inside, true)] {
            let awaited: Vec<(Hook, Way)> = cases
                .iter()
                .filter(|(_, way)| (*way == Way::Receive) == is_inside)
                .copied()
                .collect();
            let lens = awaited.iter().map(|(hook, way)| hook.frame_len(*way));
            let came = wire.receive(&lens.collect(), PATIENCE);
            arrived.extend(
                awaited
                    .into_iter()
                    .filter(|(hook, way)| came.contains(&hook.frame_len(*way))),
            );
        }
        Ok(arrived)
    }
}
