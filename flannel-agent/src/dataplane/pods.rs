//! A watch over the bridge that pods hang on: what was last read, and whether a notification says anything else.

use std::path::Path;

use flannel_core::{
    addr::IfIndex,
    pods::{Bridge, PodSources},
};
use ipnet::IpNet;

use super::{
    cni::CniCache,
    netlink::{Change, LinkChange, NeighbourChange, Netlink, NetlinkError},
};

/// What a notification means for the pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PodNews {
    /// Nothing that is not known.
    Nothing,
    /// Look at the pods again.
    Changed,
    /// An interface is no port of the bridge any more: whatever was behind it is gone.
    Gone(IfIndex),
}

/// What was last read.
#[derive(Debug)]
pub(super) struct PodWatch {
    cni: CniCache,
    /// `None` until something was read, and while nobody wants to know.
    sources: Option<PodSources>,
    stale: bool,
}

impl PodWatch {
    pub(super) fn new(cni_dir: &Path) -> Self {
        Self {
            cni: CniCache::new(cni_dir),
            sources: None,
            stale: false,
        }
    }

    pub(super) const fn sources(&self) -> Option<&PodSources> {
        self.sources.as_ref()
    }

    pub(super) const fn sources_mut(&mut self) -> Option<&mut PodSources> {
        self.sources.as_mut()
    }

    /// Something else than a notification has said that there is news.
    pub(super) const fn doubt(&mut self) {
        self.stale = true;
    }

    /// Whether notifications have said something that was not read since.
    pub(super) const fn is_stale(&self) -> bool {
        self.stale || self.sources.is_none()
    }

    /// Forgets everything, because nobody wants to know.
    pub(super) fn rest(&mut self) {
        self.sources = None;
        self.stale = false;
    }

    /// Reads everything anew. If that fails, what is known stays as it was.
    pub(super) async fn read(&mut self, net: &Netlink, own: IpNet) -> Result<(), NetlinkError> {
        // What a notification says from here on may be in what is read or not.
        self.stale = false;
        match net.pod_sources(own).await {
            Ok(mut sources) => {
                sources.cni = self.cni.pods();
                self.sources = Some(sources);
                Ok(())
            }
            Err(error) => {
                self.stale = true;
                Err(error)
            }
        }
    }

    /// Compares a notification with what is known.
    pub(super) fn news(&mut self, change: &Change) -> PodNews {
        let Some(sources) = &mut self.sources else {
            return PodNews::Nothing;
        };
        let news = match change {
            Change::Link(link) => link_news(sources, link),
            Change::Neighbour(neighbour) => neighbour_news(sources, neighbour),
            Change::Address(index) => match sources.bridge {
                Some(bridge) if bridge.index.get() != *index => PodNews::Nothing,
                _ => PodNews::Changed,
            },
            Change::Route => PodNews::Nothing,
            Change::Missed => PodNews::Changed,
        };
        // Of a port that is gone nothing is to be read.
        self.stale |= news == PodNews::Changed;
        news
    }
}

fn link_news(sources: &mut PodSources, link: &LinkChange) -> PodNews {
    let Some(Bridge { index: bridge, .. }) = sources.bridge else {
        // The bridge shows when it gets its address.
        return PodNews::Nothing;
    };
    let Ok(index) = IfIndex::try_from(link.index) else {
        return PodNews::Nothing;
    };
    if index == bridge {
        return PodNews::Changed;
    }
    if !link.gone && link.bridge == Some(bridge.get()) {
        return PodNews::Changed;
    }
    match sources.ports.remove(&index) {
        Some(_port) => {
            sources.fdb.retain(|_, port| *port != index);
            PodNews::Gone(index)
        }
        None => PodNews::Nothing,
    }
}

/// Entries that go say nothing: a pod that is idle stays, and one that is gone takes its port along.
fn neighbour_news(sources: &PodSources, change: &NeighbourChange) -> PodNews {
    let Ok(index) = IfIndex::try_from(change.index) else {
        return PodNews::Nothing;
    };
    let on_bridge = sources.bridge.is_some_and(|bridge| bridge.index == index);
    let moved = change.neighbour.is_some_and(|(address, mac)| {
        on_bridge
            && sources.own.contains(&address)
            && sources.neighbours.get(&address) != Some(&mac)
    });
    let heard = change.heard.is_some_and(|mac| {
        sources.ports.contains_key(&index) && sources.fdb.get(&mac) != Some(&index)
    });
    if moved || heard {
        PodNews::Changed
    } else {
        PodNews::Nothing
    }
}

#[cfg(test)]
mod tests {
    use std::{
        collections::BTreeMap,
        net::{IpAddr, Ipv4Addr},
    };

    use flannel_core::{addr::VtepMac, pods::Port};

    use super::*;

    fn index(number: u32) -> IfIndex {
        IfIndex::try_from(number).unwrap()
    }

    fn mac(number: u8) -> VtepMac {
        VtepMac::new([2, 0, 0, 0, 5, number])
    }

    fn pod(host: u8) -> IpAddr {
        Ipv4Addr::new(10, 5, 1, host).into()
    }

    fn watch() -> PodWatch {
        let port = Port {
            name: "veth2".into(),
            mtu: 1450,
            is_veth: true,
            up: true,
        };
        PodWatch {
            cni: CniCache::new(Path::new("/nonexistent")),
            sources: Some(PodSources {
                bridge: Some(Bridge {
                    index: index(9),
                    mac: mac(100),
                    mtu: 1450,
                }),
                ports: BTreeMap::from([(index(20), port)]),
                neighbours: BTreeMap::from([(pod(2), mac(2))]),
                fdb: BTreeMap::from([(mac(2), index(20))]),
                cni: Vec::new(),
                own: "10.5.1.0/24".parse().unwrap(),
            }),
            stale: false,
        }
    }

    fn link(index: u32, bridge: Option<u32>, gone: bool) -> Change {
        Change::Link(LinkChange {
            index,
            name: None,
            bridge,
            gone,
        })
    }

    fn neighbour(host: u8, with: u8) -> Change {
        Change::Neighbour(NeighbourChange {
            index: 9,
            neighbour: Some((pod(host), mac(with))),
            heard: None,
        })
    }

    fn heard(port: u32, with: u8) -> Change {
        Change::Neighbour(NeighbourChange {
            index: port,
            neighbour: None,
            heard: Some(mac(with)),
        })
    }

    #[test]
    fn what_is_known_is_no_news() {
        for (change, news) in [
            (neighbour(2, 2), PodNews::Nothing),
            (neighbour(2, 3), PodNews::Changed),
            (neighbour(3, 3), PodNews::Changed),
            (heard(20, 2), PodNews::Nothing),
            (heard(20, 3), PodNews::Changed),
            (heard(7, 3), PodNews::Nothing),
            (link(7, None, false), PodNews::Nothing),
            (link(7, None, true), PodNews::Nothing),
            (link(21, Some(9), false), PodNews::Changed),
            (link(9, None, false), PodNews::Changed),
            (link(20, Some(9), true), PodNews::Gone(index(20))),
            (link(20, None, true), PodNews::Gone(index(20))),
            (link(20, None, false), PodNews::Gone(index(20))),
            (Change::Address(9), PodNews::Changed),
            (Change::Address(7), PodNews::Nothing),
            (Change::Route, PodNews::Nothing),
            (Change::Missed, PodNews::Changed),
        ] {
            let mut watch = watch();
            assert_eq!(watch.news(&change), news, "{change:?}");
            assert_eq!(watch.is_stale(), news == PodNews::Changed, "{change:?}");
        }
    }

    #[test]
    fn a_port_goes_once() {
        let mut watch = watch();
        assert_eq!(watch.news(&link(20, None, true)), PodNews::Gone(index(20)));
        assert_eq!(watch.news(&link(20, None, true)), PodNews::Nothing);
    }

    #[test]
    fn while_nobody_wants_to_know_nothing_is_news() {
        let mut watch = watch();
        watch.rest();
        assert_eq!(watch.news(&Change::Missed), PodNews::Nothing);
    }
}
