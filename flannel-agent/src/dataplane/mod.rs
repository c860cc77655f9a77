//! The kernel, as the reconcile loop sees it: read everything that is ours, change one thing.
//!
//! One task owns this. It must never decide anything: `flannel_core::plan` does.

pub mod bpf;
mod cni;
pub mod fragments;
mod headroom;
pub mod netlink;
pub(crate) mod offload;
mod pods;
mod stand_in;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    path::Path,
    time::Instant,
};

use flannel_core::{
    addr::{Family, IfIndex},
    mark::Overlay,
    plan::{Attachment, BpfState, Desired, DeviceKind, Hook, Observed, Op, Settings},
    pods::PodSources,
    xdp::Sample,
};
use ipnet::IpNet;
use thiserror::Error;

use bpf::{AttachMode, Bpf, BpfError};
use netlink::{Change, Netlink, NetlinkError};
pub use pods::PodNews;
use pods::PodWatch;

/// A change or a look that failed.
#[derive(Debug, Error)]
pub enum DataplaneError {
    /// The kernel's own objects.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// The eBPF half.
    #[error(transparent)]
    Bpf(#[from] BpfError),
    /// A plan that asks for eBPF when there is none.
    #[error("{0}, but eBPF is not in use")]
    NoBpf(String),
    /// A plan that names the device when there is none.
    #[error("{0}, but there is no tunnel device")]
    NoDevice(String),
}

/// How much a look takes in. The rest is as it was at the last look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Scope {
    /// The pods of this node, their map entries and programs.
    Pods,
    /// The map entries in use, and what is attached.
    Maps,
    /// Those, and everything the kernel notifies about.
    Kernel,
    /// Those, and every map entry, if it is time for that.
    Everything,
}

/// The handles to the kernel.
#[derive(Debug)]
pub struct Dataplane {
    net: Netlink,
    bpf: Option<Bpf>,
    overlay: Overlay,
    local: IpAddr,
    /// The last look.
    seen: Observed,
    /// Whether there was one yet.
    looked: bool,
    /// Whether the last look found everything as the one before; not known of looks at the kernel's own objects.
    unchanged: bool,
    /// When every entry of the maps was read.
    scanned: Option<Instant>,
    /// Interfaces whose notifications matter: the tunnel device, the uplink, and those towards peers.
    interests: BTreeSet<IfIndex>,
    /// Next hops that the kernel was asked to confirm and has not yet.
    asked: BTreeSet<(IfIndex, IpAddr)>,
    pods: PodWatch,
    /// The kernel would not make the headroom device.
    headroom_refused: bool,
}

impl Dataplane {
    /// Takes over the handles. `local` is our address on the underlay, `cni_dir` the cache directory of CNI.
    pub fn new(
        net: Netlink,
        bpf: Option<Bpf>,
        (overlay, local): (Overlay, IpAddr),
        cni_dir: &Path,
    ) -> Self {
        Self {
            net,
            bpf,
            overlay,
            local,
            seen: Observed::default(),
            looked: false,
            unchanged: false,
            scanned: None,
            interests: BTreeSet::new(),
            asked: BTreeSet::new(),
            pods: PodWatch::new(cni_dir),
            headroom_refused: false,
        }
    }

    /// Ends before anything was attached: what was loaded goes, and with it the device of that name.
    pub async fn take_back(self, device: Option<&String>) -> Result<(), DataplaneError> {
        if let Some(bpf) = self.bpf {
            bpf.discard();
        }
        if let Some(name) = device
            && let Some(index) = self.net.index(name).await?
        {
            self.net.delete_device(index).await?;
        }
        Ok(())
    }

    /// Reads what is ours, and what it depends on. Pods are read only while the gate is not off.
    pub async fn observe(
        &mut self,
        desired: &Desired,
        scope: Scope,
    ) -> Result<&Observed, DataplaneError> {
        let scope = if self.looked {
            scope
        } else {
            Scope::Everything
        };
        self.unchanged = scope <= Scope::Maps;
        if scope >= Scope::Kernel {
            self.observe_kernel(desired).await?;
        }
        if scope >= Scope::Maps {
            self.observe_bpf(desired, scope == Scope::Everything)
                .await?;
        }
        self.observe_pods(desired, scope).await?;
        self.looked = true;
        Ok(&self.seen)
    }

    async fn observe_pods(
        &mut self,
        desired: &Desired,
        scope: Scope,
    ) -> Result<(), DataplaneError> {
        let Some(bpf) = &mut self.bpf else {
            return Ok(());
        };
        let settings = desired.bpf.as_ref();
        let gate_is_off = settings.is_none_or(|settings| settings.gate.is_off());
        match own_subnet(desired) {
            Some(own) if !gate_is_off => {
                if scope >= Scope::Kernel || self.pods.is_stale() {
                    self.pods.read(&self.net, own).await?;
                }
            }
            _ => self.pods.rest(),
        }
        let mut hooks = Vec::new();
        for (hook, ifindex) in bpf.pod_hooks() {
            let filter = match bpf.attach_mode() {
                AttachMode::Clsact => self.net.filter_program(hook, ifindex, self.overlay).await?,
                AttachMode::Tcx => None,
            };
            hooks.push((hook, ifindex, filter));
        }
        let (pods, pod_hooks) = bpf.observe_pods(&hooks)?;
        if let Some(state) = &mut self.seen.bpf {
            self.unchanged &= state.pods == pods && state.pod_hooks == pod_hooks;
            state.pods = pods;
            state.pod_hooks = pod_hooks;
        }
        Ok(())
    }

    /// The address family of what is carried.
    pub const fn family(&self) -> Family {
        self.overlay.family
    }

    /// What was last read.
    pub const fn seen(&self) -> &Observed {
        &self.seen
    }

    /// Whether the last look found everything as the one before had. False of a look that might have.
    pub const fn is_unchanged(&self) -> bool {
        self.unchanged
    }

    /// What the node knows of its pods; `None` while it was not read.
    pub const fn pod_sources(&self) -> Option<&PodSources> {
        self.pods.sources()
    }

    /// For what else is known of the pods.
    pub(crate) const fn pod_sources_mut(&mut self) -> Option<&mut PodSources> {
        self.pods.sources_mut()
    }

    /// Has the next look read the pods, whatever the notifications said.
    pub(crate) const fn doubt_pods(&mut self) {
        self.pods.doubt();
    }

    /// What a notification means for the pods.
    pub fn pod_news(&mut self, change: &Change) -> PodNews {
        self.pods.news(change)
    }

    /// Why the kernel does not take the programs of the flow gate, if it does not.
    pub fn gate_obstacle(&self) -> Option<String> {
        let obstacle = self.bpf.as_ref()?.gate_obstacle()?;
        Some(format!("its programs cannot be loaded: {obstacle}"))
    }

    /// How programs are attached; `None` without eBPF.
    pub fn attach_mode(&self) -> Option<AttachMode> {
        self.bpf.as_ref().map(Bpf::attach_mode)
    }

    /// The flow gate's epoch that is in place, see [`Bpf::epoch`].
    pub fn epoch(&self) -> Result<u32, DataplaneError> {
        Ok(match &self.bpf {
            Some(bpf) => bpf.epoch()?,
            None => 0,
        })
    }

    /// Says that the maps are kept, see [`Bpf::keep`].
    pub fn keep(&mut self, desired: &Desired) -> Result<(), DataplaneError> {
        let tunnel = desired.tunnel.as_ref();
        let alone = tunnel.is_some_and(|tunnel| matches!(tunnel.kind, DeviceKind::Veth { .. }))
            || self.seen.stand_in.is_some();
        match &mut self.bpf {
            // Until all peers are known, what an earlier run left may be of the past.
            Some(bpf) if alone || desired.peers.is_some() => Ok(bpf.keep(alone)?),
            _ => Ok(()),
        }
    }

    /// What shows whether native XDP runs; `None` where it is not attached.
    pub fn xdp_sample(&self) -> Result<Option<Sample>, DataplaneError> {
        let there = self.seen.bpf.as_ref().and_then(|state| state.xdp);
        match &self.bpf {
            Some(bpf) if there.is_some_and(|there| there.current) => Ok(Some(bpf.xdp_sample()?)),
            _ => Ok(None),
        }
    }

    /// Takes pods away whose interface is gone, without a look.
    pub fn drop_pods(&mut self, addresses: &[IpAddr]) -> Result<(), DataplaneError> {
        let Some(bpf) = &mut self.bpf else {
            return Ok(());
        };
        for address in addresses {
            bpf.del_pod(*address)?;
            if let Some(state) = &mut self.seen.bpf {
                state.pods.remove(address);
            }
        }
        Ok(())
    }

    async fn observe_kernel(&mut self, desired: &Desired) -> Result<(), DataplaneError> {
        self.seen.device = match &desired.tunnel {
            Some(tunnel) => self.net.device(&tunnel.name, self.overlay.family).await?,
            None => None,
        };
        self.observe_stand_in(desired).await?;
        self.interests = self.tunnel().into_iter().collect();
        let direct = desired.direct.as_ref().map(|direct| direct.uplink);
        if let Some(network) = desired.network() {
            self.seen.links = self.net.link_routes(network, direct).await?;
        }
        let bpf = desired.bpf.as_ref().map(|settings| settings.uplink);
        let Some(uplink) = direct.or(bpf) else {
            return Ok(());
        };
        let vteps: BTreeSet<IpAddr> = desired
            .peers
            .iter()
            .flat_map(|peers| peers.values().map(|peer| peer.vtep))
            .collect();
        let underlay = Box::pin(self.net.underlay(self.local, vteps)).await?;
        // Where the stack sends everything, it asks by itself.
        let unconfirmed = underlay.unconfirmed.difference(&self.asked);
        for (ifindex, address) in unconfirmed.filter(|_| bpf.is_some()) {
            // A failure here only means that the kernel path carries this peer a little longer.
            if let Err(error) = self.net.confirm(*ifindex, *address).await {
                tracing::debug!(%error, "confirm a next hop");
            }
        }
        self.asked = underlay.unconfirmed;
        self.interests.insert(uplink);
        self.interests
            .extend(underlay.next_hops.values().map(|hop| hop.ifindex));
        self.seen.underlay = underlay.next_hops;
        Ok(())
    }

    async fn observe_bpf(&mut self, desired: &Desired, full: bool) -> Result<(), DataplaneError> {
        let tunnel = self.tunnel();
        let (Some(bpf), Some(settings)) = (&mut self.bpf, &desired.bpf) else {
            return Ok(());
        };
        let mut hooks = Vec::new();
        for (hook, ifindex) in [
            (Hook::ToOverlay, tunnel),
            (Hook::FromWire, Some(settings.uplink)),
            (Hook::FromOverlay, tunnel),
            (Hook::ToLink, Some(settings.uplink)),
        ] {
            let Some(ifindex) = ifindex else { continue };
            let filter = match (bpf.attach_mode(), &self.seen.device) {
                (AttachMode::Clsact, Some(device)) if hook == Hook::ToOverlay => {
                    self.net.encapsulating_filter(device, self.overlay).await?
                }
                (AttachMode::Clsact, _) => {
                    self.net.filter_program(hook, ifindex, self.overlay).await?
                }
                (AttachMode::Tcx, _) => None,
            };
            hooks.push((hook, ifindex, filter));
        }
        let full = full
            && self
                .scanned
                .is_none_or(|scanned| scanned.elapsed() >= bpf.scan_interval());
        let before = &mut self.seen.bpf;
        let rest = before.as_ref().map(Rest::of);
        let (pods, pod_hooks) = before.as_ref().map_or_else(Default::default, |before| {
            (before.pods.clone(), before.pod_hooks.clone())
        });
        let mut state = bpf.observe(settings.uplink, &hooks, full, before)?;
        if full {
            self.scanned = Some(Instant::now());
        }
        let is_settled = rest == Some(Rest::of(&state)) && bpf.is_unchanged();
        // While a pair stands in, there is always something to do.
        self.unchanged &= is_settled && self.seen.stand_in.is_none();
        // Until they are read, too.
        (state.pods, state.pod_hooks) = (pods, pod_hooks);
        self.seen.bpf = Some(state);
        self.observe_stand_in_program().await
    }

    /// Interfaces whose notifications matter.
    pub const fn interests(&self) -> &BTreeSet<IfIndex> {
        &self.interests
    }

    fn tunnel(&self) -> Option<IfIndex> {
        self.seen.device.as_ref().map(|device| device.index)
    }

    /// Lets next hops be asked for again that have not answered.
    pub fn forget_asked(&mut self) {
        self.asked.clear();
    }

    /// Makes one change.
    pub async fn apply(
        &mut self,
        op: &Op,
        kind: Option<&DeviceKind>,
    ) -> Result<(), DataplaneError> {
        match op {
            Op::StandIn(op) => self.apply_to_stand_in(op).await,
            op => self.apply_to(op, kind, self.tunnel()).await,
        }
    }

    /// Makes one change, with this device as the tunnel device.
    async fn apply_to(
        &mut self,
        op: &Op,
        kind: Option<&DeviceKind>,
        device: Option<IfIndex>,
    ) -> Result<(), DataplaneError> {
        let net = &self.net;
        let tunnel = device.ok_or_else(|| DataplaneError::NoDevice(op.to_string()));
        match op {
            // One that stands in for what stands in there is none.
            Op::StandIn(_) => {}
            Op::Attach { hook, ifindex } => {
                let filter = net.filter_program(*hook, *ifindex, self.overlay).await?;
                self.bpf_for(op)?.attach(*hook, *ifindex, filter)?;
            }
            Op::Detach { hook, ifindex } => {
                let filter = net.filter_program(*hook, *ifindex, self.overlay).await?;
                self.bpf_for(op)?.detach(*hook, *ifindex, filter)?;
            }
            Op::AttachXdp { ifindex } => self.bpf_for(op)?.attach_xdp(*ifindex)?,
            Op::DetachXdp { .. } => self.bpf_for(op)?.detach_xdp()?,
            Op::PutPod { address, pod } => self.bpf_for(op)?.put_pod(*address, pod)?,
            Op::DelPod { address } => self.bpf_for(op)?.del_pod(*address)?,
            Op::CreateDevice(tunnel) => net.create_device(tunnel).await?,
            Op::DeleteDevice { index, .. } => self.delete(*index).await?,
            Op::SetMtu { index, mtu } => {
                if let Some(DeviceKind::Veth { peer }) = kind {
                    net.set_mtu_of(peer, *mtu).await?;
                }
                net.set_mtu(*index, *mtu).await?;
            }
            Op::SetMac { index, mac } => net.set_mac(*index, *mac).await?,
            Op::SetUp { index } => {
                if let Some(bpf) = &self.bpf {
                    bpf.prepare(*index);
                }
                let none = || DataplaneError::NoDevice(op.to_string());
                net.set_up(*index, kind.ok_or_else(none)?).await?;
            }
            Op::PutAddress { index, address } => net.put_address(*index, *address).await?,
            Op::DelAddress { index, address } => net.del_address(*index, *address).await?,
            Op::PutFdb { mac, vtep } => net.put_fdb(tunnel?, *mac, *vtep).await?,
            Op::DelFdb { mac, vtep } => net.del_fdb(tunnel?, *mac, *vtep).await?,
            Op::PutNeighbour { address, mac } => {
                net.put_neighbour(tunnel?, *address, *mac).await?;
            }
            Op::DelNeighbour { address } => {
                net.del_neighbour(tunnel?, *address).await?;
            }
            Op::PutRoute {
                subnet,
                gateway,
                mtu,
            } => {
                net.put_route(tunnel?, *subnet, *gateway, *mtu).await?;
            }
            Op::DelRoute { subnet } => net.del_route(tunnel?, *subnet).await?,
            Op::PutLinkRoute {
                subnet,
                gateway,
                ifindex,
                ..
            } => net.put_link_route(*ifindex, *subnet, *gateway).await?,
            Op::DelLinkRoute {
                subnet,
                gateway,
                ifindex,
            } => net.del_link_route(*ifindex, *subnet, *gateway).await?,
            Op::PutNode { id, node } => self.bpf_for(op)?.put_node(*id, node)?,
            Op::ClearNode { id } => self.bpf_for(op)?.clear_node(*id)?,
            Op::PutSubnet { index, id } => self.bpf_for(op)?.put_subnet(*index, *id)?,
            Op::ClearSubnet { index } => self.bpf_for(op)?.clear_subnet(*index)?,
            Op::PutSettings(settings) => self.bpf_for(op)?.put_settings(settings)?,
        }
        Ok(())
    }

    fn bpf_for(&mut self, op: &Op) -> Result<&mut Bpf, DataplaneError> {
        self.bpf
            .as_mut()
            .ok_or_else(|| DataplaneError::NoBpf(op.to_string()))
    }
}

/// What there is of eBPF beside the entries of maps.
#[derive(PartialEq, Eq)]
struct Rest {
    settings: Option<Settings>,
    attached: BTreeMap<Hook, Attachment>,
    xdp: Option<Attachment>,
}

impl Rest {
    fn of(state: &BpfState) -> Self {
        Self {
            settings: state.settings.clone(),
            attached: state.attached.clone(),
            xdp: state.xdp,
        }
    }
}

/// This node's subnet.
fn own_subnet(desired: &Desired) -> Option<IpNet> {
    desired.own.first().copied()
}
