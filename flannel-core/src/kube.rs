//! Leases in the Kubernetes API: what a Node object says of a node, and what this node has to write into its own.
//!
//! A node's subnet is its pod CIDR, which the cluster assigns; what flannel adds are annotations (upstream:
//! pkg/subnet/kube). Reading never fails as a whole: a node that cannot be read costs nobody else its place.

mod cluster;
mod names;
mod node;
mod own;

pub use cluster::{Cluster, Twin, read_cluster, shared_addresses};
pub use names::{DEFAULT_PREFIX, Field, Names, PrefixError};
pub use node::{Families, Node, NodeError, Reading, read_lease, subnets_of};
pub use own::{Overwrite, OwnPlan, granularity, plan_own, stored_attrs};

#[cfg(test)]
mod tests;
