//! Our filters on clsact qdiscs: found by priority, handle and kind, never by what they happen to do.

use flannel_core::{addr::IfIndex, mark, plan::Hook};
use futures_util::TryStreamExt as _;
use rtnetlink::packet_route::tc::{TcAttribute, TcFilterBpfOption, TcMessage, TcOption};

use super::{Netlink, NetlinkError};

impl Netlink {
    /// The id of the program that our filter at this hook runs; `None` if there is no such filter.
    pub async fn filter_program(
        &self,
        hook: Hook,
        index: IfIndex,
    ) -> Result<Option<u32>, NetlinkError> {
        let mut handle = self.handle.traffic_filter(index.get() as i32);
        let request = match hook {
            Hook::ToOverlay => handle.get().egress(),
            Hook::FromWire => handle.get().ingress(),
        };
        let answer: Result<Vec<TcMessage>, _> = request.execute().try_collect().await;
        match answer {
            Ok(filters) => Ok(filters.iter().find_map(our_program)),
            // No qdisc of that kind, no filters.
            Err(rtnetlink::Error::NetlinkError(message))
                if [-libc::EINVAL, -libc::ENOENT, -libc::ENODEV].contains(&message.raw_code()) =>
            {
                Ok(None)
            }
            Err(error) => Err(NetlinkError::new(
                format!("list tc filters of interface {}", index.get()),
                &error,
            )),
        }
    }
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
    // The priority is the upper half of `tcm_info` (`TC_H_MAJ`), the protocol the lower.
    let priority = (filter.header.info >> 16) as u16;
    mark::is_our_filter(kind?, priority, filter.header.handle.into()).then_some(program?)
}
