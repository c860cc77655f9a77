//! Our filters on clsact qdiscs: found by priority, handle and kind, never by what they happen to do.

use flannel_core::{
    addr::{Family, IfIndex},
    mark::{self, Overlay},
    plan::{Device, Hook, ObservedKind},
};
use futures_util::TryStreamExt as _;
use rtnetlink::packet_route::tc::{TcAttribute, TcFilterBpfOption, TcHandle, TcMessage, TcOption};

use super::{Netlink, NetlinkError};

impl Netlink {
    /// The id of the program that the overlay's filter at this hook runs; `None` if there is no such filter.
    pub async fn filter_program(
        &self,
        hook: Hook,
        index: IfIndex,
        overlay: Overlay,
    ) -> Result<Option<u32>, NetlinkError> {
        Ok(self
            .filters(hook, index)
            .await?
            .iter()
            .filter(|filter| priority(filter) == overlay.tc_priority())
            .find_map(our_program))
    }

    /// The same of the program that encapsulates on this device. Zero, which no program has, if another one or none runs at the far end of
    /// a pair that needs it there too.
    pub async fn encapsulating_filter(
        &self,
        device: &Device,
        overlay: Overlay,
    ) -> Result<Option<u32>, NetlinkError> {
        let near = self
            .filter_program(Hook::ToOverlay, device.index, overlay)
            .await?;
        let ObservedKind::Veth { peer: Some(far) } = &device.kind else {
            return Ok(near);
        };
        if overlay.family != Family::V6 {
            return Ok(near);
        }
        let Some(far) = self.index(far).await? else {
            return Ok(near);
        };
        // What comes in there.
        let there = self.filter_program(Hook::FromOverlay, far, overlay).await?;
        Ok(near.map(|near| if there == Some(near) { near } else { 0 }))
    }

    async fn filters(&self, hook: Hook, index: IfIndex) -> Result<Vec<TcMessage>, NetlinkError> {
        let mut handle = self.handle.traffic_filter(index.get() as i32);
        let request = if hook.is_ingress() {
            handle.get().ingress()
        } else {
            handle.get().egress()
        };
        let _turn = self.turn().await;
        match request.execute().try_collect().await {
            Ok(filters) => Ok(filters),
            // No qdisc of that kind, no filters.
            Err(rtnetlink::Error::NetlinkError(message))
                if [-libc::EINVAL, -libc::ENOENT, -libc::ENODEV].contains(&message.raw_code()) =>
            {
                Ok(Vec::new())
            }
            Err(error) => Err(NetlinkError::new(
                format!("list tc filters of interface {}", index.get()),
                &error,
            )),
        }
    }
}

impl Netlink {
    /// Whether a clsact qdisc of this interface runs filters of others.
    pub async fn has_other_filters(&self, index: IfIndex) -> Result<bool, NetlinkError> {
        for hook in Hook::BASE {
            // One for each side.
            if self.filters(hook, index).await?.iter().any(is_of_others) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Deletes the clsact qdisc of an interface with all its filters.
    pub async fn delete_clsact(&self, index: IfIndex) -> Result<(), NetlinkError> {
        let mut request = self.handle.qdisc().del(index.get() as i32);
        request.message_mut().header.parent = TcHandle::CLSACT;
        request.execute().await.map_err(|error| {
            NetlinkError::new(
                format!("delete the clsact qdisc of interface {}", index.get()),
                &error,
            )
        })
    }
}

/// Our filter comes with a head of the same priority, which has no handle.
fn is_of_others(filter: &TcMessage) -> bool {
    let kind = filter
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            TcAttribute::Kind(name) => Some(name.as_str()),
            _ => None,
        });
    let ours = [mark::TC_PRIORITY, mark::TC_PRIORITY_V6];
    kind != Some(mark::TC_KIND) || !ours.contains(&priority(filter))
}

/// The upper half of `tcm_info` (`TC_H_MAJ`); the lower is the protocol.
fn priority(filter: &TcMessage) -> u16 {
    (filter.header.info >> 16) as u16
}

fn our_program(filter: &TcMessage) -> Option<u32> {
    let mut kind = None;
    let mut program = None;
    for attribute in &filter.attributes {
        match attribute {
            TcAttribute::Kind(name) => kind = Some(name.as_str()),
            TcAttribute::Options(options) => {
                program = program.or_else(|| {
                    options.iter().find_map(|option| match option {
                        TcOption::Bpf(TcFilterBpfOption::ProgId(id)) => Some(*id),
                        _ => None,
                    })
                });
            }
            _ => {}
        }
    }
    mark::is_our_filter(kind?, priority(filter), filter.header.handle.into()).then_some(program?)
}
