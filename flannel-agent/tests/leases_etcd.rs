//! The lease store in etcd, against the system's own: 3.4 on Debian 12.

mod etcd_cases;
mod etcd_server;
mod lease_rig;

use flannel_testkit::EtcdVersion;

const ETCD: EtcdVersion = EtcdVersion::System;
