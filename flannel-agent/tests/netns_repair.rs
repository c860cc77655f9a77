//! Whatever somebody breaks of ours is whole again within two seconds, and peers notice as little as can be: over either family, and
//! where a node has both, mending the one leaves the other alone.

#[path = "netns_repair/both.rs"]
mod both;
#[path = "netns_repair/damages.rs"]
mod damages;
mod rig;

use std::{fs, time::Duration};

use damages::{
    ALL, DEVICE_DAMAGES, Damage, FDB_DAMAGES, MAP_DAMAGES, NOISE, PAIR_DAMAGES, PEER_DAMAGES, named,
};

use flannel_testkit::{
    Families, Family, LabOptions, eventually,
    json::{ip_json, link},
    privileged, try_eventually,
};
use rig::{NET_CONF, PATIENCE, Rig, hooks, list, text};

/// How long the loop may take to mend anything.
const REPAIR: Duration = Duration::from_secs(2);
const UP: u64 = 1;

/// Whether node 0 has everything of all its overlays, and nothing that it should not have.
fn whole(rig: &mut Rig) -> Result<(), String> {
    let looked_at = rig.family();
    let families = rig.lab().families().list();
    let found = families.iter().try_for_each(|family| {
        rig.look_at(*family);
        whole_of(rig, families.len()).map_err(|error| format!("{family}: {error}"))
    });
    rig.look_at(looked_at);
    found
}

/// The same of the overlay that the rig looks at, which is one of this many.
fn whole_of(rig: &Rig, overlays: usize) -> Result<(), String> {
    let family = rig.family();
    let name = rig.device();
    let device = link(rig.ns(0), &name).map_err(|error| format!("{error:#}"))?;
    let lease = rig.lease(0);
    let flags = device["flags"].as_array().into_iter().flatten();
    let mac = text(&device, "address");
    // Pods have one MTU for both families.
    let with_v6 = rig.lab().families().has(Family::V6);
    let mtu = 1500 - if with_v6 { Family::V6 } else { family }.overhead();
    if mac.as_ref() != Some(&lease.mac) || device["mtu"] != mtu {
        return Err(format!(
            "MAC {mac:?}, MTU {}; published is {}",
            device["mtu"], lease.mac
        ));
    }
    if flags.filter(|flag| *flag == "UP").count() as u64 != UP {
        return Err(format!("the device is down: {}", device["flags"]));
    }
    let addresses = ip_json(rig.ns(0), &[family.flag(), "addr", "show", "dev", &name])
        .map_err(|error| format!("{error:#}"))?;
    let addresses: Vec<String> = list(&addresses[0]["addr_info"])
        .iter()
        .filter(|address| address["scope"] != "link")
        .map(|address| {
            format!(
                "{}/{}",
                address["local"].as_str().unwrap_or_default(),
                address["prefixlen"]
            )
        })
        .collect();
    if addresses != [named(rig, "OWN/H")] {
        return Err(format!("its addresses are {addresses:?}"));
    }
    rig.converged(0)?;
    if rig.instance(0).exists() {
        rig.maps_whole(0)?;
        hooks::hooks_of(rig.ns(0), family).of_overlays(overlays)?;
    }
    for peer in 1..=2 {
        rig.ping(0, peer).map_err(|error| format!("{error:#}"))?;
    }
    Ok(())
}

/// Three nodes with an agent each. The IPv6 network is as large as that of IPv4, so that a look at all subnets takes no longer.
fn nodes(families: Families, flags: &[&str]) -> Rig {
    let conf = match families {
        Families::V4 => NET_CONF,
        Families::V6 => {
            r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00:10:244::/56","Backend":{"Type":"vxlan"}}"#
        }
        Families::Dual => {
            r#"{"EnableIPv6":true,"Network":"10.244.0.0/16","IPv6Network":"fd00:10:244::/56","Backend":{"Type":"vxlan"}}"#
        }
    };
    let options = LabOptions {
        nodes: 3,
        families,
        ..LabOptions::default()
    };
    let mut rig = Rig::with(options, conf);
    rig.start_all(flags);
    for family in families.list() {
        rig.look_at(family);
        rig.wait_converged();
    }
    eventually(PATIENCE, "the node is whole at first", || whole(&mut rig));
    rig
}

/// Breaks one thing after the other in each family, and reports all that were not mended in time.
fn mends(families: impl Into<Families>, flags: &[&str], damages: &[Damage]) {
    if !privileged() {
        return;
    }
    let families = families.into();
    let mut rig = nodes(families, flags);
    let published = leases(&rig);
    let mut failures = Vec::new();
    for family in families.list() {
        rig.look_at(family);
        for (name, damage) in damages {
            damage(&rig);
            if let Err(error) = try_eventually(REPAIR, name, || whole(&mut rig)) {
                failures.push(format!("{family}: {error:#}"));
                // The next one starts from a whole node again, if it ever gets there.
                drop(try_eventually(Duration::from_secs(15), name, || {
                    whole(&mut rig)
                }));
            }
            assert_eq!(
                leases(&rig),
                published,
                "{family}, {name}: what peers know has changed"
            );
        }
    }
    assert!(
        failures.is_empty(),
        "not mended in {REPAIR:?}:\n{}",
        failures.join("\n")
    );
}

/// The files of all leases, byte for byte.
fn leases(rig: &Rig) -> Vec<(String, String)> {
    let entries = fs::read_dir(rig.lease_dir().join("subnets")).expect("list the leases");
    let mut all: Vec<(String, String)> = entries
        .map(|entry| entry.expect("a lease").path())
        .map(|path| {
            let text = fs::read_to_string(&path).expect("read a lease");
            (path.display().to_string(), text)
        })
        .collect();
    all.sort();
    all
}

#[test]
fn mends_with_ebpf_by_tcx() {
    by_tcx(Family::V4);
}

#[test]
fn mends_ipv6_with_ebpf_by_tcx() {
    by_tcx(Family::V6);
}

fn by_tcx(family: Family) {
    mends(
        family,
        &["--bpf-attach=tcx"],
        &[
            &DEVICE_DAMAGES[..],
            &PEER_DAMAGES,
            &FDB_DAMAGES,
            &MAP_DAMAGES,
            &ALL,
            &NOISE,
        ]
        .concat(),
    );
}

#[test]
fn mends_with_ebpf_by_clsact() {
    by_clsact(Family::V4);
}

#[test]
fn mends_ipv6_with_ebpf_by_clsact() {
    by_clsact(Family::V6);
}

fn by_clsact(family: Family) {
    mends(
        family,
        &["--bpf-attach=clsact"],
        &[&DEVICE_DAMAGES[..], &ALL].concat(),
    );
}

#[test]
fn mends_with_ebpf_alone() {
    ebpf_alone(Family::V4);
}

#[test]
fn mends_ipv6_with_ebpf_alone() {
    ebpf_alone(Family::V6);
}

fn ebpf_alone(family: Family) {
    mends(
        family,
        &["--bpf-device=veth"],
        &[
            &DEVICE_DAMAGES[..],
            &PEER_DAMAGES,
            &PAIR_DAMAGES,
            &MAP_DAMAGES,
            &ALL,
        ]
        .concat(),
    );
}

#[test]
fn mends_on_the_kernel_path() {
    kernel_path(Family::V4);
}

#[test]
fn mends_ipv6_on_the_kernel_path() {
    kernel_path(Family::V6);
}

fn kernel_path(family: Family) {
    mends(
        family,
        &["--datapath=kernel"],
        &[
            &DEVICE_DAMAGES[..],
            &PEER_DAMAGES,
            &FDB_DAMAGES,
            &ALL,
            &NOISE,
        ]
        .concat(),
    );
}
