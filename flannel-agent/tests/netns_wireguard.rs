//! The encrypted overlay on a kernel without WireGuard. On others `guest_wireguard` shows what it does.

#[path = "rig/confined.rs"]
mod confined;
mod rig;

use confined::complaints;
use flannel_testkit::{Confinement, LabOptions, json::ip_json, privileged};
use rig::Rig;

const NET_CONF: &str = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"wireguard"}}"#;

/// Whether this kernel makes wireguard devices, as `ip` finds out.
fn has_wireguard(rig: &Rig) -> bool {
    let ns = rig.ns(0);
    let made = ns.ip("link add wgprobe type wireguard").is_ok();
    if made {
        ns.ip("link del wgprobe").expect("remove the device");
    }
    made
}

#[test]
fn a_kernel_without_it_is_told_in_one_line_with_what_to_do() {
    if !privileged() {
        return;
    }
    let options = LabOptions {
        nodes: 1,
        ..LabOptions::default()
    };
    let mut rig = Rig::with(options, NET_CONF);
    let before = ip_json(rig.ns(0), &["-d", "link"]).expect("links");
    if has_wireguard(&rig) {
        rig.start_agent(0, &[]);
        rig.wait_ready(0);
        return;
    }
    let (code, said) = rig.run_to_end(0, &[], &Confinement::FREE);
    assert_eq!(code, 4, "{said}");
    let complaints = complaints(&said);
    assert_eq!(complaints.len(), 1, "{said}");
    for needle in [
        "Backend.Type is \"wireguard\"",
        "has no WireGuard",
        "modprobe wireguard",
    ] {
        assert!(complaints[0].contains(needle), "{needle}: {said}");
    }
    assert_eq!(ip_json(rig.ns(0), &["-d", "link"]).expect("links"), before);
}
