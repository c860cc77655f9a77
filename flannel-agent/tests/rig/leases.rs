//! The leases of a rig, and whether every node knows what they say.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::{IpAddr, Ipv4Addr},
    path::{Path, PathBuf},
};

use flannel_testkit::{Family, Prefix, Subnet, eventually, json::ip_json};
use serde_json::{Value, json};

use super::{PATIENCE, Peer, Rig, VNI, list, peers_of};

/// Protocol number of our routes on interfaces that are not ours.
const OURS: &str = "241";

impl Rig {
    pub(crate) fn lease_dir(&self) -> &Path {
        &self.lease_dir
    }

    /// The file of a lease.
    pub(crate) fn lease_file(&self, subnet: impl Into<Prefix>) -> PathBuf {
        let subnet = subnet.into();
        let key = match subnet.family() {
            Family::V4 => subnet.lease_key(),
            Family::V6 => format!("0.0.0.0-0&{}", subnet.lease_key()),
        };
        self.lease_dir.join("subnets").join(key)
    }

    /// Writes a lease of IPv4 as another node would: all at once.
    pub(crate) fn put_lease(&self, subnet: Subnet, public_ip: Ipv4Addr, mac: &str) {
        self.put_lease_of(subnet, public_ip, mac);
    }

    /// The same in either family.
    pub(crate) fn put_lease_of(
        &self,
        subnet: impl Into<Prefix>,
        public_ip: impl Into<IpAddr>,
        mac: &str,
    ) {
        let (subnet, public_ip) = (subnet.into(), public_ip.into());
        let data = json!({"VNI": VNI, "VtepMAC": mac});
        let value = match subnet.family() {
            Family::V4 => json!({
                "PublicIP": public_ip, "PublicIPv6": null, "BackendType": "vxlan", "BackendData": data,
            }),
            Family::V6 => json!({
                "PublicIP": "0.0.0.0", "PublicIPv6": public_ip, "BackendType": "vxlan", "BackendV6Data": data,
            }),
        };
        let scratch = self.lease_dir.join("subnets").join(".rig");
        fs::write(&scratch, value.to_string()).expect("write a lease");
        fs::rename(&scratch, self.lease_file(subnet)).expect("put a lease in place");
    }

    /// Removes a lease, as its node does when it leaves for good.
    pub(crate) fn remove_lease(&self, subnet: Subnet) {
        fs::remove_file(self.lease_file(subnet)).expect("remove a lease");
    }

    /// All leases of IPv4.
    pub(crate) fn leases(&self) -> BTreeMap<Subnet, Peer> {
        let leases = self.leases_of(Family::V4).into_iter();
        let leases = leases.filter_map(|(prefix, peer)| Some((prefix.as_subnet()?, peer)));
        leases.collect()
    }

    /// All leases, by the subnet of a family.
    pub(crate) fn leases_of(&self, family: Family) -> BTreeMap<Prefix, Peer> {
        let [public_ip, data] = match family {
            Family::V4 => ["PublicIP", "BackendData"],
            Family::V6 => ["PublicIPv6", "BackendV6Data"],
        };
        let entries = fs::read_dir(self.lease_dir.join("subnets")).expect("list the leases");
        entries
            .filter_map(|entry| {
                let entry = entry.ok()?;
                let name = entry.file_name().to_str()?.replace('-', "/");
                let mut subnets = name.split('&').filter_map(|part| part.parse().ok());
                let subnet: Prefix = subnets
                    .find(|part: &Prefix| part.family() == family && part.prefix_len() > 0)?;
                let value: Value =
                    serde_json::from_str(&fs::read_to_string(entry.path()).ok()?).ok()?;
                let peer = Peer {
                    public_ip: value[public_ip].as_str()?.to_owned(),
                    mac: value[data]["VtepMAC"].as_str()?.to_owned(),
                };
                Some((subnet, peer))
            })
            .collect()
    }

    /// The lease of a node's own subnet.
    #[track_caller]
    pub(crate) fn lease(&self, node: usize) -> Peer {
        let subnet = self.node(node).subnet_of(self.family);
        let mut leases = self.leases_of(self.family);
        leases
            .remove(&subnet)
            .unwrap_or_else(|| panic!("no lease of {subnet}"))
    }

    /// Waits until every agent's node has exactly the peers of the lease directory, in the kernel and, where eBPF carries
    /// traffic, in the maps with a next hop.
    #[track_caller]
    pub(crate) fn wait_converged(&self) {
        for node in self.agents.keys() {
            eventually(PATIENCE, &format!("node {node} knows all peers"), || {
                self.converged(*node)
            });
        }
    }

    /// The route by which node `from` reaches the pods of node `to`; null where there is none.
    #[track_caller]
    pub(crate) fn route(&self, from: usize, to: usize) -> Value {
        let subnet = self.node(to).subnet_of(self.family).to_string();
        let flag = self.family.flag();
        let argv = [flag, "route", "show", &subnet, "table", "main"];
        let routes = ip_json(self.ns(from), &argv).expect("list routes");
        assert!(list(&routes).len() <= 1, "{routes}");
        routes[0].clone()
    }

    /// Whether that route leads straight to the other node, and is ours; else what it is.
    pub(crate) fn is_routed(&self, from: usize, to: usize) -> Result<(), String> {
        let route = self.route(from, to);
        let gateway = self.node(to).address(self.family).to_string();
        let right = route["gateway"] == gateway.as_str()
            && route["dev"] == "eth0"
            && route["protocol"] == OURS
            && list(&route["flags"]).is_empty();
        right.then_some(()).ok_or_else(|| route.to_string())
    }

    /// Waits until all nodes with an agent route to each other.
    #[track_caller]
    pub(crate) fn wait_routed(&self) {
        for from in self.agents.keys() {
            for to in self.agents.keys().filter(|to| *to != from) {
                eventually(PATIENCE, "every peer is routed to", || {
                    self.is_routed(*from, *to)
                });
            }
        }
    }

    /// Whether the node has all peers that it should, and no other; else what is missing.
    pub(crate) fn converged(&self, node: usize) -> Result<(), String> {
        let want = self.converged_kernel(node)?;
        if self.maps_dir(node).exists() {
            let peers = self.peers(node);
            let in_bpf: BTreeSet<String> = peers
                .as_array()
                .into_iter()
                .flatten()
                .filter(|peer| peer["path"] == "bpf")
                .filter_map(|peer| Some(peer["subnet"].as_str()?.to_owned()))
                .filter(|subnet| subnet.contains(':') == (self.family == Family::V6))
                .collect();
            let wanted: BTreeSet<String> = want.keys().map(ToString::to_string).collect();
            if in_bpf != wanted {
                return Err(format!("the maps carry {in_bpf:?}: {peers}"));
            }
        }
        Ok(())
    }

    /// Whether the kernel of the node has all peers that it should, and no other; else what is missing.
    pub(crate) fn converged_kernel(&self, node: usize) -> Result<BTreeMap<Prefix, Peer>, String> {
        let own = self.node(node).subnet_of(self.family);
        let mut want = self.leases_of(self.family);
        want.remove(&own)
            .ok_or_else(|| format!("no lease of {own}"))?;
        let (kind, have) =
            peers_of(self.ns(node), self.family).map_err(|error| format!("{error:#}"))?;
        if kind != "vxlan" {
            // A veth pair has no forwarding entries, which alone hold the peers' addresses.
            for peer in want.values_mut() {
                peer.public_ip.clear();
            }
        }
        if have != want {
            return Err(format!("the kernel has {have:?}, wanted {want:?}"));
        }
        Ok(want)
    }
}
