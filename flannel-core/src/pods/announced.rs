//! Pods that the CNI plugin has announced and the loop has not learnt yet, and pods that are about to go.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    time::Duration,
};

use super::{Pod, PodSources, cni::CniPod, report::Report};
use crate::addr::IfIndex;

/// Announcements that are remembered at a time. Pods beyond are found without one.
const MOST: usize = 1024;
/// How long a pod that was said to go stays with the stack. One that is there after that has not gone.
const FAREWELL: Duration = Duration::from_secs(10);

/// A container's id and the name of its interface.
type Attachment = (String, String);

/// What the plugin has said and the kernel has yet to bear out.
#[derive(Clone, Debug, Default)]
pub struct Announced {
    coming: BTreeMap<Attachment, Vec<CniPod>>,
    /// Until when, on the caller's clock.
    leaving: BTreeMap<IfIndex, Duration>,
}

impl Announced {
    /// A pod was made.
    pub fn come(&mut self, report: &Report, sources: Option<&PodSources>) {
        let key = key(report);
        if self.coming.len() < MOST || self.coming.contains_key(&key) {
            self.coming.insert(key, report.pods.clone());
        }
        // Interfaces come again under their name, with another index; a repeated ADD has the same.
        let here = sources.into_iter().flat_map(|sources| &sources.ports);
        for (index, port) in here {
            if report
                .pods
                .iter()
                .any(|pod| pod.host_interfaces.contains(&port.name))
            {
                self.leaving.remove(index);
            }
        }
    }

    /// A pod is about to go: the interfaces behind which nothing may be carried any more. Only those count whose pod is known with the
    /// address and the interface that were said.
    pub fn go(
        &mut self,
        report: &Report,
        known: &BTreeMap<IpAddr, Pod>,
        sources: &PodSources,
        now: Duration,
    ) -> BTreeSet<IfIndex> {
        let announced = self.coming.remove(&key(report)).unwrap_or_default();
        let going: BTreeSet<IfIndex> = report
            .pods
            .iter()
            .chain(&announced)
            .filter_map(|pod| {
                let index = known.get(&pod.address)?.ifindex;
                let port = sources.ports.get(&index)?;
                pod.host_interfaces.contains(&port.name).then_some(index)
            })
            .collect();
        for index in &going {
            self.leaving.insert(*index, now + FAREWELL);
        }
        going
    }

    /// Adds what was announced to what was read. Forgotten are those whose interface is not among the ports, and those that say another
    /// MAC address of a pod that is known behind that interface.
    pub fn extend(&mut self, sources: &mut PodSources, known: &BTreeMap<IpAddr, Pod>) {
        let contradicts = |pod: &CniPod| {
            let Some(is) = known.get(&pod.address) else {
                return false;
            };
            let port = sources.ports.get(&is.ifindex);
            is.mac != pod.mac && port.is_some_and(|port| pod.host_interfaces.contains(&port.name))
        };
        self.coming.retain(|_, pods| !pods.iter().any(contradicts));
        let ports: BTreeSet<&str> = sources
            .ports
            .values()
            .map(|port| port.name.as_str())
            .collect();
        self.coming.retain(|_, pods| {
            pods.iter()
                .flat_map(|pod| &pod.host_interfaces)
                .any(|name| ports.contains(name.as_str()))
        });
        for pod in self.coming.values().flatten() {
            if !sources.cni.contains(pod) {
                sources.cni.push(pod.clone());
            }
        }
    }

    /// The interfaces whose pods are about to go and have not yet.
    pub fn leaving(&mut self, sources: &PodSources, now: Duration) -> BTreeSet<IfIndex> {
        self.leaving
            .retain(|index, until| sources.ports.contains_key(index) && now < *until);
        self.leaving.keys().copied().collect()
    }

    /// Forgets the announcements of pods that are known.
    pub fn settle(&mut self, known: &BTreeMap<IpAddr, Pod>) {
        self.coming.retain(|_, pods| !all_known(pods, known));
    }

    /// Forgets everything, because nobody wants to know.
    pub fn clear(&mut self) {
        self.coming.clear();
        self.leaving.clear();
    }
}

/// Whether every one of these pods is known with its MAC address.
pub fn all_known(pods: &[CniPod], known: &BTreeMap<IpAddr, Pod>) -> bool {
    pods.iter()
        .all(|pod| known.get(&pod.address).is_some_and(|is| is.mac == pod.mac))
}

fn key(report: &Report) -> Attachment {
    (report.container.clone(), report.ifname.clone())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pods::{Bridge, PodTable, Port};

    const NOW: Duration = Duration::from_secs(100);

    fn index(number: u32) -> IfIndex {
        IfIndex::try_from(number).unwrap()
    }

    fn report(container: &str, host: u8, veth: &str) -> Report {
        Report {
            container: container.into(),
            ifname: "eth0".into(),
            pods: vec![CniPod {
                address: std::net::Ipv4Addr::new(10, 5, 1, host).into(),
                mac: [2, 0, 0, 0, 5, host].into(),
                host_interfaces: vec!["cni0".into(), veth.into()],
            }],
        }
    }

    fn sources(ports: &[(u32, &str)]) -> PodSources {
        let port = |name: &str| Port {
            name: name.into(),
            mtu: 1450,
            is_veth: true,
            up: true,
        };
        PodSources {
            bridge: Some(Bridge {
                index: index(9),
                mac: [2, 0, 0, 0, 5, 100].into(),
                mtu: 1450,
            }),
            ports: ports
                .iter()
                .map(|(at, name)| (index(*at), port(name)))
                .collect(),
            neighbours: BTreeMap::new(),
            fdb: BTreeMap::new(),
            cni: Vec::new(),
            own: "10.5.1.0/24".parse().unwrap(),
        }
    }

    fn learn(announced: &mut Announced, table: &mut PodTable, sources: &PodSources) -> usize {
        let mut sources = sources.clone();
        announced.extend(&mut sources, table.pods());
        let leaving = announced.leaving(&sources, NOW);
        let known = table.learn(&sources, &leaving).clone();
        announced.settle(&known);
        known.len()
    }

    #[test]
    fn an_announced_pod_is_known_before_it_was_heard() {
        let (mut announced, mut table) = (Announced::default(), PodTable::default());
        let there = sources(&[(20, "veth2")]);
        announced.come(&report("a", 2, "veth2"), Some(&there));
        assert_eq!(learn(&mut announced, &mut table, &there), 1);
        assert!(
            announced.coming.is_empty(),
            "what is known need not be remembered"
        );
        assert_eq!(learn(&mut announced, &mut table, &there), 1);
    }

    #[test]
    fn what_the_kernel_does_not_bear_out_is_forgotten() {
        let (mut announced, mut table) = (Announced::default(), PodTable::default());
        for (container, host, veth) in [("a", 2, "veth9"), ("b", 1, "veth2"), ("c", 2, "cni0")] {
            announced.come(&report(container, host, veth), None);
        }
        let mut stranger = report("d", 3, "veth2");
        stranger.pods[0].address = std::net::Ipv4Addr::new(10, 5, 2, 3).into();
        announced.come(&stranger, None);
        assert_eq!(
            learn(&mut announced, &mut table, &sources(&[(20, "veth2")])),
            0
        );
    }

    #[test]
    fn what_is_known_is_not_overruled() {
        let (mut announced, mut table) = (Announced::default(), PodTable::default());
        let there = sources(&[(20, "veth2"), (21, "veth3")]);
        announced.come(&report("a", 2, "veth2"), Some(&there));
        learn(&mut announced, &mut table, &there);
        let known = table.pods().clone();
        let mut lie = report("liar", 2, "veth2");
        lie.pods[0].mac = [2, 0, 0, 0, 5, 99].into();
        announced.come(&lie, Some(&there));
        learn(&mut announced, &mut table, &there);
        assert_eq!(*table.pods(), known);
        // Behind another interface it is another pod, which has got the address.
        announced.come(&report("b", 2, "veth3"), Some(&there));
        learn(&mut announced, &mut table, &sources(&[(21, "veth3")]));
        assert_eq!(
            table.pods()[&IpAddr::from([10, 5, 1, 2])].ifindex,
            index(21)
        );
    }

    #[test]
    fn a_pod_that_goes_is_gone_until_its_interface_is() {
        let (mut announced, mut table) = (Announced::default(), PodTable::default());
        let there = sources(&[(20, "veth2"), (21, "veth3")]);
        for report in [report("a", 2, "veth2"), report("b", 3, "veth3")] {
            announced.come(&report, Some(&there));
        }
        assert_eq!(learn(&mut announced, &mut table, &there), 2);
        let known = table.pods().clone();
        // Another pod's address, or another's interface: nobody goes.
        assert!(
            announced
                .go(&report("a", 2, "veth3"), &known, &there, NOW)
                .is_empty()
        );
        assert!(
            announced
                .go(&report("a", 9, "veth2"), &known, &there, NOW)
                .is_empty()
        );
        let going = announced.go(&report("a", 2, "veth2"), &known, &there, NOW);
        assert_eq!(going, [index(20)].into());
        assert_eq!(learn(&mut announced, &mut table, &there), 1);
        assert_eq!(announced.leaving(&there, NOW + FAREWELL), [].into());
        announced.go(&report("b", 3, "veth3"), &known, &there, NOW);
        assert_eq!(
            announced.leaving(&sources(&[(22, "veth3")]), NOW),
            [].into()
        );
    }

    #[test]
    fn a_pod_that_comes_again_is_not_leaving() {
        let mut announced = Announced::default();
        let there = sources(&[(20, "veth2")]);
        let mut table = PodTable::default();
        announced.come(&report("a", 2, "veth2"), Some(&there));
        learn(&mut announced, &mut table, &there);
        announced.go(&report("a", 2, "veth2"), table.pods(), &there, NOW);
        announced.come(&report("a", 2, "veth2"), Some(&there));
        assert_eq!(learn(&mut announced, &mut table, &there), 1);
    }

    #[test]
    fn a_flood_is_bounded() {
        let mut announced = Announced::default();
        for number in 0..=MOST {
            announced.come(&report(&number.to_string(), 2, "veth2"), None);
        }
        assert_eq!(announced.coming.len(), MOST);
    }
}
