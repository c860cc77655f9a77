//! One session: the time for which uplink, configuration and subnet stay what they are.
//!
//! The end of a session is what the end of the process is: programs, maps, device and rules stay and go on carrying traffic, and
//! the next session adopts them. So a change while running is as gapless as a restart.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use flannel_core::{
    acquire::Identity,
    addr::{Family, Mtu, VtepMac},
    config::{self, BackendKind, NetConf},
    datagram::Receiver,
    iface::Uplink,
    lease::{LeaseAttrs, SubnetKey, VxlanData},
    mark::{self, Overlay},
    plan::{DeviceKind, Tunnel},
};
use futures_util::future::join_all;
use ipnet::IpNet;
use tokio::{sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;

use super::{
    StartError,
    ascent::{Ascent, Lack},
    own_of, set_own,
};
use crate::{
    cli::{Args, DatapathChoice},
    datapath::{self, Rung},
    dataplane::{bpf::Instance, fragments, netlink::Netlink},
    device::{Site, Up},
    fastpath, files,
    health::Board,
    leases::{Offer, View},
    masquerade,
    metrics::Metrics,
    reconcile::{Calls, Fall, Gatekeeper, Loop, Readiness, XdpKeeper},
    state::{Mode, State},
};

/// What stays the same as long as the process runs.
#[derive(Debug)]
pub(super) struct Node<'a> {
    pub(super) args: &'a Args,
    pub(super) net: Netlink,
    /// Which store the configuration came from.
    pub(super) origin: String,
    /// MAC addresses of the tunnel devices, which peers know.
    pub(super) macs: BTreeMap<Family, VtepMac>,
    pub(super) board: Board,
    pub(super) metrics: Metrics,
}

/// What a session is made from.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Setting {
    /// The network configuration.
    pub(crate) conf: NetConf,
    /// The interface that carries the overlay.
    pub(crate) uplink: Uplink,
}

/// What a setting amounts to on this node, for one family.
#[derive(Debug)]
pub(super) struct Checked {
    overlay: Overlay,
    pub(super) device: String,
    network: IpNet,
    public_ip: IpAddr,
    local: IpAddr,
    mtu: Mtu,
}

/// Why a session ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ended {
    /// The daemon is to stop.
    Cancelled,
    /// Uplink, configuration or subnet changed.
    Outdated,
}

impl Setting {
    /// Finds out whether the setting can be served, for every family.
    pub(super) fn check(&self, origin: &str) -> Result<Vec<Checked>, StartError> {
        let families = self.conf.families().into_iter();
        families
            .map(|family| self.check_family(origin, family))
            .collect()
    }

    fn check_family(&self, origin: &str, family: Family) -> Result<Checked, StartError> {
        let unsupported = |reason: String| StartError::Unsupported {
            origin: origin.into(),
            reason,
        };
        let (network, _) = self
            .conf
            .range(family)
            .ok_or_else(|| unsupported(format!("there is no network of {family}")))?;
        let public_ip = self
            .uplink
            .public(family)
            .ok_or_else(|| unsupported(format!("the uplink has no {family} address")))?;
        let vni = self.conf.backend.vxlan.vni;
        let overlay = Overlay { family, vni };
        let local = self.local(family);
        let routed = self.conf.backend.kind == BackendKind::HostGw;
        if routed && public_ip != local {
            // In upstream's words.
            return Err(unsupported(
                "your PublicIP differs from interface IP, meaning that probably you're on a NAT, which is not supported by host-gw backend".into(),
            ));
        }
        // Without a tunnel it is the uplink that carries what pods send.
        let device = if routed {
            self.uplink.name.clone()
        } else {
            overlay.device()
        };
        mark::check_name(&device)?;
        let wrong = |source| StartError::Config {
            origin: origin.into(),
            source,
        };
        let mut mtu = config::tunnel_mtu(&self.conf, self.uplink.mtu).map_err(wrong)?;
        if family == Family::V6 && self.conf.backend.kind == BackendKind::Vxlan {
            // What was written down is for IPv4: the kernel gives the device no more than what fits (`vxlan_change_mtu`).
            let most = self.uplink.mtu.saturating_sub(config::OVERHEAD_V6);
            mtu = Mtu::try_from(most).map_or(mtu, |most| mtu.min(most));
        }
        Ok(Checked {
            overlay,
            device,
            network,
            public_ip,
            local,
            mtu,
        })
    }

    /// Our address on the underlay.
    fn local(&self, family: Family) -> IpAddr {
        let local = self.uplink.local(family).or(self.uplink.public(family));
        local.unwrap_or(match family {
            Family::V4 => Ipv4Addr::UNSPECIFIED.into(),
            Family::V6 => Ipv6Addr::UNSPECIFIED.into(),
        })
    }

    /// What works but deserves a look.
    pub(super) fn warnings(&self) -> Vec<String> {
        let mut warnings = self.conf.warnings.clone();
        warnings.extend(config::mtu_warnings(&self.conf, self.uplink.mtu));
        warnings
    }

    /// By what this node recognises its own lease.
    pub(super) fn identity(&self) -> Identity {
        Identity {
            public_ip: self.uplink.public_ip.filter(|_| self.conf.enable_ipv4),
            public_ipv6: self.uplink.public_ipv6.filter(|_| self.conf.enable_ipv6),
        }
    }

    /// What this node asks for and publishes.
    pub(super) fn offer(
        &self,
        macs: &BTreeMap<Family, VtepMac>,
        previous: Option<SubnetKey>,
    ) -> Offer {
        let vni = self.conf.backend.vxlan.vni.get();
        let identity = self.identity();
        let kind = self.conf.backend.kind;
        let data = |family| {
            let mac = *macs.get(&family)?;
            (kind == BackendKind::Vxlan).then(|| VxlanData { vni, mac }.into())
        };
        // Upstream's alloc tells nobody an IPv6 address; a node that has no other must be told apart by it.
        let silent = kind == BackendKind::Alloc && identity.public_ip.is_some();
        let attrs = LeaseAttrs {
            public_ip: identity.public_ip,
            public_ipv6: identity.public_ipv6.filter(|_| !silent),
            backend_type: kind.lease_type().to_owned(),
            v4: identity.public_ip.and_then(|_| data(Family::V4)),
            v6: identity.public_ipv6.and_then(|_| data(Family::V6)),
        };
        Offer {
            conf: self.conf.clone(),
            identity,
            attrs,
            previous,
        }
    }

    fn vxlan(&self, local: IpAddr) -> DeviceKind {
        let vxlan = &self.conf.backend.vxlan;
        DeviceKind::Vxlan {
            vni: vxlan.vni,
            port: vxlan.port,
            lower: self.uplink.index,
            local,
            learning: vxlan.learning,
            gbp: vxlan.gbp,
        }
    }
}

impl Node<'_> {
    /// Loads programs and creates or adopts the devices, one for each family. Changes nothing on the node if it fails. `without` is why
    /// eBPF is not to be tried, as long as the kernel has a device.
    pub(super) async fn bring_up(
        &self,
        setting: &Setting,
        without: Option<&str>,
    ) -> Result<Vec<Up>, StartError> {
        let checked = setting.check(&self.origin)?;
        let ethernet = self.net.is_ethernet(setting.uplink.index).await?;
        // Checked to the end: from here on the node is changed.
        let mut ups: Vec<Up> = Vec::new();
        for checked in &checked {
            let one = self.bring_up_one(setting, checked, ethernet, without);
            match Box::pin(one).await {
                Ok(up) => ups.push(up),
                Err(error) => {
                    for up in ups {
                        Box::pin(up.take_back()).await;
                    }
                    return Err(error);
                }
            }
        }
        Ok(ups)
    }

    async fn bring_up_one(
        &self,
        setting: &Setting,
        checked: &Checked,
        ethernet: bool,
        without: Option<&str>,
    ) -> Result<Up, StartError> {
        let tunnel = self.tunnel_of(setting, checked);
        let site = self.site(setting, checked);
        if let Some(reason) = without {
            let rung = Rung::Kernel(reason.to_owned());
            match site.bring_up(rung, tunnel.clone()).await {
                Err(StartError::NoPath { .. }) => {}
                other => return other,
            }
        }
        let rung = datapath::choose(self.args, &setting.conf, checked.overlay.family, ethernet)?;
        site.bring_up(rung, tunnel).await
    }

    /// A tunnel device as it is with the kernel's vxlan devices; `None` for a backend without.
    pub(super) fn tunnel_of(&self, setting: &Setting, checked: &Checked) -> Option<Tunnel> {
        (setting.conf.backend.kind == BackendKind::Vxlan).then(|| Tunnel {
            name: checked.device.clone(),
            kind: setting.vxlan(checked.local),
            mtu: checked.mtu,
            mac: self.macs.get(&checked.overlay.family).copied(),
            address: None,
            network: checked.network,
        })
    }

    pub(super) fn site<'a>(&'a self, setting: &'a Setting, checked: &Checked) -> Site<'a> {
        Site {
            args: self.args,
            conf: &setting.conf,
            uplink: &setting.uplink,
            net: &self.net,
            overlay: checked.overlay,
            local: checked.local,
        }
    }

    /// Keeps the node as it is to be until that changes, or until cancelled. There are as many `calls` as overlays.
    pub(super) async fn session(
        &self,
        setting: &Setting,
        ups: Vec<Up>,
        (ready, calls): (&Readiness, &mut [Calls]),
        (mut views, settings): (watch::Receiver<View>, &mut watch::Receiver<Setting>),
        ascent: &mut Ascent,
        cancel: &CancellationToken,
    ) -> Result<Ended, StartError> {
        let (begun, lack) = (Instant::now(), Lack::of(self, &ups));
        let own = own_subnet(&views);
        let session = cancel.child_token();
        // Its tasks end with it, however it ends.
        let _tasks = session.clone().drop_guard();
        let checked = setting.check(&self.origin)?;
        let readies = ready.begin(checked.len());
        let mut states = Vec::new();
        for (number, (checked, up)) in checked.iter().zip(&ups).enumerate() {
            let state = self.state(setting, checked, up, own.as_ref(), number > 0);
            datapath::retire(&self.net, &state).await;
            states.push(state);
        }
        if states.len() == 1 {
            files::forget(&State::second_path(&self.args.subnet_file));
        }
        if let Some(own) = &own {
            // Before `subnet.env`, as upstream has it, and before the fast path looks at the rules.
            let wanted = masquerade::Wanted::from_args(self.args, &setting.conf, own);
            masquerade::start(wanted, self.board.clone(), session.clone()).await;
        }
        let mut loops = Vec::new();
        let overlays = checked.iter().zip(ups).zip(states).zip(readies).zip(calls);
        for ((((checked, up), state), ready), calls) in overlays {
            let parts = (ready, calls);
            let running = self
                .overlay(
                    setting,
                    checked,
                    up,
                    state,
                    parts,
                    (&views, own.as_ref()),
                    &session,
                )
                .await?;
            loops.push(running.run(session.clone()));
        }
        let outdated = async {
            tokio::select! {
                Ok(()) = settings.changed() => {}
                () = another_subnet(&mut views, own) => {}
                () = Box::pin(ascent.better(self, setting, &lack)) => {}
                // Also when a loop has ended by itself.
                () = session.cancelled() => {}
            }
            // The loops end between two changes, never within one.
            session.cancel();
        };
        let running = loops.into_iter().map(|running| async {
            let fall = Box::pin(running).await;
            session.cancel();
            fall
        });
        let (falls, ()) = tokio::join!(join_all(running), outdated);
        ascent.note_end(&lack, begun);
        for fall in falls.into_iter().flatten() {
            match fall {
                Fall::Bpf(why) => {
                    tracing::warn!(
                        "eBPF is given up, the kernel's device carries the overlay: {why}"
                    );
                    ascent.fallen = Some(format!("eBPF was given up: {why}"));
                }
                Fall::Device(why) => {
                    tracing::warn!("the tunnel device cannot be made as it was: {why}");
                    ascent.fallen = None;
                }
            }
        }
        Ok(if cancel.is_cancelled() {
            Ended::Cancelled
        } else {
            Ended::Outdated
        })
    }

    /// What `status` is told of an overlay at first.
    fn state(
        &self,
        setting: &Setting,
        checked: &Checked,
        up: &Up,
        own: Option<&SubnetKey>,
        second: bool,
    ) -> State {
        let family = checked.overlay.family;
        State {
            version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
            vni: checked.overlay.vni,
            family,
            second,
            device: checked.device.clone(),
            uplink: setting.uplink.name.clone(),
            uplink_index: setting.uplink.index,
            public_ip: checked.public_ip,
            vtep_mac: self
                .macs
                .get(&family)
                .copied()
                .unwrap_or(VtepMac::new([0; 6])),
            network: checked.network,
            subnet: own.and_then(|key| own_of(key, family)),
            mtu: checked.mtu.get(),
            datapath: up.path.clone(),
            store: self.origin.clone(),
            store_connected: true,
            problems: Vec::new(),
            subnet_file: self.args.subnet_file.clone(),
            blackhole: self.args.firewall.ip_blackhole_route,
            fast_path: None,
        }
    }

    /// The loop of one overlay, and the tasks that it needs.
    #[expect(clippy::too_many_arguments, reason = "it is one step of a session")]
    async fn overlay<'a>(
        &self,
        setting: &Setting,
        checked: &Checked,
        up: Up,
        state: State,
        parts: (Readiness, &'a mut Calls),
        (views, own): (&watch::Receiver<View>, Option<&SubnetKey>),
        session: &CancellationToken,
    ) -> Result<Loop<'a>, StartError> {
        let Up {
            dataplane,
            mut desired,
            ..
        } = up;
        let (conf, uplink) = (&setting.conf, &setting.uplink);
        if let Some(key) = own {
            set_own(&mut desired, key);
        }
        let kind = desired.tunnel.as_ref().map(|tunnel| &tunnel.kind);
        if let Some(DeviceKind::Veth { peer }) = kind {
            let receiver = Receiver {
                family: checked.overlay.family,
                vni: checked.overlay.vni,
                mac: state.vtep_mac,
            };
            let keep = fragments::keep(
                self.net.for_another_task(),
                receiver,
                checked.local,
                conf.backend.vxlan.port,
                peer.clone(),
            );
            let ends = session.clone();
            tokio::spawn(async move { ends.run_until_cancelled(keep).await });
        }
        let kernel_only = (state.datapath.mode == Mode::Kernel)
            .then(|| format!("eBPF is not in use: {}", state.datapath.reason));
        let uplink_kind = self.net.kind_of(uplink.index).await?;
        let xdp = XdpKeeper::new(
            self.args.bpf_xdp.into(),
            uplink_kind.as_deref(),
            kernel_only.clone(),
        );
        let fast_path = fastpath::Watch {
            choice: self.args.fast_path(conf.backend.fast_path),
            unsupported: kernel_only.or_else(|| dataplane.gate_obstacle()),
            network: checked.network,
            tunnel: state.device.clone(),
            uplink: state.uplink.clone(),
            instance: Instance::of(checked.overlay).ok(),
        };
        let fast_path = fast_path.start(session.clone()).await;
        let gate = Gatekeeper::new(fast_path, dataplane.epoch()?);
        Ok(Loop::new(
            dataplane,
            desired,
            views.clone(),
            state,
            parts,
            (gate, xdp),
            self.args.datapath == DatapathChoice::Auto,
        ))
    }
}

pub(super) fn own_subnet(views: &watch::Receiver<View>) -> Option<SubnetKey> {
    views.borrow().own.as_ref().map(|lease| lease.key)
}

/// Until this node has another subnet than this one; for ever if the store's task has ended.
pub(super) async fn another_subnet(views: &mut watch::Receiver<View>, own: Option<SubnetKey>) {
    let is_other = |view: &View| {
        view.own
            .as_ref()
            .is_some_and(|lease| Some(lease.key) != own)
    };
    if views.wait_for(is_other).await.is_err() {
        std::future::pending::<()>().await;
    }
}
