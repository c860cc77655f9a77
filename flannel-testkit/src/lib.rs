//! A network-namespace lab for tests and benches: nodes on an underlay, pods behind `cni0`, captures, exact traffic.
//!
//! Everything a [`Lab`] makes carries its owner in its name (`fe-<pid>-<lab>-…`) or environment, lives in namespaces
//! of its own and is removed when the lab is dropped. Nothing else on the machine is ever touched: the
//! lab creates no interface, address or rule outside its namespaces. What a killed run left behind is
//! found by the same marks and removed by the next one ([`Lab::sweep_dead`]).
//!
//! Needs root (or `CAP_SYS_ADMIN` and `CAP_NET_ADMIN` over `/run/netns`), `ip`, and for some parts `ethtool`, `tcpdump`,
//! `tshark`, `iperf3`, `etcd` and `etcdctl`. Panics and `anyhow` are fine here: only tests and benches use it.
//!
//! ```no_run
//! use flannel_testkit::{Lab, LabOptions, traffic};
//! use std::time::Duration;
//!
//! let lab = Lab::new(LabOptions { nodes: 2, ..LabOptions::default() }).unwrap();
//! let pod = lab.node(0).add_pod(lab.node(0).subnet, 2, 1450).unwrap();
//! traffic::ping_once(&pod.ns, pod.gateway, Duration::from_secs(1)).unwrap();
//! ```

pub mod agent;
pub mod apiserver;
pub mod capture;
pub mod cluster;
pub mod cni;
mod confine;
pub mod conntrack;
pub mod etcd;
mod eventually;
mod family;
pub mod http;
pub mod json;
pub mod kernel_node;
mod lab;
mod netns;
mod nics;
mod node;
pub mod packet;
pub mod pcap;
pub mod process;
pub mod queue;
pub mod relay;
pub mod services;
mod socket;
mod state;
mod subnet;
mod sweep;
pub mod traffic;
pub mod upstream;

pub use agent::AgentProcess;
pub use apiserver::ApiServer;
pub use capture::{Capture, Captured, Direction};
pub use cluster::Cluster;
pub use confine::{BpfCall, Capability, Confinement, apply as confine};
pub use etcd::{Etcd, EtcdVersion};
pub use eventually::{eventually, patience, try_eventually};
pub use family::{Families, Family, Prefix};
pub use kernel_node::KernelNode;
pub use lab::{Lab, LabOptions, Offloads, privileged};
pub use netns::Netns;
pub use nics::Nics;
pub use node::{Node, Pod, mac_for, mac_text};
pub use pcap::Packet;
pub use process::put_program;
pub use socket::{RawSocket, send_ip, send_raw, set_socket_bytes, set_socket_option};
pub use subnet::Subnet;
pub use upstream::Upstream;
