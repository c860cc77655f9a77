//! The lease store in etcd, against a real one.

mod etcd_cases;
mod etcd_server;
mod lease_rig;
