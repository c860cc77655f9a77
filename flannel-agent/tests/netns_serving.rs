//! What others see of an agent's health: /healthz, /livez and /readyz, from the first second to the last, and systemd's socket.

#[path = "netns_serving/endpoints.rs"]
mod endpoints;
#[path = "netns_serving/logs.rs"]
mod logs;
#[path = "netns_serving/metrics.rs"]
mod metrics;
#[path = "netns_serving/notify.rs"]
mod notify;
mod rig;

use std::fs;

use flannel_testkit::privileged;
use rig::Rig;

/// A lab of one node without a network configuration.
fn unconfigured() -> Option<Rig> {
    if !privileged() {
        return None;
    }
    let rig = Rig::new(1);
    fs::remove_file(rig.lease_dir().join("config")).expect("remove the configuration");
    Some(rig)
}

/// Gives it one.
fn configure(rig: &Rig, conf: &str) {
    fs::write(rig.lease_dir().join("config"), conf).expect("write the configuration");
}
