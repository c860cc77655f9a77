//! The agent may die, stop and be replaced at any moment: traffic does not notice.

mod rig;

use flannel_testkit::privileged;
use rig::Rig;

#[test]
fn smoke() {
    if !privileged() {
        return;
    }
    let rig = Rig::start(2, &[]);
    rig.ping(0, 1).unwrap();
    println!(
        "{:?} {:?} {}",
        rig.counters(0),
        rig.device_counters(0),
        rig.status(0)
    );
}
