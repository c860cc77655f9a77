//! The pair that stands in while the tunnel device changes its kind, see `flannel_core::plan`.

use std::time::Duration;

use flannel_core::{
    addr::IfIndex,
    mark,
    plan::{Desired, DeviceKind, ObservedKind, Op},
};
use tokio::time::sleep;

use super::{Dataplane, DataplaneError};

/// How long packets may be under way through a device that nothing leads to any more. A device that goes takes those along that wait
/// in a queue of the kernel's.
const UNDER_WAY: Duration = Duration::from_millis(50);

impl Dataplane {
    /// Reads the pair, if there is one.
    pub(super) async fn observe_stand_in(
        &mut self,
        desired: &Desired,
    ) -> Result<(), DataplaneError> {
        self.seen.stand_in = match desired
            .tunnel
            .as_ref()
            .and_then(|tunnel| mark::stand_in(&tunnel.name))
        {
            Some((name, _)) => self.net.device(&name, self.overlay.family).await?,
            None => None,
        };
        Ok(())
    }

    /// Reads what is attached to the pair.
    pub(super) async fn observe_stand_in_program(&mut self) -> Result<(), DataplaneError> {
        let Some(device) = &self.seen.stand_in else {
            return Ok(());
        };
        let index = device.index;
        let filter = self.net.encapsulating_filter(device, self.overlay).await?;
        if let (Some(bpf), Some(state)) = (&mut self.bpf, &mut self.seen.bpf) {
            state.stand_in = bpf.stand_in_attachment(index, filter);
        }
        Ok(())
    }

    pub(super) fn stand_in(&self) -> Option<IfIndex> {
        self.seen.stand_in.as_ref().map(|device| device.index)
    }

    /// Makes one change to the pair.
    pub(super) async fn apply_to_stand_in(&mut self, op: &Op) -> Result<(), DataplaneError> {
        match op {
            Op::Attach { ifindex, .. } => Ok(self.bpf_for(op)?.attach_stand_in(*ifindex)?),
            Op::DeleteDevice { index, .. } => {
                self.delete(*index).await?;
                if let Some(bpf) = &self.bpf {
                    bpf.forget_stand_in()?;
                }
                Ok(())
            }
            op => {
                let kind = match self.seen.stand_in.as_ref().map(|device| &device.kind) {
                    Some(ObservedKind::Veth { peer: Some(peer) }) => peer.clone(),
                    _ => String::new(),
                };
                let kind = DeviceKind::Veth { peer: kind };
                self.apply_to(op, Some(&kind), self.stand_in()).await
            }
        }
    }

    /// Deletes a device, once what is under way through it has arrived where another one carries on.
    pub(super) async fn delete(&self, index: IfIndex) -> Result<(), DataplaneError> {
        if self.seen.stand_in.is_some() {
            sleep(UNDER_WAY).await;
        }
        Ok(self.net.delete_device(index).await?)
    }
}
