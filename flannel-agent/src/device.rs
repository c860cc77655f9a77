//! Bringing up the tunnel device: the kernel's vxlan device, or a veth pair where there is none and eBPF can do without.

use std::{collections::BTreeSet, net::IpAddr};

use flannel_core::{
    config::NetConf,
    distribution::Feature,
    iface::Uplink,
    mark::Overlay,
    plan::{Desired, DeviceKind, Direct, ObservedKind, Tunnel},
};

use crate::{
    app::StartError,
    cli::{Args, DeviceChoice},
    datapath::{self, Rung},
    dataplane::{Dataplane, netlink::Netlink},
    kernel_modules,
    state::{Datapath, Mode},
    telemetry::chain,
};

/// What a device is brought up from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Site<'a> {
    pub(crate) args: &'a Args,
    pub(crate) conf: &'a NetConf,
    pub(crate) uplink: &'a Uplink,
    pub(crate) net: &'a Netlink,
    pub(crate) overlay: Overlay,
    pub(crate) local: IpAddr,
}

/// A node whose device is there, or can be made at any time.
#[derive(Debug)]
pub(crate) struct Up {
    /// Whether the device is of this start.
    made: bool,
    pub(crate) dataplane: Dataplane,
    pub(crate) desired: Desired,
    pub(crate) path: Datapath,
}

impl Up {
    /// Takes back what this start has made, because the node cannot be as it is to be.
    pub(crate) async fn take_back(self) {
        let name = self.desired.tunnel.as_ref().map(|tunnel| &tunnel.name);
        let name = name.filter(|_| self.made);
        if let Err(error) = self.dataplane.take_back(name).await {
            tracing::warn!(error = chain(&error), "take back what this start has made");
        }
    }
}

impl Site<'_> {
    /// Creates or adopts the device. On an error nothing of this start is left on the node.
    pub(crate) async fn bring_up(
        &self,
        rung: Rung,
        mut tunnel: Option<Tunnel>,
    ) -> Result<Up, StartError> {
        let (mut there, mut refused) = (true, None);
        if let Some(tunnel) = &tunnel {
            there = self.net.index(&tunnel.name).await?.is_some();
            refused = match self.refused(&rung, tunnel).await {
                Ok(refused) => refused,
                Err(error) => {
                    if let Rung::Bpf(bpf) = rung {
                        bpf.discard();
                    }
                    return Err(error);
                }
            };
        }
        let (bpf, reason) = match rung {
            Rung::Bpf(bpf) => (Some(*bpf), None),
            Rung::Kernel(reason) => (None, Some(reason)),
        };
        if let (Some((vxlan, peer)), Some(tunnel)) = (&refused, &mut tunnel) {
            tracing::warn!(
                reason = vxlan,
                "no kernel vxlan device: eBPF carries the overlay alone"
            );
            tunnel.kind = DeviceKind::Veth { peer: peer.clone() };
        }
        if let Some(reason) = &reason {
            datapath::announce_kernel(self.args, reason);
        }
        let alone = refused.is_some();
        let settings = bpf
            .as_ref()
            .and_then(|bpf| datapath::settings(bpf, self.conf, self.uplink, alone));
        let path = Datapath {
            mode: if bpf.is_some() {
                Mode::Bpf
            } else {
                Mode::Kernel
            },
            reason: match (reason, &refused) {
                (Some(reason), _) => reason,
                (None, Some((vxlan, _))) => {
                    format!("eBPF is permitted and works, and carries the overlay alone: {vxlan}")
                }
                (None, None) => "eBPF is permitted and works".into(),
            },
            device: match &tunnel {
                Some(_) if alone => "veth",
                Some(_) => "vxlan",
                None => "none",
            }
            .into(),
            attach: bpf
                .as_ref()
                .map(|bpf| bpf.attach_mode().as_str().to_owned()),
            xdp: None,
        };
        let range = self.conf.range(self.overlay.family);
        let routes = tunnel.is_none() || self.conf.backend.vxlan.direct_routing;
        let direct = range.filter(|_| routes).map(|(network, _)| Direct {
            uplink: self.uplink.index,
            network,
        });
        let desired = Desired {
            tunnel,
            direct,
            own: BTreeSet::new(),
            peers: None,
            bpf: settings,
            pods: None,
        };
        Ok(Up {
            made: !there && !alone,
            dataplane: Dataplane::new(
                self.net.clone(),
                bpf,
                (self.overlay, self.local),
                &self.args.cni_cache_dir,
            ),
            desired,
            path,
        })
    }

    /// Why there is no kernel vxlan device, and the name of the veth peer to use instead; `None` when there is one.
    async fn refused(
        &self,
        rung: &Rung,
        tunnel: &Tunnel,
    ) -> Result<Option<(String, String)>, StartError> {
        let forced = self.args.bpf_device == DeviceChoice::Veth;
        let vxlan = if forced {
            Some("--bpf-device=veth was given".to_owned())
        } else {
            self.try_vxlan(tunnel).await?
        };
        let Some(vxlan) = vxlan else { return Ok(None) };
        match rung {
            Rung::Bpf(_) => {
                let peer = self.overlay.far_end()?;
                Ok(Some((vxlan, peer)))
            }
            Rung::Kernel(reason) if forced => Err(StartError::NoBpf {
                flag: "--bpf-device=veth",
                reason: reason.clone(),
            }),
            Rung::Kernel(reason) => Err(StartError::NoPath {
                vxlan,
                bpf: reason.clone(),
            }),
        }
    }

    /// Whether the kernel makes vxlan devices: `None` if it does (one is there then), else why not.
    async fn try_vxlan(&self, tunnel: &Tunnel) -> Result<Option<String>, StartError> {
        if let Some(device) = self.net.device(&tunnel.name, self.overlay.family).await? {
            if self.args.bpf_device == DeviceChoice::Auto
                && matches!(device.kind, ObservedKind::Veth { .. })
            {
                return self.try_elsewhere(tunnel).await;
            }
            // If it is none of ours the planner says what is wrong with it.
            return Ok(None);
        }
        match self.create(tunnel).await? {
            None => {
                tracing::info!("create device {}", tunnel.name);
                Ok(None)
            }
            Some(reason) if self.args.bpf_device == DeviceChoice::Auto => Ok(Some(reason)),
            Some(reason) => Err(StartError::NoPath {
                vxlan: reason,
                bpf: "--bpf-device=vxlan forbids doing without".into(),
            }),
        }
    }

    /// Creates a vxlan device: `None` when it is there, else why the kernel makes none and what to do about that.
    async fn create(&self, tunnel: &Tunnel) -> Result<Option<String>, StartError> {
        let Err(error) = self.net.create_device(tunnel).await else {
            return Ok(None);
        };
        match error.errno() {
            // The kernel has asked for the module by its alias already.
            Some(libc::EOPNOTSUPP) => {}
            Some(libc::EEXIST) => {
                return Err(StartError::Unsupported {
                    origin: "this node".into(),
                    reason: format!(
                        "{}: another vxlan device has the same VNI and port: remove it or choose another VNI",
                        chain(&error)
                    ),
                });
            }
            _ => return Err(error.into()),
        }
        let host = kernel_modules::host(Feature::Vxlan);
        let tried = match kernel_modules::load_feature(Feature::Vxlan, &host).await {
            Ok(()) => match self.net.create_device(tunnel).await {
                Ok(()) => {
                    tracing::info!("loaded the kernel module vxlan");
                    return Ok(None);
                }
                Err(_) => "modprobe has loaded something else".to_owned(),
            },
            Err(failure) => failure,
        };
        Ok(Some(format!(
            "the kernel refuses vxlan devices ({}; modprobe vxlan: {tried}): {}",
            chain(&error),
            host.advice(Feature::Vxlan)
        )))
    }

    /// Our veth pair has the name; a vxlan device under a passing name tells whether the kernel has learnt better since.
    pub(crate) async fn try_elsewhere(
        &self,
        tunnel: &Tunnel,
    ) -> Result<Option<String>, StartError> {
        let passing = Tunnel {
            // Never longer than the device's own name.
            name: format!("flan-{}", self.conf.backend.vxlan.vni),
            mac: None,
            ..tunnel.clone()
        };
        let refused = self.create(&passing).await?;
        if refused.is_none()
            && let Some(index) = self.net.index(&passing.name).await?
        {
            self.net.delete_device(index).await?;
        }
        Ok(refused)
    }
}
