//! The lease store in the Kubernetes API, against a server that behaves as kube-apiserver does.

#[expect(dead_code, reason = "a part of it is about other stores")]
mod lease_rig;

#[path = "leases_kube/condition.rs"]
mod condition;
#[path = "leases_kube/credentials.rs"]
mod credentials;
#[path = "leases_kube/families.rs"]
mod families;
#[path = "leases_kube/offline.rs"]
mod offline;
#[path = "leases_kube/own.rs"]
mod own;
#[path = "leases_kube/refused.rs"]
mod refused;
#[path = "leases_kube/rig.rs"]
mod rig;
#[path = "leases_kube/start.rs"]
mod start;
#[path = "leases_kube/watch.rs"]
mod watch;
