//! One session: the time for which uplink, configuration and subnet stay what they are.
//!
//! The end of a session is what the end of the process is: programs, maps, device and rules stay and go on carrying traffic, and
//! the next session adopts them. So a change while running is as gapless as a restart.

use std::net::Ipv4Addr;

use flannel_core::{
    acquire::Identity,
    addr::{Mtu, VtepMac},
    config::{self, NetConf},
    datagram::Receiver,
    iface::Uplink,
    lease::{LeaseAttrs, SubnetKey},
    mark,
    plan::{DeviceKind, Tunnel},
};
use ipnet::Ipv4Net;
use tokio::{sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;

use super::{
    StartError,
    ascent::{Ascent, Lack},
    set_own,
};
use crate::{
    cli::{Args, DatapathChoice},
    datapath::{self, Rung},
    dataplane::{bpf::Instance, fragments, netlink::Netlink},
    device::{Site, Up},
    fastpath,
    health::Board,
    leases::{Offer, View},
    masquerade,
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
    /// MAC address of the tunnel device, which peers know.
    pub(super) mac: VtepMac,
    pub(super) board: Board,
}

/// What a session is made from.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Setting {
    /// The network configuration.
    pub(crate) conf: NetConf,
    /// The interface that carries the overlay.
    pub(crate) uplink: Uplink,
}

/// What a setting amounts to on this node.
#[derive(Debug)]
pub(super) struct Checked {
    pub(super) device: String,
    network: Ipv4Net,
    public_ip: Ipv4Addr,
    local: Ipv4Addr,
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
    /// Finds out whether the setting can be served.
    pub(super) fn check(&self, origin: &str) -> Result<Checked, StartError> {
        let unsupported = |reason: &str| StartError::Unsupported {
            origin: origin.into(),
            reason: reason.into(),
        };
        if self.conf.enable_ipv6 {
            return Err(unsupported(
                "EnableIPv6 is true: only IPv4 is supported yet, set it to false",
            ));
        }
        let family = self
            .conf
            .ipv4
            .ok_or_else(|| unsupported("EnableIPv4 is false: only IPv4 is supported yet"))?;
        let public_ip = self
            .uplink
            .public_ip
            .ok_or_else(|| unsupported("the uplink has no IPv4 address"))?;
        let device = mark::device_name(self.conf.backend.vxlan.vni);
        mark::check_name(&device)?;
        let mtu = config::tunnel_mtu(&self.conf, self.uplink.mtu).map_err(|source| {
            StartError::Config {
                origin: origin.into(),
                source,
            }
        })?;
        Ok(Checked {
            device,
            network: family.network,
            public_ip,
            local: self.local(),
            mtu,
        })
    }

    /// Our address on the underlay.
    fn local(&self) -> Ipv4Addr {
        let local = self.uplink.local_v4().or(self.uplink.public_ip);
        local.unwrap_or(Ipv4Addr::UNSPECIFIED)
    }

    /// What works but deserves a look.
    pub(super) fn warnings(&self) -> Vec<String> {
        let mut warnings = self.conf.warnings.clone();
        warnings.extend(config::mtu_warnings(&self.conf, self.uplink.mtu));
        if self.conf.backend.vxlan.direct_routing {
            warnings.push(
                "Backend.DirectRouting is not supported yet: peers on the same link are reached by VXLAN too"
                    .into(),
            );
        }
        warnings
    }

    /// By what this node recognises its own lease.
    pub(super) fn identity(&self) -> Identity {
        Args::identity(self.uplink.public_ip)
    }

    /// What this node asks for and publishes.
    pub(super) fn offer(&self, mac: VtepMac, previous: Option<SubnetKey>) -> Offer {
        let vni = self.conf.backend.vxlan.vni.get();
        let public_ip = self.uplink.public_ip.unwrap_or(Ipv4Addr::UNSPECIFIED);
        Offer {
            conf: self.conf.clone(),
            identity: self.identity(),
            attrs: LeaseAttrs::vxlan_v4(public_ip, vni, mac),
            previous,
        }
    }

    fn vxlan(&self, local: Ipv4Addr) -> DeviceKind {
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
    /// Loads programs and creates or adopts the device. Changes nothing on the node if it fails. `without` is why eBPF is not to be
    /// tried, as long as the kernel has a device.
    pub(super) async fn bring_up(
        &self,
        setting: &Setting,
        without: Option<&str>,
    ) -> Result<Up, StartError> {
        let tunnel = self.tunnel(setting)?;
        let ethernet = self.net.is_ethernet(setting.uplink.index).await?;
        // Checked to the end: from here on the node is changed.
        if let Some(reason) = without {
            let rung = Rung::Kernel(reason.to_owned());
            match self.site(setting).bring_up(rung, tunnel.clone()).await {
                Err(StartError::NoPath { .. }) => {}
                other => return other,
            }
        }
        let rung = datapath::choose(self.args, &setting.conf, ethernet)?;
        self.site(setting).bring_up(rung, tunnel).await
    }

    /// The tunnel device as it is with the kernel's vxlan devices.
    pub(super) fn tunnel(&self, setting: &Setting) -> Result<Tunnel, StartError> {
        let checked = setting.check(&self.origin)?;
        Ok(Tunnel {
            name: checked.device,
            kind: setting.vxlan(checked.local),
            mtu: checked.mtu,
            mac: Some(self.mac),
            address: None,
            network: checked.network,
        })
    }

    pub(super) fn site<'a>(&'a self, setting: &'a Setting) -> Site<'a> {
        Site {
            args: self.args,
            conf: &setting.conf,
            uplink: &setting.uplink,
            net: &self.net,
            local: setting.local(),
        }
    }

    /// Keeps the node as it is to be until that changes, or until cancelled.
    pub(super) async fn session(
        &self,
        setting: &Setting,
        up: Up,
        (ready, calls): (&mut Readiness, &mut Calls),
        (mut views, settings): (watch::Receiver<View>, &mut watch::Receiver<Setting>),
        ascent: &mut Ascent,
        cancel: &CancellationToken,
    ) -> Result<Ended, StartError> {
        let (begun, lack) = (Instant::now(), Lack::of(self, &up));
        let Up {
            dataplane,
            mut desired,
            path,
        } = up;
        let (conf, uplink) = (&setting.conf, &setting.uplink);
        let checked = setting.check(&self.origin)?;
        let own = own_subnet(&views);
        if let Some(key) = &own {
            set_own(&mut desired, key);
        }
        let state = State {
            version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
            vni: conf.backend.vxlan.vni,
            device: checked.device,
            uplink: uplink.name.clone(),
            uplink_index: uplink.index,
            public_ip: checked.public_ip,
            vtep_mac: self.mac,
            network: checked.network,
            subnet: own.and_then(|key| key.v4),
            mtu: checked.mtu.get(),
            datapath: path,
            store: self.origin.clone(),
            store_connected: true,
            problems: Vec::new(),
            subnet_file: self.args.subnet_file.clone(),
            blackhole: self.args.firewall.ip_blackhole_route,
            fast_path: None,
        };
        datapath::retire(&self.net, &state).await;
        let session = cancel.child_token();
        // Its tasks end with it, however it ends.
        let _tasks = session.clone().drop_guard();
        if let DeviceKind::Veth { peer } = &desired.tunnel.kind {
            let receiver = Receiver {
                vni: conf.backend.vxlan.vni,
                mac: self.mac,
            };
            let port = conf.backend.vxlan.port;
            let keep = fragments::keep(
                self.net.for_another_task(),
                receiver,
                checked.local,
                port,
                peer.clone(),
            );
            let ends = session.clone();
            tokio::spawn(async move { ends.run_until_cancelled(keep).await });
        }
        if let Some(own) = state.subnet {
            // Before `subnet.env`, as upstream has it, and before the fast path looks at the rules.
            let wanted = masquerade::Wanted::from_args(self.args, conf, checked.network, own);
            masquerade::start(wanted, self.board.clone(), session.clone()).await;
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
            instance: Instance::of(conf.backend.vxlan.vni).ok(),
        };
        let fast_path = fast_path.start(session.clone()).await;
        let gate = Gatekeeper::new(fast_path, dataplane.epoch()?);
        let changes = views.clone();
        let running = Loop::new(
            dataplane,
            desired,
            changes,
            state,
            (ready, calls),
            (gate, xdp),
            self.args.datapath == DatapathChoice::Auto,
        )
        .run(session.clone());
        let outdated = async {
            tokio::select! {
                Ok(()) = settings.changed() => {}
                () = another_subnet(&mut views, own) => {}
                () = Box::pin(ascent.better(self, setting, lack)) => {}
                // Also when the loop has ended by itself.
                () = session.cancelled() => {}
            }
            // The loop ends between two changes, never within one.
            session.cancel();
        };
        let running = async {
            let fall = Box::pin(running).await;
            session.cancel();
            fall
        };
        let (fall, ()) = tokio::join!(running, outdated);
        ascent.note_end(lack, begun);
        match fall {
            Some(Fall::Bpf(why)) => {
                tracing::warn!("eBPF is given up, the kernel's device carries the overlay: {why}");
                ascent.fallen = Some(format!("eBPF was given up: {why}"));
            }
            Some(Fall::Device(why)) => {
                tracing::warn!("the tunnel device cannot be made as it was: {why}");
                ascent.fallen = None;
            }
            None => {}
        }
        Ok(if cancel.is_cancelled() {
            Ended::Cancelled
        } else {
            Ended::Outdated
        })
    }
}

fn own_subnet(views: &watch::Receiver<View>) -> Option<SubnetKey> {
    views.borrow().own.as_ref().map(|lease| lease.key)
}

/// Until this node has another subnet than this one; for ever if the store's task has ended.
async fn another_subnet(views: &mut watch::Receiver<View>, own: Option<SubnetKey>) {
    let is_other = |view: &View| {
        view.own
            .as_ref()
            .is_some_and(|lease| Some(lease.key) != own)
    };
    if views.wait_for(is_other).await.is_err() {
        std::future::pending::<()>().await;
    }
}
